"""Constant state, constant latency, measured: time per token of prefill and of decoding, by context length.

    python -m train.latency                                     # two layers of SmolLM2-135M's shape, random weights
    python -m train.latency --preset qwen3-0.6b --layers 28 --lengths 4096 32768 131072          # on an accelerator

Weights are random: time does not depend on them. The time of a length is that of its last `span` tokens, the context
before them already read (the median of their pieces), so that each figure stands for one length and not for an average.
"""

import dataclasses
import json
import pathlib
import time
from typing import Any

import jax
import numpy as np
import tqdm
import tyro

from allmem_jax import config as config_lib
from allmem_jax import generation, model
from allmem_jax import state as state_lib


@dataclasses.dataclass(frozen=True)
class LatencyConfig:
    """Measures prefill and decoding at growing context lengths."""

    preset: str = "smollm2-135m"
    """Shape of the model; see `allmem info`."""
    layers: int = 2
    """Layers of it to keep."""
    lengths: tuple[int, ...] = (4096, 8192, 16384, 32768)
    """Context lengths, in tokens, ascending."""
    window: int = 512
    """Window of the attention."""
    sinks: int = 4
    """Sink tokens."""
    chunk: int = 256
    """Tokens between two updates of the memory."""
    piece: int = 256
    """Tokens read at a time."""
    span: int = 2048
    """Tokens before each length that are timed, piece by piece; the median counts."""
    decode: int = 64
    """Tokens that a decoding time is the median of."""
    out: pathlib.Path | None = None
    """JSON file for the figures, if any."""


def measure(settings: LatencyConfig) -> list[dict[str, float]]:
    """One row per length: seconds per token of prefill and of decoding, bytes of the state, programs compiled."""
    config = config_lib.preset(
        settings.preset, n_layers=settings.layers, window=settings.window, sinks=settings.sinks, chunk=settings.chunk,
        local_layers=config_lib.preset(settings.preset).local_layers[: settings.layers],
    )  # fmt: skip
    params = model.init_params(config)
    rng = np.random.default_rng(0)
    state = state_lib.init_state(config, 1)
    programs: tuple[Any, ...] = (generation.prefill_piece, generation.decode_step)
    rows, seen = [], 0
    with tqdm.tqdm(total=settings.lengths[-1], unit="tok", disable=None) as bar:

        def read(count: int, state: state_lib.DecodeState) -> tuple[jax.Array, state_lib.DecodeState]:
            text = rng.integers(0, config.vocab_size, count)
            prompts = [text.tolist()]
            result = generation.prefill(params, config, prompts, state=state, piece=settings.piece, progress=bar.update)
            return jax.block_until_ready(result)

        for length in settings.lengths:
            if length - settings.span <= seen or settings.span < settings.piece:
                raise ValueError(
                    f"lengths={settings.lengths} must ascend by more than span={settings.span}, and that must hold at "
                    f"least one piece={settings.piece}"
                )
            _, state = read(length - settings.span - seen, state)
            pieces: list[float] = []
            for _ in range(settings.span // settings.piece):
                began = time.perf_counter()
                logits, state = read(settings.piece, state)
                pieces.append((time.perf_counter() - began) / settings.piece)
            times, before = [], time.perf_counter()
            for _ in generation.stream(params, config, logits, state, max_tokens=settings.decode):
                times.append(time.perf_counter() - before)
                before = time.perf_counter()
            seen = length
            rows.append({
                "length": length, "prefill_s": float(np.median(pieces)), "decode_s": float(np.median(times)),
                "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
                "programs": sum(f._cache_size() for f in programs),
            })  # fmt: skip
    return rows


def main(settings: LatencyConfig) -> None:
    """Measures and prints the table."""
    rows = measure(settings)
    print(f"{'tokens':>8} {'prefill ms/token':>17} {'decode ms/token':>16} {'state MB':>9} {'programs':>9}")
    for row in rows:
        print(
            f"{row['length']:>8} {1e3 * row['prefill_s']:>17.3f} {1e3 * row['decode_s']:>16.2f} "
            f"{row['state_bytes'] / 1e6:>9.2f} {row['programs']:>9}"
        )
    print(f"prefill, last over first: {rows[-1]['prefill_s'] / rows[0]['prefill_s']:.2f} x per token")
    if settings.out is not None:
        settings.out.parent.mkdir(parents=True, exist_ok=True)
        settings.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main(tyro.cli(LatencyConfig, description=__doc__))

"""Constant state, constant latency, measured: time per token of prefill and of decoding, by mixer and context length.

Weights are random and contexts are not read: a state that has read one piece is told that it stands at the context.
Neither changes the time. The shapes, and so the program and its time, are those of a state that has read everything.
What a mixer of constant state runs at every context is one program for prefill and one for decoding. Full attention has
a cache of exactly the context, so every context compiles its own two.
"""

import dataclasses
import os
import pathlib
import platform
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from allmem_jax.decoding import generation
from allmem_jax.evaluation import cost
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.model import state as state_lib
from allmem_jax.reporting import sections

CONTEXTS = (1024, 4096, 16384)
HEADER = ("mixer", "tokens", "prefill ms/token", "decode ms/token", "state MB", "programs")


def small(config: config_lib.ModelConfig) -> config_lib.ModelConfig:
    """The shape of a model with two layers, a window of 512 at most and few words: the time is the mixers'."""
    return config.replace(
        n_layers=min(config.n_layers, 2),
        local_layers=config.local_layers[:2],
        vocab_size=min(config.vocab_size, 1024),
        window=min(config.window, 512),
        chunk=min(config.chunk, config.window, 256),
        dtype="float32",
    )


def measure(
    config: config_lib.ModelConfig,
    *,
    mixers: Sequence[str] = cost.MIXERS,
    contexts: Sequence[int] = CONTEXTS,
    piece: int = 256,
    repeats: int = 3,
    decode: int = 16,
) -> list[dict[str, Any]]:
    """Times every mixer at every context, one sequence at a time, in this process.

    Args:
      config: the shape; its mixer plays no part.
      mixers: of `config.MIXERS`.
      contexts: context lengths in tokens, each at least `piece`.
      piece: tokens read at a time.
      repeats: how often the last piece before the context is read from the same state.
      decode: tokens decoded from the context on.

    Returns:
      A row for each mixer and context: "mixer", "context", medians "prefill_s" and "decode_s" in seconds per token,
      "state_bytes", and "programs", how many this mixer has compiled so far.
    """
    if not contexts or min(contexts) < piece or piece < 1:
        raise ValueError(f"contexts={tuple(contexts)} must each hold at least one piece={piece} of at least 1 token")
    if repeats < 1 or decode < 1:
        raise ValueError(f"repeats={repeats} and decode={decode} must be at least 1: a median needs a time")
    rows = []
    with tqdm.tqdm(total=len(mixers) * len(contexts), desc="timing", disable=None) as bar:
        for mixer in mixers:
            params = lm.unstack(lm.init_params(config.replace(mixer=mixer)), dtype=config.dtype, donate=True)
            before = _programs()
            for context in contexts:
                here = config.replace(mixer=mixer)
                if mixer == "full":
                    here = config.replace(mixer="swa", window=context, sinks=0)
                times = _time(params, here, context, piece, repeats, decode)
                rows.append({"mixer": mixer, "context": context, **times, "programs": _programs() - before})
                bar.update()
    return rows


def _programs() -> int:
    programs: tuple[Any, ...] = (generation.prefill_piece, generation.decode_step)
    return sum(program._cache_size() for program in programs)


def _time(
    params: lm.Params, config: config_lib.ModelConfig, context: int, piece: int, repeats: int, decode: int
) -> dict[str, float]:
    """Medians, in seconds per token, of reading the last piece before `context` and of decoding after it."""
    text = np.random.default_rng(0).integers(0, config.vocab_size, piece).tolist()

    def read(state: state_lib.DecodeState | None) -> tuple[jax.Array, state_lib.DecodeState]:
        return jax.block_until_ready(generation.prefill(params, config, [text], state=state, piece=piece))

    _, state = read(None)  # compiles
    state = dataclasses.replace(state, position=jnp.full((1,), context - piece, jnp.int32))
    pieces = []
    for _ in range(repeats):
        began = time.perf_counter()
        logits, after = read(state)
        pieces.append((time.perf_counter() - began) / piece)
    return {
        "prefill_s": float(np.median(pieces)),
        "decode_s": float(np.median(decode_seconds(params, config, logits, after, decode))),
        "state_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(after)),
    }


def decode_seconds(
    params: lm.Params, config: config_lib.ModelConfig, logits: jax.Array, state: state_lib.DecodeState, tokens: int
) -> list[float]:
    """Seconds of each of `tokens` tokens decoded from there on, after one that copies the state and may compile."""
    seconds, began = [], time.perf_counter()
    for _, _, after, _ in generation.stream(params, config, logits, state, max_tokens=tokens + 1, stop_tokens=()):
        jax.block_until_ready(after)
        seconds.append(time.perf_counter() - began)
        began = time.perf_counter()
    return seconds[1:]


def hardware() -> dict[str, str]:
    """What the times were taken on: device, processor, cores that this process may use, versions."""
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "device": jax.devices()[0].device_kind,
        "processor": names[0] if names else platform.machine(),
        "cores": str(cores),
        "system": platform.platform(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def section(config: config_lib.ModelConfig, name: str, **settings: Any) -> sections.Section:
    """Measures a shape; see `measure` for the settings.

    Args:
      config: the shape, as `small` gives it for a quick run.
      name: of the model, for the heading and the command.
      **settings: of `measure`.
    """
    rows = measure(config, **settings)
    machine = hardware()
    mixers = sorted(dict.fromkeys(row["mixer"] for row in rows), key=lambda mixer: mixer != config.memory_mixer)
    shape = (
        f"{config.n_layers} layers of {name}'s shape with a vocabulary of {config.vocab_size}, random weights, "
        f"{config.dtype}, window {config.window}, {config.sinks} sinks, chunk {config.chunk}; one sequence; medians. "
        "A context is not read: the state is told that it stands there. "
        f"On {', '.join(f'{key} {value}' for key, value in machine.items())}."
    )
    return sections.Section(
        name=f"latency-{pathlib.Path(name).name}",
        title=f"Time per token by context length, {name}",
        command=sections.command("cost", name, measure=True),
        text=(*(_finding(mixer, rows) for mixer in mixers), shape),
        tables=(sections.Table("one sequence; programs compiled so far by the mixer", HEADER, _cells(rows)),),
        plots=(
            _plot(rows, "Prefill", "ms per token", "prefill_s", 1e3, config.window),
            _plot(rows, "Decoding", "ms per token", "decode_s", 1e3, config.window),
            _plot(rows, "State of one sequence", "MB", "state_bytes", 1e-6, config.window),
        ),
        data={"rows": rows, "hardware": machine},
    )


def _finding(mixer: str, rows: list[dict[str, Any]]) -> str:
    """The sentence on one mixer: its longest context against its shortest."""
    own = sorted((row for row in rows if row["mixer"] == mixer), key=lambda row: row["context"])
    first, last = own[0], own[-1]
    ratios = [last[key] / first[key] for key in ("prefill_s", "decode_s", "state_bytes")]
    return (
        f"{mixer}: at {last['context']:,} tokens of context a token takes {ratios[0]:.2f} x the time of one at "
        f"{first['context']:,} in prefill and {ratios[1]:.2f} x in decoding; the state is {ratios[2]:.2f} x; "
        f"{max(row['programs'] for row in own)} programs compiled for {len(own)} contexts."
    )


def _cells(rows: list[dict[str, Any]]) -> tuple[tuple[str, ...], ...]:
    return tuple(
        (
            row["mixer"],
            str(row["context"]),
            f"{1e3 * row['prefill_s']:.3f}",
            f"{1e3 * row['decode_s']:.2f}",
            f"{row['state_bytes'] / 1e6:.2f}",
            str(row["programs"]),
        )
        for row in rows
    )


def _plot(rows: list[dict[str, Any]], title: str, unit: str, key: str, scale: float, window: int) -> sections.Plot:
    lines = {}
    for mixer in dict.fromkeys(row["mixer"] for row in rows):
        own = [row for row in rows if row["mixer"] == mixer]
        lines[mixer] = (tuple(float(row["context"]) for row in own), tuple(scale * row[key] for row in own))
    return sections.Plot(title, "context (tokens)", unit, lines, log_x=True, log_y=True, mark_x=float(window))

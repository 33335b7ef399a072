"""What windowed attention with sinks loses against the original before any training, for several windows and sinks.

    python -m train.experiments.compare moby_dick.txt persuasion.txt --length 2048

Window and sinks are traced: all pairs run through one compiled program.
"""

import dataclasses
import json
import pathlib
import sys
from typing import Annotated

import jax.numpy as jnp
import numpy as np
import tqdm
import tyro

from allmem_jax.checkpoints import load as load_lib
from allmem_jax.evaluation import divergence as divergence_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.storage import files, stores
from train import errors, fetch


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Prints the KL from the original (nats per token) beyond and inside the window, per window/sinks pair and text."""

    texts: Annotated[tuple[pathlib.Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="TEXT ...")]
    """UTF-8 text files."""
    model: pathlib.Path | None = None
    """A Hugging Face folder or a .gguf file; default: the demo's SmolLM2-135M-Instruct, fetched where it is missing."""
    windows: tuple[int, ...] = (128, 128, 128, 256, 512)
    """Window of each pair, in tokens."""
    sinks: tuple[int, ...] = (0, 4, 128, 4, 4)
    """Sinks of each pair."""
    length: int = 2048
    """Tokens of a sequence."""
    sequences: int = 1
    """Sequences from each text, spread over it."""
    out: pathlib.Path | None = None
    """A JSON file for the numbers."""


def divergence(
    config: config_lib.ModelConfig, backbone: lm.Params, tokens: np.ndarray, pairs: list[tuple[int, int]]
) -> list[tuple[float, float]]:
    """(inside, beyond) mean KL of each (window, sinks) pair.

    Args:
      config: of the model; its own window and sinks play no part.
      backbone: its parameters.
      tokens: int32 [n, L + 1].
      pairs: windows, each shorter than L, and sinks.
    """
    original, windowed = config.replace(mixer="full"), config.replace(mixer="swa", window=1, sinks=0)
    kl = np.zeros((len(pairs), len(tokens), tokens.shape[1] - 1))
    for index, row in enumerate(tqdm.tqdm(tokens, disable=not sys.stderr.isatty(), leave=False)):
        inputs, targets = jnp.asarray(row[None, :-1]), jnp.asarray(row[None, 1:])
        teacher = divergence_lib.hidden_states(backbone, original, inputs)
        students = [
            divergence_lib.hidden_states(backbone, windowed, inputs, jnp.int32(window), jnp.int32(sinks))
            for window, sinks in pairs
        ]
        kl[:, index] = divergence_lib.divergence(backbone, original, jnp.stack(students), teacher, targets)[0][:, 0]
    means = zip(pairs, kl, strict=True)
    return [(float(rows[:, :window].mean()), float(rows[:, window:].mean())) for (window, _), rows in means]


def run(config: CompareConfig) -> dict[str, dict[str, tuple[float, float]]]:
    """text -> "window/sinks" -> (KL inside, KL beyond)."""
    if len(config.windows) != len(config.sinks) or not config.windows:
        raise ValueError(f"windows={config.windows} and sinks={config.sinks} must pair up, one of each at least")
    if max(config.windows) >= config.length:
        raise ValueError(f"windows={config.windows} must be shorter than length={config.length}")
    model_config, params, tokenizer = load_lib.load_with_tokenizer(config.model or fetch.fetch("smollm2"))
    backbone, _ = lm.split_params(params)
    pairs = list(zip(config.windows, config.sinks, strict=True))
    texts = {path.name: path.read_text(encoding="utf-8") for path in config.texts}
    results = {}
    for name, tokens in divergence_lib.cut_texts(tokenizer, texts, config.length, config.sequences).items():
        values = divergence(model_config, backbone, tokens, pairs)
        results[name] = {f"{w}/{s}": value for (w, s), value in zip(pairs, values, strict=True)}
    return results


def show(results: dict[str, dict[str, tuple[float, float]]]) -> str:
    """The table, in Markdown: KL beyond the window, and the largest inside it."""
    lines = ["| window/sinks | " + " | ".join(results) + " | largest inside |", "|---" * (len(results) + 2) + "|"]
    for pair in next(iter(results.values())):
        cells = [f"{results[text][pair][1]:.3f}" for text in results]
        inside = max(results[text][pair][0] for text in results)
        lines.append(f"| {pair} | {' | '.join(cells)} | {inside:.1e} |")
    return "\n".join(lines)


def main() -> None:
    """The command."""
    with errors.one_line(fetch.FetchError):
        config = tyro.cli(CompareConfig, prog="python -m train.experiments.compare")
        stores.local_only(config.out or "", "out")
        if not config.texts:
            raise ValueError("give at least one text file")
        results = run(config)
        print(show(results))
        if config.out:
            files.write(config.out, json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

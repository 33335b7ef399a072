"""A model beside transformers on the same file and machine: `python -m train.experiments.peers MODEL.gguf`.

Both read one prompt and then decode, one row, greedily. Ours is the model as it is ("full"), with windowed attention
("swa"), and with a memory beside it ("allmem"). All take turns, so that what else the machine does hits them alike, and
the ratios are of medians in one run.
"""

import importlib.metadata
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tqdm
import transformers
import tyro

from allmem_jax.checkpoints import load, save
from allmem_jax.decoding import generation
from allmem_jax.evaluation import latency
from allmem_jax.model import lm
from allmem_jax.reporting import sections
from allmem_jax.storage import files
from train import errors

Run = Callable[[list[int], int], tuple[float, list[float]]]  # prompt, tokens -> seconds of the prompt and of each token
PEER = "transformers"
PACKAGES = ("jax", "jaxlib", "torch", "transformers")


def measure(
    model: pathlib.Path, dtype: str, window: int, prompt: int, decode: int, repeats: int
) -> dict[str, dict[str, float]]:
    """Tokens a second, {"prefill", "decode"}, of each contestant. The first turn of each, which compiles, is left out.

    Args:
      model: a GGUF file or a Hugging Face folder.
      dtype: "float32" or "bfloat16", of weights and arithmetic.
      window: of "swa" and "allmem", in tokens.
      prompt, decode: tokens read, and decoded after them.
      repeats: turns that count.
    """
    runs = {name: _ours(model, dtype, name, window) for name in ("full", "swa", "allmem")}
    runs[PEER] = _theirs(model, dtype)
    tokens = np.random.default_rng(0).integers(0, load.read_config(model).vocab_size, prompt).tolist()
    read: dict[str, list[float]] = {name: [] for name in runs}
    step: dict[str, list[float]] = {name: [] for name in runs}
    with tqdm.tqdm(total=(repeats + 1) * len(runs), desc=dtype, disable=None) as bar:
        for turn in range(repeats + 1):
            for name, run in runs.items():
                seconds, each = run(tokens, decode)
                if turn:
                    read[name].append(seconds)
                    step[name] += each
                bar.update()
    return {
        name: {"prefill": prompt / statistics.median(read[name]), "decode": 1 / statistics.median(step[name])}
        for name in runs
    }


def _ours(model: pathlib.Path, dtype: str, mixer: str, window: int) -> Run:
    sizes: dict[str, Any] = {} if mixer == "full" else {"window": window, "sinks": 4}
    sizes |= {"chunk": 64, "read_out": "difference", "delay": True} if mixer == "allmem" else {}
    config, params, _ = load.load_pretrained(model, dtype=dtype, mixer=mixer, **sizes)
    params = lm.unstack(params, dtype=config.dtype)

    def run(tokens: list[int], decode: int) -> tuple[float, list[float]]:
        here, state = generation.with_room(config, None, 1, len(tokens) + decode)
        began = time.perf_counter()
        logits, state = jax.block_until_ready(generation.prefill(params, here, [tokens], state=state))
        seconds = time.perf_counter() - began
        return seconds, latency.decode_seconds(params, here, logits, state, decode - 1)

    return run


def _theirs(model: pathlib.Path, dtype: str) -> Run:
    config, params, _ = load.load_pretrained(model, dtype=dtype, mixer="full")
    with tempfile.TemporaryDirectory() as folder:  # of a GGUF file transformers may keep the weights quantised
        save.save_pretrained(folder, config, params)
        network = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)

    def run(tokens: list[int], decode: int) -> tuple[float, list[float]]:
        prompt = transformers.BatchEncoding({"input_ids": [tokens]}, tensor_type="pt")["input_ids"]
        began = time.perf_counter()
        out = network(prompt, use_cache=True, logits_to_keep=1)
        seconds = time.perf_counter() - began
        steps = []
        for _ in range(decode - 1):
            began = time.perf_counter()
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = network(token, past_key_values=out.past_key_values, use_cache=True)
            steps.append(time.perf_counter() - began)
        return seconds, steps

    return run


def main(
    model: Annotated[pathlib.Path, tyro.conf.Positional],
    dtypes: tuple[Literal["float32", "bfloat16"], ...] = ("float32", "bfloat16"),
    window: int = 512,
    prompt: int = 1900,
    decode: int = 32,
    repeats: int = 3,
    out: pathlib.Path = pathlib.Path("out/peers.json"),
) -> None:
    """Times a model beside transformers: reading a prompt and decoding after it, tokens a second.

    Args:
      model: a GGUF file or a Hugging Face folder.
      dtypes: of weights and arithmetic.
      window: tokens that windowed attention sees, 4 sinks beside them.
      prompt: tokens to read.
      decode: tokens to decode after them.
      repeats: turns of each, whose medians count.
      out: JSON with all figures, versions and the machine.
    """
    found = {dtype: measure(model, dtype, window, prompt, decode, repeats) for dtype in dtypes}
    rows = []
    for dtype, speeds in found.items():
        for name, speed in speeds.items():
            ratios = {what: speed[what] / speeds[PEER][what] for what in speed}
            cells = (f"{speed[what]:.1f}  ({ratios[what]:.2f} x)" for what in ("prefill", "decode"))
            rows.append((f"{name}, {dtype}", *cells))
    header = ("", f"prefill of {prompt:,}, tokens/s", "decode after it, tokens/s")
    print(sections.plain(sections.Table(f"{model.stem} beside {PEER}", header, tuple(rows))))
    versions = {package: importlib.metadata.version(package) for package in PACKAGES}
    kept = {"found": found, "versions": versions, "machine": latency.hardware(), "window": window}
    files.write(out, json.dumps(kept, indent=2))


if __name__ == "__main__":
    with errors.one_line():
        tyro.cli(main, prog="python -m train.experiments.peers")

"""`allmem convert`."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import tyro

from allmem_jax.cli import options, terminal

Out = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]


@dataclasses.dataclass(frozen=True)
class Shape:
    """What a fresh memory is."""

    n_mem: int | None = None
    """Heads of the memory. Default: the model's key-value heads, but at most 8, and 4 where it has one or two."""
    d_mem: int | None = None
    """Dimension of a head of the memory. Default: 64."""
    read_out: Literal["difference", "full"] | None = None
    """What is read of the memory: the difference of f(W, q) to that of the initial weights, which is silent until
    something was written, or f(W, q) itself (full, the paper). Default: difference."""
    delay: bool | None = None
    """Write a token when it leaves the window (True), so that the memory adds nothing within, or as it comes (False,
    the paper). Default: True."""
    qk_scale: Literal["l2", "rms"] | None = None
    """Norm of the memory's queries and keys: 1 (l2, the paper and the default) or sqrt(d_mem) (rms)."""


def convert(
    model: options.Model,
    out: Out,
    memory: options.Memory = None,
    sizes: options.SizeOptions = options.SIZES,
    shape: Annotated[Shape, tyro.conf.arg(name="")] = Shape(),
    start: Literal["attention", "random"] | None = None,
    texts: tuple[pathlib.Path, ...] = (),
    seed: int = 0,
    dtype: options.DType = "float32",
    overwrite: bool = False,
) -> None:
    """Add a memory to a pretrained model: a fresh one, or one that was trained for it.

    The output scale of a fresh one starts at zero: until it is trained, the result equals the model with windowed
    attention and sinks. Its defaults are what was found to work; the paper's are one option away each. Window, sinks
    and chunk are by default 4096, 128 and 2048, or those of a trained memory. The folder stays a valid Hugging Face
    model (the original), with the memory beside it in allmem.safetensors.

    Example: allmem convert SmolLM2-135M-Instruct.Q4_1.gguf smollm2-allmem --window 128 --sinks 4 --chunk 64

    Args:
        out: Folder to write, or its URL.
        start: What the memory starts from: the projections of each layer's attention, with learning rates that are
            fitted to a text, or random ones (the paper). Default: attention.
        texts: UTF-8 text files for that; default: Python's documentation.
        seed: Of the memory's initial values.
        overwrite: Replace what is in the folder.
    """
    from allmem_jax.storage import stores

    if stores.taken(out) and not overwrite:
        raise FileExistsError(f"{out} exists: give another folder, or add --overwrite to replace it")
    stores.check_writable(out)
    from allmem_jax.checkpoints import load, save
    from allmem_jax.evaluation import cost
    from allmem_jax.model import lm

    terminal.say(f"reading {model}")
    fields = options.given(shape)
    if memory is None:
        fields = dict(window=4096, sinks=128, chunk=2048, read_out="difference", delay=True) | fields
        start = start or "attention"
    elif fields or start:
        raise ValueError(f"memory={memory}: a trained memory is as it is; leave out {', '.join(fields) or 'start'}")
    fields |= options.given(sizes)
    config, params, tokenizer = load.load_pretrained(model, dtype=dtype, memory=memory, **fields)
    config = config.replace(mixer=config.memory_mixer)
    backbone, added = lm.split_params(params)
    if start == "attention":
        added = _from_attention(config, backbone, tokenizer, texts, seed)
    elif memory is None:
        added = lm.init_memory(config, seed)
    terminal.say(f"writing {out}")
    save.save_pretrained(out, config, lm.merge_params(backbone, added), tokenizer, overwrite=overwrite)
    millions = cost.parameter_groups(config)["memory"] / 1e6
    print(f"{out}: {millions:.1f} M parameters of memory added, {cost.added_share(config):.1%} of the model")


def _from_attention(config: Any, backbone: Any, tokenizer: Any, texts: Sequence[pathlib.Path], seed: int) -> Any:
    from allmem_jax.checkpoints import start
    from allmem_jax.evaluation import divergence_report

    if tokenizer is None:
        raise ValueError(
            "start=attention reads a text, and the model has no tokenizer: copy the original's tokenizer.json into the "
            "folder, or give --start random"
        )
    text = "\n".join(divergence_report.read_texts(texts).values())[: 16 * start.LENGTH]
    tokens = tokenizer.encode(text, add_special_tokens=False)[: start.LENGTH]
    progress = terminal.progress(config.n_layers, "starting the memory from the attention")
    return start.from_attention(config, backbone, tokens, seed, progress)

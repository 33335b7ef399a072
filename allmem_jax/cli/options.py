"""What several commands are told alike, declared once, and what follows from it."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import tyro

from allmem_jax.cli import terminal

Mixer = Literal["allmem", "mamba2", "delta", "swa", "full"]
Suite = Literal["longbench", "longbench_e", "infinitebench", "lveval"]
DType = Annotated[Literal["float32", "bfloat16"], tyro.conf.arg(help="Of weights and activations.")]


def _read(given: list[str]) -> pathlib.Path:
    """What to read in place of an argument, which may be a URL."""
    from allmem_jax.storage import stores

    try:
        return stores.local(given[0])
    except ValueError as error:
        raise OSError(str(error)) from None  # of a ValueError tyro would not say the reason


_READ: tyro.constructors.PrimitiveConstructorSpec[pathlib.Path] = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="PATH",
    instance_from_str=_read,
    is_instance=lambda value: isinstance(value, pathlib.Path),
    str_from_instance=lambda value: [str(value)],
)
ReadPath = Annotated[pathlib.Path, _READ]
Model = Annotated[
    ReadPath,
    tyro.conf.Positional,
    tyro.conf.arg(
        metavar="MODEL",
        help="Converted folder, Hugging Face folder (safetensors) or .gguf file; like all that is read, it may be a "
        "URL (hf://OWNER/NAME of the Hugging Face Hub, gs://, s3://).",
    ),
]
Out = Annotated[str, tyro.conf.arg(metavar="FOLDER")]
Texts = Annotated[
    tuple[ReadPath, ...],
    tyro.conf.Positional,
    tyro.conf.arg(metavar="TEXT ...", help="UTF-8 text files; default: Python's documentation."),
]
Memory = Annotated[
    str | None,
    tyro.conf.arg(
        help="A trained memory for a model without one: a file, or the name of one that comes with this package, such "
        "as smollm2-135m-instruct. Window, sinks and chunk are then those it was trained with."
    ),
]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the model sees at once."""

    window: int | None = None
    """Tokens that attention sees, the current one among them; default: what the model was converted with."""
    sinks: int | None = None
    """First tokens that attention always sees."""
    chunk: int | None = None
    """Tokens between two updates of the memory; more than the window leaves a blind gap."""


@dataclasses.dataclass(frozen=True)
class Mixing(Sizes):
    """How a model on disk is to run."""

    memory: Memory = None
    mixer: Mixer | None = None
    """allmem: window, sinks and memory; mamba2, delta: the same with a baseline in the memory's place; swa: window
    and sinks; full: the original attention. Default: as the model was converted, or full where it has no memory."""
    dtype: DType = "float32"


@dataclasses.dataclass(frozen=True)
class Writing:
    """How an answer is written."""

    max_tokens: int = 200
    """Longest answer, in tokens."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0 is all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that together reach this probability."""
    seed: int = 0
    """Of the draws."""
    stop: Annotated[tuple[tuple[str, ...], ...], tyro.conf.arg(metavar="TEXT ..."), tyro.conf.UseAppendAction] = ()
    """Texts that end an answer, without being shown; may be given several times."""
    thinking: Literal["on", "off"] | None = None
    """Whether the model thinks aloud before it answers in a chat; default: as its template has it."""


MixingOptions = Annotated[Mixing, tyro.conf.arg(name="")]
SizeOptions = Annotated[Sizes, tyro.conf.arg(name="")]
WritingOptions = Annotated[Writing, tyro.conf.arg(name="")]
MIXING, SIZES, WRITING = Mixing(), Sizes(), Writing()  # defaults
TALKING = Writing(max_tokens=512, temperature=0.7, top_p=0.9)


def given(options: Any) -> dict[str, Any]:
    """The options of a dataclass that were set."""
    return {name: value for name, value in vars(options).items() if value is not None}


def load_model(model: pathlib.Path, mixing: Mixing) -> tuple[Any, Any, Any]:
    """Config, parameters and tokenizer as `mixing` asks for; a memory that is asked for and missing is made."""
    from allmem_jax.checkpoints import load
    from allmem_jax.storage import jit_cache

    jit_cache.keep()
    terminal.say(f"reading {model}")
    return load.load_with_tokenizer(model, **given(mixing))


def load_to_decode(model: pathlib.Path, mixing: Mixing) -> tuple[Any, Any, Any]:
    """`load_model` for a command that decodes and does nothing else with the parameters (`lm.unstack`)."""
    from allmem_jax.model import lm

    config, params, tokenizer = load_model(model, mixing)
    return config, lm.unstack(params, dtype=config.dtype, donate=True), tokenizer


def fingerprint(model: pathlib.Path, mixing: Mixing) -> str:
    """What tells these parameters from others: the files that they come from."""
    from allmem_jax.checkpoints import memory_file
    from allmem_jax.evaluation import recall

    files = [model] if mixing.memory is None else [model, memory_file.find(mixing.memory)]
    return " ".join(map(recall.fingerprint, files))


def check_window(mixing: Mixing, mixers: Sequence[str]) -> None:
    """Refuses sizes that nothing would use."""
    sizes = {name: value for name, value in given(mixing).items() if name in ("window", "sinks", "chunk")}
    if sizes and set(mixers) == {"full"}:
        words = " ".join(f"--{name} {value}" for name, value in sizes.items())
        raise ValueError(
            f"{words}: the model runs with full attention, which has none: add --mixer swa, or leave it out"
        )


@contextlib.contextmanager
def results(out: str) -> Iterator[pathlib.Path]:
    """The folder to write to: OUT, or of a URL a copy of what is there, which goes back every minute and at the end.

    Also where the command fails or is told to end (SIGTERM), so that it goes on from there, on any machine. What cannot
    be written to is refused before anything is measured for it.
    """
    from allmem_jax.storage import stores

    stores.check_writable(out)
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        with stores.spooled(out, None, every=60) as (folder, _):
            yield folder
    finally:
        signal.signal(signal.SIGTERM, before)


def answering(writing: Writing) -> dict[str, Any]:
    """The arguments that whatever writes answers takes; ValueError where one cannot be."""
    from allmem_jax.decoding import generation

    stops = tuple(terminal.unicode("--stop", stop) for several in writing.stop for stop in several)
    if "" in stops:
        raise ValueError("--stop is empty: give the text to stop at")
    sampling = generation.Sampling(writing.temperature, writing.top_k, writing.top_p)
    sampling.check()
    return dict(max_tokens=writing.max_tokens, sampling=sampling, seed=writing.seed, stop=stops)


def switch(writing: Writing) -> bool | None:
    """Whether the model is to think aloud."""
    return None if writing.thinking is None else writing.thinking == "on"

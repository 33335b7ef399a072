"""What a training run is: one dataclass, whose fields are also the command line's options, and how it is read."""

import dataclasses
import json
import runpy
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import tyro

from allmem_jax.model import config as config_lib
from train.data import lessons, stream

T = TypeVar("T", bound="FinetuneConfig")

# Fields of `ModelConfig` that a recipe leaves to the model where they are None.
MEMORY = ("mixer", "write", "n_mem", "d_mem", "read_out", "delay", "qk_scale", "alpha_init", "lr_init", "momentum_init")
_ANEW = ("write", "delay")  # of these: what any memory can be trained with, as they have no parameters

# A continuation may differ in these and still give the same losses (to rounding, on another mesh).
_FREE = (
    "model",
    "tokenizer",
    "texts",
    "mixture",
    "eval_texts",
    "eval_every",
    "eval_batches",
    "out",
    "cache",
    "teacher_cache",
    "checkpoint_every",
    "keep",
    "log_every",
    "max_bad_steps",
    "export",
    "mesh",
    "accumulate",
    "remat",
    "loss_block",
    "tensorboard",
    "wandb",
    "profile",
)


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Distils a pretrained model into one with windowed attention and a memory, or pretrains such a model."""

    objective: Literal["distill", "pretrain"] = "distill"
    """distill: the memory's parameters alone learn to give what the original gives. pretrain: everything learns the
    next token, from random weights or those of `model`."""
    model: str = ""
    """A Hugging Face folder or a .gguf file; the name of a preset, such as "llama-3.2-1b", for random weights; "tiny"
    is an untrained toy that shows whether everything runs."""
    tokenizer: str = ""
    """A folder or .gguf file with the tokenizer, where `model` is a preset."""
    texts: tuple[str, ...] = ()
    """.txt, .jsonl, .json, .parquet and .arrayrecord files, or folders of them, to train on."""
    mixture: tuple[stream.Part, ...] = ()
    """Where texts are not given: sets of them with weights, each with its own length of pieces and mask."""
    out: str = ""
    """Folder for checkpoints, metrics.jsonl and the result. The same command resumes what is there. Like the model and
    the texts, it may be a URL such as gs://BUCKET/PATH; several processes can then write to gs:// alone."""
    mixer: Literal["allmem", "mamba2", "delta"] | None = None
    """Which memory: AllMem's, or a baseline in its place, as large in parameters, that writes every token. None, here
    and in what follows on the memory, is as the model has it, or the default of `ModelConfig` for a new memory. What
    differs from a memory that the model has already is an error, but for `write` and `delay`."""
    write: bool | None = None
    """False holds the memory's learning rate (a baseline's step or beta) at zero: the control that tells memory from
    mere adaptation."""
    seed: int = 0
    """Of the memory's start values, the order of the data and everything drawn."""

    steps: int = 1000
    """Updates of the parameters."""
    batch: int = 8
    """Rows of a step, over all devices."""
    accumulate: int = 1
    """Pieces that a step takes its rows in, one after the other, where memory is short; the result is the same."""
    seq_length: int = 4096
    """Tokens of a row."""
    pack: bool = False
    """Put several documents in a row, each starting on the grid of the largest chunk; for chats and short texts."""
    response_only: bool = False
    """In chats, and in records of a prompt and its completion, take the loss on the answers only."""
    end_of_text: bool = True
    """Let plain texts end with the tokenizer's end-of-text token, so that a model learns to end; chats end as their
    template ends."""

    window: tuple[int, int] = (512, 8192)
    """Smallest and largest window, in tokens; drawn anew each step."""
    sinks: tuple[int, int] = (0, 256)
    """Smallest and largest number of first tokens that stay visible; drawn anew each step."""
    chunk: tuple[int, ...] = (512, 1024, 2048, 4096)
    """Tokens between two updates of the memory, one of these each step. Each value compiles once. The update sums
    over the chunk, so its size grows with it: let the largest decide how large lr_init may be."""

    positions: float = 0.25
    """Share of each row's positions that the loss is computed on, drawn anew each step."""
    beyond_window: bool = False
    """Take the loss only where a key has fallen out of the window."""
    inside_weight: float = 1.0
    """Weight, in the loss, of positions that still see all before them, where the memory can only disturb."""
    ce_weight: float = 0.0
    """Weight of the cross-entropy on the text itself beside the KL divergence from the teacher."""
    lessons: float = 0.0
    """Share of the rows that are lessons: texts in which facts, pairs, variables or words are told that are asked for
    at the end (`train/data/lessons.py`)."""
    kinds: tuple[str, ...] = ("facts", "pairs", "variables", "quotes")
    """Which of these the lessons are."""
    answer_weight: float = 1.0
    """Weight, in the loss, of the mean cross-entropy on the answers of lessons, beside the mean on all other text."""
    loss_block: int = 512
    """Positions whose logits exist at a time on a device."""

    learning_rate: float = 1e-3
    """Of AdamW, at its plateau."""
    warmup: int = 20
    """Steps of linear rise to it."""
    decay: float = 0.2
    """Share of the steps at the end in which it falls linearly to zero."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Of AdamW."""
    weight_decay: float = 0.0
    """On the kernels of the projections (NAME_proj) that are trained: the memory's, and in pretraining all of them. Not
    on embeddings, head, norms, biases, convolutions, alpha or the start of the fast weights."""
    clip: float = 1.0
    """Largest global norm of the gradient."""
    ema: float = 0.0
    """Decay of an exponential moving average of the trained parameters, which is then what is exported; 0 is none."""
    max_bad_steps: int = 5
    """Stop after so many non-finite steps in a row; single ones are skipped and counted."""

    start: Literal["random", "attention"] = "random"
    """What a new memory starts from: random projections, or those of each layer's attention, with rates that are fitted
    to the first of the texts."""
    n_mem: int | None = None
    """Heads of the memory."""
    d_mem: int | None = None
    """Their dimension."""
    read_out: Literal["full", "difference"] | None = None
    """What is read of the memory: f(W, q) (the paper), or its difference to that of the initial weights."""
    delay: bool | None = None
    """Write a token when it leaves the window, and not as it comes (the paper): the memory then adds nothing within."""
    qk_scale: Literal["l2", "rms"] | None = None
    """Norm of the memory's queries and keys: 1 (the paper) or sqrt(d_mem)."""
    alpha_init: float | None = None
    """Start of the memory's output scale, and with start="attention" of its output as a share of the attention's; 0
    starts from plain windowed attention."""
    lr_init: float | None = None
    """Start of the memory's own learning rate for an average token."""
    momentum_init: float | None = None
    """Start of its momentum."""
    write_strength: float = 1.0
    """Multiplies, before the first step, all that the memory writes, new or trained: below 1 where it fills up on texts
    that are longer than those its rates were fitted to or it was trained on. For mixer="allmem" alone."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of activations. The memory's parameters and its fast weights are float32 in any case."""
    backbone_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the frozen parameters."""
    remat: Literal["layer", "attention", "dots", "none"] = "layer"
    """What a layer keeps for its backward pass: its input alone, also what attention found, also the results of
    projections, or everything."""
    mesh: tuple[int, int, int, int] = (1, 1, 1, 1)
    """Devices along data, fsdp, tensor and context; -1 on one axis takes what the others leave. Heads are split over
    tensor and context inside the mixers, so more of these two than the model has key heads repeat work."""

    eval_texts: tuple[str, ...] = ()
    """Held-out texts. What is reported of them uses the largest window, sinks and chunk of the ranges."""
    eval_every: int = 100
    """Steps between evaluations on them."""
    eval_batches: int = 4
    """Batches of an evaluation, the same each time."""

    checkpoint_every: int = 100
    """Steps between checkpoints; one is also written at the end and on Ctrl-C or SIGTERM."""
    keep: int = 2
    """Checkpoints kept."""
    log_every: int = 10
    """Steps between lines where the output is not a terminal; metrics.jsonl has every step."""
    tensorboard: bool = True
    """Also write metrics to OUT/tensorboard."""
    wandb: str = ""
    """Also send metrics to this Weights & Biases project; needs the wandb package."""
    profile: int = 0
    """Write a trace of this many steps to OUT/profile, from the third one of the run on."""
    export: bool = True
    """Write the whole converted model to OUT/model at the end, beside the memory in OUT/allmem.safetensors."""
    cache: str = ".cache/tokens"
    """Local folder where tokenised texts are kept."""
    teacher_cache: float = 0.0
    """GB of the teacher's hidden states to keep in CACHE/teacher: other runs on the same rows, such as a control, then
    find them. One process only."""

    @property
    def packed(self) -> bool:
        """Whether a row holds several documents."""
        return self.pack or self.mixed

    @property
    def mixed(self) -> bool:
        """Whether the mixture is what is trained on."""
        return bool(self.mixture and not self.texts)

    def check(self) -> None:
        """Raises a ValueError that names the first field that cannot work; warns of a blind gap."""
        for name in ("model", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set: give --{name} or set it in the recipe")
        for name in (
            "steps",
            "batch",
            "accumulate",
            "seq_length",
            "checkpoint_every",
            "keep",
            "log_every",
            "max_bad_steps",
            "eval_every",
            "eval_batches",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, least in (("window", 1), ("sinks", 0)):
            low, high = getattr(self, name)
            if not least <= low <= high:
                raise ValueError(f"{name}={(low, high)} must be a range LOW HIGH with LOW at least {least}")
        if not self.chunk or min(self.chunk) < 1:
            raise ValueError(f"chunk={self.chunk} must be one or more positive sizes")
        if self.packed and any(max(self.chunk) % chunk for chunk in self.chunk):
            raise ValueError(f"pack needs chunk sizes that divide the largest; got {self.chunk}")
        for name in ("positions", "decay"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        weights = (self.warmup, self.ce_weight, self.inside_weight, self.answer_weight)
        if self.learning_rate <= 0 or self.clip <= 0 or min(weights) < 0:
            raise ValueError("learning_rate and clip must be positive, warmup and weights not negative")
        if not 0 <= self.lessons <= 1 or (self.lessons and (self.packed or not self.texts)):
            raise ValueError(f"lessons={self.lessons} must be from 0 to 1, and needs texts without pack or a mixture")
        if self.write_strength <= 0:
            raise ValueError(f"write_strength={self.write_strength} must be positive; write=False writes nothing")
        if not 0 <= self.ema < 1 or min(self.profile, self.teacher_cache) < 0:
            raise ValueError(
                f"ema={self.ema} must be in [0, 1), profile={self.profile} and teacher_cache={self.teacher_cache} not "
                "negative"
            )
        if self.objective == "pretrain" and (self.ce_weight or self.inside_weight != 1 or self.beyond_window):
            raise ValueError("ce_weight, inside_weight and beyond_window are for objective=distill")
        lessons.check_kinds(self.kinds)
        if -1 not in self.mesh:
            self.check_mesh(self.mesh)
        if self.beyond_window and self.window[1] + self.sinks[1] >= self.seq_length:
            raise ValueError(
                f"beyond_window leaves no position: window and sinks reach {self.window[1] + self.sinks[1]} and "
                f"seq_length={self.seq_length}. Lower them or lengthen the rows"
            )
        if self.mixer in (None, "allmem") and self.window[0] < max(self.chunk):
            gap = max(self.chunk) - self.window[0]
            warnings.warn(
                f"windows may be shorter than chunks: then up to {gap} tokens are seen by neither", stacklevel=2
            )

    def check_mesh(self, shape: tuple[int, ...]) -> None:
        """Raises a ValueError where rows and tokens cannot be divided over a mesh of this shape."""
        rows = shape[0] * shape[1]
        if min(shape) < 1 or self.batch % (rows * self.accumulate) or self.seq_length % shape[3]:
            raise ValueError(
                f"mesh={tuple(shape)} does not fit: batch={self.batch} rows must divide by data * fsdp * accumulate = "
                f"{rows * self.accumulate}, and seq_length={self.seq_length} by context = {shape[3]}"
            )

    def draw(self, step: int) -> tuple[int, np.int32, np.int32]:
        """(chunk, window, sinks) of a step: a function of the seed and the step alone, so resuming is exact."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step]))
        chunk = self.chunk[rng.integers(len(self.chunk))]
        window, sinks = (rng.integers(*limits, endpoint=True, dtype=np.int32) for limits in (self.window, self.sinks))
        return chunk, window, sinks

    def student(self, found: config_lib.ModelConfig, remembers: bool) -> config_lib.ModelConfig:
        """The config that is trained; exported, it has the largest window, sinks and chunk of the ranges.

        Args:
          found: of the model as it is.
          remembers: whether it has a memory.

        Raises:
          ValueError: the recipe describes another memory than the model has; all such fields are named.
        """
        found = found.replace(mixer=found.memory_mixer, n_mem=found.memory_heads)
        given = {name: getattr(self, name) for name in MEMORY if getattr(self, name) is not None}
        other = [name for name in given if name not in _ANEW and given[name] != getattr(found, name)]
        if remembers and other:
            differing = ", ".join(f"{name}={given[name]!r} (it has {getattr(found, name)!r})" for name in other)
            raise ValueError(
                f"model={self.model!r} has a memory already, which the recipe describes otherwise: {differing}. Set "
                f"{' and '.join(other)} to None to train it as it is, or give a model without a memory"
            )
        largest = {"window": self.window[1], "sinks": self.sinks[1], "chunk": max(self.chunk)}
        return found.replace(**given, **largest, dtype=self.dtype, remat=self.remat)

    def identity(self) -> dict[str, Any]:
        """The fields that a continuation must share, as JSON values."""
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in _FREE}
        return json.loads(json.dumps(fields))


def read_recipe(path: str) -> FinetuneConfig:
    """The `config` that a recipe file defines; ValueError when it does not."""
    if not Path(path).is_file():
        raise ValueError(f"no recipe at {path}; there are {', '.join(map(str, sorted(Path('configs').glob('*.py'))))}")
    config = runpy.run_path(path).get("config")
    if not isinstance(config, FinetuneConfig):
        raise ValueError(f"{path} must define `config = FinetuneConfig(...)`")
    return config


def parse(kind: type[T], program: str, description: str, arguments: Sequence[str] | None) -> T:
    """A command line as a `kind` of FinetuneConfig: a recipe, then any of its fields to set otherwise.

    Args:
      kind: FinetuneConfig or what adds fields to it.
      program, description: for --help.
      arguments: None is the process's own.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    named = bool(arguments) and not arguments[0].startswith("-")
    recipe = read_recipe(arguments.pop(0)) if named else FinetuneConfig()
    return tyro.cli(
        kind,
        prog=f"python -m {program} [RECIPE]",
        description=description,
        default=kind(**recipe_fields(recipe)),
        args=arguments,
    )


def recipe_fields(recipe: FinetuneConfig) -> dict[str, Any]:
    """The fields of a recipe, without those that a command adds."""
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(FinetuneConfig)}

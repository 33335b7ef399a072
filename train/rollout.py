"""A model's own answers to prompts, to be learned from: `python -m train.rollout --model M --prompts P --out A`.

What a student writes itself is what it will see in use, so distilling the original on those texts (on-policy
distillation) trains it where it goes. By hand, and `train.on_policy` is the loop of both:

    python -m train.rollout --model M --memory OUT --prompts prompts.jsonl --out answers.jsonl
    python -m train.finetune RECIPE --model M --texts answers.jsonl --pack --response-only --out NEW_OUT

Prompts are sorted by length and answered in batches of one size, so that each program compiles once. A batch is on disk
once it is done: the same command goes on after the last one, and writes what it would have written without the stop.
Training makes tokens of the answers' text again, so they may be cut otherwise than they were drawn.
"""

import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import tqdm
import tyro
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from allmem_jax.checkpoints import families, layout
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.decoding import chat, generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from allmem_jax.model import state as state_lib
from allmem_jax.storage import files, jit_cache, stores
from train import errors
from train.data import prompts as prompts_lib
from train.loop import checkpoint, distributed, models, tiny

_SETTINGS = ".settings.json"  # after the name of the answers' file


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn."""

    batch: int = 32
    """Prompts answered together."""
    max_tokens: int = 512
    """Tokens of an answer at most."""
    temperature: float = 0.7
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 means all."""
    top_p: float = 1.0
    """Draw from the smallest set of most likely tokens whose probability reaches p; 1 means all."""
    max_prompt: int = 8192
    """Tokens of the longest prompt that is taken; a longer one is an error."""
    piece: int = 512
    """Tokens of a prompt read at a time."""

    def sampling(self) -> generation.Sampling:
        """The settings of each draw."""
        return generation.Sampling(self.temperature, self.top_k, self.top_p)

    def check(self) -> None:
        """Raises a ValueError that names the first field that cannot work."""
        for name in ("batch", "max_tokens", "max_prompt", "piece"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        self.sampling().check()


@dataclasses.dataclass(frozen=True)
class Command(distributed.Processes, Settings):
    """Writes a model's own answers to a file of prompts.

    A process divides the rows of a batch over its own devices, each of which holds the whole model. Of N processes
    each answers every N-th batch and writes OUT with .part-I-of-N before its suffix; give training all of these.
    """

    model: str = ""
    """A Hugging Face folder, converted or not, or a .gguf file. Without a memory, the original model answers, with full
    attention. "tiny" is an untrained toy."""
    memory: str = ""
    """The output folder of a run of train.finetune, whose memory and windows the model gets."""
    prompts: str = ""
    """A .jsonl, .parquet or .arrayrecord file of {"prompt": TEXT} or {"messages": [...]} that ends with the user."""
    out: str = ""
    """The .jsonl file of answers, or its URL. The same command resumes what is there; its settings lie in
    OUT.settings.json."""
    seed: int = 0
    """Of the draws."""
    window: int | None = None
    """Tokens that attention sees, where they should not be the converted model's."""
    sinks: int | None = None
    """First tokens that stay visible, likewise."""
    chunk: int | None = None
    """Tokens between two updates of the memory, likewise."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the backbone's parameters and of activations."""


class Student(NamedTuple):
    """Who answers.

    Attributes:
      config: with a mixer that has a constant state, so not "full".
      params: all parameters.
      tokenizer: of the model, with a chat template.
      stops: tokens that end an answer.
      origin: what tells the parameters from others; "" takes their `checkpoint.content_hash`.
    """

    config: config_lib.ModelConfig
    params: lm.Params
    tokenizer: Any
    stops: Sequence[int]
    origin: str = ""


def load(command: Command) -> Student:
    """The model that the command names; ValueError where its files or the memory's do not fit."""
    config: Any
    tokenizer: Any
    if command.model == "tiny":
        config, params, tokenizer = tiny.CONFIG.replace(mixer="full"), tiny.backbone(), tiny.ByteTokenizer()
    else:
        config, params, tokenizer = load_lib.load_with_tokenizer(command.model, dtype=command.dtype)
    stops = stop_tokens(tokenizer, config)
    if command.memory:
        file = stores.join(command.memory, layout.ALLMEM_CONFIG)
        if not stores.names(file):
            name = layout.ALLMEM_CONFIG
            raise ValueError(f"memory={command.memory!r} has no {name}: give the output folder of a finished run")
        saved = config_lib.ModelConfig.from_json(stores.read(file).decode())
        if differing := families.differing_fields(saved, config):
            raise ValueError(f"{file} is of another model than {command.model}: {', '.join(differing)}")
        config = saved.replace(dtype=command.dtype)
        params = lm.merge_params(lm.split_params(params)[0], models.trained_memory(command.memory))
    own = {name: getattr(command, name) for name in ("window", "sinks", "chunk")}
    own = {name: value for name, value in own.items() if value is not None}
    if config.mixer == "full" and own:
        raise ValueError(
            f"{', '.join(own)}: {command.model} has no memory and answers with full attention; give "
            "--memory, or a converted model"
        )
    if config.mixer == "full":
        config = generation.full_as_windowed(config, command.max_prompt + command.max_tokens)
    return Student(config.replace(**own), params, tokenizer, stops)


def stop_tokens(tokenizer: Any, config: config_lib.ModelConfig) -> list[int]:
    """What ends an answer; of bytes, the end of a line."""
    return list(b"\n") if isinstance(tokenizer, tiny.ByteTokenizer) else chat.stop_tokens(tokenizer, config)


def run(
    settings: Settings,
    student: Student,
    prompts: Sequence[prompts_lib.Prompt],
    out: str | os.PathLike[str],
    *,
    seed: int,
    share: tuple[int, int],
) -> str | os.PathLike[str]:
    """Answers the prompts, going on after what is on disk already.

    Args:
      settings: of the draws.
      student: who answers.
      prompts: at least one.
      out: the file of answers or its URL, or what the names of its parts are made from.
      seed: of the draws.
      share: (i, n): this is process i of n, and answers batches i, i + n, ...

    Returns:
      The file written: {"id", "messages", "finished", "tokens"} a line, batch after batch, longest prompts first.

    Raises:
      ValueError: fewer batches than processes, or what is on disk was made with other settings.
    """
    parent, name = os.path.split(out)
    part = part_name(Path(name), *share).name
    with stores.spooled(parent, (part, f"{name}{_SETTINGS}"), every=60) as (folder, _):
        _run(settings, student, prompts, folder / name, seed, share)
    return stores.join(parent, part)


def _run(
    settings: Settings,
    student: Student,
    prompts: Sequence[prompts_lib.Prompt],
    out: Path,
    seed: int,
    share: tuple[int, int],
) -> None:
    """The same in a local folder."""
    settings.check()
    longest_first = sorted(prompts, key=lambda prompt: (-len(prompt.tokens), prompt.id))
    starts = range(0, len(prompts), settings.batch)
    batches = [sorted(longest_first[start : start + settings.batch]) for start in starts][share[0] :: share[1]]
    if len(starts) < share[1]:
        raise ValueError(
            f"{len(prompts)} prompts in batches of batch={settings.batch} are {len(starts)} batches for "
            f"{share[1]} processes: give more prompts, or lower batch"
        )
    mesh, path = _local_mesh(settings.batch), part_name(out, *share)
    out.parent.mkdir(parents=True, exist_ok=True)
    _settle(out, path, _identity(settings, student, prompts, seed, share))
    done = _complete_batches(path, [len(batch) for batch in batches])
    if mesh is not None:
        student = student._replace(params=jax.device_put(student.params, NamedSharding(mesh, PartitionSpec())))
    student = student._replace(params=lm.unstack(student.params, dtype=student.config.dtype))  # once for all batches
    began, tokens = time.perf_counter(), 0
    with (
        nullcontext() if mesh is None else jax.set_mesh(mesh),
        open(path, "ab") as file,
        tqdm.tqdm(total=len(batches), initial=done, desc="answers", unit="batch", disable=None) as bar,
    ):
        for number in range(done, len(batches)):
            key = int(np.random.SeedSequence([seed, share[0] + number * share[1]]).generate_state(1)[0])
            lines = _answer(settings, student, batches[number], _start(student.config, settings.batch, mesh), key)
            file.write("".join(json.dumps(line) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
            tokens += sum(line["tokens"] for line in lines)
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.1f} tokens/s", refresh=False)
            bar.update()
    seconds = time.perf_counter() - began
    print(
        f"{path}: {sum(map(len, batches))} answers, {tokens} tokens now, {tokens / seconds:.1f} tokens/s",
        file=sys.stderr,
        flush=True,
    )


def part_name(out: Path, index: int, count: int) -> Path:
    """The file that one of `count` processes writes."""
    return out if count == 1 else out.with_name(f"{out.stem}.part-{index}-of-{count}{out.suffix}")


def _local_mesh(batch: int) -> Mesh | None:
    """This process's devices in a row along `data`; None where it has one."""
    devices = jax.local_devices()
    if batch % len(devices):
        raise ValueError(f"batch={batch} rows must divide by this process's {len(devices)} devices")
    shape = (len(devices), 1, 1, 1)
    types = (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, sharding.AXES, axis_types=types, devices=devices) if len(devices) > 1 else None


def _start(config: config_lib.ModelConfig, batch: int, mesh: Mesh | None) -> state_lib.DecodeState | None:
    """The state before the first token with its rows over the mesh, which keeps everything else there."""
    if mesh is None:
        return None
    rows, layers = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("data",), (None, "data")))
    state = state_lib.init_state(config, batch)
    return jax.tree.map(lambda leaf: jax.device_put(leaf, layers if leaf.ndim > 1 else rows), state)


def _answer(
    settings: Settings,
    student: Student,
    prompts: Sequence[prompts_lib.Prompt],
    start: state_lib.DecodeState | None,
    seed: int,
) -> list[dict[str, Any]]:
    """One batch's records."""
    answers = generation.answers(
        student.params,
        student.config,
        [prompt.tokens for prompt in prompts],
        batch=settings.batch,
        max_tokens=settings.max_tokens,
        sampling=settings.sampling(),
        stop_tokens=student.stops,
        seed=seed,
        piece=settings.piece,
        state=start,
    )
    return [
        {
            "id": prompt.id,
            "messages": [*prompt.messages, {"role": "assistant", "content": student.tokenizer.decode(answer)}],
            "finished": len(answer) < settings.max_tokens,
            "tokens": len(answer),
        }
        | ({"tools": prompt.tools} if prompt.tools else {})
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def _identity(
    settings: Settings, student: Student, prompts: Sequence[prompts_lib.Prompt], seed: int, share: tuple[int, int]
) -> dict[str, Any]:
    """What the answers depend on, as JSON values."""
    asked = json.dumps([[prompt.id, prompt.tokens] for prompt in prompts])
    return {
        **dataclasses.asdict(settings),
        "seed": seed,
        "processes": share[1],
        "stops": list(student.stops),
        "config": json.loads(student.config.to_json()),
        "params": student.origin or checkpoint.content_hash(student.params),
        "prompts": hashlib.sha256(asked.encode()).hexdigest(),
    }


def _settle(out: Path, path: Path, identity: dict[str, Any]) -> None:
    """Writes the settings beside the answers, or holds them against those that `path` was begun with."""
    beside = out.with_name(out.name + _SETTINGS)
    if not beside.exists():
        if path.exists():
            raise ValueError(f"{path} exists without {beside.name}, so it cannot be continued: give another --out")
        if distributed.main_process():
            files.write(beside, json.dumps(identity, indent=2))
        return
    saved = json.loads(beside.read_text())
    if saved != identity:
        there, here = _flat(saved), _flat(identity)
        names = [name for name in sorted(there | here) if there.get(name) != here.get(name)]
        differing = "; ".join(f"{name} is {there.get(name)} there and {here.get(name)} here" for name in names)
        raise ValueError(f"{out} was begun with other settings: {differing}. Give those, or another --out")


def _flat(identity: dict[str, Any]) -> dict[str, Any]:
    """Settings with those of the model's config among them, as config.NAME."""
    inner = {f"config.{name}": value for name, value in identity.get("config", {}).items()}
    return {name: value for name, value in identity.items() if name != "config"} | inner


def _complete_batches(path: Path, sizes: Sequence[int]) -> int:
    """How many batches of these sizes a file begins with; what follows them is cut off."""
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    whole = len(lines) - bool(lines and not lines[-1].endswith(b"\n"))
    ends = np.cumsum(sizes)
    done = int(np.searchsorted(ends, whole, "right"))
    kept = int(ends[done - 1]) if done else 0
    with open(path, "r+b") as file:
        file.truncate(sum(map(len, lines[:kept])))
    return done


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    command = tyro.cli(Command, prog="python -m train.rollout", args=arguments)
    with errors.one_line():
        for name in ("model", "prompts", "out"):
            if not getattr(command, name):
                raise ValueError(f"{name} is not set: give --{name}")
        command.check()
        if not command.out.endswith(".jsonl"):
            raise ValueError(f"out={command.out!r} must end in .jsonl, which training reads")
        jit_cache.keep()
        distributed.join(command)
        stores.check_writable(os.path.dirname(command.out))
        student = load(command)
        prompts = prompts_lib.read(command.prompts, student.tokenizer, command.max_prompt)
        settings = Settings(**{field.name: getattr(command, field.name) for field in dataclasses.fields(Settings)})
        share = jax.process_index(), jax.process_count()
        print(run(settings, student, prompts, command.out, seed=command.seed, share=share))


if __name__ == "__main__":
    main()

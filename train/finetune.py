"""Trains a hybrid model: `python -m train.finetune configs/RECIPE.py [--field value ...]`.

Two objectives share the loop. Distillation trains the memory of a pretrained model, whose other parameters stay as they
are; pretraining trains everything. A run owns its output folder: checkpoints/, metrics.jsonl, recipe.json, and at the
end allmem.safetensors (the memory), allmem_config.json and model/ (everything). The same command goes on where the last
one stopped, with the same losses as if it never had, also on another mesh or with another number of processes.
"""

import dataclasses
import json
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from allmem_jax.model import lm, sharding
from allmem_jax.storage import files, jit_cache, stores
from train import errors
from train.data import stream as stream_lib
from train.loop import batches, checkpoint, compiled, distributed, evaluation, metrics, models, plan
from train.loop import teacher as teacher_lib
from train.recipe import MEMORY, FinetuneConfig, parse, recipe_fields


def run(
    config: FinetuneConfig, pretrained: models.Pretrained | None = None, rows: stream_lib.Source | None = None
) -> str | os.PathLike[str]:
    """Trains until `config.steps`, resuming what is in the output folder, and writes the result.

    Every process of a run calls it alike, on a folder that all of them see.

    Args:
      config: the recipe.
      pretrained: in place of what `models.load` gives, for a caller that holds the model already.
      rows: in place of rows cut from the recipe's texts, for a task that makes its own.

    Returns:
      The output folder.

    Raises:
      ValueError: a field, a text or the model cannot work; `checkpoint.CheckpointMismatch` when the folder belongs
        to another run.
      FloatingPointError: too many non-finite steps in a row.
      SystemExit: stopped, after a checkpoint: 0 by SIGTERM, as schedulers expect, 130 by Ctrl-C.
    """
    config.check()
    check_paths(config)
    mesh = sharding.make_mesh(*config.mesh)
    config.check_mesh(tuple(mesh.shape.values()))
    if pretrained is None:
        with models.host_memory():
            pretrained = models.load(config)
    models.check_finite(pretrained.backbone)
    if config.teacher_cache and (pretrained.backbone is None or jax.process_count() > 1):
        raise ValueError(f"teacher_cache={config.teacher_cache} needs a model with weights and a single process")
    pretrained = models.identified(pretrained)
    plan.warn_of_repeated_work(pretrained.config, dict(mesh.shape))
    rows = batches.read_rows(config, pretrained, config.texts) if rows is None else rows
    held_out = batches.read_rows(config, pretrained, config.eval_texts) if config.eval_texts else None
    named = identity(config, pretrained, rows)
    with (
        stores.spooled(config.out, ["metrics.jsonl"] if distributed.main_process() else []) as (out, upload),
        checkpoint.Checkpoints(stores.join(config.out, "checkpoints"), named, config.keep) as checkpoints,
    ):
        out.mkdir(parents=True, exist_ok=True)
        trained = train(config, pretrained, rows, held_out, mesh, checkpoints, out, upload)
    models.export(config, pretrained, trained)
    return config.out if stores.is_url(config.out) else out


def train(
    config: FinetuneConfig,
    pretrained: models.Pretrained,
    rows: stream_lib.Source,
    held_out: stream_lib.Source | None,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    out: Path,
    upload: Callable[[], None],
) -> lm.Params:
    """The loop. Returns the trained parameters, or their average where the recipe asks for one.

    `out` is the output folder, or stands for it until `upload` is called.
    """
    state, frozen = compiled.start(config, pretrained, mesh)
    stream = batches.stream(config, rows, mesh, config.seed)
    done = 0
    if (restored := checkpoints.restore(state)) is not None:
        done, state, record = restored
        stream.restore(record["data"])
        say(f"{config.out}: going on after step {done} of {config.steps}")
    if done >= config.steps:
        return state.average or state.trained
    if distributed.main_process():
        files.write(stores.join(config.out, "recipe.json"), json.dumps(dataclasses.asdict(config), indent=2))
    teacher, student = compiled.make(config, pretrained.config, sharding.tree_shardings(state, mesh), mesh)
    if teacher and config.teacher_cache:
        folder, limit = Path(config.cache, "teacher"), 1e9 * config.teacher_cache
        teacher = teacher_lib.Kept(teacher, folder, limit, pretrained.config, pretrained.origin, mesh)
    evaluate = evaluation.make(config, pretrained.config, held_out, teacher, mesh)
    with (
        jax.set_mesh(mesh),
        metrics.Reports(config, pretrained.config, mesh.size, out, done) as reports,
        distributed.stop_signals() as stopped,
        metrics.profiler(out / "profile", config.profile, done) as profile,
    ):
        for step in range(done + 1, config.steps + 1):
            profile(step)
            batch = batches.place(config, next(stream), mesh)
            chunk, window, sinks = config.draw(step)
            hidden = teacher(frozen, batch) if teacher else None
            state, values = student(chunk)(state, frozen, batch, hidden, window, sinks, compiled.draw(config, step))
            reports.add({"step": step, "chunk": chunk, "window": int(window), "sinks": int(sinks)}, values)
            stop = stopped(step)
            last = stop or step == config.steps
            if evaluate and (last or step % config.eval_every == 0):
                with reports.paused() as line:
                    line |= evaluate(state.trained, frozen)
            if last or step % config.checkpoint_every == 0:
                reports.flush()
                upload()  # first, so that no line is missing of a step that a run resumes from
                checkpoints.save(step, state, {"data": stream.state()})
            if stop and step < config.steps:
                checkpoints.wait()
                say(f"{config.out}: stopped after step {step}; the same command goes on")
                raise SystemExit(0 if stop == signal.SIGTERM else 128 + stop)
    return state.average or state.trained


def check_paths(config: FinetuneConfig) -> None:
    """Raises a ValueError where nothing can be written; copies what is at URLs, or raises what keeps it from that."""
    stores.check_writable(config.out)
    stores.local_only(config.cache, "cache")
    if jax.process_count() > 1 and not checkpoint.shared(config.out):
        raise ValueError(f"out={config.out!r}: several processes need a folder that all of them see, or gs://")
    parts = [path for part in config.mixture for path in part.texts]
    for path in (config.model, config.tokenizer, *config.texts, *parts, *config.eval_texts):
        stores.local(path)


def identity(config: FinetuneConfig, pretrained: models.Pretrained, rows: stream_lib.Source) -> dict[str, Any]:
    """What the losses of a run depend on, as JSON values: a continuation must share it."""
    origin = pretrained.origin or f"random {config.model}"
    # What the recipe left to the model; the heads, which it may leave to it too, are told by the parameters' shapes.
    memory = {name: getattr(pretrained.config, name) for name in MEMORY if name != "n_mem"}
    return config.identity() | memory | {"backbone": origin, "data": rows.content_hash()}


def say(message: str) -> None:
    """Prints a line, once for all processes."""
    if distributed.main_process():
        print(message, file=sys.stderr, flush=True)


@dataclasses.dataclass(frozen=True)
class Command(distributed.Processes, FinetuneConfig):
    """A recipe, and how this process is to run it."""

    compile_only: str = ""
    """Do not train: compile the step for devices that need not be there, "h100" or a TPU topology such as
    "v5p:4x4x4", and print what it needs of their memory, its operations and the speed to expect."""
    mfu: float = 0.4
    """Share of the devices' peak that the expected speed assumes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a recipe, then any of its fields to set otherwise."""
    description = "Train a hybrid model. The first argument may be a recipe, configs/NAME.py."
    with errors.one_line():
        command = parse(Command, "train.finetune", description, arguments)
        config = FinetuneConfig(**recipe_fields(command))
        if command.compile_only:
            print(plan.make(config, command.compile_only, command.mfu))
            return
        jit_cache.keep()
        distributed.join(command)
        out = run(config)
        if distributed.main_process():
            print(out)


if __name__ == "__main__":
    main()

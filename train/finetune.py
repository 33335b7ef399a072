"""Trains a hybrid model: `python -m train.finetune configs/RECIPE.py [--field value ...]`.

Two objectives share the loop. Distillation trains the memory of a pretrained model, whose other parameters stay as they
are; pretraining trains everything. A run owns its output folder: checkpoints/, metrics.jsonl, recipe.json, and at the
end allmem.safetensors (the memory), allmem_config.json and model/ (everything). The same command goes on where the last
one stopped, with the same losses as if it never had, also on another mesh or with another number of processes.
"""

import dataclasses
import functools
import json
import math
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from allmem_jax.checkpoints import layout, tokenizer
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import save as save_lib
from allmem_jax.checkpoints import start as start_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from allmem_jax.storage import files, stores
from train import errors
from train.data import lessons
from train.data import stream as stream_lib
from train.loop import checkpoint, compiled, distributed, flops, metrics, plan, steps, tiny
from train.recipe import MEMORY, FinetuneConfig

T = TypeVar("T", bound=FinetuneConfig)


class Pretrained(NamedTuple):
    """What a run starts from.

    Attributes:
      config: of the student.
      backbone: all parameters but the memory's; None for random ones, made where they are to lie.
      memory: the memory's parameters; None likewise.
      tokenizer: of the texts.
      origin: `checkpoint.content_hash` of the backbone for a caller that trains on it repeatedly; "" takes it anew.
    """

    config: config_lib.ModelConfig
    backbone: Any
    memory: Any
    tokenizer: Any
    origin: str = ""


def load(config: FinetuneConfig) -> Pretrained:
    """The model that a recipe names, with a memory of its own seed unless the folder has one."""
    if config.model == "tiny":
        fields = config.student(tiny.CONFIG, remembers=False)
        return Pretrained(fields, tiny.backbone(), lm.init_memory(fields, config.seed), tiny.ByteTokenizer())
    if config.model in config_lib.PRESETS and not Path(config.model).exists():
        found = tokenizer.load_tokenizer(config.tokenizer) if config.tokenizer else None
        if found is None:
            raise ValueError(
                f"tokenizer={config.tokenizer!r}: the preset {config.model} comes without one; name a folder or a .gguf"
                " file that has it"
            )
        return Pretrained(config.student(config_lib.preset(config.model), remembers=False), None, None, found)
    loaded, params, found = load_lib.load_with_tokenizer(config.model, dtype=config.backbone_dtype)
    backbone, memory = lm.split_params(params)
    fields = config.student(loaded, remembers=bool(memory))
    return Pretrained(fields, backbone, memory or new_memory(config, fields, backbone, found), found)


def new_memory(config: FinetuneConfig, fields: config_lib.ModelConfig, backbone: Any, tokenizer: Any) -> lm.Params:
    """A memory that no training has seen, made as the recipe says, for a model of config `fields`."""
    if config.start == "random":
        return lm.init_memory(fields, config.seed)
    documents = stream_lib.load_documents(config.texts or config.mixture[0].texts, tokenizer, config.cache)
    longest = int(np.argmax(documents.lengths))
    tokens, _ = documents.take(longest, 0, start_lib.LENGTH)
    return start_lib.from_attention(fields, backbone, tokens, config.seed)


def run(
    config: FinetuneConfig, pretrained: Pretrained | None = None, rows: stream_lib.Source | None = None
) -> str | os.PathLike[str]:
    """Trains until `config.steps`, resuming what is in the output folder, and writes the result.

    Every process of a run calls it alike, on a folder that all of them see.

    Args:
      config: the recipe.
      pretrained: in place of what `load` gives, for a caller that holds the model already.
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
        with _host_memory():
            pretrained = load(config)
    _check_finite(pretrained.backbone)
    plan.warn_of_repeated_work(pretrained.config, dict(mesh.shape))
    rows = read_rows(config, pretrained, config.texts) if rows is None else rows
    held_out = read_rows(config, pretrained, config.eval_texts) if config.eval_texts else None
    named = identity(config, pretrained, rows)
    with (
        stores.spooled(config.out, ["metrics.jsonl"] if distributed.main_process() else []) as (out, upload),
        checkpoint.Checkpoints(stores.join(config.out, "checkpoints"), named, config.keep) as checkpoints,
    ):
        out.mkdir(parents=True, exist_ok=True)
        trained = _train(config, pretrained, rows, held_out, mesh, checkpoints, out, upload)
    export(config, pretrained, trained)
    return config.out if stores.is_url(config.out) else out


def check_paths(config: FinetuneConfig) -> None:
    """Raises a ValueError where nothing can be written; copies what is at URLs, or raises what keeps it from that."""
    stores.check_writable(config.out)
    stores.local_only(config.cache, "cache")
    if jax.process_count() > 1 and not checkpoint.shared(config.out):
        raise ValueError(f"out={config.out!r}: several processes need a folder that all of them see, or gs://")
    parts = [path for part in config.mixture for path in part.texts]
    for path in (config.model, config.tokenizer, *config.texts, *parts, *config.eval_texts):
        stores.local(path)


def identity(config: FinetuneConfig, pretrained: Pretrained, rows: stream_lib.Source) -> dict[str, Any]:
    """What the losses of a run depend on, as JSON values: a continuation must share it."""
    origin = pretrained.origin or f"random {config.model}"
    if not pretrained.origin and pretrained.backbone is not None:
        origin = checkpoint.content_hash(pretrained.backbone)
    # What the recipe left to the model; the heads, which it may leave to it too, are told by the parameters' shapes.
    memory = {name: getattr(pretrained.config, name) for name in MEMORY if name != "n_mem"}
    return config.identity() | memory | {"backbone": origin, "data": rows.content_hash()}


def read_rows(config: FinetuneConfig, pretrained: Pretrained, texts: Sequence[str]) -> stream_lib.Source:
    """Rows of the texts, or where there are none of the recipe's mixture, whose tokens the model must know."""
    if not texts and not config.mixture:
        raise ValueError("there is nothing to train on: give --texts FILE_OR_FOLDER ...")
    align, cache = max(config.chunk) if config.packed else None, stores.local_only(config.cache, "cache")
    rows: Any
    if texts:
        documents = stream_lib.load_documents(texts, pretrained.tokenizer, cache, end_of_text=config.end_of_text)
        if config.lessons and texts == config.texts:
            options: Any = dict(share=config.lessons, kinds=config.kinds, seed=config.seed)
            rows = lessons.Lessons(documents, pretrained.tokenizer, config.seq_length, **options)
        else:
            rows = stream_lib.Rows(documents, config.seq_length, align=align, response_only=config.response_only)
    else:
        rows = stream_lib.Mixture(
            config.mixture, config.seq_length, pretrained.tokenizer, cache, align=align, end_of_text=config.end_of_text
        )
    stream_lib.check_tokenizer(pretrained.config.vocab_size, rows.largest_token())
    return rows


def _train(
    config: FinetuneConfig,
    pretrained: Pretrained,
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
    main = distributed.main_process()
    state, frozen = start(config, pretrained, mesh)
    own = own_rows(mesh, config.batch)
    stream = stream_lib.Stream(rows, config.batch, seed=config.seed, local=own)
    done = 0
    if (restored := checkpoints.restore(state)) is not None:
        done, state, record = restored
        stream.restore(record["data"])
        _say(f"{config.out}: going on after step {done} of {config.steps}")
    if done >= config.steps:
        return state.average or state.trained
    if main:
        files.write(stores.join(config.out, "recipe.json"), json.dumps(dataclasses.asdict(config), indent=2))
    teacher, student = compiled.make(config, pretrained.config, sharding.tree_shardings(state, mesh), mesh)
    evaluate = _evaluation(config, pretrained.config, held_out, teacher, mesh)
    events = out / "tensorboard" if config.tensorboard else None
    log = metrics.MetricsLog(out / "metrics.jsonl", done, tensorboard=events, wandb=config.wandb) if main else None
    progress = metrics.Progress(done, config.steps, config.log_every) if main else None
    began, kind = time.perf_counter(), jax.devices()[0].device_kind

    def report(line: dict[str, Any], values: Any) -> None:
        nonlocal began
        line |= {name: value.item() for name, value in jax.device_get(values).items()}
        began, seconds = time.perf_counter(), time.perf_counter() - began
        line |= flops.speed(config, pretrained.config, line, seconds, mesh.size, kind) | _device_memory()
        if log is not None and progress is not None:
            log.write(line)
            progress.show(line)
        _stop_if_diverged(line, config, pretrained.config)

    waiting: tuple[dict[str, Any], Any] | None = None  # a step that is not reported: its values are still computed
    with (
        jax.set_mesh(mesh),
        log or nullcontext(),
        progress or nullcontext(),
        distributed.stop_signals() as stopped,
        _profiler(config, out, done) as profile,
    ):
        for step in range(done + 1, config.steps + 1):
            profile(step)
            batch = place_batch(next(stream), mesh, own, config.batch, config.packed)
            chunk, window, sinks = config.draw(step)
            hidden = teacher(frozen, batch) if teacher else None
            program = (
                chunk if pretrained.config.mixer == "allmem" else max(config.chunk)
            )  # the baselines have no chunks
            state, values = student(program)(state, frozen, batch, hidden, window, sinks, compiled.draw(config, step))
            if waiting:
                report(*waiting)
            waiting = {"step": step, "chunk": chunk, "window": int(window), "sinks": int(sinks)}, values
            stop = stopped(step)
            last = stop or step == config.steps
            if evaluate and (last or step % config.eval_every == 0):
                jax.block_until_ready(values)
                paused = time.perf_counter()
                waiting[0].update(evaluate(state.trained, frozen))
                began += time.perf_counter() - paused
            if last or step % config.checkpoint_every == 0:
                report(*waiting)
                waiting = None
                upload()  # first, so that no line is missing of a step that a run resumes from
                checkpoints.save(step, state, {"data": stream.state()})
            if stop and step < config.steps:
                checkpoints.wait()
                _say(f"{config.out}: stopped after step {step}; the same command goes on")
                raise SystemExit(0 if stop == signal.SIGTERM else 128 + stop)
    return state.average or state.trained


def start(config: FinetuneConfig, pretrained: Pretrained, mesh: Mesh) -> tuple[steps.TrainState, lm.Params]:
    """The state before the first step, and the frozen parameters, where they belong on the mesh."""
    if pretrained.backbone is None or pretrained.memory is None:
        init = functools.partial(compiled.random_params, config, pretrained.config)
        params = jax.jit(init, out_shardings=sharding.tree_shardings(jax.eval_shape(init), mesh))()
    else:
        params = sharding.place(lm.merge_params(pretrained.backbone, pretrained.memory), mesh)
    trained, frozen = compiled.split(config, params)
    first = functools.partial(compiled.initial_state, config)
    shardings = sharding.tree_shardings(jax.eval_shape(first, trained), mesh)
    return jax.jit(first, out_shardings=shardings)(trained), frozen


def _evaluation(
    config: FinetuneConfig,
    model_config: config_lib.ModelConfig,
    held_out: stream_lib.Source | None,
    teacher: Any,
    mesh: Mesh,
) -> Callable[[lm.Params, lm.Params], dict[str, float]] | None:
    """(trained, frozen) -> means over the positions of the first batches of held-out texts; None without such texts."""
    if held_out is None:
        return None
    loss = compiled.step_loss(config)
    one = jax.jit(
        functools.partial(steps.evaluate, config=model_config, loss=loss),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    own = own_rows(mesh, config.batch)

    def evaluate(trained: lm.Params, frozen: lm.Params) -> dict[str, float]:
        stream = stream_lib.Stream(held_out, config.batch, seed=0, local=own)
        found = []
        for _ in range(config.eval_batches):
            batch = place_batch(next(stream), mesh, own, config.batch, config.packed)
            found.append(one(trained, frozen, batch, teacher(frozen, batch) if teacher else None))
        sums = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(found))
        return {f"eval_{name}": total / count if count else math.nan for name, (total, count) in sums.items()}

    return evaluate


def own_rows(mesh: Mesh, batch: int) -> list[int]:
    """The rows of a batch of which this process holds some tokens, in their order."""
    places = sharding.batch_sharding(mesh, tokens=False).addressable_devices_indices_map((batch,))
    return sorted({row for index in places.values() if index for row in range(*index[0].indices(batch))})


def place_batch(arrays: dict[str, np.ndarray], mesh: Mesh, own: list[int], batch: int, packed: bool) -> steps.Batch:
    """This process's rows as its part of global arrays."""
    where = sharding.batch_sharding(mesh)

    def place(local: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            first, last, _ = index[0].indices(batch)
            at = own.index(first)
            return local[at : at + last - first, index[1]]

        return jax.make_array_from_callback((batch, *local.shape[1:]), where, part)

    names = ["tokens", "targets", "mask", *["segment_ids"] * packed, *["answers"] * ("answers" in arrays)]
    rows = {name: arrays[name] for name in names}
    return steps.Batch(**(jax.device_put(rows, where) if jax.process_count() == 1 else jax.tree.map(place, rows)))


@contextmanager
def _profiler(config: FinetuneConfig, out: Path, done: int) -> Iterator[Callable[[int], None]]:
    """A function to call before each step: it starts and ends the trace that the recipe asks for."""
    first = done + 3  # the first two compile
    running = False

    def before(step: int) -> None:
        nonlocal running
        if config.profile and step == first:
            jax.profiler.start_trace(out / "profile")
            running = True
        elif running and step == first + config.profile:
            jax.profiler.stop_trace()
            running = False

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()


@contextmanager
def _host_memory() -> Iterator[None]:
    """Arrays made in here lie in the host's memory, so that no device holds a whole model beside its part."""
    try:
        host = jax.local_devices(backend="cpu")[0]
    except RuntimeError:  # JAX was told to use another platform alone
        yield
        return
    with jax.default_device(host):
        yield


def _device_memory() -> dict[str, float]:
    """The most memory that this process's first device has held, in GiB, where the device tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"hbm_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


def _say(message: str) -> None:
    if distributed.main_process():
        print(message, file=sys.stderr, flush=True)


def _check_finite(backbone: lm.Params | None) -> None:
    """Raises a ValueError that names parameters with NaN or infinity."""
    if backbone is None:
        return
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))(backbone)
    bad = [sharding.path_string(path) for path, ok in jax.tree_util.tree_leaves_with_path(finite) if not ok]
    if bad:
        raise ValueError(f"the model has NaN or infinite weights in {', '.join(bad)}; fetch or convert it again")


def _stop_if_diverged(line: dict[str, Any], config: FinetuneConfig, model_config: config_lib.ModelConfig) -> None:
    if line["skipped_in_a_row"] >= config.max_bad_steps:
        raise FloatingPointError(
            f"{line['skipped_in_a_row']} steps in a row had a loss or gradient that is not finite; the last was step "
            f"{line['step']}. Lower learning_rate={config.learning_rate} or lr_init={model_config.lr_init} and start "
            "in another output folder"
        )


def export(config: FinetuneConfig, pretrained: Pretrained, trained: lm.Params) -> None:
    """The memory's weights and the config into the output folder, and the whole model below it.

    `trained` is the memory, or all parameters. Every process calls it, and returns when the files are there.
    """
    if jax.process_count() > 1:
        trained = multihost_utils.process_allgather(trained, tiled=True)
    if distributed.main_process():
        backbone, memory = lm.split_params(trained)
        leaves = jax.tree_util.tree_leaves_with_path(memory)
        flat = {sharding.path_string(path): np.asarray(leaf, np.float32) for path, leaf in leaves}
        files.write(stores.join(config.out, layout.ALLMEM_CONFIG), pretrained.config.to_json())
        if config.export and config.model != "tiny":
            params = lm.merge_params(backbone or pretrained.backbone, memory)
            folder = stores.join(config.out, "model")
            save_lib.save_pretrained(folder, pretrained.config, params, pretrained.tokenizer, overwrite=True)
        weights = stores.join(config.out, layout.ALLMEM_WEIGHTS)
        files.write(weights, safetensors.numpy.save(flat))  # last: a run that has it is complete
    distributed.wait_for_all("exported")


def trained_memory(out: str | os.PathLike[str]) -> lm.Params:
    """The memory that a run wrote, {"layers": {"memory": ...}}."""
    tree: lm.Params = {}
    for name, value in safetensors.numpy.load(stores.read(stores.join(out, layout.ALLMEM_WEIGHTS))).items():
        *folders, last = name.split("/")
        node = functools.reduce(lambda at, key: at.setdefault(key, {}), folders, tree)
        node[last] = jnp.asarray(value)
    return tree


def read_recipe(path: str) -> FinetuneConfig:
    """The `config` that a recipe file defines; ValueError when it does not."""
    if not Path(path).is_file():
        raise ValueError(f"no recipe at {path}; there are {', '.join(map(str, sorted(Path('configs').glob('*.py'))))}")
    config = runpy.run_path(path).get("config")
    if not isinstance(config, FinetuneConfig):
        raise ValueError(f"{path} must define `config = FinetuneConfig(...)`")
    return config


@dataclasses.dataclass(frozen=True)
class Command(distributed.Processes, FinetuneConfig):
    """A recipe, and how this process is to run it."""

    compile_only: str = ""
    """Do not train: compile the step for devices that need not be there, "h100" or a TPU topology such as
    "v5p:4x4x4", and print what it needs of their memory, its operations and the speed to expect."""
    mfu: float = 0.4
    """Share of the devices' peak that the expected speed assumes."""


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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a recipe, then any of its fields to set otherwise."""
    description = "Train a hybrid model. The first argument may be a recipe, configs/NAME.py."
    with errors.one_line():
        command = parse(Command, "train.finetune", description, arguments)
        config = FinetuneConfig(**recipe_fields(command))
        if command.compile_only:
            print(plan.make(config, command.compile_only, command.mfu))
            return
        distributed.join(command)
        out = run(config)
        if distributed.main_process():
            print(out)


def recipe_fields(recipe: FinetuneConfig) -> dict[str, Any]:
    """The fields of a recipe, without those that a command adds."""
    return {field.name: getattr(recipe, field.name) for field in dataclasses.fields(FinetuneConfig)}


if __name__ == "__main__":
    main()

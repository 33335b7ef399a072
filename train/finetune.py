"""Distils a pretrained model into AllMem: `python -m train.finetune configs/RECIPE.py [--field value ...]`.

A run owns its output folder: checkpoints/, metrics.jsonl, recipe.json, and at the end allmem.safetensors (the memory),
allmem_config.json and model/ (everything). The same command goes on where the last one stopped, with the same losses
as if it never had.
"""

import dataclasses
import functools
import json
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
import tyro

from allmem_jax import config as config_lib
from allmem_jax import convert, files, model, sharding
from train import checkpoint, data, metrics, steps, tiny
from train.recipe import FinetuneConfig


class Pretrained(NamedTuple):
    """What a run starts from: the student's config, the frozen parameters, the memory's, and the tokenizer."""

    config: config_lib.ModelConfig
    backbone: model.Params
    memory: model.Params
    tokenizer: Any


def load(config: FinetuneConfig) -> Pretrained:
    """The model that a recipe names, with a fresh memory unless the folder has one."""
    overrides = config.model_overrides()
    tokenizer: Any
    if config.model == "tiny":
        model_config, params, tokenizer = tiny.CONFIG.replace(**overrides), tiny.backbone(), tiny.ByteTokenizer()
    else:
        loaded, params, tokenizer = convert.load_pretrained(
            config.model, dtype=config.backbone_dtype, mixer=config.mixer
        )
        model_config = loaded.replace(**overrides)
    if tokenizer is None:
        raise ValueError(f"{config.model} has no tokenizer, which the texts need; add its tokenizer.json")
    backbone, memory = model.split_params(params)
    return Pretrained(model_config, backbone, memory or model.init_memory(model_config, config.seed), tokenizer)


def run(config: FinetuneConfig, pretrained: Pretrained | None = None, rows: data.Source | None = None) -> Path:
    """Trains until `config.steps`, resuming what is in the output folder, and writes the result.

    Args:
      config: the recipe.
      pretrained: in place of what `load` gives, for a caller that holds the model already.
      rows: in place of rows cut from `config.texts`, for a task that makes its own.

    Returns:
      The output folder.

    Raises:
      ValueError: a field, a text or the model cannot work; `checkpoint.CheckpointMismatch` when the folder belongs
        to another run.
      FloatingPointError: too many non-finite steps in a row.
      SystemExit: stopped by Ctrl-C or SIGTERM, after a checkpoint.
    """
    config.check()
    pretrained = load(config) if pretrained is None else pretrained
    _check_finite(pretrained.backbone)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    if rows is None:
        documents = data.load_documents(config.texts, pretrained.tokenizer, Path(config.cache))
        align = max(config.chunk) if config.pack else None
        rows = data.Rows(documents, config.seq_length, align=align, response_only=config.response_only)
    identity = config.identity() | {
        "backbone": checkpoint.content_hash(pretrained.backbone),
        "data": rows.content_hash(),
    }
    with checkpoint.Checkpoints(out / "checkpoints", identity, config.keep) as checkpoints:
        memory = _train(config, pretrained, rows, checkpoints)
    _export(config, pretrained, memory)
    return out


def _train(
    config: FinetuneConfig, pretrained: Pretrained, rows: data.Source, checkpoints: checkpoint.Checkpoints
) -> model.Params:
    """The loop. Returns the trained memory."""
    out = Path(config.out)
    mesh = sharding.make_mesh(*config.mesh)
    backbone = sharding.place(pretrained.backbone, mesh)
    optimizer = _optimizer(config)
    state = sharding.place(steps.init_state(sharding.place(pretrained.memory, mesh), optimizer), mesh)
    stream = data.Stream(rows, config.batch // jax.process_count(), seed=config.seed,
                         process=jax.process_index(), processes=jax.process_count())  # fmt: skip
    done = 0
    if (restored := checkpoints.restore(state)) is not None:
        done, state, record = restored
        stream.restore(record["data"])
        print(f"{out}: going on after step {done} of {config.steps}", file=sys.stderr)
    if done >= config.steps:
        return state.memory
    files.write(out / "recipe.json", json.dumps(dataclasses.asdict(config), indent=2))
    teacher = jax.jit(functools.partial(steps.teacher_hidden, config=pretrained.config))
    student = _student_steps(config, pretrained.config, optimizer, sharding.tree_shardings(state, mesh))
    key = jax.random.key(config.seed)
    log = metrics.MetricsLog(out / "metrics.jsonl", done)
    with (
        jax.set_mesh(mesh),
        log,
        metrics.Progress(done, config.steps, config.log_every) as progress,
        _stop_signals() as stopped,
    ):
        for step in range(done + 1, config.steps + 1):
            began = time.perf_counter()
            batch = _place_batch(next(stream), mesh, config.pack)
            chunk, window, sinks = config.draw(step)
            hidden = teacher(backbone, batch=batch)
            step_key = jax.random.fold_in(key, np.uint32(step))
            program = chunk if config.mixer == "allmem" else max(config.chunk)  # the baselines have no chunks
            state, values = student(program)(state, backbone, batch, hidden, window, sinks, step_key)
            line: dict[str, Any] = {"step": step, "chunk": chunk, "window": int(window), "sinks": int(sinks)}
            line |= {name: value.item() for name, value in jax.device_get(values).items()}
            line["tokens_per_s"] = config.batch * config.seq_length / (time.perf_counter() - began)
            log.write(line)
            progress.show(line)
            _stop_if_diverged(line, config)
            if step == config.steps or step % config.checkpoint_every == 0 or stopped():
                checkpoints.save(step, state, {"data": stream.state()})
            if stopped() and step < config.steps:
                print(f"{out}: stopped after step {step}; the same command goes on", file=sys.stderr)
                raise SystemExit(128 + stopped())
    return state.memory


def _optimizer(config: FinetuneConfig) -> Any:
    schedule = steps.wsd_schedule(config.learning_rate, config.steps, config.warmup, config.decay)
    return steps.make_optimizer(schedule, config.betas, config.weight_decay, config.clip)


def _student_steps(
    config: FinetuneConfig, model_config: config_lib.ModelConfig, optimizer: Any, shardings: Any
) -> Callable[[int], Any]:
    """chunk -> its jitted step; each chunk compiles once, when it is first drawn."""
    loss = steps.Loss(
        positions=config.positions, beyond_window=config.beyond_window, inside_weight=config.inside_weight,
        ce_weight=config.ce_weight, block=config.loss_block,
    )  # fmt: skip

    @functools.cache
    def student(chunk: int) -> Any:
        step = functools.partial(
            steps.distill_step, config=model_config.replace(chunk=chunk), loss=loss, optimizer=optimizer
        )
        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))

    return student


def _place_batch(arrays: dict[str, np.ndarray], mesh: jax.sharding.Mesh, packed: bool) -> steps.Batch:
    """This process's rows as its part of global arrays."""
    place = functools.partial(jax.make_array_from_process_local_data, sharding.batch_sharding(mesh))
    segments = place(arrays["segment_ids"]) if packed else None
    return steps.Batch(place(arrays["tokens"]), place(arrays["targets"]), place(arrays["mask"]), segments)


def _check_finite(backbone: model.Params) -> None:
    """Raises a ValueError that names parameters with NaN or infinity."""
    finite = jax.jit(lambda tree: jax.tree.map(lambda x: jnp.all(jnp.isfinite(x)), tree))(backbone)
    bad = [sharding.path_string(path) for path, ok in jax.tree_util.tree_leaves_with_path(finite) if not ok]
    if bad:
        raise ValueError(f"the model has NaN or infinite weights in {', '.join(bad)}; fetch or convert it again")


def _stop_if_diverged(line: dict[str, Any], config: FinetuneConfig) -> None:
    if line["skipped_in_a_row"] >= config.max_bad_steps:
        raise FloatingPointError(
            f"{line['skipped_in_a_row']} steps in a row had a loss or gradient that is not finite; the last was step "
            f"{line['step']}. Lower learning_rate={config.learning_rate} or lr_init={config.lr_init} and start in "
            "another output folder"
        )


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """Turns a first Ctrl-C or SIGTERM into a number to ask for between steps (0: none); a second acts as usual."""
    seen: list[int] = []
    kinds = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
    before = {kind: signal.getsignal(kind) for kind in kinds}

    def note(number: int, frame: Any) -> None:
        seen.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for kind in kinds:
        signal.signal(kind, note)
    try:
        yield lambda: seen[0] if seen else 0
    finally:
        for kind in kinds:
            signal.signal(kind, before[kind])


def _export(config: FinetuneConfig, pretrained: Pretrained, memory: model.Params) -> None:
    """The memory's weights and the config into the output folder, and the whole model below it."""
    out = Path(config.out)
    leaves = jax.tree_util.tree_leaves_with_path(memory)
    flat = {sharding.path_string(path): np.asarray(leaf, np.float32) for path, leaf in leaves}
    files.write(out / convert.ALLMEM_WEIGHTS, safetensors.numpy.save(flat))
    files.write(out / convert.ALLMEM_CONFIG, pretrained.config.to_json())
    if config.export and config.model != "tiny":
        params = model.merge_params(pretrained.backbone, memory)
        convert.save_pretrained(out / "model", pretrained.config, params, pretrained.tokenizer, overwrite=True)


def trained_memory(out: str | os.PathLike[str]) -> model.Params:
    """The memory that a run wrote, {"layers": {"memory": ...}}."""
    tree: model.Params = {}
    for name, value in safetensors.numpy.load_file(Path(out) / convert.ALLMEM_WEIGHTS).items():
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


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: a recipe, then any of its fields to set otherwise."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        named = bool(arguments) and not arguments[0].startswith("-")
        default = read_recipe(arguments.pop(0)) if named else FinetuneConfig()
        description = "Distil a pretrained model into AllMem. The first argument may be a recipe, configs/NAME.py."
        config = tyro.cli(
            FinetuneConfig, prog="python -m train.finetune [RECIPE]", description=description, default=default,
            args=arguments,
        )  # fmt: skip
        print(run(config))
    except (ValueError, FloatingPointError, FileNotFoundError) as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()

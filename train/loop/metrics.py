"""What a run says while it runs: metrics.jsonl, TensorBoard, Weights & Biases; a progress bar or plain lines."""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import tqdm

from allmem_jax.model import config as config_lib
from allmem_jax.storage import files, stores
from train.loop import distributed, flops
from train.recipe import FinetuneConfig


class Reports:
    """Tells each step once the next one is under way, so that the devices never wait for what is said of them.

    Every process has one, as all must stop where steps diverge; the main process writes and shows.

    Args:
      config: the recipe.
      model_config: of the student.
      devices: how many there are.
      out: the output folder.
      done: steps done before; lines of later ones (of a process killed after its last checkpoint) are removed.
    """

    def __init__(
        self, config: FinetuneConfig, model_config: config_lib.ModelConfig, devices: int, out: Path, done: int
    ):
        self._config, self._model_config = config, model_config
        self._devices, self._kind = devices, jax.devices()[0].device_kind
        self._told: list[MetricsLog | Progress] = []
        if distributed.main_process():
            events = out / "tensorboard" if config.tensorboard else None
            log = MetricsLog(out / "metrics.jsonl", done, tensorboard=events, wandb=config.wandb)
            self._told = [log, Progress(done, config.steps, config.log_every)]
        self._waiting: tuple[dict[str, Any], Any] | None = None
        self._began = time.perf_counter()

    def __enter__(self) -> "Reports":
        return self

    def __exit__(self, *exception: object) -> None:
        for each in self._told:
            each.close()

    def add(self, line: dict[str, Any], values: Any) -> None:
        """Takes a step, whose values may still be computed, and tells the one before."""
        self.flush()
        self._waiting = line, values

    @contextmanager
    def paused(self) -> Iterator[dict[str, Any]]:
        """Waits for the step that was taken last. What is done in here does not count as its time; yields its line."""
        assert self._waiting is not None
        line, values = self._waiting
        jax.block_until_ready(values)
        paused = time.perf_counter()
        yield line
        self._began += time.perf_counter() - paused

    def flush(self) -> None:
        """Tells the step that was taken last; FloatingPointError where too many in a row were not finite."""
        if self._waiting is None:
            return
        (line, values), self._waiting = self._waiting, None
        line |= {name: value.item() for name, value in jax.device_get(values).items()}
        began, self._began = self._began, time.perf_counter()
        line |= flops.speed(self._config, self._model_config, line, self._began - began, self._devices, self._kind)
        line |= device_memory()
        for each in self._told:
            each.show(line)
        if line["skipped_in_a_row"] >= self._config.max_bad_steps:
            raise FloatingPointError(
                f"{line['skipped_in_a_row']} steps in a row had a loss or gradient that is not finite; the last was "
                f"step {line['step']}. Lower learning_rate={self._config.learning_rate} or "
                f"lr_init={self._model_config.lr_init} and start in another output folder"
            )


def device_memory() -> dict[str, float]:
    """The most memory that this process's first device has held, in GiB, where the device tells."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {"hbm_gib": stats["peak_bytes_in_use"] / 2**30} if "peak_bytes_in_use" in stats else {}


@contextmanager
def profiler(folder: Path, count: int, done: int) -> Iterator[Callable[[int], None]]:
    """A function to call before each step after `done`: it starts and ends a trace of `count` steps, or of none."""
    first = done + 3  # the first two compile
    running = False

    def before(step: int) -> None:
        nonlocal running
        if count and step == first:
            jax.profiler.start_trace(folder)
            running = True
        elif running and step == first + count:
            jax.profiler.stop_trace()
            running = False

    try:
        yield before
    finally:
        if running:
            jax.profiler.stop_trace()


class MetricsLog:
    """Appends one JSON line a step; opening it cuts off what lies behind the step that a run resumes from.

    Args:
      file: metrics.jsonl.
      start: steps done; lines of later steps (from a process killed after its last checkpoint) are removed.
      tensorboard: also write event files to this folder.
      wandb: also send to this project of Weights & Biases, as the run of this folder.
    """

    def __init__(self, file: Path, start: int, *, tensorboard: Path | None = None, wandb: str = ""):
        lines = [line for line in read_metrics(file) if line["step"] <= start] if file.exists() else []
        files.write(file, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = file.open("a", encoding="utf-8")
        self._events = None if tensorboard is None else _Events(tensorboard, start)
        self._wandb = _wandb(wandb, file.parent) if wandb else None

    def close(self) -> None:
        """Ends all of these."""
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def show(self, line: Mapping[str, Any]) -> None:
        """Writes one step's values, null for those that are not finite."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(clean) + "\n")
        self._file.flush()
        numbers = {k: v for k, v in clean.items() if v is not None and k != "step"}
        if self._events is not None:
            self._events(numbers, line["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=line["step"])


class _Events:
    """TensorBoard's event files: one event a step, which is far quicker than one a value."""

    def __init__(self, folder: Path, start: int):
        import tensorboardX  # only where it is asked for
        from tensorboardX.proto import summary_pb2

        self._summary = summary_pb2.Summary
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start + 1 if start else None)

    def __call__(self, numbers: Mapping[str, Any], step: int) -> None:
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._writer.file_writer.add_summary(self._summary(value=values), step)

    def close(self) -> None:
        self._writer.close()


def _wandb(project: str, folder: Path) -> Any:
    try:
        import wandb
    except ImportError:
        raise ValueError(f"wandb={project!r} needs the package: pip install wandb, or leave the field empty") from None
    name = folder.resolve().name
    return wandb.init(project=project, id=name, name=name, dir=str(folder), resume="allow")


def read_metrics(file: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or its URL, without a last one that a killed process left incomplete."""
    lines = []
    for line in stores.read(file).decode().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class Progress:
    """A tqdm bar on a terminal; elsewhere a plain line every `every` steps.

    Args:
      start, steps: steps done, and to do in all.
      every: see above.
    """

    def __init__(self, start: int, steps: int, every: int):
        self._steps, self._every = steps, every
        terminal = sys.stderr.isatty()
        self._bar = tqdm.tqdm(total=steps, initial=start, unit="step", dynamic_ncols=True) if terminal else None

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()

    def show(self, line: Mapping[str, Any]) -> None:
        """Shows a step's loss, speed and the norms that tell a memory that diverges."""
        names = (
            "loss",
            "kl_beyond",
            "eval_kl",
            "eval_ce",
            "tokens_per_s",
            "mfu",
            "grad_norm",
            "alpha_rms",
            "memory_weights",
            "memory_velocity",
            "memory_state",
        )
        known = {name: line[name] for name in names if line.get(name) is not None}
        shown = {name: f"{value:.4g}" for name, value in known.items() if not math.isnan(value)}
        if line["skipped"]:
            shown["skipped"] = str(line["skipped"])
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()
        elif line["step"] % self._every == 0 or line["step"] in (1, self._steps):
            values = "  ".join(f"{name} {value}" for name, value in shown.items())
            print(f"step {line['step']}/{self._steps}  {values}", file=sys.stderr, flush=True)

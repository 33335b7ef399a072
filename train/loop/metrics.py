"""What a run says while it runs: metrics.jsonl, TensorBoard, Weights & Biases; a progress bar or plain lines."""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tqdm

from allmem_jax.storage import files, stores


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

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()
        if self._events is not None:
            self._events.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, line: Mapping[str, Any]) -> None:
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

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
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

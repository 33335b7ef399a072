"""What the loop costs beside its steps: `python -m train.experiments.overhead [RECIPE] [--steps 300]`.

The same programs run in the loop as it is, with data, metrics, checks and progress, and bare, on one batch that is
there already; the data stream runs alone. Compiling and checkpoints are left out.
"""

import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Annotated

import jax
import tyro

from allmem_jax.model import sharding
from train import errors, finetune
from train.data import stream as stream_lib
from train.loop import batches, compiled, metrics, models
from train.recipe import FinetuneConfig, read_recipe

COMPILING = 20  # steps of the loop that are not counted


def measure(config: FinetuneConfig, steps: int) -> dict[str, float]:
    """Tokens a second of the loop, of bare steps and of the data alone, and the two shares."""
    with tempfile.TemporaryDirectory() as folder:
        config = dataclasses.replace(
            config,
            out=folder,
            steps=COMPILING + steps,
            chunk=(min(config.chunk),),
            checkpoint_every=10**6,
            export=False,
        )
        pretrained = models.load(config)
        rows = batches.read_rows(config, pretrained, config.texts)
        finetune.run(config, pretrained, rows)
        lines = metrics.read_metrics(Path(folder) / "metrics.jsonl")
    tokens = config.batch * config.seq_length
    # Medians, so that what else the machine did for a moment does not count.
    found = {"loop": statistics.median(line["tokens_per_s"] for line in lines[COMPILING:])}
    found["bare"] = tokens / statistics.median(_bare(config, pretrained, rows, steps))
    found["data"] = tokens / _data(config, rows, 10 * steps)
    return found | {"loop_over_bare": found["loop"] / found["bare"], "data_over_bare": found["data"] / found["bare"]}


def _bare(config: FinetuneConfig, pretrained: models.Pretrained, rows: stream_lib.Source, steps: int) -> list[float]:
    """Seconds of each step when nothing else is done."""
    mesh = sharding.make_mesh(*config.mesh)
    state, frozen = compiled.start(config, pretrained, mesh)
    teacher, student = compiled.make(config, pretrained.config, sharding.tree_shardings(state, mesh), mesh)
    chunk, window, sinks = config.draw(1)
    with jax.set_mesh(mesh):
        batch = batches.place(config, next(batches.stream(config, rows, mesh, seed=0)), mesh)
        seconds = []
        for step in range(COMPILING + steps):
            began = time.perf_counter()
            hidden = teacher(frozen, batch) if teacher else None
            state, _ = student(chunk)(state, frozen, batch, hidden, window, sinks, compiled.draw(config, step))
            jax.block_until_ready(state)
            seconds.append(time.perf_counter() - began)
    return seconds[COMPILING:]


def _data(config: FinetuneConfig, rows: stream_lib.Source, steps: int) -> float:
    """Seconds of a batch from the stream alone."""
    stream = stream_lib.Stream(rows, config.batch, seed=0)
    next(stream)
    began = time.perf_counter()
    for _ in range(steps):
        next(stream)
    return (time.perf_counter() - began) / steps


def main(recipe: Annotated[str, tyro.conf.Positional] = "configs/smoke.py", steps: int = 300) -> None:
    """Measures what the loop of train.finetune costs beside its steps.

    Args:
      recipe: of the run.
      steps: to time.
    """
    found = measure(read_recipe(recipe), steps)
    print(json.dumps({name: round(value, 3) for name, value in found.items()}, indent=2))


if __name__ == "__main__":
    with errors.one_line():
        tyro.cli(main, prog="python -m train.experiments.overhead")

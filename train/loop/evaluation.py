"""What a run says of held-out texts while it trains."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from train.data import stream as stream_lib
from train.loop import batches, compiled, steps
from train.recipe import FinetuneConfig


def make(
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

    def evaluate(trained: lm.Params, frozen: lm.Params) -> dict[str, float]:
        stream = batches.stream(config, held_out, mesh, seed=0)
        found = []
        for _ in range(config.eval_batches):
            batch = batches.place(config, next(stream), mesh)
            found.append(one(trained, frozen, batch, teacher(frozen, batch) if teacher else None))
        sums = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(found))
        return {f"eval_{name}": total / count if count else math.nan for name, (total, count) in sums.items()}

    return evaluate

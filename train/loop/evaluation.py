"""What a run says of held-out texts while it trains."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
        functools.partial(sums, config=model_config, loss=loss),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

    def evaluate(trained: lm.Params, frozen: lm.Params) -> dict[str, float]:
        stream = batches.stream(config, held_out, mesh, seed=0)
        found = []
        for _ in range(config.eval_batches):
            batch = batches.place(config, next(stream), mesh)
            found.append(one(trained, frozen, batch, teacher(frozen, batch) if teacher else None))
        added = jax.tree.map(lambda *parts: np.sum(parts, axis=0, dtype=np.float64), *jax.device_get(found))
        return {f"eval_{name}": total / count if count else math.nan for name, (total, count) in added.items()}

    return evaluate


def sums(
    trained: lm.Params,
    frozen: lm.Params,
    batch: steps.Batch,
    teacher: jax.Array | None,
    *,
    config: config_lib.ModelConfig,
    loss: steps.Loss,
) -> steps.Metrics:
    """(sum, count) float32 [2] of each metric over the positions of a batch that may have a loss, none drawn out.

    Window and sinks are the config's own. Added up over batches, they give the mean over all positions.
    """
    loss = dataclasses.replace(loss, positions=1.0)
    window, sinks = jnp.int32(config.window), jnp.int32(config.sinks)
    drawn = steps.draw_positions(jax.random.key(0), loss, batch, window, sinks)
    counts = steps.count_positions(drawn)
    ones = dict.fromkeys(counts, jnp.float32(1))
    _, (found, _) = steps.batch_loss(trained, frozen, config, loss, batch, teacher, window, sinks, drawn, ones)
    del found["loss"]  # a mean, with weights
    return {
        name: jnp.stack([total, counts.get(name.split("_")[-1], counts["all"]).astype(jnp.float32)])
        for name, total in found.items()
    }

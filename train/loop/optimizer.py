"""AdamW, its schedule, and what weight decay is on."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from allmem_jax.model import lm, sharding


def wsd_schedule(peak: float, steps: int, warmup: int, decay: float) -> Callable[[jax.Array], jax.Array]:
    """Warmup-stable-decay: linear rise over `warmup` steps, `peak`, linear fall to 0 over the last share `decay`."""
    falling = max(decay * steps, 1.0)

    def rate(count: jax.Array) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        return peak * jnp.clip(jnp.minimum((done + 1) / max(warmup, 1), (steps - done) / falling), 0.0, 1.0)

    return rate


def make(
    schedule: Callable[[jax.Array], jax.Array], betas: tuple[float, float], weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm; weight decay is on what `decayed` says."""
    adamw = optax.adamw(schedule, *betas, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def decayed(params: lm.Params) -> Any:
    """For each parameter whether weight decay is on it: the kernels of projections, NAME_proj."""
    return jax.tree_util.tree_map_with_path(lambda path, _: sharding.path_string(path).endswith("_proj/kernel"), params)

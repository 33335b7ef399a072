"""What the layers of the memory tell of themselves, as metrics of a step.

Y layers    C channels of the memory
"""

from typing import Any

import jax
import jax.numpy as jnp


def memory(collected: dict[str, Any]) -> dict[str, jax.Array]:
    """What the memory's layers report, each [Y]: means of its rates, the largest of the sizes of its state.

    Rates also come by quarters of the layers, "memory_lr/q1" the lowest, where there are four layers or more.
    """
    metrics: dict[str, jax.Array] = {}
    for name, (value,) in collected.items():
        largest = name in ("weights", "velocity", "state")
        metrics[f"memory_{name}"] = jnp.max(value) if largest else jnp.mean(value)
        if not largest:
            metrics |= by_quarters(f"memory_{name}", value)
    return metrics


def by_quarters(name: str, value: jax.Array) -> dict[str, jax.Array]:
    """Means of `value` [Y] over quarters of the layers; nothing for fewer than four layers."""
    layers = value.shape[0]
    if layers < 4:
        return {}
    edges = [layers * quarter // 4 for quarter in range(5)]
    return {f"{name}/q{i + 1}": jnp.mean(value[edges[i] : edges[i + 1]]) for i in range(4)}


def alpha(value: jax.Array) -> dict[str, jax.Array]:
    """Root mean square of the memory's output scale [Y, C]."""
    squares = jnp.mean(jnp.square(value), axis=-1)  # [Y]
    quarters = by_quarters("alpha_rms", squares)
    return {name: jnp.sqrt(mean) for name, mean in {"alpha_rms": jnp.mean(squares), **quarters}.items()}

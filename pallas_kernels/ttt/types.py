"""The weights and the state of the memory.

Axes: B batch, N memory heads, D head dim, H hidden.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class FastWeights(NamedTuple):
    """Weights of the residual SwiGLU f(W, q) = down (SiLU(gate q) * (up q)) + q, one per head.

    Attributes:
      gate: [..., N, H, D].
      up: [..., N, H, D].
      down: [..., N, D, H].
    """

    gate: jax.Array
    up: jax.Array
    down: jax.Array


class MemoryState(NamedTuple):
    """All that the memory knows between two calls. Float leaves are float32 whatever the compute dtype.

    Attributes:
      weights: fast weights with a leading B.
      velocity: momentum M of the updates, like `weights`.
      pending: gradients of the unfinished chunk, each times its learning rate, summed; like `weights`.
      momentum_sum: [B, N] sum of the unfinished chunk's momentum.
      count: int32 [B] tokens in the unfinished chunk, below the chunk size.
    """

    weights: FastWeights
    velocity: FastWeights
    pending: FastWeights
    momentum_sum: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count


def init_memory_state(init: FastWeights, batch: int) -> MemoryState:
    """Returns the state of `batch` rows that have read nothing: weights `init`, everything else zero.

    Args:
      init: initial fast weights, without a batch axis.
      batch: number of rows B.
    """
    dtype = jnp.promote_types(init.gate.dtype, jnp.float32)
    weights = FastWeights(*(jnp.broadcast_to(w.astype(dtype), (batch, *w.shape)) for w in init))
    velocity, pending = (FastWeights(*(jnp.zeros_like(w) for w in weights)) for _ in range(2))  # own buffers: donatable
    momentum_sum = jnp.zeros((batch, init.gate.shape[0]), dtype)
    return MemoryState(weights, velocity, pending, momentum_sum, jnp.zeros((batch,), jnp.int32))

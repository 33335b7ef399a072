"""Attention of a piece of a prompt to a ring cache and to itself: choice of backend.

Axes: B batch, L new tokens, Hq query heads, Hkv key heads, D head dim, S sink slots, W window slots, T = S + W slots.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.swa import decode_tpu, prefill_tpu, ring

WIDE = 1024  # slots, from which plain JAX looks at those that are filled alone


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
    lengths: jax.Array,
    *,
    sink_slots: int,
    window: int | jax.Array,
    sinks: int | jax.Array,
    scale: float,
    implementation: str | None = None,
) -> jax.Array:
    """`ring.attend`, on a TPU by a kernel that keeps no scores. Its gradient is that of plain JAX.

    Args:
      q, k, v, keys, values, position, lengths, sink_slots, window, sinks, scale: as `ring.attend` takes them.
      implementation: "pallas", the kernel for TPUs; None for the best; any other means plain JAX.
    """
    implementation = implementation if implementation in (None, "pallas") else "xla"
    worth = ("pallas",) if q.shape[1] >= backends.SHORTEST_FOR_KERNELS else ()
    serving = backends.serving("swa prefill", implementation, q, decode_tpu.why_not(q), worth)
    functions = {name: functools.partial(_FUNCTIONS[name], sink_slots, float(scale)) for name in serving}
    arrays = (q, k, v, keys, values, position.astype(jnp.int32), lengths.astype(jnp.int32))
    return backends.run(implementation, functions, *arrays, jnp.int32(window), jnp.int32(sinks))


def _plain(sink_slots, scale, q, k, v, keys, values, position, lengths, window, sinks) -> jax.Array:
    """`ring.attend` to the beginning of a wide cache that holds all there is: slots fill in order."""
    count = keys.shape[1]
    parts = (-(-count * eighths // 8) for eighths in ((1, 2, 4, 6, 8) if count >= WIDE else (8,)))
    sizes = [size for size in parts if size > sink_slots]

    def attend_first(size):
        cache = keys[:, :size], values[:, :size]
        where = dict(sink_slots=sink_slots, window=window, sinks=sinks, scale=scale)
        return ring.attend(q, k, v, *cache, position, lengths, **where)

    smallest = jnp.sum(position.max() > jnp.asarray(sizes[:-1], jnp.int32))
    return jax.lax.switch(smallest, [functools.partial(attend_first, size) for size in sizes])


_FUNCTIONS: dict[str, Any] = {
    "xla": _plain,
    "pallas": backends.with_gradient_of(_plain, prefill_tpu.attend, fixed=2, floats=5, constants=4),
}

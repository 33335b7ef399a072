"""Norms in plain JAX, in float32 and back; their backward pass keeps their arguments alone.

Axes: D the channels that a norm is over, the last ones.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

EPS = 1e-6  # on a sum of squares


def recomputed(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """`function`, of which the backward pass keeps the arguments alone.

    For what is computed of each element, or of its neighbours: it costs less than to write it and read it again.
    """
    return jax.checkpoint(function, prevent_cse=False)


def per_channel(x: jax.Array, like: jax.Array) -> jax.Array:
    """x [F] as `like` [..., F]. Its gradient is one sum over all other axes, also those of size 1.

    What a product broadcasts by itself is summed over the others only, which XLA does 20 times slower on CPUs.
    """
    return jnp.broadcast_to(x.astype(jnp.float32), like.shape)


def rms_norm(
    x: jax.Array, scale: jax.Array, eps: jax.Array | float, offset: float = 0.0, norm: float | None = None
) -> jax.Array:
    """x [..., D] / rms(x) * (offset + scale [D]), and `l2_normalise`d if `norm` is given.

    `eps`, on the mean square, may be [..., 1].
    """

    def normalise(x, scale, eps):
        wide = x.astype(jnp.float32)
        square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps
        wide = wide * (offset + per_channel(scale, x))
        if norm is not None:  # both sums at once: the norm of wide / sqrt(square) is that of wide, but for its own eps
            square = (jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + EPS * square) / norm**2
        return (wide * jax.lax.rsqrt(square)).astype(x.dtype)

    return recomputed(normalise)(x, scale, eps)


def l2_normalise(x: jax.Array, norm: float = 1.0) -> jax.Array:
    """x [..., D] rescaled to `norm`."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.sum(jnp.square(wide), axis=-1, keepdims=True) + EPS)
    return (wide * (norm * inverse)).astype(x.dtype)

"""Convolution and norm by their definitions, to compare with. Axes: L tokens, N heads, D head dim, K taps."""

import jax
import jax.numpy as jnp


def conv_norm(norm, eps, x, kernel, scale, reach):
    """Arguments are those of `conv_norm` in `api`, reach int32 [B, L] or None; no rounding between the two steps."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    reach = jnp.full(x.shape[:2], kernel.shape[0]) if reach is None else reach

    def token(row, reach, t):
        """row [L, N, D], reach [L]."""
        y = jnp.zeros(row.shape[1:], dtype)
        for back in range(kernel.shape[0]):
            there = (back <= t) & (back <= reach[t])
            y = y + jnp.where(there, kernel[-1 - back] * row[t - back].astype(dtype), 0)
        if scale is not None:
            y = y / jnp.sqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps) * scale
            y = norm * y / jnp.sqrt(jnp.sum(y * y, axis=-1, keepdims=True) + 1e-6)
        return y.astype(x.dtype)

    tokens = jax.vmap(token, in_axes=(None, None, 0))
    return jax.vmap(tokens, in_axes=(0, 0, None))(x, reach, jnp.arange(x.shape[1]))

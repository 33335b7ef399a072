"""Convolution and norm in plain JAX. Axes: B batch, L tokens, N heads, D head dim, F = N D channels, K taps."""

import jax
import jax.numpy as jnp

from pallas_kernels import norms


def conv_norm(norm, eps, x, kernel, scale, reach):
    """Arguments are those of `conv_norm` in `api`, reach int32 [B, L] or None."""
    y = plain(x.reshape(*x.shape[:2], -1), kernel.reshape(kernel.shape[0], -1), None, reach).reshape(x.shape)
    return y if scale is None else norms.rms_norm(y, scale, eps, norm=norm)


def plain(x: jax.Array, kernel: jax.Array, tail: jax.Array | None, reach: jax.Array | None = None) -> jax.Array:
    """y[t] = sum_j kernel[K - 1 - j] * x[t - j].

    Args:
      x: [B, L, F]; kernel: [K, F].
      tail: [B, K - 1, F], the K - 1 inputs before this call; None for the start of a sequence (zeros).
      reach: int32 [B, L], how many tokens before it each may see; None for all.

    Returns:
      [B, L, F] in x's dtype.
    """
    taps, length = kernel.shape[0], x.shape[1]
    if tail is None:
        tail = jnp.zeros((x.shape[0], taps - 1, x.shape[2]), x.dtype)

    def convolve(x, kernel, tail, reach):
        padded = jnp.concatenate([tail.astype(x.dtype), x], axis=1)
        y = jnp.zeros(x.shape, jnp.float32)
        for back in range(taps):
            shifted = padded[:, taps - 1 - back : taps - 1 - back + length]
            if reach is not None and back:
                shifted = jnp.where((back <= reach)[..., None], shifted, 0)
            y = y + shifted.astype(jnp.float32) * norms.per_channel(kernel[taps - 1 - back], x)
        return y.astype(x.dtype)

    return norms.recomputed(convolve)(x, kernel, tail, reach)

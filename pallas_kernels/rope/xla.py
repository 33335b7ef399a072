"""RMSNorm and rotary positions in plain JAX. Axes: B batch, L tokens, H heads, D head dim."""

import jax.numpy as jnp

from pallas_kernels import norms


def norm_rope(eps, offset, factor, x, scale, cos, sin):
    """Arguments are those of `norm_rope` in `api`, cos and sin its tables."""
    if scale is not None:
        x = norms.rms_norm(x, scale, eps, offset)
    if cos is None:
        return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :] * factor, sin[:, :, None, :] * factor
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)

"""RMSNorm and rotary positions by their definitions, to compare with: rotations are products of complex numbers.

Axes: D head dim.
"""

import jax
import jax.numpy as jnp


def norm_rope(eps, offset, factor, x, scale, cos, sin):
    """Arguments are those of `norm_rope` in `api`; no rounding between the two steps."""

    def head(x, cos, sin):
        """x [D], cos and sin [D / 2] of its token."""
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if scale is not None:
            y = y / jnp.sqrt(jnp.vdot(y, y) / y.size + eps) * (offset + scale)
        if cos is not None:
            turned = jax.lax.complex(*jnp.split(y, 2)) * jax.lax.complex(cos, sin)
            y = jnp.concatenate([turned.real, turned.imag])
        return (y * factor).astype(x.dtype)

    heads = jax.vmap(head, in_axes=(0, None, None))
    return jax.vmap(jax.vmap(heads))(x, cos, sin)

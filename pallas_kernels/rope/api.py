"""`norm_rope`: signature, checks, gradient rule and choice of backend.

Axes: B batch, L tokens, H heads, D head dim.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.rope import pallas_tpu, reference, xla


def norm_rope(
    x: jax.Array,
    scale: jax.Array | None,
    rope: tuple[jax.Array, jax.Array] | None,
    *,
    eps: float,
    offset: float = 0.0,
    factor: float = 1.0,
    rows: bool = False,
    implementation: str | None = None,
) -> jax.Array:
    """x / rms(x) * (offset + scale) of each head, in float32 and back; then its halves rotated, times factor, likewise.

    The rotation (arXiv 2104.09864) takes channels d and d + D / 2 for a pair. Differentiable once (reverse mode) in x
    and scale.

    Args:
      x: [B, L, H, D], floating.
      scale: [D]; None leaves the norm out.
      rope: cos and sin of each token's angles, [B, L, D / 2]; None leaves the rotation out.
      eps: on the mean square; a Python number.
      offset: of the scale, 1 where it is kept as a difference to 1; a Python number.
      factor: of the result; a Python number.
      rows: how the result lies on TPUs: each head's tokens in rows, [L, D], as `swa_attention` wants keys, or in
        columns, [D, L], as it wants queries.
      implementation: None for the best on the platform that the code is lowered for; or "xla", "pallas" (TPU),
        "reference".

    Returns:
      x's shape and dtype.

    Raises:
      ValueError, TypeError: an argument that does not fit, by name.
      NotImplementedError: a named backend that cannot serve, with the reason; it is never replaced by another.
    """
    cos, sin = (None, None) if rope is None else rope
    _check(x, scale, cos, sin)
    fixed = eps, offset, factor
    functions = {
        "reference": functools.partial(reference.norm_rope, *fixed),
        "xla": functools.partial(_xla, *fixed),
        "pallas": functools.partial(_pallas, *fixed, rows),
    }
    operands, worth = (x, scale, cos, sin), scale is not None or rope is not None
    return backends.run_without_triton(
        "norm_rope", implementation, x, pallas_tpu.why_not(x), functions, *operands, worth=worth
    )


_xla = backends.with_gradient_of(xla.norm_rope, xla.norm_rope, fixed=3, floats=2, constants=2)
_pallas = backends.with_gradient(pallas_tpu.forward, pallas_tpu.backward, fixed=4, constants=2)


def _check(x, scale, cos, sin):
    """Raises where the arrays do not fit together."""
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"norm_rope: x has shape {x.shape}; it must be [B, L, H, D] with no empty axis")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"norm_rope: x is {x.dtype}; it must be floating point")
    batch, length, _, dim = x.shape
    if scale is not None and scale.shape != (dim,):
        raise ValueError(f"norm_rope: scale has shape {scale.shape}; with this x it must be ({dim},)")
    for name, table in (("cos", cos), ("sin", sin)):
        if table is not None and (dim % 2 or table.shape != (batch, length, dim // 2)):
            raise ValueError(
                f"norm_rope: {name} has shape {table.shape}; with this x it must be ({batch}, {length}, {dim} / 2)"
            )

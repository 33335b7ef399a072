"""`conv_norm`: signature, checks, gradient rule and choice of backend.

Axes: B batch, L tokens, N heads, D head dim, K taps.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.conv import pallas_tpu, reference, xla


def conv_norm(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None = None,
    *,
    norm: float = 1.0,
    eps: float = 0.0,
    segment_ids: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """y[t] = sum_j kernel[K - 1 - j] * x[t - j], and of each head y / rms(y) * scale, rescaled to the length `norm`.

    Both in float32 and back. Differentiable once (reverse mode) in x, kernel and scale.

    Args:
      x: [B, L, N, D], floating, from the start of a sequence: what is before it is zero.
      kernel: [K, N, D].
      scale: [D]; None leaves the norm out.
      norm: length of each head's result; a Python number.
      eps: on the mean square; a Python number.
      segment_ids: int32 [B, L] of packed documents, each of consecutive tokens; a token of another one counts as zero.
      implementation: None for the best on the platform that the code is lowered for; or "xla", "pallas" (TPU),
        "reference".

    Returns:
      x's shape and dtype.

    Raises:
      ValueError, TypeError: an argument that does not fit, by name.
      NotImplementedError: a named backend that cannot serve, with the reason; it is never replaced by another.
    """
    _check(x, kernel, scale, segment_ids)
    reach = None if segment_ids is None else reach_of(segment_ids, kernel.shape[0])
    each = {"reference": reference.conv_norm, "xla": xla.conv_norm, "pallas": _pallas}
    functions = {name: functools.partial(function, norm, eps) for name, function in each.items()}
    reason = pallas_tpu.why_not(x, kernel)
    return backends.run_without_triton("conv_norm", implementation, x, reason, functions, x, kernel, scale, reach)


_pallas = backends.with_gradient(pallas_tpu.forward, pallas_tpu.backward, fixed=2, constants=1)


def reach_of(segment_ids: jax.Array, taps: int) -> jax.Array:
    """int32 [B, L]: how many tokens before each, up to K - 1, are of its document."""
    count = jnp.zeros(segment_ids.shape, jnp.int32)
    for back in range(1, taps):
        before = jnp.pad(segment_ids, ((0, 0), (back, 0)), constant_values=-1)[:, : segment_ids.shape[1]]
        count += before == segment_ids
    return count


def _check(x, kernel, scale, segment_ids):
    """Raises where the arrays do not fit together."""
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"conv_norm: x has shape {x.shape}; it must be [B, L, N, D] with no empty axis")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"conv_norm: x is {x.dtype}; it must be floating point")
    if kernel.ndim != 3 or kernel.shape[1:] != x.shape[2:] or not kernel.shape[0]:
        raise ValueError(
            f"conv_norm: kernel has shape {kernel.shape}; with this x it must be (K, {x.shape[2]}, {x.shape[3]})"
        )
    if scale is not None and scale.shape != x.shape[3:]:
        raise ValueError(f"conv_norm: scale has shape {scale.shape}; with this x it must be ({x.shape[3]},)")
    if segment_ids is not None and segment_ids.shape != x.shape[:2]:
        raise ValueError(f"conv_norm: segment_ids has shape {segment_ids.shape}; with this x it must be {x.shape[:2]}")

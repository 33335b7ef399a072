"""RMSNorm and rotary positions on TPUs: one pass over what a projection made, forward and backward.

Axes: B batch, L tokens padded to blocks, H heads, D head dim, T tokens of a block, C = 128 of them at a time.

XLA makes several passes of this, some of them in float32, as a sum over a head's channels cannot be fused with what
needs it. Tokens lie along lanes, [D, C]: such a sum adds registers, and the halves of a head are whole ones. So
projections write them, and so the attention kernels want queries; keys, which they want as [L, D], are turned over on
the way out, and their gradient on the way in.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_tokens
from pallas_kernels.rope import xla

LANES = 128
TOKENS = 1024  # most of a block
BYTES = 2**20  # most of a block, of which VMEM holds up to six
HALVES = 32  # least channels whose halves are whole registers in bfloat16


def why_not(x) -> str | None:
    """Returns why x [B, L, H, D] cannot be served, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, and x is {x.dtype}"
    if x.shape[-1] % HALVES:
        return f"the TPU kernels take heads of a multiple of {HALVES} channels, and x has {x.shape[-1]}"
    return None


def forward(eps, offset, factor, rows, x, scale, cos, sin):
    """Returns the result [B, L, H, D] and what `backward` needs."""
    kernel = functools.partial(_forward_kernel, eps, offset, factor)
    return _call(kernel, [(x, False)], scale, cos, sin, rows), (x, scale, cos, sin)


def backward(eps, offset, factor, rows, residuals, d_out):
    """Returns the cotangents of x and scale; that of the scale in plain JAX, as few want it."""
    x, scale, cos, sin = residuals
    kernel = functools.partial(_backward_kernel, eps, offset, factor)
    inputs = [(d_out, rows)] if scale is None else [(d_out, rows), (x, False)]
    d_x = _call(kernel, inputs, scale, cos, sin, False)
    _, of_scale = jax.vjp(lambda scale: xla.norm_rope(eps, offset, factor, x, scale, cos, sin), scale)
    return d_x, *of_scale(d_out)


def _call(kernel, inputs, scale, cos, sin, rows):
    """Runs a kernel on C tokens of a head after the other.

    Args:
      kernel: is called with `inputs` [D, C], the scale [D, 1], cos and sin [D / 2, C], all float32 or None, and the
        dtype of the result, which it returns as float32 [D, C].
      inputs: arrays [B, L, H, D], and whether each lies in rows.
      scale, cos, sin: as in `norm_rope`.
      rows: whether the result does.

    Returns:
      An array like the inputs.
    """
    batch, length, heads, dim = inputs[0][0].shape
    padded = length + -length % LANES
    tokens = math.gcd(padded, TOKENS)
    some = math.gcd(heads, max(BYTES // (dim * tokens * inputs[0][0].dtype.itemsize), 1))
    parts = [tpu_tokens.rows(x, LANES) if in_rows else tpu_tokens.columns(x, LANES) for x, in_rows in inputs]
    column = pl.BlockSpec((None, some, dim, tokens), lambda b, t, h: (b, h, 0, t))
    row = pl.BlockSpec((None, some, tokens, dim), lambda b, t, h: (b, h, t, 0))
    table = pl.BlockSpec((None, dim // 2, tokens), lambda b, t, h: (b, 0, t))
    specs = [row if in_rows else column for _, in_rows in inputs]
    if scale is not None:
        parts.append(scale.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((dim, 1), lambda b, t, h: (0, 0)))
    if cos is not None:
        parts += [tpu_tokens.padded(jnp.swapaxes(x.astype(jnp.float32), 1, 2), 2, LANES) for x in (cos, sin)]
        specs += [table, table]

    def block(*refs):
        *given, out = refs
        arrays, constants = given[: len(inputs)], given[len(inputs) :]

        @pl.loop(0, some)
        def _(head):
            @pl.loop(0, tokens // LANES, unroll=min(2, tokens // LANES))
            def _(part):
                at = pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
                wide = [
                    ref[head, at, :].astype(jnp.float32).T if in_rows else ref[head, :, at].astype(jnp.float32)
                    for ref, (_, in_rows) in zip(arrays, inputs, strict=True)
                ]
                scales = None if scale is None else constants[0][...]
                angles = (None, None) if cos is None else (ref[:, at] for ref in constants[-2:])
                result = kernel(*wide, scales, *angles, out.dtype)
                if rows:
                    out[head, at, :] = result.T.astype(out.dtype)
                else:
                    out[head, :, at] = result.astype(out.dtype)

    shape = (batch, heads, padded, dim) if rows else (batch, heads, dim, padded)
    out = pl.pallas_call(
        block,
        grid=(batch, padded // tokens, heads // some),
        in_specs=specs,
        out_specs=row if rows else column,
        out_shape=jax.ShapeDtypeStruct(shape, inputs[0][0].dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3),
        name="norm_rope" + kernel.func.__name__,
    )(*parts)
    return tpu_tokens.from_rows(out, length) if rows else tpu_tokens.from_columns(out, length)


def _forward_kernel(eps, offset, factor, x, scale, cos, sin, dtype):
    if scale is not None:
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=0, keepdims=True) + eps) * (offset + scale)
        x = x.astype(dtype).astype(jnp.float32)  # as a norm of its own leaves it
    return factor * (x if cos is None else _rotated(x, cos, sin))


def _backward_kernel(eps, offset, factor, d_out, *rest):
    *x, scale, cos, sin, _ = rest
    d_y = factor * (d_out if cos is None else _rotated(d_out, cos, -sin))
    if scale is None:
        return d_y
    inverse = jax.lax.rsqrt(jnp.mean(x[0] * x[0], axis=0, keepdims=True) + eps)
    d_y, unit = d_y * (offset + scale), x[0] * inverse
    return inverse * (d_y - unit * jnp.mean(unit * d_y, axis=0, keepdims=True))


def _rotated(x, cos, sin):
    """x [D, C] and tables [D / 2, C] -> [D, C]."""
    first, second = jnp.split(x, 2, axis=0)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=0)

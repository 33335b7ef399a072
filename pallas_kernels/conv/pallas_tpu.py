"""Convolution and norm on TPUs: one pass over what a projection made, forward and backward.

Axes: B batch, L tokens padded to blocks, F = N D channels of N heads, T tokens of a block, S of them at a time, C up to
128 channels at a time, which are whole heads, K taps.

XLA makes several passes of this, some of them in float32, and some only to lay heads out for a sum over each. Here
channels lie along lanes, as projections write them and as the memory's kernels want them: another token is another row,
at which a load may start; and the sum over a head is a product with ones, which leaves it in all the head's lanes.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import norms, tpu_tokens

LANES = 128
STEP = 128  # S
TOKENS = 1024  # most of a block
BYTES = 2**20  # most of a block
EDGE = 16  # tokens before and after a block that are read too: a tile in bfloat16
MARGIN = 8  # and kept, of those before: a tile in float32
ROWS = 16  # of sums: one for each tap, the latest first, then that of the scale


def why_not(x, kernel) -> str | None:
    """Returns why x [B, L, N, D] and kernel [K, N, D] cannot be served, or None."""
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, and x is {x.dtype}"
    if LANES % x.shape[3]:
        return f"the TPU kernels take heads of a size that divides {LANES}, and x has {x.shape[3]}"
    if kernel.shape[0] > MARGIN:
        return f"the TPU kernels take at most {MARGIN} taps, and kernel has {kernel.shape[0]}"
    return None


def forward(norm, eps, x, kernel, scale, reach):
    """Returns the result [B, L, N, D] and what `backward` needs."""
    (out,) = _call(functools.partial(_forward_kernel, norm, eps), [x], kernel, scale, reach)
    return out, (x, kernel, scale, reach)


def backward(norm, eps, residuals, d_out):
    """Returns the cotangents of x, kernel and scale."""
    x, kernel, scale, reach = residuals
    taps = kernel.shape[0]
    d_x, sums = _call(functools.partial(_backward_kernel, norm, eps), [x, d_out], kernel, scale, reach)
    sums = sums.sum((0, 1)).reshape(ROWS, *x.shape[2:])
    d_scale = None if scale is None else sums[taps].sum(0).astype(scale.dtype)
    return d_x, sums[:taps][::-1].astype(kernel.dtype), d_scale


class Span(NamedTuple):
    """Refs of a block's tokens [T, X], and of the EDGE before and after them."""

    block: Any
    before: Any
    after: Any


class Block(NamedTuple):
    """What a kernel sees of a block.

    Attributes:
      dim: D.
      first, last: whether the row has no tokens before it, or after it.
      x, d_out: `Span`s of F channels; `d_out` is None forward.
      reach: a span of one, or None.
      taps, scale: refs [K, F] and [1, F] float32; the second may be None.
    """

    dim: int
    first: jax.Array
    last: jax.Array
    x: Any
    d_out: Span | None
    reach: Span | None
    taps: Any
    scale: Any

    def columns(self):
        """Slices of C channels."""
        wide = self.taps.shape[1]
        return [slice(at, min(at + LANES, wide)) for at in range(0, wide, LANES)]

    def load(self, span, columns, scratch):
        """Writes to scratch [MARGIN + T + EDGE, LANES], as float32, MARGIN tokens before, the block and those after.

        They are zero where there are none; one channel goes to all lanes.
        """
        size = span.block.shape[0]
        before, block, after = (ref[:, columns].astype(jnp.float32) for ref in (span.before, span.block, span.after))
        width = LANES if block.shape[1] == 1 else block.shape[1]
        parts = jnp.where(self.first, 0.0, before[EDGE - MARGIN :]), block, jnp.where(self.last, 0.0, after)
        for at, part in zip((0, MARGIN, MARGIN + size), parts, strict=True):
            scratch[at : at + part.shape[0], :width] = jnp.broadcast_to(part, (part.shape[0], width))

    def shifted(self, x, reach, columns, at, size):
        """Tokens at, at + 1, ... [S, C], and those before them, up to K - 1; zero where not in reach. From scratch."""
        width = columns.stop - columns.start
        found = [x[pl.ds(MARGIN + at - back, size), :width] for back in range(self.taps.shape[0])]
        if self.reach is None:
            return found
        near = reach[pl.ds(MARGIN + at, size), :width]
        return [jnp.where(near >= back, part, 0.0) for back, part in enumerate(found)]

    def convolved(self, shifted, columns):
        """The convolution [S, C] of what `shifted` returns."""
        return sum(self.taps[row : row + 1, columns] * part for row, part in enumerate(reversed(shifted)))


def _call(body, streams, kernel, scale, reach):
    """Runs `body` on blocks of T tokens of each row.

    Args:
      body: is called with a `Block`, refs of what is returned, and of scratch for tokens, cotangents and reach.
      streams: x, or x and d_out, [B, L, N, D].
      kernel, scale, reach: as in `conv_norm`.

    Returns:
      An array like x, and with d_out float32 [B, blocks, ROWS, F], rows of sums over a block's tokens.
    """
    (batch, length, heads, dim), dtype = streams[0].shape, streams[0].dtype
    wide, padded = heads * dim, length + -length % STEP
    most = max(BYTES // (wide * dtype.itemsize * STEP), 1) * STEP
    tokens = math.gcd(padded, min(TOKENS, 1 << (most.bit_length() - 1)))
    each, edges = tokens // EDGE, padded // EDGE
    spans = [x.reshape(batch, length, wide) for x in streams] + ([] if reach is None else [reach[..., None]])
    spans = [tpu_tokens.padded(x, 1, STEP) for x in spans]
    constants = [kernel.reshape(-1, wide).astype(jnp.float32)]
    if scale is not None:
        constants.append(jnp.tile(scale.astype(jnp.float32), heads)[None])

    def specs(x):
        return [
            pl.BlockSpec((None, tokens, x.shape[2]), lambda b, t: (b, t, 0)),
            pl.BlockSpec((None, EDGE, x.shape[2]), lambda b, t: (b, jnp.maximum(t * each - 1, 0), 0)),
            pl.BlockSpec((None, EDGE, x.shape[2]), lambda b, t: (b, jnp.minimum((t + 1) * each, edges - 1), 0)),
        ]

    def block(*refs):
        given = iter(refs)

        def span(there):
            return Span(next(given), next(given), next(given)) if there else None

        ends = pl.program_id(1) == 0, pl.program_id(1) == padded // tokens - 1
        of_tokens = span(True), span(len(streams) == 2), span(reach is not None)
        taps, scales = next(given), None if scale is None else next(given)
        body(Block(dim, *ends, *of_tokens, taps, scales), *given)

    shapes = [jax.ShapeDtypeStruct((batch, padded, wide), dtype)]
    outs = [pl.BlockSpec((None, tokens, wide), lambda b, t: (b, t, 0))]
    if len(streams) == 2:
        shapes.append(jax.ShapeDtypeStruct((batch, padded // tokens, ROWS, wide), jnp.float32))
        outs.append(pl.BlockSpec((None, None, ROWS, wide), lambda b, t: (b, t, 0, 0)))
    out, *sums = pl.pallas_call(
        block,
        grid=(batch, padded // tokens),
        in_specs=[spec for x in spans for spec in specs(x)]
        + [pl.BlockSpec(x.shape, lambda b, t: (0, 0)) for x in constants],
        out_specs=outs,
        out_shape=shapes,
        scratch_shapes=[pltpu.VMEM((MARGIN + tokens + EDGE, LANES), jnp.float32)] * 3,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 2),
        name="conv_norm" + body.func.__name__,
    )(*(x for x in spans for _ in range(3)), *constants)
    return out[:, :length].reshape(streams[0].shape), *sums


def _forward_kernel(norm, eps, block, out, x, _, reach):
    """out [T, F]; the rest is scratch."""
    if block.reach is not None:
        block.load(block.reach, slice(0, 1), reach)
    head = Head(norm, eps, block.dim, out.dtype)
    for columns in block.columns():
        block.load(block.x, columns, x)

        @pl.loop(0, out.shape[0] // STEP)
        def _(step, columns=columns):
            at = pl.multiple_of(step * STEP, STEP)
            y = block.convolved(block.shifted(x, reach, columns, at, STEP), columns)
            if block.scale is not None:
                scaled, square = head.scaled(y, block.scale[:, columns])
                y = scaled * (norm * jax.lax.rsqrt(square))
            out[pl.ds(at, STEP), columns] = y.astype(out.dtype)


def _backward_kernel(norm, eps, block, d_x, sums, x, d_y, reach):
    """d_x [T, F]; sums [ROWS, F]; the rest is scratch, of which `d_y` has the cotangent first of the result."""
    if block.reach is not None:
        block.load(block.reach, slice(0, 1), reach)
    head, (tokens, _) = Head(norm, eps, block.dim, d_x.dtype), d_x.shape
    taps = block.taps.shape[0]

    def pull(columns, at, size):
        """Makes of d_y that of the convolution; returns what is to be summed over tokens, [S, C] each."""
        rows, width = pl.ds(MARGIN + at, size), columns.stop - columns.start
        shifted, cotangent = block.shifted(x, reach, columns, at, size), d_y[rows, :width]
        if block.scale is None:
            return [cotangent * part for part in shifted]
        y = block.convolved(shifted, columns)
        cotangent, of_scale = head.pull(y, block.scale[:, columns], cotangent)
        d_y[rows, :width] = cotangent
        return [*(cotangent * part for part in shifted), of_scale]

    for columns in block.columns():
        width = columns.stop - columns.start
        block.load(block.x, columns, x)
        block.load(block.d_out, columns, d_y)

        def step(n, totals, columns=columns):
            found = pull(columns, pl.multiple_of(n * STEP, STEP), STEP)
            return [
                total + part.reshape(-1, 8, part.shape[1]).sum(0) for total, part in zip(totals, found, strict=True)
            ]

        totals = [jnp.zeros((8, width), jnp.float32)] * (taps + (block.scale is not None))
        totals = jax.lax.fori_loop(0, tokens // STEP, step, totals)
        pull(columns, tokens, EDGE)
        sums[:, columns] = jnp.zeros((ROWS, width), jnp.float32)
        for row, total in enumerate(totals):
            sums[row : row + 1, columns] = total.sum(0, keepdims=True)

        @pl.loop(0, tokens // STEP)
        def _(n, columns=columns, width=width):
            at = pl.multiple_of(n * STEP, STEP)
            total = jnp.zeros((STEP, width), jnp.float32)
            for back in range(taps):
                rows = pl.ds(MARGIN + at + back, STEP)
                part = d_y[rows, :width]
                if block.reach is not None and back:
                    part = jnp.where(reach[rows, :width] >= back, part, 0.0)
                total += block.taps[taps - 1 - back : taps - back, columns] * part
            d_x[pl.ds(at, STEP), columns] = total.astype(d_x.dtype)


class Head(NamedTuple):
    """The norm of heads that lie side by side in C lanes: y * scale, rescaled to the length `norm`."""

    norm: float
    eps: float
    dim: int
    dtype: Any

    def scaled(self, y, scale):
        """Returns y * scale and the square of its length [S, C], with what keeps that from zero."""
        scaled = y * scale
        mean = self.sums(y * y, parts=1) / self.dim + self.eps
        return scaled, self.sums(scaled * scaled) + norms.EPS * mean

    def pull(self, y, scale, cotangent):
        """Returns the cotangent of y, and of the scale what is to be summed, from that of the result; all [S, C]."""
        scaled, square = self.scaled(y, scale)
        inverse = jax.lax.rsqrt(square)
        d_square = -0.5 * self.norm * inverse * inverse * inverse * self.sums(cotangent * scaled)
        d_scaled = cotangent * (self.norm * inverse) + 2 * d_square * scaled
        return d_scaled * scale + (2 * norms.EPS / self.dim) * d_square * y, d_scaled * y

    def sums(self, x, parts=None):
        """Sums over each head, in all its lanes. The matrix unit takes bfloat16, so x goes in parts of 8 bits each."""
        parts = parts or (2 if self.dtype == jnp.bfloat16 else 3)
        head = [jax.lax.broadcasted_iota(jnp.int32, (x.shape[1],) * 2, axis) // self.dim for axis in (0, 1)]
        ones, total = (head[0] == head[1]).astype(jnp.bfloat16), jnp.zeros_like(x)
        for _ in range(parts):
            part = x.astype(jnp.bfloat16)
            total += jnp.dot(part, ones, preferred_element_type=jnp.float32)
            x = x - part.astype(jnp.float32)
        return total

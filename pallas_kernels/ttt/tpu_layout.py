"""What the TPU kernels' arrays are padded and cut to, there and back.

Axes: B batch, L tokens, N heads, P heads of a pack, D head dim, H hidden, C = P D and F = P H columns of a pack,
K blocks of T tokens, R rows of `rates`.
"""

import dataclasses

import jax.numpy as jnp

from pallas_kernels.ttt import visits
from pallas_kernels.ttt.types import FastWeights

LANES = 128


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static description of one call: what the arrays are padded and cut to.

    Attributes:
      pack: heads of a pack, P.
      heads, dim, hidden: after padding; heads is a multiple of P.
      tokens: T, of a block.
      blocks: K.
      phases: that can occur in a block, 1 to 3.
      slots: S, more than the updates of any row.
      vmem_bytes: limit of the kernels.
    """

    pack: int
    heads: int
    dim: int
    hidden: int
    tokens: int
    blocks: int
    phases: int
    slots: int
    vmem_bytes: int

    @property
    def wide(self) -> tuple[int, int]:
        """(C, F), a pack's columns of tokens and of hidden units."""
        return self.pack * self.dim, self.pack * self.hidden


def make_layout(shape, hidden: int, chunk_size: int, single: bool, resets: bool, most: int, vmem_bytes: int) -> Layout:
    """Returns the layout of one pass.

    Args:
      shape: of q.
      hidden: H.
      chunk_size: tokens per update.
      single: promise that all rows begin with a chunk and go on without padding and documents.
      resets: whether documents can begin.
      most: tokens of a block, from `Tiles`.
      vmem_bytes: from `Tiles`.
    """
    _, length, heads, dim = shape
    pack = heads
    if heads * dim > LANES:
        dim = max(1 << (dim - 1).bit_length(), 8) if dim < LANES else -(-dim // LANES) * LANES
        pack = max(LANES // dim, 1)
    tokens = _block_tokens(min(chunk_size, length), chunk_size, most if pack * hidden <= 256 else most // 2)
    blocks = -(-length // tokens)
    aligned = single and (chunk_size % tokens == 0 or blocks == 1)
    phases = 1 if aligned else 3 if resets else 2
    slots = (length + chunk_size - 1) // chunk_size + 1
    heads = -(-heads // pack) * pack
    return Layout(pack, heads, dim, hidden, tokens, blocks, phases, slots, vmem_bytes)


def _block_tokens(limit: int, chunk_size: int, most: int) -> int:
    """Returns the largest block up to `most` that divides the chunk, or just the largest."""
    if limit <= most:
        return limit
    fitting = [t for t in range(most, 15, -16) if chunk_size % t == 0]
    return fitting[0] if fitting else most


def plan_of(layout, chunk_size, shape, valid, reset, count):
    """Returns the plan of a call, for masks [B, L] or None."""
    batch, length = shape
    padding = [(0, 0), (0, layout.blocks * layout.tokens - length)]
    valid = jnp.ones(shape, bool) if valid is None else valid
    reset = jnp.zeros(shape, bool) if reset is None else reset
    return visits.make_plan(jnp.pad(valid, padding), jnp.pad(reset, padding), count, chunk_size, layout.tokens)


def means_of(layout, chunk_size, plan, momentum, momentum_sum):
    """Returns `visits.momentum_of` for momentum [B, L, N]."""
    momentum = _pad(momentum.astype(momentum_sum.dtype), 1, layout.blocks * layout.tokens)
    momentum = momentum.reshape(momentum.shape[0], layout.blocks, layout.tokens, -1)
    return visits.momentum_of(plan, momentum, momentum_sum, chunk_size)


def to_blocks(layout, x):
    """[B, L, N, D] -> [B, K, T, N D] of the padded heads and dims."""
    x = _pad(_pad(_pad(x, 1, layout.blocks * layout.tokens), 2, layout.heads), 3, layout.dim)
    return x.reshape(x.shape[0], layout.blocks, layout.tokens, -1)


def from_blocks(layout, x, shape, valid):
    """The way back, to [B, L, N, D] of `shape`, with zeros where tokens are not valid."""
    batch, length, heads, dim = shape
    x = x.reshape(batch, -1, layout.heads, layout.dim)[:, :length, :heads, :dim]
    return x if valid is None else jnp.where(valid[:, :, None, None], x, 0)


def rate_rows(layout):
    """Returns R: a rate of each weight for each head, and the phase, filled up to 8."""
    return -(-(3 * layout.pack + 1) // 8) * 8


def to_rates(layout, plan, lr):
    """lr [B, L, N, 3] -> [B, N / P, K, R, T]: P rows for each weight, zero where a token writes nothing; its phase."""
    batch, blocks, tokens = plan.write.shape
    lr = _pad(_pad(lr.astype(jnp.float32), 1, blocks * tokens), 2, layout.heads)
    lr = lr.reshape(batch, blocks, tokens, -1, layout.pack, 3)
    lr = jnp.where(plan.write[..., None, None, None], lr, 0)
    rows = lr.transpose(0, 3, 1, 5, 4, 2).reshape(batch, -1, blocks, 3 * layout.pack, tokens)
    phase = jnp.broadcast_to(plan.phase[:, None, :, None, :], (batch, rows.shape[1], blocks, 1, tokens))
    return _pad(jnp.concatenate([rows, phase.astype(jnp.float32)], axis=3), 3, rate_rows(layout))


def from_rates(layout, plan, d_rates, lr):
    """The way back, to the cotangent of lr."""
    batch, length, heads, _ = lr.shape
    rows = d_rates[:, :, :, : 3 * layout.pack].reshape(batch, -1, layout.blocks, 3, layout.pack, layout.tokens)
    rows = rows.transpose(0, 2, 5, 1, 4, 3)
    rows = jnp.where(plan.write[..., None, None, None], rows, 0)
    return rows.reshape(batch, -1, layout.heads, 3)[:, :length, :heads].astype(lr.dtype)


def to_lanes(layout, means):
    """[B, K, N] -> [B, N / P, K, 1, F], each head's number on all its hidden units."""
    batch, blocks, _ = means.shape
    x = _pad(means.astype(jnp.float32), 2, layout.heads).reshape(batch, blocks, -1, layout.pack, 1)
    x = jnp.broadcast_to(x, (*x.shape[:-1], layout.hidden)).reshape(batch, blocks, -1, 1, layout.wide[1])
    return jnp.swapaxes(x, 1, 2)


def from_lanes(layout, x, heads):
    """Sums [B, N / P, K, 1, F] over each head's hidden units, to [B, K, N]."""
    x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], layout.blocks, layout.heads, layout.hidden)
    return x.sum(-1)[..., :heads]


def to_fast(layout, w):
    """FastWeights [(B,) N, ...] -> [B or 1, N, 1, 3, D, H], float32 and padded."""
    x = jnp.stack([jnp.swapaxes(w.gate, -1, -2), jnp.swapaxes(w.up, -1, -2), w.down], axis=-3)
    x = x if x.ndim == 5 else x[None]
    x = _pad(_pad(_pad(x.astype(jnp.float32), 1, layout.heads), 3, layout.dim), 4, layout.hidden)
    return x[:, :, None]


def from_fast(x, shape):
    """The way back, to FastWeights with a leading B; `shape` is that of gate without it."""
    heads, hidden, dim = shape
    x = x[:, :heads, 0, :, :dim, :hidden]
    return FastWeights(jnp.swapaxes(x[:, :, 0], -1, -2), jnp.swapaxes(x[:, :, 1], -1, -2), x[:, :, 2])


def _pad(x, axis, size):
    """Appends zeros until `axis` has `size` entries."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

"""Sliding-window attention in plain JAX: online softmax over blocks, cost O(L * (window + sinks)).

Axes: B batch, L tokens padded to blocks, H key heads, G query heads per key head, D head dim, Q and K tokens of a query
and of a key block, R = G * Q rows of a query block.

For each block of queries a loop with traced bounds runs over the key blocks that its windows touch, and a second one
over the sink tokens before those. Documents are contiguous, so all that segment ids decide is `start`, the first token
of each query's document: query i sees key j iff start <= j <= i and (i - j < window or j - start < sinks).
The backward pass (as in FlashAttention-2) repeats the loops from the saved logsumexp.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import backends, dots
from pallas_kernels.swa import documents

MASKED = -1e30


class Blocks(NamedTuple):
    """Static sizes in tokens; `sink` is 0 when there are none."""

    query: int
    key: int
    sink: int


class Tile(NamedTuple):
    """One block of queries: their positions, the first token of each one's document, and the keys that the loops cover.

    Attributes:
      positions: int32 [Q].
      start: int32 [B, Q].
      low: the window loop covers keys from here.
      base: int32 [B], the sink loop covers keys from here.
      key_blocks: (first, last + 1) of the window loop.
      sink_blocks: number of the sink loop.
    """

    positions: jax.Array
    start: jax.Array
    low: jax.Array
    base: jax.Array
    key_blocks: tuple[jax.Array, jax.Array]
    sink_blocks: jax.Array


def choose_blocks(length: int, window, sinks) -> Blocks:
    """Returns block sizes for `length` tokens; window and sinks may be traced, and narrow ones are then assumed.

    Wide windows gain from large blocks, narrow ones lose more to the masked part (measured on a CPU).
    """
    largest = 256 if isinstance(window, int) and window >= 512 else 128
    count = -(-length // largest)
    size = -(-length // (8 * count)) * 8
    sink = 0 if isinstance(sinks, int) and sinks == 0 else min(size, 32)
    return Blocks(size, size, sink)


def forward(blocks, scale, q, k, v, window, sinks, segment_ids):
    """Returns out [B, L, Hq, D] and what `backward` needs."""
    batch, length, _, dim = q.shape
    queries, keys, values, starts = _arrange(blocks, q, k, v, segment_ids)

    def step(_, x):
        n, query, start = x  # query [B, H, R, D]
        tile = _tile(blocks, n, start, window, sinks)

        def attend(carry, key, value, mask):
            out, top, total = carry
            scores = _scores(query, key, mask, scale)
            new_top = jnp.maximum(top, scores.max(-1))
            weights = jnp.exp(scores - new_top[..., None])
            decay = jnp.exp(top - new_top)
            out = out * decay[..., None] + dots.einsum("bhrk,bhkd->bhrd", weights.astype(value.dtype), value)
            return out, new_top, total * decay + weights.sum(-1)

        zeros = jnp.zeros(query.shape[:-1], _accumulator(q.dtype))
        carry = (jnp.zeros(query.shape, zeros.dtype), zeros + MASKED, zeros)

        def window_step(m, carry):
            at, mask = _window_keys(blocks, tile, window, sinks, m)
            return attend(carry, _slice(keys, at, blocks.key), _slice(values, at, blocks.key), mask)

        def sink_step(m, carry):
            at, mask = _sink_keys(blocks, tile, sinks, keys.shape[2], m)
            return attend(carry, _slice(keys, at, blocks.sink), _slice(values, at, blocks.sink), mask)

        carry = jax.lax.fori_loop(*tile.key_blocks, window_step, carry)
        if blocks.sink:
            carry = jax.lax.fori_loop(0, tile.sink_blocks, sink_step, carry)
        out, top, total = carry
        return None, ((out / total[..., None]).astype(q.dtype), top + jnp.log(total))

    index = jnp.arange(queries.shape[0], dtype=jnp.int32)
    _, found = jax.lax.scan(step, None, (index, queries, starts))
    out, lse = (checkpoint_name(x, backends.ATTENTION) for x in found)
    out = _from_blocks(out, q.shape)
    if segment_ids is not None:
        out = jnp.where((segment_ids != 0)[:, :, None, None], out, 0)
    return out, (q, k, v, window, sinks, segment_ids, out, lse)


def backward(blocks, scale, residuals, d_out):
    """Returns the cotangents of q, k and v."""
    q, k, v, window, sinks, segment_ids, out, lse = residuals
    if segment_ids is not None:
        d_out = jnp.where((segment_ids != 0)[:, :, None, None], d_out, 0)
    queries, keys, values, starts = _arrange(blocks, q, k, v, segment_ids)
    dtype = _accumulator(q.dtype)
    delta = jnp.sum(out.astype(dtype) * d_out.astype(dtype), axis=-1, keepdims=True)
    delta = _to_blocks(blocks, delta, k.shape[2])[..., 0]
    d_outs = _to_blocks(blocks, d_out, k.shape[2])

    def step(carry, x):
        n, query, d_out, lse, delta, start = x
        tile = _tile(blocks, n, start, window, sinks)

        def attend(carry, at, size, mask):
            d_query, d_keys, d_values = carry
            key, value = _slice(keys, at, size), _slice(values, at, size)
            weights = jnp.exp(_scores(query, key, mask, scale) - lse[..., None])
            d_weights = dots.einsum("bhrd,bhkd->bhrk", d_out, value)
            d_scores = (weights * (d_weights - delta[..., None]) * scale).astype(q.dtype)
            d_query += dots.einsum("bhrk,bhkd->bhrd", d_scores, key)
            d_keys = _add(d_keys, at, dots.einsum("bhrk,bhrd->bhkd", d_scores, query))
            d_values = _add(d_values, at, dots.einsum("bhrk,bhrd->bhkd", weights.astype(q.dtype), d_out))
            return d_query, d_keys, d_values

        def window_step(m, carry):
            at, mask = _window_keys(blocks, tile, window, sinks, m)
            return attend(carry, at, blocks.key, mask)

        def sink_step(m, carry):
            at, mask = _sink_keys(blocks, tile, sinks, keys.shape[2], m)
            return attend(carry, at, blocks.sink, mask)

        carry = (jnp.zeros(query.shape, dtype), *carry)
        carry = jax.lax.fori_loop(*tile.key_blocks, window_step, carry)
        if blocks.sink:
            carry = jax.lax.fori_loop(0, tile.sink_blocks, sink_step, carry)
        d_query, d_keys, d_values = carry
        return (d_keys, d_values), d_query.astype(q.dtype)

    index = jnp.arange(queries.shape[0], dtype=jnp.int32)
    zeros = jnp.zeros(keys.shape, dtype)
    (d_keys, d_values), d_queries = jax.lax.scan(step, (zeros, zeros), (index, queries, d_outs, lse, delta, starts))
    d_k, d_v = (jnp.swapaxes(x, 1, 2)[:, : k.shape[1]].astype(k.dtype) for x in (d_keys, d_values))
    return _from_blocks(d_queries, q.shape), d_k, d_v


def _tile(blocks, n, start, window, sinks) -> Tile:
    """Returns what block n of queries attends to, from start [B, Q] and traced or fixed window and sinks."""
    begin = n * blocks.query
    base = start[:, 0]
    first = jnp.maximum(begin - window + 1, base.min()) // blocks.key
    last = (begin + blocks.query - 1) // blocks.key
    low = first * blocks.key
    reach = jnp.minimum(sinks, low - base.min())
    sink_blocks = (reach + blocks.sink - 1) // max(blocks.sink, 1)
    positions = begin + jnp.arange(blocks.query, dtype=jnp.int32)
    return Tile(positions, start, low, base, (first, last + 1), sink_blocks)


def _window_keys(blocks, tile, window, sinks, m):
    """Returns where key block m begins in every row, and its mask [B, Q, K]."""
    at = m * blocks.key
    i, j = tile.positions[None, :, None], at + jnp.arange(blocks.key, dtype=jnp.int32)[None, None, :]
    start = tile.start[:, :, None]
    return at, (start <= j) & (j <= i) & ((i - j < window) | (j - start < sinks))


def _sink_keys(blocks, tile, sinks, length, m):
    """Returns where sink block m begins in each row, int32 [B], and the mask [B, Q, K] of its keys below tile.low."""
    wanted = tile.base + m * blocks.sink
    at = jnp.minimum(wanted, length - blocks.sink)
    j = (at[:, None] + jnp.arange(blocks.sink, dtype=jnp.int32))[:, None, :]
    start = tile.start[:, :, None]
    return at, (wanted[:, None, None] <= j) & (j < tile.low) & (start <= j) & (j - start < sinks)


def _scores(query, key, mask, scale) -> jax.Array:
    """Returns scaled scores [B, H, R, K], MASKED where mask [B, Q, K] is false."""
    scores = dots.einsum("bhrd,bhkd->bhrk", query, key) * scale
    batch, heads, _, size = scores.shape
    grouped = scores.reshape(batch, heads, -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], grouped, MASKED).reshape(batch, heads, -1, size)


def _slice(x, at, size):
    """Returns tokens at .. at + size of x [B, H, L, D]; `at` is a scalar or one per row."""
    if at.ndim == 0:
        return jax.lax.dynamic_slice_in_dim(x, at, size, axis=2)
    return jax.vmap(lambda row, a: jax.lax.dynamic_slice_in_dim(row, a, size, axis=1))(x, at)


def _add(x, at, part):
    """Returns x [B, H, L, D] with `part` added at tokens at ..; `at` is a scalar or one per row."""
    part = _slice(x, at, part.shape[2]) + part
    if at.ndim == 0:
        return jax.lax.dynamic_update_slice_in_dim(x, part, at, axis=2)
    return jax.vmap(lambda row, p, a: jax.lax.dynamic_update_slice_in_dim(row, p, a, axis=1))(x, part, at)


def _arrange(blocks, q, k, v, segment_ids):
    """Returns queries [blocks, B, H, R, D], keys and values [B, H, L, D], starts [blocks, B, Q], all padded."""
    batch, length, heads = k.shape[:3]
    queries = _to_blocks(blocks, q, heads)
    padding = queries.shape[0] * blocks.query - length
    keys, values = (jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, padding), (0, 0)]) for x in (k, v))
    starts = jnp.zeros((batch, length), jnp.int32)
    if segment_ids is not None:
        starts, _ = documents.spans(segment_ids)
    starts = jnp.pad(starts, [(0, 0), (0, padding)], mode="edge")
    return queries, keys, values, jnp.moveaxis(starts.reshape(batch, -1, blocks.query), 1, 0)


def _to_blocks(blocks, x, heads):
    """[B, L, Hq, D] -> [blocks, B, H, R, D], rows in the order (G, Q); the tail is filled with zeros."""
    batch, length, _, dim = x.shape
    padding = -length % blocks.query
    x = jnp.pad(x, [(0, 0), (0, padding), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, blocks.query, heads, x.shape[2] // heads, dim)
    return x.transpose(1, 0, 3, 4, 2, 5).reshape(x.shape[1], batch, heads, -1, dim)


def _from_blocks(x, shape):
    """[blocks, B, H, R, D] -> [B, L, Hq, D] of `shape`."""
    batch, length, query_heads, dim = shape
    count, _, heads = x.shape[:3]
    x = x.reshape(count, batch, heads, query_heads // heads, -1, dim).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, -1, query_heads, dim)[:, :length]


def _accumulator(dtype):
    return jnp.promote_types(dtype, jnp.float32)

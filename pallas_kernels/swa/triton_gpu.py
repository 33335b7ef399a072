"""Sliding-window attention in Triton, for NVIDIA GPUs: online softmax over blocks, cost O(L * (window + sinks)).

Axes: B batch, L tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, M and N tokens of a query and of a key
block.

Documents are contiguous, so what a key is seen by is one range: query i sees key j iff j <= i < limit[j], where
limit[j] is the end of j's document for a sink token and else at most j + window. Windows, sinks and documents end in
`limit` and in the ranges of keys that each query block visits; both are small int32 arrays made outside the kernels.
The backward pass (as in FlashAttention-2) repeats the loops from the saved logsumexp: one kernel per query block for
d_q, one per key block for d_k and d_v. No sum depends on the order in which programs run. Scores are in base 2, whose
powers the hardware has.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels import backends, triton_call
from pallas_kernels.swa import documents


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the three kernels; rows are queries, columns are keys.

    Attributes:
      forward: of the output.
      query: of d_q.
      key: of d_k and d_v.
    """

    forward: triton_call.Tile
    query: triton_call.Tile
    key: triton_call.Tile


# For the "NVIDIA H100", by bits of the dtype and the largest head dim that they serve: rows, columns, warps, stages. A
# block can have 227 KB of shared memory there; these need less, and spill no registers.
H100 = {
    (16, 64): ((128, 64, 4, 3), (128, 64, 8, 3), (64, 128, 8, 3)),
    (16, 128): ((128, 64, 8, 3), (128, 64, 8, 2), (32, 128, 8, 2)),
    (16, 256): ((128, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 1)),
    (32, 64): ((64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1)),
    (32, 128): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    (32, 256): ((16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


def choose_blocks(dim: int, dtype) -> Tiles:
    """Returns the tiles for a head dim and a dtype; NotImplementedError where the kernels do not serve them."""
    return Tiles(*triton_call.choose(H100, dim, dtype))


def forward(blocks: Tiles, scale, q, k, v, window, sinks, segment_ids):
    """Returns out [B, L, Hq, D] and what `backward` needs; window and sinks are int32 scalars, traced or not."""
    batch, length, heads, dim = q.shape
    query = _pad(q)
    limit, spans = _plan(blocks.forward, q, window, sinks, segment_ids)
    found = _call(
        _forward_kernel,
        (query, _pad(k), _pad(v), limit, spans),
        [jax.ShapeDtypeStruct(query.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)],
        (batch * heads, spans.shape[1]),
        blocks.forward,
        scale,
    )
    out, lse = (checkpoint_name(x, backends.ATTENTION) for x in found)
    out = _blank(out[..., :dim], segment_ids)
    return out, (q, k, v, window, sinks, segment_ids, out, lse)


def backward(blocks: Tiles, scale, residuals, d_out):
    """Returns the cotangents of q, k and v."""
    q, k, v, window, sinks, segment_ids, out, lse = residuals
    d_out = _blank(d_out.astype(q.dtype), segment_ids)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, Hq, L]
    query, key, value, d_out = (_pad(x) for x in (q, k, v, d_out))
    like_query, like_key = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))

    limit, spans = _plan(blocks.query, q, window, sinks, segment_ids)
    arrays = (query, key, value, d_out, lse, delta, limit)
    grid = (q.shape[0] * q.shape[2], spans.shape[1])
    (d_query,) = _call(_query_kernel, (*arrays, spans), [like_query], grid, blocks.query, scale)
    grid = (q.shape[0] * k.shape[2], triton.cdiv(q.shape[1], blocks.key.columns))
    d_key, d_value = _call(_key_kernel, arrays, [like_key, like_key], grid, blocks.key, scale)
    return tuple(x[..., : q.shape[-1]] for x in (d_query, d_key, d_value))


def _call(kernel, arrays, out, grid, tile, scale):
    """Runs a kernel of arrays of which the first two are queries [B, L, Hq, D] and keys [B, L, Hkv, D]."""
    query, key = arrays[:2]
    return triton_call.call(
        kernel,
        *arrays,
        out=out,
        grid=grid,
        tile=tile,
        SCALE=scale * math.log2(math.e),
        LENGTH=query.shape[1],
        HEADS=query.shape[2],
        KEY_HEADS=key.shape[2],
        DIM=query.shape[3],
        M=tile.rows,
        N=tile.columns,
        PRECISION="ieee" if query.dtype == jnp.float32 else "tf32",
    )


def _pad(x):
    """Fills D up with zeros, which change no score."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, triton_call.padded(x.shape[-1]) - x.shape[-1])])


def _blank(x, segment_ids):
    """Zeros on padding tokens."""
    return x if segment_ids is None else jnp.where((segment_ids != 0)[:, :, None, None], x, 0)


def _plan(tile, q, window, sinks, segment_ids) -> tuple[jax.Array, jax.Array]:
    """Returns limit [B, L] and spans [B, blocks of queries, 4, 2], int32.

    The four are ranges of keys, from and to: sinks of the first query's document that lie before its window; of the
    window, keys before those that all of the block's queries see, these, which need no mask, and those after them.
    """
    batch, length = q.shape[:2]
    index = jnp.arange(length, dtype=jnp.int32)
    start, end = documents.spans(jnp.ones((1, length), jnp.int32) if segment_ids is None else segment_ids)
    limit = jnp.where(index - start < sinks, end, jnp.minimum(end, index + window))

    begin = jnp.arange(0, length, tile.rows, dtype=jnp.int32)
    stop = jnp.minimum(begin + tile.rows, length)
    base = start[:, begin]
    low = jnp.maximum(begin - window + 1, base) // tile.columns * tile.columns
    sink_stop = jnp.minimum(base + sinks, low)
    whole = -(-jnp.maximum(jnp.maximum(stop - window, start[:, stop - 1]), low) // tile.columns) * tile.columns
    whole_stop = (begin + 1) // tile.columns * tile.columns
    whole, whole_stop = (jnp.where(whole < whole_stop, x, low) for x in (whole, whole_stop))
    edges = jnp.broadcast_arrays(base, sink_stop, low, whole, whole, whole_stop, whole_stop, stop)
    spans = jnp.stack(edges, axis=-1).reshape(len(base), -1, 4, 2)
    limit, spans = (jnp.broadcast_to(x, (batch, *x.shape[1:])).astype(jnp.int32) for x in (limit, spans))
    return limit, spans


@triton.jit
def _forward_kernel(
    q,
    k,
    v,
    limit,
    spans,
    out,
    lse,
    SCALE: tl.constexpr,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: grid (B * Hq, blocks), the last blocks first."""
    row, m = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (row // HEADS).to(tl.int64), row % HEADS
    i = m * M + tl.arange(0, M)
    here = (b * LENGTH * HEADS + h) * DIM
    there = (b * LENGTH * KEY_HEADS + h // (HEADS // KEY_HEADS)) * DIM
    query = _tokens(q + here, i, LENGTH, HEADS * DIM, DIM)
    spans += (b * tl.num_programs(1) + m) * 8

    o = tl.zeros([M, DIM], tl.float32)
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    for part in tl.static_range(4):
        stop = tl.load(spans + 2 * part + 1)
        for at in range(tl.load(spans + 2 * part), stop, N):
            j = at + tl.arange(0, N)
            key = _tokens(k + there, j, stop, KEY_HEADS * DIM, DIM)
            scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
            if part != 2:  # where every query sees every key
                scores = tl.where(_visible(limit + b * LENGTH, i, j, stop), scores, -1e30)
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            decay = tl.exp2(top - new_top)
            value = _tokens(v + there, j, stop, KEY_HEADS * DIM, DIM)
            o = tl.dot(weights.to(value.dtype), value, o * decay[:, None], input_precision=PRECISION)
            total = total * decay + tl.sum(weights, 1)
            top = new_top

    _store_tokens(out + here, o / total[:, None], i, LENGTH, HEADS * DIM, DIM)
    tl.store(lse + row.to(tl.int64) * LENGTH + i, top + tl.log2(total), mask=i < LENGTH)


@triton.jit
def _query_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    limit,
    spans,
    d_q,
    SCALE: tl.constexpr,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q of one block of queries of one head: grid and loops as in the forward pass."""
    row, m = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (row // HEADS).to(tl.int64), row % HEADS
    i = m * M + tl.arange(0, M)
    here = (b * LENGTH * HEADS + h) * DIM
    there = (b * LENGTH * KEY_HEADS + h // (HEADS // KEY_HEADS)) * DIM
    query = _tokens(q + here, i, LENGTH, HEADS * DIM, DIM)
    d_o = _tokens(d_out + here, i, LENGTH, HEADS * DIM, DIM)
    norm = tl.load(lse + row.to(tl.int64) * LENGTH + i, mask=i < LENGTH, other=0.0)
    share = tl.load(delta + row.to(tl.int64) * LENGTH + i, mask=i < LENGTH, other=0.0)
    spans += (b * tl.num_programs(1) + m) * 8

    d = tl.zeros([M, DIM], tl.float32)
    for part in tl.static_range(4):
        stop = tl.load(spans + 2 * part + 1)
        for at in range(tl.load(spans + 2 * part), stop, N):
            j = at + tl.arange(0, N)
            key = _tokens(k + there, j, stop, KEY_HEADS * DIM, DIM)
            value = _tokens(v + there, j, stop, KEY_HEADS * DIM, DIM)
            weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE - norm[:, None])
            if part != 2:
                weights = tl.where(_visible(limit + b * LENGTH, i, j, stop), weights, 0.0)
            d_weights = tl.dot(d_o, tl.trans(value), input_precision=PRECISION)
            d_scores = weights * (d_weights - share[:, None])
            d = tl.dot(d_scores.to(key.dtype), key, d, input_precision=PRECISION)
    # SCALE is in base 2, the gradient of natural scores.
    _store_tokens(d_q + here, d * (SCALE * 0.6931471805599453), i, LENGTH, HEADS * DIM, DIM)


@triton.jit
def _key_kernel(
    q,
    k,
    v,
    d_out,
    lse,
    delta,
    limit,
    d_k,
    d_v,
    SCALE: tl.constexpr,
    LENGTH: tl.constexpr,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k and d_v of one block of keys of one head: grid (B * Hkv, blocks); sinks, in first blocks, take longest."""
    row, n = tl.program_id(0), tl.program_id(1)
    b, h = (row // KEY_HEADS).to(tl.int64), row % KEY_HEADS
    j = n * N + tl.arange(0, N)
    here = (b * LENGTH * KEY_HEADS + h) * DIM
    key = _tokens(k + here, j, LENGTH, KEY_HEADS * DIM, DIM)
    value = _tokens(v + here, j, LENGTH, KEY_HEADS * DIM, DIM)
    last = tl.load(limit + b * LENGTH + j, mask=j < LENGTH, other=0)  # [N]
    stop = tl.max(last, 0)
    whole = tl.minimum((n * N + N - 1 + M - 1) // M * M, stop)  # from here to whole_stop no mask is needed
    whole_stop = tl.maximum(tl.min(last, 0) // M * M, whole)
    edges = (n * N // M * M, whole, whole_stop, stop)

    dk, dv = tl.zeros([N, DIM], tl.float32), tl.zeros([N, DIM], tl.float32)
    for g in range(HEADS // KEY_HEADS):
        head = b * HEADS + h * (HEADS // KEY_HEADS) + g
        token = (b * LENGTH * HEADS + h * (HEADS // KEY_HEADS) + g) * DIM
        for part in tl.static_range(3):
            for at in range(edges[part], edges[part + 1], M):
                i = at + tl.arange(0, M)
                query = _tokens(q + token, i, edges[part + 1], HEADS * DIM, DIM)
                d_o = _tokens(d_out + token, i, edges[part + 1], HEADS * DIM, DIM)
                norm = tl.load(lse + head * LENGTH + i, mask=i < edges[part + 1], other=0.0)
                share = tl.load(delta + head * LENGTH + i, mask=i < edges[part + 1], other=0.0)
                # Transposed, [N, M], so that what is summed into dk and dv needs no transposing.
                weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * SCALE - norm[None, :])
                if part != 1:
                    weights = tl.where((j[:, None] <= i[None, :]) & (i[None, :] < last[:, None]), weights, 0.0)
                dv = tl.dot(weights.to(d_o.dtype), d_o, dv, input_precision=PRECISION)
                d_weights = tl.dot(value, tl.trans(d_o), input_precision=PRECISION)
                d_scores = weights * (d_weights - share[None, :])
                dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision=PRECISION)
    _store_tokens(d_k + here, dk * (SCALE * 0.6931471805599453), j, LENGTH, KEY_HEADS * DIM, DIM)
    _store_tokens(d_v + here, dv, j, LENGTH, KEY_HEADS * DIM, DIM)


@triton.jit
def _visible(limit, i, j, stop):
    """Mask [M, N]: query i sees key j."""
    last = tl.load(limit + j, mask=j < stop, other=0)
    return (j[None, :] <= i[:, None]) & (i[:, None] < last[None, :])


@triton.jit
def _tokens(x, at, stop, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """Loads tokens `at` [R] of one head, [R, D]; zeros from `stop` on."""
    d = tl.arange(0, DIM)
    return tl.load(x + at.to(tl.int64)[:, None] * STRIDE + d[None, :], mask=(at < stop)[:, None], other=0.0)


@triton.jit
def _store_tokens(x, values, at, stop, STRIDE: tl.constexpr, DIM: tl.constexpr):
    """Stores what `_tokens` loads."""
    d = tl.arange(0, DIM)
    values = values.to(x.dtype.element_ty)
    tl.store(x + at.to(tl.int64)[:, None] * STRIDE + d[None, :], values, mask=(at < stop)[:, None])

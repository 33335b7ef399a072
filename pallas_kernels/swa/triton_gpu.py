"""Sliding-window attention in Triton, for NVIDIA GPUs: online softmax over blocks, cost O(L * (window + sinks)).

Axes: B batch, L tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, M and N tokens of a query and of a key
block.

Documents are contiguous, so what a key is seen by is one range: query i sees key j iff j <= i < limit[j], where
limit[j] is the end of j's document for a sink token and else at most j + window. Windows, sinks and documents end in
`limit` and in the ranges of keys that each query block visits; both are small int32 arrays made outside the kernels.
The backward pass (as in FlashAttention-2) repeats the loops from the saved logsumexp: one kernel per query block for
d_q, one per key block for d_k and d_v. No sum depends on the order in which programs run.
"""

import dataclasses

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
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
    tile = blocks.forward
    limit, spans = _plan(tile, length, window, sinks, segment_ids)
    query = _pad(q)
    shapes = [jax.ShapeDtypeStruct(query.shape, q.dtype), jax.ShapeDtypeStruct((batch, heads, length), jnp.float32)]
    grid = (batch * heads, spans.shape[1])
    constants = _constants(tile, scale, query, k, segment_ids)
    out, lse = triton_call.call(
        _forward_kernel, query, _pad(k), _pad(v), limit, spans, out=shapes, grid=grid, tile=tile, **constants
    )
    out = _blank(out[..., :dim], segment_ids)
    return out, (q, k, v, window, sinks, segment_ids, out, lse)


def backward(blocks: Tiles, scale, residuals, d_out):
    """Returns the cotangents of q, k and v."""
    q, k, v, window, sinks, segment_ids, out, lse = residuals
    d_out = _blank(d_out.astype(q.dtype), segment_ids)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1).swapaxes(1, 2)  # [B, Hq, L]
    query, key, value, d_out = (_pad(x) for x in (q, k, v, d_out))
    like_query, like_key = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key))

    limit, spans = _plan(blocks.query, q.shape[1], window, sinks, segment_ids)
    arrays = (query, key, value, d_out, lse, delta, limit)
    (d_query,) = triton_call.call(
        _query_kernel,
        *arrays,
        spans,
        out=[like_query],
        grid=(q.shape[0] * q.shape[2], spans.shape[1]),
        tile=blocks.query,
        **_constants(blocks.query, scale, query, k, segment_ids),
    )
    d_key, d_value = triton_call.call(
        _key_kernel,
        *arrays,
        out=[like_key, like_key],
        grid=(q.shape[0] * k.shape[2], triton.cdiv(q.shape[1], blocks.key.columns)),
        tile=blocks.key,
        **_constants(blocks.key, scale, query, k, segment_ids),
    )
    return tuple(x[..., : q.shape[-1]] for x in (d_query, d_key, d_value))


def _constants(tile, scale, query, k, segment_ids) -> dict:
    exact = jnp.finfo(query.dtype).bits == 32
    return {
        "SCALE": scale,
        "LENGTH": query.shape[1],
        "HEADS": query.shape[2],
        "KEY_HEADS": k.shape[2],
        "DIM": query.shape[3],
        "M": tile.rows,
        "N": tile.columns,
        "PACKED": segment_ids is not None,
        "PRECISION": "ieee" if exact else "tf32",
    }


def _pad(x):
    """Fills D up with zeros, which change no score."""
    return jnp.pad(x, [(0, 0)] * 3 + [(0, triton_call.padded(x.shape[-1]) - x.shape[-1])])


def _blank(x, segment_ids):
    """Zeros on padding tokens."""
    return x if segment_ids is None else jnp.where((segment_ids != 0)[:, :, None, None], x, 0)


def _plan(tile, length, window, sinks, segment_ids) -> tuple[jax.Array, jax.Array]:
    """Returns limit [B, L] and spans [B, blocks of queries, 5], int32, with B = 1 where all rows are alike.

    The five are keys: where the sinks of the first query's document begin and stop, where the window's blocks begin
    (not below the stop), and which of those need no mask, from and to. The last block stops with its last query.
    """
    index = jnp.arange(length, dtype=jnp.int32)
    start, end = documents.spans(jnp.ones((1, length), jnp.int32) if segment_ids is None else segment_ids)
    limit = jnp.where(index - start < sinks, end, jnp.minimum(end, index + window))

    begin = jnp.arange(0, length, tile.rows, dtype=jnp.int32)
    last = jnp.minimum(begin + tile.rows, length) - 1
    base = start[:, begin]
    low = jnp.maximum(begin - window + 1, base) // tile.columns * tile.columns
    sink_stop = jnp.minimum(base + sinks, low)
    whole = -(-jnp.maximum(jnp.maximum(last + 1 - window, start[:, last]), low) // tile.columns) * tile.columns
    whole_stop = jnp.broadcast_to((begin + 1) // tile.columns * tile.columns, whole.shape)
    whole, whole_stop = (jnp.where(whole < whole_stop, x, low) for x in (whole, whole_stop))
    return limit.astype(jnp.int32), jnp.stack([base, sink_stop, low, whole, whole_stop], axis=-1).astype(jnp.int32)


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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of queries of one head: grid (B * Hq, blocks), the last blocks first."""
    row, m = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (row // HEADS).to(tl.int64), row % HEADS
    i = m * M + tl.arange(0, M)
    query = _tokens(q + (b * LENGTH * HEADS + h) * DIM, i, LENGTH, HEADS * DIM, DIM)
    k += (b * LENGTH * KEY_HEADS + h // (HEADS // KEY_HEADS)) * DIM
    v += (b * LENGTH * KEY_HEADS + h // (HEADS // KEY_HEADS)) * DIM
    limit += b * PACKED * LENGTH
    spans += (b * PACKED * tl.num_programs(1) + m) * 5
    sink, sink_stop, low, whole, whole_stop = _load_spans(spans)

    o = tl.zeros([M, DIM], tl.float32)
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    S: tl.constexpr = SCALE * 1.4426950408889634  # powers of two are what the hardware has
    T: tl.constexpr = KEY_HEADS * DIM
    o, top, total = _attend(o, top, total, query, k, v, limit, i, sink, sink_stop, S, T, DIM, N, True, PRECISION)
    o, top, total = _attend(o, top, total, query, k, v, limit, i, low, whole, S, T, DIM, N, True, PRECISION)
    o, top, total = _attend(o, top, total, query, k, v, limit, i, whole, whole_stop, S, T, DIM, N, False, PRECISION)
    stop = tl.minimum(m * M + M, LENGTH)
    o, top, total = _attend(o, top, total, query, k, v, limit, i, whole_stop, stop, S, T, DIM, N, True, PRECISION)

    _store_tokens(out + (b * LENGTH * HEADS + h) * DIM, o / total[:, None], i, LENGTH, HEADS * DIM, DIM)
    tl.store(lse + row.to(tl.int64) * LENGTH + i, top + tl.log2(total), mask=i < LENGTH)


@triton.jit
def _attend(
    o,
    top,
    total,
    query,
    k,
    v,
    limit,
    i,
    begin,
    stop,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds keys begin .. stop to the online softmax (o [M, D], top [M], total [M])."""
    for at in range(begin, stop, N):
        j = at + tl.arange(0, N)
        key = _tokens(k, j, stop, STRIDE, DIM)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        if MASKED:
            scores = tl.where(_visible(limit, i, j, stop), scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        decay = tl.exp2(top - new_top)
        value = _tokens(v, j, stop, STRIDE, DIM)
        o = tl.dot(weights.to(value.dtype), value, o * decay[:, None], input_precision=PRECISION)
        total = total * decay + tl.sum(weights, 1)
        top = new_top
    return o, top, total


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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_q of one block of queries of one head: grid and loops as in the forward pass."""
    row, m = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    b, h = (row // HEADS).to(tl.int64), row % HEADS
    i = m * M + tl.arange(0, M)
    here = (b * LENGTH * HEADS + h) * DIM
    query = _tokens(q + here, i, LENGTH, HEADS * DIM, DIM)
    d_o = _tokens(d_out + here, i, LENGTH, HEADS * DIM, DIM)
    norm = tl.load(lse + row.to(tl.int64) * LENGTH + i, mask=i < LENGTH, other=0.0)
    share = tl.load(delta + row.to(tl.int64) * LENGTH + i, mask=i < LENGTH, other=0.0)
    k += (b * LENGTH * KEY_HEADS + h // (HEADS // KEY_HEADS)) * DIM
    v += (b * LENGTH * KEY_HEADS + h // (HEADS // KEY_HEADS)) * DIM
    limit += b * PACKED * LENGTH
    spans += (b * PACKED * tl.num_programs(1) + m) * 5
    sink, sink_stop, low, whole, whole_stop = _load_spans(spans)

    d = tl.zeros([M, DIM], tl.float32)
    S: tl.constexpr = SCALE * 1.4426950408889634
    T: tl.constexpr = KEY_HEADS * DIM
    d = _add_query(d, query, d_o, norm, share, k, v, limit, i, sink, sink_stop, S, T, DIM, N, True, PRECISION)
    d = _add_query(d, query, d_o, norm, share, k, v, limit, i, low, whole, S, T, DIM, N, True, PRECISION)
    d = _add_query(d, query, d_o, norm, share, k, v, limit, i, whole, whole_stop, S, T, DIM, N, False, PRECISION)
    stop = tl.minimum(m * M + M, LENGTH)
    d = _add_query(d, query, d_o, norm, share, k, v, limit, i, whole_stop, stop, S, T, DIM, N, True, PRECISION)
    _store_tokens(d_q + here, d * SCALE, i, LENGTH, HEADS * DIM, DIM)


@triton.jit
def _add_query(
    d,
    query,
    d_o,
    norm,
    share,
    k,
    v,
    limit,
    i,
    begin,
    stop,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    N: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what keys begin .. stop give to d [M, D]."""
    for at in range(begin, stop, N):
        j = at + tl.arange(0, N)
        key = _tokens(k, j, stop, STRIDE, DIM)
        value = _tokens(v, j, stop, STRIDE, DIM)
        weights = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE - norm[:, None])
        if MASKED:
            weights = tl.where(_visible(limit, i, j, stop), weights, 0.0)
        d_weights = tl.dot(d_o, tl.trans(value), input_precision=PRECISION)
        d_scores = weights * (d_weights - share[:, None])
        d = tl.dot(d_scores.to(key.dtype), key, d, input_precision=PRECISION)
    return d


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
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """d_k and d_v of one block of keys of one head: grid (B * Hkv, blocks); sinks, in first blocks, take longest."""
    row, n = tl.program_id(0), tl.program_id(1)
    b, h = (row // KEY_HEADS).to(tl.int64), row % KEY_HEADS
    j = n * N + tl.arange(0, N)
    here = (b * LENGTH * KEY_HEADS + h) * DIM
    key = _tokens(k + here, j, LENGTH, KEY_HEADS * DIM, DIM)
    value = _tokens(v + here, j, LENGTH, KEY_HEADS * DIM, DIM)
    last = tl.load(limit + b * PACKED * LENGTH + j, mask=j < LENGTH, other=0)  # [N]
    stop = tl.max(last, 0)
    whole = tl.minimum((n * N + N - 1 + M - 1) // M * M, stop)  # from here to whole_stop no mask is needed
    whole_stop = tl.maximum(tl.min(last, 0) // M * M, whole)

    S: tl.constexpr = SCALE * 1.4426950408889634
    T: tl.constexpr = HEADS * DIM
    dk, dv = tl.zeros([N, DIM], tl.float32), tl.zeros([N, DIM], tl.float32)
    for g in range(HEADS // KEY_HEADS):
        head = b * HEADS + h * (HEADS // KEY_HEADS) + g
        token = (b * LENGTH * HEADS + h * (HEADS // KEY_HEADS) + g) * DIM
        Q, D, E, C = q + token, d_out + token, lse + head * LENGTH, delta + head * LENGTH
        dk, dv = _add_key(dk, dv, key, value, Q, D, E, C, last, j, n * N // M * M, whole, S, T, DIM, M, True, PRECISION)
        dk, dv = _add_key(dk, dv, key, value, Q, D, E, C, last, j, whole, whole_stop, S, T, DIM, M, False, PRECISION)
        dk, dv = _add_key(dk, dv, key, value, Q, D, E, C, last, j, whole_stop, stop, S, T, DIM, M, True, PRECISION)
    _store_tokens(d_k + here, dk * SCALE, j, LENGTH, KEY_HEADS * DIM, DIM)
    _store_tokens(d_v + here, dv, j, LENGTH, KEY_HEADS * DIM, DIM)


@triton.jit
def _add_key(
    dk,
    dv,
    key,
    value,
    q,
    d_out,
    lse,
    delta,
    last,
    j,
    begin,
    stop,
    SCALE: tl.constexpr,
    STRIDE: tl.constexpr,
    DIM: tl.constexpr,
    M: tl.constexpr,
    MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds what queries begin .. stop give to dk, dv [N, D]; scores are transposed here, [N, M]."""
    for at in range(begin, stop, M):
        i = at + tl.arange(0, M)
        query = _tokens(q, i, stop, STRIDE, DIM)
        d_o = _tokens(d_out, i, stop, STRIDE, DIM)
        norm = tl.load(lse + i, mask=i < stop, other=0.0)
        share = tl.load(delta + i, mask=i < stop, other=0.0)
        weights = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) * SCALE - norm[None, :])
        if MASKED:
            weights = tl.where((j[:, None] <= i[None, :]) & (i[None, :] < last[:, None]), weights, 0.0)
        dv = tl.dot(weights.to(d_o.dtype), d_o, dv, input_precision=PRECISION)
        d_weights = tl.dot(value, tl.trans(d_o), input_precision=PRECISION)
        d_scores = weights * (d_weights - share[None, :])
        dk = tl.dot(d_scores.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _visible(limit, i, j, stop):
    """Mask [M, N]: query i sees key j."""
    last = tl.load(limit + j, mask=j < stop, other=0)
    return (j[None, :] <= i[:, None]) & (i[:, None] < last[None, :])


@triton.jit
def _load_spans(spans):
    return tl.load(spans), tl.load(spans + 1), tl.load(spans + 2), tl.load(spans + 3), tl.load(spans + 4)


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

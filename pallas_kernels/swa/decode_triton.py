"""Attention of one new token a row to a ring cache in Triton, for NVIDIA GPUs.

Axes: Y layers, B batch, Hkv key heads, G query heads per key head, D head dim, T slots, P parts of a cache,
N slots of a block.

A program reads one part of one key head's cache for its G queries. A small batch has fewer heads than the GPU has
processors, so caches are then cut into parts, which are weighed against each other, and against the new token itself,
in plain JAX. A slot that is out of sight is not read. Scores are in base 2.
"""

import math

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call

PROGRAMS = 264  # to keep an H100's 132 processors busy
MOST_PARTS = 64
# For the "NVIDIA H100", by bits of the dtype and the largest head dim that they serve: rows, columns, warps, stages.
H100 = {
    (16, 64): ((16, 128, 4, 3),),
    (16, 128): ((16, 64, 4, 3),),
    (16, 256): ((16, 32, 4, 3),),
    (32, 64): ((16, 32, 4, 2),),
    (32, 128): ((16, 32, 4, 2),),
    (32, 256): ((16, 16, 4, 2),),
}


def parts_of(heads: int, count: int, block: int) -> int:
    """Returns P for B * Hkv heads of T slots, of which a part has at least two blocks."""
    return max(1, min(-(-PROGRAMS // heads), count // (2 * block), MOST_PARTS))


def decode(sink_slots, scale, q, k, v, keys, values, position, window, sinks, layer) -> jax.Array:
    """See `pallas_kernels.swa_decode`."""
    batch, heads, dim = q.shape
    count, kv_heads = keys.shape[2:4]
    group = heads // kv_heads
    (tile,) = triton_call.choose(H100, dim, q.dtype)
    parts = parts_of(batch * kv_heads, count, tile.columns)
    part = -(-count // (parts * tile.columns)) * tile.columns
    shapes = [jax.ShapeDtypeStruct((batch, kv_heads, parts, group, n), jnp.float32) for n in (dim, 2)]
    out, sums = triton_call.call(
        _kernel,
        q,
        keys,
        values,
        position,
        jnp.stack([window, sinks, layer]),
        out=shapes,
        grid=(batch * kv_heads, parts),
        tile=tile,
        SCALE=scale * math.log2(math.e),
        BATCH=batch,
        COUNT=count,
        SINK_SLOTS=sink_slots,
        HEADS=kv_heads,
        GROUP=group,
        DIM=dim,
        WIDE=triton_call.padded(dim),
        M=max(16, triton_call.padded(group)),
        N=tile.columns,
        PART=part,
        PRECISION="ieee" if q.dtype == jnp.float32 else "tf32",
    )
    return _combine(scale, q, k, v, out, sums)


def _combine(scale, q, k, v, out, sums) -> jax.Array:
    """Returns [B, Hq, D] from weighted values [B, Hkv, P, G, D], maxima and sums [..., 2], and the token itself."""
    query, key, value = (x.astype(jnp.float32) for x in (q.reshape(out[:, :, 0].shape), k, v))
    own = jnp.sum(query * key[:, :, None], axis=-1) * (scale * math.log2(math.e))  # [B, Hkv, G]
    tops, totals = sums[..., 0], sums[..., 1]  # [B, Hkv, P, G]
    top = jnp.maximum(tops.max(2), own)
    share, own = jnp.exp2(tops - top[:, :, None]), jnp.exp2(own - top)
    out = jnp.sum(out * share[..., None], axis=2) + own[..., None] * value[:, :, None]
    total = jnp.sum(totals * share, axis=2) + own
    return (out / total[..., None]).reshape(q.shape).astype(q.dtype)


@triton.jit
def _kernel(
    q,
    keys,
    values,
    position,
    limits,
    out,
    sums,
    SCALE: tl.constexpr,
    BATCH: tl.constexpr,
    COUNT: tl.constexpr,
    SINK_SLOTS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PART: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One part of one key head: grid (B * Hkv, P)."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = row // HEADS, row % HEADS
    g, d = tl.arange(0, M), tl.arange(0, WIDE)
    at = (row * GROUP + g[:, None]) * DIM + d[None, :]
    filled = (g < GROUP)[:, None] & (d < DIM)[None, :]
    query = tl.load(q + at, mask=filled, other=0.0)
    here, window, sinks = tl.load(position + b), tl.load(limits), tl.load(limits + 1)
    cache = tl.load(limits + 2).to(tl.int64) * BATCH + b  # which of all layers' and rows'
    RING: tl.constexpr = COUNT - SINK_SLOTS
    newest = SINK_SLOTS + tl.maximum(here - 1 - SINK_SLOTS, 0) % RING

    o = tl.zeros([M, WIDE], tl.float32)
    top = tl.full([M], -1e30, tl.float32)
    total = tl.zeros([M], tl.float32)
    stop = tl.minimum(tl.minimum(part * PART + PART, COUNT), here)  # the first `position` slots are filled
    for first in range(part * PART, stop, N):
        slot = first + tl.arange(0, N)
        # `ring.held` and `ring.in_sight`, which Triton cannot call.
        token = here - 1 - newest + slot - tl.where(slot > newest, RING, 0)
        token = tl.where(slot < SINK_SLOTS, slot, token)
        seen = (slot < stop) & ((here - token < window) | (token < sinks))
        read = (cache * COUNT + slot)[:, None] * (HEADS * DIM) + h * DIM + d[None, :]
        mask = seen[:, None] & (d < DIM)[None, :]
        key = tl.load(keys + read, mask=mask, other=0.0)
        value = tl.load(values + read, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION) * SCALE
        scores = tl.where(seen[None, :], scores, -1e30)
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.where(seen[None, :], tl.exp2(scores - new_top[:, None]), 0.0)
        decay = tl.exp2(top - new_top)
        o = tl.dot(weights.to(value.dtype), value, o * decay[:, None], input_precision=PRECISION)
        total = total * decay + tl.sum(weights, 1)
        top = new_top

    at = (row * tl.num_programs(1) + part) * GROUP + g
    tl.store(out + at[:, None] * DIM + d[None, :], o, mask=filled)
    tl.store(sums + at * 2, top, mask=g < GROUP)
    tl.store(sums + at * 2 + 1, total, mask=g < GROUP)

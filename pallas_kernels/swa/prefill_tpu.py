"""Attention of a piece of a prompt to a ring cache and to itself, for TPUs: a flash attention over slots.

Axes: B batch, L new tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, T slots of the cache, K keys of a
block, M blocks of the cache, Q tokens of a query block, N number of query blocks, R = G Q columns of a query block.

Blocks of the cache come first and then those of the new tokens; which token a key is follows from its slot, so that
masks need no arrays. Tiles are transposed, keys in rows and queries in columns, and scores are in base 2, as in
`pallas_tpu`. A block of the cache that no query sees is neither read nor computed.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dots
from pallas_kernels.swa import ring

MASKED = -1e30
KEYS = 512  # of a block
COLUMNS = 1024  # R at most, but for one token of many heads
VMEM_BYTES = 48 * 2**20


def why_not(q) -> str | None:
    """Returns why q [B, L, Hq, D] cannot be served, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, and q is {q.dtype}"
    return None


def attend(sink_slots, scale, q, k, v, keys, values, position, lengths, window, sinks) -> jax.Array:
    """See `prefill.attend`."""
    batch, length, heads, dim = q.shape
    count, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    size, new_size = min(KEYS, -(-count // 8) * 8), min(KEYS, -(-length // 8) * 8)
    tokens = min(max(COLUMNS // group // 128 * 128, 128), -(-length // 128) * 128)
    queries = _columns((q.astype(jnp.float32) * (scale * math.log2(math.e))).astype(q.dtype), kv_heads, tokens)
    cached = [jnp.swapaxes(x, 1, 2) for x in (keys, values)]
    new = [jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, -length % new_size), (0, 0)]) for x in (k, v)]
    blocks = _blocks(size, sink_slots, count, position, window, sinks)
    most = blocks.shape[1]

    def of_queries(b, h, n, t, *_):
        return b, h, n, 0, 0

    def of_cache(b, h, n, t, blocks, *_):
        return b, h, blocks[b, jnp.minimum(t, most - 1)], 0

    def of_new(b, h, n, t, *_):
        return b, h, jnp.maximum(t - most, 0), 0

    column = pl.BlockSpec((None, None, None, dim, group * tokens), of_queries)
    out = pl.pallas_call(
        functools.partial(_kernel, sink_slots, count, most, group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(*queries.shape[:3], most + new[0].shape[2] // new_size),
            in_specs=[
                column,
                *[pl.BlockSpec((None, None, size, dim), of_cache)] * 2,
                *[pl.BlockSpec((None, None, new_size, dim), of_new)] * 2,
            ],
            out_specs=column,
            scratch_shapes=[pltpu.VMEM((n, group * tokens), jnp.float32) for n in (dim, 1, 1)],
        ),
        out_shape=jax.ShapeDtypeStruct(queries.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="swa_prefill",
    )(blocks, position, lengths, window[None], sinks[None], queries, *cached, *new)
    out = out.reshape(*out.shape[:4], group, tokens).transpose(0, 2, 5, 1, 4, 3)  # [B, N, Q, Hkv, G, D]
    return out.reshape(batch, -1, heads, dim)[:, :length]


def _columns(x, kv_heads, tokens):
    """[B, L, Hq, D] -> [B, Hkv, N, D, R], columns in the order (G, Q); the tail is filled with zeros."""
    batch, length, heads, dim = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % tokens), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, tokens, kv_heads, heads // kv_heads, dim)
    return x.transpose(0, 3, 1, 5, 4, 2).reshape(batch, kv_heads, x.shape[1], dim, -1)


def _blocks(size, sink_slots, count, position, window, sinks):
    """Returns for each row and block of the cache the last up to it that a query sees, int32 [B, M]; 0 where none is.

    What the first of the new tokens does not see of the cache, no one does.
    """
    n = np.arange(-(-count // size), dtype=np.int32)
    slot = n[:, None] * size + np.arange(size, dtype=np.int32)  # [M, K], from T on there is none
    seen = ring.in_sight(position[:, None, None], slot, sink_slots, count, window, sinks) & (slot < count)
    return jax.lax.cummax(jnp.where(seen.any(-1), n, 0), axis=1)


def _kernel(
    sink_slots,
    count,
    most,
    group,
    blocks,
    position,
    lengths,
    window,
    sinks,
    q,
    keys,
    values,
    new_keys,
    new_values,
    out,
    *scratch,
):
    """q, out [D, R]; keys, values [K, D]; new_keys, new_values [K', D]; scratch as in `_add`."""
    b, n, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    tokens = q.shape[1] // group
    here, limits = position[b], (window[0], sinks[0])
    query = here + n * tokens + jax.lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    accumulator, top, total = scratch

    @pl.when(t == 0)
    def _():
        accumulator[...] = jnp.zeros_like(accumulator)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    @pl.when((t < most) & (blocks[b, jnp.minimum(t, most - 1)] == t))
    def _():
        size = keys.shape[0]
        slot = t * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        token = jnp.where(slot < count, ring.held(here, slot, sink_slots, count), -1)
        key, value = keys[...], values[...]
        if count % size:  # beyond the cache lies anything, also what is no number
            key, value = (jnp.where(slot < count, x.astype(jnp.float32), 0).astype(x.dtype) for x in (key, value))
        _add(q[...], key, value, _hidden(token, query, *limits, group), *scratch)

    @pl.when(t >= most)
    def _():
        size = new_keys.shape[0]
        new = (t - most) * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        token = jnp.where(new < lengths[b], here + new, -1)
        _add(q[...], new_keys[...], new_values[...], _hidden(token, query, *limits, group), *scratch)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        out[...] = (accumulator[...] / total[...]).astype(out.dtype)


def _hidden(token, query, window, sinks, group):
    """Returns what to add to scores [K, R] of tokens [K, 1] and queries [1, Q]: 0, or MASKED where one is hidden."""
    visible = (token >= 0) & (token <= query) & ((query - token < window) | (token < sinks))
    return jnp.concatenate([jnp.where(visible, 0.0, MASKED)] * group, axis=1)


def _add(query, key, value, hidden, accumulator, top, total):
    """Adds key, value [K, D] to the online softmax of query [D, R], whose refs are [D, R], [1, R] and [1, R]."""
    scores = dots.tiles("kd,dr->kr", key, query) + hidden
    new_top = jnp.maximum(top[...], jnp.max(scores, axis=0, keepdims=True))
    weights = jnp.exp2(scores - new_top)
    decay = jnp.exp2(top[...] - new_top)
    top[...] = new_top
    total[...] = total[...] * decay + jnp.sum(weights, axis=0, keepdims=True)
    accumulator[...] = accumulator[...] * decay + dots.tiles("kd,kr->dr", value, weights.astype(value.dtype))

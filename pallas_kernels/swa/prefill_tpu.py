"""Attention of a piece of a prompt to a ring cache and to itself, for TPUs: a flash attention over slots.

Axes: B batch, L new tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, T slots of the cache, K keys of a
block, M blocks of the cache, Q tokens of a query block, N number of query blocks, R = G Q columns of a query block.

Blocks of the cache come first and then those of the new tokens; which token a key is follows from its slot, so that
masks need no arrays. Tiles are those of `tpu_columns`. A block of the cache that no query sees is neither read nor
computed.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import dots, tpu_tokens
from pallas_kernels.swa import ring, tpu_columns

KEYS = 512  # of a block
COLUMNS = 1024  # R at most, but for one token of many heads
VMEM_BYTES = 48 * 2**20


def attend(sink_slots, scale, q, k, v, keys, values, position, lengths, window, sinks) -> jax.Array:
    """See `prefill.attend`."""
    batch, length, heads, dim = q.shape
    count, kv_heads = keys.shape[1:3]
    group = heads // kv_heads
    size, new_size = min(KEYS, -(-count // 8) * 8), min(KEYS, -(-length // 8) * 8)
    tokens = min(max(COLUMNS // group // 128 * 128, 128), -(-length // 128) * 128)
    queries = tpu_columns.queries(q, scale, kv_heads, tokens)
    cached = [jnp.swapaxes(x, 1, 2) for x in (keys, values)]
    new = [tpu_tokens.rows(x, new_size) for x in (k, v)]
    blocks = ring.blocks_in_sight(size, sink_slots, count, position, window, sinks)
    most = blocks.shape[1]

    def of_queries(b, h, n, t, *_):
        return b, h, 0, 0, n

    def of_cache(b, h, n, t, blocks, *_):
        return b, h, blocks[b, jnp.minimum(t, most - 1)], 0

    def of_new(b, h, n, t, *_):
        return b, h, jnp.maximum(t - most, 0), 0

    column = pl.BlockSpec((None, None, group, dim, tokens), of_queries)
    out = pl.pallas_call(
        functools.partial(_kernel, sink_slots, count, most),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(batch, kv_heads, queries.shape[4] // tokens, most + new[0].shape[2] // new_size),
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
    return tpu_columns.from_columns(out, q.shape)


def _kernel(
    sink_slots,
    count,
    most,
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
    """q, out [G, D, Q]; keys, values [K, D]; new_keys, new_values [K', D]."""
    b, n, t = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    group, tokens = q.shape[0], q.shape[2]
    here, limits = position[b], (window[0], sinks[0])
    query = here + n * tokens + jax.lax.broadcasted_iota(jnp.int32, (1, tokens), 1)
    accumulator, top, total = scratch

    @pl.when(t == 0)
    def _():
        tpu_columns.clear(accumulator, top, total)

    @pl.when((t < most) & (blocks[b, jnp.minimum(t, most - 1)] == t))
    def _():
        size = keys.shape[0]
        slot = t * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        token = jnp.where(slot < count, ring.held(here, slot, sink_slots, count), -1)
        key, value = keys[...], values[...]
        if count % size:  # beyond the cache lies anything, also what is no number
            key, value = (jnp.where(slot < count, x.astype(jnp.float32), 0).astype(x.dtype) for x in (key, value))
        scores = dots.tiles("kd,dr->kr", key, tpu_columns.joined(q)) + _hidden(token, query, *limits, group)
        tpu_columns.add(scores, value, accumulator, top, total)

    @pl.when(t >= most)
    def _():
        size = new_keys.shape[0]
        new = (t - most) * size + jax.lax.broadcasted_iota(jnp.int32, (size, 1), 0)
        token = jnp.where(new < lengths[b], here + new, -1)
        scores = dots.tiles("kd,dr->kr", new_keys[...], tpu_columns.joined(q)) + _hidden(token, query, *limits, group)
        tpu_columns.add(scores, new_values[...], accumulator, top, total)

    @pl.when(t == pl.num_programs(3) - 1)
    def _():
        tpu_columns.put(out, accumulator[...] / total[...])


def _hidden(token, query, window, sinks, group):
    """Returns what to add to scores [K, R] of tokens [K, 1] and queries [1, Q]: 0, or MASKED where one is hidden."""
    visible = (token >= 0) & (token <= query) & ((query - token < window) | (token < sinks))
    return jnp.concatenate([jnp.where(visible, 0.0, tpu_columns.MASKED)] * group, axis=1)

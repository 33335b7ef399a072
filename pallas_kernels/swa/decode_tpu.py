"""Attention of one new token a row to a ring cache, for TPUs: blocks of the cache stream through VMEM once.

Axes: Y layers, B batch, Hq query heads, Hkv key heads, D head dim, T slots, K slots of a block, N blocks,
C = K Hkv columns.

A block [K, Hkv, D] is read as C rows of one matrix, which all query heads are multiplied with: every row has to pass
into the matrix unit anyway, and doing so for all heads at once needs neither a transposed cache nor a loop. A column of
another head is hidden, as is one of a slot out of sight. Blocks that hold nothing in sight are neither read nor
computed; the last block overlaps the one before it where K does not divide T. Scores are in base 2.
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
LANES = 128
SUBLANES = 8
BLOCK_BYTES = 2**20  # of keys, and again of values; each twice in VMEM
VMEM_BYTES = 48 * 2**20


def why_not(q) -> str | None:
    """Returns why q [B, Hq, D] cannot be served, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel takes float32 and bfloat16, and q is {q.dtype}"
    return None


def worthwhile(keys) -> bool:
    """Whether the kernel reads caches [Y, B, T, Hkv, D] as fast as memory gives it, and faster than plain JAX does.

    Blocks of fewer heads take longer to arrange than to read, and arrays of shorter heads lie transposed in memory.
    Plain JAX reads those in place.
    """
    return keys.shape[3] % SUBLANES == 0 and keys.shape[4] % LANES == 0


def block_slots(keys) -> int:
    """Returns K for caches [Y, B, T, Hkv, D]: blocks of at most BLOCK_BYTES, all alike."""
    count, heads, dim = keys.shape[2:]
    row = (heads + -heads % SUBLANES) * (dim + -dim % LANES) * keys.dtype.itemsize
    blocks = -(-count // max(BLOCK_BYTES // row, 1))
    multiple = LANES // math.gcd(heads, LANES)  # then C fills its lanes
    return min(count, -(-count // (blocks * multiple)) * multiple)


def decode(sink_slots, scale, q, k, v, keys, values, position, window, sinks, layer) -> jax.Array:
    """See `pallas_kernels.swa_decode`."""
    batch, heads, dim = q.shape
    count, kv_heads = keys.shape[2:4]
    size = block_slots(keys)
    column = np.arange(size * kv_heads)
    others = np.arange(heads)[:, None] // (heads // kv_heads) != column % kv_heads  # [Hq, C]
    constants = np.where(others, MASKED, 0).astype(np.float32), (column // kv_heads).astype(np.int32)[None]
    scalars = (
        ring.blocks_in_sight(size, sink_slots, count, position, window, sinks),
        position,
        window[None],
        sinks[None],
        layer[None],
    )

    def of_row(b, *_):
        return b, 0, 0

    def of_cache(b, t, blocks, *scalars):
        return scalars[-1][0], b, jnp.minimum(blocks[b, t] * size, count - size), 0, 0

    def row(heads):
        return pl.BlockSpec((None, heads, dim), of_row)

    cache = pl.BlockSpec(tuple(map(pl.Element, (1, 1, size, kv_heads, dim))), of_cache)
    return pl.pallas_call(
        functools.partial(_kernel, sink_slots, scale * math.log2(math.e), count),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=scalars[0].shape,
            in_specs=[
                *(row(n) for n in (heads, kv_heads, kv_heads)),
                cache,
                cache,
                *(pl.BlockSpec(x.shape, lambda *_: (0, 0)) for x in constants),
            ],
            out_specs=row(heads),
            scratch_shapes=[pltpu.VMEM((heads, n), jnp.float32) for n in (1, 1, dim)],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name="swa_decode",
    )(*scalars, q, k, v, keys, values, *constants)


def _kernel(
    sink_slots,
    scale,
    count,
    blocks,
    position,
    window,
    sinks,
    layer,
    q,
    k,
    v,
    keys,
    values,
    others,
    offset,
    out,
    *scratch,
):
    """Adds one block to one row's result.

    q, out [Hq, D]; k, v [Hkv, D]; keys, values [1, 1, K, Hkv, D]; others [Hq, C]; offset [1, C]; scratch as in `_add`.
    The block is computed where it is the one that `blocks` names. Where a row sees nothing that is block 0, whose
    hidden scores weigh nothing beside the token's own.
    """
    b, t = pl.program_id(0), pl.program_id(1)
    query = (q[...].astype(jnp.float32) * scale).astype(q.dtype)
    top, total, accumulator = scratch

    @pl.when(t == 0)
    def _():
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)
        accumulator[...] = jnp.zeros_like(accumulator)
        _add(query, k[...], v[...], others[:, : k.shape[0]], *scratch)

    @pl.when(blocks[b, t] == t)
    def _():
        size = keys.shape[2]
        slot = jnp.minimum(t * size, count - size) + offset[...]
        seen = ring.in_sight(position[b], slot, sink_slots, count, window[0], sinks[0]) & (slot >= t * size)
        hidden = others[...] + jnp.where(seen, 0.0, MASKED)
        _add(query, keys[0, 0].reshape(-1, q.shape[1]), values[0, 0].reshape(-1, q.shape[1]), hidden, *scratch)

    @pl.when(t == pl.num_programs(1) - 1)
    def _():
        out[...] = (accumulator[...] / total[...]).astype(out.dtype)


def _add(query, key, value, hidden, top, total, accumulator):
    """Adds key, value [C, D] to the online softmax of query [Hq, D], whose refs are [Hq, 1], [Hq, 1] and [Hq, D]."""
    scores = dots.tiles("hd,cd->hc", query, key) + hidden
    new_top = jnp.maximum(top[...], jnp.max(scores, axis=1, keepdims=True))
    weights = jnp.exp2(scores - new_top)
    decay = jnp.exp2(top[...] - new_top)
    top[...] = new_top
    total[...] = total[...] * decay + jnp.sum(weights, axis=1, keepdims=True)
    accumulator[...] = accumulator[...] * decay + dots.tiles("hc,cd->hd", weights.astype(value.dtype), value)

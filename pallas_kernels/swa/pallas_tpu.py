"""Sliding-window attention for TPUs: our own flash attention in Pallas, driven by the lists of `tpu_visits`.

Axes: B batch, L tokens padded to blocks, Hkv key heads, G query heads per key head, D head dim, Q and K tokens of a
query and of a key block, N number of query blocks, R = G * Q columns of a query block, S keys of a step of a block.

Visits set the grid's last axis, so a tile that nobody sees costs nothing. A tile in which everybody sees everything is
computed in one piece without a mask, any other in masked steps from the first to the last key in sight.

Tiles are those of `tpu_columns`. The backward pass (as in FlashAttention-2) computes the weights again from the saved
logsumexp, and goes by query block, over whose keys d_q is summed in scratch. So are d_k and d_v of a whole row, if that
is not too long; else they have a kernel of their own, which goes by key block and computes the weights once more.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import backends, dots, tpu_tokens
from pallas_kernels.swa import tpu_columns, tpu_visits

VMEM_BYTES = 48 * 2**20
ROW_BYTES = 32 * 2**20  # most, of a row's d_k and d_v, that may lie in VMEM beside


def why_not(q) -> str | None:
    """Returns why q [B, L, Hq, D] cannot be served, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, and q is {q.dtype}"
    if q.shape[1] > (most := tpu_visits.LANES * 2 ** tpu_visits.FIELDS["query"][1]):
        return f"the TPU kernels take at most {most} tokens, and q has {q.shape[1]}"
    return None


def forward(blocks, scale, q, k, v, window, sinks, segment_ids):
    """Returns out [B, L, Hq, D] and what `backward` needs."""
    plan = tpu_visits.make_plan(blocks, q.shape[1], window, sinks, segment_ids)
    queries = _queries(blocks, scale, q, k.shape[2])
    *outer, dim, length = queries.shape
    columns = queries.shape[2] * blocks.query
    found = _call(
        _forward_kernel,
        blocks,
        plan,
        plan.by_query,
        [queries, _rows(blocks, k), _rows(blocks, v)],
        [jax.ShapeDtypeStruct(queries.shape, q.dtype), jax.ShapeDtypeStruct((*outer, 1, length), jnp.float32)],
        [(dim, columns), (1, columns), (1, columns)],
    )
    out, lse = (checkpoint_name(x, backends.ATTENTION) for x in found)
    out = tpu_columns.from_columns(out, q.shape)
    return out, (q, k, v, window, sinks, segment_ids, out, lse)


def backward(blocks, scale, residuals, d_out):
    """Returns the cotangents of q, k and v."""
    q, k, v, window, sinks, segment_ids, out, lse = residuals
    if segment_ids is not None:
        d_out = jnp.where((segment_ids != 0)[:, :, None, None], d_out, 0)
    plan = tpu_visits.make_plan(blocks, q.shape[1], window, sinks, segment_ids)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    queries, keys, values = _queries(blocks, scale, q, k.shape[2]), _rows(blocks, k), _rows(blocks, v)
    d_outs, delta = _columns(blocks, d_out, k.shape[2]), _columns(blocks, delta, k.shape[2])
    inputs = [queries, d_outs, lse, delta, keys, values]
    like_queries, like_keys = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (queries, keys))
    columns, row = (queries.shape[3], queries.shape[2] * blocks.query), keys.shape[2:]
    if 2 * math.prod(row) * (4 + 2 * keys.dtype.itemsize) <= ROW_BYTES:  # sums, and twice what is written
        kernel = functools.partial(_gradient_kernel, scale=scale)
        outputs = [like_queries, like_keys, like_keys]
        d_q, d_k, d_v = _call(kernel, blocks, plan, plan.by_query, inputs, outputs, [columns, row, row], rows=True)
    else:
        kernel = functools.partial(_query_gradient_kernel, scale=scale)
        (d_q,) = _call(kernel, blocks, plan, plan.by_query, inputs, [like_queries], [columns])
        scratch = [(blocks.key, keys.shape[-1])] * 2
        d_k, d_v = _call(_key_gradient_kernel, blocks, plan, plan.by_key, inputs, [like_keys, like_keys], scratch)
    d_k, d_v = (tpu_tokens.from_rows(x, k.shape[1]) for x in (d_k, d_v))
    return tpu_columns.from_columns(d_q, q.shape), d_k, d_v


def _call(kernel, blocks, plan, visits, inputs, outputs, scratch, rows=False):
    """Runs `kernel` over B x Hkv x visits.

    Args:
      kernel: is called with a Tile and the refs of inputs, outputs and scratch.
      blocks: static sizes.
      plan: for documents and limits.
      visits: the list to follow; blocks of outputs must be consecutive in it.
      inputs: arrays [B, Hkv, G, X, L] of queries or [B, Hkv, L, D] of keys.
      outputs: shapes like those.
      scratch: shapes of float32 scratch.
      rows: whether outputs of keys are whole rows and not blocks.
    """
    packed, group = plan.starts.shape[0] > 1, inputs[0].shape[2]

    def code(b, t, codes):
        return codes[b * blocks.visits + t if packed else t]

    def of_starts(b, h, t, codes, _):
        return b if packed else 0, tpu_visits.field(code(b, t, codes), "query"), 0, 0

    def of_queries(b, h, t, codes, _):
        return b, h, 0, 0, tpu_visits.field(code(b, t, codes), "query")

    def of_keys(b, h, t, codes, _):
        return b, h, tpu_visits.field(code(b, t, codes), "key"), 0

    def spec(x):
        if len(x.shape) == 5:
            return pl.BlockSpec((None, None, group, x.shape[3], blocks.query), of_queries)
        return pl.BlockSpec((None, None, blocks.key, x.shape[3]), of_keys)

    def of_output(x):
        return pl.BlockSpec((None, None, *x.shape[2:]), of_row) if rows and len(x.shape) == 4 else spec(x)

    def of_row(b, h, t, codes, _):
        return b, h, 0, 0

    def body(codes, limits, starts, *refs):
        kernel(Tile(blocks, group, code(pl.program_id(0), pl.program_id(2), codes), limits, starts), *refs)

    name = getattr(kernel, "func", kernel).__name__.strip("_")
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*inputs[0].shape[:2], visits.most),
            in_specs=[pl.BlockSpec((None, None, 1, blocks.query), of_starts), *map(spec, inputs)],
            out_specs=[of_output(x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=VMEM_BYTES + rows * ROW_BYTES,
        ),
        name=f"swa_{name}",
    )(visits.codes, plan.limits, plan.starts, *inputs)


class Tile(NamedTuple):
    """The visit at hand, as a kernel sees it: its code, and refs of (window, sinks) and of document starts [1, Q]."""

    blocks: tpu_visits.Blocks
    group: int
    code: jax.Array
    limits: jax.Array
    starts: jax.Array

    def when(self, flag):
        """Decorates what to do in visits with that flag."""
        return pl.when(tpu_visits.field(self.code, flag) == 1)

    def for_each_part(self, attend):
        """Calls attend(at, size, mask) for the parts in sight of the key block; mask is a function or None."""
        size, step = self.blocks.key, self.blocks.step
        begin, end = tpu_visits.field(self.code, "begin"), tpu_visits.field(self.code, "end")
        full = tpu_visits.field(self.code, "full") == 1
        whole = (begin == 0) & (end == size // step - 1)

        @pl.when(full)
        def _():
            attend(0, size, None)

        @pl.when(whole & jnp.logical_not(full))
        def _():
            attend(0, size, functools.partial(self.mask, 0, size))

        @pl.when(jnp.logical_not(whole))
        def _():
            @pl.loop(begin, end + 1)
            def _(n):
                at = pl.multiple_of(n * step, step)
                attend(at, step, functools.partial(self.mask, at, step))

    def mask(self, at, size):
        """Returns what to add to the scores [S, R] of `size` keys from `at`: 0, or MASKED where a key is hidden."""
        window, sinks, start, i = self.limits[0], self.limits[1], self.starts[...], self.queries()
        j = self.keys() + at + _iota((size, self.blocks.query), 0)
        visible = (jnp.maximum(start, i - window + 1) <= j) & (j <= i)
        visible |= (start <= j) & (j < jnp.minimum(start + sinks, i + 1))
        return jnp.concatenate([jnp.where(visible, 0.0, tpu_columns.MASKED)] * self.group, axis=1)

    def real(self):
        """Returns 1, or 0 where a query is padding, [1, R]."""
        return jnp.concatenate([jnp.where(self.starts[...] <= self.queries(), 1.0, 0.0)] * self.group, axis=1)

    def keys(self):
        """Returns the first key's place in the row, int32."""
        return tpu_visits.field(self.code, "key") * self.blocks.key

    def queries(self):
        """Returns the queries' places in the row, int32 [1, Q]."""
        return tpu_visits.field(self.code, "query") * self.blocks.query + _iota((1, self.blocks.query), 1)


def _forward_kernel(tile, q, k, v, out, lse, accumulator, top, total):
    """q, out [G, D, Q]; lse [G, 1, Q]; k, v [K, D]; accumulator [D, R]; top, total [1, R]."""

    @tile.when("first")
    def _():
        tpu_columns.clear(accumulator, top, total)

    @tile.for_each_part
    def _(at, size, mask):
        value = v[pl.ds(at, size), :]
        scores = dots.tiles("kd,dr->kr", k[pl.ds(at, size), :], tpu_columns.joined(q))
        tpu_columns.add(scores + mask() if mask else scores, value, accumulator, top, total)

    @tile.when("last")
    def _():
        tpu_columns.put(out, accumulator[...] * (tile.real() / total[...]))
        tpu_columns.put(lse, top[...] + jnp.log2(total[...]))


def _weights(mask, key, value, q, d_out, lse, delta):
    """Returns the softmax weights [S, R] of a part of a tile, and the cotangents of its natural scores.

    key, value [S, D]; q, d_out [D, R]; lse, delta [1, R].
    """
    scores = dots.tiles("kd,dr->kr", key, q)
    scores = scores + mask() if mask else scores
    weights = jnp.exp2(scores - lse)
    d_scores = weights * (dots.tiles("kd,dr->kr", value, d_out) - delta)
    return weights.astype(key.dtype), d_scores.astype(key.dtype)


def _gradient_kernel(
    tile, q, d_out, lse, delta, k, v, d_q, d_k, d_v, accumulator, k_accumulator, v_accumulator, *, scale
):
    """d_k, d_v and their accumulators [L, D]; the rest as in `_query_gradient_kernel`."""
    visit, visits = pl.program_id(2), pl.num_programs(2)

    @pl.when(visit == 0)
    def _():
        _zero(k_accumulator, v_accumulator)

    @tile.when("first")
    def _():
        _zero(accumulator)

    @tile.for_each_part
    def _(at, size, mask):
        key, value = k[pl.ds(at, size), :], v[pl.ds(at, size), :]
        query, cotangent, *rows = map(tpu_columns.joined, (q, d_out, lse, delta))
        weights, d_scores = _weights(mask, key, value, query, cotangent, *rows)
        accumulator[...] += dots.tiles("kd,kr->dr", key, d_scores)
        keys = pl.ds(pl.multiple_of(tile.keys() + at, tile.blocks.step), size)
        _add_keys(keys, weights, d_scores, query, cotangent, k_accumulator, v_accumulator)

    @tile.when("last")
    def _():
        tpu_columns.put(d_q, accumulator[...] * scale)

    @pl.when(visit == visits - 1)
    def _():
        _put_keys(d_k, d_v, k_accumulator, v_accumulator)


def _query_gradient_kernel(tile, q, d_out, lse, delta, k, v, d_q, accumulator, *, scale):
    """q, d_out, d_q [G, D, Q]; lse, delta [G, 1, Q]; k, v [K, D]; accumulator [D, R]."""

    @tile.when("first")
    def _():
        _zero(accumulator)

    @tile.for_each_part
    def _(at, size, mask):
        key, value = k[pl.ds(at, size), :], v[pl.ds(at, size), :]
        columns = map(tpu_columns.joined, (q, d_out, lse, delta))
        _, d_scores = _weights(mask, key, value, *columns)
        accumulator[...] += dots.tiles("kd,kr->dr", key, d_scores)

    @tile.when("last")
    def _():
        tpu_columns.put(d_q, accumulator[...] * scale)


def _key_gradient_kernel(tile, q, d_out, lse, delta, k, v, d_k, d_v, k_accumulator, v_accumulator):
    """q, d_out [G, D, Q]; lse, delta [G, 1, Q]; k, v and the rest [K, D]."""

    @tile.when("first")
    def _():
        _zero(k_accumulator, v_accumulator)

    @tile.for_each_part
    def _(at, size, mask):
        keys = pl.ds(at, size)
        query, cotangent, *rows = map(tpu_columns.joined, (q, d_out, lse, delta))
        weights, d_scores = _weights(mask, k[keys, :], v[keys, :], query, cotangent, *rows)
        _add_keys(keys, weights, d_scores, query, cotangent, k_accumulator, v_accumulator)

    @tile.when("last")
    def _():
        _put_keys(d_k, d_v, k_accumulator, v_accumulator)


def _zero(*accumulators):
    for accumulator in accumulators:
        accumulator[...] = jnp.zeros_like(accumulator)


def _add_keys(keys, weights, d_scores, query, cotangent, k_accumulator, v_accumulator):
    """Adds to the rows `keys` of both what `_weights` and the columns [D, R] that it was given make."""
    v_accumulator[keys, :] += dots.tiles("kr,dr->kd", weights, cotangent)
    k_accumulator[keys, :] += dots.tiles("kr,dr->kd", d_scores, query)


def _put_keys(d_k, d_v, k_accumulator, v_accumulator):
    """Writes what is summed: queries came with scale * log2(e), and scores want scale alone."""
    d_k[...] = (k_accumulator[...] * math.log(2)).astype(d_k.dtype)
    d_v[...] = v_accumulator[...].astype(d_v.dtype)


def _queries(blocks, scale, q, heads):
    return tpu_columns.queries(q, scale, heads, max(blocks.query, blocks.key))


def _columns(blocks, x, heads):
    return tpu_columns.columns(x, heads, max(blocks.query, blocks.key))


def _rows(blocks, x):
    return tpu_tokens.rows(x, max(blocks.query, blocks.key))


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)

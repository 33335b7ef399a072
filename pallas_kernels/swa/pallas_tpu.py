"""Sliding-window attention for TPUs: our own flash attention in Pallas, driven by lists of visits.

Axes: B batch, L tokens padded to blocks, Hkv key heads, G query heads per key head, D head dim, Q and K tokens of a
query and of a key block, N and M numbers of those blocks, R = G * Q columns of a query block, S keys of a step of a
block, P rows with documents of their own (B, or 1 where every row is one document), T length of the list of visits.

A *visit* is a pair (query block, key block) in which some query sees some key. The lists of visits, ordered by query
block or by key block, are computed from traced window, sinks and documents and reach the kernels as scalars, one int32
a visit. They set the grid's last axis, so a tile that nobody sees costs nothing. A tile in which everybody sees
everything is computed in one piece without a mask, any other in masked steps from the first to the last key in sight.

All tiles are transposed, keys in rows and queries in columns: maxima and sums over keys are then plain vector
operations, and what belongs to a query (maximum, sum, logsumexp, document) is one dense row. Scores are in base 2:
queries come multiplied by scale * log2(e).
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_kind
from pallas_kernels.swa import documents

MASKED = -1e30
LANES = 128
STEPS = 8
LONG_LIST = 2**16  # visits, whose list takes 256 KiB of the scalar memory's 1 MiB
COLUMNS = 256  # of the forward kernel at a time, so that one part's weights overlap with another's output
VMEM_BYTES = 48 * 2**20
# Name of each field of a visit: (lowest bit, number of bits). Steps begin ... end are in sight; none where begin > end.
FIELDS = {
    "query": (0, 11),
    "key": (11, 11),
    "first": (22, 1),
    "last": (23, 1),
    "full": (24, 1),
    "begin": (25, 3),
    "end": (28, 3),
}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Static sizes.

    Attributes:
      query: tokens of a query block.
      key: tokens of a key block.
      step: tokens of a step of a key block that is partly in sight.
      visits: most visits that a row can need; the size of the list, not of the work.
    """

    query: int
    key: int
    step: int
    visits: int

    def __post_init__(self):
        for name in ("query", "key"):
            if (size := getattr(self, name)) < LANES or size % LANES:
                raise ValueError(f"swa_attention: {name}={size} must be a positive multiple of {LANES}")
        if max(self.query, self.key) % min(self.query, self.key):
            raise ValueError(f"swa_attention: query={self.query} and key={self.key}; one must divide the other")
        if self.step < 16 or self.step % 16 or self.key % self.step or self.key > STEPS * self.step:
            raise ValueError(
                f"swa_attention: step={self.step} must be a multiple of 16 that divides key={self.key}"
                f" into at most {STEPS} steps"
            )
        if self.visits < 1:
            raise ValueError(f"swa_attention: visits={self.visits} must be at least 1")

    def counts(self, length) -> tuple[int, int]:
        """Returns N and M for `length` tokens."""
        padded = length + -length % max(self.query, self.key)
        return padded // self.query, padded // self.key


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that decide speed and never the result, in bfloat16; float32 takes half of both.

    Attributes:
      columns: most columns of a query block, R.
      keys: most tokens of a key block.
    """

    columns: int = 1024
    keys: int = 512

    def __post_init__(self):
        for name in ("columns", "keys"):
            if (size := getattr(self, name)) < 2 * LANES or size & (size - 1):
                raise ValueError(f"{name}={size} must be a power of two of at least {2 * LANES}")
        if self.keys > STEPS * LANES:
            raise ValueError(f"keys={self.keys} is over {STEPS * LANES}, which a list of visits cannot name")


# By chip, from the compiler's schedules: twice the columns save at most 6% of a score's bundles, and windows then cost
# more, as a block of queries sees all keys from its first one's to its last one's.
TILES = {
    "v5e": Tiles(columns=1024, keys=512),
    "v5p": Tiles(columns=1024, keys=512),
    "v6e": Tiles(columns=1024, keys=512),
    "7x": Tiles(columns=1024, keys=512),
}


def why_not(q) -> str | None:
    """Returns why q [B, L, Hq, D] cannot be served, or None."""
    if q.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernels take float32 and bfloat16, and q is {q.dtype}"
    if q.shape[1] > (most := LANES * 2 ** FIELDS["query"][1]):
        return f"the TPU kernels take at most {most} tokens, and q has {q.shape[1]}"
    return None


def choose_blocks(q, k, window, sinks) -> Blocks:
    """Returns sizes for arrays that `why_not` admits; traced window and sinks may then take any value.

    Large tiles keep the matrix unit busy, up to those of `TILES`, and tiles longer than a narrow window are mostly
    hidden. In float32 a tile takes six passes, and smaller ones keep it busy.
    """
    tiles = tpu_kind.choose(TILES, Tiles())
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    largest = min(length, max(window, 256)) if isinstance(window, int) else length
    share = 1 if q.dtype == jnp.bfloat16 else 2
    most_columns, most_keys = tiles.columns // share, tiles.keys // share
    query, key = LANES, LANES
    while query < largest and 2 * query * group <= most_columns:
        query *= 2
    while key < min(largest, most_keys) and 2 * key * query * group <= most_columns * most_keys:
        key *= 2
    blocks = sized(length, window, sinks, query=query, key=key, step=min(key, LANES))
    while q.shape[0] * blocks.visits > LONG_LIST and key < STEPS * LANES:
        key *= 2
        blocks = sized(length, window, sinks, query=query, key=key, step=LANES)
    return blocks


def sized(length, window, sinks, *, query, key, step) -> Blocks:
    """Returns Blocks of those tile sizes with room for the visits of any row of `length` tokens."""
    rows, widest = Blocks(query, key, step, 1).counts(length)
    if isinstance(window, int) and isinstance(sinks, int):
        widest = (query + min(window, length) - 2) // key + 2 + (-(-sinks // key) + 1 if sinks else 0)
    visits = sum(min(widest, ((n + 1) * query - 1) // key + 1) for n in range(rows))
    return Blocks(query, key, step, visits)


class Visits(NamedTuple):
    """A list of visits: `codes` int32 [P * T], see FIELDS, and `most`, the visits of the longest row."""

    codes: jax.Array
    most: jax.Array


class Plan(NamedTuple):
    """What the kernels read besides q, k and v: first token of each query's document [P, N, 1, Q], (window, sinks)."""

    by_query: Visits
    by_key: Visits
    starts: jax.Array
    limits: jax.Array


def forward(blocks, scale, q, k, v, window, sinks, segment_ids):
    """Returns out [B, L, Hq, D] and what `backward` needs."""
    plan = _plan(blocks, q.shape[1], window, sinks, segment_ids)
    queries = _queries(blocks, scale, q, k.shape[2])
    *outer, dim, columns = queries.shape
    out, lse = _call(
        _forward_kernel,
        blocks,
        plan,
        plan.by_query,
        [queries, _rows(blocks, k), _rows(blocks, v)],
        [jax.ShapeDtypeStruct(queries.shape, q.dtype), jax.ShapeDtypeStruct((*outer, 1, columns), jnp.float32)],
        [(dim, columns), (1, columns), (1, columns)],
    )
    out = _from_columns(out, q.shape)
    if segment_ids is not None:
        out = jnp.where((segment_ids != 0)[:, :, None, None], out, 0)
    return out, (q, k, v, window, sinks, segment_ids, out, lse)


def backward(blocks, scale, residuals, d_out):
    """Returns the cotangents of q, k and v."""
    q, k, v, window, sinks, segment_ids, out, lse = residuals
    if segment_ids is not None:
        d_out = jnp.where((segment_ids != 0)[:, :, None, None], d_out, 0)
    plan = _plan(blocks, q.shape[1], window, sinks, segment_ids)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    queries, keys, values = _queries(blocks, scale, q, k.shape[2]), _rows(blocks, k), _rows(blocks, v)
    d_outs, delta = _columns(blocks, d_out, k.shape[2]), _columns(blocks, delta, k.shape[2])
    inputs = [queries, d_outs, lse, delta, keys, values]
    like_queries, like_keys = (jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (queries, keys))
    kernel = functools.partial(_query_gradient_kernel, scale=scale)
    (d_q,) = _call(kernel, blocks, plan, plan.by_query, inputs, [like_queries], [queries.shape[-2:]])
    scratch = [(blocks.key, keys.shape[-1])] * 2
    d_k, d_v = _call(_key_gradient_kernel, blocks, plan, plan.by_key, inputs, [like_keys, like_keys], scratch)
    d_k, d_v = (jnp.swapaxes(x, 1, 2)[:, : k.shape[1]] for x in (d_k, d_v))
    return _from_columns(d_q, q.shape), d_k, d_v


def _call(kernel, blocks, plan, visits, inputs, outputs, scratch):
    """Runs `kernel` over B x Hkv x visits.

    Args:
      kernel: is called with a Tile and the refs of inputs, outputs and scratch.
      blocks: static sizes.
      plan: for documents and limits.
      visits: the list to follow; blocks of outputs must be consecutive in it.
      inputs: arrays [B, Hkv, N, X, R] of queries or [B, Hkv, L, D] of keys.
      outputs: shapes like those.
      scratch: shapes of float32 scratch.
    """
    packed, group = plan.starts.shape[0] > 1, inputs[0].shape[-1] // blocks.query

    def code(b, t, codes):
        return codes[b * blocks.visits + t if packed else t]

    def of_starts(b, h, t, codes, _):
        return b if packed else 0, _field(code(b, t, codes), "query"), 0, 0

    def of_queries(b, h, t, codes, _):
        return b, h, _field(code(b, t, codes), "query"), 0, 0

    def of_keys(b, h, t, codes, _):
        return b, h, _field(code(b, t, codes), "key"), 0

    def spec(x):
        if len(x.shape) == 5:
            return pl.BlockSpec((None, None, None, *x.shape[3:]), of_queries)
        return pl.BlockSpec((None, None, blocks.key, x.shape[3]), of_keys)

    def body(codes, limits, starts, *refs):
        kernel(Tile(blocks, group, code(pl.program_id(0), pl.program_id(2), codes), limits, starts), *refs)

    name = getattr(kernel, "func", kernel).__name__.strip("_")
    return pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(*inputs[0].shape[:2], visits.most),
            in_specs=[pl.BlockSpec((None, None, 1, blocks.query), of_starts), *map(spec, inputs)],
            out_specs=[spec(x) for x in outputs],
            scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
        ),
        out_shape=outputs,
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        name=f"swa_{name}",
    )(visits.codes, plan.limits, plan.starts, *inputs)


class Tile(NamedTuple):
    """The visit at hand, as a kernel sees it: its code, and refs of (window, sinks) and of document starts [1, Q]."""

    blocks: Blocks
    group: int
    code: jax.Array
    limits: jax.Array
    starts: jax.Array

    def when(self, flag):
        """Decorates what to do in visits with that flag."""
        return pl.when(_field(self.code, flag) == 1)

    def for_each_part(self, attend):
        """Calls attend(at, size, mask) for the parts in sight of the key block; mask is a function or None."""
        size, step = self.blocks.key, self.blocks.step
        begin, end = _field(self.code, "begin"), _field(self.code, "end")
        full = _field(self.code, "full") == 1
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
        window, sinks, start = self.limits[0], self.limits[1], self.starts[...]
        i = _field(self.code, "query") * self.blocks.query + _iota((1, self.blocks.query), 1)
        j = _field(self.code, "key") * self.blocks.key + at + _iota((size, self.blocks.query), 0)
        visible = (jnp.maximum(start, i - window + 1) <= j) & (j <= i)
        visible |= (start <= j) & (j < jnp.minimum(start + sinks, i + 1))
        return jnp.concatenate([jnp.where(visible, 0.0, MASKED)] * self.group, axis=1)


def _forward_kernel(tile, q, k, v, out, lse, accumulator, top, total):
    """q, out, accumulator [D, R]; k, v [K, D]; lse, top, total [1, R]."""

    @tile.when("first")
    def _():
        accumulator[...] = jnp.zeros_like(accumulator)
        top[...] = jnp.full_like(top, MASKED)
        total[...] = jnp.zeros_like(total)

    @tile.for_each_part
    def _(at, size, mask):
        value = v[pl.ds(at, size), :]
        scores = _dot(k[pl.ds(at, size), :], q[...], 1, 0)
        scores = scores + mask() if mask else scores
        for first in range(0, q.shape[1], COLUMNS):
            part = slice(first, min(first + COLUMNS, q.shape[1]))
            new_top = jnp.maximum(top[:, part], jnp.max(scores[:, part], axis=0, keepdims=True))
            weights = jnp.exp2(scores[:, part] - new_top)
            decay = jnp.exp2(top[:, part] - new_top)
            top[:, part] = new_top
            total[:, part] = total[:, part] * decay + jnp.sum(weights, axis=0, keepdims=True)
            accumulator[:, part] = accumulator[:, part] * decay + _dot(value, weights.astype(v.dtype), 0, 0)

    @tile.when("last")
    def _():
        out[...] = (accumulator[...] / total[...]).astype(out.dtype)
        lse[...] = top[...] + jnp.log2(total[...])


def _weights(mask, q, d_out, lse, delta, key, value):
    """Returns the softmax weights [S, R] of a part of a tile, and the cotangents of its natural scores."""
    scores = _dot(key, q[...], 1, 0)
    scores = scores + mask() if mask else scores
    weights = jnp.exp2(scores - lse[...])
    d_scores = weights * (_dot(value, d_out[...], 1, 0) - delta[...])
    return weights.astype(key.dtype), d_scores.astype(key.dtype)


def _query_gradient_kernel(tile, q, d_out, lse, delta, k, v, d_q, accumulator, *, scale):
    """q, d_out, d_q, accumulator [D, R]; lse, delta [1, R]; k, v [K, D]."""

    @tile.when("first")
    def _():
        accumulator[...] = jnp.zeros_like(accumulator)

    @tile.for_each_part
    def _(at, size, mask):
        key, value = k[pl.ds(at, size), :], v[pl.ds(at, size), :]
        _, d_scores = _weights(mask, q, d_out, lse, delta, key, value)
        accumulator[...] += _dot(key, d_scores, 0, 0)

    @tile.when("last")
    def _():
        d_q[...] = (accumulator[...] * scale).astype(d_q.dtype)


def _key_gradient_kernel(tile, q, d_out, lse, delta, k, v, d_k, d_v, k_accumulator, v_accumulator):
    """q, d_out [D, R]; lse, delta [1, R]; k, v and the rest [K, D]."""

    @tile.when("first")
    def _():
        k_accumulator[...] = jnp.zeros_like(k_accumulator)
        v_accumulator[...] = jnp.zeros_like(v_accumulator)

    @tile.for_each_part
    def _(at, size, mask):
        keys = pl.ds(at, size)
        weights, d_scores = _weights(mask, q, d_out, lse, delta, k[keys, :], v[keys, :])
        v_accumulator[keys, :] += _dot(weights, d_out[...], 1, 1)
        k_accumulator[keys, :] += _dot(d_scores, q[...], 1, 1)

    @tile.when("last")
    def _():
        d_k[...] = (k_accumulator[...] * math.log(2)).astype(d_k.dtype)
        d_v[...] = v_accumulator[...].astype(d_v.dtype)


def _plan(blocks, length, window, sinks, segment_ids) -> Plan:
    """Returns the lists of visits for traced or fixed window and sinks."""
    n, m = blocks.counts(length)
    index = jnp.arange(n * blocks.query, dtype=jnp.int32)
    starts = jnp.zeros((1, index.size), jnp.int32)
    if segment_ids is not None:
        starts, _ = documents.spans(segment_ids)
        starts = jnp.where(segment_ids == 0, index[:length], starts)  # a token of padding sees itself
        rest = jnp.broadcast_to(index[length:], (starts.shape[0], index.size - length))
        starts = jnp.concatenate([starts, rest], axis=1)
    starts = starts.reshape(-1, n, 1, blocks.query)

    # Of the first query of a block: the first key of its document and of its window. They never decrease with n.
    base = starts[:, :, 0, 0]
    begin = jnp.arange(n, dtype=jnp.int32) * blocks.query
    low = jnp.maximum(base, begin - window + 1)
    last = jnp.broadcast_to((begin + blocks.query - 1) // blocks.key + 1, base.shape)
    of_sinks = base // blocks.key, jnp.minimum((base + sinks - 1) // blocks.key + 1, low // blocks.key)
    of_sinks = of_sinks[0], jnp.where(sinks > 0, of_sinks[1], of_sinks[0])
    of_window = low // blocks.key, last

    def invert(span):
        first, last = (jnp.sum(x[:, :, None] <= jnp.arange(m), axis=1, dtype=jnp.int32) for x in reversed(span))
        return first, last

    pack = functools.partial(_pack, blocks, starts, window, sinks)
    query, key, *flags = _walk(blocks.visits, of_sinks, of_window)
    by_query = pack(query, key, *flags)
    key, query, *flags = _walk(blocks.visits, invert(of_sinks), invert(of_window))
    by_key = pack(query, key, *flags)
    return Plan(by_query, by_key, starts, jnp.stack([window, sinks]).astype(jnp.int32))


def _walk(size, span, other):
    """Lists pairs of a block and each block of its two spans, given as (first, last + 1), each int32 [P, blocks].

    Returns:
      outer, inner [P, T]: the pairs in order, and then the last one until the end.
      first, last [P, T]: whether a pair is the first or the last of its outer block.
      total [P, 1]: number of pairs.
    """
    counts = [last - first for first, last in (span, other)]
    ends = jnp.cumsum(counts[0] + counts[1], axis=1)
    total = ends[:, -1:]
    t = jnp.minimum(jnp.arange(size, dtype=jnp.int32), total - 1)
    outer = jnp.sum(ends[:, None, :] <= t[:, :, None], axis=-1, dtype=jnp.int32)
    near, count, at, other_at = (
        jnp.take_along_axis(x, outer, axis=1) for x in (counts[0], counts[0] + counts[1], span[0], other[0])
    )
    rank = t - jnp.take_along_axis(ends, outer, axis=1) + count
    inner = jnp.where(rank < near, at + rank, other_at + rank - near)
    return outer, inner, rank == 0, rank == count - 1, total


def _pack(blocks, starts, window, sinks, query, key, first, last, total) -> Visits:
    """Returns visits from what `_walk` lists, for document starts [P, N, 1, Q]."""
    base, last_base = (jnp.take_along_axis(starts[:, :, 0, x], query, axis=1) for x in (0, -1))
    i, j = query * blocks.query, key * blocks.key
    last_i, last_j = i + blocks.query - 1, j + blocks.key - 1
    low = jnp.maximum(base, i - window + 1)
    begin = jnp.maximum(jnp.where(base + sinks > j, base, low), j)
    end = jnp.minimum(jnp.where(low <= last_j, last_i, base + sinks - 1), last_j)
    full = (last_j <= i) & (last_base <= j) & ((last_i - j < window) | (last_j - base < sinks))
    active = jnp.arange(query.shape[1]) < total
    fields = {
        "query": query,
        "key": key,
        "first": first & active,
        "last": last & active,
        "full": full & active,
        "begin": jnp.where(active, (begin - j) // blocks.step, 1),
        "end": jnp.where(active, (end - j) // blocks.step, 0),
    }
    codes = sum(x.astype(jnp.int32) << FIELDS[name][0] for name, x in fields.items())
    return Visits(codes.reshape(-1), jnp.max(total))


def _field(code, name):
    bit, size = FIELDS[name]
    return (code >> bit) & (2**size - 1)


def _queries(blocks, scale, q, heads):
    """[B, L, Hq, D] -> [B, Hkv, N, D, R], multiplied so that scores are in base 2."""
    return _columns(blocks, (q.astype(jnp.float32) * (scale * math.log2(math.e))).astype(q.dtype), heads)


def _columns(blocks, x, heads):
    """[B, L, Hq, X] -> [B, Hkv, N, X, R], columns in the order (G, Q); the tail is filled with zeros."""
    batch, length, query_heads, dim = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % max(blocks.query, blocks.key)), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, blocks.query, heads, query_heads // heads, dim)
    return x.transpose(0, 3, 1, 5, 4, 2).reshape(batch, heads, x.shape[1], dim, -1)


def _from_columns(x, shape):
    """[B, Hkv, N, D, R] -> [B, L, Hq, D] of `shape`."""
    batch, length, query_heads, dim = shape
    _, heads, count = x.shape[:3]
    x = x.reshape(batch, heads, count, dim, query_heads // heads, -1).transpose(0, 2, 5, 1, 4, 3)
    return x.reshape(batch, -1, query_heads, dim)[:, :length]


def _rows(blocks, x):
    """[B, L, Hkv, D] -> [B, Hkv, L, D]; the tail is filled with zeros."""
    padding = -x.shape[1] % max(blocks.query, blocks.key)
    return jnp.pad(jnp.swapaxes(x, 1, 2), [(0, 0), (0, 0), (0, padding), (0, 0)])


def _iota(shape, axis):
    return jax.lax.broadcasted_iota(jnp.int32, shape, axis)


def _dot(x, y, x_axis, y_axis):
    """Contracts those axes of two matrices in float32, exact for float32 inputs."""
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    axes = (((x_axis,), (y_axis,)), ((), ()))
    return jax.lax.dot_general(x, y, axes, precision=precision, preferred_element_type=jnp.float32)

"""Which tiles the TPU kernels of attention visit, in what order, and how large those are.

Axes: B batch, L tokens padded to blocks, Q and K tokens of a query and of a key block, N and M numbers of those blocks,
R columns of a query block, P rows with documents of their own (B, or 1 where every row is one document), T length of
the list of visits.

A *visit* is a pair (query block, key block) in which some query sees some key. The lists of visits, ordered by query
block or by key block, are computed from traced window, sinks and documents and reach the kernels as scalars, one int32
a visit.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import tpu_kind
from pallas_kernels.swa import documents

LANES = 128
STEPS = 8
LONG_LIST = 2**16  # visits, whose list takes 256 KiB of the scalar memory's 1 MiB
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


def choose_blocks(q, k, window, sinks) -> Blocks:
    """Returns sizes for arrays that `why_not` of `pallas_tpu` admits; traced window and sinks may then take any value.

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
    """What the kernels read besides q, k and v: first token of each query's document [P, N, 1, Q], (window, sinks).

    Where a query is padding, that token is the one after it.
    """

    by_query: Visits
    by_key: Visits
    starts: jax.Array
    limits: jax.Array


def make_plan(blocks, length, window, sinks, segment_ids) -> Plan:
    """Returns the lists of visits for traced or fixed window and sinks."""
    n, m = blocks.counts(length)
    index = jnp.arange(n * blocks.query, dtype=jnp.int32)
    starts = jnp.zeros((1, index.size), jnp.int32)
    if segment_ids is not None:
        starts, _ = documents.spans(segment_ids)
        starts = jnp.where(segment_ids == 0, index[:length] + 1, starts)  # a token of padding sees none
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


def field(code, name):
    """Returns a field of a visit, int32; see FIELDS."""
    bit, size = FIELDS[name]
    return (code >> bit) & (2**size - 1)

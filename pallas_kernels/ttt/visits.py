"""Which tokens of a row read and write which fast weights, as a list of visits to blocks of tokens.

Axes: B batch, L tokens padded to blocks, N heads, K blocks, T tokens of a block (at most a chunk), V visits.

Rows stand at different places of their chunks and start documents where they like, so a block of one row can hold up to
three phases: HEAD, tokens up to the chunk's end; TAIL, tokens after it; LATER, tokens of documents that begin in the
block (they read the initial weights, and only those of the last one write what is kept). A visit is one phase of one
block. Visits that have nothing to do are left out of the list, so a kernel that goes through the list pays only for
boundaries that fall inside blocks; aligned training has one visit a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

HEAD, TAIL, LATER = 1, 2, 3

# Fields of a visit's word, lowest bits first; the block's index is above them.
FRESH = 1  # first goes back to the initial weights
UPDATE = 2  # ends a chunk
PARTIAL = 4  # some of the block's tokens belong to other visits
OPENS, CLOSES = 8, 16  # first and last visit of its block
ENTERS, LEAVES = 32, 64  # first and last visit that uses these weights
INITIAL = 128  # these weights are the initial ones
ACTIVE = 256  # there is a visit
PHASE, BLOCK = 9, 11  # shifts; a phase has two bits


class Visits(NamedTuple):
    """The work of every row.

    Attributes:
      words: int32 [B, V], fields as above; rows with fewer visits end in words without ACTIVE.
      slots: int32 [B, V], updates of the row before the visit.
      total: int32 [1], visits of the longest row, but at least 1: the state goes through the kernel in any case.
    """

    words: jax.Array
    slots: jax.Array
    total: jax.Array


class Plan(NamedTuple):
    """What happens to each token and in each block.

    Attributes:
      phase: int32 [B, K, T]; 0 where a token is not valid.
      write: bool [B, K, T], tokens whose gradient counts.
      fresh: bool [B, K], the state goes back to the initial one before the head.
      update: bool [B, K], the head ends a chunk.
      renew: bool [B, K], the state goes back to the initial one after head and tail.
      count: int32 [B], tokens in the unfinished chunk at the end.
    """

    phase: jax.Array
    write: jax.Array
    fresh: jax.Array
    update: jax.Array
    renew: jax.Array
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count


def make_plan(valid: jax.Array, reset: jax.Array, count: jax.Array, chunk_size: int, size: int) -> Plan:
    """Returns the plan of valid and reset [B, L] and count [B], for blocks of `size` tokens, L a multiple of it."""
    batch = valid.shape[0]
    document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    seen = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    before = jax.lax.cummax(jnp.where(reset, seen - valid, 0), axis=1)  # tokens of earlier documents
    rank = seen - before + jnp.where(document == 0, count[:, None], 0)  # 1 for the first token of a document
    chunk = (rank - 1) // chunk_size

    valid, document, rank, chunk = (x.reshape(batch, -1, size) for x in (valid, document, rank, chunk))
    end = document[..., -1]
    position = jnp.argmax(valid, axis=-1, keepdims=True)
    any_valid = valid.any(-1)
    first = jnp.where(any_valid, jnp.take_along_axis(document, position, -1)[..., 0], end)
    head = jnp.take_along_axis(chunk, position, -1)
    phase = jnp.where(document > first[..., None], LATER, jnp.where(chunk == head, HEAD, TAIL))
    phase = jnp.where(valid, phase, 0)
    update = jnp.any((phase == HEAD) & (rank % chunk_size == 0), axis=-1)
    fresh = first > jnp.pad(end[:, :-1], [(0, 0), (1, 0)])
    write = valid & ((phase != LATER) | (document == end[..., None]))
    total = seen[:, -1] - before[:, -1] + jnp.where(end[:, -1] == 0, count, 0)
    return Plan(phase, write, fresh, update, end > first, total % chunk_size)


def make_visits(plan: Plan, phases: int) -> Visits:
    """Returns the visits of a plan in which no phase above `phases` occurs; with one phase, every block is visited."""
    batch, blocks, _ = plan.phase.shape
    shape = (batch, blocks, phases)
    kinds = jnp.arange(1, phases + 1, dtype=jnp.int32)
    has = jnp.any(plan.phase[:, :, None, :] == kinds[:, None], axis=-1)
    is_head, is_later = kinds == HEAD, kinds == LATER
    fresh = jnp.where(is_head, plan.fresh[..., None], is_later & plan.renew[..., None])
    update = is_head & plan.update[..., None]
    active = jnp.ones(shape, bool) if phases == 1 else has | fresh
    partial = jnp.any((plan.phase != 0)[:, :, None, :] & (plan.phase[:, :, None, :] != kinds[:, None]), axis=-1)
    opens = active & (jnp.cumsum(active, axis=-1) == 1)
    closes = active & (jnp.cumsum(active[..., ::-1], axis=-1)[..., ::-1] == 1)

    word = jnp.arange(blocks, dtype=jnp.int32)[None, :, None] << BLOCK
    word = word + (kinds << PHASE) + ACTIVE
    for bit, mask in ((FRESH, fresh), (UPDATE, update), (PARTIAL, partial), (OPENS, opens), (CLOSES, closes)):
        word = word + jnp.where(mask, bit, 0)
    words, active = word.reshape(batch, -1), active.reshape(batch, -1)
    if phases > 1:  # bring the active ones to the front
        order = jnp.argsort(~active, axis=1, stable=True)
        words = jnp.take_along_axis(jnp.where(active, words, 0), order, axis=1)
        last = jnp.sum(active, axis=1, keepdims=True) - 1
        idle = jnp.take_along_axis(words, jnp.maximum(last, 0), axis=1) >> BLOCK << BLOCK
        words = jnp.where(words > 0, words, idle)
    total = jnp.max(jnp.sum(active, axis=1, dtype=jnp.int32), keepdims=True)
    return _versions(words, jnp.maximum(total, 1))


def _versions(words: jax.Array, total: jax.Array) -> Visits:
    """Adds to visits [B, V] what they know of their neighbours: which of them share weights."""
    update, fresh, active = ((words & bit) != 0 for bit in (UPDATE, FRESH, ACTIVE))
    updates = jnp.cumsum(update, axis=1, dtype=jnp.int32)
    enters = fresh | jnp.pad(update[:, :-1], [(0, 0), (1, 0)], constant_values=True)
    follows = jnp.pad(fresh[:, 1:] | ~active[:, 1:], [(0, 0), (0, 1)], constant_values=True)
    index = jnp.arange(words.shape[1], dtype=jnp.int32)
    renewed = jax.lax.cummax(jnp.where(fresh, index, -1), axis=1)
    updated = jax.lax.cummax(jnp.where(update, index, -1), axis=1)
    updated = jnp.pad(updated[:, :-1], [(0, 0), (1, 0)], constant_values=-1)
    initial = (renewed >= 0) & (updated < renewed)
    for bit, mask in ((ENTERS, enters), (LEAVES, update | follows), (INITIAL, initial)):
        words = words + jnp.where(mask & active, bit, 0)
    return Visits(words, updates - update, total)


def momentum_of(
    plan: Plan, momentum: jax.Array, momentum_sum: jax.Array, chunk_size: int
) -> tuple[jax.Array, jax.Array]:
    """Returns each block's mean momentum at its update [B, K, N], and the sum of the unfinished chunk [B, N].

    Args:
      plan: of the row.
      momentum: [B, K, T, N].
      momentum_sum: [B, N], of the chunk that the row stands in.
      chunk_size: tokens per update.
    """
    head, tail, later = (
        jnp.sum(jnp.where((plan.write & (plan.phase == kind))[..., None], momentum, 0), axis=2)
        for kind in (HEAD, TAIL, LATER)
    )
    fresh, update, renew = (x[..., None] for x in (plan.fresh, plan.update, plan.renew))
    keep = jnp.where(fresh | update | renew, 0.0, 1.0).astype(momentum.dtype)
    add = jnp.where(renew, later, jnp.where(update, tail, head))
    add = add.at[:, 0].add(keep[:, 0] * momentum_sum)

    def compose(a, b):
        return a[0] * b[0], b[0] * a[1] + b[1]

    _, ends = jax.lax.associative_scan(compose, (jnp.broadcast_to(keep, add.shape), add), axis=1)
    starts = jnp.concatenate([momentum_sum[:, None], ends[:, :-1]], axis=1)
    means = (jnp.where(fresh, 0, starts) + head) / chunk_size
    return means, ends[:, -1]

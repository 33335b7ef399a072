"""The list of visits against a row followed token by token."""

import functools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.ttt import visits

pytestmark = pytest.mark.core


def follow(valid, reset, count, chunk):
    """Per valid token: (updates of the row before it, whether its document's weights are still the initial ones)."""
    updates, initial, seen = 0, False, {}
    for t in range(len(valid)):
        if reset[t]:
            count, initial = 0, True
        if valid[t]:
            seen[t] = (updates, initial)
            count += 1
            if count == chunk:
                updates, count, initial = updates + 1, 0, False
    return seen, updates, initial, count


def replay(words, slots, phase, size):
    """The same from a row's visits, checking what they say of each other; and which tokens' gradients are kept."""
    seen, updates, initial, kept, opened = {}, 0, False, [], set()
    active = [int(word) for word in words if word & visits.ACTIVE]
    for n, (word, slot) in enumerate(zip(active, slots, strict=False)):
        block, kind = word >> visits.BLOCK, (word >> visits.PHASE) & 3
        fresh, update = bool(word & visits.FRESH), bool(word & visits.UPDATE)
        enters = n == 0 or fresh or bool(active[n - 1] & visits.UPDATE)
        leaves = n + 1 == len(active) or update or bool(active[n + 1] & visits.FRESH)
        assert bool(word & visits.ENTERS) == enters and bool(word & visits.LEAVES) == leaves
        assert bool(word & visits.OPENS) == (block not in opened)
        assert bool(word & visits.CLOSES) == (n + 1 == len(active) or active[n + 1] >> visits.BLOCK != block)
        opened.add(block)
        if fresh:
            initial, kept = True, []
        assert slot == updates and bool(word & visits.INITIAL) == initial
        mine = np.flatnonzero(phase[block] == kind) + block * size
        others = np.any((phase[block] != 0) & (phase[block] != kind))
        assert bool(word & visits.PARTIAL) == others
        seen |= {int(t): (updates, initial) for t in mine}
        kept += [int(t) for t in mine]
        if update:
            updates, initial, kept = updates + 1, False, []
    return seen, updates, initial, kept


# chunk, size of a block, blocks of a row
SIZES = ((1, 1, 5), (4, 4, 6), (5, 3, 4), (8, 2, 6), (9, 4, 1), (9, 7, 3))


@functools.partial(jax.jit, static_argnames=("chunk", "size"))
def planned(valid, reset, count, chunk, size):
    plan = visits.make_plan(valid, reset, count, chunk, size)
    return plan, visits.make_visits(plan, 3)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_visits_are_the_row_token_by_token(data):
    chunk, size, blocks = data.draw(st.sampled_from(SIZES))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    shape = (2, blocks * size)
    valid = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    reset = rng.random(shape) < data.draw(st.sampled_from([0.0, 0.1, 0.5]))
    count = rng.integers(0, chunk, 2).astype(np.int32)
    plan, work = planned(valid, reset, count, chunk, size)
    words, slots, phase, write = (np.asarray(x) for x in (work.words, work.slots, plan.phase, plan.write))
    for row in range(2):
        seen, updates, initial, left = follow(valid[row], reset[row], int(count[row]), chunk)
        got, got_updates, got_initial, kept = replay(words[row], slots[row], phase[row], size)
        assert (got, got_updates, got_initial) == (seen, updates, initial)
        assert plan.count[row] == left
        pending = [t for t in kept if write[row].ravel()[t]]  # what the unfinished chunk is made of
        begun_here = left - (0 if updates or reset[row].any() else int(count[row]))
        assert len(pending) == begun_here
    assert work.total[0] == max(1, *((words[row] & visits.ACTIVE).astype(bool).sum() for row in range(2)))

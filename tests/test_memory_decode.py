"""The memory of one token a row, read layer by layer and written in all at once, against `ttt_memory`'s reference."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_ttt import BATCH, CHUNK, make_inputs, make_masks, relative

from pallas_kernels import FastWeights, init_memory_state, ttt_memory
from pallas_kernels.ttt import decode

pytestmark = pytest.mark.core
LAYERS, LENGTH = 2, 2 * CHUNK + 3


def stacked(seed, dtype=np.float32):
    """Arguments and states of all layers, whose rows stand at one place of their chunks in every layer."""
    per_layer = [make_inputs(LENGTH, seed=seed + layer, dtype=dtype) for layer in range(LAYERS)]
    counts = per_layer[0][1].count
    per_layer = [(arguments, state._replace(count=counts)) for arguments, state in per_layer]
    return jax.tree.map(lambda *leaves: np.stack(leaves), *per_layer)


@functools.partial(jax.jit, static_argnames="read_out")
def token_by_token(arguments, state, fresh, valid, read_out):
    """Outputs [Y, B, L, N, D] and the states at the end; rows of `fresh` start anew at their first valid token."""
    *tokens, init = arguments
    read = jax.vmap(functools.partial(decode.read, read_out=read_out))

    def step(carry, token):
        state, fresh = carry
        tokens, valid = token

        def begun(w, w0):
            return jnp.where(fresh[:, None, None, None], w0[:, None], w)

        out, gradient = read(*tokens, init, FastWeights(*map(begun, state.weights, init)))
        state = decode.write(state, init, gradient, fresh, valid, chunk_size=CHUNK)
        return (state, fresh & ~valid), jnp.where(valid[:, None, None], out, 0)

    by_token = [jnp.moveaxis(x, 2, 0) for x in tokens]
    (state, _), out = jax.lax.scan(step, (state, fresh), (by_token, valid.T))
    return jnp.moveaxis(out, 0, 2), state


@functools.partial(jax.jit, static_argnames="read_out")
def wanted(arguments, state, fresh, valid, read_out):
    def layer(arguments, state):
        first = init_memory_state(arguments[-1], BATCH)
        state = jax.tree.map(lambda x, y: jnp.where(fresh.reshape(-1, *[1] * (x.ndim - 1)), x, y), first, state)
        options = dict(chunk_size=CHUNK, valid=valid, read_out=read_out, implementation="reference")
        return ttt_memory(*arguments, state, **options)

    return jax.vmap(layer)(arguments, state)


@pytest.mark.parametrize("read_out", ["full", "difference"])
@pytest.mark.parametrize("seed", range(3))
def test_it_is_ttt_memory(read_out, seed):
    arguments, state = stacked(seed)
    valid = make_masks(LENGTH, seed)[0]
    fresh = np.arange(BATCH) == seed
    valid[fresh, 0] = True  # what a row that has not begun holds is not looked at
    out, end = token_by_token(arguments, state, fresh, valid, read_out)
    right, right_end = wanted(arguments, state, fresh, valid, read_out)
    assert np.array_equal(end.count, right_end.count)
    assert relative(out, right) < 1e-5
    for got, want in zip(end[:4], right_end[:4], strict=True):
        assert relative(got, want) < 1e-5


def test_gradients():
    arguments, state = stacked(0)
    valid, fresh = make_masks(LENGTH, 1)[0], np.asarray([True, False, False])
    valid[0, 0] = True

    def loss(run, arguments, floats):
        out, end = run(arguments, type(state)(*floats, state.count), fresh, valid, "difference")
        draws = np.random.default_rng(2)
        return sum(jnp.sum(x * draws.normal(size=x.shape).astype("f")) for x in jax.tree.leaves((out, end[:4])))

    got, want = (
        jax.grad(functools.partial(loss, run), argnums=(0, 1))(arguments, tuple(state[:4]))
        for run in (token_by_token, wanted)
    )
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative(ours, theirs) < 1e-5


def test_bfloat16():
    arguments, state = stacked(0)
    narrow = *(jnp.asarray(x, jnp.bfloat16) for x in arguments[:3]), *arguments[3:]
    everyone, nobody = np.ones((BATCH, LENGTH), bool), np.zeros(BATCH, bool)
    out, end = token_by_token(narrow, state, nobody, everyone, "full")
    right, right_end = wanted(arguments, state, nobody, everyone, "full")
    assert out.dtype == jnp.bfloat16 and end.pending.gate.dtype == jnp.float32
    assert relative(out, right) < 1e-2 and relative(end[:4], right_end[:4]) < 1e-2


def test_the_difference_is_zero_until_something_was_written():
    arguments, _ = stacked(0)
    state = jax.vmap(lambda init: init_memory_state(init, BATCH))(arguments[-1])
    valid, fresh = np.ones((BATCH, LENGTH), bool), np.ones(BATCH, bool)
    out, _ = token_by_token(arguments, state, fresh, valid, "difference")
    assert not np.any(out[:, :, :CHUNK]) and np.all(np.any(out[:, :, CHUNK:], axis=(0, 3, 4)))

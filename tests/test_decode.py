"""swa_decode: every backend against the dense reference, and the reference against loops over the past."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import swa_decode
from pallas_kernels.swa import decode_tpu, ring

pytestmark = pytest.mark.core
GPU = ("triton",) if jax.default_backend() == "gpu" else ()  # elsewhere tests/test_triton.py interprets its kernel
IMPLEMENTATIONS = [None, "xla", *GPU, "pallas"]
TOLERANCE = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}
FLOATS = (0, 1, 2, 3, 4)


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def make_inputs(count, heads, kv_heads, dim=8, dtype=jnp.float32, seed=0):
    """Rows of every phase: the first token, sinks only, a cache half full, one just full, rings that went round."""
    rng = np.random.default_rng(seed)
    position = jnp.asarray(
        [0, 1, count // 2, count, count + 3, 7 * count + 5, *rng.integers(0, 3 * count, 2)], jnp.int32
    )
    rows = len(position)
    shapes = ((rows, heads, dim), *[(rows, kv_heads, dim)] * 2, *[(rows, count, kv_heads, dim)] * 2)
    return *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), position


@pytest.fixture
def small_blocks(monkeypatch):
    """Several blocks in a small cache, the last of which overlaps the one before."""
    monkeypatch.setattr(decode_tpu, "BLOCK_BYTES", 2**16)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "sink_slots,count,heads,dim,window,sinks",
    [(0, 13, (2, 2), 8, 13, 0), (3, 41, (3, 1), 16, 6, 2), (5, 137, (8, 2), 32, 1, 5), (4, 101, (24, 8), 8, 97, 4)],
)
def test_matches_reference(small_blocks, implementation, dtype, sink_slots, count, heads, dim, window, sinks):
    inputs = make_inputs(count, *heads, dim, dtype)
    run = jax.jit(functools.partial(swa_decode, sink_slots=sink_slots, implementation=implementation))
    got = run(*inputs, window=jnp.int32(window), sinks=jnp.int32(sinks))
    wide = (*(x.astype(jnp.float32) for x in inputs[:5]), inputs[5])
    want = swa_decode(*wide, sink_slots=sink_slots, window=window, sinks=sinks, implementation="reference")
    assert got.dtype == dtype
    assert relative(got, want) < TOLERANCE[dtype]


@pytest.mark.parametrize("implementation", [*IMPLEMENTATIONS, "reference"])
def test_one_of_many_layers(small_blocks, implementation):
    """And gradients, which are zero in the caches of the other layers."""
    *inputs, position = make_inputs(41, 4, 2)
    stacks = [jnp.stack([x[::-1], x, -x]) for x in inputs[3:]]
    options = {"sink_slots": 3, "window": 6, "sinks": 2, "implementation": implementation}

    def run(q, k, v, keys, values, layer):
        out = swa_decode(q, k, v, keys, values, position, **options, layer=layer)
        return jnp.sum(jnp.sin(out)), out

    both = jax.jit(jax.grad(run, FLOATS, has_aux=True))
    got, out = both(*inputs[:3], *stacks, jnp.int32(1))
    want, right = jax.jit(jax.grad(functools.partial(run, layer=None), FLOATS, has_aux=True))(*inputs)
    assert relative(out, right) < 1e-5
    for ours, theirs in zip(got[:3], want[:3], strict=True):
        assert relative(ours, theirs) < 1e-5
    for ours, theirs in zip(got[3:], want[3:], strict=True):
        assert relative(ours[1], theirs) < 1e-5 and not np.any(ours[::2])


def test_reference_is_the_definition():
    """The past is written into slots token by token; what is wanted is computed from the past, not from the slots."""
    rng = np.random.default_rng(0)
    sink_slots, ring, window, sinks = 3, 5, 4, 2
    for tokens in (1, 3, 6, 19):
        keys, values = rng.normal(size=(2, sink_slots + ring, 1, 4)) * 100  # what a slot holds before it is filled
        past = rng.normal(size=(2, tokens, 4))
        for p in range(tokens):
            slot = p if p < sink_slots else sink_slots + (p - sink_slots) % ring
            keys[slot, 0], values[slot, 0] = past[:, p]
        q, own = rng.normal(size=(2, 4)), rng.normal(size=(2, 4))
        seen = [p for p in range(tokens) if tokens - p < window or p < sinks]
        k, v = (np.concatenate([past[i, seen], own[i : i + 1]]) for i in range(2))
        weights = np.exp(q @ k.T * 0.5)
        want = weights @ v / weights.sum(-1, keepdims=True)
        with jax.enable_x64(True):
            arrays = (q[None], own[:1][None], own[1:][None], keys[None], values[None], np.asarray([tokens]))
            got = swa_decode(
                *map(jnp.asarray, arrays),
                sink_slots=sink_slots,
                window=window,
                sinks=sinks,
                scale=0.5,
                implementation="reference",
            )
        assert relative(got[0], want) < 1e-12


@pytest.mark.parametrize("implementation", [None, *GPU, "pallas"])
def test_gradients(implementation):
    inputs = make_inputs(21, 4, 2)

    def gradients(implementation):
        def loss(*arrays):
            out = swa_decode(*arrays, sink_slots=3, window=jnp.int32(9), sinks=2, implementation=implementation)
            return jnp.sum(jnp.sin(out))

        return jax.jit(jax.grad(loss, FLOATS))(*inputs)

    for got, want in zip(gradients(implementation), gradients("reference"), strict=True):
        assert relative(got, want) < 1e-5


def test_blocks_out_of_sight_are_not_read():
    position = jnp.asarray([0, 9, 40, 46, 70], jnp.int32)  # of 4 + 36 slots in blocks of 8: the newest is in 0 1 4 0 4
    got = ring.blocks_in_sight(8, 4, 40, position, jnp.int32(6), jnp.int32(2))
    want = [[0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [0, 0, 0, 0, 4], [0, 1, 1, 1, 1], [0, 0, 0, 3, 4]]
    assert got.tolist() == want


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"implementation": "cuda"}, ValueError, "cuda"),
        ({"q": jnp.ones((2, 1, 4, 8))}, ValueError, "q has shape"),
        ({"k": jnp.ones((2, 3, 8))}, ValueError, "k has shape"),
        ({"v": jnp.ones((2, 1, 8))}, ValueError, "v has shape"),
        ({"keys": jnp.ones((2, 5, 8))}, ValueError, "keys has shape"),
        ({"keys": jnp.ones((2, 5, 2, 8)), "layer": 0}, ValueError, "keys has shape"),
        ({"sink_slots": 5}, ValueError, "sink_slots=5"),
        ({"values": jnp.ones((2, 6, 2, 8))}, ValueError, "values has shape"),
        ({"values": jnp.ones((2, 5, 2, 8), jnp.bfloat16)}, TypeError, "values is bfloat16"),
        ({"position": jnp.ones(2)}, ValueError, "position is float32"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    k = jnp.ones((2, 2, 8))
    cache = jnp.ones((2, 5, 2, 8))
    arguments = {"q": jnp.ones((2, 4, 8)), "k": k, "v": k, "keys": cache, "values": cache}
    arguments |= {"position": jnp.ones(2, jnp.int32), "sink_slots": 1, "window": 4, **change}
    with pytest.raises(error, match=message):
        swa_decode(**arguments)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="one of them serves here")
@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_a_named_backend_is_never_replaced(name):
    with pytest.raises(NotImplementedError, match=name):
        swa_decode(*make_inputs(5, 2, 1), sink_slots=1, window=2, implementation=name)

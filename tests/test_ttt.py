"""ttt_memory: every backend against the token-by-token reference, and the reference against the definition."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import FastWeights, MemoryState, init_memory_state, ttt_memory
from pallas_kernels.ttt import reference

pytestmark = pytest.mark.core
GPU = ("triton",) if jax.default_backend() == "gpu" else ()  # elsewhere tests/test_triton.py interprets its kernels
BACKENDS = ("xla", *GPU)  # of the tests that need not run every one: interpreted kernels are slow
BATCH, DIM, HIDDEN, CHUNK = 3, 8, 12, 8
NAMES = ("q", "k", "v", "lr", "momentum", "init", "state")


def relative(a, b):
    a, b = (np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(t)]) for t in (a, b))
    return 0.0 if np.array_equal(a, b) else np.linalg.norm(a - b) / np.linalg.norm(b)


def make_weights(rng, *lead, dtype=np.float32):
    shapes = ((HIDDEN, DIM), (HIDDEN, DIM), (DIM, HIDDEN))
    return FastWeights(*(np.asarray(rng.normal(size=(*lead, *s)) / 3, dtype) for s in shapes))


def make_inputs(length, heads=3, seed=0, dtype=np.float32):
    """Returns (q, k, v, lr, momentum, init) and a state whose rows stand at different places."""
    rng = np.random.default_rng(seed)
    shape = (BATCH, length, heads)
    q, k, v = (np.asarray(rng.normal(size=(*shape, DIM)), dtype) for _ in range(3))
    lr = np.asarray(rng.uniform(0.01, 0.3, (*shape, 3)), dtype)
    momentum = np.asarray(rng.uniform(0, 1, shape), dtype)
    count = rng.permutation([0, CHUNK // 2, CHUNK - 1])
    floats = (make_weights(rng, BATCH, heads, dtype=dtype) for _ in range(3))
    momentum_sum = np.asarray(count[:, None] * rng.uniform(0, 1, (BATCH, heads)), dtype)
    state = MemoryState(*floats, momentum_sum, np.asarray(count, np.int32))
    return (q, k, v, lr, momentum, make_weights(rng, heads, dtype=dtype)), state


def make_masks(length, seed=0):
    """Returns random valid and reset, with resets on and off the chunk grid, on invalid tokens and several a chunk."""
    rng = np.random.default_rng(seed)
    valid = rng.random((BATCH, length)) < rng.choice([0.2, 0.7, 1.0], (BATCH, 1))
    reset = rng.random((BATCH, length)) < rng.choice([0.0, 0.1, 0.4], (BATCH, 1))
    if length >= CHUNK:
        valid[0, :CHUNK] = False
        reset[1, :: 2 * CHUNK] = True
    return valid, reset


@functools.partial(jax.jit, static_argnames=("implementation", "read_out"))
def run(arguments, state, valid, reset, **options):
    return ttt_memory(*arguments, state, chunk_size=CHUNK, valid=valid, reset=reset, **options)


@functools.partial(jax.jit, static_argnames=("implementation", "read_out"))
def run_and_differentiate(arguments, state, valid, reset, **options):
    """Returns outputs, the final state, and gradients of a random-weighted sum of all of both."""
    floats, count = (None, None) if state is None else (tuple(state[:4]), state.count)

    def loss(arguments, floats):
        start = None if floats is None else MemoryState(*floats, count)
        out, end = run(arguments, start, valid, reset, **options)
        rng = np.random.default_rng(1)
        terms = (jnp.sum(x * rng.normal(size=x.shape).astype("f")) for x in jax.tree.leaves((out, end[:4])))
        return sum(terms), (out, end)

    gradients, (out, end) = jax.grad(loss, (0, 1), has_aux=True)(arguments, floats)
    return out, end, (*gradients[0], gradients[1])


def assert_matches_reference(arguments, state, valid, reset, implementation, tolerance=1e-5, read_out="full"):
    both = functools.partial(run_and_differentiate, arguments, state, valid, reset, read_out=read_out)
    got_out, got_state, got = both(implementation=implementation)
    out, end, want = both(implementation="reference")
    assert np.array_equal(got_state.count, end.count)
    assert relative(got_out, out) < tolerance
    for name, a, b in zip(MemoryState._fields[:4], got_state[:4], end[:4], strict=True):
        assert relative(a, b) < tolerance, name
    for name, a, b in zip(NAMES, got, want, strict=True):
        if jax.tree.leaves(b):
            assert relative(a, b) < tolerance, name


@pytest.mark.parametrize(
    "heads,given,implementation",
    [(heads, given, name) for name in BACKENDS for heads, given in ((5, False), (3, True))] + [(5, False, "pallas")],
)
def test_matches_reference_without_resets(implementation, heads, given):
    arguments, state = make_inputs(19, heads)
    valid = make_masks(19)[0] if given else None
    assert_matches_reference(arguments, state if given else None, valid, None, implementation)


@pytest.mark.parametrize(
    "length,seeds,implementation",
    [(length, seeds, name) for name in BACKENDS for length, seeds in ((1, 3), (5, 5), (27, 12))]
    + [(1, 2, "pallas"), (27, 3, "pallas")],
)
def test_matches_reference_with_everything_given(implementation, length, seeds):
    for seed in range(seeds):
        arguments, state = make_inputs(length, seed=seed)
        valid, reset = make_masks(length, seed=seed)
        assert_matches_reference(arguments, state, valid, reset, implementation)


@pytest.mark.parametrize(
    "given,implementation", [(given, name) for name in BACKENDS for given in (False, True)] + [(True, "pallas")]
)
def test_matches_reference_in_the_difference(implementation, given):
    arguments, state = make_inputs(27)
    valid, reset = make_masks(27, seed=1) if given else (None, None)
    assert_matches_reference(arguments, state if given else None, valid, reset, implementation, read_out="difference")


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas", "reference"])
def test_the_difference_is_zero_until_something_was_written(implementation):
    """Bit for bit in a document's first chunk, and to rounding where the learning rates are zero."""
    (q, k, v, lr, momentum, init), _ = make_inputs(27)
    reset = np.zeros(q.shape[:2], bool)
    reset[0, 11] = True
    blank = {"implementation": implementation, "read_out": "difference"}
    out, _ = run((q, k, v, lr, momentum, init), None, None, reset, **blank)
    first = np.zeros(q.shape[:2], bool)
    first[:, :CHUNK], first[0, 11 : 11 + CHUNK] = True, True
    assert not np.any(np.asarray(out)[first]) and np.all(np.any(np.asarray(out)[~first], axis=(-1, -2)))
    silent, _ = run((q, k, v, 0 * lr, momentum, init), None, None, reset, **blank)
    assert np.linalg.norm(silent) < 1e-6 * np.linalg.norm(out)


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas", "reference"])
def test_smaller_values_are_smaller_learning_rates(implementation):
    """`-<f(W, k), v>` is linear in v, which nothing else sees."""
    (q, k, v, lr, momentum, init), _ = make_inputs(27)
    less, end = run((q, k, 0.3 * v, lr, momentum, init), None, None, None, implementation=implementation)
    slower, same = run((q, k, v, 0.3 * lr, momentum, init), None, None, None, implementation=implementation)
    assert relative(less, slower) < 1e-5
    assert relative(end.weights.down, same.weights.down) < 1e-5


@pytest.mark.parametrize("implementation", BACKENDS)
def test_any_split_gives_the_same(implementation):
    arguments, state = make_inputs(25)
    rng = np.random.default_rng(3)
    for split in range(6):
        valid, reset = make_masks(25, seed=split)
        if split % 2 == 0:
            valid, reset = np.ones_like(valid), np.zeros_like(reset)
        start = state if split > 2 else init_memory_state(arguments[5], BATCH)
        whole, end = run(arguments, start, valid, reset, implementation=implementation)
        pieces, position, now = [], 0, start
        sizes = [1] * 25 if split == 0 else rng.permutation([1, 1, 1, 9, 13])
        for size in sizes:
            cut = slice(position, position + size)
            tokens = (*(x[:, cut] for x in arguments[:5]), arguments[5])
            out, now = run(tokens, now, valid[:, cut], reset[:, cut], implementation=implementation)
            pieces.append(out)
            position += size
        assert relative(np.concatenate(pieces, axis=1), whole) < 1e-5
        assert relative(now, end) < 1e-5
        if split == 0:  # training passes none of the three
            assert relative(run(arguments, None, None, None, implementation=implementation), (whole, end)) < 1e-5


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas", "reference"])
def test_nothing_but_padding_leaves_the_state(implementation):
    arguments, state = make_inputs(27)
    valid, reset = np.zeros((2, BATCH, 27), bool)
    out, end = run(arguments, state, valid, reset, implementation=implementation)
    assert relative(end, state) == 0 and not np.any(out)


@pytest.mark.parametrize("implementation", [*BACKENDS, "reference"])
def test_invalid_tokens_are_as_if_absent(implementation):
    arguments, state = make_inputs(25)
    keep = np.sort(np.random.default_rng(0).permutation(25)[:13])
    valid, reset = np.isin(np.arange(25), keep) & np.ones((BATCH, 1), bool), np.zeros((BATCH, 25), bool)
    out, end = run(arguments, state, valid, reset, implementation=implementation)
    dense = (*(x[:, keep] for x in arguments[:5]), arguments[5])
    want = run(dense, state, valid[:, keep], reset[:, keep], implementation=implementation)
    assert relative((np.asarray(out)[:, keep], end), want) < 1e-5
    assert not np.delete(out, keep, axis=1).any()


@pytest.mark.parametrize("implementation", [*BACKENDS, "reference"])
def test_reset_starts_anew(implementation):
    arguments, state = make_inputs(25)
    valid, reset = np.ones((BATCH, 25), bool), np.isin(np.arange(25), [2, 12]) & np.ones((BATCH, 1), bool)
    out, end = run(arguments, state, valid, reset, implementation=implementation)
    document = (*(x[:, 12:] for x in arguments[:5]), arguments[5])
    start = init_memory_state(arguments[5], BATCH)
    want = run(document, start, valid[:, 12:], np.zeros((BATCH, 13), bool), implementation=implementation)
    assert relative((np.asarray(out)[:, 12:], end), want) < 1e-5


def test_closed_form_gradient():
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        weights, direction = make_weights(rng, dtype=np.float64), make_weights(rng, dtype=np.float64)
        k, v = (jnp.asarray(rng.normal(size=DIM)) for _ in range(2))

        def loss(step):
            moved = jax.tree.map(lambda w, d: w + step * d, weights, direction)
            return -jnp.vdot(reference.apply(moved, k), v)

        closed = reference.loss_gradient(weights, k, v)
        assert relative(closed, jax.grad(lambda w: -jnp.vdot(reference.apply(w, k), v))(weights)) < 1e-12
        slope = sum(jnp.vdot(g, d) for g, d in zip(closed, direction, strict=True))
        assert abs((loss(1e-5) - loss(-1e-5)) / 2e-5 - slope) < 1e-8 * abs(slope)


def test_chunk_update_is_the_definition():
    """One chunk of one row and head by jax.grad of the inner loss at the normalised weights, in float64."""
    with jax.enable_x64(True):
        (q, k, v, lr, momentum, init), start = make_inputs(CHUNK, dtype=np.float64)
        start = init_memory_state(init, BATCH)._replace(weights=start.weights, velocity=start.velocity)
        out, end = run((q, k, v, lr, momentum, init), start, None, None, implementation="reference")
        row, head = 1, 2
        old, velocity = (jax.tree.map(lambda x: x[row, head], t) for t in (start.weights, start.velocity))
        first = jax.tree.map(lambda x: x[head], init)

        @jax.jit
        def definition(q, k, v, lr, momentum):
            norm = functools.partial(jnp.linalg.norm, axis=-1, keepdims=True)
            normalised = jax.tree.map(lambda w, w0: w / norm(w) * norm(w0), old, first)
            slopes = jax.jacrev(lambda w: -jnp.sum(reference.apply(w, k) * v, axis=-1))(normalised)
            total = FastWeights(*(jnp.tensordot(lr[:, i], g, 1) for i, g in enumerate(slopes)))
            moved = jax.tree.map(lambda m, g: momentum.mean() * m - g, velocity, total)
            return reference.apply(old, q), jax.tree.map(jnp.add, normalised, moved), moved

        want = definition(*(x[row, :, head] for x in (q, k, v, lr, momentum)))
        got = out[row, :, head], *(jax.tree.map(lambda x: x[row, head], t) for t in (end.weights, end.velocity))
        assert relative(got, want) < 1e-10


def test_reference_gradients_against_finite_differences():
    with jax.enable_x64(True):
        arguments, state = make_inputs(11, dtype=np.float64)
        valid, reset = make_masks(11, seed=1)
        inputs = (arguments, tuple(state[:4]))
        rng = np.random.default_rng(5)
        direction = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape)), inputs)

        @jax.jit
        def loss(step):
            arguments, floats = jax.tree.map(lambda x, d: x + step * d, inputs, direction)
            out, end = run(arguments, MemoryState(*floats, state.count), valid, reset, implementation="reference")
            return sum(jnp.sum(jnp.sin(x + 1)) for x in jax.tree.leaves((out, end[:4])))

        slope = (loss(1e-5) - loss(-1e-5)) / 2e-5
        assert slope.dtype == jnp.float64
        gradient = jax.grad(loss)(0.0)
        assert abs(slope - gradient) < 1e-6 * abs(slope)


@pytest.mark.parametrize("implementation", BACKENDS)
def test_zero_rows_have_finite_gradients(implementation):
    arguments, _ = make_inputs(19, heads=5)
    init = arguments[5]
    init.down[:], init.gate[:, 0] = 0, 0
    _, _, gradients = run_and_differentiate(arguments, None, None, None, implementation=implementation)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas"])
def test_bfloat16(implementation):
    arguments, state = make_inputs(19)
    arguments = (*(x.astype(jnp.bfloat16) for x in arguments[:3]), *arguments[3:])
    out, end, gradients = run_and_differentiate(arguments, state, None, None, implementation=implementation)
    want, want_end = run(arguments, state, None, None, implementation="reference")
    assert out.dtype == gradients[0].dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(end[:4])} == {jnp.dtype("float32")}
    assert relative(out, want) < 1e-2
    assert relative(end, want_end) < 1e-2
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves(gradients))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="one of them serves here")
@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_a_named_backend_is_never_replaced(name):
    with pytest.raises(NotImplementedError, match=name):
        ttt_memory(*make_inputs(2)[0], chunk_size=CHUNK, implementation=name)


def test_pallas_takes_float32_and_bfloat16():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="q is float64"):
        ttt_memory(*make_inputs(2, dtype=np.float64)[0], chunk_size=CHUNK, implementation="pallas")


def test_bad_arguments_are_named():
    (q, k, v, lr, momentum, init), state = make_inputs(4)
    good = {"q": q, "k": k, "v": v, "lr": lr, "momentum": momentum, "init": init, "chunk_size": CHUNK}
    cases = [
        ({"implementation": "cuda"}, ValueError, "cuda"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0"),
        ({"q": q[0]}, ValueError, "q has shape"),
        ({"k": k[:, :3]}, ValueError, "k has shape"),
        ({"v": v.astype(jnp.bfloat16)}, TypeError, "v is bfloat16"),
        ({"lr": lr[..., :2]}, ValueError, "lr has shape"),
        ({"momentum": momentum.astype(int)}, TypeError, "momentum is int"),
        ({"init": tuple(init)}, TypeError, "init is tuple"),
        ({"init": init._replace(down=init.up)}, ValueError, "init.down has shape"),
        ({"state": state._replace(count=jnp.zeros(2, int))}, ValueError, "state.count has shape"),
        ({"state": state._replace(weights=init)}, ValueError, "state.weights.gate has shape"),
        ({"valid": jnp.ones((BATCH, 4))}, TypeError, "valid is float32"),
        ({"reset": jnp.ones((BATCH, 3), bool)}, ValueError, "reset has shape"),
    ]
    for change, error, message in cases:
        with pytest.raises(error, match=message):
            ttt_memory(**{**good, **change})

"""swa_attention: every backend against the dense reference, and the reference against loops."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import swa_attention
from pallas_kernels.swa import pallas_tpu

pytestmark = pytest.mark.core
GPU = ("triton",) if jax.default_backend() == "gpu" else ()  # elsewhere tests/test_triton.py interprets its kernels
BACKENDS = ("xla", *GPU)  # of the tests that need not run every one: interpreted kernels are slow


def relative(a, b, least=0.0):
    """Norm of the difference over the norm of b, or over `least` where b is smaller."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / max(np.linalg.norm(b), least)


def make_inputs(batch, length, heads, kv_heads, dim=8, dtype=jnp.float32, seed=0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = ((batch, length, h, dim) for h in (heads, kv_heads, kv_heads))
    return tuple(jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True))


def make_segments(length):
    """Two rows of documents; the second begins and the first ends with padding."""
    edges = np.asarray([0.03, 0.4, 0.9]) * length
    row = np.searchsorted(edges, np.arange(length), side="right")
    return jnp.asarray(np.stack([(row + 1) % 4, row]), jnp.int32)


@functools.partial(jax.jit, static_argnames=("implementation", "static"))
def outputs_and_gradients(q, k, v, window, sinks, segment_ids, *, implementation, static=()):
    window, sinks = static or (window, sinks)

    def loss(q, k, v):
        out = swa_attention(q, k, v, window=window, sinks=sinks, segment_ids=segment_ids, implementation=implementation)
        weights = np.random.default_rng(9).normal(size=out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return out, *gradients


def assert_matches_reference(inputs, window, sinks, segments, implementation, static=()):
    got = outputs_and_gradients(*inputs, window, sinks, segments, implementation=implementation, static=static)
    want = outputs_and_gradients(*inputs, window, sinks, segments, implementation="reference")
    least = 0.1 * np.linalg.norm(want[0])  # with one key in sight the gradients of q and k are zero
    for name, a, b in zip(("out", "q", "k", "v"), got, want, strict=True):
        assert relative(a, b, least) < 1e-5, name


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window,sinks", [(1, 0), (1, 200), (7, 4), (100, 9), (150, 1), (260, 40), (400, 4)])
def test_matches_reference(implementation, packed, window, sinks):
    inputs = make_inputs(2, 269, 6, 3)
    segments = make_segments(269) if packed else None
    assert_matches_reference(inputs, jnp.int32(window), jnp.int32(sinks), segments, implementation)


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas"])
@pytest.mark.parametrize(
    "length,heads,static",
    [(1, (4, 2), (1, 0)), (37, (5, 5), (5, 2)), (269, (3, 1), (2**40, 0))],
)
def test_static_window_ragged_length_and_groups(implementation, length, heads, static):
    inputs = make_inputs(1, length, *heads)
    window, sinks = min(static[0], 1000), static[1]
    assert_matches_reference(inputs, jnp.int32(window), jnp.int32(sinks), None, implementation, static)


def test_reference_is_the_definition():
    length, window, sinks = 14, 3, 2
    segments = np.asarray([0, 1, 1, 1, 1, 1, 1, 1, 5, 5, 5, 5, 5, 0])
    q, k, v = (np.asarray(x, np.float64) for x in make_inputs(1, length, 2, 1))
    want = np.zeros_like(q)
    for i in np.flatnonzero(segments):
        start = np.flatnonzero(segments == segments[i])[0]
        seen = [j for j in range(start, i + 1) if i - j < window or j - start < sinks]
        for head in range(2):
            weights = np.exp(k[0, seen, 0] @ q[0, i, head] * 0.5)
            want[0, i, head] = weights @ v[0, seen, 0] / weights.sum()
    with jax.enable_x64(True):
        args = (jnp.asarray(x) for x in (q, k, v))
        options = {"window": window, "sinks": sinks, "segment_ids": jnp.asarray(segments)[None], "scale": 0.5}
        got = swa_attention(*args, **options, implementation="reference")
        assert got.dtype == jnp.float64
        assert relative(got, want) < 1e-12


@pytest.mark.parametrize("implementation", BACKENDS)
def test_packed_row_equals_its_documents(implementation):
    q, k, v = make_inputs(1, 150, 4, 2)
    pieces = ((0, 70), (70, 140))  # then padding
    segments = jnp.asarray(np.repeat([3, 1, 0], [70, 70, 10]))[None]
    attend = jax.jit(functools.partial(swa_attention, window=9, sinks=4, implementation=implementation))
    packed = attend(q, k, v, segment_ids=segments)
    for a, b in pieces:
        alone = attend(q[:, a:b], k[:, a:b], v[:, a:b])
        assert relative(packed[:, a:b], alone) < 1e-5
    assert not packed[:, 140:].any()


@pytest.mark.parametrize("implementation", BACKENDS)
def test_traced_window_and_sinks_compile_once(implementation):
    q, k, v = make_inputs(1, 140, 2, 1, dim=4)
    traces = []

    @functools.partial(jax.jit, static_argnames="implementation")
    def attend(window, sinks, implementation):
        traces.append(implementation)
        return swa_attention(q, k, v, window=window, sinks=sinks, implementation=implementation)

    for window, sinks in np.random.default_rng(0).integers((1, 0), (200, 160), (50, 2), dtype=np.int32):
        got, want = attend(window, sinks, implementation), attend(window, sinks, "reference")
        assert relative(got, want) < 1e-5
    assert traces == [implementation, "reference"]


@pytest.mark.parametrize("implementation", [*BACKENDS, "pallas"])
def test_bfloat16(implementation):
    inputs = make_inputs(2, 269, 6, 3, dtype=jnp.bfloat16)
    got = outputs_and_gradients(*inputs, jnp.int32(30), jnp.int32(4), None, implementation=implementation)
    want = outputs_and_gradients(*inputs, jnp.int32(30), jnp.int32(4), None, implementation="reference")
    assert all(x.dtype == jnp.bfloat16 for x in got)
    assert max(relative(a, b) for a, b in zip(got, want, strict=True)) < 1e-2


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="one of them serves here")
@pytest.mark.parametrize("implementation", ["pallas"])
@pytest.mark.parametrize("packed", [False, True])
def test_rows_whose_key_gradients_are_too_long_to_lie_in_vmem(monkeypatch, packed, implementation):
    monkeypatch.setattr(pallas_tpu, "ROW_BYTES", 0)
    inputs = make_inputs(2, 301, 4, 2)  # a length of its own, as programs are kept by shapes
    segments = make_segments(301) if packed else None
    program = jax.make_jaxpr(functools.partial(outputs_and_gradients, implementation=implementation))
    text = str(program(*inputs, 90, 9, segments))
    assert "swa_key_gradient_kernel" in text and "swa_gradient_kernel" not in text
    assert_matches_reference(inputs, jnp.int32(90), jnp.int32(9), segments, implementation)


@pytest.mark.parametrize("name", ["pallas", "triton"])
def test_a_named_backend_is_never_replaced(name):
    with pytest.raises(NotImplementedError, match=name):
        swa_attention(*make_inputs(1, 4, 2, 1), window=2, implementation=name)


def test_pallas_takes_float32_and_bfloat16():
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="q is float64"):
        swa_attention(*make_inputs(1, 4, 2, 1, dtype=jnp.float64), window=2, implementation="pallas")


@pytest.mark.parametrize(
    "change,error,message",
    [
        ({"implementation": "cuda"}, ValueError, "cuda"),
        ({"window": 0}, ValueError, "window=0"),
        ({"window": 1.5}, TypeError, "window=1.5"),
        ({"sinks": -1}, ValueError, "sinks=-1"),
        ({"q": jnp.ones((1, 4, 3, 8))}, ValueError, "multiple"),
        ({"q": jnp.ones((4, 2, 8))}, ValueError, "q has shape"),
        ({"k": jnp.ones((1, 5, 2, 8))}, ValueError, "k has shape"),
        ({"v": jnp.ones((1, 4, 1, 8))}, ValueError, "v has shape"),
        ({"k": jnp.ones((1, 4, 2, 8), jnp.bfloat16)}, TypeError, "k is bfloat16"),
        ({"q": jnp.ones((1, 4, 4, 8), jnp.int32)}, TypeError, "q is int32"),
        ({"segment_ids": jnp.ones((1, 3), jnp.int32)}, ValueError, "segment_ids has shape"),
        ({"segment_ids": jnp.ones((1, 4))}, TypeError, "segment_ids is float32"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    q, k, v = make_inputs(1, 4, 4, 2)
    arguments = {"q": q, "k": k, "v": v, "window": 2, **change}
    with pytest.raises(error, match=message):
        swa_attention(**arguments)

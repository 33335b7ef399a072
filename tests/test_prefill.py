"""Attention of a piece of a prompt to a ring cache: the kernel for TPUs, interpreted, against plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from test_decode import TOLERANCE, relative

from pallas_kernels.swa import prefill, prefill_tpu, ring

pytestmark = pytest.mark.core


def make_inputs(length, count, heads, kv_heads, dim, dtype, seed=0):
    """Rows of every phase: nothing read, sinks only, a cache half full, one just full, rings that went round."""
    rng = np.random.default_rng(seed)
    position = np.asarray([0, 2, count // 2, count, 7 * count + 5], np.int32)
    rows = len(position)
    lengths = np.asarray([length, length - 1, 1, length, length // 2], np.int32)
    shapes = ((rows, length, heads, dim), *[(rows, length, kv_heads, dim)] * 2, *[(rows, count, kv_heads, dim)] * 2)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes], jnp.asarray(position), jnp.asarray(lengths)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    "length,sink_slots,count,heads,dim,window,sinks",
    [(16, 0, 13, (2, 2), 8, 13, 0), (150, 3, 41, (3, 1), 16, 6, 2), (33, 5, 137, (8, 2), 32, 132, 5)],
)
def test_the_kernel_is_plain_jax(monkeypatch, dtype, length, sink_slots, count, heads, dim, window, sinks):
    monkeypatch.setattr(prefill_tpu, "KEYS", 32)  # several blocks, of which some are out of sight
    monkeypatch.setattr(prefill_tpu, "COLUMNS", 128)
    floats, position, lengths = make_inputs(length, count, *heads, dim, dtype)
    sizes = dict(sink_slots=sink_slots, scale=0.3)
    with pltpu.force_tpu_interpret_mode():
        got = jax.jit(functools.partial(prefill.attend, implementation="pallas", **sizes))(
            *floats, position, lengths, window=jnp.int32(window), sinks=jnp.int32(sinks)
        )
    wide = (x.astype(jnp.float32) for x in floats)
    want = ring.attend(*wide, position, lengths, window=window, sinks=sinks, **sizes)
    assert got.dtype == dtype and np.all(np.isfinite(got))
    for row, real in enumerate(lengths):
        assert relative(got[row, :real], want[row, :real]) < TOLERANCE[dtype]


def test_gradients_are_those_of_plain_jax():
    floats, position, lengths = make_inputs(17, 21, 4, 2, 8, jnp.float32)

    def gradients(implementation):
        def loss(*floats):
            sizes = dict(sink_slots=3, window=9, sinks=2, scale=0.3, implementation=implementation)
            out = prefill.attend(*floats, position, lengths, **sizes)
            real = jnp.arange(17) < lengths[:, None]
            return jnp.sum(jnp.sin(jnp.where(real[..., None, None], out, 0)))

        return jax.jit(jax.grad(loss, (0, 1, 2, 3, 4)))(*floats)

    with pltpu.force_tpu_interpret_mode():
        got = gradients("pallas")
    for ours, theirs in zip(got, gradients("xla"), strict=True):
        assert relative(ours, theirs) < 1e-5


@pytest.mark.parametrize("read", [0, 7, 8, 9, 16, 31, 33, 47, 48, 61, 62, 200])
def test_plain_jax_looks_at_filled_slots_alone(monkeypatch, read):
    """Of a wide cache: what the slots beyond hold is not read, and the rest is what all of it gives."""
    count, sink_slots = 62, 3
    floats, _, _ = make_inputs(9, count, 4, 2, 8, jnp.float32)
    position, lengths = jnp.asarray([read, 0, read // 2, max(read - 1, 0), read]), jnp.asarray([9, 9, 1, 5, 8])
    sizes = dict(sink_slots=sink_slots, window=count - sink_slots, sinks=2, scale=0.3)
    want = ring.attend(*floats, position, lengths, **sizes)
    monkeypatch.setattr(prefill, "WIDE", count)
    looked = next(size for size in (8, 16, 31, 47, count) if read <= size or size == count)
    unread = jnp.arange(count)[:, None, None] >= looked
    floats[3:] = [jnp.where(unread, jnp.nan, cache) for cache in floats[3:]]
    attend = functools.partial(prefill.attend, implementation="xla", **sizes)
    real = (jnp.arange(9) < lengths[:, None])[..., None, None]
    got, gradients = jax.jit(
        lambda *x: (
            attend(*x, position, lengths),
            jax.grad(lambda *x: jnp.sum(attend(*x, position, lengths) * real), (0, 3))(*x),
        )
    )(*floats)
    for row, length in enumerate(lengths):
        assert relative(got[row, :length], want[row, :length]) < 1e-5
    assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_a_named_backend_is_never_replaced():
    floats, position, lengths = make_inputs(17, 21, 4, 2, 8, jnp.float32)
    if jax.default_backend() == "cpu":
        with pytest.raises(NotImplementedError, match="pallas"):
            prefill.attend(
                *floats, position, lengths, sink_slots=3, window=9, sinks=2, scale=1, implementation="pallas"
            )

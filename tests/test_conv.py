"""conv_norm: every backend against the reference, and the reference against loops."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import conv_norm

pytestmark = pytest.mark.core
OPTIONS = {"norm": 1.7, "eps": 0.1}


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def make_inputs(batch, length, heads, dim, taps=4, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (batch, length, heads, dim), dtype)
    return x, jax.random.normal(keys[1], (taps, heads, dim)), 1 + jax.random.normal(keys[2], (dim,))


def documents(batch, length):
    """Ids that change at tokens of their own in each row, also one token after another."""
    starts = np.random.default_rng(3).random((batch, length)) < 0.06
    starts[:, 5:7] = True
    return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def output_and_gradients(x, kernel, scale, **options):
    def loss(x, kernel, scale):
        out = conv_norm(x, kernel, scale, **OPTIONS, **options)
        weights = np.random.default_rng(9).normal(size=out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    interpreted = pltpu.force_tpu_interpret_mode if options["implementation"] == "pallas" else contextlib.nullcontext
    with interpreted():
        gradients, out = jax.grad(loss, (0, 1) if scale is None else (0, 1, 2), has_aux=True)(x, kernel, scale)
    return out, *jax.tree.leaves(gradients)


@pytest.mark.parametrize("implementation", ["xla", "pallas", None])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "shape,taps,normed",
    [
        ((2, 300, 3, 64), 4, True),
        ((1, 1300, 1, 32), 3, True),
        ((1, 17, 5, 128), 4, True),
        ((2, 130, 2, 64), 2, False),
        ((1, 40, 3, 16), 1, True),
    ],
)
def test_matches_reference(implementation, packed, shape, taps, normed):
    x, kernel, scale = make_inputs(*shape, taps)
    given = x, kernel, scale if normed else None
    options = {"segment_ids": documents(*shape[:2]) if packed else None}
    got = output_and_gradients(*given, **options, implementation=implementation)
    want = output_and_gradients(*given, **options, implementation="reference")
    assert len(got) == len(want) == 3 + normed
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-5


def test_rows_of_several_blocks():
    x, kernel, scale = make_inputs(1, 600, 32, 64)
    options = {"segment_ids": documents(1, 600)}
    got = output_and_gradients(x, kernel, scale, **options, implementation="pallas")
    want = output_and_gradients(x, kernel, scale, **options, implementation="reference")
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
def test_bfloat16(implementation):
    x, kernel, scale = make_inputs(1, 150, 3, 64, dtype=jnp.bfloat16)
    got = output_and_gradients(x, kernel, scale, implementation=implementation)
    want = output_and_gradients(x.astype(jnp.float32), kernel, scale, implementation="reference")
    assert got[0].dtype == got[1].dtype == jnp.bfloat16
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-2


def test_reference_is_the_definition():
    x, kernel, scale = make_inputs(1, 6, 2, 5, taps=3)
    ids = jnp.asarray([[0, 0, 0, 1, 1, 1]], jnp.int32)
    rows, taps, want = np.asarray(x, np.float64)[0], np.asarray(kernel, np.float64), np.empty((6, 2, 5))
    for token in range(6):
        for head in range(2):
            y = taps[2, head] * rows[token, head]
            if token % 3 >= 1:
                y += taps[1, head] * rows[token - 1, head]
            if token % 3 >= 2:
                y += taps[0, head] * rows[token - 2, head]
            y *= np.asarray(scale, np.float64) / np.sqrt(np.mean(y**2) + 0.1)
            want[token, head] = 1.7 * y / np.sqrt(np.sum(y**2) + 1e-6)
    got = conv_norm(x, kernel, scale, **OPTIONS, segment_ids=ids, implementation="reference")
    assert relative(got[0], want) < 1e-6


@pytest.mark.parametrize(
    "change,error,words",
    [
        (dict(x=jnp.ones((1, 4, 8))), ValueError, r"x has shape \(1, 4, 8\); it must be \[B, L, N, D\]"),
        (dict(x=jnp.ones((1, 4, 1, 8), jnp.int32)), TypeError, "x is int32; it must be floating point"),
        (dict(kernel=jnp.ones((4, 8))), ValueError, r"kernel has shape \(4, 8\); with this x it must be \(K, 1, 8\)"),
        (dict(scale=jnp.ones(4)), ValueError, r"scale has shape \(4,\); with this x it must be \(8,\)"),
        (dict(segment_ids=jnp.ones((1, 3), int)), ValueError, r"segment_ids has shape \(1, 3\)"),
        (dict(implementation="triton"), NotImplementedError, "there are no Triton kernels"),
        (dict(implementation="pallas", kernel=jnp.ones((9, 1, 8))), NotImplementedError, "at most 8 taps, and kernel"),
        (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
    ],
)
def test_errors(change, error, words):
    given = dict(x=jnp.ones((1, 4, 1, 8)), kernel=jnp.ones((4, 1, 8)), scale=jnp.ones(8)) | change
    with pytest.raises(error, match=words):
        conv_norm(**given)

"""norm_rope: every backend against the reference, and the reference against loops."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import norm_rope

pytestmark = pytest.mark.core
OPTIONS = {"eps": 0.1, "offset": 0.5, "factor": 0.7}


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def make_inputs(batch, length, heads, dim, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    angles = 9 * jax.random.normal(keys[2], (batch, length, dim // 2))
    x = jax.random.normal(keys[0], (batch, length, heads, dim), dtype)
    return x, 1 + jax.random.normal(keys[1], (dim,)), (jnp.cos(angles), jnp.sin(angles))


def output_and_gradients(x, scale, rope, **options):
    def loss(x, scale):
        out = norm_rope(x, scale, rope, **OPTIONS, **options)
        weights = np.random.default_rng(9).normal(size=out.shape)
        return jnp.sum(out.astype(jnp.float32) * weights), out

    interpreted = pltpu.force_tpu_interpret_mode if options["implementation"] == "pallas" else contextlib.nullcontext
    with interpreted():
        gradients, out = jax.grad(loss, 0 if scale is None else (0, 1), has_aux=True)(x, scale)
    return out, *jax.tree.leaves(gradients)


@pytest.mark.parametrize("implementation", ["xla", "pallas", None])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    "shape,parts",
    [
        ((2, 200, 3, 64), "norm rope"),
        ((1, 1300, 1, 32), "norm rope"),
        ((1, 17, 10, 128), "norm rope"),
        ((2, 130, 3, 64), "norm"),
        ((1, 256, 5, 32), "rope"),
        ((1, 40, 2, 32), ""),
    ],
)
def test_matches_reference(implementation, rows, shape, parts):
    x, scale, rope = make_inputs(*shape)
    given = x, scale if "norm" in parts else None, rope if "rope" in parts else None
    got = output_and_gradients(*given, rows=rows, implementation=implementation)
    want = output_and_gradients(*given, implementation="reference")
    assert len(got) == len(want) == 2 + ("norm" in parts)
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "pallas"])
@pytest.mark.parametrize("rows", [False, True])
def test_bfloat16(implementation, rows):
    x, scale, rope = make_inputs(1, 150, 3, 64, jnp.bfloat16)
    got = output_and_gradients(x, scale, rope, rows=rows, implementation=implementation)
    want = output_and_gradients(x.astype(jnp.float32), scale, rope, implementation="reference")
    assert got[0].dtype == got[1].dtype == jnp.bfloat16
    for a, b in zip(got, want, strict=True):
        assert relative(a, b) < 1e-2


def test_reference_is_the_definition():
    x, scale, (cos, sin) = make_inputs(1, 5, 2, 6)
    wide, scales = np.asarray(x, np.float64), np.asarray(scale, np.float64)
    wide = wide / np.sqrt(np.mean(wide**2, axis=-1, keepdims=True) + 0.1) * (0.5 + scales)
    want = np.empty_like(wide)
    for token in range(5):
        for pair in range(3):
            c, s = float(cos[0, token, pair]), float(sin[0, token, pair])
            a, b = wide[0, token, :, pair], wide[0, token, :, pair + 3]
            want[0, token, :, pair], want[0, token, :, pair + 3] = 0.7 * (a * c - b * s), 0.7 * (b * c + a * s)
    assert relative(norm_rope(x, scale, (cos, sin), **OPTIONS, implementation="reference"), want) < 1e-6


@pytest.mark.parametrize(
    "change,error,words",
    [
        (dict(x=jnp.ones((1, 4, 8))), ValueError, r"x has shape \(1, 4, 8\); it must be \[B, L, H, D\]"),
        (dict(x=jnp.ones((1, 4, 1, 8), jnp.int32)), TypeError, "x is int32; it must be floating point"),
        (dict(scale=jnp.ones(4)), ValueError, r"scale has shape \(4,\); with this x it must be \(8,\)"),
        (dict(rope=(jnp.ones((1, 4, 4)), jnp.ones((1, 4, 8)))), ValueError, r"sin has shape \(1, 4, 8\)"),
        (dict(implementation="triton"), NotImplementedError, "there are no Triton kernels"),
        (dict(implementation="pallas"), NotImplementedError, "heads of a multiple of 32 channels, and x has 8"),
        (dict(implementation="cuda"), ValueError, "implementation='cuda' is unknown"),
    ],
)
def test_errors(change, error, words):
    given = dict(x=jnp.ones((1, 4, 1, 8)), scale=jnp.ones(8), rope=(jnp.ones((1, 4, 4)),) * 2, implementation=None)
    x, scale, rope, implementation = (given | change).values()
    with pytest.raises(error, match=words):
        norm_rope(x, scale, rope, eps=1e-6, implementation=implementation)

"""Products in bfloat16: the function itself, and that a training step has no others, forward or backward."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmem_jax.model import lm, sharding
from allmem_jax.model import state as state_lib
from pallas_kernels import dots
from train.loop import compiled, plan
from train.loop.tiny import CONFIG
from train.recipe import FinetuneConfig

pytestmark = pytest.mark.core
MEANT = "float32_"  # how a scope begins whose products are meant to be in float32
SPECS = [
    ("abi,io->abo", (2, 5, 3), (3, 4)),
    ("bntd,bnhd->bnth", (2, 3, 5, 4), (2, 3, 6, 4)),
    ("btd,bnte->bnde", (2, 5, 3), (2, 4, 5, 6)),
]


def relative(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def wide_products(text):
    """The products of two float32 operands in lowered text with debug info, but those that are meant."""
    places = dict(re.findall(r"^(#loc\d*) = loc\((.*)\)$", text, re.MULTILINE))
    found = re.findall(r"dot_general .*: \(tensor<(\S+)>, tensor<(\S+)>\) -> \S+ loc\((#loc\d*)\)", text)
    assert len(found) == text.count("stablehlo.dot_general") > 0  # the pattern reads them all
    wide = [(x, y, places[at]) for x, y, at in found if x.endswith("xf32") and y.endswith("xf32")]
    return [found for found in wide if MEANT not in found[2]]


def operands(x_shape, y_shape, y_dtype=jnp.bfloat16):
    x, y = (np.random.default_rng(seed).normal(size=shape) for seed, shape in enumerate((x_shape, y_shape), 1))
    return jnp.asarray(x, jnp.bfloat16), jnp.asarray(y, y_dtype)


@functools.partial(jax.jit, static_argnums=0)
def gradients(product, x, y):
    """The product, and gradients of a random linear function of it."""

    def total(x, y):
        out = product(x, y)
        return jnp.sum(out * np.random.default_rng(0).normal(size=out.shape)), out

    (d_x, d_y), out = jax.grad(total, (0, 1), has_aux=True)(x, y)
    return out, d_x, d_y


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (2, 3), (dots.FEW,), (1, dots.FEW + 1)])
@pytest.mark.parametrize("units", [False, True])
def test_a_turned_kernel(rows, dtype, units, monkeypatch):
    """Few rows and many, of operands in bfloat16, on either kind of processor: its products are exact in float32."""
    monkeypatch.setattr(dots, "multiplies_bfloat16", lambda: units)
    x, kernel = operands((*rows, 40), (7, 40))
    found = jax.jit(lambda *operands: dots.turned(*operands))(x.astype(dtype), kernel)  # traced anew
    assert found.dtype == jnp.float32 and found.shape == (*rows, 7)
    assert relative(found, np.asarray(x, np.float64) @ np.asarray(kernel, np.float64).T) < 1e-6


@pytest.mark.parametrize("rows", [(1,), (1, 1), (2, 1)])
def test_a_row_by_itself(rows):
    x, kernel = operands((*rows, 5), (5, 4))
    wide = (part.astype(jnp.float32) for part in (x, kernel))
    for got, want in zip(gradients(dots.matmul, x, kernel), gradients(jnp.matmul, *wide), strict=True):
        assert got.shape == want.shape and relative(got, want) < 1e-2


@pytest.mark.parametrize("spec,x_shape,y_shape", SPECS)
def test_gradients_are_those_of_float32(spec, x_shape, y_shape):
    x, y = operands(x_shape, y_shape)
    got = gradients(functools.partial(dots.einsum, spec), x, y)
    exact = functools.partial(jnp.einsum, spec, precision="highest")
    want = gradients(exact, x.astype(jnp.float32), y.astype(jnp.float32))
    assert [leaf.dtype for leaf in got] == [jnp.float32, jnp.bfloat16, jnp.bfloat16]
    assert relative(got[0], want[0]) < 1e-6
    assert max(relative(a, b) for a, b in zip(got[1:], want[1:], strict=True)) < 1e-2


def test_the_gradient_of_a_float32_parameter_is_not_rounded():
    x, y = operands((2, 5, 3), (3, 4), jnp.float32)
    _, d_x, d_y = gradients(dots.matmul, x, y)
    cotangent = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(jnp.bfloat16).astype(np.float64)
    assert (d_x.dtype, d_y.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative(d_y, np.einsum("abi,abo->io", np.asarray(x, np.float64), cotangent)) < 1e-6
    assert relative(d_y.astype(jnp.bfloat16), d_y) > 1e-4


@pytest.mark.parametrize("spec,x_shape,y_shape", SPECS)
def test_float32_is_exact(spec, x_shape, y_shape):
    x, y = (operand.astype(jnp.float32) for operand in operands(x_shape, y_shape))
    got = gradients(functools.partial(dots.einsum, spec), x, y)
    want = gradients(functools.partial(jnp.einsum, spec, precision="highest"), x, y)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    text = jax.jit(jax.grad(lambda x: dots.einsum(spec, x, y).sum())).lower(x).as_text()
    assert text.count("precision = [HIGHEST, HIGHEST]") == text.count("stablehlo.dot_general")


@pytest.mark.parametrize("constant", ["x", "y"])
def test_keeps_only_what_the_gradient_needs(constant):
    """A frozen kernel's input is not kept for the backward pass, nor is the kernel where its input is a constant."""
    x, y = operands((7, 5, 3), (3, 4))
    function = (lambda y: dots.matmul(x, y)) if constant == "x" else lambda x: dots.matmul(x, y)
    kept = jax.eval_shape(lambda value: jax.vjp(function, value)[1], y if constant == "x" else x)
    assert [leaf.shape for leaf in jax.tree.leaves(kept)] == [x.shape if constant == "x" else y.shape]


def test_mapped_scanned_and_rematerialised():
    x, y = operands((6, 5, 3), (6, 3, 4), jnp.float32)

    def scanned(x, y):
        body = jax.checkpoint(lambda carry, xs: (carry, dots.matmul(*xs)))
        return jax.lax.scan(body, None, (x, y))[1]

    want = gradients(functools.partial(dots.einsum, "nti,nio->nto"), x, y)
    for product in (jax.vmap(dots.matmul), scanned):
        for a, b in zip(gradients(product, x, y), want, strict=True):
            assert a.dtype == b.dtype and relative(a, b) < 1e-5


def test_wide_products_are_found():
    """Those that JAX's own transpose makes are, but for the meant ones."""
    x, y = operands((2, 5, 3), (3, 4))

    def plain(x, y):
        return jnp.sum(jnp.square(jnp.matmul(x, y, preferred_element_type=jnp.float32)))

    def meant(x, y):
        with jax.named_scope(f"{MEANT}test"):
            return plain(x, y)

    def found(function):
        return wide_products(jax.jit(jax.grad(function, (0, 1))).lower(x, y).as_text(debug_info=True))

    assert len(found(plain)) == 2
    assert not found(meant)
    assert not found(lambda x, y: jnp.sum(jnp.square(dots.matmul(x, y))))


@pytest.mark.parametrize("mixer", ["allmem", "mamba2", "delta"])
@pytest.mark.parametrize("objective", ["distill", "pretrain"])
def test_a_step_multiplies_in_bfloat16(objective, mixer):
    """Teacher and student; parameters in float32 where they are trained."""
    recipe = FinetuneConfig(
        model="tiny",
        out="unused",
        objective=objective,
        mixer=mixer,
        batch=2,
        seq_length=16,
        window=(8, 8),
        sinks=(2, 2),
        chunk=(8,),
        d_mem=8,
        dtype="bfloat16",
        backbone_dtype="bfloat16",
        loss_block=8,
    )
    config, mesh = plan.planned_config(recipe), sharding.make_mesh()
    state, frozen, batch = plan.abstract_arguments(recipe, config, mesh)
    teacher, student = compiled.make(recipe, config, jax.tree.map(lambda x: x.sharding, state), mesh)
    hidden, size = jax.ShapeDtypeStruct((2, 16, config.d_model), config.dtype), jax.ShapeDtypeStruct((), jnp.int32)
    if teacher is not None:
        assert not wide_products(teacher.lower(frozen, batch).as_text(debug_info=True))
    drawn = jax.ShapeDtypeStruct((2,), jnp.uint32)
    lowered = student(8).lower(state, frozen, batch, None if teacher is None else hidden, size, size, drawn)
    assert not wide_products(lowered.as_text(debug_info=True))


@pytest.mark.parametrize("mixer,length", [("swa", 5), ("allmem", 1)])
def test_reading_with_a_state_multiplies_in_bfloat16(mixer, length):
    """A piece of a prompt and a single token, differentiated in all parameters."""
    config = CONFIG.replace(mixer=mixer, dtype="bfloat16")
    params, state = jax.eval_shape(lambda: (lm.random_params(config), state_lib.init_state(config, 2)))

    def total(params, state):
        tokens = jnp.zeros((2, length), jnp.int32)
        out, after = lm.AllMemLM(config).apply({"params": params}, tokens, state=state)
        return jnp.sum(out) + jnp.sum(after.keys.astype(jnp.float32))

    assert not wide_products(jax.jit(jax.grad(total)).lower(params, state).as_text(debug_info=True))

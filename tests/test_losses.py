"""Blockwise losses against the dense formula, and that no buffer of all logits is compiled in."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from allmem_jax.model import losses

pytestmark = pytest.mark.core
BATCH, LENGTH, MODEL, VOCAB = 2, 37, 8, 67


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    student = jax.random.normal(keys[0], (BATCH, LENGTH, MODEL), dtype)
    teacher = student + jax.random.normal(keys[1], student.shape, dtype)
    head = jax.random.normal(keys[2], (MODEL, VOCAB), dtype)
    return student, teacher, head, jax.random.randint(keys[3], (BATCH, LENGTH), 0, VOCAB)


def dense(student, teacher, head, targets):
    log_q, log_p = (jax.nn.log_softmax(jnp.matmul(h, head, precision="highest")) for h in (student, teacher))
    pick = lambda x: -jnp.take_along_axis(x, targets[..., None], -1)[..., 0]  # noqa: E731
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), -1), pick(log_q), pick(log_p)


def close(got, want, tolerance=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize("block", [1, 7, 16, 512])
def test_equals_dense(block):
    args = inputs()
    for got, want in zip(losses.distill_losses(*args, block=block), dense(*args), strict=True):
        close(got, want)


def test_gradients_equal_dense():
    student, teacher, head, targets = inputs()
    weights = jax.random.normal(jax.random.key(1), (3, BATCH, LENGTH))

    def total(fn, student, teacher, head):
        return sum(jnp.sum(w * loss) for w, loss in zip(weights, fn(student, teacher, head, targets), strict=True))

    blockwise = lambda *args: losses.distill_losses(*args, block=10)  # noqa: E731
    constant = lambda s, t, h, y: dense(s, jax.lax.stop_gradient(t), h, y)  # noqa: E731
    got = jax.grad(lambda *a: total(blockwise, *a), argnums=(0, 1))(student, teacher, head)
    want = jax.grad(lambda *a: total(constant, *a))(student, teacher, head)
    close(got[0], want)
    assert not np.any(got[1]), "the teacher is a constant"


@pytest.mark.parametrize("ce_weight", [0.0, 0.3])
def test_gradients_with_a_frozen_head(ce_weight):
    student, teacher, head, targets = inputs()

    def total(fn, student):
        kl, ce, _ = fn(student, teacher, head, targets)
        return jnp.sum(jnp.sin(jnp.arange(LENGTH)) * (kl + ce_weight * ce))

    got = jax.grad(functools.partial(total, functools.partial(losses.distill_losses, block=10)))(student)
    close(got, jax.grad(functools.partial(total, dense))(student))


@pytest.mark.parametrize("frozen", [True, False])
def test_where_the_target_is_known_the_divergence_is_the_cross_entropy(frozen):
    student, teacher, head, targets = inputs()
    known = jax.random.bernoulli(jax.random.key(3), 0.3, targets.shape)

    def total(fn, student, head):
        return jnp.sum(jnp.sin(jnp.arange(LENGTH)) * fn(student, teacher, head, targets)[0])

    def wanted(*args):
        kl, ce, rest = dense(*args)
        return jnp.where(known, ce, kl), ce, rest

    blockwise = functools.partial(losses.distill_losses, known=known, block=10)
    close(blockwise(student, teacher, head, targets)[0], wanted(student, teacher, head, targets)[0])
    of = (0,) if frozen else (0, 1)
    got = jax.grad(functools.partial(total, blockwise), of)(student, head)
    close(got[0], jax.grad(functools.partial(total, wanted))(student, head))


def test_gradient_of_the_head():
    student, teacher, head, targets = inputs()
    got = jax.grad(lambda h: losses.distill_losses(student, teacher, h, targets, block=9)[1].sum())(head)
    close(got, jax.grad(lambda h: dense(student, teacher, h, targets)[1].sum())(head))


def test_same_hidden_states_have_no_divergence():
    student, _, head, targets = inputs()
    kl, ce, teacher_ce = losses.distill_losses(student, student, head, targets, block=16)
    np.testing.assert_array_equal(kl, 0)
    np.testing.assert_array_equal(ce, teacher_ce)


def test_bfloat16():
    args = inputs(jnp.bfloat16)
    wide = tuple(x.astype(jnp.float32) for x in args[:3]) + args[3:]
    for got, want in zip(losses.distill_losses(*args, block=16), dense(*wide), strict=True):
        assert got.dtype == jnp.float32
        close(got, want, 1e-2)


def test_bfloat16_gradients():
    """Of the hidden states, and of a head in float32, which is added up over the blocks unrounded."""
    student, teacher, head, targets = inputs(jnp.bfloat16)
    head = head.astype(jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def gradients(fn, student, head):
        every = jax.grad(lambda x: sum(map(jnp.sum, fn(x, teacher, head, targets)[:2])))(student)
        return every, jax.grad(lambda x: jnp.sum(fn(student, teacher, x, targets)[1]))(head)

    got = gradients(functools.partial(losses.distill_losses, block=4), student, head)
    want = gradients(dense, student.astype(jnp.float32), head)
    assert (got[0].dtype, got[1].dtype) == (jnp.bfloat16, jnp.float32)
    close(got[0], want[0], 1e-2)
    close(got[1], want[1], 1e-2)


def test_no_buffer_holds_all_logits():
    args = inputs()

    def loss(student, teacher, head, targets):
        kl, ce, _ = losses.distill_losses(student, teacher, head, targets, block=8)
        return jnp.sum(kl) + jnp.sum(ce)

    program = jax.jit(jax.value_and_grad(loss)).lower(*args).compile().as_text()
    sizes = [np.prod([int(n) for n in dims.split(",")]) for dims in re.findall(r"\w\d+\[([\d,]+)\]", program)]
    assert max(sizes) >= 8 * VOCAB  # the pattern does find the logits of a block
    assert max(sizes) < BATCH * LENGTH * VOCAB // 2


def test_errors_name_the_shapes():
    student, teacher, head, targets = inputs()
    with pytest.raises(ValueError, match=r"targets \(2, 36\)"):
        losses.distill_losses(student, teacher, head, targets[:, 1:])
    with pytest.raises(ValueError, match="block=0"):
        losses.distill_losses(student, teacher, head, targets, block=0)

"""Distillation losses from hidden states, block by block, so that the logits of a whole sequence never exist.

Axes:

    B batch    L positions    d model    V vocabulary    C positions of a block (per row)    T blocks
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from allmem_jax.model import functional, sharding
from pallas_kernels import dots


def distill_losses(
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    known: jax.Array | None = None,
    block: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Forward KL(teacher || student) and both cross-entropies at every position.

    At any moment logits exist for about `block` positions on a device. Where the head is frozen the forward pass keeps
    the divergence's gradient, and a backward pass through it alone needs no logits; any other computes them again. To
    pay for a part of the positions only, gather them along L before the call.

    Args:
      student_hidden: [B, L, d] final-normed hidden states; differentiable.
      teacher_hidden: [B, L, d] those of the teacher, taken as constants.
      head: [d, V], one for both; logits = hidden @ head in float32. Differentiable.
      targets: int32 [B, L], the token that follows each position.
      known: bool [B, L], positions whose target is certain, so that the teacher there counts as if it gave that all
        probability: its divergence is the cross-entropy. None is nowhere.
      block: positions whose logits exist at a time on a device.

    Returns:
      kl, ce, teacher_ce: float32 [B, L] each, in nats.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.shape[:2] != targets.shape:
        raise ValueError(
            f"student_hidden {student_hidden.shape}, teacher_hidden {teacher_hidden.shape} and targets {targets.shape} "
            "must be [B, L, d], [B, L, d] and [B, L]"
        )
    known = jnp.zeros(targets.shape, bool) if known is None else known
    return _distill(block, student_hidden, jax.lax.stop_gradient(teacher_hidden), head, targets, known)


def _distill_by_blocks(
    block: int, student: jax.Array, teacher: jax.Array, head: jax.Array, targets: jax.Array, known: jax.Array
) -> Any:
    def losses(student, teacher, target, known):
        return _compare(student, teacher, head, target, known)[0]

    return _by_blocks(losses, block, student, teacher, targets, known)


_distill = jax.custom_vjp(_distill_by_blocks, nondiff_argnums=(0,))


def _distill_forward(block: int, *inputs: Any) -> tuple[Any, Any]:
    """Keeps, where the head is frozen, the gradient of the divergence."""
    student, teacher, kernel, targets, known = args = tuple(x.value for x in inputs)
    head = inputs[2]
    if head.perturbed:
        return _distill_by_blocks(block, *args), (args, None)

    def losses(student, teacher, target, known):
        found, log_q, log_p = _compare(student, teacher, kernel, target, known)
        sure = jax.nn.one_hot(target, kernel.shape[1], dtype=log_p.dtype)
        slope = jnp.exp(log_q) - jnp.where(known[..., None], sure, jnp.exp(log_p))  # of the divergence in the logits
        gradient = dots.einsum("bcv,dv->bcd", slope.astype(student.dtype), kernel)
        return *found, gradient.astype(student.dtype)

    *found, gradient = _by_blocks(losses, block, student, teacher, targets, known)
    return tuple(found), (args, gradient)


def _distill_backward(block: int, kept: Any, cotangents: Any) -> tuple[Any, None, Any, None, None]:
    (student, teacher, head, targets, known), gradient = kept
    d_kl, d_ce, _ = (jnp.zeros(targets.shape) if isinstance(d, SymbolicZero) else d for d in cotangents)

    def again(student: jax.Array, head: jax.Array) -> Any:
        return _distill_by_blocks(block, student, teacher, head, targets, known)[:2]

    if gradient is None:
        d_student, d_head = jax.vjp(again, student, head)[1]((d_kl, d_ce))
        return d_student, None, d_head, None, None
    d_student = jax.lax.cond(
        jnp.any(d_ce != 0),
        lambda: jax.vjp(lambda x: again(x, head), student)[1]((d_kl, d_ce))[0],
        lambda: (d_kl[..., None] * gradient).astype(gradient.dtype),
    )
    return d_student, None, None, None, None


_distill.defvjp(_distill_forward, _distill_backward, symbolic_zeros=True)


def _compare(
    student: jax.Array, teacher: jax.Array, head: jax.Array, target: jax.Array, known: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array, jax.Array]:
    """The three losses [B, C], and log-probabilities [B, C, V] of student and teacher, the teacher's being constants.

    Two products and not one of both: the compiler would write the log-probabilities to part them.
    """
    log_q, ce = _log_probs(student, head, target)
    log_p, teacher_ce = map(jax.lax.stop_gradient, _log_probs(teacher, head, target))
    mean = jax.lax.platform_dependent(jnp.exp(log_p), log_p - log_q, cpu=_product, default=_sum)
    return (jnp.where(known, ce, mean), ce, teacher_ce), log_q, log_p


def _sum(p: jax.Array, x: jax.Array) -> jax.Array:
    return jnp.sum(p * x, axis=-1)


def _product(p: jax.Array, x: jax.Array) -> jax.Array:
    """`_sum`, in less than half of the time that XLA on CPUs takes for a sum of products."""
    with jax.named_scope("float32_sum"):
        return dots.einsum("bcv,bcv->bc", p, x)


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, block: int = 512) -> jax.Array:
    """Cross-entropy at every position, float32 [B, L] in nats; arguments as for `distill_losses`."""
    if hidden.shape[:2] != targets.shape:
        raise ValueError(f"hidden {hidden.shape} and targets {targets.shape} must be [B, L, d] and [B, L]")
    return _by_blocks(lambda x, target: (_log_probs(x, head, target)[1],), block, hidden, targets)[0]


def _by_blocks(losses: Callable[..., tuple[jax.Array, ...]], block: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`losses` of arrays [B, L, ...], some positions at a time and computed again in the backward pass."""
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    batch, length = arrays[0].shape[:2]
    context = sharding.axis_size("context")
    size = min(max(block * sharding.axis_size("data", "fsdp", "context") // batch, 1), length)
    size = -(-size // context) * context  # C, the same on every device

    def body(carry: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        return carry, losses(*map(sharding.over_tokens, xs))

    with jax.named_scope("loss"):
        _, found = jax.lax.scan(jax.checkpoint(body), None, tuple(_to_blocks(x, size) for x in arrays))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(batch, -1, *x.shape[3:])[:, :length] for x in found)


def _log_probs(hidden: jax.Array, head: jax.Array, target: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probabilities [B, C, V], and how surprising int32 [B, C] are.

    The first are one subtraction, which the compiler takes again where it needs it. Targets are looked up in what it
    has written: the logits.
    """
    logits = functional.logits(hidden, head)
    total = jax.nn.logsumexp(logits, axis=-1)
    found = jnp.take_along_axis(logits, target[..., None], axis=-1)[..., 0]
    return logits - total[..., None], total - found


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, L, ...] -> [T, B, C, ...], padded with zeros; position c T + t is at [t, :, c], so that C may be sharded."""
    batch, length = x.shape[:2]
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, size, count, *x.shape[2:]), 2, 0)

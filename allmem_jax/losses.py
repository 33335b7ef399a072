"""Distillation losses from hidden states, block by block, so that the logits of a whole sequence never exist.

Axes:

    B batch    L positions    d model    V vocabulary    C positions of a block (per row)    T blocks
"""

import jax
import jax.numpy as jnp


def distill_losses(
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    block: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Forward KL(teacher || student) and both cross-entropies at every position.

    At any moment logits exist for about `block` positions of the whole batch, in the backward pass too: it computes
    them again. To pay for a part of the positions only, gather them along L before the call.

    Args:
      student_hidden: [B, L, d] final-normed hidden states; differentiable.
      teacher_hidden: [B, L, d] those of the teacher, taken as constants.
      head: [d, V], one for both; logits = hidden @ head in float32. Differentiable.
      targets: int32 [B, L], the token that follows each position.
      block: positions of the batch whose logits exist at a time.

    Returns:
      kl, ce, teacher_ce: float32 [B, L] each, in nats.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.shape[:2] != targets.shape:
        raise ValueError(
            f"student_hidden {student_hidden.shape}, teacher_hidden {teacher_hidden.shape} and targets {targets.shape} "
            "must be [B, L, d], [B, L, d] and [B, L]"
        )
    if block < 1:
        raise ValueError(f"block={block} must be at least 1")
    batch, length = targets.shape
    size = max(1, min(block // batch, length))

    def body(carry: None, xs: tuple[jax.Array, ...]) -> tuple[None, tuple[jax.Array, ...]]:
        student, teacher, target = xs  # [B, C, d], [B, C, d], [B, C]
        return carry, _block_losses(student, teacher, head, target)

    blocks = tuple(_to_blocks(x, size) for x in (student_hidden, jax.lax.stop_gradient(teacher_hidden), targets))
    _, losses = jax.lax.scan(jax.checkpoint(body), None, blocks)
    kl, ce, teacher_ce = (_from_blocks(x, length) for x in losses)
    return kl, ce, teacher_ce


def _block_losses(student: jax.Array, teacher: jax.Array, head: jax.Array, target: jax.Array) -> tuple[jax.Array, ...]:
    """The three losses of one block: [B, C, d], [B, C, d], [d, V], [B, C] -> three of [B, C]."""
    log_q = _log_probs(student, head)  # [B, C, V]
    log_p = jax.lax.stop_gradient(_log_probs(teacher, head))
    kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
    ce = -jnp.take_along_axis(log_q, target[..., None], axis=-1)[..., 0]
    teacher_ce = -jnp.take_along_axis(log_p, target[..., None], axis=-1)[..., 0]
    return kl, ce, teacher_ce


def _log_probs(hidden: jax.Array, head: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if hidden.dtype == head.dtype == jnp.float32 else None
    logits = jnp.matmul(hidden, head, precision=precision, preferred_element_type=jnp.float32)
    return jax.nn.log_softmax(logits, axis=-1)


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, L, ...] -> [T, B, C, ...] with C = size, padded with zeros at the end."""
    batch, length = x.shape[:2]
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, count, size, *x.shape[2:]), 1, 0)


def _from_blocks(x: jax.Array, length: int) -> jax.Array:
    """The inverse of `_to_blocks` for [T, B, C]."""
    return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], -1)[:, :length]

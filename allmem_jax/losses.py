"""Distillation losses from hidden states, block by block, so that the logits of a whole sequence never exist.

Axes:

    B batch    L positions    d model    V vocabulary    C positions of a block (per row)    T blocks
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from allmem_jax import functional, sharding


def distill_losses(
    student_hidden: jax.Array,
    teacher_hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    *,
    block: int = 512,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Forward KL(teacher || student) and both cross-entropies at every position.

    At any moment logits exist for about `block` positions on a device, in the backward pass too: it computes them
    again. To pay for a part of the positions only, gather them along L before the call.

    Args:
      student_hidden: [B, L, d] final-normed hidden states; differentiable.
      teacher_hidden: [B, L, d] those of the teacher, taken as constants.
      head: [d, V], one for both; logits = hidden @ head in float32. Differentiable.
      targets: int32 [B, L], the token that follows each position.
      block: positions whose logits exist at a time on a device.

    Returns:
      kl, ce, teacher_ce: float32 [B, L] each, in nats.
    """
    if student_hidden.shape != teacher_hidden.shape or student_hidden.shape[:2] != targets.shape:
        raise ValueError(
            f"student_hidden {student_hidden.shape}, teacher_hidden {teacher_hidden.shape} and targets {targets.shape} "
            "must be [B, L, d], [B, L, d] and [B, L]"
        )

    def losses(student, teacher, target):
        log_q = _log_probs(student, head)  # [B, C, V]
        log_p = jax.lax.stop_gradient(_log_probs(teacher, head))
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return kl, _surprise(log_q, target), _surprise(log_p, target)

    kl, ce, teacher_ce = _by_blocks(losses, block, student_hidden, jax.lax.stop_gradient(teacher_hidden), targets)
    return kl, ce, teacher_ce


def cross_entropy(hidden: jax.Array, head: jax.Array, targets: jax.Array, *, block: int = 512) -> jax.Array:
    """Cross-entropy at every position, float32 [B, L] in nats; arguments as for `distill_losses`."""
    if hidden.shape[:2] != targets.shape:
        raise ValueError(f"hidden {hidden.shape} and targets {targets.shape} must be [B, L, d] and [B, L]")
    return _by_blocks(lambda x, target: (_surprise(_log_probs(x, head), target),), block, hidden, targets)[0]


def _surprise(log_probs: jax.Array, target: jax.Array) -> jax.Array:
    """[B, C, V], int32 [B, C] -> [B, C]."""
    return -jnp.take_along_axis(log_probs, target[..., None], axis=-1)[..., 0]


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

    _, found = jax.lax.scan(jax.checkpoint(body), None, tuple(_to_blocks(x, size) for x in arrays))
    return tuple(jnp.moveaxis(x, 0, 2).reshape(batch, -1)[:, :length] for x in found)


def _log_probs(hidden: jax.Array, head: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(functional.logits(hidden, head), axis=-1)


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, L, ...] -> [T, B, C, ...], padded with zeros; position c T + t is at [t, :, c], so that C may be sharded."""
    batch, length = x.shape[:2]
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(batch, size, count, *x.shape[2:]), 2, 0)

"""One step of distillation as pure functions: teacher, student, loss, gradient, update.

The teacher is the same model with full attention on the same frozen arrays. Gradients and optimiser state exist for
the memory's parameters alone. Axes:

    B batch    L tokens of a row    P positions with a loss    d model    Y layers
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from allmem_jax import config as config_lib
from allmem_jax import functional, losses, model, sharding

Metrics = dict[str, jax.Array]


class Batch(NamedTuple):
    """Rows of text: tokens, targets int32 [B, L]; mask bool [B, L], where a loss may be; segment_ids [B, L] or None."""

    tokens: jax.Array
    targets: jax.Array
    mask: jax.Array
    segment_ids: jax.Array | None = None


class TrainState(NamedTuple):
    """What training changes: the memory's parameters, optax's state, and counts (int32) of skipped steps."""

    memory: model.Params
    optimizer: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised: mean KL(teacher || student) + ce_weight * cross-entropy over a share of the positions.

    Attributes:
      positions: share of each row's L positions, drawn at random among those allowed.
      beyond_window: allow only positions that no longer see some key.
      inside_weight: weight of positions that still see all before them, where the original needs no help and a memory
        can only disturb; those beyond weigh 1.
      ce_weight: see above.
      block: positions whose logits exist at a time.
    """

    positions: float = 0.25
    beyond_window: bool = False
    inside_weight: float = 1.0
    ce_weight: float = 0.0
    block: int = 512


def wsd_schedule(peak: float, steps: int, warmup: int, decay: float) -> Callable[[jax.Array], jax.Array]:
    """Warmup-stable-decay: linear rise over `warmup` steps, `peak`, linear fall to 0 over the last share `decay`."""
    falling = max(decay * steps, 1.0)

    def rate(count: jax.Array) -> jax.Array:
        done = jnp.asarray(count, jnp.float32)
        return peak * jnp.clip(jnp.minimum((done + 1) / max(warmup, 1), (steps - done) / falling), 0.0, 1.0)

    return rate


def make_optimizer(
    schedule: Callable[[jax.Array], jax.Array], betas: tuple[float, float], weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW behind a clip of the gradient's global norm; weight decay on kernels of projections only."""

    def decayed(params: model.Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: sharding.path_string(path).endswith("_proj/kernel"), params
        )

    adamw = optax.adamw(schedule, *betas, weight_decay=weight_decay, mask=decayed)
    return optax.chain(optax.clip_by_global_norm(clip), adamw)


def init_state(memory: model.Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step: a copy, so that a step may take over its buffers, and without weak types."""
    memory = jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), memory)
    return TrainState(memory, optimizer.init(memory), jnp.zeros((), jnp.int32), jnp.zeros((), jnp.int32))


def teacher_hidden(backbone: model.Params, config: config_lib.ModelConfig, batch: Batch) -> jax.Array:
    """Final hidden states [B, L, d] of the original model; compiled once, whatever the chunk."""
    teacher = model.AllMemLM(config.replace(mixer="full"))
    hidden = teacher.apply({"params": backbone}, batch.tokens, segment_ids=batch.segment_ids, return_hidden=True)
    return jnp.asarray(hidden)


def offsets_in_document(batch: Batch) -> jax.Array:
    """int32 [B, L], tokens of the same document before each token."""
    segments = jnp.ones_like(batch.tokens) if batch.segment_ids is None else batch.segment_ids
    return functional.document_offsets(segments)[0]


def choose_positions(key: jax.Array, allowed: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """`count` distinct positions of each row at random, allowed ones first.

    Args:
      key: a PRNG key.
      allowed: bool [B, L].
      count: P, static.

    Returns:
      int32 [B, P] positions, and bool [B, P], whether each was allowed (a row may have fewer than P).
    """
    score = jnp.where(allowed, jax.random.uniform(key, allowed.shape), -1.0)
    best, index = jax.lax.top_k(score, count)
    return index, best >= 0


def distill_loss(
    memory: model.Params,
    backbone: model.Params,
    config: config_lib.ModelConfig,
    loss: Loss,
    batch: Batch,
    teacher: jax.Array,
    window: jax.Array,
    sinks: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Metrics]:
    """The loss (float32 scalar, nats per position) of a batch, and what to report of it.

    Args:
      memory, backbone: the parameters, split as in `model.split_params`; differentiate in the first.
      config: of the student.
      loss: what is minimised.
      batch: the rows.
      teacher: [B, L, d], of `teacher_hidden`.
      window, sinks: int32 scalars.
      key: draws the positions.
    """
    params = model.merge_params(backbone, memory)
    hidden, collected = model.AllMemLM(config).apply(
        {"params": params}, batch.tokens, segment_ids=batch.segment_ids, window=window, sinks=sinks,
        return_hidden=True, mutable=["intermediates"],
    )  # fmt: skip
    beyond = offsets_in_document(batch) >= window + sinks  # the first token that does not see all before it
    count = max(1, round(loss.positions * batch.tokens.shape[1]))
    index, use = choose_positions(key, batch.mask & beyond if loss.beyond_window else batch.mask, count)
    gather = lambda x: jnp.take_along_axis(x, index.reshape(index.shape + (1,) * (x.ndim - 2)), axis=1)  # noqa: E731
    head = model.head_kernel(params, config)
    kl, ce, teacher_ce = losses.distill_losses(
        gather(hidden), gather(teacher), head, gather(batch.targets), block=loss.block
    )
    beyond = gather(beyond)
    weight = use * jnp.where(beyond, 1.0, loss.inside_weight)
    total = jnp.sum(weight * (kl + loss.ce_weight * ce)) / jnp.maximum(jnp.sum(weight), 1.0)
    metrics = {
        "loss": total,
        "kl": _mean(kl, use),
        "kl_inside": _mean(kl, use & ~beyond),
        "kl_beyond": _mean(kl, use & beyond),
        "ce": _mean(ce, use),
        "teacher_ce": _mean(teacher_ce, use),
    }
    return total, metrics | _memory_metrics(collected["intermediates"]["layers"])


def _mean(value: jax.Array, use: jax.Array) -> jax.Array:
    """Mean of `value` where `use`; NaN when nowhere."""
    return jnp.sum(jnp.where(use, value, 0.0)) / jnp.sum(use)


def _memory_metrics(collected: dict[str, Any]) -> Metrics:
    """What the memory's layers report, each [Y]: means of its rates, the largest of the sizes of its state."""
    sizes = ("weights", "velocity", "state")
    return {
        f"memory_{name}": (jnp.max if name in sizes else jnp.mean)(value[0])
        for name, value in collected["memory"].items()
    }


def distill_step(
    state: TrainState,
    backbone: model.Params,
    batch: Batch,
    teacher: jax.Array,
    window: jax.Array,
    sinks: jax.Array,
    key: jax.Array,
    *,
    config: config_lib.ModelConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """One update of the memory's parameters; a step whose loss or gradient is not finite changes nothing but counts.

    Arguments as for `distill_loss`. Jit it once per config (that is, per chunk): window, sinks and key are traced.
    """
    grad_fn = jax.value_and_grad(distill_loss, has_aux=True)
    (value, metrics), grads = grad_fn(state.memory, backbone, config, loss, batch, teacher, window, sinks, key)
    grad_norm = optax.tree.norm(grads)
    updates, optimizer_state = optimizer.update(grads, state.optimizer, state.memory)
    update_norm = optax.tree.norm(updates)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    bad = 1 - finite.astype(jnp.int32)
    after = TrainState(
        memory=choose(optax.apply_updates(state.memory, updates), state.memory),
        optimizer=choose(optimizer_state, state.optimizer),
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
    )
    alpha = after.memory["layers"]["memory"]["alpha"]
    metrics |= {
        "grad_norm": grad_norm,
        "update_norm": update_norm,
        "alpha_rms": jnp.sqrt(jnp.mean(jnp.square(alpha))),
        "skipped": after.skipped,
        "skipped_in_a_row": after.skipped_in_a_row,
    }
    return after, metrics

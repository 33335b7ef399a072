"""One training step as pure functions: teacher, student, loss, gradient, update.

Two objectives share them. Distillation trains the memory's parameters towards a teacher, which is the same model with
full attention on the same frozen arrays; gradients and optimiser state exist for the memory alone. Pretraining has no
teacher and trains everything on the text itself. Axes:

    B batch    L tokens of a row    P positions with a loss    d model    Y layers    A microbatches
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from allmem_jax.model import config as config_lib
from allmem_jax.model import functional, lm, losses, sharding
from train.loop import gauges

Metrics = dict[str, jax.Array]


class Batch(NamedTuple):
    """Rows of text.

    Attributes:
      tokens, targets: int32 [B, L].
      mask: bool [B, L], where a loss may be.
      segment_ids: int32 [B, L] of packed documents, or None.
      answers: bool [B, L], those of `mask` where the target is right whatever the teacher says, or None.
    """

    tokens: jax.Array
    targets: jax.Array
    mask: jax.Array
    segment_ids: jax.Array | None = None
    answers: jax.Array | None = None


class TrainState(NamedTuple):
    """What training changes.

    Attributes:
      trained: the memory's parameters in distillation, all parameters in pretraining.
      optimizer: optax's state.
      skipped, skipped_in_a_row: int32, counts of steps that were not finite.
      average: an exponential moving average of `trained`, or None.
    """

    trained: lm.Params
    optimizer: Any
    skipped: jax.Array
    skipped_in_a_row: jax.Array
    average: lm.Params | None = None


@dataclasses.dataclass(frozen=True)
class Loss:
    """What is minimised over a share of the positions.

    With a teacher the mean of KL(teacher || student) + ce_weight * cross-entropy, without one the cross-entropy; and
    beside it, where rows have answers, answer_weight * the mean of their cross-entropy.

    Attributes:
      positions: share of each row's L positions, drawn at random among those allowed; 1 takes them all.
      beyond_window: allow only positions that no longer see some key.
      inside_weight: weight of positions that still see all before them, where the original needs no help and a memory
        can only disturb; those beyond weigh 1.
      ce_weight, answer_weight: see above.
      block: positions whose logits exist at a time on a device.
    """

    positions: float = 0.25
    beyond_window: bool = False
    inside_weight: float = 1.0
    ce_weight: float = 0.0
    answer_weight: float = 1.0
    block: int = 512


class Drawn(NamedTuple):
    """The positions of a step's loss.

    Attributes:
      at: int32 [B, P].
      use, beyond: bool [B, P], whether there is a loss, and whether some key is out of the position's sight.
      weight: float32 [B, P], summing to 1 over the batch, and over its answers to Loss.answer_weight.
      answer: bool [B, P], those of `use` that are answers; None where rows have none.
    """

    at: jax.Array
    use: jax.Array
    beyond: jax.Array
    weight: jax.Array
    answer: jax.Array | None = None


def init_state(trained: lm.Params, optimizer: optax.GradientTransformation, average: bool = False) -> TrainState:
    """The state before the first step: a copy, so that a step may take over its buffers, and without weak types."""

    def copy() -> lm.Params:
        return jax.tree.map(lambda leaf: jnp.array(leaf, leaf.dtype), trained)

    params, zero = copy(), jnp.zeros((), jnp.int32)
    return TrainState(params, optimizer.init(params), zero, zero, copy() if average else None)


def teacher_hidden(
    backbone: lm.Params, config: config_lib.ModelConfig, batch: Batch, microbatches: int = 1
) -> jax.Array:
    """Final hidden states [B, L, d] of the original model; compiled once, whatever the chunk."""
    teacher = lm.AllMemLM(config.replace(mixer="full"))

    def hidden(part: Batch) -> jax.Array:
        out = teacher.apply({"params": backbone}, part.tokens, segment_ids=part.segment_ids, return_hidden=True)
        return jnp.asarray(out)

    if microbatches == 1:
        return hidden(batch)
    parts = jax.lax.map(hidden, _split(batch, microbatches))  # [A, B / A, L, d]
    return jnp.moveaxis(parts, 0, 1).reshape(batch.tokens.shape + parts.shape[-1:])


def _split(tree: Any, microbatches: int) -> Any:
    """[B, ...] -> [A, B / A, ...]; row r goes to microbatch r % A, so that each has rows of every device."""

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0] // microbatches, microbatches, *x.shape[1:]), 1, 0)

    return jax.tree.map(split, tree)


def offsets_in_document(batch: Batch) -> jax.Array:
    """int32 [B, L], tokens of the same document before each token."""
    segments = jnp.ones_like(batch.tokens) if batch.segment_ids is None else batch.segment_ids
    return functional.document_offsets(segments)[0]


def choose_positions(
    key: jax.Array, allowed: jax.Array, count: int, first: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """`count` distinct positions of each row at random, allowed ones first.

    Args:
      key: a PRNG key.
      allowed: bool [B, L].
      count: P, static.
      first: bool [B, L], allowed ones that come before all others.

    Returns:
      int32 [B, P] positions, and bool [B, P], whether each was allowed (a row may have fewer than P).
    """
    score = jax.random.uniform(key, allowed.shape)
    score = jnp.where(allowed, score if first is None else score + first, -1.0)
    best, index = jax.lax.top_k(score, count)
    return index, best >= 0


def draw_positions(key: jax.Array, loss: Loss, batch: Batch, window: jax.Array, sinks: jax.Array) -> Drawn:
    """The positions that a step's loss is taken at; window and sinks int32 scalars."""
    beyond = offsets_in_document(batch) >= window + sinks  # the first token that does not see all before it
    allowed = batch.mask & beyond if loss.beyond_window else batch.mask
    answer = None if batch.answers is None else batch.answers & batch.mask
    if answer is not None:
        allowed |= answer
    if loss.positions == 1:
        index = jnp.broadcast_to(jnp.arange(allowed.shape[1], dtype=jnp.int32), allowed.shape)
        use = allowed
    else:
        index, use = choose_positions(key, allowed, max(1, round(loss.positions * allowed.shape[1])), answer)
        beyond = jnp.take_along_axis(beyond, index, axis=1)
        answer = None if answer is None else jnp.take_along_axis(answer, index, axis=1)
    weight = use * jnp.where(beyond, 1.0, loss.inside_weight)
    if answer is None:
        return Drawn(index, use, beyond, _to_one(weight))
    weight = _to_one(jnp.where(answer, 0.0, weight)) + loss.answer_weight * _to_one(answer.astype(jnp.float32))
    return Drawn(index, use, beyond, weight, answer)


def _to_one(weight: jax.Array) -> jax.Array:
    """Weights that sum to 1, or to 0 where all are 0."""
    return weight / jnp.maximum(jnp.sum(weight), 1e-9)


def batch_loss(
    trained: lm.Params,
    frozen: lm.Params,
    config: config_lib.ModelConfig,
    loss: Loss,
    batch: Batch,
    teacher: jax.Array | None,
    window: jax.Array,
    sinks: jax.Array,
    drawn: Drawn,
    counts: Metrics,
) -> tuple[jax.Array, tuple[Metrics, Metrics]]:
    """The loss (float32 scalar, nats per position) of a batch or of its part of one.

    Args:
      trained, frozen: the parameters, split in two; differentiate in the first.
      config: of the student.
      loss: what is minimised.
      batch: the rows.
      teacher: [B, L, d], of `teacher_hidden`; None for the cross-entropy alone.
      window, sinks: int32 scalars.
      drawn: where; the rows of `batch`.
      counts: of `count_positions`, for the whole batch.

    Returns:
      The loss, and two dicts: values that add up over the parts of a batch, and what the memory's layers report.
    """
    params = lm.merge_params(frozen, trained)
    hidden, collected = lm.AllMemLM(config).apply(
        {"params": params},
        batch.tokens,
        segment_ids=batch.segment_ids,
        window=window,
        sinks=sinks,
        return_hidden=True,
        mutable=["intermediates"],
    )

    def gather(x: jax.Array) -> jax.Array:
        if loss.positions == 1:
            return x
        index = drawn.at.reshape(drawn.at.shape + (1,) * (x.ndim - 2))
        return sharding.over_tokens(jnp.take_along_axis(x, index, axis=1))

    student, head, targets = gather(hidden), lm.head_kernel(params, config), gather(batch.targets)
    if teacher is None:
        each = losses.cross_entropy(student, head, targets, block=loss.block)
        values = {"ce": each}
    else:
        kl, ce, teacher_ce = losses.distill_losses(
            student, gather(teacher), head, targets, known=drawn.answer, block=loss.block
        )
        each = kl + loss.ce_weight * (ce if drawn.answer is None else jnp.where(drawn.answer, 0.0, ce))
        values = {"kl": kl, "ce": ce, "teacher_ce": teacher_ce}
    total = jnp.sum(drawn.weight * each)
    sums, uses = {"loss": total}, _uses(drawn)
    sums |= {name: _share(value, uses["all"], counts["all"]) for name, value in values.items()}
    main = "ce" if teacher is None else "kl"
    sums |= {f"{main}_{place}": _share(values[main], uses[place], counts[place]) for place in ("inside", "beyond")}
    if "answers" in uses:
        ces = [name for name in values if name != "kl"]
        sums |= {f"{name}_answers": _share(values[name], uses["answers"], counts["answers"]) for name in ces}
    layers = collected.get("intermediates", {}).get("layers", {})  # nothing without a memory
    return total, (sums, layers.get("memory", {}))


def count_positions(drawn: Drawn) -> Metrics:
    """How many positions of a batch have a loss, by place; see `_uses`."""
    return {place: jnp.sum(use) for place, use in _uses(drawn).items()}


def _uses(drawn: Drawn) -> Metrics:
    """bool [B, P], the positions inside the window, beyond it, and all of these; and the answers, which are others."""
    text = drawn.use if drawn.answer is None else drawn.use & ~drawn.answer
    places = {"all": text, "inside": text & ~drawn.beyond, "beyond": text & drawn.beyond}
    return places if drawn.answer is None else places | {"answers": drawn.answer}


def _share(value: jax.Array, use: jax.Array, count: jax.Array) -> jax.Array:
    """What the positions in `use` add to a mean over `count` of them; NaN when that is none."""
    return jnp.sum(jnp.where(use, value, 0.0)) / count


def gradient(
    trained: lm.Params,
    frozen: lm.Params,
    config: config_lib.ModelConfig,
    loss: Loss,
    batch: Batch,
    teacher: jax.Array | None,
    window: jax.Array,
    sinks: jax.Array,
    key: jax.Array,
    microbatches: int = 1,
) -> tuple[jax.Array, lm.Params, Metrics]:
    """Loss, gradient in `trained` and metrics of a batch, in `microbatches` pieces that add up to the same.

    Arguments as for `batch_loss`; `key` draws the positions.
    """
    drawn = draw_positions(key, loss, batch, window, sinks)
    counts = count_positions(drawn)

    def part(batch: Batch, teacher: jax.Array | None, drawn: Drawn) -> Any:
        return jax.value_and_grad(batch_loss, has_aux=True)(
            trained, frozen, config, loss, batch, teacher, window, sinks, drawn, counts
        )

    if microbatches == 1:
        (value, (sums, memory)), grads = part(batch, teacher, drawn)
        return value, grads, sums | gauges.memory(memory)

    def body(done: Any, xs: Any) -> Any:
        (value, (sums, memory)), grads = part(*xs)
        return jax.tree.map(jnp.add, done, (value, grads, sums)), gauges.memory(memory)

    xs = _split((batch, teacher, drawn), microbatches)
    (_, (sums, _)), _ = jax.eval_shape(part, *jax.tree.map(lambda x: x[0], xs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (sums["loss"], trained, sums))
    (value, grads, sums), reported = jax.lax.scan(body, zeros, xs)
    return value, grads, sums | {name: jnp.mean(each) for name, each in reported.items()}


def train_step(
    state: TrainState,
    frozen: lm.Params,
    batch: Batch,
    teacher: jax.Array | None,
    window: jax.Array,
    sinks: jax.Array,
    key: jax.Array,
    *,
    config: config_lib.ModelConfig,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    microbatches: int = 1,
    ema: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One update; a step whose loss or gradient is not finite changes nothing but counts.

    Arguments as for `gradient`, `ema` being the decay of the average. Jit it once per config (that is, per chunk):
    window, sinks and key are traced.
    """
    value, grads, metrics = gradient(
        state.trained, frozen, config, loss, batch, teacher, window, sinks, key, microbatches
    )
    grad_norm = optax.tree.norm(grads)
    with jax.named_scope("optimizer"):
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.trained)
    update_norm = optax.tree.norm(updates)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm) & jnp.isfinite(update_norm)

    def choose(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

    bad = 1 - finite.astype(jnp.int32)
    trained = choose(optax.apply_updates(state.trained, updates), state.trained)
    average = None
    if state.average is not None:
        average = jax.tree.map(lambda mean, new: ema * mean + (1 - ema) * new, state.average, trained)
    after = TrainState(
        trained=trained,
        optimizer=choose(optimizer_state, state.optimizer),
        skipped=state.skipped + bad,
        skipped_in_a_row=(state.skipped_in_a_row + 1) * bad,
        average=average,
    )
    metrics |= {"grad_norm": grad_norm, "update_norm": update_norm}
    metrics |= {"skipped": after.skipped, "skipped_in_a_row": after.skipped_in_a_row}
    if memory := trained["layers"].get("memory"):
        metrics |= gauges.alpha(memory["alpha"])
    return after, metrics

"""Recall beyond the window, from scratch: where only a memory can help.

    python -m train.experiments.recall                          # AllMem, its writing-off control and SWA; minutes
    python -m train.experiments.recall mqar --variants allmem delta --pairs 2 4 8 --model.lr_init 0.05
    python -m train.experiments.recall passkey --steps 500      # one value of five digits

A tiny model reads noise, then key-value pairs, then noise longer than the reach of its windows, then the keys again
in another order, and must answer each with its value (multi-query associative recall, arXiv 2312.04927). It never
reads an answer: which values are left would be worth 0.57 with four pairs, without a notion of what belongs to what.
A passkey is one pair whose value has several digits, of which all must be right. Training lasts a count of steps, so
that the result is the same on every machine; how many pairs there are, how far back and where on the chunk grid is
drawn anew for each sequence, and a trained model is then asked at each number of pairs and distance separately.

    B batch    L tokens    P most pairs    D digits of a value    V vocabulary: keys, then digits, then noise
"""

import dataclasses
import functools
import json
import pathlib
import time
from typing import Annotated, Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

from allmem_jax.evaluation import cost
from allmem_jax.model import config as config_lib
from allmem_jax.model import functional, lm
from allmem_jax.storage import files, stores
from train import errors

Variant = Literal["allmem", "write_off", "mamba2", "delta", "swa", "full"]

VARIANTS = get_args(Variant)
NOISE = 16  # kinds of noise tokens
STRIDE = 10  # training steps of one call
OPTIMISER = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.add_decayed_weights(0.01))


@dataclasses.dataclass(frozen=True)
class TinyModel:
    """The model that is trained; fields are those of `allmem_jax.ModelConfig`."""

    n_layers: int = 2
    d_model: int = 64
    n_heads: int = 2
    window: int = 8
    sinks: int = 2
    chunk: int = 8
    n_mem: int = 2
    d_mem: int = 32
    qk_scale: Literal["l2", "rms"] = "l2"
    alpha_init: float = 1.0
    lr_init: float = 0.02
    momentum_init: float = 0.05


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """Settings of the recall experiment.

    Attributes:
      variants: what to train: a memory, AllMem's with writing off (the control), windowed or full attention alone.
      pairs: pairs of a sequence; each sequence of training draws one of these.
      keys: different keys.
      values: different digits; chance is values ** -digits.
      digits: tokens of a value.
      gap: fewest and most tokens of noise between the pairs and the questions, in training. The fewest must exceed
        the reach of the windows.
      eval_gaps: what the most is multiplied by for each distance that a trained model is asked at.
      offset: where on the chunk grid the pairs begin, in tokens; or "random" for each sequence.
      steps: of training, a multiple of 10; it ends earlier at `target`.
      target: mean accuracy of ten steps that ends training.
      batch: sequences a step.
      eval_batches: batches of fresh sequences for each accuracy of a trained model.
      learning_rate: of AdamW, after `warmup` steps.
      warmup: steps of linear warm-up.
      seed: of parameters and data.
      out: JSON file for the results, if any.
      model: the model.
    """

    variants: tuple[Variant, ...] = ("allmem", "write_off", "swa")
    pairs: tuple[int, ...] = (4,)
    keys: int = 16
    values: int = 16
    digits: int = 1
    gap: tuple[int, int] = (16, 16)
    eval_gaps: tuple[int, ...] = (1, 2, 4, 16)
    offset: int | Literal["random"] = "random"
    steps: int = 650
    target: float = 0.97
    batch: int = 32
    eval_batches: int = 8
    learning_rate: float = 3e-3
    warmup: int = 50
    seed: int = 0
    out: pathlib.Path | None = None
    model: TinyModel = TinyModel()

    def __post_init__(self):
        if not self.pairs or not 1 <= min(self.pairs) <= max(self.pairs) <= self.keys:
            raise ValueError(f"pairs={self.pairs} must lie between 1 and keys={self.keys}")
        if self.steps < STRIDE or self.steps % STRIDE:
            raise ValueError(f"steps={self.steps} must be a multiple of {STRIDE}")
        if self.gap[0] > self.gap[1]:
            raise ValueError(f"gap={self.gap} must be the fewest and the most tokens of noise")
        reach = self.model.n_layers * (self.model.window - 1)
        if self.gap[0] <= reach:
            raise ValueError(f"gap={self.gap} must exceed the windows' reach of n_layers * (window - 1) = {reach}")


TASKS = {
    "mqar": RecallConfig(),
    "passkey": RecallConfig(pairs=(1,), keys=1, values=10, digits=5),
}


class Sequences(NamedTuple):
    """Some sequences.

    Attributes:
      tokens: int32 [B, L].
      places: int32 [B, P, D], the positions to answer at, in the order of the questions: at a key the first digit, at
        each digit but the last the next one.
      answers: int32 [B, P, D], those digits.
      asked: bool [B, P], which of the questions there are: as many as the row has pairs.
    """

    tokens: Any
    places: Any
    answers: Any
    asked: Any


def lead_in(config: RecallConfig) -> int:
    """Tokens of noise before the chunk that the pairs begin in: the sinks see these and no pair."""
    return -(-config.model.sinks // config.model.chunk) * config.model.chunk


def length(config: RecallConfig, gap: int) -> int:
    """L for the most pairs, the latest begin, and `gap` tokens of noise."""
    latest = config.model.chunk - 1 if config.offset == "random" else config.offset
    return lead_in(config) + latest + max(config.pairs) * (1 + 2 * config.digits) + gap


def sequences(config: RecallConfig, rng: np.random.Generator, pairs: np.ndarray, gap: np.ndarray) -> Sequences:
    """Draws one sequence for each of pairs and gap, int [B] each; L is that of the longest gap.

    Rows with fewer pairs or a shorter gap have noise after the last answer.

    Args:
      config: of the task.
      rng: of all that is drawn.
      pairs: pairs of each row, at most P = max(config.pairs).
      gap: tokens of noise between the last pair and the first question.
    """
    rows, most, size = len(pairs), max(config.pairs), 1 + config.digits
    asked = np.arange(most) < pairs[:, None]  # [B, P]
    keys = rng.permuted(np.tile(np.arange(config.keys), (rows, 1)), axis=1)[:, :most]
    values = config.keys + rng.integers(config.values, size=(rows, most, config.digits))
    told = np.concatenate([keys[..., None], values], axis=-1)  # [B, P, 1 + D]
    order = np.argsort(np.where(asked, rng.random((rows, most)), 1 + np.arange(most)), axis=1)
    again = np.take_along_axis(told, order[..., None], axis=1)
    offset = rng.integers(config.model.chunk, size=rows) if config.offset == "random" else config.offset
    begin = np.broadcast_to(lead_in(config) + offset, rows)[:, None, None]
    at = begin + np.arange(most * size).reshape(most, size)  # [B, P, 1 + D]
    places = begin + (pairs * size + gap)[:, None, None] + np.arange(most * config.digits).reshape(most, config.digits)
    tokens = config.keys + config.values + rng.integers(NOISE, size=(rows, length(config, gap.max())))
    row, pair = np.nonzero(asked)
    for place, item in ((at, told), (places, again[..., :-1])):
        tokens[row[:, None], place[row, pair]] = item[row, pair]
    places = np.where(asked[..., None], places, 0)
    return Sequences(tokens.astype(np.int32), places.astype(np.int32), again[..., 1:].astype(np.int32), asked)


def training_batches(config: RecallConfig, first: int) -> Sequences:
    """The ten batches from step `first` on, with a leading axis: pairs and gap are drawn for each sequence."""
    rng = np.random.Generator(np.random.Philox(key=[config.seed, first]))
    rows = STRIDE * config.batch
    gap = rng.integers(config.gap[0], config.gap[1] + 1, size=rows)
    gap[0] = config.gap[1]  # so that L is always the same
    drawn = sequences(config, rng, rng.choice(config.pairs, rows), gap)
    return Sequences(*(part.reshape(STRIDE, config.batch, *part.shape[1:]) for part in drawn))


def model_config(config: RecallConfig, variant: Variant) -> config_lib.ModelConfig:
    """The tiny model of a variant."""
    return config_lib.ModelConfig(
        vocab_size=config.keys + config.values + NOISE,
        n_kv_heads=config.model.n_heads,
        head_dim=config.model.d_model // config.model.n_heads,
        d_ff=2 * config.model.d_model,
        mixer="allmem" if variant == "write_off" else variant,
        write=variant != "write_off",
        **dataclasses.asdict(config.model),
    )


def loss_and_accuracy(params: lm.Params, tiny: config_lib.ModelConfig, drawn: Sequences) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of the asked digits in nats, and the share of answers whose digits are all most likely."""
    hidden: Any = lm.AllMemLM(tiny).apply({"params": params}, drawn.tokens, return_hidden=True)
    rows = jnp.arange(hidden.shape[0])[:, None, None]
    logits = functional.logits(hidden[rows, drawn.places], lm.head_kernel(params, tiny))  # [B, P, D, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, drawn.answers).mean(-1)
    right = jnp.all(jnp.argmax(logits, axis=-1) == drawn.answers, axis=-1) & drawn.asked
    count = jnp.sum(drawn.asked)
    return jnp.sum(losses * drawn.asked) / count, jnp.sum(right) / count


def sizes(config: RecallConfig, variant: Variant) -> dict[str, int]:
    """Parameters, and bytes of one row's decode state at the end of training's longest sequence, by part."""
    tiny = model_config(config, variant)
    shapes = jax.eval_shape(lambda: lm.init_params(tiny))
    parts = cost.state_parts(tiny, length(config, config.gap[1]))
    return {"parameters": sum(leaf.size for leaf in jax.tree.leaves(shapes)), **parts}


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def stride(
    tiny: config_lib.ModelConfig, carry: tuple[lm.Params, Any], rates: jax.Array, drawn: Sequences
) -> tuple[tuple[lm.Params, Any], jax.Array]:
    """Ten steps. `carry`: parameters and moments; rates [10]: learning rates. Returns `carry`, (loss, accuracy) [2]."""

    def step(carry: tuple[lm.Params, Any], inputs: Any) -> tuple[tuple[lm.Params, Any], jax.Array]:
        (params, moments), (rate, drawn) = carry, inputs
        measured, grads = jax.value_and_grad(loss_and_accuracy, has_aux=True)(params, tiny, drawn)
        updates, moments = OPTIMISER.update(grads, moments, params)
        params = jax.tree.map(lambda param, update: param - rate * update, params, updates)
        return (params, moments), jnp.stack(measured)

    carry, measured = jax.lax.scan(step, carry, (rates, drawn))
    return carry, measured.mean(0)


def fit(config: RecallConfig, variant: Variant) -> tuple[lm.Params, list[tuple[int, float, float]]]:
    """Trains to `steps` or `target`; returns the parameters and a curve of (step, loss, accuracy), ten-step means."""
    tiny = model_config(config, variant)
    params = lm.init_params(tiny, config.seed)
    carry: Any = (params, OPTIMISER.init(params))
    curve: list[tuple[int, float, float]] = []
    with tqdm.tqdm(total=config.steps, desc=variant, disable=None) as bar:
        for first in range(0, config.steps, STRIDE):
            rates = config.learning_rate * np.minimum(1, np.arange(first, first + STRIDE) / max(config.warmup, 1))
            carry, measured = stride(tiny, carry, rates.astype(np.float32), training_batches(config, first))
            loss, accuracy = measured.tolist()
            curve.append((first + STRIDE, loss, accuracy))
            bar.set_postfix(loss=f"{loss:.3f}", accuracy=f"{accuracy:.3f}", refresh=False)
            bar.update(STRIDE)
            if accuracy >= config.target:
                break
    return carry[0], curve


ask = jax.jit(lambda tiny, params, drawn: loss_and_accuracy(params, tiny, drawn)[1], static_argnums=0)


def judge(config: RecallConfig, variant: Variant, params: lm.Params) -> list[tuple[int, int, float]]:
    """Accuracy of a trained model on fresh sequences, as (gap, pairs, accuracy), gap the slower."""
    tiny = model_config(config, variant)
    rng = np.random.Generator(np.random.Philox(key=[config.seed, config.steps]))
    found = []
    for gap in (times * config.gap[1] for times in config.eval_gaps):
        for pairs in config.pairs:
            rows = [np.full(config.batch, count) for count in (pairs, gap)]
            right = [ask(tiny, params, sequences(config, rng, *rows)) for _ in range(config.eval_batches)]
            found.append((gap, pairs, float(np.mean(right))))
    return found


def train(config: RecallConfig, variant: Variant) -> dict[str, Any]:
    """Trains one variant; returns its sizes, steps, seconds, curve, and accuracy by gap and number of pairs."""
    start = time.perf_counter()
    params, curve = fit(config, variant)
    return {
        "variant": variant,
        **sizes(config, variant),
        "steps": curve[-1][0],
        "accuracy": judge(config, variant, params),
        "seconds": time.perf_counter() - start,
        "curve": curve,
    }


def main(config: RecallConfig) -> list[dict[str, Any]]:
    """Trains every variant and prints the table."""
    stores.local_only(config.out or "", "out")
    results = [train(config, variant) for variant in config.variants]
    print(f"accuracy by tokens of gap / pairs (chance {config.values**-config.digits:.3g})")
    columns = "".join(f"{f'{gap}/{pairs}':>8}" for gap, pairs, _ in results[0]["accuracy"])
    print(f"{'variant':<10} {'steps':>6} {'seconds':>8}{columns}")
    for row in results:
        found = "".join(f"{accuracy:>8.3f}" for _, _, accuracy in row["accuracy"])
        print(f"{row['variant']:<10} {row['steps']:>6} {row['seconds']:>8.1f}{found}")
    if config.out is not None:
        files.write(config.out, json.dumps(results))
    return results


def parse(args: list[str] | None = None) -> RecallConfig:
    """The config that command-line arguments ask for."""
    command: Any = (
        Annotated[RecallConfig, tyro.conf.subcommand("mqar", default=TASKS["mqar"])]
        | Annotated[RecallConfig, tyro.conf.subcommand("passkey", default=TASKS["passkey"])]
    )
    program = "python -m train.experiments.recall"
    return tyro.cli(command, args=args, default=TASKS["mqar"], prog=program, description=__doc__)


if __name__ == "__main__":
    with errors.one_line():
        main(parse())

"""Recall beyond the window, from scratch: where only a memory can help.

    python -m train.recall                           # AllMem, its writing-off control and SWA + sinks; 5 to 6 minutes
    python -m train.recall --variants allmem --model.qk_scale rms --pairs 8 --steps 2000

A tiny model reads some noise for the sinks, key-value pairs, then noise longer than the reach of its windows, then
the keys again in another order, and must answer each with its value (multi-query associative recall, arXiv
2312.04927). Training stops at `target` accuracy or after `steps`: a count of steps, so that the result is the same on
every machine.

    B batch    L tokens    P pairs    V vocabulary: keys, then values, then noise
"""

import dataclasses
import json
import pathlib
import time
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
import tyro

from allmem_jax import config as config_lib
from allmem_jax import model as model_lib

Variant = Literal["allmem", "write_off", "swa", "full"]


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
    alpha_init: float = 0.1
    lr_init: float = 0.02
    momentum_init: float = 0.5


@dataclasses.dataclass(frozen=True)
class RecallConfig:
    """Settings of the recall experiment.

    Attributes:
      variants: what to train: the memory, its control with writing off, windowed attention alone, full attention.
      pairs: key-value pairs per sequence.
      keys, values: how many of each there are; chance is 1 / values.
      gap: tokens of noise between the pairs and the questions; must exceed the reach of the windows.
      steps: at most so many; training stops earlier at `target`.
      target: accuracy on fresh sequences that ends training.
      batch: sequences a step.
      learning_rate: of AdamW, after 50 steps of warm-up.
      seed: of parameters and data.
      out: JSON file for the results, if any.
      model: the model.
    """

    variants: tuple[Variant, ...] = ("allmem", "write_off", "swa")
    pairs: int = 4
    keys: int = 16
    values: int = 16
    gap: int = 24
    steps: int = 650
    target: float = 0.97
    batch: int = 64
    learning_rate: float = 3e-3
    seed: int = 0
    out: pathlib.Path | None = None
    model: TinyModel = TinyModel()

    def __post_init__(self):
        if self.pairs > self.keys:
            raise ValueError(f"pairs={self.pairs} needs at least as many keys; keys={self.keys}")
        reach = self.model.n_layers * (self.model.window - 1)
        if self.gap <= reach:
            raise ValueError(f"gap={self.gap} must exceed the windows' reach of n_layers * (window - 1) = {reach}")


def lead_in(config: RecallConfig) -> int:
    """Tokens of noise before the pairs: the sinks see these and no pair, and the pairs begin on the chunk grid."""
    return -(-config.model.sinks // config.model.chunk) * config.model.chunk


def sequences(config: RecallConfig, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws tokens int32 [B, L] and a mask bool [B, L] of the positions whose next token is an answer."""
    p, b = config.pairs, config.batch
    k1, k2, k3, k4 = jax.random.split(key, 4)
    permuted = jax.vmap(lambda k: jax.random.permutation(k, config.keys)[:p])
    keys = permuted(jax.random.split(k1, b))  # [B, P]
    values = config.keys + jax.random.randint(k2, (b, p), 0, config.values)
    lead = lead_in(config)
    noise = config.keys + config.values + jax.random.randint(k3, (b, lead + config.gap), 0, 16)
    order = jax.vmap(lambda k: jax.random.permutation(k, p))(jax.random.split(k4, b))

    def interleave(keys: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.stack([keys, values], axis=-1).reshape(b, 2 * p)

    asked = interleave(jnp.take_along_axis(keys, order, 1), jnp.take_along_axis(values, order, 1))
    tokens = jnp.concatenate([noise[:, :lead], interleave(keys, values), noise[:, lead:], asked], axis=1)
    position = jnp.arange(tokens.shape[1])
    first = lead + 2 * p + config.gap
    is_question = (position >= first) & ((position - first) % 2 == 0)
    return tokens, jnp.broadcast_to(is_question, tokens.shape)


def model_config(config: RecallConfig, variant: Variant) -> config_lib.ModelConfig:
    """The tiny model of a variant."""
    tiny = dataclasses.asdict(config.model)
    return config_lib.ModelConfig(
        vocab_size=config.keys + config.values + 16,
        n_kv_heads=config.model.n_heads,
        head_dim=config.model.d_model // config.model.n_heads,
        d_ff=2 * config.model.d_model,
        mixer="allmem" if variant == "write_off" else variant,
        write=variant != "write_off",
        **tiny,
    )


def train(config: RecallConfig, variant: Variant) -> dict[str, Any]:
    """Trains one variant; returns its steps, accuracy on 20 fresh batches, curve and seconds."""
    tiny = model_config(config, variant)
    lm = model_lib.AllMemLM(tiny)
    params = model_lib.init_params(tiny, config.seed)
    schedule = optax.warmup_constant_schedule(0.0, config.learning_rate, 50)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.01))
    data_key = jax.random.key(config.seed + 1)

    def loss_and_accuracy(params: model_lib.Params, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens, asked = sequences(config, key)
        logits: Any = lm.apply({"params": params}, tokens)
        logits, targets, asked = logits[:, :-1], tokens[:, 1:], asked[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        right = (jnp.argmax(logits, axis=-1) == targets) & asked
        return jnp.sum(losses * asked) / jnp.sum(asked), jnp.sum(right) / jnp.sum(asked)

    @jax.jit
    def step(params: model_lib.Params, moments: Any, index: jax.Array) -> tuple[Any, Any, jax.Array, jax.Array]:
        key = jax.random.fold_in(data_key, index)
        (loss, accuracy), grads = jax.value_and_grad(loss_and_accuracy, has_aux=True)(params, key)
        updates, moments = optimiser.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, loss, accuracy

    moments, curve, start = optimiser.init(params), [], time.perf_counter()
    steps = 0
    with tqdm.tqdm(total=config.steps, desc=variant, disable=None) as bar:
        for steps in range(1, config.steps + 1):
            params, moments, loss, accuracy = step(params, moments, jnp.int32(steps))
            curve.append(float(accuracy))
            bar.update()
            if steps % 10 == 0:
                bar.set_postfix(loss=f"{float(loss):.3f}", accuracy=f"{np.mean(curve[-10:]):.3f}")
                if np.mean(curve[-10:]) >= config.target:
                    break
    test = jax.jit(lambda p, i: loss_and_accuracy(p, jax.random.fold_in(data_key, i))[1])
    fresh = float(np.mean([test(params, jnp.int32(10**6 + i)) for i in range(20)]))
    return {
        "variant": variant,
        "steps": steps,
        "accuracy": fresh,
        "seconds": time.perf_counter() - start,
        "curve": curve,
    }


def main(config: RecallConfig) -> list[dict[str, Any]]:
    """Trains every variant and prints the table."""
    results = [train(config, variant) for variant in config.variants]
    print(f"{'variant':<10} {'steps':>6} {'accuracy':>9} {'seconds':>8}    (chance {1 / config.values:.3f})")
    for row in results:
        print(f"{row['variant']:<10} {row['steps']:>6} {row['accuracy']:>9.3f} {row['seconds']:>8.1f}")
    if config.out is not None:
        config.out.parent.mkdir(parents=True, exist_ok=True)
        config.out.write_text(json.dumps(results))
    return results


if __name__ == "__main__":
    main(tyro.cli(RecallConfig, description=__doc__))

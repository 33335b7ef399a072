"""The programs that a run compiles: from a recipe to jitted functions. Nothing here runs them.

B batch    L tokens of a row    d model
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from allmem_jax.model import config as config_lib
from allmem_jax.model import lm, sharding
from train.loop import models, steps
from train.loop import optimizer as optimizer_lib
from train.recipe import FinetuneConfig


def split(config: FinetuneConfig, params: lm.Params) -> tuple[lm.Params, lm.Params]:
    """(trained, frozen): which of a model's parameters the objective changes, and the rest."""
    if config.objective == "pretrain":
        return params, {}
    frozen, trained = lm.split_params(params)
    return trained, frozen


def initial_state(config: FinetuneConfig, trained: lm.Params) -> steps.TrainState:
    """The state before the first step."""
    return steps.init_state(trained, optimizer(config), config.ema > 0)


def random_params(config: FinetuneConfig, model_config: config_lib.ModelConfig) -> lm.Params:
    """Random parameters of the whole model in the recipe's types: to be jitted where they are to lie."""
    params = lm.random_params(model_config, config.seed)
    if config.objective == "pretrain":
        return params
    backbone, memory = lm.split_params(params)
    return lm.merge_params(jax.tree.map(lambda x: x.astype(config.backbone_dtype), backbone), memory)


def optimizer(config: FinetuneConfig) -> optax.GradientTransformation:
    """AdamW on the recipe's schedule."""
    schedule = optimizer_lib.wsd_schedule(config.learning_rate, config.steps, config.warmup, config.decay)
    return optimizer_lib.make(schedule, config.betas, config.weight_decay, config.clip)


def step_loss(config: FinetuneConfig) -> steps.Loss:
    """What the recipe minimises; pretraining takes every position."""
    return steps.Loss(
        positions=config.positions if config.objective == "distill" else 1.0,
        beyond_window=config.beyond_window,
        inside_weight=config.inside_weight,
        ce_weight=config.ce_weight,
        answer_weight=config.answer_weight,
        block=config.loss_block,
    )


def draw(config: FinetuneConfig, step: int) -> np.ndarray:
    """uint32 [2], the seed and the step: what decides a step's positions. Traced, so that all seeds share a program."""
    return np.asarray([config.seed % 2**32, step], np.uint32)


def make(
    config: FinetuneConfig, model_config: config_lib.ModelConfig, shardings: Any, mesh: Mesh
) -> tuple[Any, Callable[[int], Any]]:
    """The jitted teacher (None in pretraining), and chunk -> the jitted step.

    Each chunk compiles once, when it is first drawn. The step takes what `draw` gives in place of a key.

    Args:
      config: the recipe.
      model_config: of the student.
      shardings: of the state.
      mesh: of the devices.
    """
    loss, update = step_loss(config), optimizer(config)
    everywhere = NamedSharding(mesh, PartitionSpec())

    @functools.cache
    def program(chunk: int) -> Any:
        one = functools.partial(
            steps.train_step,
            config=model_config.replace(chunk=chunk),
            loss=loss,
            optimizer=update,
            microbatches=config.accumulate,
            ema=config.ema,
        )

        def step(state, frozen, batch, hidden, window, sinks, drawn):
            key = jax.random.fold_in(jax.random.key(drawn[0]), drawn[1])
            return one(state, frozen, batch, hidden, window, sinks, key)

        return jax.jit(step, donate_argnums=0, out_shardings=(shardings, everywhere))

    def student(chunk: int) -> Any:
        return program(chunk if model_config.mixer == "allmem" else max(config.chunk))  # the baselines have no chunks

    if config.objective == "pretrain":
        return None, student

    def hidden(frozen: lm.Params, batch: steps.Batch) -> jax.Array:
        return steps.teacher_hidden(frozen, model_config, batch, config.accumulate)

    return jax.jit(hidden, out_shardings=sharding.batch_sharding(mesh)), student


def start(config: FinetuneConfig, pretrained: models.Pretrained, mesh: Mesh) -> tuple[steps.TrainState, lm.Params]:
    """The state before the first step, and the frozen parameters, where they belong on the mesh."""
    if pretrained.backbone is None or pretrained.memory is None:
        init = functools.partial(random_params, config, pretrained.config)
        params = jax.jit(init, out_shardings=sharding.tree_shardings(jax.eval_shape(init), mesh))()
    else:
        params = sharding.place(lm.merge_params(pretrained.backbone, pretrained.memory), mesh)
    trained, frozen = split(config, params)
    first = functools.partial(initial_state, config)
    shardings = sharding.tree_shardings(jax.eval_shape(first, trained), mesh)
    return jax.jit(first, out_shardings=shardings)(trained), frozen

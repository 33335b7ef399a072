"""The programs of a server: rows come and go in a batch of fixed size, each with its own way to draw.

B slots    V vocabulary    K most likely tokens that are told
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from allmem_jax.decoding import generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.model import state as state_lib

TOLD = 20  # most likely tokens whose probabilities an answer may tell


class Draws(NamedTuple):
    """How each slot draws its next token, `generation.Sampling` by row, and whether the top K are told; [B] each."""

    live: Any
    seed: Any
    count: Any
    temperature: Any
    top_k: Any
    top_p: Any
    told: Any


class Drawn(NamedTuple):
    """Tokens int32 [B], their log-probabilities [B], and the K most likely ones with theirs, [B, K]."""

    token: Any
    logprob: Any
    top: Any
    top_logprobs: Any


@functools.partial(jax.jit, donate_argnames=("state", "logits"))
def seat(
    state: state_lib.DecodeState, logits: jax.Array, one: state_lib.DecodeState, its_logits: jax.Array, slot: jax.Array
) -> tuple[state_lib.DecodeState, jax.Array]:
    """The batch, with the row of `one` [1 row] and its logits [1, V] in the place of `slot`."""

    def put(leaf: jax.Array, row: jax.Array) -> jax.Array:
        axis = 0 if leaf.ndim == 1 else 1  # all but positions have layers first
        return jax.lax.dynamic_update_slice_in_dim(leaf, row, slot, axis)

    return jax.tree.map(put, state, one), jax.lax.dynamic_update_slice_in_dim(logits, its_logits, slot, 0)


@functools.partial(jax.jit, static_argnames="config", donate_argnames=("state", "logits"))
def step(
    params: lm.Params,
    config: config_lib.ModelConfig,
    logits: jax.Array,
    state: state_lib.DecodeState,
    draws: Draws,
) -> tuple[Drawn, jax.Array, state_lib.DecodeState]:
    """Draws a token in every live slot from logits [B, V] and reads it; the others stay as they are.

    A row's n-th token depends on its logits, settings, seed and n alone, so it is that of `generation.stream`, whoever
    is served beside it.
    """
    token = _draw(logits, draws)
    every = jax.nn.log_softmax(logits, axis=-1)
    logprob = jnp.take_along_axis(every, token[:, None], axis=1)[:, 0]
    count = min(TOLD, logits.shape[-1])
    nothing = jnp.zeros((len(token), count), jnp.float32), jnp.zeros((len(token), count), jnp.int32)
    best, top = jax.lax.cond(draws.told.any(), lambda: tuple(jax.lax.top_k(every, count)), lambda: nothing)
    lengths = draws.live.astype(jnp.int32)
    result: Any = lm.AllMemLM(config).apply(lm.variables(params), token[:, None], lengths=lengths, state=state)
    return Drawn(token, logprob, top, best), result[0][:, 0], result[1]


def _draw(logits: jax.Array, draws: Draws) -> jax.Array:
    """int32 [B]; nothing is drawn where all rows take the likeliest."""
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawing = draws.live & (draws.temperature > 0)

    def one(seed, count, row):  # as `generation.sample` draws for a batch of one
        key = jax.random.fold_in(jax.random.key(seed), count)
        return jax.random.categorical(key, row[None], axis=-1)[0].astype(jnp.int32)

    def drawn() -> jax.Array:
        fields = draws.temperature, draws.top_k, draws.top_p
        settings: Any = (jnp.where(drawing, field, off)[:, None] for field, off in zip(fields, (1, 0, 1), strict=True))
        rows = generation.likely(logits, generation.Sampling(*settings))
        return jnp.where(drawing, jax.vmap(one)(draws.seed, draws.count, rows), greedy)

    return jax.lax.cond(drawing.any(), drawn, lambda: greedy)

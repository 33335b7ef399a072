"""Generation with constant state: bounded prefill pieces, then one jitted step per token.

Both programs compile once per (config, batch, piece) shape: prompts of any length go through in pieces of fixed size,
each row at its own pace, and decoding has a fixed shape. Sampling settings are traced.

    B batch    T tokens of a prefill piece    V vocabulary
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from allmem_jax import config as config_lib
from allmem_jax import functional, model
from allmem_jax import state as state_lib


class Sampling(NamedTuple):
    """How the next token is drawn; all three may be set together, temperature first.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 means all.
      top_p: only the smallest set of most likely tokens whose probability reaches p; 1 means all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """ValueError that names the field out of range."""
        if not self.temperature >= 0:
            raise ValueError(f"temperature={self.temperature} must be 0 (greedy) or positive")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must be 0 (all) or positive")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


GREEDY = Sampling()


def sample(key: jax.Array, logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws int32 [B] from logits float32 [B, V]; the fields of `sampling` may be traced."""

    def draw(_) -> jax.Array:
        scaled = logits / jnp.maximum(sampling.temperature, 1e-6)
        ranked = jnp.sort(scaled, axis=-1, descending=True)
        k = jnp.where(sampling.top_k > 0, jnp.minimum(sampling.top_k, logits.shape[-1]), logits.shape[-1])
        lowest = jnp.take_along_axis(ranked, jnp.broadcast_to(k - 1, (len(logits), 1)), axis=-1)
        kept = jnp.where(ranked >= lowest, ranked, -jnp.inf)
        probabilities = jax.nn.softmax(kept, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of the tokens ranked higher
        nucleus = jnp.min(jnp.where(before < sampling.top_p, kept, jnp.inf), axis=-1, keepdims=True)
        return jax.random.categorical(key, jnp.where(scaled >= nucleus, scaled, -jnp.inf), axis=-1)

    greedy = sampling.temperature <= 0
    return jax.lax.cond(greedy, lambda _: jnp.argmax(logits, axis=-1), draw, None).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames="config")
def prefill_piece(
    params: model.Params,
    config: config_lib.ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    state: state_lib.DecodeState,
    last: jax.Array,
) -> tuple[jax.Array, state_lib.DecodeState]:
    """Reads tokens [B, T], `lengths` [B] of each row real.

    Returns the logits [B, V] after each row's last real token (rows of length 0 keep `last`) and the state.
    """
    result: Any = model.AllMemLM(config).apply(
        {"params": params}, tokens, lengths=lengths, state=state, return_hidden=True
    )
    hidden, state = result
    index = jnp.maximum(lengths - 1, 0)
    newest = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
    logits = functional.logits(newest, model.head_kernel(params, config))
    return jnp.where(lengths[:, None] > 0, logits, last), state


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode_step(
    params: model.Params,
    config: config_lib.ModelConfig,
    logits: jax.Array,
    state: state_lib.DecodeState,
    done: jax.Array,
    key: jax.Array,
    sampling: Sampling,
) -> tuple[jax.Array, jax.Array, state_lib.DecodeState]:
    """Draws a token from logits [B, V] and reads it; rows of bool `done` [B] stay as they are.

    Returns the tokens [B], the next logits and the state.
    """
    token = sample(key, logits, sampling)
    lengths = jnp.where(done, 0, 1)
    result: Any = model.AllMemLM(config).apply({"params": params}, token[:, None], lengths=lengths, state=state)
    return token, result[0][:, 0], result[1]


def prefill(
    params: model.Params,
    config: config_lib.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    state: state_lib.DecodeState | None = None,
    piece: int = 256,
    progress: Callable[[int], Any] | None = None,
) -> tuple[jax.Array, state_lib.DecodeState]:
    """Reads prompts of any lengths in pieces of `piece` tokens, so that no buffer grows with a prompt.

    Args:
      params: parameters of the model.
      config: a config with a constant state (any mixer but "full").
      prompts: B lists of token ids, none empty.
      state: what the rows have already seen; None for nothing. It is read, not consumed: fork it at will.
      piece: tokens read at a time; another value compiles anew.
      progress: called with the number of prompt tokens just read.

    Returns:
      Logits float32 [B, V] after each prompt, and the state.
    """
    if piece < 1:
        raise ValueError(f"piece={piece} must be at least 1")
    rows = [np.asarray(prompt, np.int32) for prompt in prompts]
    if not rows:
        raise ValueError("prompts is empty: give at least one prompt")
    for index, row in enumerate(rows):
        if row.ndim != 1 or not row.size:
            raise ValueError(f"prompt {index} is empty: give it at least one token (a BOS token, for instance)")
        if row.min() < 0 or row.max() >= config.vocab_size:
            raise ValueError(f"prompt {index} has token ids outside [0, {config.vocab_size}): wrong tokenizer?")
    if state is None:
        state = state_lib.init_state(config, len(rows))
    elif state.position.shape[0] != len(rows):
        raise ValueError(f"state holds {state.position.shape[0]} rows for {len(rows)} prompts")
    logits = jnp.zeros((len(rows), config.vocab_size), jnp.float32)
    for start in range(0, max(map(len, rows)), piece):
        tokens = np.zeros((len(rows), piece), np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for index, row in enumerate(rows):
            part = row[start : start + piece]
            tokens[index, : len(part)], lengths[index] = part, len(part)
        logits, state = prefill_piece(params, config, tokens, lengths, state, logits)
        if progress is not None:
            progress(int(lengths.sum()))
    return logits, state


def stream(
    params: model.Params,
    config: config_lib.ModelConfig,
    logits: jax.Array,
    state: state_lib.DecodeState,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array, state_lib.DecodeState]]:
    """Yields, per token, (tokens int32 [B], live bool [B], logits, state) until all rows stopped or `max_tokens`.

    `live` tells the rows whose token counts: those that had not stopped before. A stop token is live itself, so the
    state has read it. To go on later (another turn of a chat), keep the last `logits` and `state`, of which the state
    is valid until the next token is asked for.
    """
    sampling.check()
    sampling = Sampling(float(sampling.temperature), int(sampling.top_k), float(sampling.top_p))  # one compiled type
    key = jax.random.key(seed)
    done = np.zeros(logits.shape[0], bool)
    state = jax.tree.map(jnp.copy, state)  # decode_step consumes its state; the caller's stays
    for index in range(max_tokens):
        tokens, logits, state = decode_step(
            params, config, logits, state, done, jax.random.fold_in(key, index), sampling
        )
        host = np.asarray(tokens)
        live = ~done
        done = done | np.isin(host, np.asarray(stop_tokens, np.int32))
        yield host, live, logits, state
        if done.all():
            return


def generate(
    params: model.Params,
    config: config_lib.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] = (),
    seed: int = 0,
    piece: int = 256,
    state: state_lib.DecodeState | None = None,
    on_tokens: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> list[list[int]]:
    """Continues each prompt; the tokens up to and without a stop token.

    Args:
      params: parameters of the model.
      config: the model; a "full" mixer decodes with a cache as long as the longest row.
      prompts: B lists of token ids of any lengths.
      max_tokens: tokens to generate at most.
      sampling: how tokens are drawn; greedy by default.
      stop_tokens: ids that end a row.
      seed: of the draws.
      piece: tokens of the prompt read at a time.
      state: what the rows have seen before the prompts, from `prefill` or an earlier run.
      on_tokens: called per step with tokens int32 [B] and live bool [B], for streaming.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    if config.mixer == "full":
        longest = max((len(prompt) for prompt in prompts), default=0) + max_tokens
        config = full_as_windowed(config, longest)
    logits, state = prefill(params, config, prompts, state=state, piece=piece)
    out: list[list[int]] = [[] for _ in prompts]
    steps = stream(
        params, config, logits, state, max_tokens=max_tokens, sampling=sampling, stop_tokens=stop_tokens, seed=seed
    )
    for tokens, live, _, _ in steps:
        if on_tokens is not None:
            on_tokens(tokens, live)
        for row, token, alive in zip(out, tokens.tolist(), live.tolist(), strict=True):
            if alive and token not in stop_tokens:
                row.append(token)
    return out


def full_as_windowed(config: config_lib.ModelConfig, length: int) -> config_lib.ModelConfig:
    """The original model as a windowed one that forgets nothing within `length` tokens (rounded up to a bucket)."""
    return config.replace(mixer="swa", window=bucket(length, 256), sinks=0)


def bucket(length: int, at_least: int) -> int:
    """The smallest power of two that holds `length` tokens, and no less than `at_least`: few shapes to compile."""
    return max(at_least, 1 << (length - 1).bit_length())

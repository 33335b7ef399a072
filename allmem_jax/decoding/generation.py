"""Generation with constant state: bounded prefill pieces, then one jitted step per token.

Both programs compile once per (config, batch, piece) shape: prompts of any length go through in pieces of a fixed size,
short ones in small pieces, each row at its own pace, and decoding has a fixed shape. Sampling settings are traced.

    B batch    T tokens of a prefill piece    V vocabulary
"""

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from allmem_jax.model import config as config_lib
from allmem_jax.model import functional, lm
from allmem_jax.model import state as state_lib


class Sampling(NamedTuple):
    """How the next token is drawn; all three may be set together, temperature first.

    Attributes:
      temperature: divides the logits; 0 takes the most likely token.
      top_k: only the k most likely tokens; 0 means all.
      top_p: only the smallest set of most likely tokens whose probability reaches p; 1 means all.

    Among equally likely tokens, those with lower ids count as more likely.
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
        return jax.random.categorical(key, likely(logits, sampling), axis=-1)

    greedy = sampling.temperature <= 0
    return jax.lax.cond(greedy, lambda _: jnp.argmax(logits, axis=-1), draw, None).astype(jnp.int32)


def likely(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits [B, V] by temperature, -inf for tokens that are not drawn; `sampling` has scalars or arrays [B, 1].

    They are sorted only where that makes a difference: it takes as long as a step of a small model.
    """
    scaled = logits / jnp.maximum(sampling.temperature, 1e-6)

    def best(scaled: jax.Array) -> jax.Array:
        order = jnp.argsort(-scaled, axis=-1, stable=True)  # rank -> token
        ranked = jnp.take_along_axis(scaled, order, axis=-1)
        kept = (jnp.arange(logits.shape[-1]) < sampling.top_k) | (sampling.top_k == 0)
        probabilities = jax.nn.softmax(jnp.where(kept, ranked, -jnp.inf), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities  # probability of the tokens ranked higher
        kept = kept & ((before < sampling.top_p) | (sampling.top_p == 1))
        rows = jnp.arange(logits.shape[0])[:, None]
        allowed = jnp.zeros(logits.shape, bool).at[rows, order].set(kept)
        return jnp.where(allowed, scaled, -jnp.inf)

    narrowed = jnp.any((jnp.asarray(sampling.top_k) > 0) | (jnp.asarray(sampling.top_p) < 1))
    return jax.lax.cond(narrowed, best, lambda scaled: scaled, scaled)


@functools.partial(jax.jit, static_argnames="config")
def prefill_piece(
    params: lm.Params,
    config: config_lib.ModelConfig,
    tokens: jax.Array,
    lengths: jax.Array,
    state: state_lib.DecodeState,
    last: jax.Array,
) -> tuple[jax.Array, state_lib.DecodeState]:
    """Reads tokens [B, T], `lengths` [B] of each row real.

    Returns the logits [B, V] after each row's last real token (rows of length 0 keep `last`) and the state.
    """
    result: Any = lm.AllMemLM(config).apply(
        lm.variables(params), tokens, lengths=lengths, state=state, return_hidden=True
    )
    hidden, state = result
    index = jnp.maximum(lengths - 1, 0)
    newest = jnp.take_along_axis(hidden, index[:, None, None], axis=1)[:, 0]
    logits = lm.logits(params, config, newest)
    return jnp.where(lengths[:, None] > 0, logits, last), state


@functools.partial(jax.jit, static_argnames="config", donate_argnames="state")
def decode_step(
    params: lm.Params,
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
    result: Any = lm.AllMemLM(config).apply(lm.variables(params), token[:, None], lengths=lengths, state=state)
    return token, result[0][:, 0], result[1]


def prefill(
    params: lm.Params,
    config: config_lib.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    state: state_lib.DecodeState | None = None,
    piece: int = 256,
    progress: Callable[[int], Any] | None = None,
) -> tuple[jax.Array, state_lib.DecodeState]:
    """Reads prompts of any lengths in pieces of `piece` tokens, so that no buffer grows with a prompt.

    Args:
      params: parameters of the model, or what `lm.unstack` made of them, which spares each call to do it.
      config: the model. A "full" mixer gets a cache that holds what the rows have seen and the prompts.
      prompts: B lists of token ids, none empty.
      state: what the rows have already seen; None for nothing. It is read, not consumed: fork it at will.
      piece: tokens read at a time; another value compiles anew. Prompts of at most half of it are read in smaller ones.
      progress: called with the number of prompt tokens just read.

    Returns:
      Logits float32 [B, V] after each prompt, and the state; `stream` goes on from both.

    Raises:
      ValueError: prompts that are none, empty or not of this vocabulary; a state of another number of rows, of another
        model, or, for a "full" mixer, one that has forgotten.
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
    if state is not None and state.position.shape[0] != len(rows):
        raise ValueError(f"state holds {state.position.shape[0]} rows for {len(rows)} prompts")
    config, state = with_room(config, state, len(rows), max(map(len, rows)))
    logits = jnp.zeros((len(rows), config.vocab_size), jnp.float32)
    params = lm.unstack(params, dtype=config.dtype)
    state = fitting_state(params, state)
    piece = fitting_piece(max(map(len, rows)), piece)
    for start in range(0, max(map(len, rows)), piece):
        tokens = np.zeros((len(rows), piece), np.int32)
        lengths = np.zeros(len(rows), np.int32)
        for index, row in enumerate(rows):
            part = row[start : start + piece]
            tokens[index, : len(part)], lengths[index] = part, len(part)
        logits, state = prefill_piece(params, config, tokens, lengths, state, logits)
        if progress is not None:
            progress(int(lengths.sum()))
    return logits, functional.numbers(state)


def fitting_piece(left: int, piece: int) -> int:
    """Tokens of the pieces that `left` tokens are read in: `piece`, or fewer where half of one would do."""
    return piece if left > piece // 2 else max(piece // 8, min(piece, 8))


def fitting_state(params: lm.Params, state: state_lib.DecodeState) -> state_lib.DecodeState:
    """A state as it is best decoded from with these parameters: `functional.bits` beside what `lm.unstack` made."""
    return functional.bits(state) if "kernels" in params else state


def stream(
    params: lm.Params,
    config: config_lib.ModelConfig,
    logits: jax.Array,
    state: state_lib.DecodeState,
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray, jax.Array, state_lib.DecodeState]]:
    """Yields, per token, (tokens int32 [B], live bool [B], logits, state) until all rows stopped or `max_tokens`.

    `live` tells the rows whose token counts: those that had not stopped before. A stop token is live itself, so the
    state has read it. To go on later (another turn of a chat), keep the last `logits` and `state`, of which the state
    is valid until the next token is asked for; on a CPU it has `functional.bits` for what is in bfloat16. `stop_tokens`
    None means the config's `eos_tokens`.
    """
    sampling.check()
    stop_tokens = config.eos_tokens if stop_tokens is None else stop_tokens
    sampling = Sampling(float(sampling.temperature), int(sampling.top_k), float(sampling.top_p))  # one compiled type
    key = jax.random.key(seed)
    done = np.zeros(logits.shape[0], bool)
    config, state = with_room(config, state, len(logits), max_tokens)
    params = lm.unstack(params, dtype=config.dtype)
    state = jax.tree.map(jnp.copy, fitting_state(params, state))  # decode_step consumes it; the caller's stays
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
    params: lm.Params,
    config: config_lib.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    seed: int = 0,
    piece: int = 256,
    state: state_lib.DecodeState | None = None,
    on_tokens: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> list[list[int]]:
    """Continues each prompt; the tokens up to and without a stop token.

    Warns where a prompt is longer than what the model was trained on, and then is `answers` of one batch.

    Args:
      params: parameters of the model.
      config: the model; a "full" mixer decodes with a cache as long as the longest row.
      prompts: B lists of token ids of any lengths.
      max_tokens: tokens to generate at most.
      sampling: how tokens are drawn; greedy by default.
      stop_tokens: ids that end a row; None means the config's `eos_tokens`, () that none does.
      seed: of the draws.
      piece: tokens of the prompt read at a time.
      state: what the rows have seen before the prompts, from `prefill` or an earlier run.
      on_tokens: called per step with tokens int32 [B] and live bool [B], for streaming.
    """
    if max_tokens < 0:
        raise ValueError(f"max_tokens={max_tokens} must not be negative")
    past = 0 if state is None else int(state.position.max())
    warn_beyond(config, past + max(map(len, prompts), default=0), max_tokens)
    return answers(
        params,
        config,
        prompts,
        max_tokens=max_tokens,
        sampling=sampling,
        stop_tokens=stop_tokens,
        seed=seed,
        piece=piece,
        state=state,
        on_tokens=on_tokens,
    )


def answers(
    params: lm.Params,
    config: config_lib.ModelConfig,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    batch: int = 0,
    sampling: Sampling = GREEDY,
    stop_tokens: Sequence[int] | None = None,
    ends: Callable[[list[int]], bool] | None = None,
    seed: int = 0,
    piece: int = 256,
    state: state_lib.DecodeState | None = None,
    on_tokens: Callable[[np.ndarray, np.ndarray], Any] | None = None,
) -> list[list[int]]:
    """What `generate` returns, for those who ask many batches: an answer that ended has fewer than `max_tokens` tokens.

    Args:
      params, config, prompts, max_tokens, sampling, stop_tokens, seed, piece, on_tokens: as `generate` takes them.
      batch: rows to run; where there are fewer prompts the last one stands in the others, so that one program serves.
      ends: told an answer after each of its tokens, whether it ends there; that token is part of it.
      state: of as many rows as run.
    """
    params = lm.unstack(params, dtype=config.dtype)
    stops = config.eos_tokens if stop_tokens is None else stop_tokens
    rows = [*prompts, *[prompts[-1]] * (batch - len(prompts))] if prompts else []
    config, state = with_room(config, state, len(rows), max(map(len, rows), default=0) + max_tokens)
    logits, state = prefill(params, config, rows, state=state, piece=piece)
    out: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for tokens, live, _, _ in stream(
        params, config, logits, state, max_tokens=max_tokens, sampling=sampling, stop_tokens=stops, seed=seed
    ):
        if on_tokens is not None:
            on_tokens(tokens, live)
        for row in sorted(going):
            if tokens[row] not in stops:
                out[row].append(int(tokens[row]))
            if tokens[row] in stops or (ends is not None and ends(out[row])):
                going.remove(row)
        if not going:
            break
    return out


def warn_beyond(config: config_lib.ModelConfig, prompt: int, max_tokens: int) -> None:
    """Warns of rows longer than what the model was trained on: a prompt, its past included, and what is to follow."""
    trained = config.max_length
    if config.mixer == "full" and prompt + max_tokens > trained:
        warnings.warn(
            f"the text may reach {prompt + max_tokens} tokens and the model was trained on {trained}: full attention "
            "reads distances that it never saw, and what comes after them is often wrong",
            stacklevel=3,
        )
    elif prompt > trained:
        warnings.warn(
            f"the prompt ends at token {prompt} and the model was trained on {trained}: it is read, positions go on, "
            "and distances inside the window stay as trained, but those to the first tokens (sinks) do not",
            stacklevel=3,
        )


def full_as_windowed(config: config_lib.ModelConfig, length: int) -> config_lib.ModelConfig:
    """The original model as a windowed one that forgets nothing within `length` tokens (rounded up to a bucket)."""
    return config.replace(mixer="swa", window=bucket(length, 256), sinks=0)


def with_room(
    config: config_lib.ModelConfig, state: state_lib.DecodeState | None, rows: int, more: int
) -> tuple[config_lib.ModelConfig, state_lib.DecodeState]:
    """A config and a state of `rows` rows to read `more` tokens with; None is the state before the first token.

    A "full" mixer becomes a windowed one whose cache holds past and future. A cache that has not wrapped around has
    token p in slot p, so it grows at its end.

    Raises:
      ValueError: `state` has forgotten tokens that full attention sees, or another model made it.
    """
    if config.mixer != "full":
        return config, state_lib.init_state(config, rows) if state is None else state
    if state is None:
        config = full_as_windowed(config, more)
        return config, state_lib.init_state(config, rows)
    layers, _, slots, heads, dim = state.keys.shape
    if (layers, heads, dim) != (config.n_layers, config.n_kv_heads, config.head_dim) or state.conv is not None:
        raise ValueError("the state is not of this model with full attention: another model or mixer made it")
    past = int(state.position.max())
    if past > slots:
        raise ValueError(
            f"the state has read {past} tokens and holds {slots}: full attention cannot go on from it. Read the text "
            'with mixer="full", or go on with the window that it was read with'
        )
    config = full_as_windowed(config, max(past + more, slots))
    room = [(0, 0), (0, 0), (0, config.window - slots), (0, 0), (0, 0)]
    like = jax.tree.structure(jax.eval_shape(lambda: state_lib.init_state(config, rows)))
    return config, jax.tree.unflatten(like, [state.position, jnp.pad(state.keys, room), jnp.pad(state.values, room)])


def bucket(length: int, at_least: int) -> int:
    """The smallest power of two that holds `length` tokens, and no less than `at_least`: few shapes to compile."""
    return max(at_least, 1 << (length - 1).bit_length())

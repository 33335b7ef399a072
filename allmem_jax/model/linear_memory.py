"""Linear recurrences over tokens in blocks of matrix products: the state-space dual and the gated delta rule.

    B batch    L tokens of the call    T tokens of a block    N memory heads
    Dk dimension of queries and keys, Dv of values: the rows and columns of a state

Both keep one matrix S per head, and read it after the token's own write, o_t = S_t^T q_t:

    ssd            S_t = a_t S_{t-1} + k_t v_t^T                                        (Mamba-2, arXiv 2405.21060)
    gated_delta    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T                (arXiv 2412.06464)

Within a block a token reaches a later one with the factor exp(difference of the sums of log a), which never overflows;
pairs of different documents and the future are masked before the exponential. States are float32; products take
inputs in the dtype of v and accumulate in float32. The backward pass recomputes a block at a time from its state.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dots

BLOCK = 64  # tokens; the results do not depend on it


def ssd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    state: jax.Array | None = None,
    valid: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Mamba-2's recurrence with one group: all heads share queries and keys.

    Args:
      q, k: [B, L, Dk] (C and B in the paper's letters).
      v: [B, L, N, Dv], the inputs times their step.
      log_decay: float32 [B, L, N], log a, not positive.
      state: float32 [B, N, Dk, Dv] before these tokens; None is zeros.
      valid: bool [B, L]; other tokens neither decay nor write, and what they read is arbitrary but finite.
      reset: bool [B, L], first tokens of documents, which start from zeros.

    Returns:
      [B, L, N, Dv] in v's dtype, and the state afterwards.
    """
    if valid is not None:
        log_decay, v = (jnp.where(_like(valid, x), x, 0) for x in (log_decay, v))
    shape = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    return _scan(_ssd_block, (q[:, :, None], k[:, :, None], v, log_decay.astype(jnp.float32)), state, shape, reset)


def gated_delta(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
    state: jax.Array | None = None,
    valid: jax.Array | None = None,
    reset: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The gated delta rule: before it writes a value, a token takes away a share of what its key reads.

    Args:
      q, k: [B, L, N, Dk]; keys of unit norm keep the recurrence stable.
      v: [B, L, N, Dv].
      log_decay: float32 [B, L, N], log a, not positive.
      beta: float32 [B, L, N] in [0, 1], the share that is replaced.
      state: float32 [B, N, Dk, Dv] before these tokens; None is zeros.
      valid: bool [B, L]; other tokens neither decay nor write, and what they read is arbitrary but finite.
      reset: bool [B, L], first tokens of documents, which start from zeros.

    Returns:
      [B, L, N, Dv] in v's dtype, and the state afterwards.
    """
    if valid is not None:
        log_decay, beta = (jnp.where(_like(valid, x), x, 0) for x in (log_decay, beta))
    shape = (v.shape[0], v.shape[2], k.shape[-1], v.shape[-1])
    rates = (log_decay.astype(jnp.float32), beta.astype(jnp.float32))
    return _scan(_delta_block, (q, k, v, *rates), state, shape, reset)


def _scan(
    step: Callable[..., Any],
    tokens: tuple[jax.Array, ...],
    state: jax.Array | None,
    shape: tuple[int, ...],
    reset: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Runs `step(state, document, *tokens)` over blocks; the zeros that fill the last one do not decay or write."""
    batch, length = tokens[0].shape[:2]
    size = min(BLOCK, length)
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    blocks = tuple(_to_blocks(x, size) for x in tokens)  # each [blocks, B, N, T, ...]
    resets = _to_blocks(reset[:, :, None], size)[:, :, 0]  # [blocks, B, T]

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def body(state: jax.Array, block: Any) -> tuple[jax.Array, jax.Array]:
        arrays, reset = block
        out, state = step(state, jnp.cumsum(reset, axis=1, dtype=jnp.int32), *arrays)
        return state, out.astype(tokens[2].dtype)

    start = jnp.zeros(shape, jnp.float32) if state is None else state.astype(jnp.float32)
    after, out = jax.lax.scan(body, start, (blocks, resets))
    out = jnp.swapaxes(jnp.moveaxis(out, 0, 1), 2, 3)  # [B, blocks, T, N, Dv]
    return out.reshape(batch, -1, *out.shape[3:])[:, :length], after


def _ssd_block(
    state: jax.Array, document: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array, log_decay: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One block: state [B, N, Dk, Dv], q, k [B, 1, T, Dk], v [B, N, T, Dv], log_decay [B, N, T] -> out, state."""
    q, k = q[:, 0], k[:, 0]
    between, entering, leaving, through = _decays(log_decay, document)
    scores = dots.einsum("btd,bud->btu", q, k)[:, None] * between
    out = dots.einsum("bntu,bnue->bnte", scores.astype(v.dtype), v)
    out += entering * dots.einsum("btd,bnde->bnte", q, state)
    written = dots.einsum("btd,bnte->bnde", k, (leaving * v).astype(v.dtype))
    return out, through * state + written


def _delta_block(
    state: jax.Array,
    document: jax.Array,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    log_decay: jax.Array,
    beta: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One block: as `_ssd_block`, with q, k [B, N, T, Dk] and beta [B, N, T].

    What token t writes beside its key, u_t = beta_t (v_t - a_t S_{t-1}^T k_t), depends on earlier u of the block
    through S_{t-1}: a unit lower triangular system (the WY form), solved in float32.
    """
    between, entering, leaving, through = _decays(log_decay, document)
    size = k.shape[2]
    overlap = beta[..., None] * dots.einsum("bntd,bnud->bntu", k, k) * between
    system = jnp.eye(size) + jnp.tril(overlap, -1)
    wanted = beta[..., None] * (v - entering * dots.einsum("bntd,bnde->bnte", k, state))
    with jax.named_scope("float32_solve"):  # its gradient is a product in float32 too, and meant
        u = jax.lax.linalg.triangular_solve(system, wanted, left_side=True, lower=True, unit_diagonal=True)
    scores = dots.einsum("bntd,bnud->bntu", q, k) * between
    out = dots.einsum("bntu,bnue->bnte", scores.astype(v.dtype), u)
    out += entering * dots.einsum("bntd,bnde->bnte", q, state)
    written = dots.einsum("bntd,bnte->bnde", k, (leaving * u).astype(v.dtype))
    return out, through * state + written


def _decays(log_decay: jax.Array, document: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Products of decays in a block, zero between documents, from log_decay [B, N, T] and document int32 [B, T].

    Returns:
      between [B, N, T, T] from token u to token t >= u; entering [B, N, T, 1] from the state before the block, which
      document 0 goes on with; leaving [B, N, T, 1] to the state after it; through [B, N, 1, 1] from state to state.
    """
    total = jnp.cumsum(log_decay, axis=-1)
    size = total.shape[-1]
    same = document[:, None, :, None] == document[:, None, None, :]
    pair = same & jnp.tril(jnp.ones((size, size), bool))
    difference = jnp.where(pair, total[..., :, None] - total[..., None, :], 0)
    between = jnp.where(pair, jnp.exp(difference), 0)
    entering = jnp.where(document[:, None] == 0, jnp.exp(total), 0)
    leaving = jnp.where((document == document[:, -1:])[:, None], jnp.exp(total[..., -1:] - total), 0)
    return between, entering[..., None], leaving[..., None], entering[..., -1:, None]


def _like(mask: jax.Array, x: jax.Array) -> jax.Array:
    """mask [B, L] with x's number of axes."""
    return mask.reshape(mask.shape + (1,) * (x.ndim - 2))


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, L, N, ...] -> [blocks, B, N, T, ...], the last block filled up with zeros."""
    batch, length = x.shape[:2]
    x = jnp.pad(x, [(0, 0), (0, -length % size)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(batch, -1, size, *x.shape[2:])
    return jnp.swapaxes(jnp.moveaxis(x, 1, 0), 2, 3)

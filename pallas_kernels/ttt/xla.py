"""The memory in plain JAX: a scan over blocks of at most one chunk, heads before tokens.

Axes: B batch, L tokens, N memory heads, D head dim, H hidden, T tokens of a block (T <= chunk size).

Rows stand at different places of their chunks and start documents where they like, so a block of one row can hold up to
three phases: tokens up to the chunk's end, tokens after it, tokens of later documents. Each phase is batched matmuls
over all T tokens with a mask, and is skipped at run time when no row has a token in it. Aligned training has the first
phase only. The forward pass keeps the state at the start of every block; the backward pass goes through the blocks in
reverse, recomputing one at a time.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dots
from pallas_kernels.ttt.types import FastWeights, MemoryState

EPSILON = 1e-12  # added to squared row norms


class Tokens(NamedTuple):
    """One block, or all blocks with a leading axis: q, k, v [B, N, T, D], lr [B, N, T, 3], momentum [B, N, T]."""

    q: jax.Array
    k: jax.Array
    v: jax.Array
    lr: jax.Array
    momentum: jax.Array


class Floats(NamedTuple):
    """The differentiable leaves of MemoryState."""

    weights: FastWeights
    velocity: FastWeights
    pending: FastWeights
    momentum_sum: jax.Array


class Kernels(NamedTuple):
    """What is computed of tokens: `read` is f(W, q) in any dtype, `gradient` is that of the inner loss, float32."""

    read: Callable[[FastWeights, jax.Array], jax.Array]
    gradient: Callable[[FastWeights, jax.Array, jax.Array, jax.Array], FastWeights]


class Plan(NamedTuple):
    """What happens to each row in a block: masks [B, T] of the tokens of each phase, and events [B].

    Order: `restart` the state, `head` tokens, update where `done`, `tail` tokens, reset where `renew`, `later` tokens
    (read with the initial weights), of which only `last` are written.
    """

    restart: jax.Array
    head: jax.Array
    done: jax.Array
    tail: jax.Array
    renew: jax.Array
    later: jax.Array
    last: jax.Array


class Phases(NamedTuple):
    """Static: which phases and events can occur at all, and whether f(init, q) is taken from what is read."""

    difference: bool
    tail: bool
    resets: bool
    later: bool


def forward(chunk_size, aligned, difference, tokens, init, state, valid, reset, *, kernels: Kernels | None = None):
    """Returns (out [B, L, N, D], state) and what `backward` needs.

    Args:
      chunk_size: tokens per update.
      aligned: static promise that every row starts at a chunk's first token (valid may be None or not).
      difference: static, whether f(init, q) is taken from what is read.
      tokens: (q, k, v, lr, momentum) as in `pallas_kernels.ttt_memory`.
      init: FastWeights without B.
      state: MemoryState whose float leaves have the accumulation dtype.
      valid, reset: bool [B, L], or None.
      kernels: another way to compute `apply` and `_gradient`, differentiable by JAX.
    """
    kernels = kernels or Kernels(apply, _gradient)
    size = min(chunk_size, tokens[0].shape[1])
    phases = _phases(size, aligned, difference, valid, reset)
    blocks, marks = _split(tokens, valid, reset, size)

    def step(carry, block):
        floats, count = carry
        tokens, (valid, reset) = block
        plan, next_count = _plan(valid, reset, count, chunk_size)
        out, next_floats = _block(kernels, phases, chunk_size, plan, floats, tokens, init)
        return (next_floats, next_count), (out, floats, count)

    (floats, count), (out, starts, counts) = jax.lax.scan(step, (Floats(*state[:4]), state.count), (blocks, marks))
    out = _join(out, tokens[0].shape[1])
    return (out, MemoryState(*floats, count)), (tokens, init, valid, reset, starts, counts)


def backward(chunk_size, aligned, difference, residuals, cotangents, *, kernels: Kernels | None = None):
    """Returns the cotangents of (tokens, init, state) from those of (out, state)."""
    kernels = kernels or Kernels(apply, _gradient)
    tokens, init, valid, reset, starts, counts = residuals
    d_out, d_state = cotangents
    length = tokens[0].shape[1]
    size = min(chunk_size, length)
    phases = _phases(size, aligned, difference, valid, reset)
    blocks, marks = _split(tokens, valid, reset, size)

    def step(carry, block):
        d_floats, d_init = carry
        tokens, (valid, reset), floats, count, d_out = block
        plan, _ = _plan(valid, reset, count, chunk_size)
        _, pullback = jax.vjp(lambda *args: _block(kernels, phases, chunk_size, plan, *args), floats, tokens, init)
        d_floats, d_tokens, d_init_here = pullback((d_out, d_floats))
        return (d_floats, jax.tree.map(jnp.add, d_init, d_init_here)), d_tokens

    start = (Floats(*d_state[:4]), jax.tree.map(jnp.zeros_like, init))
    (d_floats, d_init), d_tokens = jax.lax.scan(
        step, start, (blocks, marks, starts, counts, _to_blocks(d_out, size)), reverse=True
    )
    d_tokens = tuple(_join(x, length) for x in d_tokens)
    no_cotangent: Any = np.zeros(counts.shape[1:], jax.dtypes.float0)
    return d_tokens, d_init, MemoryState(*d_floats, no_cotangent)


def _phases(size, aligned, difference, valid, reset) -> Phases:
    crosses = not aligned or valid is not None or reset is not None
    resets = reset is not None
    return Phases(difference, tail=crosses and size > 1, resets=resets, later=resets and size > 1)


def _plan(valid, reset, count, chunk_size) -> tuple[Plan, jax.Array]:
    """Returns the plan of one block and the count after it, from valid and reset [B, T] and count [B]."""
    document = jnp.cumsum(reset, axis=1, dtype=jnp.int32)
    first_valid = jnp.argmax(valid, axis=1, keepdims=True)
    first = jnp.where(valid.any(1), jnp.take_along_axis(document, first_valid, axis=1)[:, 0], document[:, -1])
    count = jnp.where(first > 0, 0, count)
    here = valid & (document == first[:, None])
    rank = count[:, None] + jnp.cumsum(here, axis=1, dtype=jnp.int32)
    head, tail = here & (rank <= chunk_size), here & (rank > chunk_size)
    later = valid & (document > first[:, None])
    last = later & (document == document[:, -1:])
    renew = document[:, -1] > first
    total = count + _count(head)
    done = total >= chunk_size
    plan = Plan(first > 0, head, done, tail, renew, later, last)
    return plan, jnp.where(renew, _count(last), jnp.where(done, _count(tail), total))


def _count(mask: jax.Array) -> jax.Array:
    return mask.sum(axis=1, dtype=jnp.int32)


def _block(kernels, phases, chunk_size, plan, floats, tokens, init) -> tuple[jax.Array, Floats]:
    """Returns out [B, N, T, D] of one block and the state after it."""
    fresh = initial(floats, init)
    if phases.resets:
        floats = select(plan.restart, fresh, floats)
    out, floats = _piece(kernels, floats, init, tokens, plan.head, plan.head)
    floats = select(plan.done, update(floats, init, chunk_size), floats)
    if phases.tail:
        more, floats = _piece_if_any(kernels, floats, init, tokens, plan.tail, plan.tail)
        out += more
    if phases.resets:
        floats = select(plan.renew, fresh, floats)
    if phases.later:
        more, floats = _piece_if_any(kernels, floats, init, tokens, plan.later, plan.last)
        out += more
    if phases.difference:  # the same products as above, so that it is zero where nothing was written
        blank = kernels.read(fresh.weights, tokens.q).astype(out.dtype)
        out -= jnp.where((plan.head | plan.tail | plan.later)[:, None, :, None], blank, 0)
    return out.astype(tokens.q.dtype), floats


def _piece_if_any(kernels, floats, init, tokens, read, write):
    """Like `_piece`, at no cost when no row has a token to read."""

    @jax.checkpoint  # or the gradient would write zeros in the place of this phase's residuals
    def taken(floats, init, tokens):
        return _piece(kernels, floats, init, tokens, read, write)

    def skipped(floats, init, tokens):
        return jnp.zeros(tokens.q.shape, floats.momentum_sum.dtype), floats

    return jax.lax.cond(read.any(), taken, skipped, floats, init, tokens)


def _piece(kernels, floats, init, tokens, read, write) -> tuple[jax.Array, Floats]:
    """Reads the tokens of mask `read` [B, T], zeros elsewhere, and adds those of mask `write` to what is pending."""
    dtype = floats.momentum_sum.dtype
    out = jnp.where(read[:, None, :, None], kernels.read(floats.weights, tokens.q).astype(dtype), 0)
    lr = jnp.where(write[:, None, :, None], tokens.lr.astype(dtype), 0)
    momentum = jnp.where(write[:, None, :], tokens.momentum.astype(dtype), 0)
    gradient = kernels.gradient(_normalise(floats.weights, init), tokens.k, tokens.v, lr)
    pending = jax.tree.map(jnp.add, floats.pending, gradient)
    return out, floats._replace(pending=pending, momentum_sum=floats.momentum_sum + momentum.sum(-1))


def apply(w: FastWeights, q: jax.Array) -> jax.Array:
    """Returns f(W, q) [B, N, T, D] in the accumulation dtype."""
    gate, up = dots.einsum("bntd,bnhd->bnth", q, w.gate), dots.einsum("bntd,bnhd->bnth", q, w.up)
    hidden = (jax.nn.silu(gate) * up).astype(q.dtype)
    return dots.einsum("bnth,bndh->bntd", hidden, w.down) + q


def _gradient(w: FastWeights, k: jax.Array, v: jax.Array, lr: jax.Array) -> FastWeights:
    """Returns the gradient of sum_t -lr_t <f(W, k_t), v_t>, with a learning rate for each of the three weights."""
    gate, up = dots.einsum("bntd,bnhd->bnth", k, w.gate), dots.einsum("bntd,bnhd->bnth", k, w.up)
    d_gate, d_up, hidden = factors(gate, up, dots.einsum("bntd,bndh->bnth", v, w.down), lr)
    return FastWeights(
        dots.einsum("bnth,bntd->bnhd", d_gate.astype(k.dtype), k),
        dots.einsum("bnth,bntd->bnhd", d_up.astype(k.dtype), k),
        dots.einsum("bntd,bnth->bndh", v, hidden.astype(v.dtype)),
    )


def factors(gate: jax.Array, up: jax.Array, back: jax.Array, lr: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (d_gate, d_up, hidden), of which a token's gradients are d_gate k^T, d_up k^T and v hidden^T.

    Args:
      gate, up, back: [..., H], W_gate k, W_up k and W_down^T v.
      lr: [..., 3].
    """
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_hidden = -back
    d_gate = lr[..., 0:1] * d_hidden * up * (sigmoid + silu * (1 - sigmoid))
    return d_gate, lr[..., 1:2] * d_hidden * silu, -lr[..., 2:3] * silu * up


def update(floats: Floats, init: FastWeights, chunk_size: int) -> Floats:
    """Ends the chunk in every row: M <- mu M - G, W <- normalised W + M."""
    mu = (floats.momentum_sum / chunk_size)[..., None, None]
    velocity = jax.tree.map(lambda m, g: mu * m - g, floats.velocity, floats.pending)
    weights = jax.tree.map(jnp.add, _normalise(floats.weights, init), velocity)
    return Floats(weights, velocity, jax.tree.map(jnp.zeros_like, floats.pending), jnp.zeros_like(floats.momentum_sum))


def _normalise(weights: FastWeights, init: FastWeights) -> FastWeights:
    """Rescales every row (last axis) to its norm in `init`."""
    return jax.tree.map(lambda w, w0: w * row_scale(w, w0), weights, init)


def row_scale(w: jax.Array, w0: jax.Array) -> jax.Array:
    """Returns what brings every row (last axis) of w to its norm in w0, with that axis kept as 1."""
    square = jnp.sum(w * w, axis=-1, keepdims=True) + EPSILON
    square0 = jnp.sum(jnp.square(w0.astype(w.dtype)), axis=-1, keepdims=True) + EPSILON
    return jnp.sqrt(square0 / square)


def initial(floats: Floats, init: FastWeights) -> Floats:
    """Returns the state that has read nothing, shaped like `floats`."""
    weights = jax.tree.map(lambda w, w0: jnp.broadcast_to(w0.astype(w.dtype), w.shape), floats.weights, init)
    return Floats(weights, *jax.tree.map(jnp.zeros_like, tuple(floats[1:])))


def select(rows: jax.Array, a: Any, b: Any) -> Any:
    """Returns a where `rows` [B] is true, else b; trees with leaves [B, ...]."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


def _split(tokens, valid, reset, size):
    """Cuts everything into blocks: Tokens with a leading axis of blocks, and (valid, reset) [blocks, B, T]."""
    batch, length = tokens[0].shape[:2]
    valid = jnp.ones((batch, length), bool) if valid is None else valid
    reset = jnp.zeros((batch, length), bool) if reset is None else reset
    marks = tuple(_to_blocks(x, size) for x in (valid, reset))
    return Tokens(*(_to_blocks(x, size) for x in tokens)), marks


def _to_blocks(x: jax.Array, size: int) -> jax.Array:
    """[B, L, N, ...] -> [blocks, B, N, T, ...], or [B, L] -> [blocks, B, T]; the tail is filled with zeros."""
    batch, length = x.shape[:2]
    blocks = -(-length // size)
    x = jnp.pad(x, [(0, 0), (0, blocks * size - length)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(batch, blocks, size, *x.shape[2:]), 1, 0)
    return x if x.ndim == 3 else jnp.swapaxes(x, 2, 3)


def _join(x: jax.Array, length: int) -> jax.Array:
    """[blocks, B, N, T, ...] -> [B, L, N, ...]."""
    x = jnp.moveaxis(jnp.swapaxes(x, 2, 3), 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]

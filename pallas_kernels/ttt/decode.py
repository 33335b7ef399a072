"""One new token a row: each layer reads it and hands out its gradient, and all layers are written at once.

Axes: Y layers (any leading axes), B batch, N memory heads, D head dim, H hidden.

A token's gradient is an outer product for each weight, so a layer need not return its state: it reads the fast weights
and hands out the products' factors. All layers' states then change in one pass, and but for the pending gradients only
where a row completes its chunk or has just begun. `ttt_memory` of one token gives the same, and copies every state.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels import dots
from pallas_kernels.ttt import xla
from pallas_kernels.ttt.types import FastWeights, MemoryState


class TokenGradient(NamedTuple):
    """One token's gradients, d_gate k^T, d_up k^T and v hidden^T, float32, with their learning rates and signs.

    Attributes:
      d_gate, d_up, hidden: [..., B, N, H].
      k, v: [..., B, N, D].
      momentum: [..., B, N].
    """

    d_gate: jax.Array
    d_up: jax.Array
    hidden: jax.Array
    k: jax.Array
    v: jax.Array
    momentum: jax.Array


def read(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    init: FastWeights,
    weights: FastWeights,
    *,
    read_out: str = "full",
) -> tuple[jax.Array, TokenGradient]:
    """What `ttt_memory` reads for one token of each row, and what `write` is to add to the row's state.

    Args:
      q, k, v: [B, N, D], floating.
      lr: [B, N, 3]; momentum: [B, N].
      init: initial weights without a batch axis.
      weights: the state's, [B, N, ...]; of a row that has read nothing, `init`.
      read_out: as in `ttt_memory`.

    Returns:
      [B, N, D] in q's dtype, and the gradient.
    """
    with jax.named_scope("float32_weights"):  # as the state holds them: rounding them would cost more than the products
        return _read(read_out, q, k, v, lr, momentum, init, weights)


def _read(read_out, q, k, v, lr, momentum, init, weights) -> tuple[jax.Array, TokenGradient]:
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    weights = jax.tree.map(lambda w: w.astype(dtype), weights)
    wide = [x.astype(dtype)[:, :, None] for x in (q, k, v)]
    out = xla.apply(weights, wide[0])
    if read_out == "difference":  # the same products as above, so that it is zero where nothing was written
        start = jax.tree.map(lambda w, w0: jnp.broadcast_to(w0.astype(dtype), w.shape), weights, init)
        out -= xla.apply(start, wide[0])
    scale = jax.tree.map(lambda w, w0: xla.row_scale(w, w0)[..., 0], weights, init)
    _, k, v = (x[:, :, 0] for x in wide)
    gate = dots.einsum("bnd,bnhd->bnh", k, weights.gate) * scale.gate
    up = dots.einsum("bnd,bnhd->bnh", k, weights.up) * scale.up
    back = dots.einsum("bnd,bndh->bnh", v * scale.down, weights.down)
    gradient = TokenGradient(*xla.factors(gate, up, back, lr.astype(dtype)), k, v, momentum.astype(dtype))
    return out[:, :, 0].astype(q.dtype), gradient


def write(
    state: MemoryState, init: FastWeights, token: TokenGradient, fresh: jax.Array, valid: jax.Array, *, chunk_size: int
) -> MemoryState:
    """The states of all layers after one more token in every row.

    Args:
      state: float leaves and count with leading axes, [Y, B, ...].
      init: [Y, N, ...].
      token: from `read`, [Y, B, ...].
      fresh: bool [B], rows that have read nothing: whatever their state holds, they start from `init`.
      valid: bool [B], rows whose token counts.
      chunk_size: tokens per update.
    """
    weight = valid[:, None, None]
    token = token._replace(d_gate=token.d_gate * weight, d_up=token.d_up * weight, v=token.v * weight)
    momentum = token.momentum * weight[..., 0]
    begins = fresh & valid
    count = jnp.where(begins, 0, state.count) + valid
    done = count >= chunk_size

    start = begins[:, None, None, None]
    pending = jax.tree.map(lambda p, g: jnp.where(start, 0, p) + g, state.pending, _gradient(token))
    momentum_sum = jnp.where(begins[:, None], 0, state.momentum_sum) + momentum
    floats = xla.Floats(state.weights, state.velocity, pending, momentum_sum)
    return MemoryState(*_where_due(chunk_size, begins, done, init, floats), jnp.where(done, 0, count))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _where_due(chunk_size, begins, done, init, floats) -> xla.Floats:
    """`_renewed` if any row has just begun or completes its chunk, in place.

    It is a loop of no turn or one: a conditional's branches may want arrays in other layouts, and TPUs copy them.
    """
    turns = jnp.any(begins | done).astype(jnp.int32)
    return jax.lax.fori_loop(0, turns, lambda _, floats: _renewed(chunk_size, begins, done, init, floats), floats)


@_where_due.defjvp
def _where_due_jvp(chunk_size, primals, tangents):
    begins, done, init, floats = primals

    def conditional(init, floats):
        renewed = functools.partial(_renewed, chunk_size, begins, done)
        return jax.lax.cond(jnp.any(begins | done), renewed, lambda _, floats: floats, init, floats)

    return jax.jvp(conditional, (init, floats), tangents[2:])


def _renewed(chunk_size, begins, done, init, floats) -> xla.Floats:
    """Starts the rows of `begins` [B] with the initial weights and ends the chunks of `done` [Y, B]."""

    def layer(done, init, floats):
        weights, velocity = xla.select(begins, xla.initial(floats, init)[:2], floats[:2])  # pending is this token's
        floats = floats._replace(weights=weights, velocity=velocity)
        return xla.select(done, xla.update(floats, init, chunk_size), floats)

    return jax.vmap(layer)(done, init, floats)


def _gradient(token: TokenGradient) -> FastWeights:
    """The gradients [..., B, N, ...], as outer products."""
    return FastWeights(_outer(token.d_gate, token.k), _outer(token.d_up, token.k), _outer(token.v, token.hidden))


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    return a[..., :, None] * b[..., None, :]

"""The memory token by token, as the equations read; for tests and small sizes.

Axes: B batch, L tokens, N memory heads, D head dim, H hidden.
Source: AllMem (arXiv 2602.13680), with the gradient of the inner loss written out. Of one token k, with
g = gate k, u = up k, s = sigmoid(g), a = SiLU(g) = g s and its slope s + a (1 - s):

    read            f(W, k) = down (a u) + k
    its gradient    for a cotangent o:  h = down^T o,  d_g = h u slope,  d_u = h a,  d_k = o + gate^T d_g + up^T d_u,
                    and of gate, up and down  d_g k^T,  d_u k^T,  o (a u)^T
    write           the gradient G of -lr <f(W, k), v>, which is that with o = -v, times a rate each: with b = -down^T v
                    lr_1 (b u slope) k^T,  lr_2 (b a) k^T,  lr_3 v (-a u)^T
    its gradient    for a cotangent C of G:  <C, G> = lr_1 (b u slope) x_gate + lr_2 (b a) x_up + lr_3 (-a u) x_down,
                    with x_gate = C_gate k, x_up = C_up k, x_down = C_down^T v, differentiated in lr, k, v, g, u and b;
                    the slope's slope is s (1 - s) (2 + g (1 - 2 s))
"""

import jax
import jax.numpy as jnp

from pallas_kernels.ttt.types import FastWeights, MemoryState, init_memory_state

EPSILON = 1e-12  # added to squared row norms


def apply(weights: FastWeights, x: jax.Array) -> jax.Array:
    """Returns f(W, x) = down (SiLU(gate x) * (up x)) + x for weights [..., H, D] and x [..., D]."""
    gate, up = _matvec(weights.gate, x), _matvec(weights.up, x)
    return _matvec(weights.down, jax.nn.silu(gate) * up) + x


def loss_gradient(weights: FastWeights, k: jax.Array, v: jax.Array) -> FastWeights:
    """Returns the gradient of L = -<f(W, k), v> with respect to W, for k and v [..., D]."""
    gate, up = _matvec(weights.gate, k), _matvec(weights.up, k)
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    d_out = -v
    d_hidden = _matvec(jnp.swapaxes(weights.down, -1, -2), d_out)
    return FastWeights(_outer(d_hidden * up * slope, k), _outer(d_hidden * silu, k), _outer(d_out, silu * up))


def renormalise(weights: FastWeights, init: FastWeights) -> FastWeights:
    """Returns the weights with every row (last axis) at that row's norm in `init`."""
    return jax.tree.map(lambda w, w0: w * (_row_norm(w0) / _row_norm(w)), weights, init)


def ttt_memory(
    q, k, v, lr, momentum, init, state, *, chunk_size, valid, reset, difference=False
) -> tuple[jax.Array, MemoryState]:
    """See `pallas_kernels.ttt_memory`; `valid` and `reset` are arrays here. Float64 inputs are computed in float64."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    tokens = (*(x.astype(dtype) for x in (q, k, v, lr, momentum)), valid, reset)
    tokens = jax.tree.map(lambda x: jnp.swapaxes(x, 0, 1), tokens)
    init = jax.tree.map(lambda x: x.astype(dtype), init)
    fresh = init_memory_state(init, q.shape[0])

    def step(state, token):
        q, k, v, lr, momentum, valid, reset = token
        state = _select(reset, fresh, state)
        out = apply(state.weights, q) - apply(fresh.weights, q) if difference else apply(state.weights, q)
        out = jnp.where(valid[:, None, None], out, 0)
        return _select(valid, _write(state, init, k, v, lr, momentum, chunk_size), state), out

    state, out = jax.lax.scan(step, state, tokens)
    return jnp.swapaxes(out, 0, 1).astype(q.dtype), state


def _write(state, init, k, v, lr, momentum, chunk_size) -> MemoryState:
    """Returns the state after one more token in every row: k, v [B, N, D], lr [B, N, 3], momentum [B, N]."""
    normalised = renormalise(state.weights, init)
    gradient = loss_gradient(normalised, k, v)
    rates = FastWeights(*(lr[..., i, None, None] for i in range(3)))
    pending = jax.tree.map(lambda p, r, g: p + r * g, state.pending, rates, gradient)
    momentum_sum, count = state.momentum_sum + momentum, state.count + 1

    mu = (momentum_sum / chunk_size)[..., None, None]
    velocity = jax.tree.map(lambda m, g: mu * m - g, state.velocity, pending)
    weights = jax.tree.map(jnp.add, normalised, velocity)
    zeros = jax.tree.map(jnp.zeros_like, pending)
    updated = MemoryState(weights, velocity, zeros, jnp.zeros_like(momentum_sum), jnp.zeros_like(count))
    unfinished = MemoryState(state.weights, state.velocity, pending, momentum_sum, count)
    return _select(count >= chunk_size, updated, unfinished)


def _select(rows: jax.Array, a: MemoryState, b: MemoryState) -> MemoryState:
    """Returns the state that has a's rows where `rows` [B] is true, and b's elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, y), a, b)


def _matvec(matrix: jax.Array, vector: jax.Array) -> jax.Array:
    return jnp.einsum("...ij,...j->...i", matrix, vector, precision=jax.lax.Precision.HIGHEST)


def _outer(a: jax.Array, b: jax.Array) -> jax.Array:
    return a[..., :, None] * b[..., None, :]


def _row_norm(w: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(w * w, axis=-1, keepdims=True) + EPSILON)

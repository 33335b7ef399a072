"""What the TPU kernels compute for one block of tokens of a pack of heads.

Axes: T tokens, P heads of a pack, D head dim, H hidden, C = P D and F = P H columns of the pack, R rows of `rates`.

Weights are [3, C, F], gate, up and down, each as [D, H] in the diagonal blocks; w is them in the dtype of the tokens.
The equations of the gradients are those of `reference`. Operands of products are rounded to the dtype of the tokens,
what lies between them is float32. In the blocks off the diagonal products leave numbers that mean nothing: as long as
all of w's are zero there, no token sees them, so they are zeroed where products would take them (`diagonal`).
"""

import jax
import jax.numpy as jnp

from pallas_kernels import dots
from pallas_kernels.ttt import tpu_layout, visits

EPSILON = 1e-12  # added to squared row norms


def read(w, q):
    """Returns f(W, q) [T, C], float32."""
    _, up, _, silu = _hidden(w, q)
    hidden = silu * up
    return dots.tiles("tf,cf->tc", hidden.astype(q.dtype), w[2]) + q


def read_backward(w, q, d_out):
    """Returns the cotangents of q and of w [3, C, F], float32."""
    _, up, sigmoid, silu = _hidden(w, q)
    d_hidden = dots.tiles("tc,cf->tf", d_out, w[2])
    d_gate = (d_hidden * up * (sigmoid + silu * (1 - sigmoid))).astype(q.dtype)
    d_up = (d_hidden * silu).astype(q.dtype)
    hidden = (silu * up).astype(q.dtype)
    d_q = d_out + dots.tiles("tf,cf->tc", d_gate, w[0]) + dots.tiles("tf,cf->tc", d_up, w[1])
    d_w = (dots.tiles("tc,tf->cf", x, y) for x, y in ((q, d_gate), (q, d_up), (d_out, hidden)))
    return d_q, jnp.stack(tuple(d_w))


def gradient(layout, w, k, v, lr):
    """Returns the gradient [3, C, F] of sum_t -lr_t <f(W, k_t), v_t>; lr [T, 3 C] has a rate for each weight.

    Rates multiply the tokens and not the hidden units, which are twice as wide or more.
    """
    _, up, sigmoid, silu = _hidden(w, k)
    d_hidden = -dots.tiles("tc,cf->tf", v, w[2])
    d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
    d_up = d_hidden * silu
    hidden = -silu * up
    parts = zip(_scaled(layout, k, v, lr), (d_gate, d_up, hidden), strict=True)
    return jnp.stack([dots.tiles("tc,tf->cf", x, y.astype(k.dtype)) for x, y in parts])


def gradient_backward(layout, w, d_g, k, v, lr):
    """Returns the cotangents of k, v and rates [R, T], and of w [3, C, F], from that of the gradient, d_g [3, C, F]."""
    dtype = k.dtype
    gate, up, sigmoid, silu = _hidden(w, k)
    slope = sigmoid + silu * (1 - sigmoid)
    curve = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))  # derivative of the slope
    d_hidden = -dots.tiles("tc,cf->tf", v, w[2])
    parts = tuple(x.astype(dtype) for x in (d_hidden * up * slope, d_hidden * silu, -silu * up))  # terms of G

    # Through g, u and b, from C times the tokens, on which the rates are already, as they were in `gradient`.
    x_gate, x_up, x_down = (dots.tiles("tc,cf->tf", x, d_g[i]) for i, x in enumerate(_scaled(layout, k, v, lr)))
    dd_hidden = x_gate * up * slope + x_up * silu
    d_up = (x_gate * d_hidden * slope - x_down * silu).astype(dtype)
    d_gate = (x_gate * d_hidden * up * curve + (x_up * d_hidden - x_down * up) * slope).astype(dtype)
    dd_hidden = (-dd_hidden).astype(dtype)

    # What stands beside each token in <C, G> is its cotangent but for the rate, and times the token that of the rate,
    # summed over the columns of each head by a product.
    y = [dots.tiles("tf,cf->tc", part, d_g[i]) for i, part in enumerate(parts)]
    rate = _thirds(layout, lr)
    d_k = rate[0] * y[0] + rate[1] * y[1] + dots.tiles("tf,cf->tc", d_gate, w[0]) + dots.tiles("tf,cf->tc", d_up, w[1])
    d_v = rate[2] * y[2] + dots.tiles("tf,cf->tc", dd_hidden, w[2])
    products = jnp.concatenate([k * y[0], k * y[1], v * y[2]], axis=1).astype(dtype)
    d_rates = dots.tiles("rc,tc->rt", columns_of_rates(layout, dtype), products)
    d_w = (dots.tiles("tc,tf->cf", x, z) for x, z in ((k, d_gate), (k, d_up), (v, dd_hidden)))
    return (d_k, d_v, d_rates), jnp.stack(tuple(d_w))


def _hidden(w, x):
    """Returns gate, up, sigmoid(gate) and SiLU(gate) [T, F] of tokens x. Recomputed by all: they would fill VMEM."""
    gate, up = dots.tiles("tc,cf->tf", x, w[0]), dots.tiles("tc,cf->tf", x, w[1])
    sigmoid = jax.nn.sigmoid(gate)
    return gate, up, sigmoid, gate * sigmoid


def _scaled(layout, k, v, lr):
    """Returns k, k and v [T, C], each times the rate of one weight."""
    rate = _thirds(layout, lr)
    return tuple((x * r).astype(x.dtype) for x, r in zip((k, k, v), rate, strict=True))


def _thirds(layout, lr):
    width, _ = layout.wide
    return tuple(lr[:, i * width : (i + 1) * width] for i in range(3))


def normalise(w, first):
    """Rescales every row of the weights to its norm in `first`; the rows of gate and up are columns here."""
    parts = []
    for i, axis in enumerate((0, 0, 1)):
        square, square0 = (jnp.sum(x[i] * x[i], axis=axis, keepdims=True) + EPSILON for x in (w, first))
        parts.append(w[i] * jnp.sqrt(square0 / square))
    return jnp.stack(parts)


def diagonal(layout, x):
    """Zeros what lies between different heads of x [3, C, F]."""
    if layout.pack == 1:
        return x
    shape = layout.wide
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // layout.dim
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // layout.hidden
    return jnp.where(row == column, x, 0.0)


def own_rates(layout, values, word, rates=None):
    """Zeros the rates of tokens that belong to other visits; `values` [R, T] may be cotangents of `rates`."""
    if layout.phases == 1:
        return values
    phase = (values if rates is None else rates)[3 * layout.pack : 3 * layout.pack + 1]
    return jnp.where(phase == ((word >> visits.PHASE) & 3).astype(jnp.float32), values, 0.0)


def phase_column(layout, rates, word):
    """Returns [T, 1], true for the tokens of this visit."""
    phase = jnp.swapaxes(rates, 0, 1)[:, 3 * layout.pack : 3 * layout.pack + 1]
    return phase == ((word >> visits.PHASE) & 3).astype(jnp.float32)


def expand_rates(layout, rates, dtype):
    """[R, T] -> [T, 3 C], each rate on all columns of its head."""
    return dots.tiles("rt,rc->tc", rates.astype(dtype), columns_of_rates(layout, dtype))


def columns_of_rates(layout, dtype):
    """Returns [R, 3 C], one where a rate belongs to a column."""
    shape = (tpu_layout.rate_rows(layout), 3 * layout.wide[0])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (row == column // layout.dim).astype(jnp.float32).astype(dtype)


def block_of(layout, p):
    """Returns where head p lies in a pack's [C, F]."""
    return slice(p * layout.dim, (p + 1) * layout.dim), slice(p * layout.hidden, (p + 1) * layout.hidden)


def pack(layout, scratch, ref):
    """Copies weights [1, P, 1, 3, D, H] to the diagonal of scratch [3, C, F]."""
    if layout.pack > 1:
        scratch[...] = jnp.zeros_like(scratch)
    for p in range(layout.pack):
        rows, columns = block_of(layout, p)
        scratch[:, rows, columns] = ref[0, p, 0]


def unpack(layout, ref, x):
    """Copies the diagonal of x [3, C, F] to weights [1, P, 1, 3, D, H]."""
    for p in range(layout.pack):
        rows, columns = block_of(layout, p)
        ref[0, p, 0] = x[:, rows, columns]

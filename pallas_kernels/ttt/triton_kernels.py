"""The memory's Triton kernels: what reading and writing some tokens costs, and the gradients of both.

Axes: P batch and heads, T tokens of a block, D head dim, H hidden, S parts of the tokens; inside the kernels M tokens
and N hidden units of a tile. Weights are [P, 3, H, D], down transposed like the others. Letters and equations are those
of `reference`.

Hidden units are independent but for the sums over them that make an output or a token's gradient. So `read_kernel`
goes over the hidden units in a loop, one program per (P, M tokens), and its accumulator is the output. The other three
sum over tokens: a program keeps N hidden units of one p, their weights and the weights' gradient, in registers, and
goes over a part of the tokens. What it knows of a token's gradient is the part of its N units. XLA adds the parts of
both sums, so that none depends on the order in which programs run, as it would with atomics. Intermediates never leave
a program. Operands of products are rounded to the dtype of the tokens, sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def read_kernel(
    w,
    q,
    out,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """f(W, q) of M tokens: grid (P, blocks of T)."""
    p = tl.program_id(0).to(tl.int64)
    t = tl.program_id(1) * M + tl.arange(0, M)
    query = _rows(q + p * TOKENS * DIM, t, TOKENS, DIM)
    w += p * 3 * HIDDEN * DIM
    o = query.to(tl.float32)
    for at in range(0, HIDDEN, N):
        gate, up, down = _weights(w, at, HIDDEN, DIM, N)
        _, u, _, a = _hidden(query, gate, up, PRECISION)
        o = tl.dot((a * u).to(down.dtype), down, o, input_precision=PRECISION)
    _store_rows(out + p * TOKENS * DIM, o, t, TOKENS, DIM)


@triton.jit
def read_gradient_kernel(
    w,
    q,
    d_out,
    d_q,
    d_w,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of d_q and of d_w from N hidden units and SPAN tokens: grid (P, blocks of H, S)."""
    p, n, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    gate, up, down = _weights(w + p * 3 * HIDDEN * DIM, n * N, HIDDEN, DIM, N)
    tokens = p * TOKENS * DIM
    d_q += (n * tl.num_programs(0) + p) * TOKENS * DIM
    d_gate, d_up = tl.zeros([DIM, N], tl.float32), tl.zeros([DIM, N], tl.float32)
    d_down = tl.zeros([DIM, N], tl.float32)
    for at in range(part * SPAN, tl.minimum(part * SPAN + SPAN, TOKENS), M):
        t = at + tl.arange(0, M)
        query, d_o = _rows(q + tokens, t, TOKENS, DIM), _rows(d_out + tokens, t, TOKENS, DIM)
        # The hidden units again, from the token: to keep them would take H / D times the memory of the output.
        _, u, s, a = _hidden(query, gate, up, PRECISION)
        d_h = tl.dot(d_o, tl.trans(down), input_precision=PRECISION)
        d_g = (d_h * u * (s + a * (1 - s))).to(query.dtype)
        d_u = (d_h * a).to(query.dtype)
        d_gate = tl.dot(tl.trans(query), d_g, d_gate, input_precision=PRECISION)
        d_up = tl.dot(tl.trans(query), d_u, d_up, input_precision=PRECISION)
        d_down = tl.dot(tl.trans(d_o), (a * u).to(d_o.dtype), d_down, input_precision=PRECISION)
        d = tl.dot(d_g, gate, input_precision=PRECISION)
        _store_rows(d_q, tl.dot(d_u, up, d, input_precision=PRECISION), t, TOKENS, DIM)
    _store_weights(d_w, d_gate, d_up, d_down, HIDDEN, DIM, N)


@triton.jit
def write_kernel(
    w,
    k,
    v,
    lr,
    gradient,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Part of the inner loss's gradient, of N hidden units, from SPAN tokens: grid (P, blocks of H, S)."""
    p, n, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    gate, up, down = _weights(w + p * 3 * HIDDEN * DIM, n * N, HIDDEN, DIM, N)
    tokens = p * TOKENS * DIM
    lr += p * TOKENS * 3
    g_gate, g_up = tl.zeros([DIM, N], tl.float32), tl.zeros([DIM, N], tl.float32)
    g_down = tl.zeros([DIM, N], tl.float32)
    for at in range(part * SPAN, tl.minimum(part * SPAN + SPAN, TOKENS), M):
        t = at + tl.arange(0, M)
        key, value = _rows(k + tokens, t, TOKENS, DIM), _rows(v + tokens, t, TOKENS, DIM)
        lr_gate, lr_up, lr_down = _rates(lr, t, TOKENS)
        _, u, s, a = _hidden(key, gate, up, PRECISION)
        b = -tl.dot(value, tl.trans(down), input_precision=PRECISION)
        to_gate = (lr_gate * b * u * (s + a * (1 - s))).to(key.dtype)
        g_gate = tl.dot(tl.trans(key), to_gate, g_gate, input_precision=PRECISION)
        g_up = tl.dot(tl.trans(key), (lr_up * b * a).to(key.dtype), g_up, input_precision=PRECISION)
        g_down = tl.dot(tl.trans(value), (-lr_down * a * u).to(value.dtype), g_down, input_precision=PRECISION)
    _store_weights(gradient, g_gate, g_up, g_down, HIDDEN, DIM, N)


@triton.jit
def write_gradient_kernel(
    w,
    slopes,
    k,
    v,
    lr,
    d_k,
    d_v,
    d_lr,
    d_w,
    SPAN: tl.constexpr,
    TOKENS: tl.constexpr,
    DIM: tl.constexpr,
    HIDDEN: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Parts of the gradients of what `write_kernel` takes, from `slopes`, C: grid (P, blocks of H, S).

    x_* are C times the tokens; d_*_term are the gradients of the three terms of a token.
    """
    p, n, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    gate, up, down = _weights(w + p * 3 * HIDDEN * DIM, n * N, HIDDEN, DIM, N)
    c_gate, c_up, c_down = _weights(slopes + p * 3 * HIDDEN * DIM, n * N, HIDDEN, DIM, N)
    tokens = p * TOKENS * DIM
    lr += p * TOKENS * 3
    place = (n * tl.num_programs(0) + p) * TOKENS
    d_gate, d_up = tl.zeros([DIM, N], tl.float32), tl.zeros([DIM, N], tl.float32)
    d_down = tl.zeros([DIM, N], tl.float32)
    for at in range(part * SPAN, tl.minimum(part * SPAN + SPAN, TOKENS), M):
        t = at + tl.arange(0, M)
        key, value = _rows(k + tokens, t, TOKENS, DIM), _rows(v + tokens, t, TOKENS, DIM)
        lr_gate, lr_up, lr_down = _rates(lr, t, TOKENS)
        g, u, s, a = _hidden(key, gate, up, PRECISION)
        b = -tl.dot(value, tl.trans(down), input_precision=PRECISION)
        x_gate = tl.dot(key, tl.trans(c_gate), input_precision=PRECISION)
        x_up = tl.dot(key, tl.trans(c_up), input_precision=PRECISION)
        x_down = tl.dot(value, tl.trans(c_down), input_precision=PRECISION)
        slope = s + a * (1 - s)

        # <C, G> is a sum over tokens of lr * term * x. What stands beside each term is its token's part:
        gate_term, up_term, down_term = b * u * slope, b * a, -a * u
        _store_rates(d_lr + place * 3, gate_term * x_gate, up_term * x_up, down_term * x_down, t, TOKENS)
        dtype = key.dtype
        dk = tl.dot((lr_gate * gate_term).to(dtype), c_gate, input_precision=PRECISION)
        dk = tl.dot((lr_up * up_term).to(dtype), c_up, dk, input_precision=PRECISION)
        dv = tl.dot((lr_down * down_term).to(dtype), c_down, input_precision=PRECISION)

        # And the terms depend on the token and on the weights through g, u and b, as a and the slope do through g.
        d_gate_term, d_up_term, d_down_term = lr_gate * x_gate, lr_up * x_up, lr_down * x_down
        bend = s * (1 - s) * (2 + g * (1 - 2 * s))  # the slope's slope
        d_g = d_gate_term * b * u * bend + (d_up_term * b - d_down_term * u) * slope
        d_u = d_gate_term * b * slope - d_down_term * a
        d_b = -(d_gate_term * u * slope + d_up_term * a)
        d_g, d_u, d_b = d_g.to(dtype), d_u.to(dtype), d_b.to(dtype)
        d_gate = tl.dot(tl.trans(key), d_g, d_gate, input_precision=PRECISION)
        d_up = tl.dot(tl.trans(key), d_u, d_up, input_precision=PRECISION)
        d_down = tl.dot(tl.trans(value), d_b, d_down, input_precision=PRECISION)
        dk = tl.dot(d_g, gate, dk, input_precision=PRECISION)
        dk = tl.dot(d_u, up, dk, input_precision=PRECISION)
        dv = tl.dot(d_b, down, dv, input_precision=PRECISION)
        _store_rows(d_k + place * DIM, dk, t, TOKENS, DIM)
        _store_rows(d_v + place * DIM, dv, t, TOKENS, DIM)
    _store_weights(d_w, d_gate, d_up, d_down, HIDDEN, DIM, N)


@triton.jit
def _hidden(x, gate, up, PRECISION: tl.constexpr):
    """Returns g, u, s, a [M, N] of tokens x [M, D]."""
    g = tl.dot(x, tl.trans(gate), input_precision=PRECISION)
    u = tl.dot(x, tl.trans(up), input_precision=PRECISION)
    s = 1 / (1 + tl.exp(-g))
    return g, u, s, g * s


@triton.jit
def _rows(x, t, TOKENS: tl.constexpr, DIM: tl.constexpr):
    """Loads tokens t [M] of x [T, D], zeros after the last."""
    d = tl.arange(0, DIM)
    return tl.load(x + t[:, None] * DIM + d[None, :], mask=(t < TOKENS)[:, None], other=0.0)


@triton.jit
def _store_rows(x, values, t, TOKENS: tl.constexpr, DIM: tl.constexpr):
    d = tl.arange(0, DIM)
    tl.store(x + t[:, None] * DIM + d[None, :], values.to(x.dtype.element_ty), mask=(t < TOKENS)[:, None])


@triton.jit
def _rates(lr, t, TOKENS: tl.constexpr):
    """Loads the three learning rates of tokens t, each [M, 1], zeros after the last."""
    x, here = lr + t[:, None] * 3, (t < TOKENS)[:, None]
    return tl.load(x, here, other=0.0), tl.load(x + 1, here, other=0.0), tl.load(x + 2, here, other=0.0)


@triton.jit
def _store_rates(d_lr, gate, up, down, t, TOKENS: tl.constexpr):
    """Stores sums over the hidden units of [M, N] each."""
    tl.store(d_lr + t * 3, tl.sum(gate, 1), mask=t < TOKENS)
    tl.store(d_lr + t * 3 + 1, tl.sum(up, 1), mask=t < TOKENS)
    tl.store(d_lr + t * 3 + 2, tl.sum(down, 1), mask=t < TOKENS)


@triton.jit
def _weights(w, at, HIDDEN: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr):
    """Loads hidden units at .. at + N of w [3, H, D]: three times [N, D]."""
    n, d = tl.arange(0, N), tl.arange(0, DIM)
    x = w + (at + n)[:, None] * DIM + d[None, :]
    return tl.load(x), tl.load(x + HIDDEN * DIM), tl.load(x + 2 * HIDDEN * DIM)


@triton.jit
def _store_weights(x, gate, up, down, HIDDEN: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr):
    """Stores [D, N] each as this program's part of x [S, P, 3, H, D]."""
    n, d = tl.program_id(1) * N + tl.arange(0, N), tl.arange(0, DIM)
    x += (tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 3 * HIDDEN * DIM
    x += n[None, :] * DIM + d[:, None]
    tl.store(x, gate)
    tl.store(x + HIDDEN * DIM, up)
    tl.store(x + 2 * HIDDEN * DIM, down)

"""The memory in Triton, for NVIDIA GPUs: the scan over blocks of `xla`, with the work on tokens in four kernels.

Axes: B batch, N memory heads, P = B * N, T tokens of a block, D head dim, H hidden, S parts of the tokens; inside the
kernels M tokens and N hidden units of a tile.

Hidden units are independent but for the sums over them that make an output or a token's gradient. So `read` goes over
the hidden units in a loop, one program per (P, M tokens), and the other three kernels (the write, and the gradients of
both) give a program N hidden units of one p and a part of the tokens, in a loop. Those write their part of each sum,
and XLA adds the parts: no sum depends on the order in which programs run. `_splits` cuts the tokens so that one row of
a batch fills the GPU. Intermediates never leave a program; the gradients recompute them.

Head dims are filled up to a power of two and hidden units to a multiple of the tile's, with zeros, which change
nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from pallas_kernels import triton_call
from pallas_kernels.ttt import xla
from pallas_kernels.ttt.types import FastWeights

PROGRAMS = 264  # that keep the GPU busy: two for each of the 132 processors of an H100


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Tiles of the four kernels; rows are tokens, columns are hidden units.

    Attributes:
      read: of f(W, q).
      write: of the sum of the inner loss's gradients.
      read_gradient: of the gradient of `read`.
      write_gradient: of the gradient of `write`.
    """

    read: triton_call.Tile
    write: triton_call.Tile
    read_gradient: triton_call.Tile
    write_gradient: triton_call.Tile


# For the "NVIDIA H100", by bits of the dtype and the largest head dim that they serve: rows, columns, warps, stages. A
# block can have 227 KB of shared memory there; these need less. Only the float32 ones of D = 256 spill registers.
H100 = {
    (16, 64): ((64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 4, 2), (32, 32, 4, 2)),
    (16, 128): ((64, 64, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)),
    (16, 256): ((64, 32, 8, 2), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 8, 1)),
    (32, 64): ((32, 32, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1), (32, 16, 4, 1)),
    (32, 128): ((16, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
    (32, 256): ((16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1), (16, 16, 8, 1)),
}


def choose_tiles(dim: int, dtype) -> Tiles:
    """Returns the tiles for a head dim and a dtype; NotImplementedError where the kernels do not serve them."""
    return Tiles(*triton_call.choose(H100, dim, dtype))


def forward(chunk_size, aligned, difference, tokens, *arrays):
    """Returns (out [B, L, N, D], state) and what `backward` needs; arguments as in `xla.forward`."""
    return xla.forward(chunk_size, aligned, difference, tokens, *arrays, kernels=_kernels(tokens[0]))


def backward(chunk_size, aligned, difference, residuals, cotangents):
    """Returns the cotangents of (tokens, init, state) from those of (out, state)."""
    return xla.backward(chunk_size, aligned, difference, residuals, cotangents, kernels=_kernels(residuals[0][0]))


def _kernels(q) -> xla.Kernels:
    tiles = choose_tiles(q.shape[-1], q.dtype)
    return xla.Kernels(functools.partial(read_tokens, tiles), functools.partial(write_tokens, tiles))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def read_tokens(tiles: Tiles, w: FastWeights, q: jax.Array) -> jax.Array:
    """Returns f(W, q) [B, N, T, D], float32, for float32 weights [B, N, ...]."""
    tile = tiles.read
    query, weights = _flat(q), _stack(tile, w, q.dtype)
    grid = (query.shape[0], triton.cdiv(query.shape[1], tile.rows))
    (out,) = triton_call.call(
        _read_kernel,
        weights,
        query,
        out=[jax.ShapeDtypeStruct(query.shape, jnp.float32)],
        grid=grid,
        tile=tile,
        **_constants(tile, query, weights),
    )
    return _unflat(out, q)


def _read_backward(tiles, residuals, d_out):
    w, q = residuals
    tile = tiles.read_gradient
    query, wide, weights = _flat(q), _flat(d_out), _stack(tile, w, q.dtype)
    d_o = wide.astype(q.dtype)
    grid, span = _splits(tile, query, weights)
    d_q, d_w = triton_call.call(
        _read_gradient_kernel,
        weights,
        query,
        d_o,
        out=[_parts_of(query, grid[1]), _parts_of(weights, grid[2])],
        grid=grid,
        tile=tile,
        SPAN=span,
        **_constants(tile, query, weights),
    )
    d_q = wide + d_q.sum(0)
    return _unstack(d_w.sum(0), w), _unflat(d_q.astype(q.dtype), q)


read_tokens.defvjp(lambda tiles, w, q: (read_tokens(tiles, w, q), (w, q)), _read_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write_tokens(tiles: Tiles, w: FastWeights, k: jax.Array, v: jax.Array, lr: jax.Array) -> FastWeights:
    """Returns the gradient of sum_t -lr_t <f(W, k_t), v_t>, float32, for k, v [B, N, T, D] and lr [B, N, T, 3]."""
    tile = tiles.write
    key, value, weights = _flat(k), _flat(v), _stack(tile, w, k.dtype)
    rates = lr.reshape(*key.shape[:2], 3)
    grid, span = _splits(tile, key, weights)
    (gradient,) = triton_call.call(
        _write_kernel,
        weights,
        key,
        value,
        rates,
        out=[_parts_of(weights, grid[2])],
        grid=grid,
        tile=tile,
        SPAN=span,
        **_constants(tile, key, weights),
    )
    return _unstack(gradient.sum(0), w)


def _write_backward(tiles, residuals, cotangent):
    w, k, v, lr = residuals
    tile = tiles.write_gradient
    key, value, weights, slopes = _flat(k), _flat(v), _stack(tile, w, k.dtype), _stack(tile, cotangent, k.dtype)
    rates = lr.reshape(*key.shape[:2], 3)
    grid, span = _splits(tile, key, weights)
    shapes = [_parts_of(key, grid[1]), _parts_of(value, grid[1]), _parts_of(rates, grid[1])]
    d_k, d_v, d_lr, d_w = triton_call.call(
        _write_gradient_kernel,
        weights,
        slopes,
        key,
        value,
        rates,
        out=[*shapes, _parts_of(weights, grid[2])],
        grid=grid,
        tile=tile,
        SPAN=span,
        **_constants(tile, key, weights),
    )
    d_k, d_v = (_unflat(x.sum(0).astype(k.dtype), k) for x in (d_k, d_v))
    return _unstack(d_w.sum(0), w), d_k, d_v, d_lr.sum(0).reshape(lr.shape)


write_tokens.defvjp(lambda tiles, *args: (write_tokens(tiles, *args), args), _write_backward)


def _constants(tile, x, weights) -> dict:
    exact = jnp.finfo(x.dtype).bits == 32
    return {
        "TOKENS": x.shape[1],
        "DIM": x.shape[2],
        "HIDDEN": weights.shape[2],
        "M": tile.rows,
        "N": tile.columns,
        "PRECISION": "ieee" if exact else "tf32",
    }


def _splits(tile, x, weights) -> tuple[tuple[int, int, int], int]:
    """Returns the grid (P, blocks of H, S) and the number of tokens of a part, a multiple of the tile's."""
    programs = x.shape[0] * (weights.shape[2] // tile.columns)
    blocks = triton.cdiv(x.shape[1], tile.rows)
    span = triton.cdiv(blocks, min(blocks, triton.cdiv(PROGRAMS, programs))) * tile.rows
    return (x.shape[0], weights.shape[2] // tile.columns, triton.cdiv(x.shape[1], span)), span


def _parts_of(x, count) -> jax.ShapeDtypeStruct:
    """`count` float32 summands of something like x."""
    return jax.ShapeDtypeStruct((count, *x.shape), jnp.float32)


def _flat(x):
    """[B, N, T, D] -> [P, T, D filled up]."""
    x = x.reshape(-1, *x.shape[2:])
    return jnp.pad(x, [(0, 0), (0, 0), (0, triton_call.padded(x.shape[-1]) - x.shape[-1])])


def _unflat(x, like):
    return x[..., : like.shape[-1]].reshape(like.shape)


def _stack(tile, w: FastWeights, dtype):
    """Returns gate, up and the transpose of down as one array [P, 3, H filled up, D filled up]."""
    x = jnp.stack([w.gate, w.up, jnp.swapaxes(w.down, -1, -2)], axis=2).astype(dtype)
    hidden, dim = x.shape[-2:]
    padding = [(0, 0), (0, 0), (0, -hidden % tile.columns), (0, triton_call.padded(dim) - dim)]
    return jnp.pad(x.reshape(-1, *x.shape[2:]), padding)


def _unstack(x, like: FastWeights) -> FastWeights:
    batch, heads, hidden, dim = like.gate.shape
    x = x[..., :hidden, :dim].reshape(batch, heads, 3, hidden, dim)
    return FastWeights(x[:, :, 0], x[:, :, 1], jnp.swapaxes(x[:, :, 2], -1, -2))


@triton.jit
def _read_kernel(
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
        g = tl.dot(query, tl.trans(gate), input_precision=PRECISION)
        u = tl.dot(query, tl.trans(up), input_precision=PRECISION)
        h = g * _sigmoid(g) * u
        o = tl.dot(h.to(down.dtype), down, o, input_precision=PRECISION)
    _store_rows(out + p * TOKENS * DIM, o, t, TOKENS, DIM)


@triton.jit
def _read_gradient_kernel(
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
        g = tl.dot(query, tl.trans(gate), input_precision=PRECISION)
        u = tl.dot(query, tl.trans(up), input_precision=PRECISION)
        d_h = tl.dot(d_o, tl.trans(down), input_precision=PRECISION)
        s = _sigmoid(g)
        a = g * s
        d_g = (d_h * u * (s + a * (1 - s))).to(query.dtype)
        d_u = (d_h * a).to(query.dtype)
        d_gate = tl.dot(tl.trans(query), d_g, d_gate, input_precision=PRECISION)
        d_up = tl.dot(tl.trans(query), d_u, d_up, input_precision=PRECISION)
        d_down = tl.dot(tl.trans(d_o), (a * u).to(d_o.dtype), d_down, input_precision=PRECISION)
        d = tl.dot(d_g, gate, input_precision=PRECISION)
        _store_rows(d_q, tl.dot(d_u, up, d, input_precision=PRECISION), t, TOKENS, DIM)
    _store_weights(d_w, d_gate, d_up, d_down, HIDDEN, DIM, N)


@triton.jit
def _write_kernel(
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
        g = tl.dot(key, tl.trans(gate), input_precision=PRECISION)
        u = tl.dot(key, tl.trans(up), input_precision=PRECISION)
        b = -tl.dot(value, tl.trans(down), input_precision=PRECISION)
        s = _sigmoid(g)
        a = g * s
        to_gate = (lr_gate * b * u * (s + a * (1 - s))).to(key.dtype)
        g_gate = tl.dot(tl.trans(key), to_gate, g_gate, input_precision=PRECISION)
        g_up = tl.dot(tl.trans(key), (lr_up * b * a).to(key.dtype), g_up, input_precision=PRECISION)
        g_down = tl.dot(tl.trans(value), (-lr_down * a * u).to(value.dtype), g_down, input_precision=PRECISION)
    _store_weights(gradient, g_gate, g_up, g_down, HIDDEN, DIM, N)


@triton.jit
def _write_gradient_kernel(
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
    """Parts of the gradients of `_write_kernel`'s inputs from `slopes`, that of its result: grid (P, blocks of H, S).

    x_* are the products of `slopes` with the tokens; d_*_term are the gradients of the three terms of a token.
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
        g = tl.dot(key, tl.trans(gate), input_precision=PRECISION)
        u = tl.dot(key, tl.trans(up), input_precision=PRECISION)
        b = -tl.dot(value, tl.trans(down), input_precision=PRECISION)
        x_gate = tl.dot(key, tl.trans(c_gate), input_precision=PRECISION)
        x_up = tl.dot(key, tl.trans(c_up), input_precision=PRECISION)
        x_down = tl.dot(value, tl.trans(c_down), input_precision=PRECISION)
        s = _sigmoid(g)
        a = g * s
        slope = s + a * (1 - s)

        gate_term, up_term, down_term = b * u * slope, b * a, -a * u
        _store_rates(d_lr + place * 3, gate_term * x_gate, up_term * x_up, down_term * x_down, t, TOKENS)
        dtype = key.dtype
        dk = tl.dot((lr_gate * gate_term).to(dtype), c_gate, input_precision=PRECISION)
        dk = tl.dot((lr_up * up_term).to(dtype), c_up, dk, input_precision=PRECISION)
        dv = tl.dot((lr_down * down_term).to(dtype), c_down, input_precision=PRECISION)

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
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


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

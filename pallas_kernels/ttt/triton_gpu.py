"""The memory in Triton, for NVIDIA GPUs: the scan over blocks of `xla`, with the work on tokens in `triton_kernels`.

Axes: B batch, N memory heads, P = B * N, T tokens of a block, D head dim, H hidden, S parts of the tokens.

`_splits` cuts the tokens so that one row of a batch fills the GPU. Head dims are filled up to a power of two and hidden
units to a multiple of the tile's, with zeros, which change nothing.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import triton

from pallas_kernels import triton_call
from pallas_kernels.ttt import triton_kernels, xla
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
    tile, query = tiles.read, _flat(q)
    grid = (query.shape[0], triton.cdiv(query.shape[1], tile.rows))
    shape = jax.ShapeDtypeStruct(query.shape, jnp.float32)
    (out,) = _call(triton_kernels.read_kernel, tile, (_stack(tile, w, q.dtype), query), [shape], grid)
    return _unflat(out, q)


def _read_backward(tiles, residuals, d_out):
    w, q = residuals
    tile = tiles.read_gradient
    query, wide, weights = _flat(q), _flat(d_out), _stack(tile, w, q.dtype)
    grid, span = _splits(tile, query, weights)
    shapes = [_parts_of(query, grid[1]), _parts_of(weights, grid[2])]
    arrays = weights, query, wide.astype(q.dtype)
    d_q, d_w = _call(triton_kernels.read_gradient_kernel, tile, arrays, shapes, grid, SPAN=span)
    d_q = wide + d_q.sum(0)  # f adds q itself: that part of the cotangent was never rounded
    return _unstack(d_w.sum(0), w), _unflat(d_q.astype(q.dtype), q)


read_tokens.defvjp(lambda tiles, w, q: (read_tokens(tiles, w, q), (w, q)), _read_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def write_tokens(tiles: Tiles, w: FastWeights, k: jax.Array, v: jax.Array, lr: jax.Array) -> FastWeights:
    """Returns the gradient of sum_t -lr_t <f(W, k_t), v_t>, float32, for k, v [B, N, T, D] and lr [B, N, T, 3]."""
    tile = tiles.write
    key, weights = _flat(k), _stack(tile, w, k.dtype)
    grid, span = _splits(tile, key, weights)
    arrays = weights, key, _flat(v), lr.reshape(*key.shape[:2], 3)
    (gradient,) = _call(triton_kernels.write_kernel, tile, arrays, [_parts_of(weights, grid[2])], grid, SPAN=span)
    return _unstack(gradient.sum(0), w)


def _write_backward(tiles, residuals, cotangent):
    w, k, v, lr = residuals
    tile = tiles.write_gradient
    key, value, weights = _flat(k), _flat(v), _stack(tile, w, k.dtype)
    rates = lr.reshape(*key.shape[:2], 3)
    grid, span = _splits(tile, key, weights)
    shapes = [*(_parts_of(x, grid[1]) for x in (key, value, rates)), _parts_of(weights, grid[2])]
    arrays = weights, _stack(tile, cotangent, k.dtype), key, value, rates
    d_k, d_v, d_lr, d_w = _call(triton_kernels.write_gradient_kernel, tile, arrays, shapes, grid, SPAN=span)
    d_k, d_v = (_unflat(x.sum(0).astype(k.dtype), k) for x in (d_k, d_v))
    return _unstack(d_w.sum(0), w), d_k, d_v, d_lr.sum(0).reshape(lr.shape)


write_tokens.defvjp(lambda tiles, *args: (write_tokens(tiles, *args), args), _write_backward)


def _call(kernel, tile, arrays, out, grid, **more):
    """Runs a kernel of arrays of which the first is weights [P, 3, H, D] and the last of tokens, [P, T, ...]."""
    weights, tokens = arrays[0], arrays[-1]
    return triton_call.call(
        kernel,
        *arrays,
        out=out,
        grid=grid,
        tile=tile,
        TOKENS=tokens.shape[1],
        DIM=weights.shape[3],
        HIDDEN=weights.shape[2],
        M=tile.rows,
        N=tile.columns,
        PRECISION="ieee" if weights.dtype == jnp.float32 else "tf32",
        **more,
    )


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

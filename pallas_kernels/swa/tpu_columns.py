"""Queries in columns: how the TPU kernels of many tokens lay them out, and their online softmax.

Axes: B batch, L tokens, Hkv key heads, G query heads per key head, D head dim, K keys, Q tokens of a query block, N
number of query blocks, R = G * Q columns of a query block.

Tiles are transposed, keys in rows and queries in columns: maxima and sums over keys are then plain vector operations,
and what belongs to a query (maximum, sum, logsumexp, document) is one dense row. Scores are in base 2: queries come
multiplied by scale * log2(e).
"""

import math

import jax.numpy as jnp

from pallas_kernels import dots

MASKED = -1e30
COLUMNS = 256  # at a time, so that one part's weights overlap with another's output


def queries(q, scale, heads, tokens, multiple):
    """[B, L, Hq, D] -> [B, Hkv, N, D, R], multiplied so that scores are in base 2; see `columns`."""
    return columns((q.astype(jnp.float32) * (scale * math.log2(math.e))).astype(q.dtype), heads, tokens, multiple)


def columns(x, heads, tokens, multiple):
    """[B, L, Hq, X] -> [B, Hkv, N, X, R], columns in the order (G, Q).

    L is filled with zeros to a multiple of `multiple`, itself one of the Q `tokens` of a block.
    """
    batch, length, query_heads, dim = x.shape
    x = jnp.pad(x, [(0, 0), (0, -length % multiple), (0, 0), (0, 0)])
    x = x.reshape(batch, -1, tokens, heads, query_heads // heads, dim)
    return x.transpose(0, 3, 1, 5, 4, 2).reshape(batch, heads, x.shape[1], dim, -1)


def from_columns(x, shape):
    """[B, Hkv, N, D, R] -> [B, L, Hq, D] of `shape`."""
    batch, length, query_heads, dim = shape
    _, heads, count = x.shape[:3]
    x = x.reshape(batch, heads, count, dim, query_heads // heads, -1).transpose(0, 2, 5, 1, 4, 3)
    return x.reshape(batch, -1, query_heads, dim)[:, :length]


def clear(accumulator, top, total):
    """Sets the refs of an online softmax, [D, R], [1, R] and [1, R], to that of no keys."""
    accumulator[...] = jnp.zeros_like(accumulator)
    top[...] = jnp.full_like(top, MASKED)
    total[...] = jnp.zeros_like(total)


def add(scores, value, accumulator, top, total):
    """Adds keys with scores [K, R] and values [K, D] to an online softmax."""
    for first in range(0, scores.shape[1], COLUMNS):
        part = slice(first, min(first + COLUMNS, scores.shape[1]))
        new_top = jnp.maximum(top[:, part], jnp.max(scores[:, part], axis=0, keepdims=True))
        weights = jnp.exp2(scores[:, part] - new_top)
        decay = jnp.exp2(top[:, part] - new_top)
        top[:, part] = new_top
        total[:, part] = total[:, part] * decay + jnp.sum(weights, axis=0, keepdims=True)
        accumulator[:, part] = accumulator[:, part] * decay + dots.tiles(
            "kd,kr->dr", value, weights.astype(value.dtype)
        )

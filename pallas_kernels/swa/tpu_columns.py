"""Queries in columns: how the TPU kernels of many tokens lay them out, and their online softmax.

Axes: B batch, L tokens, Hkv key heads, G query heads per key head, D head dim, K keys, Q tokens of a query block, R =
G * Q columns of a query block.

Tiles are transposed, keys in rows and queries in columns: maxima and sums over keys are then plain vector operations,
and what belongs to a query (maximum, sum, logsumexp, document) is one dense row. Scores are in base 2: queries come
multiplied by scale * log2(e).

In HBM every head's queries are [D, L], in which the compiler also keeps what comes before and after (projections,
norms, rotations); a block of them is [G, D, Q], whose heads a kernel puts side by side.
"""

import math

import jax.numpy as jnp

from pallas_kernels import dots, tpu_tokens

MASKED = -1e30
COLUMNS = 256  # at a time, so that one part's weights overlap with another's output


def queries(q, scale, heads, multiple):
    """[B, L, Hq, D] -> [B, Hkv, G, D, L], multiplied so that scores are in base 2; see `columns`."""
    factor = scale * math.log2(math.e)
    scaled = q if factor == 1 else (q.astype(jnp.float32) * factor).astype(q.dtype)
    return columns(scaled, heads, multiple)


def columns(x, heads, multiple):
    """[B, L, Hq, X] -> [B, Hkv, G, X, L], L filled with zeros to a multiple of `multiple`."""
    batch, _, query_heads, dim = x.shape
    return tpu_tokens.columns(x, multiple).reshape(batch, heads, query_heads // heads, dim, -1)


def from_columns(x, shape):
    """[B, Hkv, G, D, L] -> [B, L, Hq, D] of `shape`."""
    batch, length, query_heads, dim = shape
    return tpu_tokens.from_columns(x.reshape(batch, query_heads, dim, -1), length)


def joined(block):
    """A block's ref [G, X, Q] -> [X, R], columns in the order (G, Q)."""
    return jnp.concatenate([block[g] for g in range(block.shape[0])], axis=1)


def put(block, x):
    """Writes [X, R] to a block's ref [G, X, Q]."""
    tokens = block.shape[2]
    for g in range(block.shape[0]):
        block[g] = x[:, g * tokens : (g + 1) * tokens].astype(block.dtype)


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

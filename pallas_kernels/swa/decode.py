"""`swa_decode`: attention of one new token a row to a ring cache and to itself. Signature, checks, choice of backend.

Axes: Y layers, B batch, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, S sink slots, W window slots,
T = S + W slots.

What the cache holds is said in `ring`. It is read where it lies: no kernel copies it, or its layer, or appends to it.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backends, dots
from pallas_kernels.swa import decode_tpu, reference, ring


def swa_decode(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    position: jax.Array,
    *,
    sink_slots: int,
    window: int | jax.Array,
    sinks: int | jax.Array = 0,
    scale: float | None = None,
    layer: int | jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention of token `position` of each row, which sees itself and what the cache holds of its past.

    It sees token j of the cache iff position - j < window or j < sinks. Differentiable in the floating arguments; every
    backend has the gradient of the plain version.

    Args:
      q: [B, Hq, D], floating.
      k, v: [B, Hkv, D] in q's dtype, the token's own; Hq a multiple of Hkv.
      keys, values: [B, S + W, Hkv, D], or [Y, B, S + W, Hkv, D] with `layer`, in q's dtype, before the token is
        written. Empty slots hold any finite numbers.
      position: int32 [B], tokens before this one.
      sink_slots: S, at least 0; the rest of the slots, at least one, is W.
      window: an int or a traced int32 scalar, at least 1. More than W tokens back there is nothing to see.
      sinks: first tokens of the row that are always seen, an int or a traced int32 scalar, 0 to S.
      scale: multiplies the scores; a Python number. None means D ** -0.5.
      layer: which of the caches of all layers is read, from 0; an int or a traced int32 scalar.
      implementation: None for the best on the platform that the code is lowered for; or "xla", "pallas" (TPU),
        "triton" (NVIDIA GPUs), "reference".

    Returns:
      [B, Hq, D] in q's dtype. Scores and sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: an argument that does not fit, by name.
      NotImplementedError: a named backend that cannot serve, with the reason; it is never replaced by another.
    """
    if layer is None:
        keys, values = keys[None], values[None]
    _check(q, k, v, keys, values, position, sink_slots)
    worth = ("pallas", "triton") if decode_tpu.worthwhile(keys) else ("triton",)
    serving = backends.serving("swa_decode", implementation, q, decode_tpu.why_not(q), worth)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    arrays = (
        q,
        k,
        v,
        keys,
        values,
        position.astype(jnp.int32),
        *map(jnp.int32, (window, sinks, 0 if layer is None else layer)),
    )
    if implementation == "reference":
        own = (x[arrays[-1]] for x in (keys, values))
        return reference.swa_decode(sink_slots, scale, q, k, v, *own, *arrays[5:-1])
    found: dict[str, Callable[..., Any]] = {name: _triton() if name == "triton" else _OWN[name] for name in serving}
    functions = {name: functools.partial(function, sink_slots, scale) for name, function in found.items()}
    return backends.run(implementation, functions, *arrays)


def plain(sink_slots, scale, q, k, v, keys, values, position, window, sinks, layer) -> jax.Array:
    """`ring.attend` of one token, which costs less: scores of the cache and its own share one maximum and one sum."""
    keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
    batch, heads, dim = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    query = q.reshape(batch, k.shape[1], -1, dim)  # [B, Hkv, G, D]
    seen = ring.in_sight(position[:, None], jnp.arange(keys.shape[1]), sink_slots, keys.shape[1], window, sinks)
    scores = jax.lax.platform_dependent(query, keys, cpu=_scores_at_once, default=_scores)
    scores = jnp.where(seen[:, None, None], scores * scale, -jnp.inf)
    own = dots.einsum("bhgd,bhd->bhg", query, k)[..., None] * scale
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), own))
    weights, own = jnp.exp(scores - top), jnp.exp(own - top)
    out = jax.lax.platform_dependent(weights.astype(v.dtype), values, cpu=_mean_at_once, default=_mean)
    out += own * v.astype(dtype)[:, :, None]
    return (out / (weights.sum(-1, keepdims=True) + own)).reshape(q.shape).astype(q.dtype)


def _scores(query: jax.Array, keys: jax.Array) -> jax.Array:
    """[B, Hkv, G, D] and [B, T, Hkv, D] -> [B, Hkv, G, T]."""
    return dots.einsum("bhgd,bthd->bhgt", query, keys)


def _mean(weights: jax.Array, values: jax.Array) -> jax.Array:
    """[B, Hkv, G, T] and [B, T, Hkv, D] -> [B, Hkv, G, D]."""
    return dots.einsum("bhgt,bthd->bhgd", weights, values)


def _scores_at_once(query: jax.Array, keys: jax.Array) -> jax.Array:
    """`_scores` with queries as wide as all key heads, and zero but for their own.

    More products, but of the cache as it lies: XLA on CPUs writes it anew to part the heads, and to have it right of
    the queries.
    """
    batch, heads = query.shape[:2]
    wide = jnp.where(_own(heads), query[:, :, :, None], 0).reshape(batch, -1, heads * query.shape[3])
    scores = dots.einsum("btc,brc->btr", keys.reshape(*keys.shape[:2], -1), wide)
    scores = jax.lax.optimization_barrier(scores)  # or XLA makes it the other product again
    return jnp.swapaxes(scores, 1, 2).reshape(*query.shape[:3], -1)


def _mean_at_once(weights: jax.Array, values: jax.Array) -> jax.Array:
    """`_mean` over the values of all key heads, of which each takes its own."""
    batch, heads, group, count = weights.shape
    every = dots.einsum("brt,btc->brc", weights.reshape(batch, -1, count), values.reshape(batch, count, -1))
    return jnp.where(_own(heads), every.reshape(batch, heads, group, heads, -1), 0).sum(axis=3)


def _own(heads: int) -> jax.Array:
    return jnp.eye(heads, dtype=bool)[:, None, :, None]  # [Hkv, 1, Hkv, 1]


_differentiable = functools.partial(backends.with_gradient_of, plain, fixed=2, floats=5, constants=4)
_OWN = {"xla": plain, "pallas": _differentiable(decode_tpu.decode)}


@functools.cache
def _triton():
    return _differentiable(importlib.import_module("pallas_kernels.swa.decode_triton").decode)  # which imports triton


def _check(q, k, v, keys, values, position, sink_slots):
    """Raises where the arrays do not fit together."""
    if q.ndim != 3 or 0 in q.shape:
        raise ValueError(f"swa_decode: q has shape {q.shape}; it must be [B, Hq, D] with no empty axis")
    batch, heads, dim = q.shape
    if k.ndim != 3 or k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"swa_decode: k has shape {k.shape}; it must be [B, Hkv, D], Hkv a divisor of {heads}")
    if keys.ndim != 5 or not 0 <= sink_slots < keys.shape[2]:
        raise ValueError(
            f"swa_decode: keys has shape {keys.shape} and sink_slots={sink_slots}; it must be [Y, B, S + W, Hkv, D], "
            "or without layer [B, S + W, Hkv, D], which becomes [1, B, ...]"
        )
    own, cache = (batch, k.shape[1], dim), (keys.shape[0], batch, keys.shape[2], k.shape[1], dim)
    shapes = {"k": (k, own), "v": (v, own), "keys": (keys, cache), "values": (values, cache)}
    for name, (x, shape) in shapes.items():
        if x.shape != shape:
            raise ValueError(f"swa_decode: {name} has shape {x.shape}; with this q, k and keys it must be {shape}")
        if x.dtype != q.dtype:
            raise TypeError(f"swa_decode: {name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"swa_decode: q is {q.dtype}; it must be floating point")
    if position.shape != (batch,) or not jnp.issubdtype(position.dtype, jnp.integer):
        raise ValueError(f"swa_decode: position is {position.dtype} {position.shape}; it must be int32 ({batch},)")

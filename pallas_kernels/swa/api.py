"""`swa_attention`: signature, checks, gradient rule and choice of backend.

Axes: B batch, L tokens, Hq query heads, Hkv key heads, D head dim.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import backends
from pallas_kernels.swa import pallas_tpu, reference, tpu_visits, xla


def swa_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | jax.Array,
    sinks: int | jax.Array = 0,
    segment_ids: jax.Array | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Softmax attention in which query i sees key j iff j <= i and (i - j < window or j < sinks).

    With `segment_ids` a query sees keys of its own document only, and sinks are the first tokens of that document, so
    that a packed row equals its documents one by one. Cost is O(L * (window + sinks)), also for traced values.
    Differentiable once (reverse mode) in q, k and v.

    Args:
      q: [B, L, Hq, D], floating.
      k, v: [B, L, Hkv, D] in q's dtype, Hq a multiple of Hkv; query head h reads key head h // (Hq / Hkv).
      window: keys that a query sees, itself included; an int or a traced int32 scalar, at least 1. window >= L is full
        causal attention.
      sinks: first tokens of the document that every query sees; an int or a traced int32 scalar, at least 0.
      segment_ids: int [B, L], documents as contiguous runs; 0 is padding, whose outputs are zero. None means one
        document a row.
      scale: multiplies the scores; a Python number. None means D ** -0.5.
      implementation: None for the best on the platform that the code is lowered for; or "xla", "pallas" (TPU),
        "triton" (NVIDIA GPUs), "reference".

    Returns:
      [B, L, Hq, D] in q's dtype. Scores and sums are float32 (float64 for float64 inputs).

    Raises:
      ValueError, TypeError: an argument that does not fit, by name.
      NotImplementedError: a named backend that cannot serve, with the reason; it is never replaced by another.
    """
    _check(q, k, v, segment_ids)
    _check_count("window", window, 1)
    _check_count("sinks", sinks, 0)
    serving = backends.serving("swa_attention", implementation, q, pallas_tpu.why_not(q))
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if implementation == "reference":
        return reference.swa_attention(q, k, v, window=window, sinks=sinks, segment_ids=segment_ids, scale=scale)
    functions: dict[str, Callable[..., Any]] = {}
    if "xla" in serving:
        functions["xla"] = functools.partial(_xla, xla.choose_blocks(q.shape[1], window, sinks), scale)
    if "pallas" in serving:
        functions["pallas"] = functools.partial(_pallas, tpu_visits.choose_blocks(q, k, window, sinks), scale)
    if "triton" in serving:
        blocks, function = _triton()
        functions["triton"] = functools.partial(function, blocks(q.shape[-1], q.dtype), scale)
    window, sinks = _bounded(window, q.shape[1]), _bounded(sinks, q.shape[1])
    return backends.run(implementation, functions, q, k, v, window, sinks, segment_ids)


def _bounded(x: int | jax.Array, limit: int) -> jax.Array:
    """Returns x as int32, at most `limit`: more than all tokens means the same and could overflow."""
    return jnp.asarray(min(x, limit) if isinstance(x, int) else jnp.minimum(x, limit), jnp.int32)


_differentiable = functools.partial(backends.with_gradient, fixed=2, constants=3)
_xla = _differentiable(xla.forward, xla.backward)
_pallas = _differentiable(pallas_tpu.forward, pallas_tpu.backward)


@functools.cache
def _triton():
    module = importlib.import_module("pallas_kernels.swa.triton_gpu")  # which imports triton
    return module.choose_blocks, _differentiable(module.forward, module.backward)


def _check(q, k, v, segment_ids):
    """Raises where the arrays do not fit together."""
    if q.ndim != 4 or 0 in q.shape:
        raise ValueError(f"swa_attention: q has shape {q.shape}; it must be [B, L, Hq, D] with no empty axis")
    batch, length, heads, dim = q.shape
    for name, x in (("k", k), ("v", v)):
        if x.ndim != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, length, dim) or x.shape != k.shape:
            raise ValueError(
                f"swa_attention: {name} has shape {x.shape}; with this q it must be ({batch}, {length}, Hkv, {dim}),"
                " the same for k and v"
            )
    if k.shape[2] == 0 or heads % k.shape[2]:
        raise ValueError(f"swa_attention: q has {heads} heads and k has {k.shape[2]}; Hq must be a multiple of Hkv")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"swa_attention: {name} is {x.dtype}; it must be floating point")
        if x.dtype != q.dtype:
            raise TypeError(f"swa_attention: {name} is {x.dtype} and q is {q.dtype}; cast them to one dtype")
    if segment_ids is not None:
        if segment_ids.shape != (batch, length):
            raise ValueError(f"swa_attention: segment_ids has shape {segment_ids.shape}; it must be {(batch, length)}")
        if not jnp.issubdtype(segment_ids.dtype, jnp.integer):
            raise TypeError(f"swa_attention: segment_ids is {segment_ids.dtype}; it must be an integer type")


def _check_count(name, x, least):
    """Raises unless x is an integer scalar, and at least `least` where its value is known."""
    if jnp.ndim(x) or not jnp.issubdtype(jnp.result_type(x), jnp.integer):
        raise TypeError(f"swa_attention: {name}={x!r} must be an integer scalar, traced or not")
    if isinstance(x, int) and x < least:
        raise ValueError(f"swa_attention: {name}={x} must be at least {least}")

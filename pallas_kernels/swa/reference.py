"""Sliding-window attention as the mask reads, dense; for tests and small sizes.

Axes: B batch, L tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim.
"""

import jax
import jax.numpy as jnp


def swa_attention(q, k, v, *, window, sinks, segment_ids, scale) -> jax.Array:
    """See `pallas_kernels.swa_attention`; `scale` is a number here. Float64 inputs are computed in float64."""
    batch, length, heads, dim = q.shape
    segments = jnp.ones((batch, length), jnp.int32) if segment_ids is None else segment_ids
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    query = q.astype(dtype).reshape(batch, length, k.shape[2], -1, dim)
    scores = jnp.einsum("bihgd,bjhd->bhgij", query, k.astype(dtype), precision="highest") * scale

    index = jnp.arange(length)
    i, j = index[:, None], index[None, :]
    same = segments[:, :, None] == segments[:, None, :]
    start = jnp.argmax(same, axis=2)[:, :, None]  # first token of i's document
    visible = same & (j <= i) & ((i - j < window) | (j - start < sinks))
    weights = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgij,bjhd->bihgd", weights, v.astype(dtype), precision="highest")
    out = jnp.where((segments != 0)[:, :, None, None, None], out, 0)
    return out.reshape(q.shape).astype(q.dtype)

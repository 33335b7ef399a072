"""Sliding-window attention as the mask reads, dense; for tests and small sizes.

Axes: B batch, L tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim.
"""

import jax
import jax.numpy as jnp


def swa_attention(q, k, v, *, window, sinks, segment_ids, scale) -> jax.Array:
    """See `pallas_kernels.swa_attention`; `scale` is a number here. Float64 inputs are computed in float64."""
    batch, length, heads, dim = q.shape
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    query = q.astype(dtype).reshape(batch, length, k.shape[2], -1, dim)
    scores = jnp.einsum("bihgd,bjhd->bhgij", query, k.astype(dtype), precision="highest") * scale

    index = jnp.arange(length)
    i, j = index[:, None], index[None, :]
    same = jnp.ones((1, 1, 1, length, length), bool)
    start = jnp.zeros((1, 1, 1, length, 1), jnp.int32)
    if segment_ids is not None:
        same = (segment_ids[:, :, None] == segment_ids[:, None, :])[:, None, None]
        start = jnp.argmax(same, axis=-1)[..., None]  # first token of i's document
    visible = same & (j <= i) & ((i - j < window) | (j - start < sinks))
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgij,bjhd->bihgd", weights, v.astype(dtype), precision="highest").reshape(q.shape)
    if segment_ids is not None:
        out = jnp.where((segment_ids != 0)[:, :, None, None], out, 0)
    return out.astype(q.dtype)

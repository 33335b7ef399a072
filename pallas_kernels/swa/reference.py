"""Sliding-window attention as the mask reads, dense; for tests and small sizes.

Axes: B batch, L tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, T slots of a ring cache.
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


def swa_decode(sink_slots, scale, q, k, v, keys, values, position, window, sinks) -> jax.Array:
    """See `pallas_kernels.swa_decode`. The cache is searched for each token of the past in turn."""
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    slot = jnp.arange(keys.shape[1])
    ring = keys.shape[1] - sink_slots
    past = position[:, None] - 1 - jnp.arange(ring)  # [B, W], the last W tokens
    sink = jnp.broadcast_to(jnp.arange(sink_slots), (q.shape[0], sink_slots))
    token = jnp.concatenate([jnp.where(past >= sink_slots, past, -1), jnp.where(sink < position[:, None], sink, -1)], 1)
    home = jnp.where(token < sink_slots, token, sink_slots + (token - sink_slots) % ring)  # -1 where there is none
    found = (token[:, :, None] >= 0) & (home[:, :, None] == slot)  # [B, T, T]
    visible = (token >= 0) & ((position[:, None] - token < window) | (token < sinks))

    def ordered(cache, own):
        """[B, T + 1, Hq, D]: what the cache holds of each token, then the token itself, for each query head."""
        cache = jnp.einsum("bts,bshd->bthd", found.astype(dtype), cache.astype(dtype), precision="highest")
        return jnp.repeat(
            jnp.concatenate([cache, own[:, None].astype(dtype)], axis=1), q.shape[1] // k.shape[1], axis=2
        )

    scores = jnp.einsum("bhd,bthd->bht", q.astype(dtype), ordered(keys, k), precision="highest") * scale
    visible = jnp.pad(visible, [(0, 0), (0, 1)], constant_values=True)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bht,bthd->bhd", weights, ordered(values, v), precision="highest").astype(q.dtype)

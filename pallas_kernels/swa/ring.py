"""The ring cache: which token each slot holds, what a new token sees of them, and both in plain JAX for any number.

Axes: B batch, L new tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, S sink slots, W window slots,
T = S + W slots, Y layers.

Token p lives in slot p while p < S, else in slot S + (p - S) % W, so that the cache holds the first S and the last W
tokens of each row, whatever its phase. Its slots are read as they lie, in any order.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dots


def held(position: jax.Array, slot: jax.Array, sink_slots: int, count: int) -> jax.Array:
    """Returns the tokens in those slots after `position` tokens, int32; -1 in an empty slot.

    Args:
      position: tokens so far; it and `slot` may have any shapes that broadcast, so that kernels can pass scalars.
      slot: numbers from 0 to T - 1.
      sink_slots: S.
      count: T.
    """
    last, ring = position - 1, count - sink_slots
    newest = sink_slots + jnp.maximum(last - sink_slots, 0) % ring  # slot of the last token
    token = last - newest + slot - jnp.where(slot > newest, ring, 0)
    return jnp.where(slot < position, jnp.where(slot < sink_slots, slot, token), -1)  # slots fill in order


def in_sight(position, slot, sink_slots: int, count: int, window, sinks) -> jax.Array:
    """Returns whether token `position` sees what those slots hold, bool; arguments as in `held`."""
    token = held(position, slot, sink_slots, count)
    return (token >= 0) & ((position - token < window) | (token < sinks))


def blocks_in_sight(size: int, sink_slots: int, count: int, position, window, sinks) -> jax.Array:
    """Returns for each row and block the last block up to it with a slot in sight, int32 [B, N]; 0 where none is.

    Args:
      size: slots of each of the N blocks; the last one has fewer where it does not divide T.
      sink_slots: S.
      count: T.
      position: int32 [B], tokens so far: what the next one does not see, none after it does.
      window, sinks: as in `in_sight`.
    """
    n = np.arange(-(-count // size), dtype=np.int32)
    slot = n[:, None] * size + np.arange(size, dtype=np.int32)  # [N, size], from T on there is none
    seen = in_sight(position[:, None, None], slot, sink_slots, count, window, sinks) & (slot < count)
    return jnp.max(jnp.where(seen.any(-1)[:, None] & (n <= n[:, None]), n, 0), axis=-1)


def attend(q, k, v, keys, values, position, lengths, *, sink_slots: int, window, sinks, scale) -> jax.Array:
    """Softmax attention of L new tokens to the cache of their past and to each other.

    Args:
      q: [B, L, Hq, D]; k, v: [B, L, Hkv, D] in q's dtype.
      keys, values: [B, T, Hkv, D] in q's dtype, before the tokens are written.
      position: int32 [B], tokens before these; lengths: int32 [B], how many of these are real.
      sink_slots: S.
      window, sinks: int32 scalars, at most W and S. A token sees what is less than `window` back
        and the first `sinks`.
      scale: multiplies the scores.

    Returns:
      [B, L, Hq, D] in q's dtype. Rows of padding are arbitrary but finite.
    """
    batch, length, heads, dim = q.shape
    kv_heads, count = keys.shape[2], keys.shape[1]
    offsets = jnp.arange(length, dtype=jnp.int32)
    q_pos = position[:, None] + offsets  # [B, L]
    past = held(position[:, None], jnp.arange(count, dtype=jnp.int32), sink_slots, count)
    token = jnp.concatenate([past, jnp.where(offsets < lengths[:, None], q_pos, -1)], axis=1)[:, None]
    distance = q_pos[:, :, None] - token
    visible = (token >= 0) & (distance >= 0) & ((distance < window) | (token < sinks))
    hidden = jnp.where(visible, 0.0, -1e30)[:, None, None]  # [B, 1, 1, L, T + L]

    # One matrix a key head, rows (G, L): with its axes as they come it takes XLA two to three times as long on a CPU.
    query = q.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    # Turned before they are joined, or XLA makes the turn part of the product, which bfloat16 units then cannot do.
    pairs = ([jnp.swapaxes(x, 1, 2) for x in pair] for pair in ((keys, k), (values, v)))
    keys, values = (jnp.concatenate(pair, axis=2) for pair in pairs)
    scores = dots.einsum("bhrd,bhtd->bhrt", query, keys) * scale
    grouped = scores.reshape(batch, kv_heads, -1, length, keys.shape[2]) + hidden
    weights = jnp.exp(grouped - jax.lax.stop_gradient(grouped.max(-1, keepdims=True)))
    out = dots.einsum("bhrt,bhtd->bhrd", weights.astype(v.dtype).reshape(scores.shape), values)
    out = out.reshape(*weights.shape[:-1], dim) / weights.sum(-1, keepdims=True)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape).astype(q.dtype)


def write(cache: jax.Array, new: jax.Array, position: jax.Array, lengths: jax.Array, sink_slots: int) -> jax.Array:
    """Returns the caches of all layers with their new tokens in their slots.

    Args:
      cache: [Y, B, T, Hkv, D], keys or values.
      new: [Y, B, L, Hkv, D], of which `lengths` [B] are real; `position` [B] tokens came before.
      sink_slots: S.
    """
    ring = cache.shape[2] - sink_slots
    offsets = jnp.arange(new.shape[2], dtype=jnp.int32)
    p = position[:, None] + offsets  # [B, L]
    keep = (offsets < lengths[:, None]) & ((p >= (position + lengths)[:, None] - ring) | (p < sink_slots))
    slot = jnp.where(p < sink_slots, p, sink_slots + (p - sink_slots) % ring)
    slot = jnp.where(keep, slot, sink_slots + ring)  # out of bounds: dropped
    rows = jnp.arange(slot.shape[0])[:, None]
    return cache.at[:, rows, slot].set(new.astype(cache.dtype), mode="drop")

"""The ring cache: which token each slot holds, what a new token sees of them, and both in plain JAX for any number.

Axes: B batch, L new tokens, Hq query heads, Hkv key heads, G = Hq / Hkv, D head dim, S sink slots, W window slots,
T = S + W slots, Y layers.

Token p lives in slot p while p < S, else in slot S + (p - S) % W, so that the cache holds the first S and the last W
tokens of each row, whatever its phase. It is read where it lies: nothing here copies it or appends to it.
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
    count = keys.shape[1]
    offsets = jnp.arange(length, dtype=jnp.int32)
    q_pos = position[:, None] + offsets  # [B, L]
    past = held(position[:, None], jnp.arange(count, dtype=jnp.int32), sink_slots, count)
    new = jnp.where(offsets < lengths[:, None], q_pos, -1)
    grouped = q.reshape(batch, length, k.shape[2], -1, dim)

    def scores(keys, token):
        """[B, Hkv, G, L, X] of X keys, which hold those tokens [B, X]; -1 is none."""
        distance = q_pos[:, :, None] - token[:, None]
        visible = (token >= 0)[:, None] & (distance >= 0) & ((distance < window) | (token < sinks)[:, None])
        found = dots.einsum("blhgd,bkhd->bhglk", grouped, keys) * scale
        return jnp.where(visible[:, None, None], found, -1e30)

    # Cache and new tokens share one maximum and one sum, but no array.
    cached, own = scores(keys, past), scores(k, new)
    top = jax.lax.stop_gradient(jnp.maximum(cached.max(-1, keepdims=True), own.max(-1, keepdims=True)))
    cached, own = jnp.exp(cached - top), jnp.exp(own - top)
    out = sum(dots.einsum("bhglk,bkhd->blhgd", w.astype(v.dtype), x) for w, x in ((cached, values), (own, v)))
    total = jnp.moveaxis(cached.sum(-1) + own.sum(-1), 3, 1)[..., None]  # [B, L, Hkv, G, 1]
    return (out / total).reshape(batch, length, heads, dim).astype(q.dtype)


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

"""Which token each slot of a ring cache holds, and which slots a new token sees.

Axes: S sink slots, W window slots, T = S + W slots. Token p lives in slot p while p < S, else in slot S + (p - S) % W.
Positions and slots are int32 of any shapes that broadcast, so that kernels can call this with scalars.
"""

import jax
import jax.numpy as jnp


def held(position: jax.Array, slot: jax.Array, sink_slots: int, count: int) -> jax.Array:
    """Returns the tokens in those slots after `position` tokens, int32; -1 in an empty slot.

    Args:
      position: tokens so far.
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

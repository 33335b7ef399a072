"""Where the documents of packed rows begin and end."""

import jax
import jax.numpy as jnp


def spans(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns int32 [B, L] each: of every token's document the first token, and the one after the last.

    Args:
      segment_ids: int [B, L]; a document is a run of equal numbers.
    """
    length = segment_ids.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)
    new = segment_ids[:, 1:] != segment_ids[:, :-1]
    start = jax.lax.cummax(jnp.where(jnp.pad(new, [(0, 0), (1, 0)]), index, 0), axis=1)
    end = jax.lax.cummin(jnp.where(jnp.pad(new, [(0, 0), (0, 1)]), index + 1, length), axis=1, reverse=True)
    return start, end

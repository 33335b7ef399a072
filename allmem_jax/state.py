"""The decode state: everything a converted model knows of its past, a few MB whatever the length of that past.

It is a pytree of arrays, an argument and a result of every call, so it can be saved, copied and forked. Axes:

    Y layers    B batch    S sink slots    W window slots    Hkv key heads    D dimension of a head
    K convolution taps    F channels that pass through the convolutions (3 n_mem d_mem)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

import pallas_kernels
from allmem_jax import config as config_lib


class DecodeState(NamedTuple):
    """What decoding carries from token to token.

    Attributes:
      position: int32 [B], tokens seen by each row.
      keys, values: [Y, B, S + W, Hkv, D], the ring cache (see `functional.attend_cached`).
      conv: [Y, B, K - 1, F], the last inputs of the memory's convolutions; None without a memory.
      memory: `MemoryState` with a leading Y; None without a memory.
    """

    position: jax.Array
    keys: jax.Array
    values: jax.Array
    conv: jax.Array | None
    memory: pallas_kernels.MemoryState | None


def init_state(config: config_lib.ModelConfig, batch: int) -> DecodeState:
    """The state before the first token.

    The fast weights are zeros here: a row at position 0 takes the learned initial weights from the parameters.

    Args:
      config: its window and sinks size the cache, its chunk plays no part. A "full" mixer has no constant state:
        give it a "swa" mixer whose window covers the longest row instead.
      batch: number of rows.
    """
    if config.mixer == "full":
        raise ValueError("mixer='full' has no constant-size state; use mixer='swa' with window >= the longest row")
    dtype = jnp.dtype(config.dtype)
    layers = config.n_layers
    cache = (layers, batch, config.sinks + config.window, config.n_kv_heads, config.head_dim)
    conv = memory = None
    if config.mixer == "allmem":
        heads, dim, hidden = config.memory_heads, config.d_mem, config.memory_hidden
        conv = jnp.zeros((layers, batch, config.conv_kernel - 1, 3 * heads * dim), dtype)
        up = jnp.zeros((heads, hidden, dim), jnp.float32)
        empty = pallas_kernels.FastWeights(gate=up, up=up, down=jnp.zeros((heads, dim, hidden), jnp.float32))
        one = pallas_kernels.init_memory_state(empty, batch)
        memory = jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), one)
    return DecodeState(jnp.zeros((batch,), jnp.int32), jnp.zeros(cache, dtype), jnp.zeros(cache, dtype), conv, memory)


def state_bytes(config: config_lib.ModelConfig, batch: int = 1) -> int:
    """Bytes of the decode state, without allocating it."""
    shapes = jax.eval_shape(lambda: init_state(config, batch))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

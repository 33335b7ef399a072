"""The decode state: everything a converted model knows of its past, a few MB whatever the length of that past.

It is a pytree of arrays, an argument and a result of every call, so it can be saved, copied and forked. Axes:

    Y layers    B batch    S sink slots    W window slots    Hkv key heads    D dimension of a head
    K convolution taps    F channels that pass through the convolutions    N memory heads
    Dk, Dv rows and columns of a linear memory's state
"""

import dataclasses
import os
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.flax

import pallas_kernels
from allmem_jax.model import config as config_lib
from allmem_jax.model import functional
from allmem_jax.storage import files, stores


@flax.struct.dataclass
class DecodeState:
    """What decoding carries from token to token.

    Attributes:
      position: int32 [B], tokens seen by each row.
      keys, values: [Y, B, S + W, Hkv, D], the cache (see `pallas_kernels.swa.ring`).
      conv: [Y, B, K - 1, F], the last inputs of the memory's convolutions; None without a memory.
      memory: `MemoryState` with a leading Y; float32 [Y, B, N, Dk, Dv] for the mixers "mamba2" and "delta"; None
        without a memory.
      waiting: [Y, B, R, F'], the last R tokens as they will be written to a memory with a delay (see
        `functional.delayed`); None without one.
      sinks: S, static: the arrays alone do not tell a sink slot from one of the window.

    What is in bfloat16 may also be `functional.bits`, uint16: on a CPU decoding goes on from such a state, as XLA there
    widens and rounds a whole array in bfloat16 to write a token to it. Whatever takes a state takes both.
    """

    position: jax.Array
    keys: jax.Array
    values: jax.Array
    conv: jax.Array | None
    memory: pallas_kernels.MemoryState | jax.Array | None
    waiting: jax.Array | None
    sinks: int = flax.struct.field(pytree_node=False)


def init_state(config: config_lib.ModelConfig, batch: int) -> DecodeState:
    """The state before the first token.

    The fast weights are zeros here: a row at position 0 takes the learned initial weights from the parameters.

    Args:
      config: its window and sinks size the cache; its chunk plays no part without a delay. A "full" mixer has no
        constant state: give it a "swa" mixer whose window covers the longest row instead.
      batch: number of rows.
    """
    if config.mixer == "full":
        raise ValueError("mixer='full' has no constant-size state; use mixer='swa' with window >= the longest row")
    dtype = jnp.dtype(config.dtype)
    layers = config.n_layers
    cache = (layers, batch, config.sinks + config.window, config.n_kv_heads, config.head_dim)
    conv = memory = waiting = None
    if config.mixer in config_lib.MEMORY_MIXERS:
        conv = jnp.zeros((layers, batch, config.conv_kernel - 1, config.conv_channels), dtype)
    if config.mixer == "allmem":
        heads, dim, hidden = config.memory_heads, config.d_mem, config.memory_hidden
        up = jnp.zeros((heads, hidden, dim), jnp.float32)
        empty = pallas_kernels.FastWeights(gate=up, up=up, down=jnp.zeros((heads, dim, hidden), jnp.float32))
        one = pallas_kernels.init_memory_state(empty, batch)
        memory = jax.tree.map(lambda leaf: jnp.zeros((layers, *leaf.shape), leaf.dtype), one)
    elif config.mixer in config_lib.MEMORY_MIXERS:
        memory = jnp.zeros((layers, batch, *config.linear_state_shape), jnp.float32)
    if config.lag:
        waiting = jnp.zeros((layers, batch, config.lag, config.waiting_channels), dtype)
    position = jnp.zeros((batch,), jnp.int32)
    keys, values = jnp.zeros(cache, dtype), jnp.zeros(cache, dtype)
    return DecodeState(position, keys, values, conv, memory, waiting, config.sinks)


def check_state(config: config_lib.ModelConfig, batch: int, state: DecodeState) -> None:
    """ValueError where a state is not one of this config and this many rows; shapes alone are looked at."""
    window = state.keys.shape[2] - state.sinks if state.keys.ndim == 5 else None
    for field, there, here in (("sinks", state.sinks, config.sinks), ("window", window, config.window)):
        if there != here:
            raise ValueError(
                f"the state was made with {field}={there} and the config has {field}={here}: use the config that the "
                "state was made with, or read the text anew"
            )
    like = jax.eval_shape(lambda: init_state(config, batch))
    what = f"mixer={config.mixer!r} and {batch} rows of tokens"
    check_shapes(state, like, what, "use the config that the state was made with, or read the text anew")


def check_shapes(state: Any, like: Any, what: str, fix: str) -> None:
    """ValueError where two pytrees differ in a leaf's path or shape; `what` needs those of `like`."""
    found, wanted = _named(state), _named(like)
    for name in sorted(found.keys() | wanted.keys()):
        here, there = (leaves[name].shape if name in leaves else None for leaves in (found, wanted))
        if here != there:
            raise ValueError(f"the state's {name} is {here or 'missing'}, where {what} need {there or 'none'}: {fix}")


def state_bytes(config: config_lib.ModelConfig, batch: int = 1) -> int:
    """Bytes of the decode state, without allocating it."""
    shapes = jax.eval_shape(lambda: init_state(config, batch))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))


def save_state(path: str | os.PathLike[str], config: config_lib.ModelConfig, state: DecodeState) -> int:
    """Writes a state as one safetensors file, whole or not at all: read a book once, ask it later.

    Args:
      path: the file, or its URL.
      config: of the model that made the state; it goes into the file.
      state: any number of rows, bits or numbers.

    Returns:
      The bytes of the file.
    """
    content = safetensors.flax.save(_named(functional.numbers(state)), metadata={"config": config.to_json()})
    files.write(path, content)
    return len(content)


def load_state(path: str | os.PathLike[str], config: config_lib.ModelConfig) -> DecodeState:
    """Reads a state that `save_state` wrote.

    Raises:
      ValueError: the file is damaged, or its model had another config.
    """
    try:
        with safetensors.safe_open(stores.local(path), framework="flax") as file:
            saved = config_lib.ModelConfig.from_json((file.metadata() or {}).get("config", ""))
            flat = {name: file.get_tensor(name) for name in file.keys()}
    except (safetensors.SafetensorError, ValueError) as error:
        raise ValueError(f"{path} is not a saved state: {error}") from None
    for field in dataclasses.fields(config):
        there, here = getattr(saved, field.name), getattr(config, field.name)
        if there != here and field.name != "eos_tokens":
            raise ValueError(f"{path} is the state of another model: {field.name} is {there} there and {here} here")
    batch = len(flat.get("position", ()))
    like = jax.eval_shape(lambda: init_state(config, batch))
    expected = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in _named(like).items()}
    found = {name: (leaf.shape, np.dtype(leaf.dtype)) for name, leaf in flat.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise ValueError(f"{path} is not a saved state: {', '.join(wrong)} missing, unknown or of another shape")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[name] for name in _named(like)])


def _named(state: Any) -> dict[str, jax.Array]:
    """Leaves by their path, e.g. "memory.weights.gate", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}

"""A start for the memory of a converted model: an induction head made of the layer's own attention.

A random memory must learn at once what to store, under which key, and how to use what it reads. The layer's attention
knows all three. Its key projection makes the memory's keys and queries, and a key stands one token late, so that a read
returns what followed tokens like this one; its values are stored, and its output projection takes them back. Then, on a
little text: the direction that all inputs of a layer share is taken out of keys and queries, or every write would land
in one place; each layer's learning rate is set so that what was written moves the read-out by the same share, since one
rate may be a thousandth of the weights in one layer and all of them in another; and its alpha so that the memory adds
the same share of what the attention gives, which grows a hundredfold from the first layer to the last.

Axes:

    Y layers    T tokens    d model    Hq, Hkv attention heads    D dimension of a head
    N memory heads    M dimension of a memory head    G key heads behind one memory head
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from allmem_jax import config as config_lib
from allmem_jax import functional, model
from allmem_jax import layers as layers_lib

MOVED = 0.3  # share of the read-out that what was written moves, in every layer
WARM_UP = 256  # tokens before which little was written
LENGTH = 1024  # tokens of a text that are enough
RATES = (1e-4, 1.0)  # between which a layer's learning rate is looked for
HALVINGS = 8  # of that interval, on a logarithmic scale


def from_attention(
    config: config_lib.ModelConfig,
    params: model.Params,
    tokens: Sequence[int] | np.ndarray,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> model.Params:
    """A memory, {"layers": {"memory": ...}}, that starts from the attention of each layer.

    Args:
      config: of the converted model; its mixer is "allmem". Its `alpha_init` is here the size of what the memory adds,
        as a share of the attention's output: that of the root mean squares beyond `WARM_UP`, in every layer.
      params: the backbone.
      tokens: ids [T] of a text, at least twice `WARM_UP`; `LENGTH` are enough.
      seed: of the fast weights, and of everything that does not come from the attention.
      progress: called with 1 after each layer.

    Raises:
      ValueError: another mixer, or a text that is too short.
    """
    if config.mixer != "allmem":
        raise ValueError(f"mixer={config.mixer!r} has no start from attention; 'allmem' has")
    if len(tokens) < 2 * WARM_UP:
        raise ValueError(f"the text has {len(tokens)} tokens; a start from attention needs {2 * WARM_UP} at least")
    fresh = model.init_memory(config, seed)["layers"]["memory"]
    inputs, sizes = layer_inputs(config, params, jnp.asarray(tokens, jnp.int32)[None])  # [Y, T, d], [Y]
    attention = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params["layers"]["attention"])
    layers = []
    for layer in range(config.n_layers):
        own, heads = jax.tree.map(lambda leaf: leaf[layer], (fresh, attention))  # noqa: B023 (used at once)
        started = induction_head(config, own, heads, np.asarray(inputs[layer], np.float32))
        layers.append(scaled(config, calibrate(config, started, inputs[layer]), inputs[layer], sizes[layer]))
        if progress is not None:
            progress(1)
    return {"layers": {"memory": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


@functools.partial(jax.jit, static_argnames="config")
def layer_inputs(
    config: config_lib.ModelConfig, params: model.Params, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the mixer of every layer gets of tokens [1, T] under windowed attention, [Y, T, d].

    And the root mean square of what the attention makes of it beyond `WARM_UP`, float32 [Y].
    """
    lm = model.AllMemLM(config.replace(mixer="swa"))
    wanted = lambda module, _: module.name in ("input_norm", "attention")  # noqa: E731
    _, found = lm.apply({"params": params}, tokens, return_hidden=True, capture_intermediates=wanted,
                        mutable=["intermediates"])  # fmt: skip
    found = found["intermediates"]["layers"]
    (inputs,), (out, *_) = (jax.tree.leaves(found[name]["__call__"]) for name in ("input_norm", "attention"))
    return inputs[:, 0], _size(out)


def _size(out: jax.Array) -> jax.Array:
    """Root mean square beyond `WARM_UP` of [..., 1, T, d], float32 [...]."""
    return jnp.sqrt(jnp.mean(jnp.square(out[..., WARM_UP:, :].astype(jnp.float32)), axis=(-3, -2, -1)))


@functools.partial(jax.jit, static_argnames="config")
def scaled(config: config_lib.ModelConfig, memory: Any, inputs: jax.Array, size: jax.Array) -> Any:
    """One layer's memory with the alpha at which it adds `config.alpha_init` of an attention output of that size."""
    full = memory | {"alpha": jnp.ones_like(memory["alpha"])}
    shared = layers_lib.Shared(rope=(inputs, inputs), local_rope=(inputs, inputs), window=None, sinks=0)  # no rope here
    out, _ = layers_lib.Memory(config).apply({"params": full}, inputs[None], None, shared)
    return memory | {"alpha": full["alpha"] * (config.alpha_init * size / _size(out))}


def induction_head(config: config_lib.ModelConfig, memory: Any, attention: Any, inputs: np.ndarray) -> Any:
    """One layer's memory with the projections and convolutions of an induction head.

    Memory head n stands for the n-th share of the query heads, and for the key heads behind them. Where their channels
    are more than a memory head has, keys are turned to the leading directions of what they are on `inputs`, and values
    to those that matter most for what the output projection makes of them.

    Args:
      config: of the model.
      memory: this layer's parameters under `memory`, of a fresh one.
      attention: those under `attention`, float32.
      inputs: [T, d], of this layer.
    """
    mean = inputs.mean(axis=0)
    mean /= np.linalg.norm(mean)
    covariance = inputs.T @ inputs / len(inputs)
    heads = [_head(config, attention, queries, mean, covariance) for queries in _shares(config)]
    keys, values = (np.concatenate([head[part] for head in heads], axis=1) for part in (0, 1))
    outputs = np.concatenate([head[2] for head in heads])
    here = np.zeros(memory["q_conv"]["kernel"].shape, np.float32)
    before = here.copy()
    here[-1], before[-2 if len(here) > 1 else -1] = 1, 1
    new = {"q_proj": keys, "k_proj": keys, "v_proj": values, "out_proj": outputs}
    new |= {"q_conv": here, "k_conv": before, "v_conv": here}
    return memory | {name: {"kernel": jnp.asarray(kernel)} for name, kernel in new.items()}


def _shares(config: config_lib.ModelConfig) -> Sequence[np.ndarray]:
    """The query heads of each memory head; where there are more memory heads, some share one."""
    if config.memory_heads <= config.n_heads:
        return np.array_split(np.arange(config.n_heads), config.memory_heads)
    return [np.array([head * config.n_heads // config.memory_heads]) for head in range(config.memory_heads)]


def _head(
    config: config_lib.ModelConfig, attention: Any, queries: np.ndarray, mean: np.ndarray, covariance: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Kernels of keys [d, M], values [d, M] and outputs [M, d] of the memory head behind some query heads."""
    group = config.n_heads // config.n_kv_heads
    behind = np.unique(queries // group)  # G key heads
    kernel = lambda name: attention[f"{name}_proj"]["kernel"]  # noqa: E731
    split = lambda x: x.reshape(config.d_model, config.n_kv_heads, config.head_dim)[:, behind]  # noqa: E731
    key, value = split(kernel("k")), split(kernel("v"))  # [d, G, D]
    if config.qk_norm:
        key = key * (config.norm_offset + attention["k_norm"]["scale"])
    key, value = (x.reshape(config.d_model, -1) for x in (key, value))  # [d, G D]
    key = key - np.outer(mean, mean @ key)
    out = kernel("o").reshape(config.n_heads, config.head_dim, config.d_model)
    out = np.concatenate([out[queries[queries // group == head]].sum(axis=0) for head in behind])  # [G D, d]
    size, width = config.d_mem, key.shape[1]
    if width > size:
        directions = np.linalg.eigh(key.T @ covariance @ key)[1][:, ::-1][:, :size]  # [G D, M]
        key = key @ directions
        root = np.linalg.cholesky(value.T @ covariance @ value + 1e-6 * np.eye(width) * np.trace(covariance) / width)
        best = np.linalg.svd(root.T @ out, full_matrices=False)[2][:size]  # [M, d]
        value, out = value @ (out @ best.T), best
    elif width < size:
        room = size - width
        key, value = (np.pad(x, ((0, 0), (0, room))) for x in (key, value))
        out = np.pad(out, ((0, room), (0, 0)))
    return tuple(x.astype(np.float32) for x in (key, value, out))  # type: ignore[return-value]


def calibrate(config: config_lib.ModelConfig, memory: Any, inputs: jax.Array) -> Any:
    """One layer's memory with the bias of its learning rates at which what was written moves the read-out by MOVED."""
    rate = _rate(config, memory, inputs)
    return memory | {"lr_proj": memory["lr_proj"] | {"bias": jnp.full_like(memory["lr_proj"]["bias"], rate)}}


@functools.partial(jax.jit, static_argnames="config")
def _rate(config: config_lib.ModelConfig, memory: Any, inputs: jax.Array) -> jax.Array:
    """softplus^-1 of the rate at which |f(W, q) - f(W_init, q)| / |f(W_init, q)| is MOVED after WARM_UP tokens."""
    shape = (1, len(inputs), config.memory_heads, config.d_mem)
    norm = 1.0 if config.qk_scale == "l2" else config.d_mem**0.5

    def part(name: str) -> jax.Array:
        projected = functional.linear(inputs[None], memory[f"{name}_proj"]["kernel"])
        return functional.causal_conv(projected, memory[f"{name}_conv"]["kernel"], None).reshape(shape)

    def unit(name: str) -> jax.Array:
        x = functional.rms_norm(part(name), memory[f"{name}_norm"]["scale"], config.norm_eps)
        return functional.l2_normalise(x, norm)

    q, k, v = unit("q"), unit("k"), part("v")
    init = pallas_kernels.FastWeights(memory["fast_gate"], memory["fast_up"], memory["fast_down"])
    momentum = jnp.full(shape[:3], config.momentum_init, jnp.float32)

    def read(rate: jax.Array | float, read_out: str) -> jax.Array:
        rates = jnp.full((*shape[:3], 3), rate, jnp.float32)
        out, _ = pallas_kernels.ttt_memory(q, k, v, rates, momentum, init, chunk_size=config.chunk, read_out=read_out)
        return jnp.linalg.norm(out[:, WARM_UP:].astype(jnp.float32), axis=-1)

    blank = read(0.0, "full")

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = jnp.sqrt(low * high)
        more = (read(middle, "difference") / blank).mean() < MOVED
        return jnp.where(more, middle, low), jnp.where(more, high, middle)

    low, high = jax.lax.fori_loop(0, HALVINGS, halve, (jnp.float32(RATES[0]), jnp.float32(RATES[1])))
    return jnp.log(jnp.expm1(jnp.sqrt(low * high)))

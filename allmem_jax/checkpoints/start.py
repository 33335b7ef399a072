"""A start for the memory of a converted model: an induction head made of the layer's own attention.

A random memory must learn at once what to store, under which key, and how to use what it reads. The layer's attention
knows all three. Its key projection makes the memory's keys and queries, and a key stands one token late, so that a read
returns what followed tokens like this one; its values are stored, and its output projection takes them back. Then, on a
little text: the direction that all inputs of a layer share is taken out of keys and queries, or every write would land
in one place; each layer's learning rate is set so that what was written moves the read-out by the same share, since one
rate may be a thousandth of the weights in one layer and all of them in another; each head's floor is the median size
of what it then reads, so that a read counts that finds more; and alpha is such that the memory adds the same share of
what the attention gives, which grows a hundredfold from the first layer to the last.

The baselines start alike, so that comparisons are of memories and not of starts. In place of the rates, their keys and
values are brought to a size that suits the silu behind them, and their gates to one that is open for all tokens.

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
from allmem_jax.model import config as config_lib
from allmem_jax.model import decoder, functional
from allmem_jax.model import layers as layers_lib
from allmem_jax.model import lm as lm_lib
from pallas_kernels import norms

MOVED = 0.3  # share of the read-out that what was written moves, in every layer
WARM_UP = 256  # tokens before which little was written
LENGTH = 1024  # tokens of a text that are enough
CHUNK = 64  # largest that rates are fitted at: the text must have many, or little of it is read
RATES = (1e-4, 1.0)  # between which a layer's learning rate is looked for
HALVINGS = 8  # of that interval, on a logarithmic scale
NAMES = {
    "allmem": ("q", "k", "v"),
    "delta": ("q", "k", "v"),
    "mamba2": ("c", "b", "x"),
}  # of a memory's queries, keys and values
KEY_SIZE = 1.0  # root mean square of a baseline's keys before their silu, which sharpens what is not small
VALUE_SIZE = 0.1  # and of its values, which silu leaves as they are, but for a factor, where they are small
REPLACED = 0.2  # share of what its key reads that a token of "delta" replaces; like tokens are thus averaged
FORGOTTEN = 1e-4  # share of a baseline's state that a token takes away


def from_attention(
    config: config_lib.ModelConfig,
    params: lm_lib.Params,
    tokens: Sequence[int] | np.ndarray,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> lm_lib.Params:
    """A memory, {"layers": {"memory": ...}}, that starts from the attention of each layer.

    Args:
      config: of the converted model, its mixer one with a memory. Its `alpha_init` is here the size of what the memory
        adds, as a share of the attention's output: that of the root mean squares beyond `WARM_UP`, in every layer.
      params: the backbone.
      tokens: ids [T] of a text, at least twice `WARM_UP`; `LENGTH` are enough.
      seed: of the fast weights, and of everything that does not come from the attention.
      progress: called with 1 after each layer.

    Raises:
      ValueError: a mixer without a memory, or a text that is too short.
    """
    if config.mixer not in decoder.MEMORIES:
        raise ValueError(f"mixer={config.mixer!r} has no memory that could start from attention")
    if len(tokens) < 2 * WARM_UP:
        raise ValueError(f"the text has {len(tokens)} tokens; a start from attention needs {2 * WARM_UP} at least")
    # A control that writes nothing starts as what it is held against.
    config = config.replace(write=True, chunk=min(config.chunk, CHUNK))
    fresh = lm_lib.init_memory(config, seed)["layers"]["memory"]
    inputs, sizes = layer_inputs(config, params, jnp.asarray(tokens, jnp.int32)[None])  # [Y, T, d], [Y]
    attention = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params["layers"]["attention"])
    fit = calibrate if config.mixer == "allmem" else open_gates
    layers = []
    for layer in range(config.n_layers):
        own, heads = jax.tree.map(lambda leaf: leaf[layer], (fresh, attention))  # noqa: B023 (used at once)
        started = induction_head(config, own, heads, np.asarray(inputs[layer], np.float32))
        layers.append(scaled(config, fit(config, started, inputs[layer]), inputs[layer], sizes[layer]))
        if progress is not None:
            progress(1)
    return {"layers": {"memory": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)}}


@functools.partial(jax.jit, static_argnames="config")
def layer_inputs(
    config: config_lib.ModelConfig, params: lm_lib.Params, tokens: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """What the mixer of every layer gets of tokens [1, T] under windowed attention, [Y, T, d].

    And the root mean square of what the attention makes of it beyond `WARM_UP`, float32 [Y].
    """
    lm = lm_lib.AllMemLM(config.replace(mixer="swa"))
    wanted = lambda module, _: module.name in ("input_norm", "attention")  # noqa: E731
    _, found = lm.apply(
        {"params": params}, tokens, return_hidden=True, capture_intermediates=wanted, mutable=["intermediates"]
    )
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
    out, _ = decoder.MEMORIES[config.mixer](config).apply({"params": full}, inputs[None], None, shared)
    found = jnp.maximum(_size(out), np.finfo(np.float32).tiny)
    return memory | {"alpha": full["alpha"] * (config.alpha_init * size / found)}


def induction_head(config: config_lib.ModelConfig, memory: Any, attention: Any, inputs: np.ndarray) -> Any:
    """One layer's memory with the projections and convolutions of an induction head.

    Memory head n stands for the n-th share of the query heads, and for the key heads behind them; the one key of all
    heads of "mamba2" stands for all key heads. Where their channels are more than a memory head has, keys are turned to
    the leading directions of what they are on `inputs`, and values to those that matter most for what the output
    projection makes of them.

    Args:
      config: of the model.
      memory: this layer's parameters under `memory`, of a fresh one.
      attention: those under `attention`, float32.
      inputs: [T, d], of this layer.
    """
    mean = inputs.mean(axis=0)
    mean /= np.linalg.norm(mean)
    covariance = inputs.T @ inputs / len(inputs)
    group = config.n_heads // config.n_kv_heads
    size = config.delta_dim if config.mixer == "delta" else config.d_mem
    shares = _shares(config)
    one = config.mixer == "mamba2"  # key for all heads
    behind = [np.unique(queries // group) for queries in ([np.arange(config.n_heads)] if one else shares)]
    width = config.mamba_state if one else size
    keys = np.concatenate([_key(config, attention, some, mean, covariance, width) for some in behind], axis=1)
    heads = [_value(config, attention, queries, covariance, size) for queries in shares]
    values = np.concatenate([value for value, _ in heads], axis=1)
    outputs = np.concatenate([out for _, out in heads])
    query, key, value = NAMES[config.mixer]
    new = {f"{query}_proj": keys, f"{key}_proj": keys, f"{value}_proj": values, "out_proj": outputs}
    for name, back in ((query, 0), (key, 1), (value, 0)):
        taps = np.zeros(memory[f"{name}_conv"]["kernel"].shape, np.float32)
        taps[-1 - min(back, len(taps) - 1)] = 1
        new[f"{name}_conv"] = taps
    return memory | {name: {"kernel": jnp.asarray(kernel, jnp.float32)} for name, kernel in new.items()}


def _shares(config: config_lib.ModelConfig) -> Sequence[np.ndarray]:
    """The query heads of each memory head; where there are more memory heads, some share one."""
    if config.memory_heads <= config.n_heads:
        return np.array_split(np.arange(config.n_heads), config.memory_heads)
    return [np.array([head * config.n_heads // config.memory_heads]) for head in range(config.memory_heads)]


def _key(
    config: config_lib.ModelConfig,
    attention: Any,
    behind: np.ndarray,
    mean: np.ndarray,
    covariance: np.ndarray,
    size: int,
) -> np.ndarray:
    """Kernel [d, size] of the keys that some key heads [G] make, without the inputs' common direction."""
    key = attention["k_proj"]["kernel"].reshape(config.d_model, config.n_kv_heads, config.head_dim)[:, behind]
    if config.qk_norm:
        key = key * (config.norm_offset + attention["k_norm"]["scale"])
    key = key.reshape(config.d_model, -1)
    key = key - np.outer(mean, mean @ key)
    if key.shape[1] > size:
        return key @ np.linalg.eigh(key.T @ covariance @ key)[1][:, ::-1][:, :size]
    return np.pad(key, ((0, 0), (0, size - key.shape[1])))


def _value(
    config: config_lib.ModelConfig, attention: Any, queries: np.ndarray, covariance: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Kernels of values [d, size] and outputs [size, d] of the memory head behind some query heads."""
    group = config.n_heads // config.n_kv_heads
    behind = np.unique(queries // group)  # G key heads
    value = attention["v_proj"]["kernel"].reshape(config.d_model, config.n_kv_heads, config.head_dim)[:, behind]
    value = value.reshape(config.d_model, -1)  # [d, G D]
    out = attention["o_proj"]["kernel"].reshape(config.n_heads, config.head_dim, config.d_model)
    out = np.concatenate([out[queries[queries // group == head]].sum(axis=0) for head in behind])  # [G D, d]
    width = value.shape[1]
    if width > size:
        root = np.linalg.cholesky(value.T @ covariance @ value + 1e-6 * np.eye(width) * np.trace(covariance) / width)
        best = np.linalg.svd(root.T @ out, full_matrices=False)[2][:size]  # [size, d]
        return value @ (out @ best.T), best
    room = size - width
    return np.pad(value, ((0, 0), (0, room))), np.pad(out, ((0, room), (0, 0)))


def open_gates(config: config_lib.ModelConfig, memory: Any, inputs: jax.Array) -> Any:
    """One layer's memory of a baseline that writes all tokens alike, forgets little and lets through what it reads.

    Its gates have no biases: they start as projections of the direction that all inputs share, which is as steady.

    Args:
      config: of the model.
      memory: what `induction_head` gave.
      inputs: [T, d], of this layer.
    """
    inputs = inputs.astype(jnp.float32)
    mean = inputs.mean(axis=0)
    heads = jnp.ones(config.memory_heads, jnp.float32)
    sizes = zip(NAMES[config.mixer], (KEY_SIZE, KEY_SIZE, VALUE_SIZE), strict=True)
    step = "decay_proj" if config.mixer == "delta" else "dt_proj"

    def kernel(name: str) -> jax.Array:
        return memory[f"{name}_proj"]["kernel"]

    def constant(name: str, value: float) -> dict[str, jax.Array]:  # kernel that gives `value` where an input is `mean`
        return {"kernel": jnp.broadcast_to((mean * value / jnp.sum(mean**2))[:, None], kernel(name).shape)}

    new: dict[str, Any] = {}
    for name, size in sizes:
        rms = jnp.sqrt(jnp.mean(jnp.square(functional.linear(inputs, kernel(name)))))
        new[f"{name}_proj"] = {"kernel": kernel(name) * size / rms}
    new["z_proj"] = constant("z", 1.0)
    new[step] = {"kernel": 0 * memory[step]["kernel"], "bias": heads * jnp.log(jnp.expm1(1.0))}  # a step of 1
    new["A_log"] = heads * jnp.log(FORGOTTEN)
    if config.mixer == "delta":
        new["beta_proj"] = constant("beta", float(np.log(REPLACED / (1 - REPLACED))))
    else:
        new["D"] = 0 * heads  # a token's own value is no memory
    return memory | new


def calibrate(config: config_lib.ModelConfig, memory: Any, inputs: jax.Array) -> Any:
    """One layer's memory with the bias of its learning rates at which what was written moves the read-out by MOVED.

    And with the floors of its norm at the median size of what its heads then read.
    """
    rate, found = _rate(config, memory, inputs)
    new = {"lr_proj": memory["lr_proj"] | {"bias": jnp.full_like(memory["lr_proj"]["bias"], rate)}}
    if config.read_out == "difference":
        new["out_norm"] = memory["out_norm"] | {"log_floor": jnp.log(found)}
    return memory | new


@functools.partial(jax.jit, static_argnames="config")
def _rate(config: config_lib.ModelConfig, memory: Any, inputs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """softplus^-1 of the rate at which |f(W, q) - f(W_init, q)| / |f(W_init, q)| is MOVED after WARM_UP tokens.

    And the median of that difference's root mean square, float32 [N].
    """
    shape = (1, len(inputs), config.memory_heads, config.d_mem)
    norm = 1.0 if config.qk_scale == "l2" else config.d_mem**0.5

    def part(name: str) -> jax.Array:
        projected = functional.linear(inputs[None], memory[f"{name}_proj"]["kernel"])
        return functional.causal_conv(projected, memory[f"{name}_conv"]["kernel"], None).reshape(shape)

    def unit(name: str) -> jax.Array:
        x = norms.rms_norm(part(name), memory[f"{name}_norm"]["scale"], config.norm_eps)
        return norms.l2_normalise(x, norm)

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
    rate = jnp.sqrt(low * high)
    found = jnp.median(read(rate, "difference"), axis=(0, 1)) / config.d_mem**0.5
    return jnp.log(jnp.expm1(rate)), jnp.maximum(found, layers_lib.FLOOR)

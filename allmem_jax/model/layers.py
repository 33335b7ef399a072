"""The Linen modules that a decoder layer is made of: projections, norms, convolution, attention, MLP.

Parameters are plain arrays (no partitioning boxes), so the modules also live inside `nnx.bridge` hosts; what mesh axis
each goes to is decided from its path (`allmem_jax.model.sharding`). Kernels are [in, out]. State is an argument and a
result.

    B batch    L tokens    d model    Hq, Hkv attention heads    D head dimension    N memory heads    H fast hidden
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from allmem_jax.model import config as config_lib
from allmem_jax.model import functional
from pallas_kernels import dots, norms
from pallas_kernels.ttt import decode

Rope = tuple[jax.Array, jax.Array]
FLOOR = 1e-6  # of the norm of a read-out that is small where little was written, until it is fitted
GROUPS = ("q", "k", "v"), ("x", "b", "c"), ("gate", "up"), ("o",), ("out",), ("down",), ("z",)  # NAME_proj of one input


class Shared(NamedTuple):
    """What every layer of one call sees alike.

    Attributes:
      rope, local_rope: tables of the global and of the local layers; the same object where there are no local ones. A
        rope of None turns nothing.
      window, sinks: ints or int32 scalars; window None is no window (the original attention).
      segment_ids: int32 [B, L] of packed documents, or None.
      reset: bool [B, L], first tokens of documents, or None.
      position, lengths: int32 [B] when decoding with a state, else None.
      caches: keys and values of all layers, [Y, B, S + W, Hkv, D], where the layers' states come without them.
    """

    rope: Rope | None
    local_rope: Rope | None
    window: jax.Array | int | None
    sinks: jax.Array | int
    segment_ids: jax.Array | None = None
    reset: jax.Array | None = None
    position: Any = None
    lengths: Any = None
    caches: Any = None


class LayerState(NamedTuple):
    """One layer's part of `DecodeState`: keys, values [B, S + W, Hkv, D], conv [B, K - 1, F] and the memory's.

    What a layer returns has the new tokens' keys and values [B, L, Hkv, D], and what waits of them [B, L, F'], instead;
    of a single token also its `TokenGradient` in the place of the memory. The model writes them.
    """

    keys: Any
    values: Any
    conv: Any
    memory: Any
    waiting: Any = None


def seen(
    c: config_lib.ModelConfig,
    shape: tuple[int, ...],
    *,
    position: jax.Array | None = None,
    lengths: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    window: jax.Array | int | None = None,
    sinks: jax.Array | int | None = None,
) -> Shared:
    """Positions, rotary tables and masks that the layers of a call on tokens [B, L] use.

    Args:
      c: the config.
      shape: begins with B, L.
      position: int32 [B], tokens of each row before these, when decoding with a state; then `lengths` [B] of these are
        real, None being all.
      lengths: plays no part without `position`.
      segment_ids: int32 [B, L], packed documents; without `position` only.
      window, sinks: replace the config's.
    """
    batch, length = shape[:2]
    offsets = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    reset = None
    if position is not None:
        lengths = jnp.full((batch,), length, jnp.int32) if lengths is None else lengths.astype(jnp.int32)
        offsets = offsets + position[:, None]
    elif segment_ids is not None:
        offsets, reset = functional.document_offsets(segment_ids)
    rope = functional.rope_table(offsets, *functional.rope_frequencies(c.head_dim, c.rope_theta, c.rope_scaling))
    local_rope = rope
    if any(c.local_layers):
        theta = c.rope_theta if c.local_rope_theta is None else c.local_rope_theta
        local_rope = functional.rope_table(offsets, *functional.rope_frequencies(c.head_dim, theta))
    full = c.mixer == "full"
    return Shared(
        rope=rope,
        local_rope=local_rope,
        window=None if full else c.window if window is None else window,
        sinks=0 if full else c.sinks if sinks is None else sinks,
        segment_ids=segment_ids,
        reset=reset,
        position=position,
        lengths=lengths if position is not None else None,
    )


def of_state(state: Any) -> LayerState:
    """The layers' part of a `DecodeState`, leaves [Y, B, ...]."""
    return LayerState(state.keys, state.values, state.conv, state.memory, state.waiting)


def of_one_token(past: LayerState, shared: Shared) -> tuple[LayerState, Shared]:
    """`past`, leaves [Y, B, ...], with what one more token needs, and `shared` with the caches.

    A loop over layers copies what it hands to each: so of all that waits each has the slot that the token takes, and
    the caches lie beside.
    """
    waiting = past.waiting
    if waiting is not None:
        slot = (shared.position % waiting.shape[2])[None, :, None, None]
        waiting = jnp.take_along_axis(waiting, slot, axis=2)
    bare = past._replace(keys=None, values=None, waiting=waiting)
    return bare, shared._replace(caches=(past.keys, past.values))


def written(
    c: config_lib.ModelConfig,
    past: LayerState,
    new: LayerState,
    shared: Shared,
    init: pallas_kernels.FastWeights | None,
) -> LayerState:
    """The states of all layers after a call, from those before it and what the layers returned; leaves [Y, B, ...].

    They are `functional.bits` where those before are. `init` has the `initial_weights` of all layers, [Y, ...].
    """
    where = shared.position, shared.lengths

    def cached(held: Any, tokens: Any) -> Any:
        return None if held is None else functional.write_cache(held, tokens, *where, c.sinks)

    learned = new.memory
    if isinstance(learned, decode.TokenGradient):
        marks = shared.position == 0, shared.lengths > 0
        assert init is not None
        learned = functional.write_memory(past.memory, init, learned, *marks, c.chunk)
    waiting = None
    if past.waiting is not None:  # as a cache with no sinks and one head
        waiting = functional.write_cache(past.waiting[..., None, :], new.waiting[..., None, :], *where, 0)[..., 0, :]
    keys, values = cached(past.keys, new.keys), cached(past.values, new.values)
    return LayerState(keys, values, new.conv, learned, waiting)


def initial_weights(layer: Mapping[str, Any]) -> pallas_kernels.FastWeights | None:
    """The learned start of the fast weights, from a layer's parameters; None without such a memory."""
    memory = layer.get("memory", {})
    if "fast_gate" not in memory:
        return None
    return pallas_kernels.FastWeights(memory["fast_gate"], memory["fast_up"], memory["fast_down"])


class Linear(nn.Module):
    """x [..., in] @ kernel [in, out] + bias."""

    features: int
    use_bias: bool = False
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None = None, product: jax.Array | None = None) -> jax.Array:
        """Returns [..., out] in x's dtype, with the kernel's columns times `scale` [out].

        `product` is x @ kernel, where it is known.
        """
        product = self.product(x) if product is None else product
        kernel = None if product is not None else self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        if product is None:
            return functional.linear(x, kernel, bias, scale)
        return functional.affine(product, bias, scale).astype(x.dtype)

    def product(self, x: jax.Array) -> jax.Array | None:
        """x @ kernel, and @ those joined to it, where `lm.unstack` made them: the parameter is the layer's number."""
        if not self.has_variable("kernels", "kernel"):
            return None
        return dots.Unstacked(*(self.get_variable(where, "kernel") for where in ("kernels", "params"))).product(x)


def linears(x: jax.Array, each: Sequence[Linear]) -> list[jax.Array]:
    """x [..., in] through several of one group in `GROUPS`, [..., out] each."""
    joined = each[0].product(x)
    if joined is None:
        return [one(x) for one in each]
    widths = [one.features for one in each]
    parts = jnp.split(joined, list(itertools.accumulate(widths))[:-1], axis=-1)
    return [one(x, product=part) for one, part in zip(each, parts, strict=True)]


class Head(nn.Module):
    """Hidden states [..., d] to float32 logits [..., V] with a kernel of its own, where embeddings are not tied."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32 [..., V]."""
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        return functional.logits(x, kernel)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis."""

    eps: float
    offset: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x's shape and dtype."""
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", start, (x.shape[-1],))
        return norms.rms_norm(x, scale, self.eps, self.offset)


class Scale(nn.Module):
    """The scale [features] of an `RMSNorm` that is not computed by itself."""

    offset: float = 0.0

    @nn.compact
    def __call__(self, features: int) -> jax.Array:
        """Returns the parameter."""
        return self.param("scale", nn.initializers.constant(1.0 - self.offset), (features,))


class FlooredNorm(nn.Module):
    """x / sqrt(mean(x^2) + floor^2) * scale over the last axis, with a floor for each head on the axis before."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., N, D] -> its shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        log_floor = self.param("log_floor", nn.initializers.constant(math.log(FLOOR)), (x.shape[-2],))
        floor = jnp.exp(norms.per_channel(log_floor, x[..., 0]))
        return norms.rms_norm(x, scale, jnp.square(floor)[..., None])


class Taps(nn.Module):
    """The kernel [taps, features] of a causal depthwise convolution."""

    taps: int

    @nn.compact
    def __call__(self, features: int) -> jax.Array:
        """Returns the parameter."""
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        return self.param("kernel", init, (self.taps, features))


class Attention(nn.Module):
    """The pretrained attention, restricted to a window and sinks. Its weights stay frozen when a model is converted."""

    config: config_lib.ModelConfig
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, is_local: jax.Array, state: LayerState | None, shared: Shared, layer: Any = None
    ) -> tuple[jax.Array, Rope | None]:
        """x [B, L, d], is_local bool [] -> [B, L, d] and the new keys and values [B, L, Hkv, D], None without state.

        `layer`, int32 [], says which of `shared.caches` are read; without them it plays no part.
        """
        c = self.config
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale

        counts = {"q": c.n_heads, "k": c.n_kv_heads, "v": c.n_kv_heads}
        each = [Linear(count * c.head_dim, c.qkv_bias, name=f"{name}_proj") for name, count in counts.items()]
        q, k, v = (part.reshape(*x.shape[:2], -1, c.head_dim) for part in linears(x, each))
        norms: Any = (None, None)
        if c.qk_norm:
            norms = tuple(Scale(c.norm_offset, name=f"{name}_norm")(c.head_dim) for name in "qk")
        rope, window, sinks = shared.rope, shared.window, shared.sinks
        if window is None:
            window, sinks = x.shape[1], 0
        if any(c.local_layers):
            assert c.local_window is not None
            rope = jax.tree.map(lambda local, other: jnp.where(is_local, local, other), shared.local_rope, rope)
            window = jnp.where(is_local, jnp.minimum(window, c.local_window), window)
            sinks = jnp.where(is_local, 0, sinks)
        sizes: Any = {"window": window, "sinks": sinks, "scale": scale, "implementation": self.implementation}
        turn: Any = {"rope": rope, "eps": c.norm_eps, "offset": c.norm_offset}
        new = None
        if state is None:
            out = functional.attend(q, k, v, segment_ids=shared.segment_ids, norms=norms, **turn, **sizes)
        else:
            turn["implementation"] = "xla"  # the cache wants keys outside of kernels
            q, k = (pallas_kernels.norm_rope(x, norm, **turn) for x, norm in zip((q, k), norms, strict=True))
            cache = (state.keys, state.values) if shared.caches is None else shared.caches
            sizes |= {"sink_slots": c.sinks, "layer": None if shared.caches is None else layer}
            out = functional.attend_cached(q, k, v, cache, shared.position, shared.lengths, **sizes)
            new = k, v
        return Linear(c.d_model, c.o_bias, name="o_proj")(out.reshape(*x.shape[:2], -1)), new


def convolved(
    c: config_lib.ModelConfig,
    x: jax.Array,
    state: LayerState | None,
    shared: Shared,
    /,
    convolve: Callable[..., jax.Array] | None = None,
    **widths: int,
) -> tuple[list[jax.Array], jax.Array | None]:
    """Projections of x [B, L, d], by name and width, each behind its causal convolution; and the tail after them.

    `convolve` (name, and the arguments of `functional.causal_conv`) may do more than that. To be called in a module: it
    owns the parameters NAME_proj and NAME_conv.
    """
    raw = linears(x, [Linear(width, name=f"{name}_proj") for name, width in widths.items()])
    tails: Any = (None,) * len(raw)
    if state is not None:
        tails = jnp.split(state.conv, list(itertools.accumulate(widths.values()))[:-1], axis=-1)
    out = []
    for name, part, tail in zip(widths, raw, tails, strict=True):
        arguments = part, Taps(c.conv_kernel, name=f"{name}_conv")(widths[name]), tail, shared.segment_ids
        out.append(functional.causal_conv(*arguments) if convolve is None else convolve(name, *arguments))
    if state is None:
        return out, None
    return out, functional.conv_tail(jnp.concatenate(raw, axis=-1), state.conv, shared.lengths)


def projected(module: Any, out: jax.Array) -> jax.Array:
    """What a memory read, [B, L, N D], as its part of the layer's sum, [B, L, d]: projected and scaled by alpha.

    To be called in the module that owns the parameters out_proj and alpha.
    """
    c = module.config
    alpha = module.param("alpha", nn.initializers.constant(c.alpha_init), (c.d_model,))
    return Linear(c.d_model, name="out_proj")(out, alpha)


def real_tokens(x: jax.Array, shared: Shared) -> jax.Array | None:
    """bool [B, L], which of the tokens of x [B, L, d] are not padding; None where no one counts (no state)."""
    return None if shared.lengths is None else jnp.arange(x.shape[1]) < shared.lengths[:, None]


class Mlp(nn.Module):
    """The gated MLP of every supported family: down(act(gate x) * up x)."""

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, d] -> [B, L, d]."""
        c = self.config
        gate, up = linears(x, [Linear(c.d_ff, c.mlp_bias, name=f"{name}_proj") for name in ("gate", "up")])
        return Linear(c.d_model, c.mlp_bias, name="down_proj")(functional.gated(gate, up, c.activation))

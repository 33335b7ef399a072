"""The Linen modules of one decoder layer: attention, memory or one of the baselines in its place, MLP.

Parameters are plain arrays (no partitioning boxes), so the modules also live inside `nnx.bridge` hosts; what mesh axis
each goes to is decided from its path (`allmem_jax.sharding`). Kernels are [in, out]. State is an argument and a result.

    B batch    L tokens    d model    Hq, Hkv attention heads    D head dimension    N memory heads    H fast hidden
"""

import itertools
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from allmem_jax import config as config_lib
from allmem_jax import functional, linear_memory, sharding

Rope = tuple[jax.Array, jax.Array]
FLOOR = 1e-6  # of the norm of a read-out that is small where little was written, until it is fitted


class Shared(NamedTuple):
    """What every layer of one call sees alike.

    Attributes:
      rope, local_rope: tables of the global and of the local layers; the same object where there are no local ones.
      window, sinks: ints or int32 scalars; window None is no window (the original attention).
      segment_ids: int32 [B, L] of packed documents, or None.
      reset: bool [B, L], first tokens of documents, or None.
      position, lengths: int32 [B] when decoding with a state, else None.
    """

    rope: Rope
    local_rope: Rope
    window: jax.Array | int | None
    sinks: jax.Array | int
    segment_ids: jax.Array | None = None
    reset: jax.Array | None = None
    position: Any = None
    lengths: Any = None


class LayerState(NamedTuple):
    """One layer's part of `DecodeState`: keys, values [B, S + W, Hkv, D], conv [B, K - 1, F] and the memory's.

    What a layer returns has the new tokens' keys and values [B, L, Hkv, D], and what waits of them [B, L, F'], instead;
    the model writes them.
    """

    keys: jax.Array
    values: jax.Array
    conv: Any
    memory: Any
    waiting: Any = None


class Linear(nn.Module):
    """x [..., in] @ kernel [in, out] + bias."""

    features: int
    use_bias: bool = False
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: jax.Array, scale: jax.Array | None = None) -> jax.Array:
        """Returns [..., out] in x's dtype, with the kernel's columns times `scale` [out]."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        return functional.linear(x, kernel, bias, scale)


class Head(nn.Module):
    """Hidden states [..., d] to float32 logits [..., V] with a kernel of its own, where embeddings are not tied."""

    features: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns float32 [..., V]."""
        kernel = self.param("kernel", nn.initializers.normal(0.02), (x.shape[-1], self.features))
        return functional.logits(x, kernel)


class RMSNorm(nn.Module):
    """x / rms(x) * (offset + scale) over the last axis, rescaled to `norm` afterwards unless that is None."""

    eps: float
    offset: float = 0.0
    norm: float | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Returns x's shape and dtype."""
        start = nn.initializers.constant(1.0 - self.offset)
        scale = self.param("scale", start, (x.shape[-1],))
        return functional.rms_norm(x, scale, self.eps, self.offset, self.norm)


class FlooredNorm(nn.Module):
    """x / sqrt(mean(x^2) + floor^2) * scale over the last axis, with a floor for each head on the axis before."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., N, D] -> its shape and dtype."""
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        log_floor = self.param("log_floor", nn.initializers.constant(math.log(FLOOR)), (x.shape[-2],))
        floor = jnp.exp(functional.per_channel(log_floor, x[..., 0]))
        return functional.rms_norm(x, scale, jnp.square(floor)[..., None])


class CausalConv(nn.Module):
    """The kernel of a causal depthwise convolution."""

    taps: int

    @nn.compact
    def __call__(self, x: jax.Array, tail: jax.Array | None, segment_ids: jax.Array | None) -> jax.Array:
        """x [B, L, F], tail [B, K - 1, F] or None -> [B, L, F]."""
        init = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
        kernel = self.param("kernel", init, (self.taps, x.shape[-1]))
        return functional.causal_conv(x, kernel, tail, segment_ids)


class Attention(nn.Module):
    """The pretrained attention, restricted to a window and sinks. Its weights stay frozen when a model is converted."""

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, is_local: jax.Array, state: LayerState | None, shared: Shared
    ) -> tuple[jax.Array, Rope | None]:
        """x [B, L, d], is_local bool [] -> [B, L, d] and the new keys and values [B, L, Hkv, D], None without state."""
        c = self.config
        scale = c.head_dim**-0.5 if c.query_scale is None else c.query_scale

        def heads(name: str, count: int) -> jax.Array:
            projected = Linear(count * c.head_dim, c.qkv_bias, name=f"{name}_proj")(x)
            return projected.reshape(*x.shape[:2], count, c.head_dim)

        q, k, v = heads("q", c.n_heads), heads("k", c.n_kv_heads), heads("v", c.n_kv_heads)
        if c.qk_norm:
            q = RMSNorm(c.norm_eps, c.norm_offset, name="q_norm")(q)
            k = RMSNorm(c.norm_eps, c.norm_offset, name="k_norm")(k)
        rope, window, sinks = shared.rope, shared.window, shared.sinks
        if window is None:
            window, sinks = x.shape[1], 0
        if any(c.local_layers):
            assert c.local_window is not None
            rope = jax.tree.map(lambda local, other: jnp.where(is_local, local, other), shared.local_rope, rope)
            window = jnp.where(is_local, jnp.minimum(window, c.local_window), window)
            sinks = jnp.where(is_local, 0, sinks)
        q, k = functional.apply_rope(q, rope), functional.apply_rope(k, rope)
        new = None
        if state is None:
            out = functional.attend(q, k, v, window=window, sinks=sinks, segment_ids=shared.segment_ids, scale=scale)
        else:
            out = functional.attend_cached(
                q, k, v, (state.keys, state.values), shared.position, shared.lengths,
                sink_slots=c.sinks, window=window, sinks=sinks, scale=scale,
            )  # fmt: skip
            new = k, v
        return Linear(c.d_model, c.o_bias, name="o_proj")(out.reshape(*x.shape[:2], -1)), new


def convolved(
    c: config_lib.ModelConfig, x: jax.Array, state: LayerState | None, shared: Shared, /, **widths: int
) -> tuple[list[jax.Array], jax.Array | None]:
    """Projections of x [B, L, d], by name and width, each behind its causal convolution; and the tail after them.

    To be called in a module: it owns the parameters NAME_proj and NAME_conv.
    """
    raw = [Linear(width, name=f"{name}_proj")(x) for name, width in widths.items()]
    tails: Any = (None,) * len(raw)
    if state is not None:
        tails = jnp.split(state.conv, list(itertools.accumulate(widths.values()))[:-1], axis=-1)
    out = [
        CausalConv(c.conv_kernel, name=f"{name}_conv")(part, tail, shared.segment_ids)
        for name, part, tail in zip(widths, raw, tails, strict=True)
    ]
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


class Memory(nn.Module):
    """The memory that learns at test time: projections, convolutions, and fast weights updated chunk by chunk.

    `sow`s, under "intermediates", what tells a memory that diverges: the mean learning rate and momentum, and the
    norms of the last fast weights and velocity relative to the initial weights'.
    """

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: LayerState | None, shared: Shared
    ) -> tuple[jax.Array, tuple[jax.Array, pallas_kernels.MemoryState, jax.Array | None] | None]:
        """x [B, L, d] (normalised) -> alpha * memory(x) [B, L, d].

        And, with a state, the conv tail and memory state after it and what waits of the new tokens [B, L, F'].
        """
        c = self.config
        shape = (*x.shape[:2], c.memory_heads, c.d_mem)
        width = c.memory_heads * c.d_mem
        parts, tail = convolved(c, x, state, shared, q=width, k=width, v=width)
        q, k, v = (part.reshape(shape) for part in parts)
        length = 1.0 if c.qk_scale == "l2" else c.d_mem**0.5
        q = RMSNorm(c.norm_eps, norm=length, name="q_norm")(q)
        k = RMSNorm(c.norm_eps, norm=length, name="k_norm")(k)
        lr, momentum = self._rates(x)
        there: jax.Array | bool = True
        waiting = None
        if c.delay and shared.window is not None and (state is None or c.lag):
            (k, v, lr, momentum), there, waiting = _delayed(c, (k, v, lr, momentum), state, shared)
        lr = jnp.where(there & c.write, nn.softplus(lr.astype(jnp.float32)), 0.0)
        momentum = nn.sigmoid(momentum.astype(jnp.float32))
        init = self._initial_weights()

        past = None if state is None else functional.start_memory(state.memory, init, shared.position == 0)
        out, after = functional.remember(
            q, k, v, lr, momentum, init, past,
            chunk=c.chunk, valid=real_tokens(x, shared), reset=shared.reset, read_out=c.read_out,
        )  # fmt: skip
        self._report(lr, momentum, init, after)
        if c.read_out == "full":
            out = RMSNorm(c.norm_eps, name="out_norm")(out)
        else:
            out = _where_written(FlooredNorm(name="out_norm"), out, c.write)
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        gate = nn.sigmoid(Linear(c.memory_heads, kernel_init=small, name="gate_proj")(x).astype(jnp.float32))
        out = (out * gate[..., None]).astype(x.dtype).reshape(*x.shape[:2], -1)
        return projected(self, out), None if tail is None else (tail, after, waiting)

    def _rates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Before softplus and sigmoid: learning rates [B, L, N, 3] (gate, up, down) and momentum [B, L, N]."""
        c = self.config
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        lr_bias = nn.initializers.constant(jnp.log(jnp.expm1(c.lr_init)))
        momentum_bias = nn.initializers.constant(jnp.log(c.momentum_init / (1 - c.momentum_init)))
        lr = Linear(3 * c.memory_heads, True, small, lr_bias, name="lr_proj")(x)
        momentum = Linear(c.memory_heads, True, small, momentum_bias, name="momentum_proj")(x)
        return lr.reshape(*x.shape[:2], c.memory_heads, 3), momentum

    def _initial_weights(self) -> pallas_kernels.FastWeights:
        c = self.config
        up = (c.memory_heads, c.memory_hidden, c.d_mem)
        down = (c.memory_heads, c.d_mem, c.memory_hidden)
        fan_in = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2, batch_axis=0)
        return pallas_kernels.FastWeights(
            gate=self.param("fast_gate", fan_in, up),
            up=self.param("fast_up", fan_in, up),
            down=self.param("fast_down", fan_in, down),
        )

    def _report(self, lr, momentum, init: pallas_kernels.FastWeights, after: pallas_kernels.MemoryState) -> None:
        if self.is_initializing() or not self.is_mutable_collection("intermediates"):
            return

        def norm(weights: pallas_kernels.FastWeights) -> jax.Array:
            return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in weights))

        start = norm(init) * after.count.shape[0] ** 0.5  # the state has a batch axis, init has none
        stats = dict(lr=jnp.mean(lr), momentum=jnp.mean(momentum), weights=norm(after.weights) / start,
                     velocity=norm(after.velocity) / start)  # fmt: skip
        for name, value in stats.items():
            self.sow("intermediates", name, value)


def _delayed(
    c: config_lib.ModelConfig, tokens: tuple[jax.Array, ...], state: LayerState | None, shared: Shared
) -> tuple[list[jax.Array], jax.Array, jax.Array]:
    """What is written in the place of `tokens`, arrays [B, L, N, ...], when they wait until they leave the window.

    Returns:
      The same arrays of the tokens that leave; bool [B, L, 1, 1], whether there are such; and `tokens` as they wait,
      [B, L, F'].
    """
    flat = [x.reshape(*x.shape[:2], -1) for x in tokens]
    waiting = jnp.concatenate(flat, axis=-1)
    if state is None:
        assert shared.window is not None
        lag = jnp.maximum(shared.window - c.chunk, 0)
        late, there = functional.delayed(waiting, lag, segment_ids=shared.segment_ids)
    else:
        late, there = functional.delayed(waiting, c.lag, state.waiting, shared.position)
    parts = jnp.split(late, list(itertools.accumulate(x.shape[-1] for x in flat))[:-1], axis=-1)
    same = [part.reshape(x.shape) for part, x in zip(parts, tokens, strict=True)]
    return same, there[..., None, None], waiting


def _where_written(norm: FlooredNorm, out: jax.Array, write: bool) -> jax.Array:
    """`norm` of what was read, [B, L, N, D], and zero, with no gradient, where that is zero as nothing was written.

    The norm's slope there is 1 / floor, which may make of rounding a gradient larger than all others.
    """
    written = jnp.any(out != 0, axis=-1, keepdims=True) & write
    return jnp.where(written, norm(jnp.where(written, out, 1)), 0)


def decay_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """log A float32 [N] of the baselines, A evenly from 1 to 16 over the heads (Mamba-2 draws it from there)."""
    return jnp.log(jnp.linspace(1.0, 16.0, shape[0]))


def step_init(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """softplus^-1 of steps from 1e-3 to 1e-1, evenly on a logarithmic scale over the heads; float32 [N]."""
    return jnp.log(jnp.expm1(jnp.geomspace(1e-3, 1e-1, shape[0])))


class Mamba2(nn.Module):
    """The baseline "mamba2": a selective state space in the memory's place (arXiv 2405.21060, one group).

    `sow`s, under "intermediates", the mean step and decay, and the root mean square of the last state.
    """

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: LayerState | None, shared: Shared
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, L, d] (normalised) -> alpha * mamba2(x) [B, L, d], and the conv tail and state [B, N, S, P] after."""
        c = self.config
        width = c.memory_heads * c.d_mem
        parts, tail = convolved(c, x, state, shared, x=width, b=c.mamba_state, c=c.mamba_state)
        value, key, query = (nn.silu(part) for part in parts)  # [B, L, N P], [B, L, S], [B, L, S]
        value = value.reshape(*x.shape[:2], c.memory_heads, c.d_mem)
        step = nn.softplus(Linear(c.memory_heads, True, bias_init=step_init, name="dt_proj")(x).astype(jnp.float32))
        step = step if c.write else 0.0 * step
        log_decay = -jnp.exp(self.param("A_log", decay_init, (c.memory_heads,))) * step
        out, after = linear_memory.ssd(
            query, key, (step[..., None] * value).astype(x.dtype), log_decay,
            None if state is None else state.memory, valid=real_tokens(x, shared), reset=shared.reset,
        )  # fmt: skip
        _report_linear(self, step, log_decay, after)
        skip = self.param("D", nn.initializers.ones, (c.memory_heads,))
        out = (out + skip[:, None] * value).astype(x.dtype).reshape(*x.shape[:2], width)
        out = RMSNorm(c.norm_eps, name="out_norm")(out * nn.silu(Linear(width, name="z_proj")(x)))
        return projected(self, out), None if tail is None else (tail, after)


class GatedDelta(nn.Module):
    """The baseline "delta": a linear memory under the gated delta rule in the memory's place (arXiv 2412.06464).

    `sow`s, under "intermediates", the mean beta and decay, and the root mean square of the last state.
    """

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: LayerState | None, shared: Shared
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, L, d] (normalised) -> alpha * delta(x) [B, L, d], and the conv tail and state [B, N, D', D'] after."""
        c = self.config
        heads, width = c.memory_heads, c.memory_heads * c.delta_dim
        parts, tail = convolved(c, x, state, shared, q=width, k=width, v=width)
        q, k, v = (nn.silu(part).reshape(*x.shape[:2], heads, c.delta_dim) for part in parts)
        beta = nn.sigmoid(Linear(heads, name="beta_proj")(x).astype(jnp.float32))
        beta = beta if c.write else 0.0 * beta
        step = nn.softplus(Linear(heads, True, bias_init=step_init, name="decay_proj")(x).astype(jnp.float32))
        log_decay = -jnp.exp(self.param("A_log", decay_init, (heads,))) * step
        out, after = linear_memory.gated_delta(
            functional.l2_normalise(q), functional.l2_normalise(k), v, log_decay, beta,
            None if state is None else state.memory, valid=real_tokens(x, shared), reset=shared.reset,
        )  # fmt: skip
        _report_linear(self, beta, log_decay, after)
        out = RMSNorm(c.norm_eps, name="out_norm")(out).reshape(*x.shape[:2], width)
        out = out * nn.silu(Linear(width, name="z_proj")(x))
        return projected(self, out), None if tail is None else (tail, after)


def _report_linear(module: nn.Module, rate: jax.Array, log_decay: jax.Array, after: jax.Array) -> None:
    if not module.is_initializing():
        rms = jnp.sqrt(jnp.mean(jnp.square(after)))
        for name, value in dict(lr=jnp.mean(rate), decay=jnp.mean(jnp.exp(log_decay)), state=rms).items():
            module.sow("intermediates", name, value)


class Mlp(nn.Module):
    """The gated MLP of every supported family: down(act(gate x) * up x)."""

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """[B, L, d] -> [B, L, d]."""
        c = self.config
        gate = Linear(c.d_ff, c.mlp_bias, name="gate_proj")(x)
        up = Linear(c.d_ff, c.mlp_bias, name="up_proj")(x)
        return Linear(c.d_model, c.mlp_bias, name="down_proj")(functional.gated(gate, up, c.activation))


MEMORIES: dict[str, Any] = {"allmem": Memory, "mamba2": Mamba2, "delta": GatedDelta}


class DecoderLayer(nn.Module):
    """One layer, pre-norm: x + attention(n) + alpha * memory(n), then the MLP."""

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, scanned: tuple[jax.Array, LayerState | None], shared: Shared
    ) -> tuple[jax.Array, LayerState | None]:
        """x [B, L, d]; scanned: is_local bool [] and this layer's state -> [B, L, d] and what is new in it."""
        c = self.config
        is_local, state = scanned

        def norm(name: str, value: jax.Array) -> jax.Array:
            return RMSNorm(c.norm_eps, c.norm_offset, name=name)(value)

        normed = norm("input_norm", x)
        mixed, new = Attention(c, name="attention")(normed, is_local, state, shared)
        x = x + (norm("post_attention_norm", mixed) if c.sandwich_norms else mixed)
        learned = None
        if c.mixer in MEMORIES:
            remembered, learned = MEMORIES[c.mixer](c, name="memory")(normed, state, shared)
            x = x + remembered
        hidden = Mlp(c, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("post_mlp_norm", hidden) if c.sandwich_norms else hidden)
        x = x if state is not None else sharding.over_tokens(x)
        return x, None if new is None else LayerState(*new, *(learned or (None, None)))

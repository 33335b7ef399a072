"""The memory beside a layer's attention: a Linen module that learns at test time, chunk by chunk.

B batch    L tokens    d model    N memory heads    D head dimension    H fast hidden    F channels of a convolution
"""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

import pallas_kernels
from allmem_jax.model import config as config_lib
from allmem_jax.model import functional, layers


class Memory(nn.Module):
    """The memory that learns at test time: projections, convolutions, and fast weights updated chunk by chunk.

    `sow`s, under "intermediates", what tells a memory that diverges: the mean learning rate and momentum, and the
    norms of the last fast weights and velocity relative to the initial weights'.
    """

    config: config_lib.ModelConfig
    implementation: str | None = None

    @nn.compact
    def __call__(
        self, x: jax.Array, state: layers.LayerState | None, shared: layers.Shared
    ) -> tuple[jax.Array, tuple[jax.Array, pallas_kernels.MemoryState, jax.Array | None] | None]:
        """x [B, L, d] (normalised) -> alpha * memory(x) [B, L, d].

        And, with a state, the conv tail and memory state after it and what waits of the new tokens [B, L, F'].
        """
        c = self.config
        shape = (*x.shape[:2], c.memory_heads, c.d_mem)
        width = c.memory_heads * c.d_mem
        options: Any = {"norm": 1.0 if c.qk_scale == "l2" else c.d_mem**0.5, "eps": c.norm_eps}
        options["implementation"] = self.implementation
        scales = {name: layers.Scale(name=f"{name}_norm")(c.d_mem) for name in "qk"}

        def convolve(name, part, kernel, *rest):
            return functional.conv_norm(part.reshape(shape), kernel, scales.get(name), *rest, **options)

        (q, k, v), tail = layers.convolved(c, x, state, shared, convolve, q=width, k=width, v=width)
        lr, momentum = self._rates(x)
        there: jax.Array | bool = True
        waiting = None
        if c.delay and shared.window is not None and (state is None or c.lag):
            (k, v, lr, momentum), there, waiting = _delayed(c, (k, v, lr, momentum), state, shared)
        lr = jnp.where(there & c.write, nn.softplus(lr.astype(jnp.float32)), 0.0)
        momentum = nn.sigmoid(momentum.astype(jnp.float32))
        out, after = self._remember((q, k, v, lr, momentum), state, shared)
        if c.read_out == "full":
            out = layers.RMSNorm(c.norm_eps, name="out_norm")(out)
        else:
            out = _where_written(layers.FlooredNorm(name="out_norm"), out, c.write)
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        gate = nn.sigmoid(layers.Linear(c.memory_heads, kernel_init=small, name="gate_proj")(x).astype(jnp.float32))
        out = (out * gate[..., None]).astype(x.dtype).reshape(*x.shape[:2], -1)
        return layers.projected(self, out), None if tail is None else (tail, after, waiting)

    def _remember(
        self, tokens: tuple[jax.Array, ...], state: layers.LayerState | None, shared: layers.Shared
    ) -> tuple[jax.Array, Any]:
        """What tokens [B, L, N, ...] read, and the memory after them, or the `TokenGradient` of a single one."""
        c = self.config
        q, k, v, lr, momentum = tokens
        init = self._initial_weights()
        past = None if state is None else state.memory
        if past is not None:
            fresh = shared.position == 0
            if q.shape[1] == 1 and self.implementation is None:
                return functional.remember_one(q, k, v, lr, momentum, init, past, fresh, read_out=c.read_out)
            past = functional.started(past, pallas_kernels.init_memory_state(init, q.shape[0]), fresh)
        marks: Any = {"valid": layers.real_tokens(q, shared), "reset": shared.reset}
        options: Any = {"chunk": c.chunk, "read_out": c.read_out, "implementation": self.implementation}
        out, after = functional.remember(q, k, v, lr, momentum, init, past, **marks, **options)
        self._report(lr, momentum, init, after)
        return out, after

    def _rates(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Before softplus and sigmoid: learning rates [B, L, N, 3] (gate, up, down) and momentum [B, L, N]."""
        c = self.config
        small = nn.initializers.variance_scaling(0.01, "fan_in", "normal")
        lr_bias = nn.initializers.constant(jnp.log(jnp.expm1(c.lr_init)))
        momentum_bias = nn.initializers.constant(jnp.log(c.momentum_init / (1 - c.momentum_init)))
        lr = layers.Linear(3 * c.memory_heads, True, small, lr_bias, name="lr_proj")(x)
        momentum = layers.Linear(c.memory_heads, True, small, momentum_bias, name="momentum_proj")(x)
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
        stats = dict(
            lr=jnp.mean(lr),
            momentum=jnp.mean(momentum),
            weights=norm(after.weights) / start,
            velocity=norm(after.velocity) / start,
        )
        for name, value in stats.items():
            self.sow("intermediates", name, value)


def _delayed(
    c: config_lib.ModelConfig, tokens: tuple[jax.Array, ...], state: layers.LayerState | None, shared: layers.Shared
) -> tuple[list[jax.Array], jax.Array, jax.Array | None]:
    """What is written in the place of `tokens`, arrays [B, L, N, ...], when they wait until they leave the window.

    Returns:
      The same arrays of the tokens that leave; bool [B, L, 1, 1], whether there are such; and `tokens` as they wait,
      [B, L, F'], None without a state.
    """
    flat = [x.reshape(*x.shape[:2], -1) for x in tokens]
    if state is None:
        assert shared.window is not None
        lag = c.lag_of(shared.window)
        late = [functional.delayed(x, lag, segment_ids=shared.segment_ids) for x in flat]
        same = [part.reshape(x.shape) for (part, _), x in zip(late, tokens, strict=True)]
        return same, late[0][1][..., None, None], None
    waiting = jnp.concatenate(flat, axis=-1)
    waiting = jnp.pad(waiting, [(0, 0), (0, 0), (0, c.waiting_channels - waiting.shape[-1])])
    leaving, there = functional.delayed(waiting, c.lag, state.waiting, shared.position)
    parts = jnp.split(leaving, list(itertools.accumulate(x.shape[-1] for x in flat)), axis=-1)[: len(flat)]
    same = [part.reshape(x.shape) for part, x in zip(parts, tokens, strict=True)]
    return same, there[..., None, None], waiting


def _where_written(norm: layers.FlooredNorm, out: jax.Array, write: bool) -> jax.Array:
    """`norm` of what was read, [B, L, N, D], and zero, with no gradient, where that is zero as nothing was written.

    The norm's slope there is 1 / floor, which may make of rounding a gradient larger than all others.
    """
    written = jnp.any(out != 0, axis=-1, keepdims=True) & write
    return jnp.where(written, norm(jnp.where(written, out, 1)), 0)

"""What other memories stand in AllMem's place: Mamba-2 and the gated delta rule, with its parameters and its contract.

B batch    L tokens    d model    N memory heads    P, D' dimension of a head    S state
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from allmem_jax.model import config as config_lib
from allmem_jax.model import layers, linear_memory
from pallas_kernels import norms


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
        self, x: jax.Array, state: layers.LayerState | None, shared: layers.Shared
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, L, d] (normalised) -> alpha * mamba2(x) [B, L, d], and the conv tail and state [B, N, S, P] after."""
        c = self.config
        width = c.memory_heads * c.d_mem
        parts, tail = layers.convolved(c, x, state, shared, x=width, b=c.mamba_state, c=c.mamba_state)
        value, key, query = (nn.silu(part) for part in parts)  # [B, L, N P], [B, L, S], [B, L, S]
        value = value.reshape(*x.shape[:2], c.memory_heads, c.d_mem)
        step = nn.softplus(
            layers.Linear(c.memory_heads, True, bias_init=step_init, name="dt_proj")(x).astype(jnp.float32)
        )
        step = step if c.write else 0.0 * step
        log_decay = -jnp.exp(self.param("A_log", decay_init, (c.memory_heads,))) * step
        written = (step[..., None] * value).astype(x.dtype)
        out, after = linear_memory.ssd(query, key, written, log_decay, *_past(x, state, shared))
        _report_linear(self, step, log_decay, after)
        skip = self.param("D", nn.initializers.ones, (c.memory_heads,))
        out = (out + skip[:, None] * value).astype(x.dtype).reshape(*x.shape[:2], width)
        out = layers.RMSNorm(c.norm_eps, name="out_norm")(out * nn.silu(layers.Linear(width, name="z_proj")(x)))
        return layers.projected(self, out), None if tail is None else (tail, after)


class GatedDelta(nn.Module):
    """The baseline "delta": a linear memory under the gated delta rule in the memory's place (arXiv 2412.06464).

    `sow`s, under "intermediates", the mean beta and decay, and the root mean square of the last state.
    """

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, state: layers.LayerState | None, shared: layers.Shared
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """x [B, L, d] (normalised) -> alpha * delta(x) [B, L, d], and the conv tail and state [B, N, D', D'] after."""
        c = self.config
        heads, width = c.memory_heads, c.memory_heads * c.delta_dim
        parts, tail = layers.convolved(c, x, state, shared, q=width, k=width, v=width)
        q, k, v = (nn.silu(part).reshape(*x.shape[:2], heads, c.delta_dim) for part in parts)
        beta = nn.sigmoid(layers.Linear(heads, name="beta_proj")(x).astype(jnp.float32))
        beta = beta if c.write else 0.0 * beta
        step = nn.softplus(layers.Linear(heads, True, bias_init=step_init, name="decay_proj")(x).astype(jnp.float32))
        log_decay = -jnp.exp(self.param("A_log", decay_init, (heads,))) * step
        q, k = norms.l2_normalise(q), norms.l2_normalise(k)
        out, after = linear_memory.gated_delta(q, k, v, log_decay, beta, *_past(x, state, shared))
        _report_linear(self, beta, log_decay, after)
        out = layers.RMSNorm(c.norm_eps, name="out_norm")(out).reshape(*x.shape[:2], width)
        out = out * nn.silu(layers.Linear(width, name="z_proj")(x))
        return layers.projected(self, out), None if tail is None else (tail, after)


def _past(x: jax.Array, state: layers.LayerState | None, shared: layers.Shared) -> tuple[Any, Any, Any]:
    """What the recurrences take beside tokens: the state before them, which are real, which begin documents."""
    return None if state is None else state.memory, layers.real_tokens(x, shared), shared.reset


def _report_linear(module: nn.Module, rate: jax.Array, log_decay: jax.Array, after: jax.Array) -> None:
    if not module.is_initializing():
        rms = jnp.sqrt(jnp.mean(jnp.square(after)))
        for name, value in dict(lr=jnp.mean(rate), decay=jnp.mean(jnp.exp(log_decay)), state=rms).items():
            module.sow("intermediates", name, value)

"""One decoder layer: windowed attention and a memory side by side, then the MLP.

B batch    L tokens    d model
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from allmem_jax.model import baselines, functional, layers, memory, sharding
from allmem_jax.model import config as config_lib

MEMORIES: dict[str, Any] = {"allmem": memory.Memory, "mamba2": baselines.Mamba2, "delta": baselines.GatedDelta}


class DecoderLayer(nn.Module):
    """One layer, pre-norm: x + attention(n) + alpha * memory(n), then the MLP."""

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self, x: jax.Array, scanned: tuple[jax.Array, jax.Array, layers.LayerState | None], shared: layers.Shared
    ) -> tuple[jax.Array, layers.LayerState | None]:
        """x [B, L, d]; scanned: this layer's number, is_local [] and state -> [B, L, d] and what is new in it.

        Both may be `functional.bits`.
        """
        c = self.config
        layer, is_local, given = scanned
        state = functional.numbers(given)

        def norm(name: str, value: jax.Array) -> jax.Array:
            return layers.RMSNorm(c.norm_eps, c.norm_offset, name=name)(value)

        normed = norm("input_norm", x)
        mixed, new = layers.Attention(c, name="attention")(normed, is_local, state, shared, layer)
        x = x + (norm("post_attention_norm", mixed) if c.sandwich_norms else mixed)
        learned = None
        if c.mixer in MEMORIES:
            remembered, learned = MEMORIES[c.mixer](c, name="memory")(normed, state, shared)
            x = x + remembered
        hidden = layers.Mlp(c, name="mlp")(norm("mlp_norm", x))
        x = x + (norm("post_mlp_norm", hidden) if c.sandwich_norms else hidden)
        x = x if state is not None else sharding.over_tokens(x)
        if new is None or given is None:
            return x, None
        after = layers.LayerState(*new, *(learned or (None, None)))
        keys = given.keys if shared.caches is None else shared.caches[0]
        return x, functional.bits(after) if keys.dtype == jnp.uint16 else after

"""How likely a model finds given tokens, without the logits of all positions at once.

B rows    L tokens of a row    d model
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from allmem_jax.decoding import generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import functional, lm


@functools.partial(jax.jit, static_argnames="config")
def score(
    params: lm.Params, config: config_lib.ModelConfig, tokens: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Log-probability float32 [B, L] of each target, and whether it is the likeliest token bool [B, L].

    Logits exist for about 512 positions of the batch at a time.

    Args:
      params: of the model.
      config: its mixer says how the rows are read.
      tokens: int32 [B, L], L a power of two.
      targets: int32 [B, L], the token after each position.
    """
    hidden: Any = lm.AllMemLM(config).apply({"params": params}, tokens, return_hidden=True)  # [B, L, d]
    head = lm.head_kernel(params, config)
    batch, length = tokens.shape
    size = min(length, generation.bucket(max(1, 512 // batch), at_least=1))

    def block(part: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        states, wanted = part  # [B, size, d], [B, size]
        logits = functional.logits(states, head)
        chosen = jnp.take_along_axis(logits, wanted[..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1), jnp.argmax(logits, axis=-1) == wanted

    parts = [jnp.moveaxis(x.reshape(batch, -1, size, *x.shape[2:]), 1, 0) for x in (hidden, targets)]
    log_probs, likeliest = (jnp.moveaxis(x, 0, 1).reshape(batch, length) for x in jax.lax.map(block, tuple(parts)))
    return log_probs, likeliest

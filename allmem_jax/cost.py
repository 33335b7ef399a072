"""What a model costs: parameters by group, bytes of state, and operations per token, all without running it.

XLA's own count is of no use here: it counts the body of a scan once. The formulas below count a multiplication and
an addition as 2 operations and leave out what is elementwise (norms, activations, softmax), under 2 % of the rest.

    d model    Hq, Hkv attention heads    D head dim    F = N * D_m channels of the memory    N memory heads
    D_m dimension of a memory head    H = hidden size of its fast weights    K convolution taps    V vocabulary
"""

import math

import flax.traverse_util
import jax
import jax.numpy as jnp

from allmem_jax import config as config_lib
from allmem_jax import model, state


def parameter_groups(config: config_lib.ModelConfig) -> dict[str, int]:
    """Parameters of the converted model by group: embedding, attention, mlp, norms, head, memory (by `eval_shape`).

    "head" is 0 where it is the transposed embedding. The memory is counted whatever the config's mixer.
    """
    config = config.replace(mixer="allmem")
    tokens = jnp.zeros((1, 1), jnp.int32)
    shapes = jax.eval_shape(lambda: model.AllMemLM(config).init(jax.random.key(0), tokens)["params"])
    groups = dict.fromkeys(("embedding", "attention", "mlp", "norms", "head", "memory"), 0)
    for path, leaf in flax.traverse_util.flatten_dict(shapes).items():
        groups[_group(path)] += math.prod(leaf.shape)
    return groups


def _group(path: tuple[str, ...]) -> str:
    if path[0] == "embed":
        return "embedding"
    if path[0] == "lm_head":
        return "head"
    if path[0] == "layers" and path[1] in ("attention", "mlp", "memory"):
        return path[1]
    return "norms"


def added_share(config: config_lib.ModelConfig) -> float:
    """The memory's share of the converted model's parameters, in [0, 1]."""
    groups = parameter_groups(config)
    return groups["memory"] / sum(groups.values())


def state_bytes(config: config_lib.ModelConfig, context: int) -> dict[str, int]:
    """Bytes that decoding one row keeps after `context` tokens: "allmem" (constant), "swa" (constant), "full".

    The full cache holds keys and values, 2 Hkv D numbers per token and layer; layers that are local in the pretrained
    model hold at most their window.
    """
    if context < 1:
        raise ValueError(f"context={context} must be at least 1 token")
    per_token = 2 * config.n_kv_heads * config.head_dim * jnp.dtype(config.dtype).itemsize
    return {
        "allmem": state.state_bytes(config.replace(mixer="allmem")),
        "swa": state.state_bytes(config.replace(mixer="swa")),
        "full": per_token * sum(_visible(config, context, "full")),
    }


def flops_per_token(config: config_lib.ModelConfig, context: int, mixer: str | None = None) -> dict[str, int]:
    """Operations to decode one token after `context` tokens, by part.

    * projections: 2 per weight of attention and MLP, in every layer; head: 2 d V.
    * attention: scores and the weighted sum are 2 Hq D each per visible key, so 4 Hq D keys. Keys are `context` for
      full attention and min(context, window + sinks) for the windowed one.
    * memory, per layer: projections 2 d (3 F + 3 N + N + N) in and 2 F d out; convolutions 2 * 3 F K; the read is
      three products with the fast weights, 3 * 2 H D_m per head; the gradient at the token's key is three more
      (gate k, up k, down^T Gout) and three outer products added to the pending sum, 6 * 2 H D_m per head. Together
      18 N H D_m. Once per chunk come the rescaling of rows and the step, about 8 operations on 3 N H D_m weights:
      24 N H D_m / chunk.

    Training costs about three times the forward pass of the same length, four with rematerialisation.

    Args:
      config: the model.
      context: tokens seen, this one included.
      mixer: "full", "swa" or "allmem"; None means the config's.

    Returns:
      {"projections", "attention", "memory", "head"}; their sum is the cost of the token.
    """
    if context < 1:
        raise ValueError(f"context={context} must be at least 1 token")
    mixer = config.mixer if mixer is None else mixer
    c = config.replace(mixer=mixer)
    attention_weights = 2 * c.d_model * c.head_dim * (c.n_heads + c.n_kv_heads)
    weights = c.n_layers * (attention_weights + 3 * c.d_model * c.d_ff)
    memory = 0
    if mixer == "allmem":
        heads, channels = c.memory_heads, c.memory_heads * c.d_mem
        fast = heads * c.memory_hidden * c.d_mem
        projections = 2 * c.d_model * (4 * channels + 5 * heads)
        memory = projections + 6 * channels * c.conv_kernel + 18 * fast + 24 * fast // c.chunk
    return {
        "projections": 2 * weights,
        "attention": 4 * c.n_heads * c.head_dim * sum(_visible(c, context, mixer)),
        "memory": c.n_layers * memory,
        "head": 2 * c.d_model * c.vocab_size,
    }


def _visible(config: config_lib.ModelConfig, context: int, mixer: str) -> list[int]:
    """Keys that a query after `context` tokens sees, per layer."""
    keys = context if mixer == "full" else min(context, config.window + config.sinks)
    local = config.local_layers or (False,) * config.n_layers
    narrow = min(context, config.local_window or context)
    if mixer != "full":
        narrow = min(narrow, config.window)
    return [narrow if is_local else keys for is_local in local]

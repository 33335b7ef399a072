"""The language model: embedding, scanned decoder layers, head; and how its parameters split into backbone and memory.

B batch    L tokens    d model    V vocabulary    Y layers
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from allmem_jax.model import config as config_lib
from allmem_jax.model import decoder, functional, layers, sharding
from allmem_jax.model import state as state_lib
from pallas_kernels import backends, dots

Params = dict[str, Any]


class AllMemLM(nn.Module):
    """A decoder language model with the config's mixer (`config.MIXERS`); "full" is the original.

    The teacher of a converted model is this module with `config.replace(mixer="full")`, applied to the same backbone
    arrays; parameters of the memory that come along are ignored by the mixers without one.
    """

    config: config_lib.ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: jax.Array,
        *,
        lengths: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
        state: state_lib.DecodeState | None = None,
        window: jax.Array | int | None = None,
        sinks: jax.Array | int | None = None,
        return_hidden: bool = False,
    ) -> Any:
        """Logits of the next token at every position.

        Args:
          tokens: int32 [B, L].
          lengths: int32 [B], how many of each row's tokens are real, the rest being padding on the right. It matters
            with a state only: without one, no real token can see the padding.
          segment_ids: int32 [B, L], packed documents numbered from 1, 0 for padding. A new document starts from the
            initial weights of the memory and sees no key of another. Not together with `state`.
          state: what came before these tokens, from `init_state` or an earlier call, of this config's window, sinks and
            memory.
          window, sinks: replace the config's, and may be traced; not together with `state`.
          return_hidden: the final normalised hidden states [B, L, d] instead of logits.

        Returns:
          float32 [B, L, V] (or the hidden states); with `state`, a pair of that and the state afterwards.
        """
        c = self.config
        if state is not None and not (segment_ids is None and window is None and sinks is None):
            raise ValueError("segment_ids, window and sinks cannot be given together with state")
        if c.mixer == "full" and not (state is None and window is None and sinks is None):
            raise ValueError("mixer='full' has neither state, window nor sinks; use mixer='swa' with a wide window")
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers [B, L]; got {tokens.dtype} {list(tokens.shape)}")
        if state is not None:
            state_lib.check_state(c, tokens.shape[0], state)
        embed = nn.Embed(c.vocab_size, c.d_model, embedding_init=nn.initializers.normal(0.02), name="embed")
        table = embed.embedding
        x = jnp.take(sharding.whole_rows(table), tokens, axis=0).astype(c.dtype) * jnp.asarray(c.embed_scale, c.dtype)
        x = x if state is not None else sharding.over_tokens(x)
        position = past = None
        if state is not None:
            position, past = state.position, layers.of_state(state)
        sizes: Any = {"window": window, "sinks": sinks}
        shared = layers.seen(c, x.shape, position=position, lengths=lengths, segment_ids=segment_ids, **sizes)
        local = jnp.asarray(c.local_layers or (False,) * c.n_layers)
        stack = nn.scan(
            _rematerialised(c.remat),
            variable_axes={"params": 0, "intermediates": 0},
            variable_broadcast="kernels",
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            length=c.n_layers,
            check_constancy_invariants=False,  # or the layer is traced twice
        )
        after: Any
        given = past
        if past is not None and tokens.shape[1] == 1:
            given, shared = layers.of_one_token(past, shared)
        x, after = stack(c, name="layers")(x, (jnp.arange(c.n_layers), local, given), shared)
        x = layers.RMSNorm(c.norm_eps, c.norm_offset, name="final_norm")(x)
        result = x
        if not return_hidden and "kernels" in self.variables:
            result = logits(dict(self.variables), c, x)
        elif not return_hidden:
            result = functional.logits(x, table.T) if c.tie_embeddings else layers.Head(c.vocab_size, name="lm_head")(x)
        if state is None:
            return result
        assert past is not None
        after = layers.written(c, past, after, shared, layers.initial_weights(self.variables["params"]["layers"]))
        return result, state_lib.DecodeState(state.position + shared.lengths, **after._asdict(), sinks=c.sinks)


def _rematerialised(policy: str) -> Any:
    """The decoder layer, saving for its backward pass what `ModelConfig.remat` says."""
    if policy == "none":
        return decoder.DecoderLayer
    kinds = jax.checkpoint_policies
    attention = kinds.save_only_these_names(backends.ATTENTION)
    dots = kinds.save_from_both_policies(attention, kinds.dots_with_no_batch_dims_saveable)
    saved = {"layer": None, "attention": attention, "dots": dots}[policy]
    return nn.remat(decoder.DecoderLayer, prevent_cse=False, policy=saved)


def head_kernel(params: Params, config: config_lib.ModelConfig) -> jax.Array:
    """The output head [d, V]: the transposed embedding where the config ties them."""
    return params["embed"]["embedding"].T if config.tie_embeddings else params["lm_head"]["kernel"]


def random_params(config: config_lib.ModelConfig, seed: int = 0) -> Params:
    """Random parameters of the whole model, float32: traced, for a caller that says where they are to lie."""
    return AllMemLM(config).init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def init_params(config: config_lib.ModelConfig, seed: int = 0) -> Params:
    """Random parameters of the whole model, float32."""
    return jax.jit(random_params, static_argnums=(0, 1))(config, seed)


def init_memory(config: config_lib.ModelConfig, seed: int = 0) -> Params:
    """Random parameters of the memory alone, {"layers": {"memory": ...}}: what conversion adds to a backbone.

    It is the memory of the config's mixer, and that of "allmem" where the mixer has none.
    """
    tokens = jnp.zeros((1, 1), jnp.int32)
    config = config.replace(mixer=config.memory_mixer)
    return jax.jit(lambda key: split_params(AllMemLM(config).init(key, tokens)["params"])[1])(jax.random.key(seed))


def unstack(params: Params, *, dtype: str | None = None, donate: bool = False) -> Params:
    """The same parameters for a model that decodes, as `variables` takes them: on a CPU with kernels of their own.

    A loop over layers copies, on a CPU, what it takes of stacked kernels, and widens those in bfloat16 before each run:
    more work than the products of one token. So each layer's large kernels become arrays, [out, in] for `dots.turned`,
    one for all that multiply the same input (`layers.GROUPS`), under the name of the first; and a head that is widened
    parts that fit a cache. Parameters elsewhere come back as they are, and so do those that were unstacked before.

    Args:
      params: of the whole model.
      dtype: the config's; with "bfloat16" wider kernels, such as the memory's, are rounded once and not for each token.
      donate: deletes what it has copied, so that there is room for a large model.
    """
    if "kernels" in params or not all(map(_on_one_cpu, jax.tree.leaves(params))):
        return params
    flat = flax.traverse_util.flatten_dict(params)
    kernels: dict[Any, Any] = {}
    narrow = dtype == "bfloat16"

    def copied(paths: Sequence[Any], copies: Sequence[jax.Array]) -> None:
        kernels[paths[0]] = tuple(copies)
        leaves = [flat.pop(path) for path in paths]
        for leaf in leaves if donate else []:
            if isinstance(leaf, jax.Array):
                leaf.delete()

    for scope in sorted({path[:-2] for path in flat if path[0] == "layers"}):
        for group in layers.GROUPS:
            paths = [(*scope, f"{name}_proj", "kernel") for name in group]
            if all(path in flat for path in paths):
                of_layers = zip(*(np.asarray(flat[path]) for path in paths), strict=True)
                joined = (np.concatenate([one.T for one in each]) for each in of_layers)
                copied(paths, [jnp.asarray(one, jnp.bfloat16 if narrow else one.dtype) for one in joined])
                flat[paths[0]] = jnp.arange(len(kernels[paths[0]]))
    if "lm_head" in params:
        copied([("lm_head", "kernel")], _parts(np.asarray(flat["lm_head", "kernel"]).T))
    else:
        kernels["lm_head", "kernel"] = _parts(flat["embed", "embedding"])
    return {key: flax.traverse_util.unflatten_dict(value) for key, value in (("params", flat), ("kernels", kernels))}


def _on_one_cpu(leaf: Any) -> bool:
    if isinstance(leaf, jax.core.Tracer):
        return False
    if isinstance(leaf, jax.Array):
        return [device.platform for device in leaf.devices()] == ["cpu"]
    return jax.default_backend() == "cpu"


def _parts(head: Any) -> tuple[jax.Array, ...]:
    """The turned head [V, d] in equal parts [v, d]: one, or where it is widened of a million numbers, zeros last."""
    if head.dtype == jnp.float32 or dots.multiplies_bfloat16():
        return (jnp.asarray(head),)
    count = -(-head.size // 2**20)
    size = -(-len(head) // count)
    whole = np.pad(np.asarray(head), ((0, size * count - len(head)), (0, 0)))
    return tuple(map(jnp.asarray, np.split(whole, count)))


def variables(params: Params) -> dict[str, Any]:
    """What the model is applied to, from its parameters or from what `unstack` made of them."""
    return params if "kernels" in params else {"params": params}


def logits(params: Params, config: config_lib.ModelConfig, hidden: jax.Array) -> jax.Array:
    """float32 [..., V] of final hidden states [..., d], from the parameters or from what `unstack` made of them."""
    if "kernels" in params:
        return functional.logits(hidden, params["kernels"]["lm_head"]["kernel"])[..., : config.vocab_size]
    return functional.logits(hidden, head_kernel(params, config))


def split_params(params: Params) -> tuple[Params, Params]:
    """(backbone, memory): the frozen parameters, and those that distillation trains."""
    flat = flax.traverse_util.flatten_dict(params)
    memory = {path: leaf for path, leaf in flat.items() if path[:2] == ("layers", "memory")}
    backbone = {path: leaf for path, leaf in flat.items() if path not in memory}
    return flax.traverse_util.unflatten_dict(backbone), flax.traverse_util.unflatten_dict(memory)


def merge_params(backbone: Params, memory: Params) -> Params:
    """The inverse of `split_params`; copies no array."""
    flat = flax.traverse_util.flatten_dict(backbone) | flax.traverse_util.flatten_dict(memory)
    return flax.traverse_util.unflatten_dict(flat)

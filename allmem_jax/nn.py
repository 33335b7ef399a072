"""Layers for a Flax model of one's own: windowed attention with sinks, the memory, and both side by side.

They are Linen modules with plain arguments, named as in `ModelConfig`; `flax.nnx.bridge.ToNNX` makes NNX modules of
them. Each takes the normalised input of a pre-norm block, x [B, L, d], and returns what the block adds to its residual:

    x = x + allmem_jax.nn.Mixer(n_heads=4, head_dim=64, window=512, chunk=256, n_mem=4)(norm(x))

Without a state a call reads whole rows, as in training. With one, from `init_state` or an earlier call, it goes on
from there by any number of tokens, and returns the state afterwards too: rows read in pieces equal whole rows.

Parameters are plain float32 arrays, under "attention" and "memory" as in a layer of `AllMemLM`. Under `jax.set_mesh`
with axes named "data", "fsdp", "tensor" and "context", or some of them, every device calls the kernels on its own rows
and heads. On a mesh with other axes call the layers in a `jax.shard_map` over rows: the compiler cannot split a kernel.

    B batch    L tokens of the call    d features    S sinks    W window
"""

import dataclasses
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from allmem_jax.model import config as config_lib
from allmem_jax.model import layers, memory
from allmem_jax.model import state as state_lib

__all__ = ["Memory", "Mixer", "State", "WindowedAttention"]

# Of `ModelConfig`, what a layer has no use for, or does without.
_UNUSED: dict[str, Any] = dict(vocab_size=1, n_layers=1, d_ff=1, n_heads=1, head_dim=2, sinks=0)


class State(NamedTuple):
    """What a layer knows of its past, a pytree whose leaves are [B, ...]: copy it, save it, take rows of it.

    Attributes:
      position: int32 [B], tokens that each row has seen.
      layer: keys and values [B, S + W, heads, head_dim]; tails of the memory's convolutions, its float32 fast weights,
        and what waits to be written. None in the place of what a layer has not.
    """

    position: jax.Array
    layer: layers.LayerState


class _Layer(nn.Module, kw_only=True):
    """The call and the state, which the layers below have in common."""

    norm_eps: float = 1e-6
    dtype: Any = jnp.float32
    implementation: str | None = None
    _mixer: ClassVar[str]

    def init_state(self, batch: int) -> State:
        """The state of so many rows before their first token."""
        whole = state_lib.init_state(self._config(1), batch)
        first = jax.tree.map(lambda leaf: leaf[0], layers.of_state(whole))  # of one layer
        return State(whole.position, self._own(first))

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        state: State | None = None,
        *,
        lengths: jax.Array | None = None,
        segment_ids: jax.Array | None = None,
    ) -> Any:
        """Mixes the tokens of each row.

        Args:
          x: [B, L, d], floating, normalised.
          state: what came before x; None for rows that begin with it.
          lengths: int32 [B], how many tokens of each row are real, the rest being padding on the right. It matters with
            a state only: without one, no real token can see the padding.
          segment_ids: int32 [B, L], packed documents numbered from 1, 0 for padding, each read as if it were alone. Not
            together with `state`.

        Returns:
          [B, L, d] in `dtype`; with `state` a pair of that and the state afterwards.

        Raises:
          ValueError: an argument that does not fit, by name.
        """
        if x.ndim != 3 or not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"x must be floating [B, L, features]; got {x.dtype} {list(x.shape)}")
        c = self._config(x.shape[-1])
        position = past = None
        if state is not None:
            if segment_ids is not None:
                raise ValueError("segment_ids cannot be given together with state: pass documents one by one")
            like = jax.eval_shape(lambda: self.init_state(x.shape[0]))
            what = f"this {type(self).__name__} and {x.shape[0]} rows"
            state_lib.check_shapes(state, like, what, "use one of its own init_state, or of its earlier call")
            position, past = state
        shared = layers.seen(c, x.shape, position=position, lengths=lengths, segment_ids=segment_ids)
        out, new = self._mix(c, x.astype(c.dtype), past, shared)
        if state is None:
            return out
        init = layers.initial_weights(self.variables["params"])
        before, added, init = jax.tree.map(lambda leaf: leaf[None], (past, new, init))
        after = layers.written(c, before, added, shared, init)
        return out, State(state.position + shared.lengths, jax.tree.map(lambda leaf: leaf[0], after))

    def _config(self, d_model: int) -> config_lib.ModelConfig:
        """The config of a model of one such layer."""
        names = {field.name for field in dataclasses.fields(config_lib.ModelConfig)}
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        given = {name: value for name, value in values.items() if name in names and value is not None}
        given |= dict(d_model=d_model, mixer=self._mixer, dtype=jnp.dtype(self.dtype).name)
        fields = _UNUSED | given
        fields.setdefault("n_kv_heads", fields["n_heads"])
        fields.setdefault("window", fields.get("chunk"))
        return config_lib.ModelConfig(**fields)

    def _own(self, state: layers.LayerState) -> layers.LayerState:
        """The part of a state that this layer needs."""
        return state

    def _mix(
        self, c: config_lib.ModelConfig, x: jax.Array, past: layers.LayerState | None, shared: layers.Shared
    ) -> tuple[jax.Array, layers.LayerState]:
        """[B, L, d] -> the same, and what is new in the state; empty without `past`."""
        raise NotImplementedError


class _Attends(_Layer, kw_only=True):
    """Fields of `WindowedAttention`."""

    n_heads: int
    head_dim: int
    window: int
    n_kv_heads: int | None = None
    sinks: int = 0
    rope_theta: float | None = 10_000.0
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False

    def _attend(self, c, x, past, shared) -> tuple[jax.Array, tuple[Any, Any]]:
        if self.rope_theta is None:
            shared = shared._replace(rope=None)
        layer = layers.Attention(c, self.implementation, name="attention")
        out, new = layer(x, jnp.asarray(False), past, shared)
        return out, new or (None, None)


class _Remembers(_Layer, kw_only=True):
    """Fields of `Memory`."""

    chunk: int
    n_mem: int
    d_mem: int = 64
    mem_expansion: int = 2
    conv_kernel: int = 4
    read_out: str = "difference"
    qk_scale: str = "l2"
    alpha_init: float = 0.1
    lr_init: float = 0.02
    momentum_init: float = 0.5
    write: bool = True

    def _remember(self, c, x, past, shared) -> tuple[jax.Array, tuple[Any, Any, Any]]:
        out, new = memory.Memory(c, self.implementation, name="memory")(x, past, shared)
        return out, new or (None, None, None)


class WindowedAttention(_Attends, kw_only=True):
    """Causal attention in which a token sees the last `window` tokens and the first `sinks`, with rotary positions.

    Its state holds `sinks + window` keys and values, however many tokens it has seen.

    Attributes:
      n_heads, head_dim: of the queries.
      window: tokens that each sees, itself included.
      n_kv_heads: heads of keys and values, a divisor of `n_heads`; None means as many.
      sinks: first tokens of a row that every token sees.
      rope_theta: base of the rotary positions; None for none.
      qk_norm: an RMSNorm, with `norm_eps`, on the heads of queries and keys.
      qkv_bias, o_bias: biases of the projections.
      dtype: float32 or bfloat16, of activations, matmuls' inputs and results.
      implementation: of the kernels, see `pallas_kernels.swa_attention`; None means the best. Several tokens that come
        with a state have a kernel on TPUs alone.
    """

    _mixer = "swa"

    def _mix(self, c, x, past, shared):
        out, cached = self._attend(c, x, past, shared)
        return out, layers.LayerState(*cached, None, None)


class Memory(_Remembers, kw_only=True):
    """The memory that learns while it reads: fast weights in each head, updated after every chunk, and no positions.

    A token reads what was learned from the chunks before its own. The result is scaled by a parameter, alpha [d].

    Attributes:
      chunk: tokens between two updates.
      n_mem, d_mem: heads and their dimension.
      mem_expansion: hidden size of a head's fast weights over `d_mem`.
      conv_kernel: taps of the causal convolutions behind the projections.
      read_out: "difference", what the memory has learned, and nothing until then; or "full", with its initial weights
        (the paper).
      qk_scale: "l2" gives queries and keys unit norm, "rms" norm sqrt(d_mem).
      alpha_init: start of alpha; 0.0 leaves a model that gets this layer as it was.
      lr_init, momentum_init: start of the learning rate and momentum, which are computed from each token.
      write: False holds the learning rate at zero: the control that tells memory from adaptation.
      norm_eps: of the norms of queries and keys.
      dtype: float32 or bfloat16, of activations, matmuls' inputs and results; fast weights are always float32.
      implementation: of the kernel, see `pallas_kernels.ttt_memory`; None means the best.
    """

    _mixer = "allmem"

    def _own(self, state):
        return state._replace(keys=None, values=None)

    def _mix(self, c, x, past, shared):
        out, learned = self._remember(c, x, past, shared)
        return out, layers.LayerState(None, None, *learned)


class Mixer(_Attends, _Remembers, kw_only=True):
    """AllMem's mixer: windowed attention with sinks, and beside it the memory for what has left the window.

    It takes the arguments of `WindowedAttention` and of `Memory`, and one more. Where `window` is below `chunk`, which
    is warned of, some tokens are for a while seen by neither.

    Attributes:
      delay: write a token when it leaves the window, to within a chunk, and not as it comes: the memory then adds
        nothing within the window. The state keeps what waits.
    """

    delay: bool = False

    _mixer = "allmem"

    def _mix(self, c, x, past, shared):
        attended, cached = self._attend(c, x, past, shared)
        remembered, learned = self._remember(c, x, past, shared)
        return attended + remembered, layers.LayerState(*cached, *learned)

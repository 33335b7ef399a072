"""The model's mathematics as pure functions of arrays, with no parameters and no modules.

Only this file calls the kernels. Axes:

    B batch    L tokens of the call    d model    Hq, Hkv attention heads    D dimension of a head (of either kind)
    S sink slots    W window slots    N memory heads    K convolution taps    H hidden size of the fast weights
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

import pallas_kernels
from allmem_jax.model import config as config_lib
from allmem_jax.model import sharding
from pallas_kernels import conv, dots, norms
from pallas_kernels.swa import prefill, ring
from pallas_kernels.ttt import decode

# How arrays are split over rows and heads: [B, L, heads, ...], [B, ...], [B, heads, ...], and not at all.
TOKENS, ROWS = PartitionSpec("rows", None, "heads"), PartitionSpec("rows")
ROW_HEADS, EVERY = PartitionSpec("rows", "heads"), PartitionSpec()


def bits(tree: Any) -> Any:
    """A pytree with its arrays in bfloat16 as uint16."""
    return jax.tree.map(lambda x: _cast(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, tree)


def numbers(tree: Any) -> Any:
    """The inverse of `bits`."""
    return jax.tree.map(lambda x: _cast(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, tree)


_cast = jax.lax.bitcast_convert_type


def gated(gate: jax.Array, up: jax.Array, activation: str) -> jax.Array:
    """act(gate) * up, act being "silu" or "gelu_tanh"."""

    def product(gate, up):
        return (jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)) * up

    return norms.recomputed(product)(gate, up)


def linear(x: jax.Array, kernel: Any, bias: jax.Array | None = None, scale: jax.Array | None = None) -> jax.Array:
    """`affine` of x @ kernel in x's dtype, accumulated in float32. x [..., in], kernel [in, out].

    Where x has more rows than the kernel, `scale` is taken into the kernel, which costs less.
    """
    if scale is not None and x.size > kernel.shape[0] * x.shape[-1]:
        kernel, scale = kernel * scale, None
    return affine(dots.matmul(x, kernel), bias, scale).astype(x.dtype)


def affine(y: jax.Array, bias: jax.Array | None, scale: jax.Array | None) -> jax.Array:
    """y * scale + bias, of y [..., out] and what is not None of the others [out]."""
    y = y if scale is None else y * norms.per_channel(scale, y)
    return y if bias is None else y + norms.per_channel(bias, y)


def logits(hidden: jax.Array, head: jax.Array | tuple[jax.Array, ...]) -> jax.Array:
    """float32 [..., V] from hidden states [..., d] and the head [d, V], or its parts [v, d]; accumulated in float32."""
    return dots.in_turn(hidden, head) if isinstance(head, tuple) else dots.matmul(hidden, head)


def document_offsets(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of packed rows [B, L]: int32 tokens of the same document before each token, and bool whether it is the first."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    before = jnp.pad(segment_ids, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    first = before != segment_ids
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=1), first


def rope_frequencies(
    head_dim: int, theta: float, scaling: config_lib.RopeScaling | None = None
) -> tuple[jax.Array, float]:
    """Angular frequencies float32 [head_dim / 2] in radians per token, and the factor on cos and sin.

    The kinds of `scaling` follow Hugging Face's definitions; yarn is arXiv 2309.00071.
    """
    pairs = jnp.arange(0, head_dim, 2, dtype=jnp.float32)
    base = theta ** (-pairs / head_dim)
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.factor, 1.0
    if scaling.kind == "llama3":
        turns = scaling.original_length * base / (2 * math.pi)  # rotations within the pretraining context
        keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = jnp.clip(keep, 0.0, 1.0)
        return keep * base + (1 - keep) * base / scaling.factor, 1.0

    def pair_at(rotations: float) -> float:
        return head_dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_at(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_at(scaling.beta_slow)), head_dim - 1)
    ramp = jnp.clip((pairs / 2 - low) / max(high - low, 1e-3), 0.0, 1.0)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return ramp * base / scaling.factor + (1 - ramp) * base, factor


def rope_table(positions: jax.Array, frequencies: jax.Array, factor: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [B, L, D / 2], of int positions [B, L]."""
    angles = positions.astype(jnp.float32)[..., None] * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def _beside(implementation: str | None) -> str | None:
    """What makes the inputs of a kernel that `implementation` names: the same in plain JAX, else what serves."""
    return implementation if implementation in ("xla", "reference") else None


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: jax.Array | int,
    sinks: jax.Array | int,
    segment_ids: jax.Array | None,
    scale: float,
    norms: tuple[jax.Array | None, jax.Array | None] = (None, None),
    rope: tuple[jax.Array, jax.Array] | None = None,
    eps: float = 0.0,
    offset: float = 0.0,
    implementation: str | None = None,
) -> jax.Array:
    """Windowed attention with sinks over a whole row. q [B, L, Hq, D], k and v [B, L, Hkv, D] -> [B, L, Hq, D].

    q and k are normalised, each by its scale [D] in `norms`, and rotated by the table `rope` before, where those are
    not None. Under a mesh every device computes its own rows and heads; see `sharding.over_rows_and_heads`.
    """

    def kernel(q, k, v, segment_ids, norms, rope, *traced):
        size = dict(zip(names, traced, strict=True))
        options = dict(segment_ids=segment_ids, scale=math.log(2), implementation=implementation)
        other = _beside(implementation)
        turn = functools.partial(pallas_kernels.norm_rope, rope=rope, eps=eps, offset=offset, implementation=other)
        q = turn(q, norms[0], factor=scale * math.log2(math.e))  # so that kernels find scores in base 2
        return pallas_kernels.swa_attention(q, turn(k, norms[1], rows=True), v, **options, **(fixed | size))

    sizes = {"window": window, "sinks": sinks}
    fixed = {name: size for name, size in sizes.items() if isinstance(size, int)}
    names = tuple(name for name in sizes if name not in fixed)
    traced = tuple(jnp.asarray(sizes[name]) for name in names)
    where = (TOKENS, TOKENS, TOKENS, ROWS, EVERY, ROWS, *(EVERY,) * len(traced))
    arguments = (*(sharding.over_tokens(x, heads=True) for x in (q, k, v)), segment_ids, norms, rope, *traced)
    out = sharding.over_rows_and_heads(kernel, arguments, where, TOKENS, q.shape[0], k.shape[2])
    return sharding.over_tokens(out, heads=True)


def attend_cached(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    cache: tuple[jax.Array, jax.Array],
    position: jax.Array,
    lengths: jax.Array,
    *,
    sink_slots: int,
    window: jax.Array | int,
    sinks: jax.Array | int,
    scale: float,
    layer: jax.Array | None = None,
    implementation: str | None = None,
) -> jax.Array:
    """Attention of L new tokens to the ring cache of one layer and to each other; `write_cache` then adds them to it.

    Arguments and result are those of `ring.attend`, with `cache` the keys and values in any dtype, and q and k rotated
    to their absolute positions. One token a row is decoded by `pallas_kernels.swa_decode`, which `layer` is for, with
    which `cache` is that of all layers, or its `bits`. Under a mesh as `attend`.
    """

    def local(q, k, v, keys, values, position, lengths, window, sinks, layer):
        sizes: Any = dict(sink_slots=sink_slots, window=window, sinks=sinks, scale=scale, implementation=implementation)
        if keys.dtype == jnp.uint16:
            own = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (keys, values))
            (keys, values), layer = numbers(tuple(own)), None
        held = keys.astype(k.dtype), values.astype(v.dtype)
        if q.shape[1] == 1:
            one = q[:, 0], k[:, 0], v[:, 0], *held, position
            return pallas_kernels.swa_decode(*one, layer=layer, **sizes)[:, None]
        return prefill.attend(q, k, v, *held, position, lengths, **sizes)

    held = TOKENS if layer is None else PartitionSpec(None, *TOKENS)
    arguments = (q, k, v, *cache, position, lengths, jnp.asarray(window), jnp.asarray(sinks), layer)
    where = (TOKENS, TOKENS, TOKENS, held, held, ROWS, ROWS, *(EVERY,) * 3)
    return sharding.over_rows_and_heads(local, arguments, where, TOKENS, q.shape[0], k.shape[2])


def write_cache(
    cache: jax.Array, new: jax.Array, position: jax.Array, lengths: jax.Array, sink_slots: int
) -> jax.Array:
    """`ring.write`, under a mesh by every device on its own rows and heads; both may be `bits`.

    It is done once for all layers, and not in each, so that a loop over layers does not write whole caches anew.
    """
    tokens, rows = PartitionSpec(None, "rows", None, "heads"), PartitionSpec("rows")
    where, arguments = (tokens, tokens, rows, rows), (cache, new, position, lengths)
    write = functools.partial(ring.write, sink_slots=sink_slots)
    return sharding.over_rows_and_heads(write, arguments, where, tokens, cache.shape[1], cache.shape[3])


def delayed(
    x: jax.Array,
    lag: jax.Array | int,
    waiting: jax.Array | None = None,
    position: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """x[t - lag] at every token t.

    Args:
      x: [B, L, F].
      lag: not negative; with `waiting` R.
      waiting: [B, R, F], the last R tokens before x, token p in slot p % R, or that of x alone, if x is one
        token; None for the start of a sequence.
      position: int32 [B], tokens before x; with `waiting` only.
      segment_ids: int32 [B, L] of packed documents; without `waiting` only.

    Returns:
      [B, L, F], and bool [B, L]: whether there is such a token, and it is of the same document. Elsewhere the first is
      arbitrary but finite.
    """
    steps = jnp.arange(x.shape[1], dtype=jnp.int32)
    if waiting is None:
        there = jnp.broadcast_to(steps >= lag, x.shape[:2])
        if segment_ids is not None:
            there &= _later(segment_ids[..., None], lag)[..., 0] == segment_ids
        return _later(x, lag), there
    assert position is not None
    slots_held = waiting.shape[1]
    came = position[:, None] + steps - lag  # [B, L]
    index = jnp.where(steps < lag, came % slots_held, slots_held + steps - lag)
    source = waiting if x.shape[1] <= slots_held else jnp.concatenate([waiting, x.astype(waiting.dtype)], axis=1)
    return jnp.take_along_axis(source, index[..., None], axis=1).astype(x.dtype), came >= 0


def _later(x: jax.Array, lag: jax.Array | int) -> jax.Array:
    """x [B, L, F] moved by `lag` tokens to the right, zeros before it."""
    length = x.shape[1]
    padded = jnp.pad(x, ((0, 0), (length, 0), (0, 0)))
    return jax.lax.dynamic_slice_in_dim(padded, length - jnp.minimum(lag, length), length, axis=1)


def causal_conv(
    x: jax.Array, kernel: jax.Array, tail: jax.Array | None, segment_ids: jax.Array | None = None
) -> jax.Array:
    """Depthwise causal convolution in plain JAX: y[t] = sum_j kernel[K - 1 - j] * x[t - j].

    Args:
      x: [B, L, F]; kernel: [K, F].
      tail: [B, K - 1, F], the K - 1 inputs before this call; None for the start of a sequence (zeros).
      segment_ids: int32 [B, L]; taps in another document count as zero.

    Returns:
      [B, L, F] in x's dtype.
    """
    return conv.plain(x, kernel, tail, None if segment_ids is None else conv.reach_of(segment_ids, kernel.shape[0]))


def conv_norm(
    x: jax.Array,
    kernel: jax.Array,
    scale: jax.Array | None,
    tail: jax.Array | None,
    segment_ids: jax.Array | None,
    *,
    norm: float,
    eps: float,
    implementation: str | None = None,
) -> jax.Array:
    """`causal_conv` of x [B, L, N, D] by kernel [K, N D], and unless scale [D] is None its `norms.rms_norm`.

    Without a tail it is a kernel; under a mesh then as `attend`.
    """
    if tail is not None:
        y = causal_conv(x.reshape(*x.shape[:2], -1), kernel, tail).reshape(x.shape)
        return y if scale is None else norms.rms_norm(y, scale, eps, norm=norm)

    def local(x, kernel, scale, segment_ids):
        options: Any = dict(norm=norm, eps=eps, segment_ids=segment_ids, implementation=_beside(implementation))
        return pallas_kernels.conv_norm(x, kernel, scale, **options)

    arguments = sharding.over_tokens(x, heads=True), kernel.reshape(-1, *x.shape[2:]), scale, segment_ids
    where = TOKENS, PartitionSpec(None, "heads"), EVERY, ROWS
    return sharding.over_rows_and_heads(local, arguments, where, TOKENS, x.shape[0], x.shape[2])


def conv_tail(x: jax.Array, tail: jax.Array, lengths: jax.Array) -> jax.Array:
    """The last K - 1 real inputs of each row, [B, K - 1, F], after `lengths` [B] more of x [B, L, F]."""
    padded = jnp.concatenate([tail, x.astype(tail.dtype)], axis=1)
    index = lengths[:, None] + jnp.arange(tail.shape[1], dtype=jnp.int32)
    return jnp.take_along_axis(padded, index[..., None], axis=1)


def remember(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    init: pallas_kernels.FastWeights,
    state: pallas_kernels.MemoryState | None,
    *,
    chunk: int,
    valid: jax.Array | None,
    reset: jax.Array | None,
    read_out: str = "full",
    implementation: str | None = None,
) -> tuple[jax.Array, pallas_kernels.MemoryState]:
    """The memory's read-outs [B, L, N, D] and its state afterwards; see `pallas_kernels.ttt_memory`.

    Under a mesh every device computes its own rows and heads; see `sharding.over_rows_and_heads`.
    """

    def kernel(q, k, v, lr, momentum, init, state, valid, reset):
        options = dict(chunk_size=chunk, valid=valid, reset=reset, read_out=read_out, implementation=implementation)
        return pallas_kernels.ttt_memory(q, k, v, lr, momentum, init, state, **options)

    after = pallas_kernels.MemoryState._make((ROW_HEADS, ROW_HEADS, ROW_HEADS, ROW_HEADS, ROWS))
    before = None if state is None else after
    where = (TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, PartitionSpec("heads"), before, ROWS, ROWS)
    rates = (sharding.over_tokens(x, heads=True) for x in (lr, momentum))
    arguments = (q, k, v, *rates, init, state, valid, reset)
    out, state = sharding.over_rows_and_heads(kernel, arguments, where, (TOKENS, after), q.shape[0], q.shape[2])
    return sharding.over_tokens(out, heads=True), state


def remember_one(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    lr: jax.Array,
    momentum: jax.Array,
    init: pallas_kernels.FastWeights,
    state: pallas_kernels.MemoryState,
    fresh: jax.Array,
    *,
    read_out: str = "full",
) -> tuple[jax.Array, decode.TokenGradient]:
    """`remember` of one token a row, [B, 1, N, ...], of which `write_memory` writes what comes second.

    Rows of bool `fresh` [B] have seen no token yet and read the initial weights. Under a mesh as `remember`.
    """

    def local(q, k, v, lr, momentum, init, weights, fresh):
        weights = started(weights, jax.tree.map(lambda leaf: leaf[None], init), fresh)
        q, k, v, lr, momentum = (x[:, 0] for x in (q, k, v, lr, momentum))
        out, gradient = decode.read(q, k, v, lr, momentum, init, weights, read_out=read_out)
        return out[:, None], gradient

    where = (TOKENS, TOKENS, TOKENS, TOKENS, TOKENS, PartitionSpec("heads"), ROW_HEADS, ROWS)
    arguments = (q, k, v, lr, momentum, init, state.weights, fresh)
    return sharding.over_rows_and_heads(local, arguments, where, (TOKENS, ROW_HEADS), q.shape[0], q.shape[2])


def write_memory(
    state: pallas_kernels.MemoryState,
    init: pallas_kernels.FastWeights,
    token: decode.TokenGradient,
    fresh: jax.Array,
    valid: jax.Array,
    chunk: int,
) -> pallas_kernels.MemoryState:
    """`decode.write`, once for all layers, under a mesh by every device on its own rows and heads."""
    leaf, rows = PartitionSpec(None, "rows", "heads"), PartitionSpec("rows")
    after = pallas_kernels.MemoryState._make((leaf, leaf, leaf, leaf, PartitionSpec(None, "rows")))
    where, arguments = (after, PartitionSpec(None, "heads"), leaf, rows, rows), (state, init, token, fresh, valid)
    write = functools.partial(decode.write, chunk_size=chunk)
    return sharding.over_rows_and_heads(write, arguments, where, after, *state.momentum_sum.shape[1:])


def started(state: Any, first: Any, fresh: jax.Array) -> Any:
    """`state`, leaves [B, ...], with the rows of bool `fresh` [B], those that have seen no token yet, from `first`."""

    def choose(new: jax.Array, old: jax.Array) -> jax.Array:
        return jnp.where(fresh.reshape((-1,) + (1,) * (old.ndim - 1)), new, old)

    return jax.tree.map(choose, first, state)

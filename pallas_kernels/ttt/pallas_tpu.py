"""The memory as TPU kernels: fast weights stay in VMEM for the whole sequence, tokens stream through in blocks.

Axes: B batch, L tokens, N heads, P heads of a pack, D head dim, H hidden, C = P D and F = P H columns of a pack,
K blocks of T tokens, V visits, S slots, R rows of `rates`.

Heads are packed until they fill 128 lanes, their weights in the diagonal blocks of one matrix; all three weights are
kept as [D, H] (gate and up transposed). One call goes through the visits of `pallas_kernels.ttt.visits` in order; the
backward call goes through them in reverse and computes everything again, from the weights and the momentum that the
forward call left in a slot for each update.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.ttt import visits
from pallas_kernels.ttt.types import FastWeights, MemoryState

EPSILON = 1e-12  # added to squared row norms
LANES = 128
SEMANTICS: tuple[Any, ...] = ("parallel", "parallel", "arbitrary")


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes that decide speed and never the result.

    Attributes:
      forward, backward: most tokens of a block in each pass, for packs of up to 256 hidden units, and half of it for
        more; a multiple of 32.
      vmem_bytes: what a kernel may use.
    """

    forward: int = 512
    backward: int = 256
    vmem_bytes: int = 96 * 2**20

    def __post_init__(self):
        for name in ("forward", "backward"):
            if (tokens := getattr(self, name)) < 32 or tokens % 32:
                raise ValueError(f"{name}={tokens} must be a positive multiple of 32")
        if self.vmem_bytes < 2**20:
            raise ValueError(f"vmem_bytes={self.vmem_bytes} is less than a MiB")


@dataclasses.dataclass(frozen=True)
class Layout:
    """Static description of one call: what the arrays are padded and cut to.

    Attributes:
      pack: heads of a pack, P.
      heads, dim, hidden: after padding; heads is a multiple of P.
      tokens: T, of a block.
      blocks: K.
      phases: that can occur in a block, 1 to 3.
      slots: S, more than the updates of any row.
      vmem_bytes: limit of the kernels.
    """

    pack: int
    heads: int
    dim: int
    hidden: int
    tokens: int
    blocks: int
    phases: int
    slots: int
    vmem_bytes: int

    @property
    def wide(self) -> tuple[int, int]:
        """(C, F), a pack's columns of tokens and of hidden units."""
        return self.pack * self.dim, self.pack * self.hidden


def make_layout(shape, hidden: int, chunk_size: int, single: bool, resets: bool, most: int, vmem_bytes: int) -> Layout:
    """Returns the layout of one pass.

    Args:
      shape: of q.
      hidden: H.
      chunk_size: tokens per update.
      single: promise that all rows begin with a chunk and go on without padding and documents.
      resets: whether documents can begin.
      most: tokens of a block, from `Tiles`.
      vmem_bytes: from `Tiles`.
    """
    _, length, heads, dim = shape
    pack = heads
    if heads * dim > LANES:
        dim = max(1 << (dim - 1).bit_length(), 8) if dim < LANES else -(-dim // LANES) * LANES
        pack = max(LANES // dim, 1)
    tokens = _block_tokens(min(chunk_size, length), chunk_size, most if pack * hidden <= 256 else most // 2)
    blocks = -(-length // tokens)
    aligned = single and (chunk_size % tokens == 0 or blocks == 1)
    phases = 1 if aligned else 3 if resets else 2
    slots = (length + chunk_size - 1) // chunk_size + 1
    heads = -(-heads // pack) * pack
    return Layout(pack, heads, dim, hidden, tokens, blocks, phases, slots, vmem_bytes)


def _block_tokens(limit: int, chunk_size: int, most: int) -> int:
    """Returns the largest block up to `most` that divides the chunk, or just the largest."""
    if limit <= most:
        return limit
    fitting = [t for t in range(most, 15, -16) if chunk_size % t == 0]
    return fitting[0] if fitting else most


def why_not(dtype) -> str | None:
    """Returns why tokens of this dtype cannot be served, or None."""
    if dtype in (jnp.float32, jnp.bfloat16):
        return None
    return f"the TPU kernels take float32 and bfloat16, and q is {jnp.dtype(dtype).name}"


def forward(chunk_size, aligned, tokens, init, state, valid, reset, *, tiles=Tiles(), save=True):
    """Returns (out [B, L, N, D], state) and what `backward` needs; arguments as in `xla.forward`.

    Args:
      chunk_size, aligned, tokens, init, state, valid, reset: as in `xla.forward`.
      tiles: sizes of blocks.
      save: whether `backward` will be called; without, the residuals are None.
    """
    q, k, v, lr, momentum = tokens
    single = aligned and valid is None and reset is None
    layout = make_layout(
        q.shape, init.gate.shape[-2], chunk_size, single, reset is not None, tiles.forward, tiles.vmem_bytes
    )
    plan = _plan(layout, chunk_size, q.shape[:2], valid, reset, state.count)
    work = visits.make_visits(plan, layout.phases)
    means, momentum_sum = _means(layout, chunk_size, plan, momentum, state.momentum_sum)
    arrays = [*(_to_blocks(layout, x) for x in (q, k, v)), _rates(layout, plan, lr), _to_lanes(layout, means)]
    arrays += [_to_fast(layout, x) for x in (init, state.weights, state.velocity, state.pending)]

    out, *fast = _call_forward(layout, save, work, arrays)
    saved, (weights, velocity, pending) = fast[:-3], (_from_fast(x, init.gate.shape) for x in fast[-3:])
    out = _from_blocks(layout, out, q.shape, valid)
    result = out, MemoryState(weights, velocity, pending, momentum_sum, plan.count)
    return result, (tokens, init, valid, reset, state.momentum_sum, state.count, saved) if save else None


def backward(chunk_size, aligned, residuals, cotangents, *, tiles=Tiles()):
    """Returns the cotangents of (tokens, init, state) from those of (out, state)."""
    tokens, init, valid, reset, momentum_sum, count, saved = residuals
    d_out, d_state = cotangents
    q, k, v, lr, momentum = tokens
    single = aligned and valid is None and reset is None
    layout = make_layout(
        q.shape, init.gate.shape[-2], chunk_size, single, reset is not None, tiles.backward, tiles.vmem_bytes
    )
    plan = _plan(layout, chunk_size, q.shape[:2], valid, reset, count)
    work = visits.make_visits(plan, layout.phases)
    (means, _), pull_means = jax.vjp(lambda m, s: _means(layout, chunk_size, plan, m, s), momentum, momentum_sum)
    d_out = d_out if valid is None else jnp.where(valid[:, :, None, None], d_out, 0)
    arrays = [*(_to_blocks(layout, x) for x in (q, k, v, d_out)), _rates(layout, plan, lr), _to_lanes(layout, means)]
    arrays += [_to_fast(layout, init), *saved, *(_to_fast(layout, x) for x in d_state[:3])]

    *d_tokens, d_rates, d_means, d_weights, d_velocity, d_pending, d_init = _call_backward(layout, work, arrays)
    d_q, d_k, d_v = (_from_blocks(layout, x, q.shape, valid) for x in d_tokens)
    d_lr = _from_rates(layout, plan, d_rates, lr)
    d_means = jnp.where(plan.update[..., None], _from_lanes(layout, d_means, q.shape[2]), 0)
    d_momentum, d_momentum_sum = pull_means((d_means, d_state.momentum_sum))
    shape = init.gate.shape
    d_init = jax.tree.map(lambda d, w: d.sum(0).astype(w.dtype), _from_fast(d_init, shape), init)
    d_floats = (_from_fast(x, shape) for x in (d_weights, d_velocity, d_pending))
    no_cotangent: Any = np.zeros(count.shape, jax.dtypes.float0)
    d_state = MemoryState._make((*d_floats, d_momentum_sum, no_cotangent))
    return (d_q, d_k, d_v, d_lr, d_momentum), d_init, d_state


# The kernels.


def _forward_kernel(layout, save, words, slots, total, *refs):
    """One visit: reads with the weights in scratch, adds to the pending gradient, and ends the chunk where told."""
    del slots, total
    q, k, v, rates, mu, init, *start = refs[:9]
    out, *outputs = refs[9:-5]
    saved, end = outputs[:-3], outputs[-3:]
    weights, velocity, pending, first, cast = refs[-5:]
    step = pl.program_id(2)
    word = words[pl.program_id(0), step]
    has = functools.partial(_has, word)

    @pl.when(step == 0)
    def _():
        for scratch, ref in zip((weights, velocity, pending, first), (*start, init), strict=True):
            _pack(layout, scratch, ref)

    @pl.when(has(visits.FRESH))
    def _():
        weights[...] = first[...]
        velocity[...] = jnp.zeros_like(velocity)
        pending[...] = jnp.zeros_like(pending)

    @pl.when(has(visits.ENTERS))
    def _():
        normalised = _normalise(weights[...], first[...])
        cast[0], cast[1] = weights[...].astype(cast.dtype), normalised.astype(cast.dtype)
        if save:

            @pl.when(jnp.logical_not(has(visits.INITIAL)))
            def _():
                for ref, scratch in zip(saved, (weights, velocity), strict=True):
                    _unpack(layout, ref, scratch[...])

    @pl.when(has(visits.ACTIVE))
    def _():
        read = _read(cast[0], q[0, 0])
        if layout.phases == 1:
            out[0, 0] = read.astype(out.dtype)
        else:
            mine = _phase_column(layout, rates[0, 0, 0], word)
            keep = jnp.logical_and(jnp.logical_not(has(visits.OPENS)), jnp.logical_not(mine))
            out[0, 0] = jnp.where(keep, out[0, 0], read.astype(out.dtype))
        lr = _expand_rates(layout, _own_rates(layout, rates[0, 0, 0], word), q.dtype)
        pending[...] += _gradient(layout, cast[1], k[0, 0], v[0, 0], lr)

    @pl.when(has(visits.UPDATE))
    def _():
        moved = mu[0, 0, 0] * velocity[...] - _diagonal(layout, pending[...])
        weights[...] = _normalise(weights[...], first[...]) + moved
        velocity[...] = moved
        pending[...] = jnp.zeros_like(pending)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for ref, scratch in zip(end, (weights, velocity, pending), strict=True):
            _unpack(layout, ref, scratch[...])


def _backward_kernel(layout, words, slots, total, *refs):
    """One visit in reverse: cotangents of what follows are in scratch."""
    del slots
    q, k, v, d_out, rates, mu, init, weights, velocity, *d_end = refs[:12]
    d_q, d_k, d_v, d_rates, d_mu, *d_start = refs[12:21]
    d_weights, d_normalised, d_velocity, d_pending, d_first, first, current, cast = refs[21:]
    d_weights_out, d_velocity_out, d_pending_out, d_init_out = d_start
    step = pl.program_id(2)
    word = words[pl.program_id(0), total[0] - 1 - step]
    has = functools.partial(_has, word)

    @pl.when(step == 0)
    def _():
        for scratch, ref in zip((d_weights, d_velocity, d_pending, first), (*d_end, init), strict=True):
            _pack(layout, scratch, ref)
        d_normalised[...] = jnp.zeros_like(d_normalised)
        d_first[...] = jnp.zeros_like(d_first)
        cast[2] = d_pending[...].astype(cast.dtype)

    @pl.when(has(visits.LEAVES))
    def _():
        _pack(layout, current, weights)

        @pl.when(has(visits.INITIAL))
        def _():
            current[...] = first[...]

        normalised = _normalise(current[...], first[...])
        cast[0], cast[1] = current[...].astype(cast.dtype), normalised.astype(cast.dtype)

    @pl.when(has(visits.CLOSES))
    def _():
        for ref in (d_q, d_k, d_v, d_rates, d_mu):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(has(visits.UPDATE))
    def _():
        moved = _diagonal(layout, d_velocity[...] + d_weights[...])
        for p in range(layout.pack):
            rows, columns = _block_of(layout, p)
            old = jnp.where(has(visits.INITIAL), 0.0, velocity[0, p, 0])
            part = jnp.sum(moved[:, rows, columns] * old, axis=(0, 1))
            d_mu[0, 0, 0, 0, columns] = part
        d_normalised[...] = d_weights[...]
        d_weights[...] = jnp.zeros_like(d_weights)
        d_velocity[...] = mu[0, 0, 0] * moved
        d_pending[...] = -moved
        cast[2] = (-moved).astype(cast.dtype)

    @pl.when(has(visits.ACTIVE))
    def _():
        lr = _expand_rates(layout, _own_rates(layout, rates[0, 0, 0], word), q.dtype)
        d_read = d_out[0, 0]
        if layout.phases > 1:
            d_read = jnp.where(_phase_column(layout, rates[0, 0, 0], word), d_read, jnp.zeros_like(d_read))
        part, d_w = _read_backward(cast[0], q[0, 0], d_read)
        d_weights[...] += d_w
        d_q[0, 0] += part.astype(d_q.dtype)
        parts, d_w = _gradient_backward(layout, cast[1], cast[2], k[0, 0], v[0, 0], lr)
        d_normalised[...] += d_w
        d_k[0, 0] += parts[0].astype(d_k.dtype)
        d_v[0, 0] += parts[1].astype(d_v.dtype)
        d_rates[0, 0, 0] += _own_rates(layout, parts[2], word, rates[0, 0, 0])

    @pl.when(has(visits.ENTERS))
    def _():
        _, pullback = jax.vjp(_normalise, current[...], first[...])
        d_w, d_w0 = pullback(_diagonal(layout, d_normalised[...]))
        d_weights[...] += d_w
        d_first[...] += d_w0
        d_normalised[...] = jnp.zeros_like(d_normalised)

    @pl.when(has(visits.FRESH))
    def _():
        d_first[...] += d_weights[...]
        for ref in (d_weights, d_velocity, d_pending):
            ref[...] = jnp.zeros_like(ref)
        cast[2] = jnp.zeros(cast.shape[1:], cast.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        ends = (d_weights_out, d_velocity_out, d_pending_out, d_init_out)
        for ref, scratch in zip(ends, (d_weights, d_velocity, d_pending, d_first), strict=True):
            _unpack(layout, ref, scratch[...])


# What the kernels compute for a block of tokens. Weights w are [3, C, F] in the dtype of the tokens.


def _read(w, q):
    """Returns f(W, q) [T, C], float32."""
    gate, up = _dot("tc,cf->tf", q, w[0]), _dot("tc,cf->tf", q, w[1])
    hidden = jax.nn.silu(gate) * up
    return _dot("tf,cf->tc", hidden.astype(q.dtype), w[2]) + q


def _read_backward(w, q, d_out):
    """Returns the cotangents of q and of w [3, C, F], float32."""
    gate, up = _dot("tc,cf->tf", q, w[0]), _dot("tc,cf->tf", q, w[1])
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_hidden = _dot("tc,cf->tf", d_out, w[2])
    d_gate = (d_hidden * up * (sigmoid + silu * (1 - sigmoid))).astype(q.dtype)
    d_up = (d_hidden * silu).astype(q.dtype)
    hidden = (silu * up).astype(q.dtype)
    d_q = d_out + _dot("tf,cf->tc", d_gate, w[0]) + _dot("tf,cf->tc", d_up, w[1])
    d_w = (_dot("tc,tf->cf", x, y) for x, y in ((q, d_gate), (q, d_up), (d_out, hidden)))
    return d_q, jnp.stack(tuple(d_w))


def _gradient(layout, w, k, v, lr):
    """Returns the gradient [3, C, F] of sum_t -lr_t <f(W, k_t), v_t>; lr [T, 3 C] has a rate for each weight."""
    gate, up = _dot("tc,cf->tf", k, w[0]), _dot("tc,cf->tf", k, w[1])
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    d_hidden = -_dot("tc,cf->tf", v, w[2])
    d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
    d_up = d_hidden * silu
    hidden = -silu * up
    parts = zip(_scaled(layout, k, v, lr), (d_gate, d_up, hidden), strict=True)
    return jnp.stack([_dot("tc,tf->cf", x, y.astype(k.dtype)) for x, y in parts])


def _gradient_backward(layout, w, d_g, k, v, lr):
    """Returns the cotangents of k, v and rates [R, T], and of w [3, C, F], from that of the gradient, d_g [3, C, F]."""
    dtype = k.dtype
    gate, up = _dot("tc,cf->tf", k, w[0]), _dot("tc,cf->tf", k, w[1])
    sigmoid = jax.nn.sigmoid(gate)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1 - sigmoid)
    curve = sigmoid * (1 - sigmoid) * (2 + gate * (1 - 2 * sigmoid))  # derivative of the slope
    d_hidden = -_dot("tc,cf->tf", v, w[2])
    parts = tuple(x.astype(dtype) for x in (d_hidden * up * slope, d_hidden * silu, -silu * up))

    x_gate, x_up, x_down = (_dot("tc,cf->tf", x, d_g[i]) for i, x in enumerate(_scaled(layout, k, v, lr)))
    dd_hidden = x_gate * up * slope + x_up * silu
    d_up = (x_gate * d_hidden * slope - x_down * silu).astype(dtype)
    d_gate = (x_gate * d_hidden * up * curve + (x_up * d_hidden - x_down * up) * slope).astype(dtype)
    dd_hidden = (-dd_hidden).astype(dtype)

    y = [_dot("tf,cf->tc", part, d_g[i]) for i, part in enumerate(parts)]
    rate = _thirds(layout, lr)
    d_k = rate[0] * y[0] + rate[1] * y[1] + _dot("tf,cf->tc", d_gate, w[0]) + _dot("tf,cf->tc", d_up, w[1])
    d_v = rate[2] * y[2] + _dot("tf,cf->tc", dd_hidden, w[2])
    products = jnp.concatenate([k * y[0], k * y[1], v * y[2]], axis=1).astype(dtype)
    d_rates = _dot("rc,tc->rt", _columns_of_rates(layout, dtype), products)
    d_w = (_dot("tc,tf->cf", x, z) for x, z in ((k, d_gate), (k, d_up), (v, dd_hidden)))
    return (d_k, d_v, d_rates), jnp.stack(tuple(d_w))


def _scaled(layout, k, v, lr):
    """Returns k, k and v [T, C], each times the rate of one weight."""
    rate = _thirds(layout, lr)
    return tuple((x * r).astype(x.dtype) for x, r in zip((k, k, v), rate, strict=True))


def _thirds(layout, lr):
    width, _ = layout.wide
    return tuple(lr[:, i * width : (i + 1) * width] for i in range(3))


def _normalise(w, first):
    """Rescales every row of the weights to its norm in `first`; the rows of gate and up are columns here."""
    parts = []
    for i, axis in enumerate((0, 0, 1)):
        square, square0 = (jnp.sum(x[i] * x[i], axis=axis, keepdims=True) + EPSILON for x in (w, first))
        parts.append(w[i] * jnp.sqrt(square0 / square))
    return jnp.stack(parts)


def _diagonal(layout, x):
    """Zeros what lies between different heads of x [3, C, F]."""
    if layout.pack == 1:
        return x
    shape = layout.wide
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0) // layout.dim
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1) // layout.hidden
    return jnp.where(row == column, x, 0.0)


def _own_rates(layout, values, word, rates=None):
    """Zeros the rates of tokens that belong to other visits; `values` [R, T] may be cotangents of `rates`."""
    if layout.phases == 1:
        return values
    phase = (values if rates is None else rates)[3 * layout.pack : 3 * layout.pack + 1]
    return jnp.where(phase == ((word >> visits.PHASE) & 3).astype(jnp.float32), values, 0.0)


def _phase_column(layout, rates, word):
    """Returns [T, 1], true for the tokens of this visit."""
    phase = jnp.swapaxes(rates, 0, 1)[:, 3 * layout.pack : 3 * layout.pack + 1]
    return phase == ((word >> visits.PHASE) & 3).astype(jnp.float32)


def _expand_rates(layout, rates, dtype):
    """[R, T] -> [T, 3 C], each rate on all columns of its head."""
    return _dot("rt,rc->tc", rates.astype(dtype), _columns_of_rates(layout, dtype))


def _columns_of_rates(layout, dtype):
    """Returns [R, 3 C], one where a rate belongs to a column."""
    shape = (_rate_rows(layout), 3 * layout.wide[0])
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return (row == column // layout.dim).astype(jnp.float32).astype(dtype)


def _dot(spec, x, y):
    """A product of two matrices, written as einsum does, accumulated in float32."""
    (a, b), out = spec.split("->")[0].split(","), spec.split("->")[1]
    (shared,) = set(a) & set(b) - set(out)
    dimensions = (((a.index(shared),), (b.index(shared),)), ((), ()))
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _has(word, bit):
    return (word & bit) != 0


def _block_of(layout, p):
    """Returns where head p lies in a pack's [C, F]."""
    return slice(p * layout.dim, (p + 1) * layout.dim), slice(p * layout.hidden, (p + 1) * layout.hidden)


def _pack(layout, scratch, ref):
    """Copies weights [1, P, 1, 3, D, H] to the diagonal of scratch [3, C, F]."""
    if layout.pack > 1:
        scratch[...] = jnp.zeros_like(scratch)
    for p in range(layout.pack):
        rows, columns = _block_of(layout, p)
        scratch[:, rows, columns] = ref[0, p, 0]


def _unpack(layout, ref, x):
    """Copies the diagonal of x [3, C, F] to weights [1, P, 1, 3, D, H]."""
    for p in range(layout.pack):
        rows, columns = _block_of(layout, p)
        ref[0, p, 0] = x[:, rows, columns]


# How the kernels are called.


def _call_forward(layout, save, work, arrays):
    batch, dtype = arrays[0].shape[0], arrays[0].dtype
    token, rate, lane, fast, slot = _specs(layout, lambda step, total: step)
    fixed = _fast_shape(layout, batch, 1)
    shapes = [jax.ShapeDtypeStruct(arrays[0].shape, dtype)]
    shapes += [_fast_shape(layout, batch, layout.slots)] * 2 * save + [fixed] * 3
    return pl.pallas_call(
        functools.partial(_forward_kernel, layout, save),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=_grid(layout, batch, work),
            in_specs=[token] * 3 + [rate, lane, fast(shared=True)] + [fast()] * 3,
            out_specs=[token] + [slot] * 2 * save + [fast()] * 3,
            scratch_shapes=[*[_weights(layout)] * 4, _weights(layout, 2, dtype)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=layout.vmem_bytes),
        name="ttt_memory_forward",
    )(*work, *arrays)


def _call_backward(layout, work, arrays):
    batch, dtype = arrays[0].shape[0], arrays[0].dtype
    token, rate, lane, fast, slot = _specs(layout, lambda step, total: total[0] - 1 - step)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:3], *arrays[4:6])]
    shapes += [_fast_shape(layout, batch, 1)] * 4
    return pl.pallas_call(
        functools.partial(_backward_kernel, layout),
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=_grid(layout, batch, work),
            in_specs=[token] * 4 + [rate, lane, fast(shared=True)] + [slot] * 2 + [fast()] * 3,
            out_specs=[token] * 3 + [rate, lane] + [fast()] * 4,
            scratch_shapes=[*[_weights(layout)] * 7, _weights(layout, 3, dtype)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=layout.vmem_bytes),
        name="ttt_memory_backward",
    )(*work, *arrays)


def _grid(layout, batch, work):
    steps = layout.blocks if layout.phases == 1 else work.total[0]
    return batch, layout.heads // layout.pack, steps


def _specs(layout, order):
    """Returns specs of tokens, rates and lanes, and makers of those of weights; `order` maps a step to a visit."""

    def block(b, step, words, total):
        return words[b, order(step, total)] >> visits.BLOCK

    width, wide = layout.wide
    token = pl.BlockSpec(
        (1, 1, layout.tokens, width), lambda b, n, s, words, slots, total: (b, block(b, s, words, total), 0, n)
    )
    rate = pl.BlockSpec(
        (1, 1, 1, _rate_rows(layout), layout.tokens),
        lambda b, n, s, words, slots, total: (b, n, block(b, s, words, total), 0, 0),
    )
    lane = pl.BlockSpec(
        (1, 1, 1, 1, wide), lambda b, n, s, words, slots, total: (b, n, block(b, s, words, total), 0, 0)
    )
    shape = (1, layout.pack, 1, 3, layout.dim, layout.hidden)

    def fast(shared=False):
        return pl.BlockSpec(shape, lambda b, n, s, *_: (0 if shared else b, n, 0, 0, 0, 0))

    slot = pl.BlockSpec(shape, lambda b, n, s, words, slots, total: (b, n, slots[b, order(s, total)], 0, 0, 0))
    return token, rate, lane, fast, slot


def _fast_shape(layout, batch, slots):
    return jax.ShapeDtypeStruct((batch, layout.heads, slots, 3, layout.dim, layout.hidden), jnp.float32)


def _weights(layout, *lead_and_dtype):
    *lead, dtype = lead_and_dtype or (jnp.float32,)
    return pltpu.VMEM((*lead, 3, *layout.wide), dtype)


# How arrays are laid out for the kernels, and back.


def _plan(layout, chunk_size, shape, valid, reset, count):
    batch, length = shape
    padding = [(0, 0), (0, layout.blocks * layout.tokens - length)]
    valid = jnp.ones(shape, bool) if valid is None else valid
    reset = jnp.zeros(shape, bool) if reset is None else reset
    return visits.make_plan(jnp.pad(valid, padding), jnp.pad(reset, padding), count, chunk_size, layout.tokens)


def _means(layout, chunk_size, plan, momentum, momentum_sum):
    momentum = _pad(momentum.astype(momentum_sum.dtype), 1, layout.blocks * layout.tokens)
    momentum = momentum.reshape(momentum.shape[0], layout.blocks, layout.tokens, -1)
    return visits.momentum_of(plan, momentum, momentum_sum, chunk_size)


def _to_blocks(layout, x):
    """[B, L, N, D] -> [B, K, T, N D] of the padded heads and dims."""
    x = _pad(_pad(_pad(x, 1, layout.blocks * layout.tokens), 2, layout.heads), 3, layout.dim)
    return x.reshape(x.shape[0], layout.blocks, layout.tokens, -1)


def _from_blocks(layout, x, shape, valid):
    """The way back, to [B, L, N, D] of `shape`, with zeros where tokens are not valid."""
    batch, length, heads, dim = shape
    x = x.reshape(batch, -1, layout.heads, layout.dim)[:, :length, :heads, :dim]
    return x if valid is None else jnp.where(valid[:, :, None, None], x, 0)


def _rate_rows(layout):
    return -(-(3 * layout.pack + 1) // 8) * 8


def _rates(layout, plan, lr):
    """lr [B, L, N, 3] -> [B, N / P, K, R, T]: P rows for each weight, zero where a token writes nothing; its phase."""
    batch, blocks, tokens = plan.write.shape
    lr = _pad(_pad(lr.astype(jnp.float32), 1, blocks * tokens), 2, layout.heads)
    lr = lr.reshape(batch, blocks, tokens, -1, layout.pack, 3)
    lr = jnp.where(plan.write[..., None, None, None], lr, 0)
    rows = lr.transpose(0, 3, 1, 5, 4, 2).reshape(batch, -1, blocks, 3 * layout.pack, tokens)
    phase = jnp.broadcast_to(plan.phase[:, None, :, None, :], (batch, rows.shape[1], blocks, 1, tokens))
    return _pad(jnp.concatenate([rows, phase.astype(jnp.float32)], axis=3), 3, _rate_rows(layout))


def _from_rates(layout, plan, d_rates, lr):
    """The way back, to the cotangent of lr."""
    batch, length, heads, _ = lr.shape
    rows = d_rates[:, :, :, : 3 * layout.pack].reshape(batch, -1, layout.blocks, 3, layout.pack, layout.tokens)
    rows = rows.transpose(0, 2, 5, 1, 4, 3)
    rows = jnp.where(plan.write[..., None, None, None], rows, 0)
    return rows.reshape(batch, -1, layout.heads, 3)[:, :length, :heads].astype(lr.dtype)


def _to_lanes(layout, means):
    """[B, K, N] -> [B, N / P, K, 1, F], each head's number on all its hidden units."""
    batch, blocks, _ = means.shape
    x = _pad(means.astype(jnp.float32), 2, layout.heads).reshape(batch, blocks, -1, layout.pack, 1)
    x = jnp.broadcast_to(x, (*x.shape[:-1], layout.hidden)).reshape(batch, blocks, -1, 1, layout.wide[1])
    return jnp.swapaxes(x, 1, 2)


def _from_lanes(layout, x, heads):
    """Sums [B, N / P, K, 1, F] over each head's hidden units, to [B, K, N]."""
    x = jnp.swapaxes(x, 1, 2).reshape(x.shape[0], layout.blocks, layout.heads, layout.hidden)
    return x.sum(-1)[..., :heads]


def _to_fast(layout, w):
    """FastWeights [(B,) N, ...] -> [B or 1, N, 1, 3, D, H], float32 and padded."""
    x = jnp.stack([jnp.swapaxes(w.gate, -1, -2), jnp.swapaxes(w.up, -1, -2), w.down], axis=-3)
    x = x if x.ndim == 5 else x[None]
    x = _pad(_pad(_pad(x.astype(jnp.float32), 1, layout.heads), 3, layout.dim), 4, layout.hidden)
    return x[:, :, None]


def _from_fast(x, shape):
    """The way back, to FastWeights with a leading B; `shape` is that of gate without it."""
    heads, hidden, dim = shape
    x = x[:, :heads, 0, :, :dim, :hidden]
    return FastWeights(jnp.swapaxes(x[:, :, 0], -1, -2), jnp.swapaxes(x[:, :, 1], -1, -2), x[:, :, 2])


def _pad(x, axis, size):
    """Appends zeros until `axis` has `size` entries."""
    if x.shape[axis] == size:
        return x
    return jnp.pad(x, [(0, size - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])

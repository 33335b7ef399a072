"""The memory as TPU kernels: fast weights stay in VMEM for the whole sequence, tokens stream through in blocks.

Axes: B batch, L tokens, N heads, P heads of a pack, D head dim, H hidden, C = P D and F = P H columns of a pack,
K blocks of T tokens, V visits, S slots, R rows of `rates`.

Heads are packed until they fill 128 lanes, their weights in the diagonal blocks of one matrix; all three weights are
kept as [D, H] (gate and up transposed). One call goes through the visits of `pallas_kernels.ttt.visits` in order; the
backward call goes through them in reverse and computes everything again, from the weights and the momentum that the
forward call left in a slot for each update. The kernels themselves are in `tpu_kernels`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels import tpu_kind
from pallas_kernels.ttt import tpu_kernels, tpu_layout, visits
from pallas_kernels.ttt.types import MemoryState

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


# By chip, from the compiler's schedules of blocks of 128 to 1024 tokens in bfloat16: the smaller of two sizes, unless
# the larger needs 2% fewer bundles a token.
TILES = {
    "v5e": Tiles(forward=512, backward=256),
    "v5p": Tiles(forward=1024, backward=256),
    "v6e": Tiles(forward=512, backward=512),
    "7x": Tiles(forward=512, backward=512),
}


def choose_tiles() -> Tiles:
    """Returns the tiles of the chip that is traced for, those of the default for one that is not known."""
    return tpu_kind.choose(TILES, Tiles())


def why_not(dtype) -> str | None:
    """Returns why tokens of this dtype cannot be served, or None."""
    if dtype in (jnp.float32, jnp.bfloat16):
        return None
    return f"the TPU kernels take float32 and bfloat16, and q is {jnp.dtype(dtype).name}"


def forward(chunk_size, aligned, difference, tokens, init, state, valid, reset, *, tiles=None, save=True):
    """Returns (out [B, L, N, D], state) and what `backward` needs; arguments as in `xla.forward`.

    Args:
      chunk_size, aligned, difference, tokens, init, state, valid, reset: as in `xla.forward`.
      tiles: sizes of blocks; None means `choose_tiles`.
      save: whether `backward` will be called; without, the residuals are None.
    """
    q, k, v, lr, momentum = tokens
    tiles = tiles or choose_tiles()
    layout, plan, work = _prepare(
        chunk_size, aligned, q, init, valid, reset, state.count, tiles.forward, tiles.vmem_bytes
    )
    means, momentum_sum = tpu_layout.means_of(layout, chunk_size, plan, momentum, state.momentum_sum)
    arrays = [
        *(tpu_layout.to_blocks(layout, x) for x in (q, k, v)),
        tpu_layout.to_rates(layout, plan, lr),
        tpu_layout.to_lanes(layout, means),
    ]
    arrays += [tpu_layout.to_fast(layout, x) for x in (init, state.weights, state.velocity, state.pending)]

    out, *fast = _call_forward(layout, difference, save, work, arrays)
    saved, (weights, velocity, pending) = fast[:-3], (tpu_layout.from_fast(x, init.gate.shape) for x in fast[-3:])
    out = tpu_layout.from_blocks(layout, out, q.shape, valid)
    result = out, MemoryState(weights, velocity, pending, momentum_sum, plan.count)
    return result, (tokens, init, valid, reset, state.momentum_sum, state.count, saved) if save else None


def backward(chunk_size, aligned, difference, residuals, cotangents, *, tiles=None):
    """Returns the cotangents of (tokens, init, state) from those of (out, state)."""
    tokens, init, valid, reset, momentum_sum, count, saved = residuals
    d_out, d_state = cotangents
    q, k, v, lr, momentum = tokens
    tiles = tiles or choose_tiles()
    layout, plan, work = _prepare(chunk_size, aligned, q, init, valid, reset, count, tiles.backward, tiles.vmem_bytes)
    (means, _), pull_means = jax.vjp(
        lambda m, s: tpu_layout.means_of(layout, chunk_size, plan, m, s), momentum, momentum_sum
    )
    d_out = d_out if valid is None else jnp.where(valid[:, :, None, None], d_out, 0)
    arrays = [
        *(tpu_layout.to_blocks(layout, x) for x in (q, k, v, d_out)),
        tpu_layout.to_rates(layout, plan, lr),
        tpu_layout.to_lanes(layout, means),
    ]
    arrays += [tpu_layout.to_fast(layout, init), *saved, *(tpu_layout.to_fast(layout, x) for x in d_state[:3])]

    found = _call_backward(layout, difference, work, arrays)
    *d_tokens, d_rates, d_means, d_weights, d_velocity, d_pending, d_init = found
    d_q, d_k, d_v = (tpu_layout.from_blocks(layout, x, q.shape, valid) for x in d_tokens)
    d_lr = tpu_layout.from_rates(layout, plan, d_rates, lr)
    d_means = jnp.where(plan.update[..., None], tpu_layout.from_lanes(layout, d_means, q.shape[2]), 0)
    d_momentum, d_momentum_sum = pull_means((d_means, d_state.momentum_sum))
    shape = init.gate.shape
    d_init = jax.tree.map(lambda d, w: d.sum(0).astype(w.dtype), tpu_layout.from_fast(d_init, shape), init)
    d_floats = (tpu_layout.from_fast(x, shape) for x in (d_weights, d_velocity, d_pending))
    no_cotangent: Any = np.zeros(count.shape, jax.dtypes.float0)
    d_state = MemoryState._make((*d_floats, d_momentum_sum, no_cotangent))
    return (d_q, d_k, d_v, d_lr, d_momentum), d_init, d_state


def _prepare(chunk_size, aligned, q, init, valid, reset, count, most, vmem_bytes):
    """Returns the layout of a pass with blocks of at most `most` tokens, its plan and its visits."""
    single = aligned and valid is None and reset is None
    layout = tpu_layout.make_layout(
        q.shape, init.gate.shape[-2], chunk_size, single, reset is not None, most, vmem_bytes
    )
    plan = tpu_layout.plan_of(layout, chunk_size, q.shape[:2], valid, reset, count)
    return layout, plan, visits.make_visits(plan, layout.phases)


def _call_forward(layout, difference, save, work, arrays):
    token, rate, lane, fast, slot = _specs(layout, lambda step, total: step)
    batch, saved = arrays[0].shape[0], 2 if save else 0
    shapes = [jax.ShapeDtypeStruct(arrays[0].shape, arrays[0].dtype)]
    shapes += [_fast_shape(layout, batch, layout.slots)] * saved + [_fast_shape(layout, batch, 1)] * 3
    return _call(
        functools.partial(tpu_kernels.forward, layout, difference, save),
        "ttt_memory_forward",
        layout,
        work,
        arrays,
        shapes,
        in_specs=[token] * 3 + [rate, lane, fast(shared=True)] + [fast()] * 3,
        out_specs=[token] + [slot] * saved + [fast()] * 3,
        scratch=(4, 2),
    )


def _call_backward(layout, difference, work, arrays):
    token, rate, lane, fast, slot = _specs(layout, lambda step, total: total[0] - 1 - step)
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (*arrays[:3], *arrays[4:6])]
    shapes += [_fast_shape(layout, arrays[0].shape[0], 1)] * 4
    return _call(
        functools.partial(tpu_kernels.backward, layout, difference),
        "ttt_memory_backward",
        layout,
        work,
        arrays,
        shapes,
        in_specs=[token] * 4 + [rate, lane, fast(shared=True)] + [slot] * 2 + [fast()] * 3,
        out_specs=[token] * 3 + [rate, lane] + [fast()] * 4,
        scratch=(7, 3),
    )


def _call(kernel, name, layout, work, arrays, shapes, *, in_specs, out_specs, scratch):
    """Runs a kernel over rows, packs and visits; `scratch` counts weights in float32 and in the tokens' dtype."""
    wide, (exact, cast) = (3, *layout.wide), scratch
    steps = layout.blocks if layout.phases == 1 else work.total[0]
    return pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(arrays[0].shape[0], layout.heads // layout.pack, steps),
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=[pltpu.VMEM(wide, jnp.float32)] * exact + [pltpu.VMEM((cast, *wide), arrays[0].dtype)],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=SEMANTICS, vmem_limit_bytes=layout.vmem_bytes),
        name=name,
    )(*work, *arrays)


def _specs(layout, order):
    """Returns specs of tokens, rates and lanes, and makers of those of weights; `order` maps a step to a visit."""

    def block(b, step, words, total):
        return words[b, order(step, total)] >> visits.BLOCK

    width, wide = layout.wide
    token = pl.BlockSpec(
        (1, 1, layout.tokens, width), lambda b, n, s, words, slots, total: (b, block(b, s, words, total), 0, n)
    )
    rate = pl.BlockSpec(
        (1, 1, 1, tpu_layout.rate_rows(layout), layout.tokens),
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

"""The TPU kernels of the memory: what one visit does, forward and in reverse.

Axes as in `pallas_tpu`. A kernel runs over (row, pack, visit), visits in order, and keeps in scratch, [3, C, F], what
goes from visit to visit. Scratch is float32 but for `cast`, which holds what products take in the dtype of the tokens:
the weights, the normalised weights and, backward, the cotangent of what is pending. It is made where a visit begins to
use other weights and not in every visit, as a chunk may have many.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.ttt import tpu_block, visits

WEIGHTS, NORMALISED, D_PENDING = 0, 1, 2  # in `cast`


def forward(layout, difference, save, words, slots, total, *refs):
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
            tpu_block.pack(layout, scratch, ref)

    @pl.when(has(visits.FRESH))
    def _():
        weights[...] = first[...]
        velocity[...] = jnp.zeros_like(velocity)
        pending[...] = jnp.zeros_like(pending)

    @pl.when(has(visits.ENTERS))
    def _():
        normalised = tpu_block.normalise(weights[...], first[...])
        cast[WEIGHTS], cast[NORMALISED] = weights[...].astype(cast.dtype), normalised.astype(cast.dtype)
        if save:
            # All that `backward` cannot make itself. Slots are numbered by the updates before them, so initial weights,
            # which it has, would take the place of what was saved of the document before.
            @pl.when(jnp.logical_not(has(visits.INITIAL)))
            def _():
                for ref, scratch in zip(saved, (weights, velocity), strict=True):
                    tpu_block.unpack(layout, ref, scratch[...])

    @pl.when(has(visits.ACTIVE))
    def _():
        read = tpu_block.read(cast[WEIGHTS], q[0, 0])
        if difference:  # the same product where the weights are the initial ones, so the difference is exactly zero
            read -= tpu_block.read(first[...].astype(cast.dtype), q[0, 0])
        if layout.phases == 1:
            out[0, 0] = read.astype(out.dtype)
        else:  # other visits of the block have read, or will read, the tokens that are not this one's
            mine = tpu_block.phase_column(layout, rates[0, 0, 0], word)
            keep = jnp.logical_and(jnp.logical_not(has(visits.OPENS)), jnp.logical_not(mine))
            out[0, 0] = jnp.where(keep, out[0, 0], read.astype(out.dtype))
        # Every token is multiplied, those of other visits with a rate of zero.
        lr = tpu_block.expand_rates(layout, tpu_block.own_rates(layout, rates[0, 0, 0], word), q.dtype)
        pending[...] += tpu_block.gradient(layout, cast[NORMALISED], k[0, 0], v[0, 0], lr)

    @pl.when(has(visits.UPDATE))
    def _():
        # M <- mu M - G, W <- W' + M. Products also fill what lies between the heads of a pack, which is no weight's.
        moved = mu[0, 0, 0] * velocity[...] - tpu_block.diagonal(layout, pending[...])
        weights[...] = tpu_block.normalise(weights[...], first[...]) + moved
        velocity[...] = moved
        pending[...] = jnp.zeros_like(pending)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for ref, scratch in zip(end, (weights, velocity, pending), strict=True):
            tpu_block.unpack(layout, ref, scratch[...])


def backward(layout, difference, words, slots, total, *refs):
    """One visit in reverse: cotangents of what follows are in scratch.

    The steps are those of `forward` from the last to the first. Each chunk has two cotangents of its weights, as reads
    take them as they are and writes normalised: `d_weights` and `d_normalised`, which go through the normalisation once
    for all visits of the chunk. `d_first` gathers what the initial weights get as norms, as starts of documents and as
    what a difference is taken from.
    """
    del slots
    q, k, v, d_out, rates, mu, init, weights, velocity, *d_end = refs[:12]
    d_q, d_k, d_v, d_rates, d_mu, *d_start = refs[12:21]
    d_weights, d_normalised, d_velocity, d_pending, d_first, first, current, cast = refs[21:]
    step = pl.program_id(2)
    word = words[pl.program_id(0), total[0] - 1 - step]
    has = functools.partial(_has, word)

    @pl.when(step == 0)
    def _():
        for scratch, ref in zip((d_weights, d_velocity, d_pending, first), (*d_end, init), strict=True):
            tpu_block.pack(layout, scratch, ref)
        d_normalised[...] = jnp.zeros_like(d_normalised)
        d_first[...] = jnp.zeros_like(d_first)
        cast[D_PENDING] = d_pending[...].astype(cast.dtype)

    @pl.when(has(visits.LEAVES))  # in reverse the first visit that uses these weights
    def _():
        tpu_block.pack(layout, current, weights)

        @pl.when(has(visits.INITIAL))  # whose slot nobody filled
        def _():
            current[...] = first[...]

        normalised = tpu_block.normalise(current[...], first[...])
        cast[WEIGHTS], cast[NORMALISED] = current[...].astype(cast.dtype), normalised.astype(cast.dtype)

    @pl.when(has(visits.CLOSES))  # the first of the block's visits: all of them add to these
    def _():
        for ref in (d_q, d_k, d_v, d_rates, d_mu):
            ref[...] = jnp.zeros_like(ref)

    @pl.when(has(visits.UPDATE))
    def _():
        # Of W <- W' + M and M <- mu M - G: M was used twice, so `moved` is its cotangent; mu gets <moved, old M>, the
        # old M mu moved and G -moved. What d_weights held is now that of W', and reads before the update start anew.
        moved = tpu_block.diagonal(layout, d_velocity[...] + d_weights[...])
        for p in range(layout.pack):
            rows, columns = tpu_block.block_of(layout, p)
            old = jnp.where(has(visits.INITIAL), 0.0, velocity[0, p, 0])
            d_mu[0, 0, 0, 0, columns] = jnp.sum(moved[:, rows, columns] * old, axis=(0, 1))  # XLA adds the rest
        d_normalised[...] = d_weights[...]
        d_weights[...] = jnp.zeros_like(d_weights)
        d_velocity[...] = mu[0, 0, 0] * moved
        d_pending[...] = -moved
        cast[D_PENDING] = (-moved).astype(cast.dtype)

    @pl.when(has(visits.ACTIVE))
    def _():
        lr = tpu_block.expand_rates(layout, tpu_block.own_rates(layout, rates[0, 0, 0], word), q.dtype)
        d_read = d_out[0, 0]
        if layout.phases > 1:
            d_read = jnp.where(tpu_block.phase_column(layout, rates[0, 0, 0], word), d_read, jnp.zeros_like(d_read))
        part, d_w = tpu_block.read_backward(cast[WEIGHTS], q[0, 0], d_read)
        d_weights[...] += d_w
        if difference:
            part_first, d_w = tpu_block.read_backward(first[...].astype(cast.dtype), q[0, 0], -d_read)
            d_first[...] += d_w
            part += part_first
        d_q[0, 0] += part.astype(d_q.dtype)
        # A sum's cotangent is that of each of its terms: d_pending is the same for all tokens of the chunk.
        parts, d_w = tpu_block.gradient_backward(layout, cast[NORMALISED], cast[D_PENDING], k[0, 0], v[0, 0], lr)
        d_normalised[...] += d_w
        d_k[0, 0] += parts[0].astype(d_k.dtype)
        d_v[0, 0] += parts[1].astype(d_v.dtype)
        d_rates[0, 0, 0] += tpu_block.own_rates(layout, parts[2], word, rates[0, 0, 0])

    @pl.when(has(visits.ENTERS))  # in reverse the last visit that uses these weights
    def _():
        _, pullback = jax.vjp(tpu_block.normalise, current[...], first[...])
        d_w, d_w0 = pullback(tpu_block.diagonal(layout, d_normalised[...]))
        d_weights[...] += d_w
        d_first[...] += d_w0
        d_normalised[...] = jnp.zeros_like(d_normalised)

    @pl.when(has(visits.FRESH))  # what was before the document has no part in what follows
    def _():
        d_first[...] += d_weights[...]
        for ref in (d_weights, d_velocity, d_pending):
            ref[...] = jnp.zeros_like(ref)
        cast[D_PENDING] = jnp.zeros(cast.shape[1:], cast.dtype)

    @pl.when(step == pl.num_programs(2) - 1)
    def _():
        for ref, scratch in zip(d_start, (d_weights, d_velocity, d_pending, d_first), strict=True):
            tpu_block.unpack(layout, ref, scratch[...])


def _has(word, bit):
    return (word & bit) != 0

"""Kernels compiled ahead of time for a device that need not be there: forward and backward, and the decode step."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.conv import conv_norm
from pallas_kernels.rope import norm_rope
from pallas_kernels.swa import prefill as swa_prefill
from pallas_kernels.swa import swa_attention, swa_decode
from pallas_kernels.tools import topology
from pallas_kernels.ttt import FastWeights, ttt_memory


def for_one_device(name: str, function: Any, *shapes: Any) -> jax.stages.Compiled:
    """Compiles a function of arrays of these shapes for one device of a topology, inside a fully manual shard_map."""
    mesh = topology.mesh(name)
    manual = jax.shard_map(function, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    everywhere = NamedSharding(mesh, PartitionSpec())
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)
    return jax.jit(manual).lower(*shapes).compile()


def memory(
    name: str, dim: int, dtype: str, length: int, chunk: int, *, masks: bool = False, read_out: str = "full"
) -> jax.stages.Compiled:
    """The gradient of `ttt_memory`, batch 1 and 512 channels, with or without masks of padding and of documents."""
    heads, hidden = max(512 // dim, 1), 2 * dim
    q = _array(1, length, heads, dim, dtype=jnp.dtype(dtype))
    weights = ((heads, hidden, dim), (heads, hidden, dim), (heads, dim, hidden))
    init = FastWeights._make(_array(*shape) for shape in weights)
    marks = (_array(1, length, dtype=bool),) * 2 if masks else (None, None)
    options: Any = {"chunk_size": chunk, "read_out": read_out, "implementation": _backend(name)}

    def loss(arguments, valid, reset):
        out, state = ttt_memory(*arguments, valid=valid, reset=reset, **options)
        return sum(jnp.sum(x.astype(jnp.float32)) for x in (out, *state.weights))

    arguments = (q, q, q, _array(1, length, heads, 3), _array(1, length, heads), init)
    return for_one_device(name, jax.grad(loss), arguments, *marks)


def attention(
    name: str, dim: int, dtype: str, length: int, *, groups: int = 2, documents: bool = False
) -> jax.stages.Compiled:
    """The gradient of `swa_attention` for any window and sinks: batch 1, 8 key heads, `groups` query heads for each."""
    q, k = (_array(1, length, heads, dim, dtype=jnp.dtype(dtype)) for heads in (8 * groups, 8))
    segments = _array(1, length, dtype=jnp.int32) if documents else None
    size = _array(dtype=jnp.int32)

    def loss(q, k, v, window, sinks, segments):
        sizes = {"window": window, "sinks": sinks, "segment_ids": segments}
        out = swa_attention(q, k, v, **sizes, implementation=_backend(name))
        return jnp.sum(out.astype(jnp.float32))

    return for_one_device(name, jax.grad(loss, (0, 1, 2)), q, k, k, size, size, segments)


def rope(name: str, dim: int, dtype: str, length: int, *, rows: bool = False) -> jax.stages.Compiled:
    """The gradient of `norm_rope` on a TPU: batch 2, 8 heads."""
    x, table = _array(2, length, 8, dim, dtype=jnp.dtype(dtype)), _array(2, length, dim // 2)

    def loss(x, scale, tables):
        out = norm_rope(x, scale, tables, eps=1e-6, rows=rows, implementation="pallas")
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return for_one_device(name, jax.grad(loss), x, _array(dim), (table, table))


def conv(name: str, heads: int, dim: int, dtype: str, length: int, *, documents: bool = False) -> jax.stages.Compiled:
    """The gradient of `conv_norm` on a TPU: batch 2, 4 taps."""
    x = _array(2, length, heads, dim, dtype=jnp.dtype(dtype))
    segments = _array(2, length, dtype=jnp.int32) if documents else None

    def loss(x, kernel, scale, segments):
        out = conv_norm(x, kernel, scale, eps=1e-6, segment_ids=segments, implementation="pallas")
        return jnp.sum(jnp.square(out.astype(jnp.float32)))

    return for_one_device(name, jax.grad(loss, (0, 1, 2)), x, _array(4, heads, dim), _array(dim), segments)


def decode(
    name: str, dim: int, dtype: str, slots: int, *, groups: int = 2, kv_heads: int = 8, batch: int = 8
) -> jax.stages.Compiled:
    """`swa_decode` for any window and sinks of caches of two layers and that many slots, 128 of them for sinks."""
    q, k = (_array(batch, heads, dim, dtype=jnp.dtype(dtype)) for heads in (kv_heads * groups, kv_heads))
    cache = _array(2, batch, slots, kv_heads, dim, dtype=jnp.dtype(dtype))
    size = _array(dtype=jnp.int32)

    def step(q, k, v, keys, values, position, window, sinks, layer):
        sizes = {"sink_slots": 128, "window": window, "sinks": sinks, "layer": layer}
        return swa_decode(q, k, v, keys, values, position, **sizes, implementation=_backend(name))

    return for_one_device(name, step, q, k, k, cache, cache, _array(batch, dtype=jnp.int32), size, size, size)


def prefill(
    name: str,
    dim: int,
    dtype: str,
    slots: int,
    *,
    groups: int = 2,
    kv_heads: int = 8,
    batch: int = 8,
    length: int = 256,
) -> jax.stages.Compiled:
    """`prefill.attend` of pieces of that length, on a TPU, to a cache of that many slots, 128 of them for sinks."""
    q, k = (_array(batch, length, heads, dim, dtype=jnp.dtype(dtype)) for heads in (kv_heads * groups, kv_heads))
    cache = _array(batch, slots, kv_heads, dim, dtype=jnp.dtype(dtype))
    rows, size = _array(batch, dtype=jnp.int32), _array(dtype=jnp.int32)

    def piece(q, k, v, keys, values, position, lengths, window, sinks):
        sizes = {"sink_slots": 128, "window": window, "sinks": sinks, "scale": dim**-0.5}
        return swa_prefill.attend(q, k, v, keys, values, position, lengths, **sizes, implementation="pallas")

    return for_one_device(name, piece, q, k, k, cache, cache, rows, rows, size, size)


def _backend(name: str) -> str:
    return "triton" if name == "h100" else "pallas"


def _array(*shape: int, dtype: Any = jnp.float32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)

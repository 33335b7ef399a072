"""Triton kernels called from JAX: one function over the two generations of jax-triton, and the size of a tile.

jax-triton 0.3 serves Python 3.11, 0.4 later ones; 0.4 calls the outputs `out_type` where 0.3 says `out_shape`. Neither
can be mapped (vmap) or differentiated, so every call stands under a `jax.custom_vjp`. It is imported at the first call:
without a GPU build of jaxlib 0.3 cannot be imported, and both change TRITON_CACHE_DIR, which is put back here.
"""

import dataclasses
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval

# Compute capability that kernels are compiled for, such as 90; None means that of the first GPU. Compiling ahead of
# time on a machine without a GPU has to set it.
capability: int | None = None

# Version, times ten, of the assembly that XLA is handed kernels in; that of CUDA 12.9. Triton's own choice follows the
# CUDA that it ships parts of, which XLA's ptxas may be too old for. jax-triton 0.3 has no way to say it.
PTX_VERSION = 88


@dataclasses.dataclass(frozen=True)
class Tile:
    """How one kernel is cut and compiled.

    Attributes:
      rows: tokens a block, a power of two of at least 16.
      columns: keys or hidden units a block, likewise.
      warps: groups of 32 threads that work on a block: 1, 2, 4, 8 or 16.
      stages: loads in flight in the innermost loop, at least 1; each costs shared memory.
    """

    rows: int
    columns: int
    warps: int
    stages: int

    def __post_init__(self):
        for field, least, most in (("rows", 16, 1024), ("columns", 16, 1024), ("warps", 1, 16)):
            value = getattr(self, field)
            if not isinstance(value, int) or not least <= value <= most or value & (value - 1):
                raise ValueError(f"Tile: {field}={value!r} must be a power of two from {least} to {most}")
        if not isinstance(self.stages, int) or not 1 <= self.stages <= 8:
            raise ValueError(f"Tile: stages={self.stages!r} must be an int from 1 to 8")


@functools.cache
def unavailable() -> str | None:
    """Returns why kernels cannot be called on this machine, in words that name the fix, or None when they can be."""
    try:
        importlib.import_module("triton")  # without it jax_triton imports, and fails at the first call
        _jax_triton()
    except (ImportError, AttributeError) as error:  # the latter where versions do not fit together
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        return f"jax-triton cannot be imported ({reason}); pip install 'allmem-jax[gpu]', which is for NVIDIA GPUs"
    return None


def unsupported(dim: int, dtype) -> str | None:
    """Returns why kernels do not serve a head dim and a dtype, or None where they do."""
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"q is {jnp.dtype(dtype).name}; the Triton kernels take bfloat16, float16 and float32"
    if dim > 256:
        return f"q has a head dim of {dim}; the Triton kernels take at most 256"
    return None


def choose(table: dict[tuple[int, int], tuple], dim: int, dtype) -> list[Tile]:
    """Returns the tiles of the first entry that serves, from a table by bits of the dtype and largest head dim.

    Raises:
      NotImplementedError: none does.
    """
    reason = unsupported(dim, dtype)
    if reason is not None:
        raise NotImplementedError(f"implementation='triton' cannot serve: {reason}; use implementation='xla'")
    bits = jnp.finfo(dtype).bits
    return next([Tile(*x) for x in tiles] for (width, most), tiles in table.items() if width == bits and dim <= most)


def call(
    kernel: Any, *arrays: jax.Array, out: Sequence[jax.ShapeDtypeStruct], grid: tuple[int, ...], tile: Tile, **constants
) -> list[jax.Array]:
    """Runs a `triton.jit` kernel whose parameters are pointers to `arrays`, pointers to outputs, and constants.

    Args:
      kernel: the decorated function.
      arrays: inputs, contiguous on the device.
      out: shapes and dtypes of the outputs, which the kernel fills entirely.
      grid: programs along up to three axes; only the first may exceed 65535.
      tile: gives the number of warps and stages; its block sizes are passed by the caller under the kernel's names.
      constants: the kernel's `constexpr` parameters.
    """
    if any(size > 65535 for size in grid[1:]):
        raise NotImplementedError(f"triton: a grid of {grid} programs; axes after the first hold at most 65535")
    triton_call, outputs, more = _jax_triton()
    options = {outputs: list(out), "num_warps": tile.warps, "num_stages": tile.stages, "compute_capability": capability}
    return triton_call(*arrays, kernel=kernel, grid=grid, **options, **more, **constants)


@functools.cache
def _jax_triton() -> tuple[Callable, str, dict]:
    """Returns `jax_triton.triton_call`, the name of its argument for the outputs, and further arguments."""
    cache = os.environ.get("TRITON_CACHE_DIR")
    try:
        triton_call = importlib.import_module("jax_triton").triton_call
    finally:
        os.environ.pop("TRITON_CACHE_DIR", None)
        if cache is not None:
            os.environ["TRITON_CACHE_DIR"] = cache
    # 0.4.1 has a rule of its own against dropping unused calls, which jax 0.12 cannot call; the default one drops them.
    primitive: Any = getattr(sys.modules.get("jax_triton.triton_lib"), "triton_kernel_call_p", None)
    partial_eval.dce_rules.pop(primitive, None)
    if "out_type" not in inspect.signature(triton_call).parameters:
        return triton_call, "out_shape", {}
    return triton_call, "out_type", {"backend_options": {"ptx_version": PTX_VERSION}}


def padded(size: int) -> int:
    """Returns the power of two, at least 16, that an axis of `size` is filled up to: tensor cores need no less."""
    return max(16, 1 << (size - 1).bit_length())

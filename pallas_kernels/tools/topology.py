"""Devices that are compiled for without being there: TPU topologies and an H100.

The compilers are those of the real devices, so what does not fit or does not lower says so here. TPUs need libtpu
(`jax[tpu]`); the H100 needs jax-cuda13-plugin and jax-cuda13-pjrt. Figures of the H100 are its vendor's.
"""

import os

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from pallas_kernels import triton_call

SMALLEST = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}

_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024  threads_per_warp: 32  shared_memory_per_block: 49152
  shared_memory_per_core: 233472  shared_memory_per_block_optin: 232448  threads_per_core_limit: 2048
  core_count: 132  fpus_per_core: 128  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535
  block_dim_limit_z: 65535  memory_bandwidth: 3352320000000  l2_cache_size: 52428800  clock_rate_ghz: 1.98
  device_memory_size: 84942979072  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def devices(name: str) -> list[jax.Device]:
    """The abstract devices of a topology.

    Args:
      name: "h100", a key of `SMALLEST`, or libtpu's name of a topology, such as "v5p:4x4x4".

    Raises:
      RuntimeError: the compiler for that kind is not installed, or does not know the name.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nothing here holds a TPU
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor the libraries of a GPU
    try:
        if name == "h100":
            triton_call.capability = 90  # there is no GPU that could be asked
            where = {"platform": "cuda", "topology_name": "h100", "topology": "1x1x1", "target_config": _H100}
        else:
            where = {"platform": "tpu", "topology_name": SMALLEST.get(name, name)}
        return list(topologies.get_topology_desc(**where).devices)
    except Exception as error:
        needed = "jax-cuda13-plugin and jax-cuda13-pjrt" if name == "h100" else "libtpu"
        raise RuntimeError(f"cannot compile for {name!r} here; it needs {needed}, and a known name: {error}") from error


def mesh(name: str, shape: tuple[int, ...] | None = None, axes: tuple[str, ...] = ("data",)) -> Mesh:
    """A mesh of abstract devices with automatic axes; without a shape, of the first device alone."""
    chosen = devices(name)
    shape = (1,) * len(axes) if shape is None else shape
    array = np.array(chosen[: int(np.prod(shape))]).reshape(shape)
    return Mesh(array, axes, axis_types=(AxisType.Auto,) * len(axes))

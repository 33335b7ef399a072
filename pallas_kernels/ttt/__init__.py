"""The test-time-trained memory: a per-head SwiGLU whose weights are updated chunk by chunk.

types             fast weights, and the state
api               `ttt_memory`: signature, checks, choice of backend
decode            one token a row, whose gradients are written to all layers at once
reference, xla    token by token, to compare with; blocks of plain JAX
pallas_tpu        calls the TPU kernels of `tpu_kernels`; `tpu_block` is a block's mathematics, `tpu_layout` its shapes
triton_gpu        calls the GPU kernels of `triton_kernels`
visits            which pieces of chunks the kernels visit, in what order
"""

from pallas_kernels.ttt import decode
from pallas_kernels.ttt.api import ttt_memory
from pallas_kernels.ttt.types import FastWeights, MemoryState, init_memory_state

__all__ = ["FastWeights", "MemoryState", "decode", "init_memory_state", "ttt_memory"]

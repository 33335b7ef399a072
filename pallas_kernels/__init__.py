"""The kernels of AllMem: sliding-window attention with sinks, the memory, and what makes queries, keys and values.

They need jax alone.
"""

from pallas_kernels.conv import conv_norm
from pallas_kernels.rope import norm_rope
from pallas_kernels.swa import swa_attention, swa_decode
from pallas_kernels.ttt import FastWeights, MemoryState, init_memory_state, ttt_memory

__all__ = [
    "FastWeights",
    "MemoryState",
    "conv_norm",
    "init_memory_state",
    "norm_rope",
    "swa_attention",
    "swa_decode",
    "ttt_memory",
]

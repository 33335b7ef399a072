"""The kernels of AllMem: sliding-window attention with sinks, its queries' and keys' norm and rotation, the memory.

They need jax alone.
"""

from pallas_kernels.rope import norm_rope
from pallas_kernels.swa import swa_attention, swa_decode
from pallas_kernels.ttt import FastWeights, MemoryState, init_memory_state, ttt_memory

__all__ = ["FastWeights", "MemoryState", "init_memory_state", "norm_rope", "swa_attention", "swa_decode", "ttt_memory"]

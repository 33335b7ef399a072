"""The two kernels of AllMem: sliding-window attention with sinks, and the test-time-trained memory. Needs jax alone."""

from pallas_kernels.swa import swa_attention, swa_decode
from pallas_kernels.ttt import FastWeights, MemoryState, init_memory_state, ttt_memory

__all__ = ["FastWeights", "MemoryState", "init_memory_state", "swa_attention", "swa_decode", "ttt_memory"]

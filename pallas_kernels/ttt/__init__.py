"""The test-time-trained memory: a per-head SwiGLU whose weights are updated chunk by chunk."""

from pallas_kernels.ttt.api import ttt_memory
from pallas_kernels.ttt.types import FastWeights, MemoryState, init_memory_state

__all__ = ["FastWeights", "MemoryState", "init_memory_state", "ttt_memory"]

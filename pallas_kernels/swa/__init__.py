"""Sliding-window attention with sink tokens, of whole rows and of one token at a time."""

from pallas_kernels.swa.api import swa_attention
from pallas_kernels.swa.decode import swa_decode

__all__ = ["swa_attention", "swa_decode"]

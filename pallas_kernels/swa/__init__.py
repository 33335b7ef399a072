"""Sliding-window attention with sink tokens."""

from pallas_kernels.swa.api import swa_attention

__all__ = ["swa_attention"]

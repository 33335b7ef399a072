"""A causal convolution of each channel, and then each head's norm, in one step: queries, keys and values of the memory.

api         `conv_norm`: signature, checks, choice of backend
reference   a token and a head at a time, to compare with
xla         plain JAX
pallas_tpu  the kernels for TPUs
"""

from pallas_kernels.conv.api import conv_norm, reach_of
from pallas_kernels.conv.xla import plain

__all__ = ["conv_norm", "plain", "reach_of"]

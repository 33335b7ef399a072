"""Each head's RMSNorm and rotary positions in one step, for the queries and keys of attention.

api         `norm_rope`: signature, checks, choice of backend
reference   a token and a pair of channels at a time, to compare with
xla         plain JAX
pallas_tpu  the kernels for TPUs
"""

from pallas_kernels.rope.api import norm_rope

__all__ = ["norm_rope"]

"""Sliding-window attention with sink tokens, of whole rows, of pieces of a prompt and of one token at a time.

api                        `swa_attention`: signature, checks, choice of backend
reference, xla             dense, to compare with; blocks of plain JAX
pallas_tpu, triton_gpu     the kernels of a whole row; `documents` is what they share on packed rows
tpu_columns                how queries lie in those of TPUs, and their online softmax
tpu_visits                 which tiles those of TPUs visit
decode                     `swa_decode`: one token against the ring cache
decode_tpu, decode_triton  its kernels
prefill, prefill_tpu       a piece of a prompt against the ring cache, and its kernel for TPUs
ring                       the ring cache: which token lies in which slot, and any number of new tokens in plain JAX
"""

from pallas_kernels.swa import prefill, ring
from pallas_kernels.swa.api import swa_attention
from pallas_kernels.swa.decode import swa_decode

__all__ = ["prefill", "ring", "swa_attention", "swa_decode"]

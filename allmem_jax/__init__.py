"""AllMem in JAX: pretrained language models with constant memory and constant cost per token."""

from allmem_jax.config import ModelConfig, RopeScaling, preset
from allmem_jax.model import AllMemLM
from allmem_jax.state import DecodeState, init_state

__all__ = ["AllMemLM", "DecodeState", "ModelConfig", "RopeScaling", "init_state", "preset"]

"""AllMem in JAX: pretrained language models with constant memory and constant cost per token."""

from typing import TYPE_CHECKING, Any

from allmem_jax import nn
from allmem_jax.decoding.generation import Sampling, generate
from allmem_jax.model.config import ModelConfig, RopeScaling, preset
from allmem_jax.model.lm import AllMemLM
from allmem_jax.model.state import DecodeState, init_state, load_state, save_state

if TYPE_CHECKING:
    from allmem_jax.checkpoints.load import load_pretrained
    from allmem_jax.checkpoints.save import save_pretrained

__version__ = "0.1.0"
__all__ = [
    "AllMemLM",
    "DecodeState",
    "ModelConfig",
    "RopeScaling",
    "Sampling",
    "generate",
    "init_state",
    "load_pretrained",
    "load_state",
    "nn",
    "preset",
    "save_pretrained",
    "save_state",
]


def __getattr__(name: str) -> Any:
    """Imports what reads and writes checkpoints, and transformers with it, only when it is asked for."""
    if name in ("load_pretrained", "save_pretrained"):
        from allmem_jax.checkpoints import load, save

        return getattr(load if name == "load_pretrained" else save, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""An untrained toy model and a tokenizer of bytes: enough to run every step of training in seconds, without files."""

from typing import Any

import jax
import jax.numpy as jnp

from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

CONFIG = config_lib.ModelConfig(
    vocab_size=256,
    d_model=32,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=64,
    window=16,
    sinks=2,
    chunk=8,
    d_mem=8,
)


class ByteTokenizer:
    """One token for each byte of UTF-8; no special tokens."""

    chat_template = "ROLE: CONTENT, each on its line"

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The bytes."""
        return list(text.encode())

    def decode(self, ids: list[int]) -> str:
        """The text, with a replacement character for what is not UTF-8."""
        return bytes(ids).decode(errors="replace")

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        """Lines of "role: content"."""
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        text += "assistant: " if add_generation_prompt else ""
        return self.encode(text) if tokenize else text


def backbone(seed: int = 0) -> lm.Params:
    """Random backbone of `CONFIG`, scaled so that attention and head matter more than they would at the start."""
    params = lm.init_params(CONFIG.replace(mixer="full"), seed)
    embedding = params["embed"]["embedding"]
    return {**params, "embed": {"embedding": jax.random.normal(jax.random.key(seed), embedding.shape, jnp.float32)}}

"""A random Llama of two layers with a byte-level tokenizer and a chat template, written as a Hugging Face folder."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers, trainers

import allmem_jax
from allmem_jax.checkpoints import layout
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "the whale and the sea were white, and the ship sailed on over the sea. " * 20


def tiny_tokenizer():
    """Byte-level BPE: 256 bytes, the end of a turn, and a few merges."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        [WORDS], trainers.BpeTrainer(vocab_size=280, special_tokens=special, initial_alphabet=alphabet)
    )
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def write(path: pathlib.Path) -> pathlib.Path:
    """The folder, without a memory."""
    tokenizer = tiny_tokenizer()
    config = config_lib.ModelConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        n_layers=2,
        n_heads=2,
        n_kv_heads=1,
        head_dim=8,
        d_ff=16,
        d_mem=8,
        window=24,
        sinks=2,
        chunk=8,
    )
    shapes = jax.eval_shape(lambda: lm.init_params(config.replace(mixer="full")))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.3, leaf.shape), jnp.float32), shapes)
    allmem_jax.save_pretrained(path, config, params, tokenizer)
    (path / layout.ALLMEM_CONFIG).unlink()
    return path

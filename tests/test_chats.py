"""Tokenizers and chat templates as people have them: what stands before a text, and which tokens are a response."""

import pytest
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from allmem_jax import tokenizer as tokenizer_lib

pytestmark = pytest.mark.core

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")


def byte_tokenizer(template=None, eos="<|im_end|>", single=None):
    """A byte-level tokenizer without merges; `single` is how its post-processor writes a text."""
    letters = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    if single:
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos)
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("single", "prefix"),
    [(None, []), ("<s> $A", [0]), ("$A </s>", []), ("<s> $A </s>", [0]), ("</s> $A </s>", [1])],
)
def test_the_prefix_is_what_stands_before_a_text(single, prefix):
    assert tokenizer_lib.prefix_tokens(byte_tokenizer(single=single)) == prefix

"""Where a text ends: the ids that finish a text or a turn, from every place that a model states them.

A model may have several, and no one place lists them all: Llama 3.1's turn ends with an id that only its
generation_config.json names, and a fine-tuned model's often stands in its chat template alone.
"""

import reprlib
import warnings
from collections.abc import Mapping
from typing import Any

import transformers

# What the supported families, and models tuned from them, end a text or a turn with.
TURN_ENDS = """
    <|im_end|> <|eot_id|> <|eom_id|> <|end_of_text|> <|endoftext|> <end_of_turn> <|end|> </s> <eos> <EOT> [EOT] [EOS]
    <end_of_utterance> <\uff5cend\u2581of\u2581sentence\uff5c>
""".split()
_GGUF_KEYS = tuple(f"tokenizer.ggml.{name}_token_id" for name in "eos eot eom fim_pad fim_rep fim_sep".split())
_MARKER = "ANSWER"


def of_tokenizer(tokenizer: transformers.PreTrainedTokenizerBase) -> set[int]:
    """The ids that a tokenizer tells: its end of sequence, known turn ends, and what its chat template puts there.

    That of a loaded model tells all that the model's files state, for those who have no config at hand.
    """
    added = tokenizer.get_added_vocab()
    ids = {added[text] for text in TURN_ENDS if text in added} | set(getattr(tokenizer, "stated_ends", ()))
    if tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    return ids | of_template(tokenizer, added)


def of_template(tokenizer: transformers.PreTrainedTokenizerBase, added: Mapping[str, int]) -> set[int]:
    """The added token that the chat template writes after an answer; none where it writes text, or cannot be rendered.

    Args:
      tokenizer: it may have no template.
      added: its added tokens and their ids.
    """
    if not tokenizer.chat_template:
        return set()
    messages = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": _MARKER}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template is a program of the model's author and may raise anything
        return set()
    _, found, tail = rendered.rpartition(_MARKER)
    begins = [text for text in added if found and text.strip() and tail.lstrip().startswith(text.lstrip())]
    return {added[max(begins, key=len)]} if begins else set()


def of_hf(config: Mapping[str, Any], generation: Mapping[str, Any]) -> dict[str, Any]:
    """What a folder's files say, by place.

    Args:
      config: the contents of config.json; those of multimodal models hold a config of the language model.
      generation: the contents of generation_config.json; empty where there is none.
    """
    nested = config.get("text_config")
    return {
        "eos_token_id of generation_config.json": generation.get("eos_token_id"),
        "eos_token_id of config.json": config.get("eos_token_id"),
        "text_config.eos_token_id of config.json": nested.get("eos_token_id") if isinstance(nested, Mapping) else None,
    }


def of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file's header says, by key; the keys that llama.cpp ends a text at."""
    return {key: metadata.get(key) for key in _GGUF_KEYS}


def gather(stated: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """The union, sorted. What is no id of the vocabulary is left out with a warning that says where it stands.

    Args:
      stated: place -> None, an id or a list of them, as it was read.
      vocab_size: number of the model's token ids.
    """
    ids: set[int] = set()
    for place, value in stated.items():
        listed = [] if value is None else list(value) if isinstance(value, list | tuple | set) else [value]
        good = [type(each) is int and 0 <= each < vocab_size for each in listed]
        ids.update(each for each, fits in zip(listed, good, strict=True) if fits)
        if bad := [each for each, fits in zip(listed, good, strict=True) if not fits]:
            what = "is no token id" if len(bad) == 1 else "are no token ids"
            shown = ", ".join(map(reprlib.repr, bad[:5]))
            warnings.warn(f"{place}: {shown} {what} below vocab_size={vocab_size}; left out", stacklevel=2)
    return tuple(sorted(ids))

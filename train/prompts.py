"""Prompts to answer: records of text or conversations that end with the user, as the student will read them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import tqdm

from allmem_jax import stores
from train import documents, records


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
      id: from 0, in the order of the file.
      messages: a conversation that ends with the user.
      tokens: what the student reads, up to where its answer begins.
    """

    id: int
    messages: list[dict[str, str]]
    tokens: list[int]


def read(path: str, tokenizer: Any, longest: int) -> list[Prompt]:
    """Every prompt of a file of {"prompt": TEXT} or {"messages": [...]}.

    Their tokens are those that training on the answers will see: `documents.chat_document` makes both.

    Raises:
      ValueError: the first record that is no prompt, or has more than `longest` tokens.
    """
    prompts: list[Prompt] = []
    for where, messages in tqdm.tqdm(_conversations(path), desc="reading prompts", delay=2, leave=False, disable=None):
        answered = [*messages, {"role": "assistant", "content": ""}]
        document = documents.chat_document(where, answered, tokenizer)
        tokens = document.tokens[: np.flatnonzero(~document.response)[-1] + 1].tolist()
        if len(tokens) > longest:
            raise ValueError(
                f"{where} has {len(tokens)} tokens and max_prompt={longest}: raise it, or take the record out"
            )
        prompts.append(Prompt(len(prompts), messages, tokens))
    return prompts


def _conversations(path: str) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """The name of each record, for errors, and its conversation, which the user has the last word in."""
    file, kinds = stores.local(path), records.SUFFIXES[1:]
    if not file.is_file() or file.suffix not in kinds:
        raise ValueError(f"prompts={path!r} must be a {', '.join(kinds)} file that exists")
    records.find([file])  # refuses an empty file and a pointer to one
    for number, content, _ in records.read(file, "prompt"):
        where = records.name(file, number)
        messages: list[Any] = [{"role": "user", "content": content}] if isinstance(content, str) else content
        last = messages[-1] if messages else None
        if not isinstance(last, dict) or last.get("role") != "user" or not str(last.get("content") or "").strip():
            raise ValueError(f"{where} must end with a turn of the user that is not empty; it ends with {last!r:.200}")
        yield where, messages

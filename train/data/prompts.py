"""Prompts to answer: records of text or conversations that end with the user, as the student will read them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import tqdm

from allmem_jax.storage import stores
from train.data import encode, formats, records


class Prompt(NamedTuple):
    """One prompt.

    Attributes:
      id: from 0, in the order of the file.
      messages: a conversation that ends with the user.
      tokens: what the student reads, up to where its answer begins.
      tools: what the conversation offers; training on the answer needs them too.
    """

    id: int
    messages: list[dict[str, Any]]
    tokens: list[int]
    tools: list[Any] | None = None


def read(path: str, tokenizer: Any, longest: int) -> list[Prompt]:
    """Every prompt of a file; see `formats.prompt`.

    Their tokens are those that training on the answers will see: `encode` makes both.

    Raises:
      ValueError: the first record that is no prompt, or has more than `longest` tokens.
    """
    prompts: list[Prompt] = []
    for where, chat in tqdm.tqdm(_conversations(path), desc="reading prompts", delay=2, leave=False, disable=None):
        tokens = encode.prompt_tokens(where, chat, tokenizer)
        if len(tokens) > longest:
            raise ValueError(
                f"{where} has {len(tokens)} tokens and max_prompt={longest}: raise it, or take the record out"
            )
        prompts.append(Prompt(len(prompts), chat.messages, tokens, chat.tools))
    return prompts


def _conversations(path: str) -> Iterator[tuple[str, formats.Chat]]:
    """The name of each record, for errors, and its conversation, in which the model has the next word."""
    file, kinds = stores.local(path), records.SUFFIXES[1:]
    if not file.is_file() or records.kind(file).removesuffix(".gz") not in kinds:
        raise ValueError(f"prompts={path!r} must be a {', '.join(kinds)} file that exists")
    records.find([file])  # refuses an empty file and a pointer to one
    for number, chat, _ in records.read(file, formats.prompt):
        where = records.name(file, number)
        last = chat.messages[-1] if chat.messages else {}
        if last.get("role") not in ("user", "tool") or not last["content"].strip():
            raise ValueError(f"{where} must end with a turn of the user that is not empty; it ends with {last!r:.200}")
        yield where, chat

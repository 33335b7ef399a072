"""Records to tokens: a document of each, with what a loss on responses alone is about, and the tokens of a prompt.

n tokens of a document
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from train.data import chats, formats


class Tokenizer(Protocol):
    """What is needed of a tokenizer; those of transformers have it, and offsets of tokens besides."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool, tokenize: bool
    ) -> Any:
        """A conversation as one string (tokenize=False); with `tools` where a record has some."""


class Edges(NamedTuple):
    """What stands at the edges of plain text.

    Attributes:
      prefix: before every piece of it: the begin-of-sequence token, where the tokenizer puts one.
      end: the last token of a document; None for none.
    """

    prefix: tuple[int, ...]
    end: int | None


def edges(tokenizer: Tokenizer, end_of_text: bool) -> Edges:
    """The tokenizer's own edges; without `end_of_text`, documents just break off."""
    from allmem_jax.checkpoints import tokenizer as tokenizer_lib  # here, as processes that make tokens are given these

    end = getattr(tokenizer, "eos_token_id", None) if end_of_text else None
    return Edges(tuple(tokenizer_lib.prefix_tokens(tokenizer)), end)


@dataclasses.dataclass(frozen=True)
class Document:
    """One document's tokens.

    Attributes:
      name: where it is from, for errors.
      tokens: int32 [n].
      response: bool [n], the tokens that a loss on responses alone is about; all of them in plain text.
      prefix: what every piece cut from it starts with: the begin-of-sequence token, where the tokenizer puts one.
    """

    name: str
    tokens: np.ndarray
    response: np.ndarray
    prefix: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


def document(where: str, content: formats.Content, tokenizer: Tokenizer, ends: Edges) -> Document:
    """A record's tokens; `where` is its name, for errors.

    Raises:
      ValueError: the tokenizer makes nothing of it, or see `chat_document`.
    """
    if isinstance(content, formats.Chat) and content.plain and not getattr(tokenizer, "chat_template", None):
        *asked, answer = (turn["content"] for turn in content.messages)
        content = formats.Completion("".join(f"{said}\n" for said in asked), answer)
    if isinstance(content, formats.Chat):
        document = chat_document(where, content.messages, tokenizer, content.tools)
    else:
        document = _plain_document(where, content, tokenizer, ends)
    if not len(document):
        raise ValueError(f"{where} is empty: the tokenizer makes no token of it; remove it")
    return document


def _plain_document(where: str, content: str | formats.Completion, tokenizer: Tokenizer, ends: Edges) -> Document:
    """A text whose edges are the tokenizer's, each once where the text has them itself; all of a text is a response."""
    prompt, text = ("", content) if isinstance(content, str) else content
    cuts = [0, len(prompt), len(prompt + text)] if prompt else [0, len(text)]
    *before, said = _pieces(where, prompt + text, cuts, tokenizer)
    asked = [token for ids in before for token in ids]
    ids, response = asked + said, [False] * len(asked) + [True] * len(said)
    first = len(ends.prefix) if tuple(ids[: len(ends.prefix)]) == ends.prefix else 0
    if ends.end is not None and ids and ids[-1] != ends.end:
        ids, response = [*ids, ends.end], [*response, True]
    return Document(where, np.asarray(ids[first:], np.int32), np.asarray(response[first:], bool), ends.prefix)


def chat_document(
    name: str, messages: list[dict[str, Any]], tokenizer: Tokenizer, tools: list[Any] | None = None
) -> Document:
    """A conversation in the tokenizer's chat template, with `response` on what the assistant says and ends with.

    The text is what the template makes of the whole; tokens never cross the edges of an answer, as in generation.

    Raises:
      ValueError: no conversation, none that the template takes (see `chats`), or none to learn from.
    """
    turns = [formats.turn(name, message) for message in messages]
    if not any(turn["role"] == "assistant" and turn.get("train", True) for turn in turns):
        raise ValueError(f"{name} has no message of the assistant to learn from")
    pieces = _chat_pieces(name, formats.Chat(turns, tools), tokenizer)
    tokens = np.asarray([token for ids, _ in pieces for token in ids], np.int32)
    return Document(name, tokens, np.asarray([learned for ids, learned in pieces for _ in ids], bool))


def prompt_tokens(name: str, chat: formats.Chat, tokenizer: Tokenizer) -> list[int]:
    """The tokens of a conversation up to the answer that it waits for, as training on that answer sees them."""
    answered = [*chat.messages, {"role": "assistant", "content": "a"}]
    pieces = _chat_pieces(name, chat._replace(messages=answered), tokenizer)
    last = max(number for number, (_, learned) in enumerate(pieces) if learned)
    return [token for ids, _ in pieces[:last] for token in ids]


def _chat_pieces(name: str, chat: formats.Chat, tokenizer: Tokenizer) -> list[tuple[list[int], bool]]:
    """The tokens of a conversation, cut at the edges of its answers, each piece with whether it is to be learned."""
    text, answers = chats.render(name, chat, tokenizer)
    cuts = [0, *(edge for answer in answers for edge in (answer.start, answer.stop)), len(text)]
    learned = [flag for answer in answers for flag in (False, answer.learned)] + [False]
    return list(zip(_pieces(name, text, cuts, tokenizer), learned, strict=True))


def _pieces(where: str, text: str, cuts: Sequence[int], tokenizer: Any) -> list[list[int]]:
    """Token ids of a text between cuts (first 0, last its length): those of the whole, unless one crosses a cut.

    Special tokens may swallow white space across a cut, and are of the piece that they start in.
    """
    try:
        text.encode()  # tokenizers do not say what is wrong with half a surrogate pair, which JSON may hold
    except UnicodeEncodeError as error:
        raise ValueError(f"{where} has half a surrogate pair, which is no text: {error}") from None
    if len(cuts) == 2:
        return [tokenizer.encode(text, add_special_tokens=False)]
    if not getattr(tokenizer, "is_fast", False):
        return [tokenizer.encode(text[a:b], add_special_tokens=False) for a, b in itertools.pairwise(cuts)]
    whole = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    starts, stops = np.asarray(whole["offset_mapping"], np.int64).reshape(-1, 2).T
    starts = np.minimum(starts, [0, *np.maximum.accumulate(stops)[:-1]])  # some leave out the space before a word
    plain = ~np.isin(whole["input_ids"], tokenizer.all_special_ids)
    crossed = [at for at, cut in enumerate(cuts) if np.any(plain & (starts < cut) & (cut < stops))]
    if crossed:
        parts = [cuts[a : b + 1] for a, b in itertools.pairwise([0, *crossed, len(cuts) - 1])]
        return [
            ids
            for part in parts
            for ids in _pieces(where, text[part[0] : part[-1]], [cut - part[0] for cut in part], tokenizer)
        ]
    edges = np.searchsorted(np.maximum.accumulate(starts), cuts[1:-1])
    return [ids.tolist() for ids in np.split(np.asarray(whole["input_ids"], np.int64), edges)]

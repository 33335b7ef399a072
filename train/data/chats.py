"""Conversations to the text that a chat template makes of them, and where in it each answer stands.

The text is always that of the whole conversation, as templates change a turn once others follow: many leave out what
was thought in earlier ones. An answer starts where the template asks for it and ends with the token that ends a turn,
as the model would generate it; what the template writes after that is no part of it.
"""

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from train.data import formats

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
# How templates write the arguments of a call where they take an object; others take the JSON text of one.
_OBJECT = re.compile(r"(?:arguments|function|tool_calls?)['\"\])]*\s*(?:\|\s*(?:tojson|items)|\.items)")
_STAND_IN = "\ue000answer\ue000"  # with characters of private use

Draw = Callable[[Sequence[dict[str, Any]], bool], str]  # some turns, and whether an answer is asked for, to their text
Span = tuple[int, int]


class Answer(NamedTuple):
    """What the assistant says in a turn: `text[start:stop]`, and whether it carries a loss."""

    start: int
    stop: int
    learned: bool


def render(name: str, chat: formats.Chat, tokenizer: Any) -> tuple[str, list[Answer]]:
    """The text of a conversation and the answers in it, in order.

    Args:
      name: of the record, for errors.
      chat: turns as `formats.turn` makes them.
      tokenizer: whose template it is.

    Raises:
      ValueError: the template refuses the conversation or knows nothing of a part of it, or an answer cannot be found
        in what it makes of it.
    """
    template = getattr(tokenizer, "chat_template", None) or ""
    template = "\n".join(template.values()) if isinstance(template, dict) else template
    turns = [_turn(name, message, template) for message in chat.messages]
    if chat.tools and not _knows(template, "tools"):
        raise ValueError(f"{name} has tools, of which the tokenizer's chat template knows nothing: take the record out")
    flags = [turn.pop("train", True) for turn in turns]
    learned = [flag for flag, turn in zip(flags, turns, strict=True) if turn["role"] == "assistant"]
    draw = functools.partial(_draw, name, tokenizer, chat.tools)
    text, stops = draw(turns, False), _stops(tokenizer, template)
    spans = _marked(name, turns, chat.tools, tokenizer, draw, text) if _GENERATION.search(template) else []
    if not spans:
        starts = [_start(name, draw, turns, index, text) for index in _said(turns)]
        found = zip(_said(turns), starts, strict=True)
        spans = [(start, _stop(name, draw, turns, index, text, start)) for index, start in found]
    if len(spans) != len(learned):
        if not all(learned):
            raise ValueError(
                f"{name}: the chat template marks {len(spans)} answers of {len(learned)}, so none can be "
                "left out: take the record out"
            )
        learned = [True] * len(spans)
    return text, [Answer(*_trimmed(span, text, stops), flag) for span, flag in zip(spans, learned, strict=True)]


def _turn(name: str, message: dict[str, Any], template: str) -> dict[str, Any]:
    """A turn of which the template knows all, with arguments of calls as it writes them."""
    for field in ("tool_calls", *_REASONING):
        known = _REASONING if field in _REASONING else (field,)  # transformers gives reasoning each of its names
        if message.get(field) and not _knows(template, *known):
            raise ValueError(
                f"{name} has {field}, of which the tokenizer's chat template knows nothing: take the record out"
            )
    calls = message.get("tool_calls")
    if not isinstance(calls, list) or not _OBJECT.search(template):
        return dict(message)
    return message | {"tool_calls": [formats.call_with_object(call) for call in calls]}


def _knows(template: str, *fields: str) -> bool:
    return bool(re.search(rf"\b({'|'.join(fields)})\b", template))


def _said(turns: Sequence[dict[str, Any]]) -> list[int]:
    return [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]


def _draw(name: str, tokenizer: Any, tools: list[Any] | None, turns: Sequence[dict[str, Any]], prompt: bool) -> str:
    """What the template makes of some turns; `prompt` asks for the next answer."""
    options = {"tools": tools} if tools else {}
    try:
        return str(tokenizer.apply_chat_template(list(turns), add_generation_prompt=prompt, tokenize=False, **options))
    except Exception as error:  # a template is a program, and what it raises is about what it was given
        raise _refused(name, error) from None


def _refused(name: str, error: Exception) -> ValueError:
    return ValueError(f"{name}: the tokenizer's chat template does not take this conversation: {error}")


@functools.lru_cache(maxsize=1)  # all records of a run have one tokenizer, and its template is rendered for this
def _stops(tokenizer: Any, template: str) -> tuple[str, ...]:
    """The texts of the tokens that end a turn in a template of the tokenizer's."""
    if not hasattr(tokenizer, "get_added_vocab"):
        return ()
    from allmem_jax.decoding import chat as text_lib  # here, as processes that make tokens of texts alone need no jax

    return tuple(tokenizer.convert_ids_to_tokens(text_lib.stop_tokens(tokenizer)))


def _trimmed(span: Span, text: str, stops: Sequence[str]) -> Span:
    """An answer up to its first end of turn, that which follows it at once included."""
    start, stop = span
    inside = [text.index(end, start, stop) + len(end) for end in stops if end in text[start:stop]]
    after = [stop + len(end) for end in stops if text.startswith(end, stop)]
    return start, min(inside or after or [stop])


def _marked(
    name: str, turns: list[dict[str, Any]], tools: list[Any] | None, tokenizer: Any, draw: Draw, text: str
) -> list[Span]:
    """What stands between {% generation %} and {% endgeneration %}, without the words that ask for an answer."""
    from transformers.utils import chat_template_utils

    render_marked: Any = chat_template_utils.render_jinja_template  # whose type leaves out what this returns
    template = tokenizer.get_chat_template(None, tools)
    options = tokenizer.special_tokens_map | {"return_assistant_tokens_mask": True}
    try:
        (drawn,), (spans,) = render_marked([turns], tools=tools, chat_template=template, **options)
    except Exception as error:  # as in `_draw`
        raise _refused(name, error) from None
    asked = draw(turns, True)
    ask = asked[len(text) :] if asked.startswith(text) else ""
    if drawn != text:  # the time of day is in it, say
        return []
    spans = [(start + len(ask) * text.startswith(ask, start, stop), stop) for start, stop in spans]
    return [(start, stop) for start, stop in spans if start < stop]


def _start(name: str, draw: Draw, turns: Sequence[dict[str, Any]], index: int, text: str) -> int:
    """Where the answer of a turn starts in the text of all."""
    try:
        asked = draw(turns[:index], True)
    except ValueError:  # some templates refuse a beginning, and none at all
        asked = ""
    if asked and text.startswith(asked):
        return len(asked)
    # Earlier turns have changed, or the template asks with words that it leaves out later: where would another stand?
    other = draw([*turns[:index], turns[index] | {"content": _STAND_IN}, *turns[index + 1 :]], False)
    before, found, _ = other.partition(_STAND_IN)
    if found and text.startswith(before):
        return len(before)
    raise _lost(name, index)


def _stop(name: str, draw: Draw, turns: Sequence[dict[str, Any]], index: int, text: str, start: int) -> int:
    """Where the turn of an answer ends in the text of all."""
    if index == len(turns) - 1:
        return len(text)
    alone = draw(turns[: index + 1], False)
    if len(alone) > start and text.startswith(alone):
        return len(alone)
    # Once others follow, a turn is an ending of what it was: without what was thought in it.
    first = text[start : start + 1]
    for at, letter in enumerate(alone):
        if letter == first and text.startswith(alone[at:], start) and alone[at:].strip():
            return start + len(alone) - at
    raise _lost(name, index)


def _lost(name: str, index: int) -> ValueError:
    return ValueError(
        f"{name}: the chat template renders turn {index + 1} so differently once others follow that its answer cannot "
        "be found; split the conversation so that each record ends at one answer"
    )

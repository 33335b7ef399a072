"""A record to what is learned from it: a text, a prompt with its completion, or a conversation as templates take it.

The first of these that a record has decides; null counts as absent, as everywhere here:

    {"messages": [...]} or {"conversations": [...]}    turns, each {"role", "content"} or {"from", "value"}
    {"text": TEXT}
    {"prompt", "completion"} or {"prompt", "response"}    two texts, or two lists of turns; the loss is on the second
    {"instruction", "input", "output"}    a conversation of one turn; before it, "history" has pairs of earlier ones

Beside a conversation, "tools" (or "functions", or a JSON text of them) go to the chat template, and "system" is its
first turn. Turns have the roles of `_ROLES`; their content is a text or parts that are texts, and null only beside
calls of tools. The "weight" of a turn (0 or 1), its "train" or its "loss" says whether that answer carries a loss.
Other fields of a turn go to the template. What would change the meaning and cannot be honoured (`_REFUSED`) is an
error; other fields of a record, and all of them beside a text, are taken for notes on it.
"""

import json
import reprlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

KINDS = ("messages", "conversations", "text", "prompt", "instruction")  # a record has one of these
_MEDIA = ("images", "image", "audio", "audios", "video", "videos")
_REFUSED = (*_MEDIA, "documents", "chat_template_kwargs")
_FLAGS = ("weight", "train", "loss")
FIELDS = (
    *KINDS,
    "completion",
    "response",
    "input",
    "output",
    "history",
    "system",
    "tools",
    "functions",
    "label",
    "weight",
    "train",
    *_REFUSED,
)
_ROLES = {
    **dict.fromkeys(("system", "developer", "user", "assistant", "tool", "ipython")),
    **dict.fromkeys(("human",), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "bot", "model"), "assistant"),
    **dict.fromkeys(("function_call", "tool_call"), "assistant"),
    **dict.fromkeys(("function", "observation", "tool_response", "function_response"), "tool"),
}
_CALLS = ("function_call", "tool_call")  # roles whose content is a call, as JSON


class Completion(NamedTuple):
    """A text whose end is to be learned from its beginning."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """A conversation.

    Attributes:
      messages: turns as `turn` makes them.
      tools: what the template is to offer, as it takes them.
      plain: the contents alone are a text too, for a tokenizer without a template; the last is what is learned.
    """

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None
    plain: bool = False


Content = str | Completion | Chat


def document(where: str, record: Any) -> Content:
    """What is learned from a record; ValueError, naming `where`, if it is none of the kinds or only half of one."""
    found = _present(record)
    if (chat := _chat(where, found)) is not None:
        return chat
    text, prompt = found.get("text"), found.get("prompt")
    if isinstance(text, str) and text.strip():
        return text.removeprefix("\ufeff")
    completion = found.get("completion", found.get("response"))
    if prompt is not None and completion is not None:
        _check(where, found)
        return _completed(where, found, prompt, completion)
    if "instruction" in found and "output" in found:
        _check(where, found)
        output = found["output"]
        if not isinstance(output, str) or not output.strip():
            raise ValueError(f'{where} has an "output" that is no text: {reprlib.repr(output)}; mend or remove it')
        asked = _instruction(where, found)
        return asked._replace(messages=[*asked.messages, {"role": "assistant", "content": output}])
    raise ValueError(
        f'{where} has neither a non-empty "text" nor a list of "messages" or "conversations", "prompt" with '
        f'"completion", or "instruction" with "output"; mend or remove {reprlib.repr(record)}'
    )


def prompt(where: str, record: Any) -> Chat:
    """What is asked in a record: its conversation, or its prompt or instruction without what answers those."""
    found = _present(record)
    if (chat := _chat(where, found)) is not None:
        return chat
    asked = found.get("prompt")
    if isinstance(asked, list):
        return Chat(_turns(where, found, asked), _tools(where, found))
    if isinstance(asked, str) and asked.strip():
        return Chat(_turns(where, found, [{"role": "user", "content": asked}]), _tools(where, found))
    if "instruction" in found:
        return _instruction(where, found)
    raise ValueError(
        f'{where} has neither a non-empty "prompt" nor a list of "messages" or "conversations", or an "instruction"; '
        f"mend or remove {reprlib.repr(record)}"
    )


def turn(where: str, value: Any) -> dict[str, Any]:
    """A turn as chat templates take it: "role", "content" and fields of its own; "train" is there where it is false.

    What has this form stays as it is.

    Raises:
      ValueError: a role that is not known, or content that is no text.
    """
    fields = _present(value)
    said = fields.pop("role", fields.pop("from", None))
    content = fields.pop("content", fields.pop("value", None))
    if not isinstance(said, str):
        raise ValueError(f'{where}: a message needs a "role" and a "content"; got {reprlib.repr(value)}')
    if said not in _ROLES:
        raise ValueError(f"{where}: role {said!r} is not known; name it one of {', '.join(_ROLES)}")
    for name in (*_MEDIA, "refusal", "train_detail"):
        if fields.get(name):
            raise ValueError(f"{where}: the {name} of a message cannot be learned from; take the record out")
    role = _ROLES[said] or said
    if said in _CALLS:
        fields["tool_calls"], content = _calls(where, content), None
    elif "function_call" in fields:
        fields.setdefault("tool_calls", _calls(where, fields.pop("function_call")))
    learned = _learned(where, role, {name: fields.pop(name) for name in _FLAGS if name in fields})
    if isinstance(content, list):
        content = _joined(where, content)
    if not isinstance(content, str) and (content is not None or role != "assistant" or not fields.get("tool_calls")):
        raise ValueError(f'{where}: a message needs a "role" and a "content", a text; got {reprlib.repr(value)}')
    return {"role": role, "content": content, **fields} | ({} if learned else {"train": False})


def _present(value: Any) -> dict[str, Any]:
    """The fields of a record or a turn that are not null."""
    return {name: field for name, field in value.items() if field is not None} if isinstance(value, Mapping) else {}


def _check(where: str, record: Mapping[str, Any]) -> None:
    """Raises a ValueError where a field would change what the record means."""
    for name in _REFUSED:
        if record.get(name):
            raise ValueError(f"{where} has {name}, which cannot be learned from; take the record out, or that field")
    for name in ("weight", "train"):
        if record.get(name, 1) != 1:
            raise ValueError(f"{where} has {name}={record[name]!r}: mark single turns with it, or take the record out")
    if record.get("label") is False:
        raise ValueError(f"{where} has label=false, an answer not to be learned; take the record out")


def _chat(where: str, record: Mapping[str, Any]) -> Chat | None:
    """The conversation of a record that has one."""
    name = next((name for name in ("messages", "conversations") if name in record), None)
    if name is None:
        return None
    turns = record[name]
    if not isinstance(turns, list):
        raise ValueError(f'{where} has neither a list of "{name}" nor null there; mend or remove {reprlib.repr(turns)}')
    return Chat(_turns(where, record, turns), _tools(where, record))


def _turns(where: str, record: Mapping[str, Any], values: Iterable[Any]) -> list[dict[str, Any]]:
    """All turns of a conversation, that of the record's "system" before them."""
    _check(where, record)
    turns = [turn(where, value) for value in values]
    system = record.get("system")
    if not system:
        return turns
    if turns and turns[0]["role"] == "system":
        raise ValueError(f'{where} has a "system" beside a conversation that begins with one: keep one of them')
    return [turn(where, {"role": "system", "content": system}), *turns]


def _tools(where: str, record: Mapping[str, Any]) -> list[Any] | None:
    tools = _parsed(record.get("tools"))
    functions = _parsed(record.get("functions"))
    if not tools and isinstance(functions, list):
        tools = [{"type": "function", "function": function} for function in functions]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise ValueError(f"{where} has tools that are no list of objects: {reprlib.repr(tools)}")
    return tools or None


def _completed(where: str, record: Mapping[str, Any], prompt: Any, completion: Any) -> Content:
    if isinstance(prompt, str) and isinstance(completion, str) and completion.strip():
        return Completion(prompt.removeprefix("\ufeff"), completion)
    if isinstance(prompt, list) and isinstance(completion, list):
        asked = _turns(where, record, prompt)
        quiet = [message | {"train": False} if message["role"] == "assistant" else message for message in asked]
        return Chat([*quiet, *(turn(where, value) for value in completion)], _tools(where, record))
    raise ValueError(
        f"{where}: prompt and completion must be two texts, the latter not empty, or two lists of messages; "
        f"got {reprlib.repr(prompt)} and {reprlib.repr(completion)}"
    )


def _instruction(where: str, record: Mapping[str, Any]) -> Chat:
    """The conversation that an instruction is the end of."""
    parts = [record["instruction"], record.get("input", "")]
    if not all(isinstance(part, str) for part in parts) or not any(part.strip() for part in parts):
        raise ValueError(f'{where} has an "instruction" or an "input" that is no text; mend or remove {parts!r:.200}')
    history = record.get("history", [])
    if not (isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)):
        raise ValueError(f'{where} has a "history" that is no list of pairs: {reprlib.repr(history)}')
    earlier = [
        {"role": role, "content": said}
        for pair in history
        for role, said in zip(("user", "assistant"), pair, strict=True)
    ]
    asked = {"role": "user", "content": "\n".join(part for part in parts if part)}
    return Chat(_turns(where, record, [*earlier, asked]), _tools(where, record), plain=True)


def _learned(where: str, role: str, flags: Mapping[str, Any]) -> bool:
    """Whether a turn carries a loss; only what the assistant says can."""
    for name, value in flags.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise ValueError(f"{where}: {name}={value!r} of a message must be 0 or 1, or false or true")
        if role != "assistant" and value and name != "weight":
            raise ValueError(f"{where}: {name}={value!r} on a message of the {role}: only the assistant's are learned")
    return role != "assistant" or all(flags.values())


def _joined(where: str, parts: list[Any]) -> str:
    """The text of content that comes in parts."""
    texts = []
    for part in map(_present, parts):
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError(
                f"{where}: a part of a message's content has type {part.get('type')!r}: only texts, "
                '{"type": "text", "text": ...}, can be learned from'
            )
        texts.append(part["text"])
    return "".join(texts)


def _calls(where: str, content: Any) -> list[dict[str, Any]]:
    """Calls of tools in today's form, from one or a list of {"name", "arguments"}, or JSON of that."""
    calls = _parsed(content)
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(
            f'{where}: a call of a function must be JSON like {{"name": ..., "arguments": ...}}; got '
            f"{reprlib.repr(content)}"
        )
    return [{"type": "function", "function": {"arguments": {}, **call}} for call in calls]


def call_with_object(call: Any) -> Any:
    """A call whose arguments are an object where they were the JSON text of one."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(arguments := _parsed(function.get("arguments")), dict):
        return call
    return call | {"function": function | {"arguments": arguments}}


def _parsed(value: Any) -> Any:
    """A value that may be there as JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value

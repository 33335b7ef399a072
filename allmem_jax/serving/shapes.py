"""Requests and answers in the shapes of OpenAI's interface: completions, chat completions, models, errors.

Fields that would change an answer and are not served are refused by name where they say anything; unknown ones are
ignored, as clients send many. `top_k` and `memory` are this server's own.
"""

import time
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import pydantic

from allmem_jax.serving import engine as engine_lib

MOST_CHOICES = 16
_Count = Annotated[int, pydantic.Field(ge=1)]


def _whole(text: str) -> str:
    """`text`, or a ValueError where JSON's escapes left half of a surrogate pair in it, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is half of a surrogate pair, which is no text") from None
    return text


_Text = Annotated[str, pydantic.AfterValidator(_whole)]


class Refused(Exception):
    """An answer other than 200, as OpenAI's clients expect it."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        """`status` of HTTP; `message` says what to do; `param` is the field; `code` is for programs."""
        super().__init__(message)
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Problem(pydantic.BaseModel):
    """What was wrong with a request, `param` in which field; `code` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class Failure(pydantic.BaseModel):
    """The body of a `Refused`."""

    error: Problem


class StreamOptions(pydantic.BaseModel):
    """What a stream ends with."""

    include_usage: bool = False


class Common(pydantic.BaseModel):
    """What both kinds of request have."""

    model: str = ""
    memory: str | None = None
    temperature: float = pydantic.Field(1.0, ge=0, le=100)
    top_p: float = pydantic.Field(1.0, gt=0, le=1)
    top_k: int = pydantic.Field(0, ge=0, lt=2**31)
    n: int = pydantic.Field(1, ge=1, le=MOST_CHOICES)
    seed: int | None = None
    stop: _Text | list[_Text] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # Refused unless they say nothing.
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None
    suffix: str | None = None
    echo: bool = False
    best_of: int | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def check(self) -> None:
        """Refuses what is not served."""
        names = ("presence_penalty", "frequency_penalty", "logit_bias", "tools", "functions", "suffix", "echo")
        asked = [name for name in names if getattr(self, name)]
        if self.best_of not in (None, self.n):
            asked.append("best_of")
        if (self.response_format or {}).get("type", "text") != "text":
            asked.append("response_format")
        if asked:
            raise Refused(400, f"{asked[0]} is not supported by this server: leave it out", asked[0], "unsupported")
        if "" in self.stops:
            raise Refused(400, "a stop string is empty: give the text to stop at", "stop")


class Completion(Common):
    """POST /v1/completions."""

    prompt: _Text | list[int] | list[_Text] | list[list[int]]
    max_tokens: _Count = 16
    logprobs: int | None = pydantic.Field(None, ge=0, le=20)

    @property
    def prompts(self) -> list[str | list[int]]:
        """The prompts, each a text or token ids."""
        several = isinstance(self.prompt, list) and not (self.prompt and isinstance(self.prompt[0], int))
        prompts: Any = self.prompt if several else [self.prompt]
        return list(prompts)


class Part(pydantic.BaseModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: _Text


class Message(pydantic.BaseModel):
    """A message of a chat."""

    role: _Text
    content: _Text | list[Part] | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content or ())
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class Chat(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = pydantic.Field(min_length=1)
    max_tokens: _Count | None = None
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: int | None = pydantic.Field(None, ge=0, le=20)


class NewMemory(pydantic.BaseModel):
    """POST /v1/memories."""

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    text: _Text = pydantic.Field(min_length=1)
    memory: str | None = None
    stream: bool = False


def head(kind: str, model: str) -> dict[str, Any]:
    """What every answer, and every piece of one, begins with."""
    prefix = "cmpl" if kind.startswith("text") else "chatcmpl"
    return {"id": f"{prefix}-{uuid.uuid4().hex}", "object": kind, "created": int(time.time()), "model": model}


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """Tokens; `cached` are those of the prompt that had been read before."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def chat_logprobs(tokens: Sequence[engine_lib.Token], word: Any) -> dict[str, Any]:
    """Log-probabilities as in chats; `word` is the text of a token id."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": word(token), "logprob": logprob, "bytes": list(word(token).encode())}

    content = [entry(t.id, t.logprob) | {"top_logprobs": [entry(*each) for each in t.top]} for t in tokens]
    return {"content": content, "refusal": None}


def text_logprobs(tokens: Sequence[engine_lib.Token], word: Any, offset: int) -> dict[str, Any]:
    """Log-probabilities as in completions; `offset` is where in the text the first token begins."""
    words = [word(token.id) for token in tokens]
    offsets = [offset + sum(map(len, words[:index])) for index in range(len(words))]
    top = [{word(token): logprob for token, logprob in each.top} for each in tokens]
    logprobs = [token.logprob for token in tokens]
    return {"tokens": words, "token_logprobs": logprobs, "top_logprobs": top, "text_offset": offsets}

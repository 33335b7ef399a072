"""From a request to its answer: jobs of the engine, whose events become text in the request's own task.

One job a choice. A client that leaves has its jobs cancelled, and with them its slots.
"""

import asyncio
import contextlib
import dataclasses
import json
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any

import fastapi
import fastapi.responses

from allmem_jax.decoding import chat as chat_lib
from allmem_jax.decoding import generation
from allmem_jax.serving import engine as engine_lib
from allmem_jax.serving import memories as memories_lib
from allmem_jax.serving import shapes


@dataclasses.dataclass(frozen=True)
class Served:
    """What the server serves.

    Attributes:
      name: of the model.
      tokenizer, engine, memories: of the model.
      most: tokens of an answer whose request does not say.
      body: bytes of a request at most.
      key: what clients must send as a bearer token; None for nothing.
      origins: web pages that may use it, beside its own.
    """

    name: str
    tokenizer: chat_lib.Tokenizer
    engine: engine_lib.Engine
    memories: memories_lib.Memories
    most: int = 1024
    body: int = 64 * 2**20
    key: str | None = None
    origins: Sequence[str] = ()


class Events:
    """What the engine's thread says of a job, in the task of its request."""

    def __init__(self) -> None:
        """Belongs to the loop that runs now."""
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue[Any]()
        self.finished: engine_lib.Finished | None = None

    def deliver(self, event: Any) -> None:
        """Takes an event in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: no one listens any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def until_finished(self) -> AsyncIterator[Any]:
        """Yields `Read` and `Token`, then sets `finished`; a job that came to no end is `Refused`."""
        while not isinstance(event := await self._events.get(), engine_lib.Finished):
            yield event
        if event.reason in ("error", "cancelled"):
            raise shapes.Refused(503, event.error or "the request was cancelled", code=event.reason)
        self.finished = event


class Answer:
    """One choice as it comes: the events of its job, and the text that they make."""

    def __init__(self, served: Served, prompt: Sequence[int], stops: Sequence[str], max_tokens: int, *draws: Any):
        """`prompt` is what the answer follows; `stops` end it; `max_tokens` and `draws` are as in `engine.Job`."""
        self._events, self._tokenizer, self._stopper = Events(), served.tokenizer, chat_lib.Stopper(stops)
        self.job = engine_lib.Job(prompt, self._events.deliver, max_tokens, *draws)
        self.cached, self.drawn, self.reason = 0, 0, ""

    async def pieces(self) -> AsyncIterator[tuple[str, list[engine_lib.Token]]]:
        """Yields text that can be shown with the tokens since the text before it; sets `reason` at the end."""
        tokens: list[engine_lib.Token] = []
        decoder = chat_lib.Decoder(self._tokenizer, self.job.prompt)
        async for event in self._events.until_finished():
            if isinstance(event, engine_lib.Read):
                self.cached = event.cached
                continue
            self.drawn += 1
            tokens.append(event)
            if text := self._stopper.push(decoder.push(event.id)):
                yield text, tokens
                tokens = []
            if self._stopper.stopped:
                self.job.cancel()
                self.reason = "stop"
                return
        assert self._events.finished is not None
        rest = self._stopper.push(decoder.finish())
        if not self._stopper.stopped:
            rest += self._stopper.finish()
        self.reason = "stop" if self._stopper.stopped else self._events.finished.reason
        if rest or tokens:
            yield rest, tokens

    async def all(self) -> tuple[str, list[engine_lib.Token]]:
        """The whole text and its tokens."""
        text, tokens = "", list[engine_lib.Token]()
        async for piece, its in self.pieces():
            text, tokens = text + piece, tokens + its
        return text, tokens


async def answer(
    served: Served,
    http: fastapi.Request,
    asked: shapes.Common,
    prompts: Sequence[list[int]],
    start: engine_lib.Start | None,
    most: int,
    told: int | None,
    kind: str,
) -> Any:
    """Submits a job for every choice of every prompt, and answers with their text, whole or in a stream."""
    sampling = generation.Sampling(asked.temperature, asked.top_k, asked.top_p)
    seed = secrets.randbits(31) if asked.seed is None else asked.seed
    stops = chat_lib.stop_tokens(served.tokenizer, served.engine.config)
    answers = [
        Answer(served, prompt, asked.stops, most, sampling, seed + choice, stops, told or 0, start)
        for prompt in prompts
        for choice in range(asked.n)
    ]
    jobs = [each.job for each in answers]
    await submit(served, jobs)
    made = Made(served, kind, answers, sum(map(len, prompts)), told)
    if asked.stream:
        ends = asked.stream_options is not None and asked.stream_options.include_usage
        return stream(made.events(ends), jobs)
    return await unless_left(http, made.whole(), jobs)


@dataclasses.dataclass
class Made:
    """An answer of one or more choices in OpenAI's shape: `kind` is "text_completion" or "chat.completion"."""

    served: Served
    kind: str
    answers: Sequence[Answer]
    prompt: int  # tokens of all prompts, each once
    told: int | None

    @property
    def chat(self) -> bool:
        """Whether it answers a chat."""
        return self.kind == "chat.completion"

    def usage(self) -> dict[str, Any]:
        """Tokens of the request, of all answers together, and those that had been read before."""
        cached = max(answer.cached for answer in self.answers)
        return shapes.usage(self.prompt, cached, sum(answer.drawn for answer in self.answers))

    def logprobs(self, tokens: Sequence[engine_lib.Token], offset: int = 0) -> dict[str, Any] | None:
        """Log-probabilities where they were asked for; `offset` is where in the text the tokens begin."""
        if self.told is None:
            return None
        if self.chat:
            return shapes.chat_logprobs(tokens, self._word)
        return shapes.text_logprobs(tokens, self._word, offset)

    def _word(self, token: int) -> str:
        """The text of a token, or its name in the vocabulary where it is part of a character alone."""
        text = str(self.served.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        return str(self.served.tokenizer.convert_ids_to_tokens(token)) if "\ufffd" in text else text

    async def whole(self) -> dict[str, Any]:
        """Everything at once."""
        choices = []
        for index, (text, tokens) in enumerate(await asyncio.gather(*(answer.all() for answer in self.answers))):
            content = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            reason = self.answers[index].reason
            choices.append({"index": index, **content, "logprobs": self.logprobs(tokens), "finish_reason": reason})
        return shapes.head(self.kind, self.served.name) | {"choices": choices, "usage": self.usage()}

    async def events(self, usage: bool) -> AsyncIterator[dict[str, Any]]:
        """Piece by piece, the choices as they come; with the usage at the end where that was asked for."""
        head = shapes.head("chat.completion.chunk" if self.chat else self.kind, self.served.name)

        def piece(
            index: int, delta: dict[str, Any], tokens: Sequence[Any] = (), reason: str | None = None, at: int = 0
        ):
            content = {"delta": delta} if self.chat else {"text": delta.get("content", "")}
            told = self.logprobs(tokens, at) if tokens else None
            choice = {"index": index, **content, "logprobs": told, "finish_reason": reason}
            return head | {"choices": [choice]} | ({"usage": None} if usage else {})

        merged: asyncio.Queue[Any] = asyncio.Queue()

        async def follow(index: int, answer: Answer) -> None:
            try:
                at = 0
                if self.chat:
                    merged.put_nowait(piece(index, {"role": "assistant", "content": ""}))
                async for text, tokens in answer.pieces():
                    merged.put_nowait(piece(index, {"content": text}, tokens, at=at))
                    at += len(text)
                merged.put_nowait(piece(index, {}, reason=answer.reason))
            except shapes.Refused as error:
                merged.put_nowait(error.body)
            merged.put_nowait(None)  # it has ended

        async with asyncio.TaskGroup() as group:
            for index, answer in enumerate(self.answers):
                group.create_task(follow(index, answer))
            left = len(self.answers)
            while left:
                if (made := await merged.get()) is None:
                    left -= 1
                else:
                    yield made
        if usage:
            yield head | {"choices": [], "usage": self.usage()}


async def reading(events: Events, total: int, keep: Callable[[Any], dict[str, Any]]) -> AsyncIterator[dict[str, Any]]:
    """Yields how much of a text of `total` tokens is read, and at the end the memory that was kept."""
    async for event in events.until_finished():
        yield {"read": event.count, "of": total}
    assert events.finished is not None
    yield {"read": total, "of": total, "memory": await asyncio.to_thread(keep, events.finished.state)}


def stream(events: AsyncIterator[dict[str, Any]], jobs: Sequence[engine_lib.Job]) -> fastapi.Response:
    """Server-sent events; whoever leaves before the end has `jobs` cancelled."""

    async def lines() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"
        except shapes.Refused as error:
            yield f"data: {json.dumps(error.body)}\n\n"
        finally:
            for job in jobs:
                job.cancel()

    headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
    return fastapi.responses.StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


async def unless_left(
    http: fastapi.Request, answer: Coroutine[Any, Any, dict[str, Any]], jobs: Sequence[engine_lib.Job]
) -> Any:
    """`answer`, unless the client leaves before it is there."""

    async def left() -> None:
        while (await http.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(answer), asyncio.create_task(left())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else fastapi.Response(status_code=499)
    finally:
        for task in tasks:
            task.cancel()
        for job in jobs:
            job.cancel()


async def submit(served: Served, jobs: Sequence[engine_lib.Job]) -> None:
    """Gives jobs to the engine; what it refuses is an answer in OpenAI's shape."""
    try:
        await asyncio.to_thread(served.engine.submit, jobs)
    except ValueError as error:
        raise shapes.Refused(400, str(error), "prompt") from None
    except engine_lib.Busy as error:
        raise shapes.Refused(429, f"{error}: try again later", code="busy") from None
    except engine_lib.Stopped as error:
        raise shapes.Refused(503, str(error), code="stopped") from None

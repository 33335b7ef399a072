"""The HTTP server: OpenAI's completions and chats, memories by name, health and metrics."""

import asyncio
import contextlib
import json
import pathlib
import secrets
from collections.abc import AsyncIterator, Callable
from typing import Any

import fastapi
import fastapi.exceptions
import fastapi.middleware.cors
import fastapi.responses
import prometheus_client
import prometheus_client.core

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import chat as chat_lib
from allmem_jax.serving import answers, shapes
from allmem_jax.serving import engine as engine_lib

PAGE = pathlib.Path(__file__).with_name("page.html")
_FAILURE: dict[int | str, dict[str, Any]] = {  # what the description of the interface says of every request
    "4XX": {"model": shapes.Failure, "description": "Refused: the message says why."},
    "5XX": {"model": shapes.Failure, "description": "Stopping, or failed."},
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"application/json": {}, "text/event-stream": {}}}}


def application(served: answers.Served) -> fastapi.FastAPI:
    """The application; the engine starts and stops with it."""

    @contextlib.asynccontextmanager
    async def life(_: fastapi.FastAPI) -> AsyncIterator[None]:
        served.engine.start()
        yield
        await asyncio.to_thread(served.engine.stop)

    app = fastapi.FastAPI(title="allmem", lifespan=life, docs_url=None, redoc_url=None, responses=_FAILURE)
    app.add_exception_handler(shapes.Refused, _refused)
    app.add_exception_handler(fastapi.exceptions.RequestValidationError, _invalid)
    app.add_exception_handler(400, _unread)
    app.add_exception_handler(404, _missing)
    app.add_exception_handler(405, _missing)
    app.add_middleware(_Guard, served=served)
    if served.origins:
        app.add_middleware(
            fastapi.middleware.cors.CORSMiddleware,
            allow_origins=list(served.origins),
            allow_methods=["*"],
            allow_headers=["*"],
        )
    _open(app, served)
    _answers(app, served)
    _memories(app, served)
    return app


def _open(app: fastapi.FastAPI, served: answers.Served) -> None:
    """The page, health, metrics and the list of models."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Metrics(served.engine))

    @app.get("/", include_in_schema=False)
    async def page() -> fastapi.Response:
        return fastapi.responses.HTMLResponse(PAGE.read_text(encoding="utf-8"))

    @app.get("/health")
    async def health() -> fastapi.Response:
        status = served.engine.failed or ("ok" if served.engine.ready else "starting")
        return fastapi.responses.JSONResponse({"status": status}, status_code=200 if status == "ok" else 503)

    @app.get("/metrics", response_class=fastapi.responses.PlainTextResponse)
    async def metrics() -> fastapi.Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return fastapi.Response(prometheus_client.generate_latest(registry), media_type=kind)

    def model() -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": 0, "owned_by": "allmem"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{name:path}")
    async def one(name: str) -> dict[str, Any]:
        _check_model(served, name)
        return model()


def _answers(app: fastapi.FastAPI, served: answers.Served) -> None:
    """Completions and chats."""

    @app.post("/v1/completions", responses=_STREAM)
    async def completions(asked: shapes.Completion, http: fastapi.Request) -> Any:
        start = await _begin(served, asked)
        prompts = [_encode(served, prompt, start) for prompt in asked.prompts]
        if not prompts:
            raise shapes.Refused(400, "prompt is an empty list: give at least one prompt", "prompt")
        return await answers.answer(
            served, http, asked, prompts, start, asked.max_tokens, asked.logprobs, "text_completion"
        )

    @app.post("/v1/chat/completions", responses=_STREAM)
    async def chats(asked: shapes.Chat, http: fastapi.Request) -> Any:
        start = await _begin(served, asked)
        try:
            text = chat_lib.render(served.tokenizer, [message.plain() for message in asked.messages])
        except ValueError as error:
            raise shapes.Refused(400, str(error), "messages") from None
        prompt = list(served.tokenizer.encode(text, add_special_tokens=False))
        most = asked.max_completion_tokens or asked.max_tokens or served.most
        told = (asked.top_logprobs or 0) if asked.logprobs else None
        return await answers.answer(served, http, asked, [prompt], start, most, told, "chat.completion")


def _memories(app: fastapi.FastAPI, served: answers.Served) -> None:
    """Texts that are read once: made, listed, deleted."""

    @app.get("/v1/memories")
    async def listed() -> dict[str, Any]:
        return {"object": "list", "data": await _of_memory(served.memories.all)}

    @app.delete("/v1/memories/{name}")
    async def deleted(name: str) -> dict[str, Any]:
        if not await _of_memory(served.memories.remove, name):
            raise _absent(name)
        return {"name": name, "deleted": True}

    @app.post("/v1/memories", responses=_STREAM)
    async def made(asked: shapes.NewMemory, http: fastapi.Request) -> Any:
        before = await _start(served, asked.memory)
        encode = tokenizer_lib.encode_prompt
        tokens = await asyncio.to_thread(encode, served.tokenizer, asked.text, begins=before is None)
        said = answers.Events()
        job = engine_lib.Job(tokens, said.deliver, 0, start=before)
        await answers.submit(served, [job])
        events = answers.reading(said, len(tokens), lambda state: served.memories.keep(asked.name, state, len(tokens)))
        if asked.stream:
            return answers.stream(events, [job])

        async def whole() -> dict[str, Any]:
            return [event async for event in events][-1]["memory"]

        return await answers.unless_left(http, whole(), [job])


async def _begin(served: answers.Served, asked: shapes.Common) -> engine_lib.Start | None:
    """Checks what all requests have, and says what this one goes on from."""
    asked.check()
    _check_model(served, asked.model)
    return await _start(served, asked.memory)


def _encode(served: answers.Served, prompt: str | list[int], start: engine_lib.Start | None) -> list[int]:
    if isinstance(prompt, str):
        prompt = tokenizer_lib.encode_prompt(served.tokenizer, prompt, begins=start is None)
    if not prompt:
        raise shapes.Refused(400, "prompt is empty: give some text to continue", "prompt")
    return prompt


async def _start(served: answers.Served, memory: str | None) -> engine_lib.Start | None:
    """What a request with this memory goes on from."""
    if memory is None:
        return None
    start = await _of_memory(served.memories.start, memory)
    if start is None:
        raise _absent(memory)
    return start


async def _of_memory(what: Callable[..., Any], *name: str) -> Any:
    """What a method of the memories says, in a thread, as it reads files."""
    try:
        return await asyncio.to_thread(what, *name)
    except ValueError as error:
        raise shapes.Refused(400, str(error), "memory") from None
    except OSError as error:
        raise shapes.Refused(503, f"memories cannot be read now: {error}", "memory") from None


def _absent(memory: str) -> shapes.Refused:
    return shapes.Refused(404, f"there is no memory {memory!r}: POST /v1/memories makes one", "memory")


def _check_model(served: answers.Served, name: str) -> None:
    if name not in ("", served.name):
        raise shapes.Refused(404, f"this server has {served.name!r}, not {name!r}", "model", "model_not_found")


class _Metrics:
    """What the engine counts, for Prometheus."""

    def __init__(self, engine: engine_lib.Engine):
        self.engine = engine

    def collect(self) -> Any:
        engine = self.engine
        gauges = {
            "slots": (engine.slots, "Requests that can be served at once."),
            "slots_active": (engine.active, "Requests that are served now."),
            "requests_waiting": (engine.queued, "Requests that wait for a slot."),
            "prefix_states": (len(engine.prefixes), "States of beginnings that are kept."),
            "prefix_bytes": (engine.prefixes.held, "Their bytes."),
            "prefix_store_bytes": (engine.prefixes.store.held if engine.prefixes.store else 0, "Those in the store."),
        }
        counters = {
            "tokens_read": (engine.read_tokens, "Tokens of prompts that were read."),
            "tokens_drawn": (engine.drawn_tokens, "Tokens that were drawn."),
            "steps": (engine.steps, "Steps of all slots."),
        }
        for name, (value, what) in gauges.items():
            yield prometheus_client.core.GaugeMetricFamily(f"allmem_{name}", what, value=value)
        for name, (value, what) in counters.items():
            yield prometheus_client.core.CounterMetricFamily(f"allmem_{name}", what, value=value)


class _Guard:
    """Refuses bodies that are too large, and whoever has no key, before anything of a request is read."""

    def __init__(self, app: Any, served: answers.Served):
        self.app, self.served = app, served

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        refused = self._refused(scope) if scope["type"] == "http" else None
        await (self.app if refused is None else _json(refused))(scope, receive, send)

    def _refused(self, scope: Any) -> shapes.Refused | None:
        headers = {name.lower(): value for name, value in scope["headers"]}
        size = headers.get(b"content-length", b"0")
        if b"transfer-encoding" in headers or not size.isdigit() or int(size) > self.served.body:
            message = f"a request must state its size and have at most {self.served.body} bytes"
            return shapes.Refused(413, message, code="too_large")
        wanted = f"Bearer {self.served.key}".encode()
        private = self.served.key is not None and scope["path"].startswith("/v1/") and scope["method"] != "OPTIONS"
        if private and not secrets.compare_digest(headers.get(b"authorization", b""), wanted):
            return shapes.Refused(401, "send the server's key: Authorization: Bearer KEY", code="invalid_api_key")
        return None


def _json(refused: shapes.Refused) -> fastapi.Response:
    content = json.dumps(refused.body)  # in ASCII: it may repeat what is no Unicode
    return fastapi.Response(content, refused.status, media_type="application/json")


async def _refused(_: fastapi.Request, error: Any) -> fastapi.Response:
    return _json(error)


async def _invalid(_: fastapi.Request, error: Any) -> fastapi.Response:
    """A request whose fields are not as they must be, or that is not JSON."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"] if part != "body")
    return _json(shapes.Refused(400, f"{place or 'the request'}: {first['msg']}", place or None, first["type"]))


async def _unread(_: fastapi.Request, error: Any) -> fastapi.Response:
    """A body that cannot even be parsed, as it is no Unicode or has no end of brackets."""
    return _json(shapes.Refused(400, f"{error.detail}: send JSON in UTF-8"))


async def _missing(http: fastapi.Request, error: Any) -> fastapi.Response:
    """A place or method that is not there."""
    answer = _json(shapes.Refused(error.status_code, f"there is no {http.method} {http.url.path} here"))
    answer.headers.update(error.headers or {})  # with 405, the methods that there are
    return answer

"""The server, as its users meet it: OpenAI's own client, raw HTTP, and the engine underneath.

Answers are compared with `generate` on the same prompts, whoever is served beside them.
"""

import asyncio
import contextlib
import json
import os
import queue
import random
import threading
import time

import jax
import numpy as np
import pytest
import tiny_folder

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import chat, generation
from allmem_jax.model import lm
from allmem_jax.storage import stores

httpx, openai = pytest.importorskip("httpx"), pytest.importorskip("openai")  # what the core tests go without
pytest.importorskip("uvicorn")

import tiny_server  # noqa: E402
from tiny_server import PIECE, idle, running, served  # noqa: E402

from allmem_jax.serving import api, engine, memories, programs  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_server.model(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def server(model, tmp_path_factory):
    serves = served(model, tmp_path_factory.mktemp("memories"))
    with running(serves) as address:
        yield address, serves


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0)


def alone(model, prompt, count, start=None, **sampling):
    """The text that `generate` continues a prompt with."""
    config, params, tokenizer = model
    ids = tokenizer_lib.encode_prompt(tokenizer, prompt) if isinstance(prompt, str) else prompt
    seed = sampling.pop("seed", 0)
    (tokens,) = generation.generate(
        params, config, [ids], max_tokens=count, state=start, seed=seed, sampling=generation.Sampling(**sampling),
        stop_tokens=chat.stop_tokens(tokenizer, config),
    )  # fmt: skip
    return "".join(chat.decode_stream(tokenizer, tokens, before=ids))


def test_completions_are_those_of_generate(model, client):
    for prompt in ("the whale", "and the sea were white, and the ship sailed on over", "x"):
        whole = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0)
        assert whole.choices[0].text == alone(model, prompt, 9)
        assert whole.choices[0].finish_reason in ("length", "stop") and whole.usage.completion_tokens <= 9
        pieces = client.completions.create(model="tiny", prompt=prompt, max_tokens=9, temperature=0, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text


def test_draws_are_those_of_generate_by_seed(model, client):
    """Also those of several choices, each with the next seed."""
    made = client.completions.create(
        model="tiny", prompt="the sea", max_tokens=8, temperature=0.9, top_p=0.8, seed=5, n=3, extra_body={"top_k": 20}
    )
    for choice in made.choices:
        assert choice.text == alone(model, "the sea", 8, temperature=0.9, top_k=20, top_p=0.8, seed=5 + choice.index)


def test_chats_are_those_of_the_template(model, client):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the whale?"}]
    prompt = model[2].encode(chat.render(model[2], messages), add_special_tokens=False)
    whole = client.chat.completions.create(model="tiny", messages=messages, max_tokens=7, temperature=0)
    assert whole.choices[0].message.content == alone(model, prompt, 7)
    assert whole.usage.prompt_tokens == len(prompt)
    pieces = list(
        client.chat.completions.create(
            model="tiny", messages=messages, max_completion_tokens=7, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert pieces[0].choices[0].delta.role == "assistant" and pieces[-1].usage.total_tokens == whole.usage.total_tokens
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == whole.choices[0].message.content
    assert pieces[-2].choices[0].finish_reason == whole.choices[0].finish_reason


def test_stop_strings_end_an_answer_and_free_its_slot(model, server, client):
    text = alone(model, "the whale", 12)
    stop = text[3:6]
    made = client.completions.create(model="tiny", prompt="the whale", max_tokens=12, temperature=0, stop=stop)
    assert made.choices[0].text == text[: text.index(stop)] and made.choices[0].finish_reason == "stop"
    idle(server[1].engine)


def test_log_probabilities_are_the_model_s(model, client):
    config, params, tokenizer = model
    made = client.completions.create(model="tiny", prompt="the ship", max_tokens=3, temperature=0, logprobs=4)
    told = made.choices[0].logprobs
    ids = tokenizer_lib.encode_prompt(tokenizer, "the ship")
    logits, _ = generation.prefill(params, config, [ids])
    wanted = np.sort(np.asarray(jax.nn.log_softmax(logits[0])))[::-1]
    np.testing.assert_allclose(told.token_logprobs[0], wanted[0], rtol=1e-4)
    np.testing.assert_allclose(sorted(told.top_logprobs[0].values(), reverse=True), wanted[:4], rtol=1e-4)
    chatted = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "x"}], max_tokens=2, logprobs=True, top_logprobs=2
    )
    assert all(len(each.top_logprobs) == 2 and each.logprob <= 0 for each in chatted.choices[0].logprobs.content)


def test_many_at_once_answer_as_alone_and_nothing_compiles(model, server):
    """More clients than slots, prompts of all lengths, greedy and drawn."""
    before = [f._cache_size() for f in (generation.prefill_piece, programs.seat, programs.step)]
    rng = random.Random(0)
    asked = [
        dict(prompt=tiny_folder.WORDS[: rng.randint(1, 300)], max_tokens=rng.randint(1, 14), seed=index,
             temperature=rng.choice([0, 0.8]))
        for index in range(24)
    ]  # fmt: skip

    async def ask():
        async with openai.AsyncOpenAI(base_url=f"{server[0]}/v1", api_key="none", max_retries=0) as many:
            return await asyncio.gather(*(many.completions.create(model="tiny", **each) for each in asked))

    answers = asyncio.run(ask())
    assert before == [f._cache_size() for f in (generation.prefill_piece, programs.seat, programs.step)]
    for each, answer in zip(asked, answers, strict=True):
        wanted = alone(model, each["prompt"], each["max_tokens"], temperature=each["temperature"], seed=each["seed"])
        assert answer.choices[0].text == wanted
    idle(server[1].engine)


def test_a_beginning_is_read_once(model, server, client):
    prompt = "once read, " * 12
    first = client.completions.create(model="tiny", prompt=prompt + "and", max_tokens=4, temperature=0)
    again = client.completions.create(model="tiny", prompt=prompt + "but", max_tokens=4, temperature=0)
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert again.usage.prompt_tokens_details.cached_tokens >= len(model[2].encode(prompt)) - 2 * PIECE
    assert again.choices[0].text == alone(model, prompt + "but", 4)


def test_memories_are_read_once_kept_and_asked(model, server, client, tmp_path):
    config, params, tokenizer = model
    address, serves = server
    text = tiny_folder.WORDS[:400]
    lines = httpx.post(f"{address}/v1/memories", json={"name": "sea", "text": text, "stream": True}).text.split("\n\n")
    progress = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert [event["read"] for event in progress] == sorted(event["read"] for event in progress)
    kept = progress[-1]["memory"]
    ids = tokenizer_lib.encode_prompt(tokenizer, text)
    assert kept["tokens"] == kept["position"] == len(ids)
    _, start = generation.prefill(params, config, [ids])
    question = tokenizer.encode("and the whale", add_special_tokens=False)
    wanted = alone(model, question, 6, start=start)
    for _ in range(2):  # a fork does not change what it came from
        made = client.completions.create(
            model="tiny", prompt=question, max_tokens=6, temperature=0, extra_body={"memory": "sea"}
        )
        assert made.choices[0].text == wanted and made.usage.prompt_tokens == len(question)
    # Another server on the same folder has it too; one of another model does not.
    with running(served(model, serves.memories.place)) as other:
        body = {"prompt": question, "max_tokens": 6, "temperature": 0, "memory": "sea"}
        assert httpx.post(f"{other}/v1/completions", json=body).json()["choices"][0]["text"] == wanted
    changed = memories.Memories(serves.memories.place, config, "another")
    assert changed.all() == []
    with pytest.raises(ValueError, match="made by another model"):
        changed.start("sea")
    assert [each["name"] for each in httpx.get(f"{address}/v1/memories").json()["data"]] == ["sea"]
    assert httpx.delete(f"{address}/v1/memories/sea").json()["deleted"]
    assert httpx.delete(f"{address}/v1/memories/sea").status_code == 404


def test_memories_in_an_object_store(model):
    """Two servers share a place that is no folder; what one keeps anew the other has, and a damaged one is named."""
    config, params, tokenizer = model
    first, second = (memories.Memories("memory://sea/memories", config, "a" * 16) for _ in range(2))
    for text in ("the sea", "the whale and the ship"):
        _, state = generation.prefill(params, config, [tokenizer.encode(text)])
        first.keep("b.c", state, int(state.position[0]))
        found = second.start("b.c")
        assert found.state.position == state.position and np.array_equal(found.state.keys, state.keys)
    assert [each["name"] for each in second.all()] == ["b.c"]
    assert len(stores.names("memory://sea/memories")) == 2
    (file,) = (name for name in stores.names("memory://sea/memories") if name.endswith(".state"))
    stores.write(f"memory://sea/memories/{file}", b"torn")
    third = memories.Memories("memory://sea/memories", config, "a" * 16)
    with pytest.raises(ValueError, match="memory 'b.c' cannot be used"):
        third.start("b.c")
    assert third.remove("b.c") and not third.remove("b.c") and not stores.names("memory://sea/memories")


def test_health_tells_a_start_from_a_failure(model, tmp_path):
    serves = served(model, tmp_path)

    def health():
        async def asked():
            there = httpx.ASGITransport(app=api.application(serves))
            async with httpx.AsyncClient(transport=there, base_url="http://here") as client:
                return await client.get("/health")

        answer = asyncio.run(asked())
        return answer.status_code, answer.json()["status"]

    assert health() == (503, "starting")
    serves.engine.start()
    while not serves.engine.ready:
        time.sleep(0.05)
    assert health() == (200, "ok")
    serves.engine.stop()
    assert health() == (503, "the server has stopped")


def test_a_damaged_memory_is_one_clear_error(server):
    address, serves = server
    assert httpx.post(f"{address}/v1/memories", json={"name": "torn", "text": "the sea"}).status_code == 200
    (path,) = serves.memories.place.glob("torn.*.state")
    path.write_bytes(path.read_bytes()[:-9])
    answer = httpx.post(f"{address}/v1/completions", json={"prompt": "x", "memory": "torn"})
    assert answer.status_code == 400 and "state is not a saved state" in answer.json()["error"]["message"]
    serves.memories.remove("torn")


def test_memories_survive_their_writers(model, tmp_path):
    """Several that write one name leave one of them; what a killed one left half-written is swept."""
    config, params, tokenizer = model
    _, state = generation.prefill(params, config, [tokenizer.encode("the sea")])
    kept = memories.Memories(tmp_path, config, "a" * 16)
    threads = [threading.Thread(target=kept.keep, args=("sea", state, count)) for count in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    whole = ["sea.json", f"sea.{kept.describe('sea')['id']}.state"]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(whole)
    assert kept.start("sea").origin == kept.describe("sea")["id"].encode()
    gone = f"{os.uname().nodename}-{2**22 + 1}-{'0' * 32}"  # no process has this number
    left = [tmp_path / f".a.state.{gone}.partial", tmp_path / f"a.{'0' * 32}.state", tmp_path / "a.state"]
    for path in left:
        path.write_bytes(b"half")
        os.utime(path, (0, 0))
    memories.Memories(tmp_path, config, "a" * 16)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*whole, "a.state"])  # that one is not ours
    (tmp_path / whole[1]).unlink()
    assert kept.start("sea") is not None  # it is loaded
    assert memories.Memories(tmp_path, config, "a" * 16).start("sea") is None


@pytest.mark.parametrize(
    ("path", "body", "status", "says"),
    [
        ("completions", {"prompt": "x", "model": "gpt-9"}, 404, "this server has 'tiny'"),
        ("completions", {}, 400, "prompt: Field required"),
        ("completions", {"prompt": ""}, 400, "prompt is empty"),
        ("completions", {"prompt": []}, 400, "empty list"),
        ("completions", {"prompt": [10**7]}, 400, "token ids in"),
        ("completions", {"prompt": [-1], "stream": True}, 400, "token ids in"),
        ("completions", {"prompt": [10**30]}, 400, "token ids in"),
        ("completions", {"prompt": "x", "top_k": 10**30}, 400, "top_k"),
        ("completions", {"prompt": "x\ud800"}, 400, "character 1 is half of a surrogate pair"),
        ("chat/completions", {"messages": [{"role": "\ud800", "content": "x"}]}, 400, "surrogate pair"),
        ("completions", {"prompt": "x", "model": "\ud800"}, 404, "this server has 'tiny'"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "x", "stop": ""}, 400, "stop string is empty"),
        ("completions", {"prompt": "x", "echo": True}, 400, "echo is not supported"),
        ("completions", {"prompt": "x", "memory": "none"}, 404, "no memory 'none'"),
        ("completions", {"prompt": "x", "memory": "../etc"}, 400, "no name of a memory"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
        ("memories", {"name": "a/b", "text": "x"}, 400, "name"),
        ("memories", {"name": "a", "text": ""}, 400, "text"),
        ("nothing", {}, 404, "there is no POST /v1/nothing here"),
    ],
)  # fmt: skip
def test_errors_have_openai_s_shape(server, path, body, status, says):
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{server[0]}/v1/{path}", content=json.dumps(body), headers=headers)
    error = answer.json()["error"]
    assert answer.status_code == status and says in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


def test_broken_requests_are_refused(server):
    address, _ = server
    for content in (b"", b"{", b"[1]", b"\xff\xfe", b'"x"', b"null", b'{"prompt": {"a": 1}}', b"[" * 9000):
        answer = httpx.post(f"{address}/v1/completions", content=content, headers={"content-type": "application/json"})
        assert answer.status_code == 400 and answer.json()["error"]["message"], content
    wrong = httpx.get(f"{address}/v1/completions")
    assert wrong.status_code == 405 and wrong.headers["allow"] == "POST"
    described = httpx.get(f"{address}/openapi.json").json()["paths"]["/v1/completions"]["post"]["responses"]
    assert set(described) == {"200", "4XX", "5XX"} and "text/event-stream" in described["200"]["content"]
    assert httpx.get(f"{address}/health").json() == {"status": "ok"}
    assert "allmem_tokens_drawn_total" in httpx.get(f"{address}/metrics").text
    assert "<title>allmem</title>" in httpx.get(address).text
    assert httpx.get(f"{address}/v1/models").json()["data"][0]["id"] == "tiny"


def test_clients_that_leave_free_their_slots(server):
    """In mid-stream, and while they wait for the whole; those who stay are answered."""
    address, serves = server
    body = {"prompt": "the sea " * 30, "max_tokens": 400, "temperature": 0.5, "ignored": 1}
    for _ in range(4):
        with httpx.stream("POST", f"{address}/v1/completions", json=body | {"stream": True}) as stream:
            next(stream.iter_lines())
        with contextlib.suppress(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json=body | {"max_tokens": 100_000}, timeout=0.1)
    idle(serves.engine)
    assert httpx.post(f"{address}/v1/completions", json={"prompt": "x", "max_tokens": 1}).status_code == 200


def test_a_full_queue_a_key_and_a_large_body(model, tmp_path):
    serves = served(model, tmp_path, slots=1, waiting=1, key="secret", body=500, origins=("http://page",))
    with running(serves) as address, httpx.Client(base_url=f"{address}/v1") as http:
        assert http.get("/models").status_code == 401
        http.headers["Authorization"] = "Bearer secret"
        assert http.get("/models").status_code == 200
        assert http.post("/completions", json={"prompt": "x" * 600}).status_code == 413
        allowed = http.options("/models", headers={"Origin": "http://page", "Access-Control-Request-Method": "GET"})
        assert allowed.headers["access-control-allow-origin"] == "http://page"
        found = queue.Queue()

        def ask():
            body = {"prompt": "x", "max_tokens": 60}
            headers = {"Authorization": "Bearer secret"}
            found.put(httpx.post(f"{address}/v1/completions", json=body, headers=headers, timeout=60).status_code)

        threads = [threading.Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        codes = sorted(found.get() for _ in threads)
        assert set(codes) == {200, 429} and codes.count(200) >= 2


def test_no_one_waits_for_another_s_long_prompt(model):
    """A short prompt is answered after two pieces, beside one of a hundred."""
    config, params, _ = model
    loop = engine.Engine(params, config, slots=2, piece=PIECE, cache_bytes=0)
    seen = []
    long = engine.Job([5] * 100 * PIECE, lambda event: seen.append(("long", event)), 1)
    short = engine.Job([6] * PIECE, lambda event: seen.append(("short", event)), 1)
    loop.submit([long, short])
    loop.start()
    while not any(who == "long" and isinstance(event, engine.Finished) for who, event in seen):
        time.sleep(0.01)
    loop.stop()
    names = [who for who, event in seen if isinstance(event, (engine.Read, engine.Token))]
    assert names.index("short") <= 1 and names[:4].count("short") == 2  # its piece, and its token


def test_stopping_ends_every_request(model):
    config, params, _ = model
    loop = engine.Engine(params, config, slots=1, piece=PIECE)
    ends = queue.Queue()
    jobs = [engine.Job([5], lambda e: isinstance(e, engine.Finished) and ends.put(e.reason), 10**6) for _ in range(3)]
    loop.submit(jobs)
    loop.start()
    loop.stop()
    assert [ends.get(timeout=5) for _ in jobs] == ["cancelled"] * 3
    with pytest.raises(engine.Stopped):
        loop.submit(jobs)


def test_full_attention_is_refused(model):
    config, params, _ = model
    with pytest.raises(ValueError, match="no state of constant size"):
        engine.Engine(lm.split_params(params)[0], config.replace(mixer="full"))

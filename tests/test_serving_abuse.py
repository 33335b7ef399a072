"""What no client should do to a server, and kill -9: it goes on as before, and nothing is left behind."""

import collections
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny_folder

httpx, _ = pytest.importorskip("httpx"), pytest.importorskip("uvicorn")  # what the core tests go without

import abuse  # noqa: E402
import tiny_server  # noqa: E402
from tiny_server import idle, running, served  # noqa: E402

from allmem_jax.decoding import generation  # noqa: E402
from allmem_jax.serving import programs  # noqa: E402

pytestmark = pytest.mark.slow


def answers(address):
    """What a server says, without a memory and with each."""
    body = {"prompt": "and the sea", "max_tokens": 8, "temperature": 0}
    asked = [body, *(body | {"memory": name} for name in abuse.MEMORIES)]
    made = [httpx.post(f"{address}/v1/completions", json=each, timeout=60).json() for each in asked]
    return [each["choices"][0]["text"] for each in made]


def metrics(address):
    """By name."""
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.split() for line in lines if line[0] != "#")}


def test_a_storm_of_bad_requests_changes_nothing(tmp_path):
    model = tiny_server.model(tmp_path)
    serves = served(model, tmp_path / "memories", tmp_path / "prefixes", body=abuse.BODY)
    with running(serves) as address:
        for name, text in abuse.MEMORIES.items():
            made = httpx.post(f"{address}/v1/memories", json={"name": name, "text": text}, timeout=60)
            assert made.status_code == 200
        compiled = [f._cache_size() for f in (generation.prefill_piece, programs.seat, programs.step)]
        before = answers(address)
        assert len(set(before)) > 1
        statuses, drawn = abuse.storm(address, 200)
        idle(serves.engine)
        assert answers(address) == before
        counts = collections.Counter(statuses)
        assert set(counts) <= {None, 200, 400, 404, 405, 413, 429}, counts
        assert all(counts[status] for status in (None, 200, 400, 404, 413)), counts
        assert httpx.get(f"{address}/health").status_code == 200
        told = metrics(address)
        assert told["allmem_slots_active"] == told["allmem_requests_waiting"] == 0
        assert told["allmem_tokens_drawn_total"] >= drawn and told["allmem_steps_total"] > 0
        assert told["allmem_prefix_bytes"] <= 2**22
        there = {each["name"]: each["tokens"] for each in httpx.get(f"{address}/v1/memories").json()["data"]}
        assert {name: there[name] for name in abuse.MEMORIES} == {
            name: len(model[2].encode(text)) for name, text in abuse.MEMORIES.items()
        }
        assert all(re.fullmatch(r"made-\d", name) for name in there.keys() - abuse.MEMORIES.keys())
        assert compiled == [f._cache_size() for f in (generation.prefill_piece, programs.seat, programs.step)]
    left = {path.suffix for folder in ("memories", "prefixes") for path in (tmp_path / folder).rglob("*.*")}
    assert left == {".json", ".state"}


# A server whose files take time to be written, so that it can be killed in the midst of it.
SLOW = """
import pathlib, sys, time
from allmem_jax import cli
whole = pathlib.Path.write_bytes
def write(path, content):
    whole(path, content[: len(content) // 2])
    time.sleep(60 if ".torn." in path.name else 0.02)
    whole(path, content)
pathlib.Path.write_bytes = write
sys.exit(cli.main(sys.argv[1:]))
"""


class Process:
    """`allmem serve` as a process, on a free port."""

    def __init__(self, start, folder):
        options = "--mixer allmem --window 16 --sinks 2 --chunk 4 --piece 8 --slots 3 --port 0 --memories memories"
        arguments = ["serve", "plain", *options.split(), "--prefixes", "prefixes"]
        self.process = subprocess.Popen(
            [sys.executable, *start, *arguments], cwd=folder, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join([os.getcwd(), *sys.path])},
        )  # fmt: skip
        said = ""
        while not (found := re.search(r"running on (http://[\d.:]+)", said)):
            said += (line := self.process.stderr.readline())
            assert line, said
        self.address = found[1]
        self.reader = threading.Thread(target=self.process.stderr.read)  # so that it never waits for us
        self.reader.start()

    def kill(self, number):
        self.process.send_signal(number)
        self.process.wait()
        self.reader.join()
        self.process.stderr.close()


def test_what_was_complete_outlives_kill_9(tmp_path):
    tiny_folder.write(tmp_path / "plain")
    body = {"prompt": tiny_folder.WORDS[:150], "max_tokens": 6, "temperature": 0}
    texts = {"whole": "the whale", "torn": "the ship", "long": tiny_folder.WORDS * 20}

    def ask(address, **more):
        return httpx.post(f"{address}/v1/completions", json=body | more, timeout=60).json()

    def read(name):
        made = {"name": name, "text": texts[name], "stream": True}
        with httpx.stream("POST", f"{first.address}/v1/memories", json=made, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    told[name] = json.loads(line[6:])

    def partly(name):
        with contextlib.suppress(httpx.TransportError):
            read(name)

    told = {}
    first = Process(["-c", SLOW], tmp_path)
    try:
        read("whole")
        said = ask(first.address, memory="whole")["choices"]
        plain = ask(first.address)["choices"]
        threads = [threading.Thread(target=partly, args=(name,)) for name in ("long", "torn")]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 60
        while not (list((tmp_path / "memories").glob(".torn.*.partial")) and told.get("long", {}).get("read")):
            assert time.monotonic() < deadline, told
            time.sleep(0.01)
        while not list((tmp_path / "prefixes").rglob(".*.partial")):
            assert time.monotonic() < deadline
    finally:
        first.kill(signal.SIGKILL)
    for thread in threads:
        thread.join()
    assert told["long"]["read"] < told["long"]["of"]
    second = Process(["-m", "allmem_jax"], tmp_path)
    try:
        assert [each["name"] for each in httpx.get(f"{second.address}/v1/memories").json()["data"]] == ["whole"]
        assert ask(second.address, memory="torn")["error"]["type"] == "not_found_error"
        assert ask(second.address, memory="whole")["choices"] == said
        made = ask(second.address)
        assert made["choices"] == plain and made["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert not [path for path in tmp_path.rglob("*.partial")]
    finally:
        second.kill(signal.SIGTERM)

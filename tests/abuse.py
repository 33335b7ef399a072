"""Requests as nobody should send them, from a seeded generator, and what a server made of them."""

import concurrent.futures
import contextlib
import json
import random
import socket
import urllib.parse

import httpx
import tiny_folder

MEMORIES = {name: f"{name} is what the {name} said to the {name}. " * 6 for name in ("whale", "ship", "sea")}
BODY = 20_000  # bytes of a request at most
JUNK = [
    None, True, False, -1, 0, 10**30, -(10**30), 1e308, float("nan"), float("inf"), -0.5, "", "x", "\x00", "\ud800",
    "\udfff\ud83d", "\u202e\u0301" * 9, "🐋" * 20, [], [[]], [None], ["x", 1], {}, {"a": {"b": []}}, [2**40], [-1],
    [[1, 2], [3]], ["\ud800"], [10**30], "../../etc/passwd", "a" * 300,
]  # fmt: skip
FIELDS = (
    "model prompt messages max_tokens max_completion_tokens temperature top_p top_k n seed stop stream stream_options "
    "logprobs top_logprobs memory echo best_of suffix logit_bias tools response_format name text role content unknown"
).split()
PATHS = ("completions", "chat/completions", "memories")


def good(rng, path):
    """A body that is answered with 200, where there is room."""
    words = tiny_folder.WORDS[(start := rng.randrange(300)) : start + rng.randint(1, 60)]
    if path == "memories":
        return {"name": f"made-{rng.randrange(4)}", "text": words or "x", "stream": rng.random() < 0.5}
    asked = {"prompt": words} if path == "completions" else {"messages": [{"role": "user", "content": words}]}
    asked |= {"max_tokens": rng.randint(1, 4), "temperature": rng.choice([0, 0.7, 2]), "stream": rng.random() < 0.5}
    if rng.random() < 0.3:
        asked["memory"] = rng.choice([*MEMORIES, *MEMORIES, "unknown", "made-1"])
    return asked | rng.choice([{}, {"n": 2}, {"seed": 7, "top_k": 5}, {"stop": ["ea"]}, {"top_p": 0.5}])


def content(rng, path):
    """The bytes of a body: as it should be, with some fields changed, broken, or no body of this server at all."""
    body, kind = good(rng, path), rng.random()
    if 0.3 < kind < 0.75:
        for _ in range(rng.randint(1, 3)):
            body[rng.choice([*body, *body, *FIELDS])] = rng.choice(JUNK)
    for field in ("max_tokens", "max_completion_tokens"):  # nobody waits for more
        body |= {field: 8} if isinstance(body.get(field), int) and body[field] > 8 else {}
    encoded = json.dumps(body).encode()
    if kind < 0.75:
        return encoded
    return rng.choice(
        [encoded[: rng.randrange(len(encoded))], rng.randbytes(50), b"[" * 9000, b'{"a":' * 3000, b"1" * 5000]
        + [json.dumps(rng.choice(JUNK)).encode(), b"x" * (BODY + 1), encoded.decode().encode("utf-16")]
    )


def send(http, address, seed):
    """One request; its status, or None where it was left in its midst, and the tokens that it says were drawn."""
    rng = random.Random(seed)
    path, how = rng.choice(PATHS), rng.random()
    body, headers = content(rng, path), {"content-type": "application/json"}
    url = f"{address}/v1/{path}"
    if how < 0.06:
        method = rng.choice(["GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "POST"])
        name = rng.choice(["made-0", "made-1", "%00", "..%2f..%2fx", "%ff", "x" * 200, "\u202e"])
        return http.request(method, f"{url}/{name}").status_code, 0
    if how < 0.1:  # says more than it sends, and leaves
        parts = urllib.parse.urlsplit(address)
        with socket.create_connection((parts.hostname, parts.port)) as line:
            head = f"POST /v1/{path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body) + 9}\r\n\r\n"
            line.sendall(head.encode() + body)
        return None, 0
    if how < 0.3:  # leaves in the midst of the answer
        with contextlib.suppress(httpx.TransportError):
            with http.stream("POST", url, content=body, headers=headers, timeout=rng.choice([0.05, 60])) as answer:
                assert answer.status_code < 500
                next(answer.iter_bytes(), None)
        return None, 0
    try:
        answer = http.post(url, content=body, headers=headers)
    except httpx.ReadTimeout:  # it asked for more than anyone waits for
        return None, 0
    if answer.status_code >= 400:
        error = answer.json()["error"]
        assert error["message"] and set(error) == {"message", "type", "param", "code"}
    told = answer.status_code == 200 and answer.headers["content-type"] == "application/json" and path != "memories"
    return answer.status_code, answer.json()["usage"]["completion_tokens"] if told else 0


def storm(address, count, seed=0, at_once=6):
    """Sends `count` requests; the statuses, and the tokens that answers counted."""
    with concurrent.futures.ThreadPoolExecutor(at_once) as pool, httpx.Client(timeout=2) as http:
        found = list(pool.map(lambda index: send(http, address, f"{seed} {index}"), range(count)))
    return [status for status, _ in found], sum(tokens for _, tokens in found)

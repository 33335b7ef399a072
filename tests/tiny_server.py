"""A server of a tiny converted model, in a thread."""

import contextlib
import socket
import threading
import time

import tiny_folder
import uvicorn

from allmem_jax.checkpoints import load
from allmem_jax.serving import answers, api, engine, memories, prefix_store

SLOTS, PIECE = 3, 8


def model(folder):
    """Config, parameters and tokenizer of a model whose memory says something."""
    path = tiny_folder.write(folder / "plain")
    config, params, tokenizer = load.load_pretrained(path, mixer="allmem", window=16, sinks=2, chunk=4)
    memory = params["layers"]["memory"]
    params = params | {"layers": params["layers"] | {"memory": memory | {"alpha": 0.3 + 0 * memory["alpha"]}}}
    return config, params, tokenizer


def served(model, folder, prefixes=None, limit=2**30, **options):
    """What a server serves; its memories lie in `folder`, and states of beginnings at `prefixes`."""
    config, params, tokenizer = model
    which = memories.fingerprint(params, config)
    store = None if prefixes is None else prefix_store.PrefixStore(prefixes, config, which, limit)
    made = {"slots": SLOTS, "piece": PIECE, "cache_bytes": 2**22, "store": store} | options
    own = {name: made.pop(name) for name in ("key", "body", "origins") if name in made}
    loop = engine.Engine(params, config, **made)
    kept = memories.Memories(folder, config, which)
    return answers.Served("tiny", tokenizer, loop, kept, most=12, **own)


@contextlib.contextmanager
def running(serves):
    """The address of a server in a thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(api.application(serves), port=port, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


def idle(loop):
    """Waits until nobody is served."""
    for _ in range(500):
        if not loop.active and not loop.queued:
            return
        time.sleep(0.01)
    raise AssertionError(f"{loop.active} slots are taken and {loop.queued} requests wait though nobody asks")

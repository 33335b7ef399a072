"""`allmem serve`."""

from __future__ import annotations

import os
from typing import Annotated

import tyro

from allmem_jax.cli import options


def serve(
    model: options.Model,
    mixing: options.MixingOptions = options.MIXING,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    slots: int = 8,
    piece: int = 256,
    waiting: int = 64,
    max_tokens: int = 1024,
    memories: str = "out/memories",
    cache_mb: int = 1024,
    prefixes: str | None = None,
    prefixes_mb: int = 4096,
    body_mb: int = 64,
    key: str | None = None,
    origins: Annotated[tuple[str, ...], tyro.conf.arg(metavar="URL ...")] = (),
) -> None:
    """Serve a model over HTTP, as OpenAI's clients expect it; a page to talk with it is at /.

    Requests share a batch of fixed size: each slot has a state of constant size, whatever it has read. Texts that were
    read once (POST /v1/memories, or the page) are kept by name, and a request goes on from one with "memory": NAME.
    SIGTERM and Ctrl-C refuse new requests, and end those that are left after ten seconds.

    Example: allmem serve SmolLM2-135M-Instruct.Q4_1.gguf --memory smollm2-135m-instruct --slots 4

    Args:
        host: Address to listen at; 0.0.0.0 is all, and then give a key.
        port: To listen at; 0 takes a free one.
        name: Of the model, as clients name it; default: the name of its file or folder.
        slots: Requests that are served at once.
        piece: Tokens of a prompt that are read between two tokens of everyone's answers.
        waiting: Requests that may wait for a slot; others are told to come again (429).
        max_tokens: Of a chat's answer, where the request says nothing.
        memories: Folder or URL for what was read once; all that share it have it.
        cache_mb: For states of beginnings that several requests share.
        prefixes: Folder or URL where these are kept beyond that; a restarted server has them, and all that share it.
        prefixes_mb: At most there; what was not used for longest is removed.
        body_mb: Size of the largest request.
        key: What clients must send as their API key; also read from ALLMEM_API_KEY, where others cannot see it.
        origins: Other sites whose pages may use it (CORS).
    """
    try:
        import uvicorn

        from allmem_jax.serving import answers, api, engine, prefix_store
        from allmem_jax.serving import memories as memories_lib
    except ImportError as error:
        raise ValueError(f"serving needs more packages ({error}): pip install 'allmem-jax[serve]'") from None
    from allmem_jax.model import lm
    from allmem_jax.storage import stores

    stores.check_writable(memories, "memories")
    if prefixes is not None:
        stores.check_writable(prefixes, "prefixes")
    config, params, tokenizer = options.load_model(model, mixing)
    options.check_window(mixing, [config.mixer])
    which = memories_lib.fingerprint(params, config)
    kept = memories_lib.Memories(memories, config, which)
    store = None if prefixes is None else prefix_store.PrefixStore(prefixes, config, which, prefixes_mb * 2**20)
    params = lm.unstack(params, dtype=config.dtype, donate=True)
    sizes = dict(slots=slots, piece=piece, waiting=waiting, cache_bytes=cache_mb * 2**20)
    served = answers.Served(
        name or model.stem,
        tokenizer,
        engine.Engine(params, config, **sizes, store=store),
        kept,
        max_tokens,
        body_mb * 2**20,
        key or os.environ.get("ALLMEM_API_KEY"),
        origins,
    )
    uvicorn.run(api.application(served), host=host, port=port, timeout_graceful_shutdown=10)

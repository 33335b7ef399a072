"""States of beginnings on disk and in object stores: found again, by others too; bounded; damaged ones do no harm."""

import logging
import os
import time

import fsspec
import pytest
import tiny_folder

httpx, _ = pytest.importorskip("httpx"), pytest.importorskip("uvicorn")  # what the core tests go without

import tiny_server  # noqa: E402
from tiny_server import PIECE, running, served  # noqa: E402

from allmem_jax.decoding import generation  # noqa: E402
from allmem_jax.model import state as state_lib  # noqa: E402
from allmem_jax.serving import prefix_store, programs  # noqa: E402
from allmem_jax.storage import files, stores  # noqa: E402

BODY = {"prompt": tiny_folder.WORDS[:90], "max_tokens": 6, "temperature": 0}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_server.model(tmp_path_factory.mktemp("models"))


def ask(address, **more):
    """The text, and how many tokens of the prompt had been read before."""
    made = httpx.post(f"{address}/v1/completions", json=BODY | more, timeout=60).json()
    return made["choices"][0]["text"], made["usage"]["prompt_tokens_details"]["cached_tokens"]


def looked(serves):
    """Waits until a server has seen what is in its store."""
    until(lambda: serves.engine.prefixes.store._known)
    return serves


def until(there):
    for _ in range(500):
        if there():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to be")


@pytest.fixture(params=["folder", "memory://bucket/prefixes"])
def place(request, store, tmp_path):
    return tmp_path / "prefixes" if request.param == "folder" else request.param


def test_a_restarted_server_and_another_have_what_was_read(model, place, tmp_path, monkeypatch):
    monkeypatch.setattr(prefix_store, "_LISTED", 0.1)
    other = served(model, tmp_path, place)
    with running(other) as second:
        with running(served(model, tmp_path, place)) as first:
            text, cached = ask(first)
            assert cached == 0 and ask(first)[1] > 0
        tokens = len(model[2].encode(BODY["prompt"]))
        assert len(stores.names(place)) == tokens // PIECE
        looked(other)
        assert ask(second) == (text, (tokens - 1) // PIECE * PIECE)
    with running(again := served(model, tmp_path, place)) as third:
        looked(again)
        compiled = [f._cache_size() for f in (generation.prefill_piece, programs.seat, programs.step)]
        assert ask(third) == (text, (tokens - 1) // PIECE * PIECE)
        assert again.engine.read_tokens == tokens - (tokens - 1) // PIECE * PIECE
        assert compiled == [f._cache_size() for f in (generation.prefill_piece, programs.seat, programs.step)]
        # What goes on from a memory is not what begins a text.
        httpx.post(f"{third}/v1/memories", json={"name": "sea", "text": "the sea"}, timeout=60)
        assert ask(third, memory="sea")[1] == 0
    if stores.is_url(place):
        assert not list((tmp_path / "kept").rglob("*.state"))  # no copies are kept
    # Another model has states of its own.
    config, params, tokenizer = model
    changed = config, params | {"embed": {"embedding": 2 * params["embed"]["embedding"]}}, tokenizer
    with running(served(changed, tmp_path, place)) as fourth:
        assert ask(fourth)[1] == 0


def test_the_bound_holds_and_the_oldest_use_goes_first(model, place, tmp_path, monkeypatch):
    config, _, _ = model
    state = state_lib.init_state(config, 1)
    size = state_lib.save_state(tmp_path / "one.state", config, state)
    monkeypatch.setattr(prefix_store, "_FRESH", 0.0)  # every use is written
    store = prefix_store.PrefixStore(place, config, "a" * 16, 10 * size)
    stray = stores.join(place, "README")
    files.write(stray, "not ours")
    keys = [bytes([index]) * 32 for index in range(14)]
    store.start()
    for key in keys:
        store.keep(key, state)
        store.keep(keys[0], state)  # the first is used all the time
        until(lambda: not store._waiting)
        time.sleep(0.01)
    store.stop()
    left = stores.listed(place)
    assert stores.read(stray) == b"not ours"
    assert 8 * size <= sum(bytes for name, (bytes, _) in left.items() if name != "README") <= 10 * size
    assert {f"{'a' * 16}/{key.hex()}.state" for key in (keys[0], keys[-1])} <= left.keys()
    assert f"{'a' * 16}/{keys[1].hex()}.state" not in left
    with pytest.raises(ValueError, match="10 bytes for states"):
        prefix_store.PrefixStore(place, config, "a" * 16, 10)


def test_damaged_states_are_removed_and_read_again(model, place, tmp_path, caplog):
    with running(served(model, tmp_path, place)) as address:
        text, _ = ask(address)
    names = stores.names(place)
    for name in names:
        files.write(stores.join(place, name), stores.read(stores.join(place, name))[:-9])
    with running(looked_at := served(model, tmp_path, place)) as address, caplog.at_level(logging.WARNING):
        looked(looked_at)
        assert ask(address) == (text, 0)
        assert [record.levelname for record in caplog.records if "is not a saved state" in record.message]
    assert all(len(stores.read(stores.join(place, name))) for name in names)
    with running(again := served(model, tmp_path, place)) as address:
        looked(again)
        assert ask(address)[1] > 0


def test_a_store_that_fails_costs_no_answer(model, store, tmp_path, monkeypatch, caplog):
    def fails(*_, **__):
        raise OSError("the store is away")

    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "pipe_file", fails)
    monkeypatch.setattr(fsspec.filesystem("memory").__class__, "find", fails)
    with running(served(model, tmp_path, store)) as address:
        assert ask(address)[0] == ask(address)[0]
    assert any("the store is away" in record.message for record in caplog.records)


def test_what_a_killed_server_left_half_written_is_swept(model, tmp_path):
    config, params, _ = model
    folder = tmp_path / "prefixes" / ("a" * 16)
    folder.mkdir(parents=True)
    host, gone = os.uname().nodename, 2**22 + 1  # no process has this number
    left = folder / f".x.state.{host}-{gone}-{'0' * 32}.partial"
    busy = folder / f".x.state.{host}-{os.getpid()}-{'0' * 32}.partial"
    for path in (left, busy):
        path.write_bytes(b"half")
    store = prefix_store.PrefixStore(tmp_path / "prefixes", config, "a" * 16, 2**30)
    store.start()
    store.stop()
    assert [path.name for path in folder.iterdir()] == [busy.name]
    os.utime(busy, (0, 0))
    files.sweep(folder)
    assert not list(folder.iterdir())

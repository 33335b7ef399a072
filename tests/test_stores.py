"""Object stores, as fsspec's store in memory stands for one: what is read, what is written, and what is refused."""

import dataclasses
import json
import os
import pathlib
import re
import signal
import time

import fsspec
import jax
import numpy as np
import pytest

import allmem_jax
from allmem_jax import cli
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.model import state
from allmem_jax.storage import files, jit_cache, stores
from tests import tiny_folder
from train import finetune
from train.data import documents
from train.loop import checkpoint, tiny
from train.recipe import FinetuneConfig


@pytest.fixture(autouse=True)
def url(store):
    return store


def left(tmp_path):
    """What of the copies' folder is no complete copy."""
    return [path.name for path in (tmp_path / "kept/stores").iterdir() if path.name.startswith(".")]


def test_what_is_a_url():
    assert [stores.is_url(path) for path in ("gs://b/x", "s3://b", "memory://b", "ggs://b/x")] == [True] * 4
    local = ("", "x", "/a/b", "a:b", "C:/x", r"C:\x", "run:/x", "./gs:/x", pathlib.Path("a"))
    assert not any(map(stores.is_url, local))
    for slip in ("gs:/b/x", pathlib.Path("s3://b/x")):
        with pytest.raises(ValueError, match=r"one slash where a URL has two: give (gs|s3)://b/x"):
            stores.is_url(slip)
    assert stores.local("a/b") == pathlib.Path("a/b") == stores.join("a", "b")
    assert stores.join("gs://b/x/", "y") == "gs://b/x/y"


def test_a_copy_is_whole_kept_and_made_anew_when_the_store_has_something_else(tmp_path, url, monkeypatch):
    for name, content in (("one.txt", b"1"), ("deep/two.bin", b"22"), ("three.json", b"{}")):
        stores.write(f"{url}/{name}", content)
    copied = []
    get = stores.get
    monkeypatch.setattr(stores, "get", lambda url, names, folder: (copied.extend(names), get(url, names, folder)))
    folder = stores.local(url)
    assert folder.name == "place" and stores.names(folder) == stores.names(url)
    assert (folder / "deep/two.bin").read_bytes() == b"22"
    assert stores.local(f"{url}/") == folder and len(copied) == 3
    assert stores.local(f"{url}/deep/two.bin").read_bytes() == b"22"
    assert stores.names(stores.local(url, (".json",))) == ["three.json"]
    stores.write(f"{url}/one.txt", b"other")
    assert (stores.local(url) / "one.txt").read_bytes() == b"other" and (folder / "one.txt").read_bytes() == b"1"
    with pytest.raises(FileNotFoundError, match=f"^{url}/none: no such file or folder"):
        stores.local(f"{url}/none")
    assert not left(tmp_path)


def test_an_incomplete_copy_is_no_copy(tmp_path, url, monkeypatch):
    memory = type(fsspec.filesystem("memory"))
    files.write(f"{url}/model.bin", b"12345678")
    get_file = memory.get_file

    def cut(self, there, here, **options):
        get_file(self, there, here, **options)
        os.truncate(here, 3)

    with monkeypatch.context() as patch, pytest.raises(OSError, match="model.bin came incomplete"):
        patch.setattr(memory, "get_file", cut)
        stores.local(url)
    dead = tmp_path / f"kept/stores/.part-{stores.platform.node()}-999999999-x"
    dead.mkdir()
    assert (stores.local(url) / "model.bin").read_bytes() == b"12345678"
    assert not left(tmp_path)


def test_placeholders_of_folders_are_left_out_and_names_that_climb_refused(url, monkeypatch):
    memory = type(fsspec.filesystem("memory"))
    file = {"type": "file", "size": 0}
    found = dict.fromkeys(("/bucket/place", "/bucket/place/sub", "/bucket/place/sub/x"), file)
    monkeypatch.setattr(memory, "find", lambda *_, **__: found)
    assert stores.names(url) == ["sub/x"]
    found["/bucket/place/../x"] = file
    with pytest.raises(ValueError, match=r"lead out of it: \.\./x"):
        stores.local(url)


def test_replace_leaves_what_the_folder_has_and_no_reader_takes_half_of_it(tmp_path, url, monkeypatch):
    for name in ("config.json", "model-1.bin", "model-2.bin"):
        stores.write(f"{url}/{name}", b"old")
        (tmp_path / name).write_text("new")
    (tmp_path / "model-2.bin").unlink()
    put, seen = stores.put, []
    monkeypatch.setattr(stores, "put", lambda *given: (seen.append(stores.names(url)), put(*given)))
    monkeypatch.setattr(stores, "names", lambda path, names=stores.names: [n for n in names(path) if "kept" not in n])
    stores.replace(tmp_path, url, last="config.json")
    assert seen == [["model-1.bin", "model-2.bin"], ["model-1.bin"]]
    assert {name: stores.read(f"{url}/{name}") for name in stores.names(url)} == dict.fromkeys(
        ("config.json", "model-1.bin"), b"new"
    )


def test_spooled_files_grow_and_are_there_after_a_failure(tmp_path, url):
    stores.write(f"{url}/log", b"one\n")
    stores.write(f"{url}/large", b"-")
    with pytest.raises(RuntimeError), stores.spooled(url, ("log", "absent")) as (folder, upload):
        assert stores.names(folder) == ["log"] and folder.name == "place"
        with (folder / "log").open("a") as log:
            log.write("two\n")
        upload()
        assert stores.read(f"{url}/log") == b"one\ntwo\n"
        (folder / "deep").mkdir()
        (folder / "deep/events").write_text("3")
        raise RuntimeError
    assert stores.names(url) == ["deep/events", "large", "log"] and not left(tmp_path)
    with stores.spooled(url, every=0.01) as (folder, _):
        (folder / ".log.partial").write_text("one")
        (folder / "log").write_text("three")
        deadline = time.monotonic() + 10
        while stores.read(f"{url}/log") != b"three" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stores.read(f"{url}/log") == b"three"
    assert stores.names(url) == ["deep/events", "large", "log"]
    with stores.spooled(tmp_path / "plain") as (folder, upload):
        upload()
        assert folder == tmp_path / "plain" and not folder.exists()


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("ggs://b/x", "ggs:// is no store"),
        ("gs:/b/x", "give gs://b/x"),
        ("gs://", "names no bucket"),
        ("https://host/x", "download it"),
        ("/proc/none/x", "/proc cannot be written"),
        ("FILE/x", "FILE cannot be written: Not a directory"),
        ("oci://b/x", "the package for oci:// is missing: Install ocifs"),
    ],
)
def test_outputs_that_cannot_work_are_refused_by_one_line(tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("FILE").write_text("x")
    with pytest.raises(ValueError, match=message) as error:
        stores.check_writable(path)
    assert "\n" not in str(error.value)
    assert sorted(os.listdir(tmp_path)) == ["FILE"]


def test_a_missing_package_and_a_bucket_that_fails_are_named(url, monkeypatch):
    def absent(*_, **__):
        raise ImportError("Please install gcsfs")

    with monkeypatch.context() as patch:
        patch.setattr(fsspec, "url_to_fs", absent)
        with pytest.raises(ValueError, match=r"^gs://b/x: the package for gs:// is missing: pip install gcsfs"):
            stores.check_writable("gs://b/x")

    def denied(*_, **__):
        raise RuntimeError("403:\n  no access")  # drivers have kinds of their own

    stores.check_writable(url)
    assert stores.names(url) == []
    monkeypatch.setattr(type(fsspec.filesystem("memory")), "pipe_file", denied)
    with pytest.raises(ValueError, match=f"out='{url}': {url} cannot be written: 403: no access"):
        stores.check_writable(url)


TEXT = "the whale and the sea were white, and the ship sailed on. " * 20


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return FinetuneConfig(
        model="tiny",
        texts=(str(tmp_path / "text.txt"),),
        out=str(tmp_path / "out"),
        cache=str(tmp_path / "tokens"),
        window=(4096, 8192),
    )


def test_a_run_is_refused_before_its_model_is_loaded(recipe, url, monkeypatch):
    monkeypatch.setattr(finetune.models, "load", lambda config: pytest.fail("loaded"))
    for field, value, message in (
        ("out", "ggs://b/x", "ggs:// is no store"),
        ("cache", url, f"cache='{url}' must be a local path"),
        ("model", f"{url}/none", f"{url}/none: no such file"),
        ("texts", (f"{url}/none",), f"{url}/none: no such file"),
        ("eval_texts", ("s3:/b/x",), "give s3://b/x"),
    ):
        with pytest.raises((ValueError, OSError), match=message):
            finetune.run(dataclasses.replace(recipe, **{field: value}))
    assert not pathlib.Path(recipe.out).exists()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="several processes need a folder that all of them see, or gs://"):
        finetune.check_paths(dataclasses.replace(recipe, out=url))


def test_orbax_writes_to_gs_itself_and_to_folders_as_ever(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(checkpoint.ocp.training, "Checkpointer", lambda place, **_: places.append(place))
    checkpoint.Checkpoints("gs://bucket/run/checkpoints", {})
    monkeypatch.chdir(tmp_path.parent)
    checkpoint.Checkpoints(tmp_path.name, {})
    assert places == ["gs://bucket/run/checkpoints", tmp_path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder.write(tmp_path_factory.mktemp("stores") / "tiny")


def test_models_go_to_a_store_and_come_back(folder, url, capsys):
    stores.put(folder, stores.names(folder), f"{url}/hf")
    assert cli.main(["convert", f"{url}/hf", f"{url}/converted", "--window", "16", "--sinks", "2", "--chunk", "8"]) == 0
    config, params, tokenizer = allmem_jax.load_pretrained(f"{url}/converted")
    assert config.window == 16 and "memory" in params["layers"] and tokenizer.encode("the sea")
    assert load_lib.read_config(f"{url}/converted") == config.replace(mixer="allmem")
    capsys.readouterr()
    assert cli.main(["convert", f"{url}/hf", f"{url}/converted"]) == 2
    assert "exists: give another folder" in capsys.readouterr().err
    with pytest.raises(FileExistsError, match="is not empty"):
        allmem_jax.save_pretrained(f"{url}/converted", config, params)


def test_results_go_to_a_store_and_are_gone_on_from(folder, url, tmp_path, capsys):
    """A command that measures writes below a URL, reads there what an earlier one left, and shows the URL."""
    (tmp_path / "sea.txt").write_text(TEXT * 20)
    assert cli.main(["convert", str(folder), f"{url}/model", "--window", "16", "--sinks", "2", "--chunk", "8"]) == 0
    asked = ["recall", f"{url}/model", str(tmp_path / "sea.txt"), "--tasks", "needle", "--lengths", "160"]
    asked += ["--samples", "2", "--out", f"{url}/recall"]

    def parts():
        return {name: info for name, info in stores.listed(f"{url}/recall").items() if name.startswith("parts/")}

    assert cli.main(asked) == 0
    assert f"{url}/recall" in json.loads(stores.read(f"{url}/recall/recall.json"))["command"]
    written = parts()
    assert written and cli.main(asked) == 0 and parts() == written  # not even written again
    page = ["evaluate", f"{url}/model", str(tmp_path / "sea.txt"), "--length", "32", "--out", f"{url}/page"]
    assert cli.main(page) == 0
    assert f"report: {url}/page/index.html" in capsys.readouterr().out
    assert {"index.html", "report.json"} <= set(stores.names(f"{url}/page"))


def test_results_are_there_after_a_command_was_told_to_end(url):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended, cli.options.results(f"{url}/new") as folder:
        (folder / "answers.jsonl").write_text("one")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
    assert ended.value.code == 143 and stores.read(f"{url}/new/answers.jsonl") == b"one"
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "gs:/b/m", "out"], "give gs://b/m"),
        (["convert", "MODEL", "ggs://b/out"], "ggs:// is no store"),
        (["convert", "MODEL", "/proc/x"], "/proc cannot be written"),
        (["info", "memory://b/none"], "memory://b/none: no such file or folder"),
        (["evaluate", "MODEL", "memory://b/none"], "memory://b/none: no such file or folder"),
        (["evaluate", "MODEL", "--out", "ggs://b/out"], "ggs:// is no store"),
    ],
)
def test_commands_refuse_paths_by_one_line(folder, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(folder) if word == "MODEL" else word for word in arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(lines) == 1 and message in lines[0]
    assert set(os.listdir(tmp_path)) <= {"kept"}


def test_a_decode_state_goes_to_a_store_and_comes_back(url):
    config = tiny.CONFIG
    made = state.init_state(config, 1)
    made = dataclasses.replace(made, keys=jax.random.normal(jax.random.key(0), made.keys.shape, made.keys.dtype))
    state.save_state(f"{url}/book.state", config, made)
    jax.tree.map(np.testing.assert_array_equal, state.load_state(f"{url}/book.state", config), made)
    with pytest.raises(FileNotFoundError, match="no such file"):
        state.load_state(f"{url}/none", config)


def test_texts_come_from_a_store(tmp_path, url):
    stores.write(f"{url}/a.txt", TEXT.encode())
    stores.write(f"{url}/b.jsonl", b'{"text": "the sea"}\n')
    found = documents.load_documents([url], tiny.ByteTokenizer(), tmp_path / "tokens")
    assert [len(document) for document in found] == [len(TEXT), 7]
    with pytest.raises(ValueError, match="must be a local path"):
        documents.load_documents([url], tiny.ByteTokenizer(), f"{url}/tokens")


def test_compiled_programs_are_kept_where_jax_was_told_of_no_other_place(tmp_path, monkeypatch):
    changed = (
        "jax_compilation_cache_dir",
        "jax_compilation_cache_max_size",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in changed}
    monkeypatch.setenv("ALLMEM_CACHE", str(tmp_path))
    try:
        jax.config.update("jax_compilation_cache_dir", "elsewhere")
        jit_cache.keep()
        assert jax.config.jax_compilation_cache_dir == "elsewhere"
        jax.config.update("jax_compilation_cache_dir", None)
        with monkeypatch.context() as off:
            off.setattr(jit_cache, "_processor", lambda: "one")
            jit_cache.keep()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "compiled" / "one")
        assert jax.config.jax_compilation_cache_max_size == 2**31  # and so it is locked
        assert re.fullmatch("[0-9a-f]{12}", jit_cache._processor())
    finally:
        for name, value in before.items():
            jax.config.update(name, value)

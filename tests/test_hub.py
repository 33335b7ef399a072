"""The Hugging Face Hub, as a small server on this machine stands for it: what goes up and down, what is refused."""

import base64
import hashlib
import http.server
import json
import re
import threading

import huggingface_hub
import jax
import numpy as np
import pytest
import tiny_folder
from huggingface_hub import constants
from test_cli import fails

import allmem_jax
from allmem_jax import cli
from allmem_jax.checkpoints import layout, memory_file
from allmem_jax.evaluation import recall
from allmem_jax.model import lm
from allmem_jax.reporting import sections
from allmem_jax.storage import hub, stores

REPO, TOKEN = "someone/small", "hf_secret"


class Server(http.server.ThreadingHTTPServer):
    """Repositories by name: `files` {path: content}, `large` {sha256: content}, `made` what was asked for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.large, self.made, self.taken, self.messages = {}, {}, [], [], []
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """The requests of `create_repo`, `upload_file`, `upload_folder` and `snapshot_download`."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, content=b"", status=200, **headers):
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_POST(self):
        content, server = self.body(), self.server
        if self.headers["Authorization"] != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        if self.path == "/api/validate-yaml":
            return self.answer({})
        if self.path == "/api/repos/create":
            asked = json.loads(content)
            server.made.append(asked)
            name = f"{asked['organization']}/{asked['name']}"
            server.repos.setdefault(name, {})
            return self.answer({"url": f"{server.url}/{name}"})
        if self.path.endswith("/info/lfs/objects/batch"):
            return self.answer({"objects": [self.to_upload(one) for one in json.loads(content)["objects"]]})
        if "/preupload/" in self.path:
            large = {True: "lfs", False: "regular"}
            asked = [file["path"] for file in json.loads(content)["files"]]
            modes = [{"path": p, "uploadMode": large[p.endswith(".safetensors")], "shouldIgnore": False} for p in asked]
            return self.answer({"files": modes})
        (repo,) = re.fullmatch("/api/models/(.*)/commit/main", self.path).groups()
        for line in map(json.loads, content.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                server.messages.append(value["summary"])
            elif line["key"] == "file":
                server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            else:
                server.repos[repo][value["path"]] = server.large[value["oid"]]
        self.answer({"commitUrl": f"{server.url}/{repo}/commit/{self.sha(repo)}", "commitOid": self.sha(repo)})

    def to_upload(self, asked):
        return asked | {"actions": {"upload": {"href": f"{self.server.url}/large/{asked['oid']}"}}}

    def do_PUT(self):
        self.server.large[self.path.rpartition("/")[2]] = self.body()
        self.answer()

    def sha(self, repo):
        return hashlib.sha1(repr(sorted(self.server.repos[repo].items())).encode()).hexdigest()

    def do_GET(self):
        path = self.path.partition("?")[0]
        repo, kind, rest = re.fullmatch(
            r"/(?:api/models/)?([^/]+/[^/]+)(?:/(revision|tree|resolve)/(.*))?", path
        ).groups()
        files = self.server.repos.get(repo)
        if files is None:
            return self.answer(status=404, X_Error_Code="RepoNotFound")
        revision, _, name = (rest or "main").partition("/")
        if revision not in ("main", self.sha(repo)):
            return self.answer(status=404, X_Error_Code="RevisionNotFound")
        if kind == "tree":
            return self.answer([{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()])
        if kind == "resolve":
            etag = f'"{hashlib.sha256(files[name]).hexdigest()}"'
            if self.command == "GET":
                self.server.taken.append(name)
            return self.answer(files[name], ETag=etag, X_Repo_Commit=self.sha(repo))
        self.answer({"id": repo, "sha": self.sha(repo), "siblings": [{"rfilename": p} for p in files]})

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    sizes = ["--window", "24", "--sinks", "2", "--chunk", "8", "--d-mem", "8", "--start", "random"]
    assert cli.main(["convert", str(tiny_folder.write(path / "plain")), str(path / "converted"), *sizes]) == 0
    return path / "converted"


def test_what_is_pushed_is_loaded_by_its_name(server, converted, tmp_path, capsys):
    section = sections.Section(
        "recall", "Recall", "allmem recall", (), (sections.Table("right", ("x",), (("0.75",),)),)
    )
    sections.save(tmp_path / "recall.json", section)
    config = layout.read_config(converted)
    memory_file.save(tmp_path / "memory.safetensors", config, lm.init_memory(config), "# Told of it")
    made = ["--base", "some/base", "--license", "mit", "--memory", str(tmp_path / "memory.safetensors")]
    made += ["--figures", str(tmp_path / "recall.json")]
    assert cli.main(["push", str(converted), REPO, "--private", "--message", "First", *made]) == 0
    assert capsys.readouterr().out.strip() == f"{server.url}/{REPO}"
    (asked,) = server.made
    assert asked.get("private") or asked.get("visibility") == "private"
    assert server.messages[-1] == "First"

    card = huggingface_hub.ModelCard(server.repos[REPO]["README.md"].decode())
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("some/base", "mit", "allmem-jax")
    for told in (f'load_pretrained("hf://{REPO}")', "0.75", "## Told of it", "24, 2 tokens"):
        assert told in card.text

    server.repos[REPO] |= {"weights.bin": b"x", "code.py": b"x", "model.gguf": b"x", "deep/model.safetensors": b"x"}
    config, params, tokenizer = allmem_jax.load_pretrained(f"hf://{REPO}")
    own = allmem_jax.load_pretrained(converted)
    assert config == own[0] and tokenizer.encode("the sea") == own[2].encode("the sea")
    jax.tree.map(np.testing.assert_array_equal, params, own[1])
    assert not {"weights.bin", "code.py", "model.gguf", "deep/model.safetensors"} & set(server.taken)
    assert cli.main(["info", f"hf://{REPO}@main"]) == 0
    assert "window 24" in capsys.readouterr().out
    assert stores.local(f"hf://{REPO}/model.gguf").read_bytes() == b"x"
    assert recall.fingerprint(hub.local(f"hf://{REPO}")) == recall.fingerprint(hub.local(f"hf://{REPO}@main"))


def test_a_config_is_read_without_weights(server, converted):
    server.repos[REPO] = {file.name: file.read_bytes() for file in converted.iterdir()}
    folder = hub.local(f"hf://{REPO}", (".json", layout.ALLMEM_WEIGHTS))
    assert layout.read_config(folder).window == 24 and "model.safetensors" not in server.taken


def test_a_card_in_the_folder_is_left_as_it_is(server, converted, capsys):
    (converted / "README.md").write_text("# Mine")
    assert cli.main(["push", str(converted), REPO]) == 0
    (converted / "README.md").unlink()
    assert server.repos[REPO]["README.md"] == b"# Mine"


def test_what_cannot_be_pushed_is_one_line(server, converted, monkeypatch, capsys, tmp_path):
    plain = converted.parent / "plain"
    assert "has no allmem.safetensors: it is no converted model" in fails(capsys, "push", plain, REPO)
    other = fails(capsys, "push", converted, REPO, "--memory", "smollm2-135m-instruct")
    assert "is a memory for another model" in other
    assert "repo='small' is no repository" in fails(capsys, "push", converted, "small")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    assert f"hf://{REPO} cannot be written" in fails(capsys, "push", converted, REPO)
    monkeypatch.delenv("HF_TOKEN")
    assert "no token for the Hub: set HF_TOKEN" in fails(capsys, "push", converted, REPO)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert f"hf://{REPO} cannot be written: " in fails(capsys, "push", converted, REPO)
    assert not server.repos


def test_what_cannot_be_loaded_is_one_line(server, monkeypatch, capsys):
    assert f"hf://{REPO}: no such repository" in fails(capsys, "info", f"hf://{REPO}")
    server.repos[REPO] = {"config.json": b"{}"}
    assert f"hf://{REPO}@old: the repository has no such revision" in fails(capsys, "info", f"hf://{REPO}@old")
    assert "has no such file" in fails(capsys, "info", f"hf://{REPO}/x.gguf")
    for name in ("hf://small", f"hf://{REPO}/../x"):
        assert f"{name} names no model of the Hub" in fails(capsys, "info", name)
    assert not hub.is_model("hf://datasets/someone/texts") and not hub.is_model("gs://someone/small")
    with pytest.raises(ValueError, match="allmem push"):
        stores.check_writable(f"hf://{REPO}")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    lost = "hf://someone/else: the Hub cannot be reached, and its cache does not have it"
    assert lost in fails(capsys, "info", "hf://someone/else")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and its cache" in fails(capsys, "info", "hf://someone/else")

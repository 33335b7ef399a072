"""Damaged and hostile files: one clear error each, and nothing written over."""

import json
import pathlib
import struct

import gguf
import jax
import numpy as np
import pytest
import safetensors.numpy

import allmem_jax
from allmem_jax.checkpoints import gguf_reader, layout
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import save as save_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

TINY = config_lib.ModelConfig(
    vocab_size=37,
    d_model=16,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=8,
    d_ff=24,
    window=8,
    sinks=1,
    chunk=4,
    d_mem=4,
    mixer="allmem",
)


def backbone(config: config_lib.ModelConfig, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: lm.init_params(config.replace(mixer="full")))
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A good checkpoint, to be damaged."""
    allmem_jax.save_pretrained(tmp_path / "good", TINY, backbone(TINY))
    return tmp_path / "good"


@pytest.fixture
def gguf_path(tmp_path) -> pathlib.Path:
    path = tmp_path / "good.gguf"
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_block_count(1)
    for name, value in dict(embedding_length=32, feed_forward_length=32, context_length=64).items():
        writer.add_uint32(f"qwen2.{name}", value)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (37, 32),
        "output_norm": (32,),
        "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,),
        "blk.0.attn_q": (32, 32),
        "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32),
        "blk.0.attn_output": (32, 32),
        "blk.0.ffn_gate": (32, 32),
        "blk.0.ffn_up": (32, 32),
        "blk.0.ffn_down": (32, 32),
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.normal(size=shape).astype(np.float32))
    for name, size in (("q", 32), ("k", 16), ("v", 16)):
        writer.add_tensor(f"blk.0.attn_{name}.bias", rng.normal(size=size).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def edit_json(path: pathlib.Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder: pathlib.Path, change) -> None:
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    change(tensors)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_good_files_load(folder, gguf_path):
    assert allmem_jax.load_pretrained(folder)[0] == TINY.replace(mixer="full")  # there is no memory
    assert allmem_jax.load_pretrained(gguf_path)[0].family == "qwen2"


def test_a_model_that_is_to_read_texts_needs_a_tokenizer(folder):
    with pytest.raises(ValueError, match=f"^{folder} has no tokenizer: copy the original model's"):
        load_lib.load_with_tokenizer(folder)


def test_absent_and_wrong_paths(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        allmem_jax.load_pretrained("HuggingFaceTB/SmolLM2-135M")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no config.json"):
        allmem_jax.load_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="give the folder"):
        allmem_jax.load_pretrained(folder / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="convert them to safetensors"):
        allmem_jax.load_pretrained(folder)


def test_every_misfit_is_in_one_error(folder):
    def change(tensors):
        tensors["model.layers.7.mlp.up_proj.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
        tensors["model.norm.weight"] = np.zeros(5, np.float32)
        tensors["surprise"] = np.zeros(1, np.float32)
        tensors["language_model.model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"]

    edit_weights(folder, change)
    with pytest.raises(ValueError, match="5 tensors do not fit") as error:
        allmem_jax.load_pretrained(folder)
    for line in (
        "unused: model.layers.7.mlp.up_proj.weight",
        "unused: surprise",
        "missing: model.layers.1.mlp.up_proj.weight",
        r"wrong shape: model.norm.weight is (5,), the config wants (16,)",
        "matched twice",
    ):
        assert line in str(error.value)


def test_checkpoint_of_another_config(folder):
    edit_json(folder / "config.json", intermediate_size=32)
    with pytest.raises(ValueError, match=r"of another model than config.json: d_ff=24 \(not 32\)"):
        allmem_jax.load_pretrained(folder)
    (folder / layout.ALLMEM_CONFIG).unlink()
    with pytest.raises(ValueError, match=r"6 tensors do not fit(.|\n)*\(24, 16\), the config wants \(32, 16\)"):
        allmem_jax.load_pretrained(folder)


def test_memory_of_another_config(tmp_path):
    shapes = jax.eval_shape(lambda: lm.init_memory(TINY))
    params = lm.merge_params(backbone(TINY), jax.tree.map(lambda leaf: np.ones(leaf.shape, np.float32), shapes))
    allmem_jax.save_pretrained(tmp_path / "out", TINY, params)
    with pytest.raises(ValueError, match="wrong shape: alpha|wrong shape: fast_gate"):
        allmem_jax.load_pretrained(tmp_path / "out", n_mem=3)
    with pytest.raises(ValueError, match="did you mean 'window'"):
        allmem_jax.load_pretrained(tmp_path / "out", windw=3)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(model_type="mamba", architectures=["MambaForCausalLM"]), "'MambaForCausalLM'.*supported: llama, mistral"),
        (dict(model_type=None), "is not supported"),
        (dict(num_key_value_heads=3), "n_heads=4 does not divide by n_kv_heads=3"),
        (dict(num_attention_heads=3, head_dim=None), "hidden_size=16 does not divide by num_attention_heads=3"),
        (dict(num_attention_heads="4"), "num_attention_heads='4'"),
        (dict(hidden_size=None), "hidden_size=None"),
        (dict(num_hidden_layers=10**9), "is the file damaged"),
        (dict(hidden_act="relu"), "hidden_act='relu' is not supported"),
        (dict(rope_scaling=dict(rope_type="longrope", factor=2.0)), "rope_type='longrope' is not supported"),
        (dict(rope_scaling=dict(rope_type="linear")), "lacks 'factor'"),
        (dict(rope_parameters=dict(rope_type="yarn", factor=2.0, truncate=False)), "truncate=false"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5"),
        (dict(quantization_config=dict(quant_method="gptq")), "quantised with 'gptq'"),
        (dict(final_logit_softcapping=30.0), "final_logit_softcapping=30.0 is not supported"),
    ],
)
def test_unsupported_configs(folder, changes, message):
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=message) as error:
        allmem_jax.load_pretrained(folder)
    assert str(folder / "config.json") in str(error.value)


def test_config_that_is_not_json(folder):
    for text in ("{", "[]", '"a"'):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match="config.json: (not valid JSON|holds a)"):
            allmem_jax.load_pretrained(folder)


def test_truncated_safetensors(folder):
    data = (folder / "model.safetensors").read_bytes()
    for length in (0, 5, 60, len(data) - 7):
        (folder / "model.safetensors").write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated or damaged"):
            allmem_jax.load_pretrained(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_git_lfs_pointer(folder, name):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    (folder / name).write_text(pointer)
    with pytest.raises(ValueError, match=f"{name} is a Git LFS pointer.*git lfs pull"):
        allmem_jax.load_pretrained(folder)
    (folder / "model.gguf").write_text(pointer)
    with pytest.raises(ValueError, match="model.gguf is a Git LFS pointer"):
        allmem_jax.load_pretrained(folder / "model.gguf")


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "a\\b", "sub/m.safetensors", ".."])
def test_shard_names_stay_in_the_folder(folder, shard):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    with pytest.raises(ValueError, match="must be plain file names"):
        allmem_jax.load_pretrained(folder)


def test_bad_indexes(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "model-1.safetensors"}}))
    with pytest.raises(FileNotFoundError, match="lacks shards.*model-1.safetensors"):
        allmem_jax.load_pretrained(folder)
    for text in ("{}", '{"weight_map": []}'):
        index.write_text(text)
        with pytest.raises(ValueError, match="no weight_map"):
            allmem_jax.load_pretrained(folder)
    (folder / "copy.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "copy.safetensors"}}))
    with pytest.raises(ValueError, match="matched twice: model.norm.weight"):
        allmem_jax.load_pretrained(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_weights(folder, value):
    def change(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = value

    edit_weights(folder, change)
    with pytest.raises(ValueError, match="NaN or infinite weights in model.layers.1.mlp.up_proj.weight$"):
        allmem_jax.load_pretrained(folder)


def test_integer_weights(folder):
    edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": np.ones(16, np.int8)}))
    with pytest.raises(ValueError, match="'model.norm.weight' has the unsupported dtype I8"):
        allmem_jax.load_pretrained(folder)


def test_own_head_in_a_tied_file(folder):
    edit_weights(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}))
    with pytest.raises(ValueError, match="lm_head.weight differs from the embedding.*set tie_word_embeddings to false"):
        allmem_jax.load_pretrained(folder)


def test_truncated_gguf_at_every_length(gguf_path):
    data = gguf_path.read_bytes()
    header_end = min(tensor.start for tensor in gguf_reader.open_gguf(gguf_path).tensors.values())
    for length in [*range(0, header_end, 7), header_end, len(data) // 2, len(data) - 40]:
        gguf_path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="truncated|not a GGUF"):
            gguf_reader.open_gguf(gguf_path)


def gguf_header(n_tensors: int, n_keys: int, body: bytes) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, n_tensors, n_keys) + body


def key(name: str, kind: int, body: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + body


def tensor_entry(name: str, dims: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    text = struct.pack("<Q", len(name)) + name.encode()
    return text + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset) + b"\0" * 64


@pytest.mark.parametrize(
    "contents, message",
    [
        (gguf_header(0, 10**9, b"\0" * 64), "claims 1000000000 metadata keys"),
        (gguf_header(10**9, 0, b"\0" * 64), "claims 1000000000 tensors"),
        (gguf_header(0, 1, key("a", 9, struct.pack("<IQ", 5, 10**9)) + b"\0" * 64), "1000000000 array elements"),
        (gguf_header(0, 1, key("a", 9, struct.pack("<IQ", 8, 10**9)) + b"\0" * 64), "1000000000 strings"),
        (gguf_header(0, 1, key("a", 9, struct.pack("<IQ", 9, 10**9)) + b"\0" * 64), "array of type 9"),
        (gguf_header(0, 1, key("a", 8, struct.pack("<Q", 2**63)) + b"\0" * 64), "9223372036854775808 bytes of text"),
        (gguf_header(0, 1, key("a", 77, b"\0" * 64)), "unknown value type 77"),
        (gguf_header(0, 1, key("general.alignment", 4, struct.pack("<I", 0)) + b"\0" * 8), "general.alignment=0"),
        (gguf_header(1, 0, tensor_entry("t", (2**62, 2**62))), "truncated GGUF: tensor 't'"),
        (gguf_header(1, 0, tensor_entry("t", (4,), offset=2**63)), "truncated GGUF: tensor 't'"),
        (gguf_header(1, 0, tensor_entry("t", (0, 4))), "has the shape"),
        (gguf_header(1, 0, tensor_entry("t", (1,) * 5)), "has 5 dimensions"),
        (gguf_header(1, 0, tensor_entry("t", (4,), kind=999)), "unknown encoding 999"),
        (gguf_header(1, 0, tensor_entry("t", (4,), kind=3)), "no multiple of 32"),
        (gguf_header(2, 0, tensor_entry("t", (4,))[:-64] * 2 + b"\0" * 64), "'t' appears twice"),
        (struct.pack(">4sIQQ", b"GGUF", 3, 1, 1) + b"\0" * 64, "version 50331648 is not supported"),
        (b"PK\3\4" + b"\0" * 64, "not a GGUF file: it starts with b'PK"),
        (gguf_header(0, 0, b"\0" * 64), "architecture None is not supported"),
        (gguf_header(0, 1, key("general.architecture", 8, struct.pack("<Q", 5) + b"mamba")), "'mamba'.*supported"),
    ],
    ids=range(19),
)
def test_hostile_gguf_headers(contents, message, tmp_path):
    (tmp_path / "bad.gguf").write_bytes(contents)
    with pytest.raises(ValueError, match=message) as error:
        allmem_jax.load_pretrained(tmp_path / "bad.gguf")
    assert "bad.gguf" in str(error.value)


def test_random_damage_to_a_gguf_header_is_an_error_or_harmless(gguf_path):
    data = bytearray(gguf_path.read_bytes())
    header_end = min(tensor.start for tensor in gguf_reader.open_gguf(gguf_path).tensors.values())
    rng = np.random.default_rng(0)
    for _ in range(300):
        bad = bytearray(data)
        for place in rng.integers(4, header_end, 3):
            bad[place] = rng.integers(256)
        gguf_path.write_bytes(bad)
        try:
            allmem_jax.load_pretrained(gguf_path)
        except ValueError as error:
            assert str(gguf_path) in str(error)


def test_nothing_is_written_over(folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def unchanged() -> bool:
        return {path.name: path.read_bytes() for path in folder.iterdir()} == before

    with pytest.raises(FileExistsError, match="overwrite=True"):
        allmem_jax.save_pretrained(folder, TINY, backbone(TINY, seed=1))
    with pytest.raises(FileExistsError, match="is a file"):
        allmem_jax.save_pretrained(folder / "config.json", TINY, backbone(TINY))
    with pytest.raises(ValueError, match="do not fit the config"):
        allmem_jax.save_pretrained(folder, TINY.replace(d_ff=8), backbone(TINY), overwrite=True)
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot express qk_norm=True"):
        allmem_jax.save_pretrained(folder, TINY.replace(qk_norm=True), backbone(TINY), overwrite=True)
    real = save_lib.os.replace
    monkeypatch.setattr(
        save_lib.os, "replace", lambda a, b: fail() if b == folder and ".old" not in a.name else real(a, b)
    )
    with pytest.raises(OSError, match="disk"):
        allmem_jax.save_pretrained(folder, TINY, backbone(TINY, seed=1), overwrite=True)
    assert unchanged() and [path.name for path in folder.parent.iterdir()] == ["good"]
    monkeypatch.undo()
    allmem_jax.save_pretrained(folder, TINY, backbone(TINY, seed=1), overwrite=True)
    assert not unchanged() and [path.name for path in folder.parent.iterdir()] == ["good"]
    jax.tree.map(np.testing.assert_array_equal, allmem_jax.load_pretrained(folder)[1], backbone(TINY, seed=1))


def fail():
    raise OSError("disk full")

"""Checkpoints in and out: logits of transformers' models, of our load of them, and of our export of that load."""

import json
import pathlib
import subprocess
import sys

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import allmem_jax
from allmem_jax.checkpoints import families, gguf_config, hf_config
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm

torch = pytest.importorskip("torch")
import transformers  # noqa: E402

LENGTH = 33
TINY = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
LLAMA3 = dict(
    rope_type="llama3",
    rope_theta=500.0,
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
YARN = dict(
    rope_type="yarn", rope_theta=5000.0, factor=4.0, original_max_position_embeddings=16, beta_fast=4.0, beta_slow=0.5
)
LINEAR = dict(rope_type="linear", rope_theta=3000.0, factor=2.5)
GEMMA_ROPE = {
    "full_attention": dict(rope_type="linear", rope_theta=9000.0, factor=8.0),
    "sliding_attention": dict(rope_type="default", rope_theta=700.0),
}
# Model type of the config, and what differs from TINY. Each family, each kind of bias, head, window and rotary scaling.
CASES: dict[str, tuple[str, dict]] = {
    "llama": ("llama", dict(tie_word_embeddings=True, rms_norm_eps=1e-5)),
    "llama-biases": ("llama", dict(attention_bias=True, mlp_bias=True, num_key_value_heads=1)),
    "llama-llama3": ("llama", dict(rope_parameters=LLAMA3)),
    "llama-linear": ("llama", dict(rope_parameters=LINEAR)),
    "mistral": ("mistral", dict(sliding_window=7)),
    "mistral-full": ("mistral", dict(sliding_window=None)),
    "qwen2": ("qwen2", dict(tie_word_embeddings=True, head_dim=8)),
    "qwen2-windows": ("qwen2", dict(use_sliding_window=True, sliding_window=6, max_window_layers=1, head_dim=8)),
    "qwen3-yarn": ("qwen3", dict(rope_parameters=YARN)),
    "gemma3": (
        "gemma3_text",
        dict(
            sliding_window=5,
            query_pre_attn_scalar=24,
            rope_parameters=GEMMA_ROPE,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        ),
    ),
    "gemma3-pattern": ("gemma3_text", dict(sliding_window=5, num_hidden_layers=7, attention_bias=True)),
}


def write_checkpoint(case: str, folder: pathlib.Path, dtype=torch.float32, **saving) -> "transformers.PreTrainedModel":
    """A random model of transformers, norms and biases random too, saved to `folder`."""
    kind, changes = CASES[case]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **(TINY | changes))
    net = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for value in net.parameters():
            value.add_(torch.randn_like(value) * 0.15)
    net.to(dtype).save_pretrained(folder, **saving)
    return reload(folder)


def reload(folder: pathlib.Path) -> "transformers.PreTrainedModel":
    """Transformers' own load of a folder, in float32."""
    options = dict(attn_implementation="eager", dtype=torch.float32, local_files_only=True)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 97, (2, LENGTH)).astype(np.int32)


def torch_logits(net) -> np.ndarray:
    with torch.no_grad():
        return net(torch.tensor(tokens().astype(np.int64))).logits.float().numpy()


def our_logits(config: config_lib.ModelConfig, params) -> np.ndarray:
    teacher = lm.AllMemLM(config.replace(mixer="full"))
    return np.asarray(jax.jit(lambda params: teacher.apply({"params": params}, tokens()))(params))


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def assert_same_tree(found, wanted) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize("case", CASES)
def test_logits_survive_import_and_export(case, tmp_path):
    wanted = torch_logits(write_checkpoint(case, tmp_path / "in"))
    config, params, tokenizer = allmem_jax.load_pretrained(tmp_path / "in")
    assert tokenizer is None and "memory" not in params["layers"]
    assert distance(our_logits(config, params), wanted) < 1e-4
    allmem_jax.save_pretrained(tmp_path / "out", config, params)
    assert distance(torch_logits(reload(tmp_path / "out")), wanted) < 1e-5
    again, params_again, _ = allmem_jax.load_pretrained(tmp_path / "out")
    assert again == config
    assert_same_tree(params_again, params)


@pytest.mark.parametrize("case", ["llama-biases", "qwen3-yarn", "gemma3"])
def test_tree_is_the_models_own(case, tmp_path):
    write_checkpoint(case, tmp_path)
    config, params, _ = allmem_jax.load_pretrained(tmp_path, window=16, chunk=8)
    wanted = lm.split_params(jax.eval_shape(lambda: lm.init_params(config)))[0]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, wanted)


def test_old_style_rope_fields(tmp_path):
    """Files of transformers 4: rope_theta, rope_scaling with `type`, rope_local_base_freq."""
    base = {**TINY, "model_type": "llama", "rms_norm_eps": 1e-5}
    config = hf_config.from_hf({**base, "rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 3.0}})
    assert (config.rope_theta, config.rope_scaling) == (77.0, config_lib.RopeScaling("linear", 3.0))
    gemma = hf_config.from_hf({**TINY, "model_type": "gemma3_text", "rope_local_base_freq": 55.0})
    assert (gemma.rope_theta, gemma.local_rope_theta, gemma.local_layers) == (1e6, 55.0, (True, True, True))
    nested = hf_config.from_hf({"model_type": "gemma3", "text_config": {**TINY, "sliding_window": 9}})
    assert (nested.family, nested.local_window) == ("gemma3_text", 9)


@pytest.mark.parametrize("preset", ["qwen3-0.6b", "llama-3.2-1b", "gemma-3-270m", "mistral-7b", "qwen2.5-0.5b"])
def test_presets_survive_as_hugging_face_configs(preset):
    config = config_lib.preset(preset)
    assert families.differing_fields(hf_config.from_hf(hf_config.to_hf(config)), config) == []


def test_multimodal_names_reach_the_text_model():
    for prefix in ("model.language_model.", "language_model.model."):
        found = families.to_path(families.HF_RULES["gemma3_text"], prefix + "layers.12.self_attn.q_proj.weight")
        assert found == ("layers/attention/q_proj/kernel", 12, "transpose")


def test_bfloat16_and_float16_files(tmp_path):
    net = write_checkpoint("qwen3-yarn", tmp_path / "bf16", torch.bfloat16)
    config, params, _ = allmem_jax.load_pretrained(tmp_path / "bf16")
    assert params["embed"]["embedding"].dtype == jnp.float32
    assert distance(our_logits(config, params), torch_logits(net)) < 1e-4
    config, params16, _ = allmem_jax.load_pretrained(tmp_path / "bf16", dtype="bfloat16")
    assert config.dtype == "bfloat16" and {leaf.dtype.name for leaf in jax.tree.leaves(params16)} == {"bfloat16"}
    assert_same_tree(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params16), params)
    allmem_jax.save_pretrained(tmp_path / "out", config, params16)
    assert json.loads((tmp_path / "out/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert distance(torch_logits(reload(tmp_path / "out")), torch_logits(net)) < 1e-5
    half = write_checkpoint("qwen2", tmp_path / "f16", torch.float16)
    params = allmem_jax.load_pretrained(tmp_path / "f16")[1]
    np.testing.assert_array_equal(params["embed"]["embedding"], half.get_input_embeddings().weight.detach().numpy())


def test_shards_in_and_out(tmp_path):
    net = write_checkpoint("gemma3", tmp_path / "one")
    net.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many/model.safetensors.index.json").is_file()
    config, params, _ = allmem_jax.load_pretrained(tmp_path / "many")
    assert_same_tree(params, allmem_jax.load_pretrained(tmp_path / "one")[1])
    allmem_jax.save_pretrained(tmp_path / "out", config, params, max_shard_size="20KB")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    assert distance(torch_logits(reload(tmp_path / "out")), torch_logits(net)) < 1e-6


def test_memory_travels_beside_the_backbone(tmp_path):
    write_checkpoint("llama", tmp_path / "in")
    config, params, _ = allmem_jax.load_pretrained(tmp_path / "in", window=16, sinks=2, chunk=8, n_mem=3, d_mem=4)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: lm.init_memory(config))
    memory = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
    params = lm.merge_params(params, memory)
    allmem_jax.save_pretrained(tmp_path / "out", config, params, dtype="bfloat16")
    again, params_again, _ = allmem_jax.load_pretrained(tmp_path / "out")
    assert again == config.replace(mixer="allmem")
    assert_same_tree(lm.split_params(params_again)[1], memory)  # float32 whatever the backbone's dtype
    assert allmem_jax.load_pretrained(tmp_path / "out", window=32)[0].window == 32


def test_a_model_comes_as_it_runs(tmp_path):
    """Without a memory as the original or as it was saved; a memory that is asked for is made, and silent."""
    write_checkpoint("llama", tmp_path / "in")
    sizes = dict(window=16, sinks=2, chunk=8, d_mem=4)
    config, params, _ = allmem_jax.load_pretrained(tmp_path / "in", **sizes)
    assert config.mixer == "full" and "memory" not in params["layers"]
    (written,) = generation.generate(params, config, [[5, 6, 7]], max_tokens=2)
    assert len(written) == 2
    with pytest.warns(UserWarning, match="has no memory: an untrained one is added"):
        fresh_config, fresh, _ = allmem_jax.load_pretrained(tmp_path / "in", mixer="allmem", **sizes)
    assert fresh_config.mixer == "allmem" and not np.any(fresh["layers"]["memory"]["alpha"])
    assert_same_tree(lm.split_params(fresh)[0], params)
    for name, mixer, saved in [
        ("full", "full", params),
        ("swa", "swa", params),
        ("none", "allmem", params),
        ("memory", "full", fresh),
    ]:
        allmem_jax.save_pretrained(tmp_path / name, config.replace(mixer=mixer), saved)
        wanted = {"none": "full", "memory": "allmem"}.get(name, name)
        assert allmem_jax.load_pretrained(tmp_path / name)[0] == config.replace(mixer=wanted)
        assert load_lib.read_config(tmp_path / name).mixer == wanted
    assert allmem_jax.load_pretrained(tmp_path / "memory", mixer="swa")[0].mixer == "swa"
    assert load_lib.read_config("qwen3-0.6b") == config_lib.preset("qwen3-0.6b", mixer="full")
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        load_lib.read_config("./absent.gguf")


def test_equal_head_in_a_tied_file_is_ignored(tmp_path):
    net = write_checkpoint("llama", tmp_path)
    state = {name: value.detach().numpy() for name, value in net.state_dict().items()}
    safetensors.numpy.save_file(state, tmp_path / "model.safetensors")
    config, params, _ = allmem_jax.load_pretrained(tmp_path)
    assert config.tie_embeddings and "lm_head" not in params


def write_gguf(case: str, folder: pathlib.Path, path: pathlib.Path, arch: str) -> None:
    """A float32 GGUF of the checkpoint in `folder`, laid out as llama.cpp's converter does it."""
    raw = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(raw["num_hidden_layers"])
    writer.add_context_length(raw["max_position_embeddings"])
    writer.add_embedding_length(raw["hidden_size"])
    writer.add_feed_forward_length(raw["intermediate_size"])
    writer.add_head_count(raw["num_attention_heads"])
    writer.add_head_count_kv(raw["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(raw["rms_norm_eps"])
    head_dim = CASES[case][1].get("head_dim", TINY["head_dim"])
    writer.add_key_length(head_dim)
    rope = raw["rope_parameters"]
    writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
    if rope.get("rope_type") == "yarn":
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rope["factor"])
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_yarn_beta_fast(rope["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope["beta_slow"])
    writer.add_eos_token_id(raw["eos_token_id"])
    if arch == "gemma3":
        writer.add_sliding_window(raw["sliding_window"])
    names = gguf.get_tensor_name_map(arch_enum(arch), raw["num_hidden_layers"])
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
        for name in file.keys():  # noqa: SIM118
            array = file.get_tensor(name)
            if arch == "gemma3" and name.endswith("norm.weight"):
                array = array + 1
            if arch == "llama" and ("q_proj" in name or "k_proj" in name):
                halves = array.reshape(-1, 2, head_dim // 2, *array.shape[1:])
                array = halves.swapaxes(1, 2).reshape(array.shape)
            writer.add_tensor(names.get_name(name, (".weight", ".bias")), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def arch_enum(arch: str) -> gguf.MODEL_ARCH:
    return next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)


@pytest.mark.parametrize(
    "case, arch",
    [
        ("llama-biases", "llama"),
        ("llama", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3-yarn", "qwen3"),
        ("gemma3-pattern", "gemma3"),
    ],
)
def test_gguf_loads_as_the_folder_does(case, arch, tmp_path, monkeypatch):
    # llama.cpp scales Gemma's queries by the head dimension, whatever the config says.
    changes = CASES[case][1] | (dict(query_pre_attn_scalar=16, attention_bias=False) if arch == "gemma3" else {})
    monkeypatch.setitem(CASES, case, (CASES[case][0], changes))
    write_checkpoint(case, tmp_path / "hf")
    write_gguf(case, tmp_path / "hf", tmp_path / "model.gguf", arch)
    wanted_config, wanted, _ = allmem_jax.load_pretrained(tmp_path / "hf")
    config, params, tokenizer = allmem_jax.load_pretrained(tmp_path / "model.gguf")
    assert tokenizer is None
    assert config == wanted_config
    assert jax.tree.structure(params) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-7), params, wanted)  # +1 -1 of Gemma's norms


def test_llama3_scaling_is_recovered_from_gguf_factors():
    config = config_lib.preset("llama-3.2-1b")
    wavelength = 2 * np.pi * config.rope_theta ** (np.arange(0, 64, 2) / 64)
    smooth = (8192 / wavelength - 1) / 3
    factors = np.where(wavelength < 2048, 1.0, np.where(wavelength > 8192, 32.0, 1 / ((1 - smooth) / 32 + smooth)))
    assert gguf_config._llama3_scaling(config, factors.astype(np.float32)) == config.rope_scaling


def bpe_gguf(path: pathlib.Path, backend, kind: str, pre: str | None, **fields) -> tokenizer_lib.gguf_reader.GGUFFile:
    """A GGUF that holds nothing but the vocabulary of a trained `tokenizers` BPE."""
    model_json = json.loads(backend.to_str())["model"]
    names = sorted(model_json["vocab"], key=model_json["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(names + ["<|end|>"])
    writer.add_token_types([1] * len(names) + [3])
    writer.add_eos_token_id(len(names))
    writer.add_chat_template("{{ messages[0]['content'] }}<|end|>")
    if pre is None:
        writer.add_token_scores([-float(index) for index in range(len(names) + 1)])
    else:
        writer.add_tokenizer_pre(pre)
        writer.add_token_merges(
            [merge if isinstance(merge, str) else " ".join(merge) for merge in model_json["merges"]]
        )
    for key, value in fields.items():
        writer.add_uint32(f"tokenizer.ggml.{key}", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return tokenizer_lib.gguf_reader.open_gguf(path)


TEXT = "It is a truth universally acknowledged, that a single man in possession of 12345 pounds,\n\n  isn't in want."


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_gguf_tokenizer_is_the_one_it_was_made_from(kind, tmp_path):
    import tokenizers

    train = [TEXT, TEXT.upper(), TEXT.swapcase()]
    if kind == "gpt2":
        gold = tokenizers.ByteLevelBPETokenizer(add_prefix_space=False)
        gold.train_from_iterator(train, vocab_size=330, min_frequency=1, show_progress=False)
    else:
        gold = tokenizers.SentencePieceBPETokenizer()
        gold.train_from_iterator(train, vocab_size=150, min_frequency=1, special_tokens=["<unk>"], show_progress=False)
    file = bpe_gguf(
        tmp_path / "t.gguf",
        gold,
        kind,
        "gpt-2" if kind == "gpt2" else None,
        **({} if kind == "gpt2" else {"unknown_token_id": 0}),
    )
    found = tokenizer_lib.from_gguf(file)
    text = TEXT.replace("\n", " ") if kind == "llama" else TEXT  # the tiny vocabulary has no line feed
    assert found(text).input_ids == gold.encode(text).ids
    assert found.decode(found(text).input_ids) == text
    ended = found(text + "<|end|>").input_ids
    assert ended[-1] == found.eos_token_id and ended[:-1] == gold.encode(text).ids
    assert found.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "a<|end|>"
    found.save_pretrained(tmp_path / "folder")
    raw = hf_config.to_hf(config_lib.preset("smollm2-135m"))  # which has transformers choose a class by family
    (tmp_path / "folder/config.json").write_text(json.dumps(raw))
    again = tokenizer_lib.load_tokenizer(tmp_path / "folder")
    assert again(TEXT + "<|end|>").input_ids == found(TEXT + "<|end|>").input_ids
    assert again.chat_template == found.chat_template


@pytest.mark.parametrize(
    "pre, digits, bos",
    [
        ("llama-bpe", ["123", "45"], True),
        ("qwen2", list("12345"), False),
        ("smollm", list("12345"), False),
        ("tekken", list("12345"), True),
    ],
)
def test_gguf_pre_tokenizers(pre, digits, bos, tmp_path):
    import tokenizers

    gold = tokenizers.ByteLevelBPETokenizer()
    gold.train_from_iterator([TEXT], vocab_size=280, show_progress=False)
    found = tokenizer_lib.from_gguf(
        bpe_gguf(tmp_path / "t.gguf", gold, "gpt2", pre, bos_token_id=gold.get_vocab_size())
    )
    pieces = [piece for piece, _ in found.backend_tokenizer.pre_tokenizer.pre_tokenize_str("of 12345 don't")]
    assert [piece for piece in pieces if piece.isdigit()] == digits
    assert (found("of").input_ids[0] == found.bos_token_id) == bos


@pytest.mark.slow
def test_gguf_needs_no_torch(smollm2_path):
    """The demo installs no torch: nothing on the way from a GGUF file to parameters may want it."""
    code = (
        "import sys; sys.modules['torch'] = None; sys.modules['accelerate'] = None\n"
        "import allmem_jax\n"
        f"config, params, tokenizer = allmem_jax.load_pretrained({str(smollm2_path)!r}, window=128, chunk=64)\n"
        "text = 'Hello world, it is 12345.\\n\\n  def f(x):'\n"
        "assert tokenizer.decode(tokenizer(text).input_ids) == text\n"
        "assert '<|im_start|>user' in tokenizer.apply_chat_template([{'role': 'user', 'content': 'a'}], tokenize=False)"
    )
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300, cwd=root)


@pytest.mark.slow
def test_smollm2_gguf_against_transformers(smollm2_path):
    pytest.importorskip("accelerate")
    config, params, tokenizer = allmem_jax.load_pretrained(smollm2_path)
    assert families.differing_fields(config, config_lib.preset("smollm2-135m")) == []
    # Real text; without digits, before which transformers' reading of this vocabulary cuts spaces otherwise than
    # llama.cpp and the model's own tokenizer do.
    text = "".join(c for c in (pathlib.Path(__file__).parents[1] / "LICENSE").read_text() if not c.isdigit())
    ids = np.array([tokenizer(text).input_ids[:512]])
    teacher = lm.AllMemLM(config.replace(mixer="full"))
    found = np.asarray(jax.jit(lambda params: teacher.apply({"params": params}, ids.astype(np.int32)))(params))
    options = dict(gguf_file=smollm2_path.name, local_files_only=True)
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2_path.parent, **options)
    net = transformers.AutoModelForCausalLM.from_pretrained(smollm2_path.parent, dtype=torch.float32, **options).eval()
    with torch.no_grad():
        wanted = net(torch.tensor(ids)).logits.numpy()
    assert ids.shape == (1, 512) and distance(found, wanted) < 1e-4
    assert tokenizer(text).input_ids == theirs(text).input_ids
    assert tokenizer.chat_template == theirs.chat_template
    assert [tokenizer.decode(token) for token in tokenizer("at\n\n  12").input_ids] == ["at", "\n\n  ", "1", "2"]

"""Configs of folders and headers of GGUF files: what is honoured, what is refused, and what warns."""

import json
import math
import warnings

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from allmem_jax.checkpoints import ends, gguf_config, hf_config
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.model import config as config_lib

SIZES = dict(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    rms_norm_eps=1e-5,
)
COMMON = dict(
    SIZES,
    architectures=["ForCausalLM"],
    attention_dropout=0.0,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    initializer_range=0.02,
    use_cache=True,
    torch_dtype="bfloat16",
    transformers_version="4.48.0",
    rope_theta=10000.0,
    tie_word_embeddings=True,
    _name_or_path="x",
)
LLAMA3 = dict(
    rope_type="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
# As the published files of these models are, sizes aside.
PUBLISHED = {
    "llama-3.2": dict(
        COMMON,
        model_type="llama",
        attention_bias=False,
        eos_token_id=[1, 8, 9],
        hidden_act="silu",
        mlp_bias=False,
        pretraining_tp=1,
        rope_scaling=LLAMA3,
    ),
    "smollm2": dict(
        COMMON,
        model_type="llama",
        attention_bias=False,
        hidden_act="silu",
        is_llama_config=True,
        mlp_bias=False,
        pretraining_tp=1,
        rope_interleaved=False,
        rope_scaling=None,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    ),
    "vicuna": dict(
        COMMON,
        model_type="llama",
        hidden_act="silu",
        max_sequence_length=2048,
        pad_token_id=0,
        rope_scaling={"type": "linear", "factor": 2},
    ),
    "mistral": dict(COMMON, model_type="mistral", hidden_act="silu", sliding_window=None),
    "qwen2.5": dict(
        COMMON,
        model_type="qwen2",
        hidden_act="silu",
        max_window_layers=21,
        sliding_window=32768,
        use_sliding_window=False,
        use_mrope=False,
    ),
    "qwen3": dict(
        COMMON,
        model_type="qwen3",
        attention_bias=False,
        hidden_act="silu",
        max_window_layers=28,
        rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        sliding_window=None,
        use_sliding_window=False,
    ),
    "gemma-3-270m": dict(
        COMMON,
        model_type="gemma3_text",
        attention_bias=False,
        attn_logit_softcapping=None,
        cache_implementation="hybrid",
        final_logit_softcapping=None,
        sliding_window=5,
        hidden_activation="gelu_pytorch_tanh",
        query_pre_attn_scalar=16,
        rope_scaling=None,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_local_base_freq=10000.0,
        use_bidirectional_attention=False,
        _sliding_window_pattern=6,
    ),
    "gemma-3-4b": dict(
        model_type="gemma3",
        architectures=["Gemma3ForConditionalGeneration"],
        boi_token_index=255999,
        eoi_token_index=256000,
        eos_token_id=[1, 106],
        image_token_index=262144,
        initializer_range=0.02,
        mm_tokens_per_image=256,
        torch_dtype="bfloat16",
        text_config=dict(
            SIZES, model_type="gemma3_text", sliding_window=5, rope_scaling={"rope_type": "linear", "factor": 8.0}
        ),
        vision_config={"hidden_size": 8, "model_type": "siglip_vision_model"},
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read_in_silence(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = hf_config.from_hf(PUBLISHED[name])
    assert (config.d_model, config.n_layers, config.n_heads, config.head_dim) == (32, 3, 4, 16)


@pytest.mark.parametrize("family", config_lib.FAMILIES)
def test_what_transformers_writes_is_read_in_silence(family):
    transformers = pytest.importorskip("transformers")
    raw = transformers.AutoConfig.for_model(family).to_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = hf_config.from_hf(json.loads(json.dumps(raw)))
    assert config.d_model == raw["hidden_size"] and config.rope_scaling is None


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(rope_interleaved=True), "rope_interleaved=True is not supported"),
        (dict(attention_multiplier=0.5), "attention_multiplier=0.5 is not supported; only 1.0"),
        (dict(residual_multiplier=0.22), "residual_multiplier=0.22"),
        (dict(logit_scale=2.0), "logit_scale=2.0"),
        (dict(no_rope_layers=[1, 0, 1]), "no_rope_layers"),
        (dict(num_local_experts=8), "num_local_experts=8"),
        (dict(rope_scaling=dict(type="linear", factor=2.0, mrope_section=[1])), "mrope_section"),
        (dict(rope_scaling=dict(type="yarn", factor=2.0, attn_factor=0.5)), "attn_factor=0.5"),
        (
            dict(rope_scaling=dict(type="llama3", factor=2.0, low_freq_factor=4, high_freq_factor=4)),
            "high_freq_factor=4",
        ),
        (dict(rope_scaling=dict(type="llama3", factor=2.0)), "lacks 'low_freq_factor', 'high_freq_factor'"),
        (dict(quantization_config="int8"), "quantization_config='int8' must be an object"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps=nan must be a positive number"),
        (dict(hidden_size=10**400), "hidden_size=.* must be a whole number"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings='no' must be true or false"),
        (dict(layer_types=[["a"]], model_type="gemma3_text"), "layer_types=.* must be a list of texts"),
        (dict(architectures=7, model_type=3), "model_type=3 must be a text"),
    ],
)
def test_what_would_change_the_numbers_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        hf_config.from_hf(PUBLISHED["smollm2"] | changes)
    neutral = dict(attention_multiplier=1.0, logit_scale=None, no_rope_layers=[], rope_interleaved=False)
    hf_config.from_hf(PUBLISHED["smollm2"] | neutral)


def test_a_quantised_multimodal_model_is_refused():
    with pytest.raises(ValueError, match="quantised with 'bitsandbytes'"):
        hf_config.from_hf(PUBLISHED["gemma-3-4b"] | {"quantization_config": {"quant_method": "bitsandbytes"}})


def test_unknown_fields_are_one_warning():
    raw = PUBLISHED["llama-3.2"] | {"frobnicate": 3, "rope_scaling": LLAMA3 | {"twist": 1}}
    with pytest.warns(UserWarning, match="play no part: 'frobnicate', 'rope_scaling.twist'") as found:
        hf_config.from_hf(raw)
    assert len(found) == 1


def test_length_of_pretraining_may_stand_above_the_rotary_fields():
    raw = PUBLISHED["qwen3"] | {"original_max_position_embeddings": 32}
    assert hf_config.from_hf(raw).rope_scaling.original_length == 32


ODD = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats()
    | strategies.sampled_from(["", "4", "silu", "yarn", "full_attention", 0, -1, 10**400, 2**31, math.nan, math.inf])
    | strategies.text(max_size=3),
    lambda inner: (
        strategies.lists(inner, max_size=3)
        | strategies.dictionaries(strategies.sampled_from(["type", "factor", "full_attention", "x"]), inner, max_size=3)
    ),
    max_leaves=4,
)
DAMAGE = hypothesis.settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)


def damaged(data, good: dict) -> dict:
    """`good` with one to three of its fields, or of those of an object in it, dropped or set to something odd."""
    bad = json.loads(json.dumps(good))
    for _ in range(data.draw(strategies.integers(1, 3))):
        within = data.draw(strategies.sampled_from([bad, *(v for v in bad.values() if isinstance(v, dict) and v)]))
        key = data.draw(strategies.sampled_from(sorted(within) or ["model_type"]))
        if data.draw(strategies.booleans()):
            within[key] = data.draw(ODD)
        else:
            within.pop(key, None)
    return bad


def works_or_says(read) -> None:
    """One line of an error, or none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            read()
        except ValueError as error:
            assert str(error) and "\n" not in str(error)


@DAMAGE
@hypothesis.given(data=strategies.data(), name=strategies.sampled_from(sorted(PUBLISHED)))
def test_damaged_configs_are_one_line(data, name):
    bad = damaged(data, PUBLISHED[name])
    works_or_says(lambda: hf_config.from_hf(bad))


def test_an_odd_value_in_every_field_is_one_line():
    odd = [None, "4", 0, -1, 10**400, True, 1.5, math.nan, [], [None], {}, {"factor": "2"}, {"rope_type": []}]
    for good in PUBLISHED.values():
        for key in good:
            for value in odd:
                works_or_says(lambda good=good, key=key, value=value: hf_config.from_hf(good | {key: value}))


@DAMAGE
@hypothesis.given(data=strategies.data())
def test_damaged_files_of_a_folder_are_one_line(data, tmp_path):
    """Weights are not reached: the folder has none."""
    ours = json.loads(hf_config.from_hf(PUBLISHED["smollm2"]).to_json())
    files = {
        "config.json": PUBLISHED["smollm2"],
        "allmem_config.json": ours,
        "generation_config.json": {"eos_token_id": [1, 2], "temperature": 0.6},
    }
    which = data.draw(strategies.sampled_from(sorted(files)))
    for name, good in files.items():
        bad = data.draw(ODD) if data.draw(strategies.integers(0, 9)) == 0 else damaged(data, good)
        content = json.dumps(bad if name == which else good).encode()
        if name == which:
            content = data.draw(strategies.sampled_from([b"", b"\xef\xbb\xbf"])) + content
            content = content[: data.draw(strategies.sampled_from([len(content)] * 5 + [0, 1, len(content) // 2]))]
        (tmp_path / name).write_bytes(content)
    works_or_says(lambda: load_lib.read_config(tmp_path))


@pytest.mark.parametrize("name", ["config.json", "allmem_config.json", "generation_config.json"])
def test_what_is_not_json_names_its_file(name, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["smollm2"]))
    for content in (b"\xff\xfe{", b"[" * 100_000, b"[]", b"{", b'"\xc3"'):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name) as error:
            load_lib.read_config(tmp_path)
        assert "\n" not in str(error.value)
    good = PUBLISHED["smollm2"] if name == "config.json" else {"eos_token_id": 5}
    if name == "allmem_config.json":
        good = json.loads(hf_config.from_hf(PUBLISHED["smollm2"]).to_json())
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + json.dumps(good).encode())
    assert load_lib.read_config(tmp_path).d_model == 32


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(wheels=4), r"unknown fields \['wheels'\]; a newer version"),
        (dict(window="128"), "window='128' is of another type"),
        (dict(write=1), "write=1 is of another type"),
        (dict(rope_scaling=[1]), "tuple in place of an object|list in place of an object"),
        (dict(rope_scaling={"kind": "yarn"}), "it lacks factor"),
        (dict(eos_tokens=[True]), r"eos_tokens=\(True,\) is of another type"),
        (dict(norm_eps=math.nan), "norm_eps=nan"),
        (dict(n_heads=None), "n_heads=None"),
    ],
)
def test_our_own_config_is_checked(changes, message):
    good = json.loads(hf_config.from_hf(PUBLISHED["smollm2"]).to_json())
    with pytest.raises(ValueError, match=message):
        config_lib.ModelConfig.from_json(json.dumps(good | changes))


HEADER = {
    "general.architecture": "llama",
    **{
        f"llama.{key}": value
        for key, value in {
            "context_length": 256,
            "embedding_length": 32,
            "block_count": 2,
            "feed_forward_length": 48,
            "attention.head_count": 2,
            "attention.head_count_kv": 1,
            "attention.key_length": 16,
            "attention.value_length": 16,
            "rope.dimension_count": 16,
            "rope.freq_base": 10000.0,
            "attention.layer_norm_rms_epsilon": 1e-5,
            "vocab_size": 60,
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 64,
            "rope.scaling.finetuned": True,
        }.items()
    },
}
SHAPES = {"token_embd.weight": (60, 32), "output.weight": (60, 32)}


def scaling(**keys) -> config_lib.RopeScaling | None:
    named = {f"llama.rope.scaling.{key}": value for key, value in keys.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gguf_config.from_gguf(HEADER | named, SHAPES).rope_scaling


def test_yarn_of_a_gguf_header():
    yarn = config_lib.RopeScaling("yarn", 4.0, 64)
    assert scaling() == scaling(yarn_ext_factor=1.0, yarn_attn_factor=1.0, yarn_log_multiplier=0.0) == yarn
    found = scaling(yarn_beta_fast=np.float32(4.0).item(), yarn_beta_slow=np.float32(0.1).item())
    assert (found.beta_fast, found.beta_slow) == (4.0, 0.1)
    assert scaling(yarn_log_multiplier=1.0).attention_factor == 1.0  # Mistral's: the factor is taken back
    assert scaling(attn_factor=0.5).attention_factor == pytest.approx(0.5 * (0.1 * math.log(4) + 1))
    base = {key: value for key, value in HEADER.items() if "scaling" not in key}
    linear = gguf_config.from_gguf(base | {"llama.rope.scale_linear": 2.0}, SHAPES).rope_scaling
    assert linear == config_lib.RopeScaling("linear", 2.0)


@pytest.mark.parametrize(
    "key, value",
    [
        ("rope.scaling.yarn_ext_factor", 0.0),
        ("rope.scaling.yarn_ext_factor", 0.5),
        ("rope.scaling.yarn_attn_factor", 0.5),
        ("rope.scaling.alpha", 1000.0),
        ("rope.dimension_sections", [8, 4, 4, 0]),
        ("rope.dimension_count", 8),
        ("rope.dimension_count_swa", 8),
        ("attention.value_length", 8),
        ("attention.scale", 0.5),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.causal", False),
        ("attention.temperature_scale", 0.1),
        ("attention.shared_kv_layers", 3),
        ("attention.sliding_window_pattern", [True, False]),
        ("expert_count", 8),
        ("logit_scale", 2.0),
        ("residual_scale", 0.5),
        ("final_logit_softcapping", 30.0),
        ("rope.scaling.yarn_beta_fast", "32"),
        ("rope.freq_base", -1.0),
        ("context_length", 2.5),
        ("attention.head_count", "2"),
        ("feed_forward_length", []),
    ],
)
def test_gguf_keys_that_are_not_honoured_are_named(key, value):
    more = {"llama.attention.sliding_window": 7} if key.endswith("pattern") else {}
    with pytest.raises(ValueError, match=f"llama.{key}="):
        gguf_config.from_gguf(HEADER | {f"llama.{key}": value} | more, SHAPES)


def test_gguf_keys_that_say_nothing_and_unknown_ones():
    plain = gguf_config.from_gguf(HEADER, SHAPES)
    silent = {
        "expert_count": 0,
        "attention.scale": 0.25,
        "attention.causal": True,
        "attention.clamp_kqv": 0.0,
        "logit_scale": 1.0,
        "rope.dimension_count_swa": 16,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gguf_config.from_gguf(HEADER | {f"llama.{k}": v for k, v in silent.items()}, SHAPES) == plain
    with pytest.warns(UserWarning, match="play no part: 'llama.attention.wobble', 'llama.wheels'"):
        gguf_config.from_gguf(HEADER | {"llama.wheels": 4, "llama.attention.wobble": 1.0}, SHAPES)


def test_which_layers_of_gemma_are_local_may_stand_in_the_header():
    header = {key.replace("llama.", "gemma3."): value for key, value in HEADER.items() if "scaling" not in key}
    header |= {"general.architecture": "gemma3", "gemma3.attention.sliding_window": 7, "gemma3.block_count": 7}
    pattern = "gemma3.attention.sliding_window_pattern"

    def layers(value):
        return gguf_config.from_gguf(header | {pattern: value}, SHAPES).local_layers

    assert gguf_config.from_gguf(header, SHAPES).local_layers == (True,) * 5 + (False, True) == layers(6)
    assert layers(2) == (True, False) * 3 + (True,)
    flags = np.array([True, False, False, True, True, False, True])
    assert layers(flags) == tuple(flags)


@DAMAGE
@hypothesis.given(data=strategies.data())
def test_damaged_gguf_metadata_is_one_line(data):
    odd = ODD | strategies.sampled_from([np.arange(3), np.zeros(0, np.int32), np.array([1.5]), ["a"], b""])
    bad = dict(HEADER) | {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.model": "gpt2"}
    for key in data.draw(strategies.lists(strategies.sampled_from(sorted(bad)), min_size=1, max_size=3)):
        bad[key] = data.draw(odd)
    works_or_says(lambda: gguf_config.from_gguf(bad, SHAPES))
    works_or_says(lambda: ends.gather(ends.of_gguf(bad), 60))


VOCABULARY = {
    f"tokenizer.ggml.{key}": value
    for key, value in {
        "model": "llama",
        "tokens": ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"],
        "scores": np.array([0, 0, 0, -1, -2, -3], np.float32),
        "token_type": np.array([2, 3, 3, 1, 1, 1]),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "pre": "default",
        "add_eos_token": True,
    }.items()
} | {"tokenizer.chat_template": "{{ messages }}"}


@DAMAGE
@hypothesis.given(data=strategies.data())
def test_damaged_gguf_vocabularies_are_one_line(data, tmp_path):
    odd = ODD | strategies.sampled_from([np.arange(3), np.array([1.5]), ["a", "a"], [1], 99])
    bad = dict(VOCABULARY)
    for key in data.draw(strategies.lists(strategies.sampled_from(sorted(bad)), max_size=2)):
        bad[key] = data.draw(odd)
    file = tokenizer_lib.gguf_reader.GGUFFile(tmp_path / "x.gguf", bad, {})
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "x.gguf").touch()
        patch.setattr(tokenizer_lib.gguf_reader, "open_gguf", lambda path: file)
        works_or_says(lambda: tokenizer_lib.load_tokenizer(tmp_path / "x.gguf"))


def test_a_gguf_tokenizer_leaves_a_text_open(tmp_path):
    file = tokenizer_lib.gguf_reader.GGUFFile(tmp_path / "x.gguf", VOCABULARY, {})
    assert tokenizer_lib.from_gguf(file).encode("a a") == [1, 5, 5]

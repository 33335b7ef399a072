"""What the supported families call things: tensor names and config fields, in Hugging Face and GGUF files.

A family is a table of rules `(name in the file, path of our parameter, transform)`. In both, `{i}` stands for the
layer and `{p}` for a projection, so a rule is a regular expression in either direction. Paths are those of the
parameter tree joined by "/", with the layers stacked on a leading axis.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from allmem_jax.checkpoints import fields
from allmem_jax.model import config as config_lib


@dataclasses.dataclass(frozen=True)
class Rule:
    """One line of a name table.

    Attributes:
      name: name in the file.
      path: path of the parameter.
      transform: "" none; "transpose" [out, in] to [in, out]; "unpermute" the same, after undoing the order of rows that
        llama.cpp gives rotary heads; "minus_one" for norms that a file stores with 1 added.
    """

    name: str
    path: str
    transform: str = ""


def _rules(*lines: tuple[str, ...]) -> tuple[Rule, ...]:
    return tuple(Rule(*line) for line in lines)


_HF = _rules(
    ("model.embed_tokens.weight", "embed/embedding"),
    ("model.layers.{i}.input_layernorm.weight", "layers/input_norm/scale"),
    ("model.layers.{i}.self_attn.{p}_proj.weight", "layers/attention/{p}_proj/kernel", "transpose"),
    ("model.layers.{i}.self_attn.{p}_proj.bias", "layers/attention/{p}_proj/bias"),
    ("model.layers.{i}.self_attn.{p}_norm.weight", "layers/attention/{p}_norm/scale"),
    ("model.layers.{i}.mlp.{p}_proj.weight", "layers/mlp/{p}_proj/kernel", "transpose"),
    ("model.layers.{i}.mlp.{p}_proj.bias", "layers/mlp/{p}_proj/bias"),
    ("model.norm.weight", "final_norm/scale"),
    ("lm_head.weight", "lm_head/kernel", "transpose"),
)
_HF_LLAMA = _HF + _rules(("model.layers.{i}.post_attention_layernorm.weight", "layers/mlp_norm/scale"))
_HF_GEMMA = _HF + _rules(
    ("model.layers.{i}.post_attention_layernorm.weight", "layers/post_attention_norm/scale"),
    ("model.layers.{i}.pre_feedforward_layernorm.weight", "layers/mlp_norm/scale"),
    ("model.layers.{i}.post_feedforward_layernorm.weight", "layers/post_mlp_norm/scale"),
)


def _gguf_rules(rotary: str, norm: str) -> tuple[Rule, ...]:
    """Names of llama.cpp, with the transform of queries and keys, and that of the norms."""
    return _rules(
        ("token_embd.weight", "embed/embedding"),
        ("blk.{i}.attn_norm.weight", "layers/input_norm/scale", norm),
        *((f"blk.{{i}}.attn_{p}.weight", f"layers/attention/{p}_proj/kernel", rotary) for p in "qk"),
        *((f"blk.{{i}}.attn_{p}.bias", f"layers/attention/{p}_proj/bias", rotary) for p in "qk"),
        ("blk.{i}.attn_v.weight", "layers/attention/v_proj/kernel", "transpose"),
        ("blk.{i}.attn_v.bias", "layers/attention/v_proj/bias"),
        ("blk.{i}.attn_output.weight", "layers/attention/o_proj/kernel", "transpose"),
        ("blk.{i}.attn_output.bias", "layers/attention/o_proj/bias"),
        ("blk.{i}.attn_{p}_norm.weight", "layers/attention/{p}_norm/scale", norm),
        ("blk.{i}.post_attention_norm.weight", "layers/post_attention_norm/scale", norm),
        ("blk.{i}.ffn_norm.weight", "layers/mlp_norm/scale", norm),
        ("blk.{i}.post_ffw_norm.weight", "layers/post_mlp_norm/scale", norm),
        ("blk.{i}.ffn_{p}.weight", "layers/mlp/{p}_proj/kernel", "transpose"),
        ("blk.{i}.ffn_{p}.bias", "layers/mlp/{p}_proj/bias"),
        ("output_norm.weight", "final_norm/scale", norm),
        ("output.weight", "lm_head/kernel", "transpose"),
    )


HF_RULES = {
    "llama": _HF_LLAMA,
    "mistral": _HF_LLAMA,
    "qwen2": _HF_LLAMA,
    "qwen3": _HF_LLAMA,
    "gemma3_text": _HF_GEMMA,
}
GGUF_RULES = {
    "llama": _gguf_rules("unpermute", ""),
    "mistral": _gguf_rules("unpermute", ""),
    "qwen2": _gguf_rules("transpose", ""),
    "qwen3": _gguf_rules("transpose", ""),
    "gemma3_text": _gguf_rules("transpose", "minus_one"),
}
# Tensors that belong to no parameter: rotary tables that old files hold, and the vision half of multimodal Gemma 3.
IGNORED = re.compile(
    r"(model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|rope_freqs\.weight"
    r"|(model\.)?(vision_tower|multi_modal_projector)\..*)"
)
# Multimodal checkpoints put the language model one level down; both orders of the two words are in use.
_NESTED = re.compile(r"(model\.language_model|language_model\.model)\.|language_model\.(?=lm_head)")


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    escaped = re.escape(template)
    escaped = escaped.replace(r"\{i\}", r"(?P<i>0|[1-9]\d*)").replace(r"\{p\}", "(?P<p>q|k|v|o|gate|up|down)")
    return re.compile(escaped)


def to_path(rules: tuple[Rule, ...], name: str) -> tuple[str, int | None, str] | None:
    """Path, layer (None outside the layers) and transform of the tensor called `name`; None when no rule knows it."""
    name = _NESTED.sub(lambda match: "model." if match.group(1) else "", name, count=1)
    for rule in rules:
        match = _pattern(rule.name).fullmatch(name)
        if match:
            found = match.groupdict()
            layer = int(found["i"]) if "i" in found else None
            return rule.path.format(p=found.get("p")), layer, rule.transform
    return None


def to_name(rules: tuple[Rule, ...], path: str, layer: int | None) -> tuple[str, str]:
    """Name and transform of one parameter in a file; KeyError when no rule knows the path."""
    for rule in rules:
        match = _pattern(rule.path).fullmatch(path)
        if match:
            return rule.name.format(i=layer, p=match.groupdict().get("p")), rule.transform
    raise KeyError(path)


def to_param(array: np.ndarray, transform: str, head_dim: int) -> np.ndarray:
    """One tensor as the parameter stores it (one layer of it)."""
    if transform == "unpermute":
        pairs = array.reshape(-1, head_dim // 2, 2, *array.shape[1:])
        return pairs.swapaxes(1, 2).reshape(array.shape).T
    if transform == "minus_one":
        return array - np.ones((), array.dtype)
    return array.T if transform == "transpose" else array


def param_shapes(config: config_lib.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Path and shape of every parameter of the backbone."""
    d, n_layers, head_dim = config.d_model, config.n_layers, config.head_dim
    heads, kv_heads = config.n_heads * head_dim, config.n_kv_heads * head_dim
    linear = {
        "attention/q_proj": (d, heads, config.qkv_bias),
        "attention/k_proj": (d, kv_heads, config.qkv_bias),
        "attention/v_proj": (d, kv_heads, config.qkv_bias),
        "attention/o_proj": (heads, d, config.o_bias),
        "mlp/gate_proj": (d, config.d_ff, config.mlp_bias),
        "mlp/up_proj": (d, config.d_ff, config.mlp_bias),
        "mlp/down_proj": (config.d_ff, d, config.mlp_bias),
    }
    norms = {"input_norm": d, "mlp_norm": d}
    if config.sandwich_norms:
        norms |= {"post_attention_norm": d, "post_mlp_norm": d}
    if config.qk_norm:
        norms |= {"attention/q_norm": head_dim, "attention/k_norm": head_dim}
    shapes: dict[str, tuple[int, ...]] = {"embed/embedding": (config.vocab_size, d), "final_norm/scale": (d,)}
    shapes |= {f"layers/{name}/scale": (n_layers, size) for name, size in norms.items()}
    for name, (n_in, n_out, bias) in linear.items():
        shapes[f"layers/{name}/kernel"] = (n_layers, n_in, n_out)
        if bias:
            shapes[f"layers/{name}/bias"] = (n_layers, n_out)
    if not config.tie_embeddings:
        shapes["lm_head/kernel"] = (d, config.vocab_size)
    return shapes


_MOST_LAYERS = 10_000  # more is taken for damage, before anything is sized by it
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
# Defaults of the Hugging Face config classes, for the fields that published files leave out.
_LLAMA_DEFAULTS = dict(rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, max_position_embeddings=2048)
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA_DEFAULTS,
    "mistral": _LLAMA_DEFAULTS | dict(sliding_window=4096, max_position_embeddings=131072, num_key_value_heads=8),
    "qwen2": _LLAMA_DEFAULTS | dict(sliding_window=4096, max_window_layers=28, max_position_embeddings=32768),
    "qwen3": _LLAMA_DEFAULTS
    | dict(sliding_window=4096, max_window_layers=28, max_position_embeddings=32768, head_dim=128),
    "gemma3_text": dict(
        rms_norm_eps=1e-6,
        hidden_activation="gelu_pytorch_tanh",
        tie_word_embeddings=True,
        head_dim=256,
        max_position_embeddings=131072,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=262208,
        sliding_window=4096,
        sliding_window_pattern=6,
        query_pre_attn_scalar=256,
        rope_theta=1e6,
        rope_local_base_freq=10_000.0,
    ),
}


def config_from_hf(raw: Mapping[str, Any]) -> config_lib.ModelConfig:
    """Translates the contents of a Hugging Face `config.json`.

    Raises:
      ValueError: the architecture, or something in the config, is not supported; the message names it.
    """
    fields.check_hf(raw)
    if raw.get("model_type") == "gemma3":
        above = {key: raw[key] for key in ("tie_word_embeddings", "quantization_config") if raw.get(key) is not None}
        raw = {**(raw.get("text_config") or {}), **above, "model_type": "gemma3_text"}
        fields.check_hf(raw)
    family = raw.get("model_type")
    if family not in config_lib.FAMILIES:
        named = raw.get("architectures")
        name = named[0] if isinstance(named, list) and named else family
        supported = ", ".join(config_lib.FAMILIES)
        raise ValueError(
            f"architecture {fields.shown(name)} (model_type {family!r}) is not supported; supported: {supported}"
        )
    raw = _HF_DEFAULTS[family] | {
        key: value for key, value in raw.items() if value is not None or key == "sliding_window"
    }
    _check_sizes(raw)
    gemma = family == "gemma3_text"
    act = raw["hidden_activation" if gemma else "hidden_act"]
    if act not in _ACTIVATIONS:
        raise ValueError(f"hidden_act={fields.shown(act)} is not supported; supported: {', '.join(_ACTIVATIONS)}")
    bias = bool(raw.get("attention_bias", False)) and family != "mistral"
    n_heads, n_layers = raw["num_attention_heads"], raw["num_hidden_layers"]
    n_kv_heads = raw.get("num_key_value_heads", n_heads)
    theta, scaling, local_theta = _rope_from_hf(raw)
    local_layers = _local_layers(raw, family)
    return config_lib.ModelConfig(
        family=family,
        vocab_size=raw["vocab_size"],
        d_model=raw["hidden_size"],
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=_head_dim(raw),
        d_ff=raw["intermediate_size"],
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=raw["rms_norm_eps"],
        tie_embeddings=bool(raw["tie_word_embeddings"]),
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        activation=_ACTIVATIONS[act],
        sandwich_norms=gemma,
        norm_offset=1.0 if gemma else 0.0,
        embed_scale=raw["hidden_size"] ** 0.5 if gemma else 1.0,
        query_scale=raw["query_pre_attn_scalar"] ** -0.5 if gemma else None,
        local_layers=local_layers,
        local_window=raw["sliding_window"] if any(local_layers) else None,
        local_rope_theta=local_theta if gemma else None,
        max_length=raw["max_position_embeddings"],
        n_mem=config_lib.default_n_mem(n_kv_heads),
    )


def _check_sizes(raw: Mapping[str, Any]) -> None:
    wanted = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if bad := [f"{key}={raw.get(key)!r}" for key in wanted if not raw.get(key)]:
        raise ValueError(f"config needs whole numbers, 1 or more, in {', '.join(bad)}")
    if raw["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={raw['num_hidden_layers']} is beyond {_MOST_LAYERS}; is the file damaged?")
    if raw.get("sliding_window_pattern") == 0:
        raise ValueError("sliding_window_pattern=0 must be 1 or more")


def _head_dim(raw: Mapping[str, Any]) -> int:
    if "head_dim" in raw:
        return raw["head_dim"]
    if raw["hidden_size"] % raw["num_attention_heads"]:
        raise ValueError(
            f"hidden_size={raw['hidden_size']} does not divide by num_attention_heads={raw['num_attention_heads']} "
            "and config.json gives no head_dim"
        )
    return raw["hidden_size"] // raw["num_attention_heads"]


def _local_layers(raw: Mapping[str, Any], family: str) -> tuple[bool, ...]:
    """Which layers of the pretrained model attend within `sliding_window`; () when none does."""
    n_layers, window = raw["num_hidden_layers"], raw.get("sliding_window")
    types = raw.get("layer_types")
    if family == "llama":
        return ()
    if family == "mistral":
        local = (window is not None,) * n_layers
    elif family != "gemma3_text" and not (raw.get("use_sliding_window") and window is not None):
        local = ()
    elif types is not None:
        if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
            raise ValueError(
                f"layer_types {fields.shown(unknown)} are not supported; supported: full_attention, sliding_attention"
            )
        local = tuple(kind == "sliding_attention" for kind in types)
    elif family == "gemma3_text":
        local = tuple((layer + 1) % raw["sliding_window_pattern"] != 0 for layer in range(n_layers))
    else:
        local = tuple(layer >= raw["max_window_layers"] for layer in range(n_layers))
    return local if any(local) else ()


def _rope_from_hf(raw: Mapping[str, Any]) -> tuple[float, config_lib.RopeScaling | None, float | None]:
    """Base and scaling of the global layers, and base of the local ones (Gemma).

    Transformers 5 writes `rope_parameters`, for Gemma one per layer type; before, it was `rope_theta`, `rope_scaling`
    and `rope_local_base_freq`.
    """
    rope = raw.get("rope_parameters") or {}
    local = rope.get("sliding_attention") or {}
    rope = (raw.get("rope_scaling") or {}) | (rope.get("full_attention") or rope)
    kind = local.get("rope_type") or local.get("type") or "default"
    if kind != "default":
        raise ValueError(f"rope_type={fields.shown(kind)} of the sliding_attention layers is not supported")
    theta = float(rope.get("rope_theta") or raw.get("rope_theta", 10_000.0))
    local_theta = local.get("rope_theta") or raw.get("rope_local_base_freq")
    if not theta > 1:
        raise ValueError(f"rope_theta={theta} must be above 1")
    rope = {key: value for key, value in rope.items() if value is not None}
    if raw.get("original_max_position_embeddings"):
        rope["original_max_position_embeddings"] = raw["original_max_position_embeddings"]
    scaling = _scaling_from_hf(rope, raw["max_position_embeddings"])
    return theta, scaling, None if local_theta is None else float(local_theta)


def _scaling_from_hf(rope: Mapping[str, Any], max_length: int) -> config_lib.RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"rope_type={fields.shown(kind)} is not supported; supported: default, linear, llama3, yarn")
    if kind == "default":
        return None
    wanted = {"linear": ("factor",), "llama3": ("factor", "low_freq_factor", "high_freq_factor"), "yarn": ()}[kind]
    if missing := [name for name in wanted if name not in rope]:
        raise ValueError(f"rope_type={kind!r} lacks {', '.join(map(repr, missing))}")
    original = rope.get("original_max_position_embeddings") or max_length
    factor = float(rope.get("factor") or max_length / original)
    if kind == "linear":
        return config_lib.RopeScaling(kind, factor)
    if kind == "llama3":
        low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
        return config_lib.RopeScaling(kind, factor, original, low, high)
    if rope.get("truncate", True) is not True:
        raise ValueError("rope_type='yarn' with truncate=false is not supported")
    attention = rope.get("attention_factor")
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if attention is None and mscale and mscale_all:
        attention = _yarn_factor(factor, mscale) / _yarn_factor(factor, mscale_all)
    return config_lib.RopeScaling(
        kind,
        factor,
        original,
        beta_fast=float(rope.get("beta_fast") or 32),
        beta_slow=float(rope.get("beta_slow") or 1),
        attention_factor=None if attention is None else float(attention),
    )


def _yarn_factor(factor: float, scale: float = 1.0) -> float:
    """What yarn multiplies cos and sin with (arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def config_to_hf(config: config_lib.ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` for the backbone, in the form that transformers 4 and 5 both read.

    Raises:
      ValueError: the config has something that its family's Hugging Face class has not.
    """
    raw: dict[str, Any] = {
        "architectures": [_HF_CLASSES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "hidden_act": next(hf for hf, ours in _ACTIVATIONS.items() if ours == config.activation),
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "max_position_embeddings": config.max_length,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
    }
    if config.family == "llama":
        raw["mlp_bias"] = config.mlp_bias
    else:
        raw["sliding_window"] = config.local_window
    if config.family in ("qwen2", "qwen3"):
        raw["use_sliding_window"] = any(config.local_layers)
    if config.family != "llama" and config.family != "mistral":
        layers = config.local_layers or (False,) * config.n_layers
        raw["layer_types"] = ["sliding_attention" if local else "full_attention" for local in layers]
    if config.family == "gemma3_text":
        raw["hidden_activation"] = raw.pop("hidden_act")
        raw["query_pre_attn_scalar"] = round((config.query_scale or config.head_dim**-0.5) ** -2)
        raw["rope_local_base_freq"] = config.local_rope_theta
    if lost := differing_fields(config, config_from_hf(raw)):
        raise ValueError(f"{_HF_CLASSES[config.family]} cannot express {', '.join(lost)} of this config")
    return raw


def _scaling_to_hf(scaling: config_lib.RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    raw: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind != "linear":
        raw["original_max_position_embeddings"] = scaling.original_length
    if scaling.kind == "llama3":
        raw |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.kind == "yarn":
        raw |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow}
        if scaling.attention_factor is not None:
            raw["attention_factor"] = scaling.attention_factor
    return raw


def differing_fields(one: config_lib.ModelConfig, other: config_lib.ModelConfig) -> list[str]:
    """`field=value (not value)` for each field of the backbone in which two configs differ."""
    names = [field.name for field in dataclasses.fields(config_lib.ModelConfig)]
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names[: names.index("mixer")]]
    return [f"{name}={ours!r} (not {theirs!r})" for name, ours, theirs in pairs if ours != theirs]


_GGUF_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}


def config_from_gguf(
    metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], rope_factors: np.ndarray | None = None
) -> config_lib.ModelConfig:
    """Translates the metadata of a GGUF file.

    Args:
      metadata: keys and values of the header.
      shapes: name and shape of every tensor.
      rope_factors: the tensor `rope_freqs.weight` where the file has it: what each rotary frequency is divided by.

    Raises:
      ValueError: the architecture, or something in the metadata, is not supported.
    """
    arch = metadata.get("general.architecture")
    if not isinstance(arch, str) or arch not in _GGUF_FAMILIES:
        raise ValueError(
            f"architecture {fields.shown(arch)} is not supported; supported in GGUF: {', '.join(_GGUF_FAMILIES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    fields.check_gguf(metadata, arch)
    _check_gguf(arch, get, shapes)
    family = "mistral" if arch == "llama" and get("attention.sliding_window") else _GGUF_FAMILIES[arch]
    n_heads = _uniform(arch, "attention.head_count", get("attention.head_count"))
    raw = {
        "model_type": family,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": get("embedding_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": _uniform(arch, "attention.head_count_kv", get("attention.head_count_kv", n_heads)),
        "head_dim": get("attention.key_length"),
        "intermediate_size": _uniform(arch, "feed_forward_length", get("feed_forward_length")),
        "rms_norm_eps": _decimal(get("attention.layer_norm_rms_epsilon", 1e-6)),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "max_position_embeddings": get("context_length"),
        "rope_theta": _decimal(get("rope.freq_base", 1e6 if arch == "gemma3" else 10_000.0)),
        "rope_local_base_freq": _decimal(get("rope.freq_base_swa", 10_000.0)),
        "rope_scaling": _scaling_from_gguf(arch, get),
        "sliding_window": get("attention.sliding_window"),
    }
    if raw["head_dim"] is None:
        del raw["head_dim"]
        raw["head_dim"] = _head_dim(raw)
    for key in (
        "rope.dimension_count",
        "rope.dimension_count_swa",
        "attention.value_length",
        "attention.key_length_swa",
        "attention.value_length_swa",
    ):
        if get(key, raw["head_dim"]) != raw["head_dim"]:
            raise ValueError(f"{arch}.{key}={get(key)} is not head_dim={raw['head_dim']}")
    if family == "gemma3_text":
        # llama.cpp hard-codes that only the 27B model (62 layers) scales queries by the width of a head as
        # d_model / n_heads.
        raw["query_pre_attn_scalar"] = raw["hidden_size"] // n_heads if get("block_count") == 62 else raw["head_dim"]
    raw |= _pattern_from_gguf(arch, get, family)
    config = config_from_hf(raw)
    scale = get("attention.scale")
    if scale and not math.isclose(scale, config.query_scale or config.head_dim**-0.5, rel_tol=1e-5):
        raise ValueError(f"{arch}.attention.scale={scale} is not supported; only head_dim ** -0.5 is")
    if rope_factors is not None:
        config = config.replace(rope_scaling=_llama3_scaling(config, rope_factors))
    return config.replace(o_bias="blk.0.attn_output.bias" in shapes)


def _pattern_from_gguf(arch: str, get: Callable[..., Any], family: str) -> dict[str, Any]:
    """Which layers are local, as a Hugging Face config says it: every sixth is global where Gemma's file is silent."""
    pattern = get("attention.sliding_window_pattern")
    if family != "gemma3_text":
        if pattern is not None and get("attention.sliding_window"):
            raise ValueError(f"{arch}.attention.sliding_window_pattern={fields.shown(pattern)} is not supported")
        return {}
    if pattern is None or type(pattern) is int:
        return {"sliding_window_pattern": 6 if pattern is None else pattern}
    if np.ndim(pattern) != 1 or np.asarray(pattern).dtype.kind not in "biu":
        raise ValueError(f"{arch}.attention.sliding_window_pattern={fields.shown(pattern)} must be one flag a layer")
    return {"layer_types": ["sliding_attention" if local else "full_attention" for local in np.asarray(pattern)]}


def _check_gguf(arch: str, get: Callable[..., Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    wanted = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count")
    if missing := [f"{arch}.{key}" for key in wanted if get(key) is None]:
        raise ValueError(f"GGUF metadata lacks {', '.join(missing)}")
    if "token_embd.weight" not in shapes:
        raise ValueError("the GGUF file has no tensor 'token_embd.weight'")
    if get("attention.causal") is False:
        raise ValueError(f"{arch}.attention.causal=False is not supported: this is an encoder")


def _uniform(arch: str, key: str, value: Any) -> int:
    """A number that GGUF may give once a layer."""
    numbers = np.atleast_1d(value)
    if numbers.ndim != 1 or numbers.dtype.kind not in "iu" or not numbers.size:
        raise ValueError(f"{arch}.{key}={fields.shown(value)} must be a whole number")
    if (numbers != numbers[0]).any():
        raise ValueError(f"{arch}.{key}={sorted(set(numbers.tolist()))} differs between layers, which is not supported")
    return int(numbers[0])


def _decimal(value: float) -> float:
    """The shortest decimal that rounds to the float32 that GGUF stores, e.g. 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _scaling_from_gguf(arch: str, get: Callable[..., Any]) -> dict[str, Any] | None:
    kind, factor = get("rope.scaling.type"), get("rope.scaling.factor", get("rope.scale_linear"))
    if kind is None and factor:
        kind = "linear"
    times = get("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and times != 1:
        raise ValueError(f"{arch}.rope.scaling.attn_factor={times} is not supported without yarn")
    if kind in (None, "none"):
        return None
    scaling = {"rope_type": kind, "factor": _decimal(factor or 1.0)}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = get("rope.scaling.original_context_length")
        for beta in ("beta_fast", "beta_slow"):
            if get(f"rope.scaling.yarn_{beta}") is not None:
                scaling[beta] = _decimal(get(f"rope.scaling.yarn_{beta}"))
        less = get("rope.scaling.yarn_log_multiplier", 0.0)
        if type(less) not in (int, float) or not 0 <= less < math.inf:
            raise ValueError(f"{arch}.rope.scaling.yarn_log_multiplier={fields.shown(less)} must be a number")
        if less or times != 1:  # llama.cpp's reading of the two, with DeepSeek's name for the first: mscale_all_dim
            base = _yarn_factor(scaling["factor"])
            scaling["attention_factor"] = times * base / _yarn_factor(scaling["factor"], less)
    return scaling


def _llama3_scaling(config: config_lib.ModelConfig, factors: np.ndarray) -> config_lib.RopeScaling | None:
    """Recovers Llama 3's scaling from the factors that llama.cpp derived from it (band 1 to 4, 8192 tokens)."""
    if np.allclose(factors, 1.0):
        return None
    scaling = config_lib.RopeScaling("llama3", float(factors.max()), 8192)
    frequency = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    turns = scaling.original_length * frequency / (2 * math.pi)
    smooth = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    expected = 1 / ((1 - smooth) / scaling.factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise ValueError("rope_freqs.weight is not the Llama 3 scaling of 8192 tokens, the only one that is supported")
    return scaling

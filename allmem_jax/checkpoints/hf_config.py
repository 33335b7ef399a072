"""The config of a Hugging Face folder, `config.json`, as ours and back."""

import math
from collections.abc import Mapping
from typing import Any

from allmem_jax.checkpoints import families, fields
from allmem_jax.model import config as config_lib

_MOST_LAYERS = 10_000  # more is taken for damage, before anything is sized by it
_SAME = {  # fields that differ in their names alone
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "d_ff",
    "rms_norm_eps": "norm_eps",
    "max_position_embeddings": "max_length",
}
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
_SCALING = {  # what a rotary scaling of each kind says, beside its original length; `RopeScaling` has the same names
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor"),
}
# Defaults of the Hugging Face config classes, for the fields that published files leave out.
_LLAMA = dict(rms_norm_eps=1e-6, hidden_act="silu", tie_word_embeddings=False, max_position_embeddings=2048)
_QWEN = _LLAMA | dict(sliding_window=4096, max_window_layers=28, max_position_embeddings=32768)
_HF_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA | dict(sliding_window=4096, max_position_embeddings=131072, num_key_value_heads=8),
    "qwen2": _QWEN,
    "qwen3": _QWEN | dict(head_dim=128),
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


def from_hf(raw: Mapping[str, Any]) -> config_lib.ModelConfig:
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
    raw |= {
        "num_key_value_heads": raw.get("num_key_value_heads", raw["num_attention_heads"]),
        "head_dim": head_dim(raw),
    }
    theta, scaling, local_theta = _rope_from_hf(raw)
    local_layers = _local_layers(raw, family)
    own: dict[str, Any] = {}
    if gemma:
        own = dict(sandwich_norms=True, norm_offset=1.0, local_rope_theta=local_theta)
        own |= dict(embed_scale=raw["hidden_size"] ** 0.5, query_scale=raw["query_pre_attn_scalar"] ** -0.5)
    return config_lib.ModelConfig(
        **{ours: raw[name] for name, ours in _SAME.items()},
        **own,
        family=family,
        rope_theta=theta,
        rope_scaling=scaling,
        tie_embeddings=bool(raw["tie_word_embeddings"]),
        qk_norm=family in ("qwen3", "gemma3_text"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias and family != "qwen2",
        mlp_bias=family == "llama" and bool(raw.get("mlp_bias", False)),
        activation=_ACTIVATIONS[act],
        local_layers=local_layers,
        local_window=raw["sliding_window"] if any(local_layers) else None,
        n_mem=config_lib.default_n_mem(raw["num_key_value_heads"]),
    )


def _check_sizes(raw: Mapping[str, Any]) -> None:
    wanted = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    if bad := [f"{key}={raw.get(key)!r}" for key in wanted if not raw.get(key)]:
        raise ValueError(f"config needs whole numbers, 1 or more, in {', '.join(bad)}")
    if raw["num_hidden_layers"] > _MOST_LAYERS:
        raise ValueError(f"num_hidden_layers={raw['num_hidden_layers']} is beyond {_MOST_LAYERS}; is the file damaged?")
    if raw.get("sliding_window_pattern") == 0:
        raise ValueError("sliding_window_pattern=0 must be 1 or more")


def head_dim(raw: Mapping[str, Any]) -> int:
    """The dimension of an attention head, as a config says it or as it follows from the others."""
    if raw.get("head_dim") is not None:
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
    if kind == "default":
        return None
    if kind not in _SCALING:
        supported = ", ".join(("default", *_SCALING))
        raise ValueError(f"rope_type={fields.shown(kind)} is not supported; supported: {supported}")
    if kind != "yarn" and (missing := [name for name in _SCALING[kind] if name not in rope]):
        raise ValueError(f"rope_type={kind!r} lacks {', '.join(map(repr, missing))}")
    if kind == "yarn" and rope.get("truncate", True) is not True:
        raise ValueError("rope_type='yarn' with truncate=false is not supported")
    original = rope.get("original_max_position_embeddings") or max_length
    given: dict[str, Any] = {name: float(rope[name]) for name in _SCALING[kind] if rope.get(name)}
    factor = given.setdefault("factor", max_length / max(original, 1))
    mscale, mscale_all = rope.get("mscale"), rope.get("mscale_all_dim")
    if kind == "yarn" and "attention_factor" not in given and mscale and mscale_all:
        given["attention_factor"] = yarn_factor(factor, mscale) / yarn_factor(factor, mscale_all)
    if kind != "linear":
        given["original_length"] = original
    return config_lib.RopeScaling(kind, **given)


def yarn_factor(factor: float, scale: float = 1.0) -> float:
    """What yarn multiplies cos and sin with (arXiv 2309.00071, section 3.4)."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


_HF_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3_text": "Gemma3ForCausalLM",
}


def to_hf(config: config_lib.ModelConfig) -> dict[str, Any]:
    """The contents of a `config.json` for the backbone, in the form that transformers 4 and 5 both read.

    Raises:
      ValueError: the config has something that its family's Hugging Face class has not.
    """
    raw: dict[str, Any] = {
        "architectures": [_HF_CLASSES[config.family]],
        "model_type": config.family,
        "hidden_act": next(hf for hf, ours in _ACTIVATIONS.items() if ours == config.activation),
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.qkv_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling_to_hf(config.rope_scaling),
    } | {name: getattr(config, ours) for name, ours in _SAME.items()}
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
    if lost := families.differing_fields(config, from_hf(raw)):
        raise ValueError(f"{_HF_CLASSES[config.family]} cannot express {', '.join(lost)} of this config")
    return raw


def _scaling_to_hf(scaling: config_lib.RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    values = {name: getattr(scaling, name) for name in _SCALING[scaling.kind]}
    if scaling.kind != "linear":
        values["original_max_position_embeddings"] = scaling.original_length
    return {"rope_type": scaling.kind} | {name: value for name, value in values.items() if value is not None}

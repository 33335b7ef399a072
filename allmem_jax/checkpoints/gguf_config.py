"""The config of a GGUF file, from its metadata, by way of what Hugging Face calls the same things."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from allmem_jax.checkpoints import fields, hf_config
from allmem_jax.model import config as config_lib

_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_HEAD_DIMS = (  # keys that may only repeat the dimension of a head
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
)


def from_gguf(
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
    if not isinstance(arch, str) or arch not in _FAMILIES:
        raise ValueError(
            f"architecture {fields.shown(arch)} is not supported; supported in GGUF: {', '.join(_FAMILIES)}"
        )

    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    fields.check_gguf(metadata, arch)
    _check_gguf(arch, get, shapes)
    family = "mistral" if arch == "llama" and get("attention.sliding_window") else _FAMILIES[arch]
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
    raw["head_dim"] = hf_config.head_dim(raw)
    for key in _HEAD_DIMS:
        if get(key, raw["head_dim"]) != raw["head_dim"]:
            raise ValueError(f"{arch}.{key}={get(key)} is not head_dim={raw['head_dim']}")
    if family == "gemma3_text":
        # llama.cpp hard-codes that only the 27B model (62 layers) scales queries by the width of a head as
        # d_model / n_heads.
        raw["query_pre_attn_scalar"] = raw["hidden_size"] // n_heads if get("block_count") == 62 else raw["head_dim"]
    raw |= _pattern_from_gguf(arch, get, family)
    config = hf_config.from_hf(raw)
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
            base = hf_config.yarn_factor(scaling["factor"])
            scaling["attention_factor"] = times * base / hf_config.yarn_factor(scaling["factor"], less)
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

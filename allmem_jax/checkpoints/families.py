"""What the supported families call their tensors, in Hugging Face and GGUF files.

A family is a table of rules `(name in the file, path of our parameter, transform)`. In both, `{i}` stands for the
layer and `{p}` for a projection, so a rule is a regular expression in either direction. Paths are those of the
parameter tree joined by "/", with the layers stacked on a leading axis.
"""

import dataclasses
import functools
import re

import numpy as np

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


HF_RULES = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), _HF_LLAMA) | {"gemma3_text": _HF_GEMMA}
GGUF_RULES = {
    **dict.fromkeys(("llama", "mistral"), _gguf_rules("unpermute", "")),
    **dict.fromkeys(("qwen2", "qwen3"), _gguf_rules("transpose", "")),
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


def differing_fields(one: config_lib.ModelConfig, other: config_lib.ModelConfig) -> list[str]:
    """`field=value (not value)` for each field of the backbone in which two configs differ."""
    names = [field.name for field in dataclasses.fields(config_lib.ModelConfig)]
    pairs = [(name, getattr(one, name), getattr(other, name)) for name in names[: names.index("mixer")]]
    return [f"{name}={ours!r} (not {theirs!r})" for name, ours, theirs in pairs if ours != theirs]

"""The fields of a checkpoint's config: of what type they are, which are refused, and which play no part.

A field that is known to change the arithmetic and is not honoured is an error, unless its value changes nothing; one
that nobody here knows is a warning. `families` reads the ones that are honoured.
"""

import math
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import gguf

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_MOST = 2**31 - 1  # a larger size or id is damage
_WHOLE, _NUMBER, _FLAG, _TEXT = "a whole number", "a positive number", "true or false", "a text"
_TABLE, _TEXTS = "an object", "a list of texts"


def _kinds(names: Mapping[str, str]) -> dict[str, str]:
    """The kind of each field, from the fields of each kind."""
    return {name: kind for kind, listed in names.items() for name in listed.split()}


_HONOURED = _kinds(
    {
        _TEXT: "model_type hidden_act hidden_activation",
        _WHOLE: """
        vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size
        max_position_embeddings original_max_position_embeddings sliding_window max_window_layers
        sliding_window_pattern
    """,
        _NUMBER: "rms_norm_eps rope_theta rope_local_base_freq query_pre_attn_scalar",
        _FLAG: "tie_word_embeddings attention_bias mlp_bias use_sliding_window",
        _TEXTS: "layer_types",
        _TABLE: "rope_scaling rope_parameters text_config quantization_config",
    }
)
_HONOURED_ROPE = _kinds(
    {
        _TEXT: "rope_type type",
        _NUMBER: """
        rope_theta factor low_freq_factor high_freq_factor beta_fast beta_slow attention_factor mscale mscale_all_dim
    """,
        _WHOLE: "original_max_position_embeddings",
        _FLAG: "truncate",
        _TABLE: "full_attention sliding_attention",
    }
)
# Refused unless they say no, or that something is multiplied by one.
_REFUSED = """
    attn_logit_softcapping final_logit_softcapping use_bidirectional_attention rope_interleaved no_rope_layers
    no_rope_layer_interval clip_qkv alibi use_mrope use_qk_norm qk_layernorm num_experts num_local_experts
    n_routed_experts attention_chunk_size attn_temperature_tuning is_encoder_decoder add_cross_attention pruned_heads
    llama_4_scaling mrope_section llama_4_scaling_beta short_factor long_factor scale_attention_by_inverse_layer_idx
""".split()
_REFUSED_FACTORS = """
    partial_rotary_factor attention_multiplier residual_multiplier embedding_multiplier logits_scaling logit_scale
    embedding_scale residual_scale extrapolation_factor attn_factor rotary_pct
""".split()
# What transformers writes beside them, and what published files of these families hold: names, dropout of training,
# how to generate, images of multimodal models, remarks of other programs.
_HARMLESS = """
    architectures transformers_version dtype torch_dtype name_or_path auto_map tokenizer_class transformers.js_config
    is_llama_config pretraining_tp initializer_range attention_dropout hidden_dropout hidden_dropout_prob attn_pdrop
    attn_dropout embd_pdrop embd_dropout resid_pdrop residual_dropout mlp_dropout dropout use_cache
    cache_implementation attn_implementation gradient_checkpointing torchscript use_bfloat16 use_flash_attn
    bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id mask_token_id decoder_start_token_id
    chunk_size_feed_forward id2label label2id num_labels problem_type finetuning_task task_specific_params
    output_attentions output_hidden_states output_scores return_dict return_dict_in_generate is_decoder
    tie_encoder_decoder tf_legacy_loss cross_attention_hidden_size prefix max_length min_length do_sample
    early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty
    length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids num_return_sequences
    remove_invalid_values forced_bos_token_id forced_eos_token_id suppress_tokens begin_suppress_tokens
    exponential_decay_length_penalty max_sequence_length max_seq_len seq_length model_max_length
    tokenizer_model_max_length boi_token_index eoi_token_index image_token_index boi_token_id eoi_token_id
    image_token_id mm_tokens_per_image vision_config unsloth_fixed unsloth_version neftune_noise_alpha finetuned
""".split()


def check_hf(raw: Mapping[str, Any]) -> None:
    """Checks the contents of a `config.json`, its rotary fields too; null is as good as no field.

    Raises:
      ValueError: a field of the wrong type, or one that changes the arithmetic in a way this model does not have.
    """
    unknown = _check(raw, _HONOURED)
    if quantisation := raw.get("quantization_config"):
        method = quantisation.get("quant_method", "unknown")
        raise ValueError(
            f"weights quantised with {shown(method)} are not supported; use the original weights or a GGUF file"
        )
    for name in ("rope_scaling", "rope_parameters"):
        rope = raw.get(name) or {}
        for part in (rope, rope.get("full_attention") or {}, rope.get("sliding_attention") or {}):
            unknown += [f"{name}.{key}" for key in _check(part, _HONOURED_ROPE)]
    _warn("config.json", unknown)


def _check(raw: Mapping[str, Any], honoured: Mapping[str, str]) -> list[str]:
    """Checks one object; returns the names that it does not know."""
    unknown = []
    for key, value in raw.items():
        if key in honoured and value is not None and not _is(value, honoured[key]):
            raise ValueError(f"{key}={shown(value)} must be {honoured[key]}")
        if key in _REFUSED and value or key in _REFUSED_FACTORS and value not in (None, 1):
            only = "1.0" if key in _REFUSED_FACTORS else "null"
            raise ValueError(f"{key}={shown(value)} is not supported; only {only} is")
        if key not in _HARMLESS and key not in honoured and key not in _REFUSED + _REFUSED_FACTORS:
            unknown.append(key)
    return [key for key in unknown if not key.startswith("_")]  # transformers' own notes


def _is(value: Any, kind: str) -> bool:
    if kind == _WHOLE:
        return type(value) is int and 0 <= value <= _MOST
    if kind == _NUMBER:
        return type(value) in (int, float) and 0 < value <= _MOST**4 and math.isfinite(value)
    if kind == _TEXTS:
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return isinstance(value, {_FLAG: bool, _TEXT: str, _TABLE: Mapping}[kind])


# What is read of a GGUF header, without the architecture before it, and what plays no part in it.
_HONOURED_GGUF = _kinds(
    {
        _WHOLE: """
        context_length embedding_length block_count attention.key_length attention.value_length
        attention.sliding_window rope.dimension_count rope.dimension_count_swa attention.key_length_swa
        attention.value_length_swa rope.scaling.original_context_length
    """,
        _NUMBER: """
        attention.layer_norm_rms_epsilon rope.freq_base rope.freq_base_swa rope.scale_linear rope.scaling.factor
        rope.scaling.attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow attention.scale
    """,
        _TEXT: "rope.scaling.type",
        _FLAG: "attention.causal",
    }
)
_READ_GGUF = """
    attention.head_count attention.head_count_kv feed_forward_length attention.sliding_window_pattern
    rope.scaling.yarn_log_multiplier
""".split()
_HARMLESS_GGUF = """
    vocab_size tensor_data_layout rope.scaling.finetuned attention.layer_norm_epsilon pooling_type
    decoder_start_token_id
""".split()
# What a value may be beside false and zero: -1 is llama.cpp's "as usual".
_NEUTRAL = {
    "rope.scaling.yarn_ext_factor": (1, -1),
    "rope.scaling.yarn_attn_factor": (1, -1),
    "logit_scale": (1,),
    "residual_scale": (1,),
    "embedding_scale": (1,),
}
_STRICT = ("rope.scaling.yarn_ext_factor",)  # where zero has a meaning of its own


def check_gguf(metadata: Mapping[str, Any], arch: str) -> None:
    """Checks the keys of a GGUF header that belong to its architecture.

    Raises:
      ValueError: a value of the wrong type, or a key that llama.cpp reads and that is not honoured here.
    """
    known = {key.removeprefix("{arch}.") for key in _texts(vars(gguf.Keys).values()) if key.startswith("{arch}.")}
    unknown = []
    for name, value in metadata.items():
        if not name.startswith(f"{arch}."):
            continue
        key = name.removeprefix(f"{arch}.")
        if key in _HONOURED_GGUF and not _is(value, _HONOURED_GGUF[key]):
            raise ValueError(f"{name}={shown(value)} must be {_HONOURED_GGUF[key]}")
        if key in _HONOURED_GGUF or key in _READ_GGUF or key in _HARMLESS_GGUF:
            continue
        scalar = isinstance(value, bool | int | float | str)
        if scalar and (value in _NEUTRAL.get(key, ()) or (not value and key not in _STRICT)):
            continue
        if key in known:
            raise ValueError(f"{name}={shown(value)} is not supported")
        unknown.append(name)
    _warn("the GGUF header", unknown)


def _texts(things: Iterable[Any]) -> list[str]:
    """The texts among the values of `gguf.Keys`, whose classes hold them by group."""
    return [text for thing in things if isinstance(thing, type) for text in vars(thing).values() if type(text) is str]


def _warn(where: str, unknown: list[str]) -> None:
    if unknown:
        named = ", ".join(map(shown, sorted(set(unknown))))
        warnings.warn(f"{where} has fields that are unknown here and play no part: {named}", stacklevel=4)


def shown(value: Any) -> str:
    """A value in an error, on one line and not longer than that."""
    return _SHORT.repr(value).replace("\n", " ")

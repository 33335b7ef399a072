"""The published models by name: fields of `config.ModelConfig`, as `config.preset` takes them."""

from typing import Any


def five_to_one(n_layers: int) -> tuple[bool, ...]:
    """Gemma 3's pattern: every sixth layer is global, the others local."""
    return tuple((layer + 1) % 6 != 0 for layer in range(n_layers))


def _sizes(family, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff, **fields) -> dict[str, Any]:
    """All fields of a model: those of its family, its sizes, and what it has otherwise."""
    sizes = dict(d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads)
    return {**family, **sizes, "head_dim": head_dim, "d_ff": d_ff, **fields}


_SMOLLM2 = dict(vocab_size=49152, rope_theta=100_000.0)
_QWEN3 = dict(family="qwen3", vocab_size=151936, rope_theta=1e6, norm_eps=1e-6, qk_norm=True, max_length=40960)
_QWEN25 = dict(family="qwen2", vocab_size=151936, rope_theta=1e6, norm_eps=1e-6, qkv_bias=True, max_length=32768)
_LLAMA32 = dict(
    vocab_size=128256,
    rope_theta=500_000.0,
    max_length=131072,
    rope_scaling=dict(kind="llama3", factor=32.0, original_length=8192),
)
_MISTRAL = dict(family="mistral", vocab_size=32768, rope_theta=1e6, tie_embeddings=False, max_length=32768)
_GEMMA3 = dict(
    family="gemma3_text",
    vocab_size=262144,
    rope_theta=1e6,
    norm_eps=1e-6,
    qk_norm=True,
    activation="gelu_tanh",
    sandwich_norms=True,
    norm_offset=1.0,
    query_scale=256**-0.5,
    local_window=512,
    local_rope_theta=10_000.0,
    max_length=32768,
)

# Of each: d_model, layers, heads, key heads, dimension of a head, d_ff.
PRESETS: dict[str, dict[str, Any]] = {
    "smollm2-135m": _sizes(_SMOLLM2, 576, 30, 9, 3, 64, 1536),
    "smollm2-360m": _sizes(_SMOLLM2, 960, 32, 15, 5, 64, 2560),
    "smollm2-1.7b": _sizes(_SMOLLM2, 2048, 24, 32, 32, 64, 8192, rope_theta=130_000.0),
    "qwen3-0.6b": _sizes(_QWEN3, 1024, 28, 16, 8, 128, 3072),
    "qwen3-1.7b": _sizes(_QWEN3, 2048, 28, 16, 8, 128, 6144),
    "qwen2.5-0.5b": _sizes(_QWEN25, 896, 24, 14, 2, 64, 4864),
    "qwen2.5-1.5b": _sizes(_QWEN25, 1536, 28, 12, 2, 128, 8960),
    "llama-3.2-1b": _sizes(_LLAMA32, 2048, 16, 32, 8, 64, 8192),
    "llama-3.2-3b": _sizes(_LLAMA32, 3072, 28, 24, 8, 128, 8192),
    "mistral-7b": _sizes(_MISTRAL, 4096, 32, 32, 8, 128, 14336),
    "gemma-3-270m": _sizes(_GEMMA3, 640, 18, 4, 1, 256, 2048, embed_scale=640**0.5, local_layers=five_to_one(18)),
    "gemma-3-1b": _sizes(_GEMMA3, 1152, 26, 4, 1, 256, 6912, embed_scale=1152**0.5, local_layers=five_to_one(26)),
}

"""What a model is: sizes of the pretrained backbone, and of the memory beside its attention.

One `ModelConfig` describes every supported family (Llama, SmolLM2, Mistral, Qwen2/2.5, Qwen3, Gemma 3 text); families
differ in field values only. It is frozen and hashable, so it can be a static argument of `jax.jit`.
"""

import dataclasses
import difflib
import json
import math
import types
import typing
import warnings
from typing import Any

from allmem_jax.model import presets

PRESETS = presets.PRESETS
MIXERS = ("allmem", "mamba2", "delta", "swa", "full")
MEMORY_MIXERS = ("allmem", "mamba2", "delta")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text")


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length of pretraining.

    Attributes:
      kind: "linear", "llama3" or "yarn", as Hugging Face names them.
      factor: how many times longer than `original_length` the context is.
      original_length: tokens of the pretraining context ("llama3" and "yarn").
      low_freq_factor, high_freq_factor: the band that "llama3" interpolates in.
      beta_fast, beta_slow: the band that "yarn" interpolates in, in rotations over `original_length`.
      attention_factor: what "yarn" multiplies cos and sin with; None means 0.1 ln(factor) + 1.
    """

    kind: str
    factor: float
    original_length: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None

    def __post_init__(self):
        if self.kind not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope scaling kind {self.kind!r} is not supported; use 'linear', 'llama3' or 'yarn'")
        for name in ("factor", "original_length", "low_freq_factor", "beta_fast", "beta_slow", "attention_factor"):
            value = getattr(self, name)
            if not 0 < (1 if value is None else value) < math.inf:
                raise ValueError(f"rope scaling {name}={value} must be positive")
        if not self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"rope scaling high_freq_factor={self.high_freq_factor} must be above low_freq_factor="
                f"{self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes of the backbone and of the memory; see the class docstring's groups.

    Backbone (fixed by the checkpoint):
      family: which Hugging Face architecture the weights come from; decides names on import and export only.
      vocab_size, d_model, n_layers, n_heads, n_kv_heads, head_dim, d_ff: the usual sizes.
      rope_theta, rope_scaling: rotary positions of the global layers.
      norm_eps: epsilon of every RMSNorm of the backbone.
      tie_embeddings: the head is the transposed embedding.
      qk_norm: RMSNorm on the heads of queries and keys (Qwen3, Gemma 3).
      qkv_bias, o_bias, mlp_bias: biases of the projections.
      activation: "silu", or "gelu_tanh" (Gemma).
      sandwich_norms: an RMSNorm after attention and after the MLP as well (Gemma 3).
      norm_offset: RMSNorm multiplies by `norm_offset + scale` (1.0 for Gemma, else 0.0).
      embed_scale: embeddings are multiplied by this (sqrt(d_model) for Gemma).
      query_scale: attention logits are multiplied by this; None means head_dim ** -0.5.
      local_layers: per layer, whether the *pretrained* attention is itself windowed; () means none is.
      local_window: the window of those layers, in tokens. They keep it (never more) and get no sinks.
      local_rope_theta: rotary base of those layers, which ignore `rope_scaling`; None means as the others.
      max_length: tokens that the checkpoint was trained on, for information.

    Mixer:
      mixer: "allmem" (windowed attention and memory), "swa" (windowed attention) or "full" (the original). The
        baselines "mamba2" and "delta" have a linear recurrence in the memory's place, with as many parameters.
      window, sinks: a query sees the last `window` tokens, itself among them, and the first `sinks`.
      chunk: tokens between two updates of the memory; plays no part in the baselines, which write every token.

    Memory (the baselines share n_mem, conv_kernel, alpha_init and write, "mamba2" d_mem too):
      n_mem, d_mem: heads and their dimension; n_mem None means n_kv_heads. What a preset or a checkpoint without a
        memory gives is `default_n_mem`.
      mem_expansion: hidden size of the fast weights over d_mem.
      conv_kernel: taps of the causal depthwise convolutions.
      read_out: what is read of the memory: "full" f(W, q) (the paper), in which the initial weights act as an adapter;
        "difference" f(W, q) - f(W_init, q), what it has learned, and nothing until then. Its norm has a learned floor:
        reads that find much come out at the size of all others in "full", those that find little come out small.
      delay: a token is written when it leaves the window, to within a chunk, and not as it comes (the paper): the
        memory then holds what attention no longer sees, and adds nothing within the window. The state keeps what waits.
        Plays no part in the baselines.
      qk_scale: "l2" gives queries and keys of the memory unit norm (the paper), "rms" norm sqrt(d_mem).
      alpha_init: start of the memory's per-channel output scale; 0.0 leaves a converted model unchanged.
      lr_init, momentum_init: start values of the two, for an average token.
      write: False holds the memory's learning rate at zero (in the baselines the step and beta): the control that
        tells memory from adaptation.

    Arithmetic:
      dtype: "float32" or "bfloat16", of activations and matmul inputs; fast weights are always float32.
      remat: what a layer keeps for its backward pass: "layer" its input alone, "attention" also what attention found,
        "dots" also the results of its projections, "none" everything.

    Text:
      eos_tokens: ids that end a text or a turn, sorted; `load_pretrained` collects them. They change no arithmetic: a
        saved state belongs to the model whatever they are.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    family: str = "llama"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    qk_norm: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    activation: str = "silu"
    sandwich_norms: bool = False
    norm_offset: float = 0.0
    embed_scale: float = 1.0
    query_scale: float | None = None
    local_layers: tuple[bool, ...] = ()
    local_window: int | None = None
    local_rope_theta: float | None = None
    max_length: int = 8192

    mixer: str = "allmem"
    window: int = 4096
    sinks: int = 128
    chunk: int = 2048

    n_mem: int | None = None
    d_mem: int = 64
    mem_expansion: int = 2
    conv_kernel: int = 4
    read_out: str = "full"
    delay: bool = False
    qk_scale: str = "l2"
    alpha_init: float = 0.0
    lr_init: float = 0.005
    momentum_init: float = 0.5
    write: bool = True

    dtype: str = "float32"
    remat: str = "layer"

    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        for name in (
            "vocab_size",
            "d_model",
            "n_layers",
            "n_heads",
            "n_kv_heads",
            "head_dim",
            "d_ff",
            "window",
            "chunk",
            "d_mem",
            "mem_expansion",
            "conv_kernel",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative")
        if self.n_mem is not None and self.n_mem < 1:
            raise ValueError(f"n_mem={self.n_mem} must be at least 1, or None for n_kv_heads={self.n_kv_heads}")
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} does not divide by n_kv_heads={self.n_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary positions turn pairs of channels")
        if self.local_layers and len(self.local_layers) != self.n_layers:
            raise ValueError(f"local_layers has {len(self.local_layers)} entries for n_layers={self.n_layers}")
        if any(self.local_layers) and not self.local_window:
            raise ValueError(f"local_layers needs local_window, the pretrained window; got {self.local_window}")
        if not 0 < self.momentum_init < 1 or not self.lr_init > 0:
            raise ValueError(f"momentum_init={self.momentum_init} must be in (0, 1), lr_init={self.lr_init} positive")
        for token in self.eos_tokens:
            if type(token) is not int or not 0 <= token < self.vocab_size:
                raise ValueError(f"eos_tokens={self.eos_tokens} must be ids below vocab_size={self.vocab_size}")
        _one_of("mixer", self.mixer, MIXERS)
        _one_of("family", self.family, FAMILIES)
        _one_of("activation", self.activation, ("silu", "gelu_tanh"))
        _one_of("read_out", self.read_out, ("difference", "full"))
        _one_of("qk_scale", self.qk_scale, ("l2", "rms"))
        _one_of("dtype", self.dtype, ("float32", "bfloat16"))
        _one_of("remat", self.remat, ("layer", "attention", "dots", "none"))
        if self.mixer in ("mamba2", "delta"):
            _ = self.linear_state_shape  # a ValueError where the budget leaves no room
        if self.mixer == "allmem" and self.window < self.chunk:
            warnings.warn(
                f"window={self.window} is shorter than chunk={self.chunk}: up to {self.chunk - self.window} tokens "
                "are seen neither by attention nor, until their chunk ends, by the memory",
                stacklevel=3,
            )

    @property
    def memory_heads(self) -> int:
        """Number of heads of the memory."""
        return self.n_kv_heads if self.n_mem is None else self.n_mem

    @property
    def memory_hidden(self) -> int:
        """Hidden size of one head's fast weights."""
        return self.mem_expansion * self.d_mem

    @property
    def memory_mixer(self) -> str:
        """The mixer that the memory's parameters belong to: `mixer`, or "allmem" where that is one without memory."""
        return self.mixer if self.mixer in MEMORY_MIXERS else "allmem"

    @property
    def memory_budget(self) -> int:
        """Parameters of the "allmem" memory of one layer, all included; what the baselines may spend."""
        d, heads, channels = self.d_model, self.memory_heads, self.memory_heads * self.d_mem
        projections = 4 * d * channels + 5 * d * heads + 4 * heads  # q, k, v, out; lr (3), momentum, gate; biases
        fast = 3 * channels * self.memory_hidden
        floors = heads if self.read_out == "difference" else 0
        return projections + fast + 3 * self.conv_kernel * channels + 3 * self.d_mem + d + floors  # ... norms and alpha

    @property
    def lag(self) -> int:
        """Tokens between one that comes and the one that is written; see `delay`."""
        return self.lag_of(self.window) if self.delay and self.mixer == "allmem" else 0

    def lag_of(self, window: Any) -> Any:
        """The same of a memory with a delay beside another window, an int or a traced scalar: never below 0."""
        return (window - self.chunk) * (window > self.chunk)

    @property
    def waiting_channels(self) -> int:
        """Channels of one layer's token that waits to be written: key, value, three learning rates and momentum.

        And padding to a multiple of 128, or TPUs would lay a channel's tokens side by side, and move all of them to
        read or write one.
        """
        return -(-self.memory_heads * (2 * self.d_mem + 4) // 128) * 128

    @property
    def mamba_state(self) -> int:
        """State size of the "mamba2" mixer: the multiple of 8 whose parameters come nearest to `memory_budget`."""
        d, heads, channels = self.d_model, self.memory_heads, self.memory_heads * self.d_mem
        fixed = (3 * d + self.conv_kernel + 1) * channels + (d + 3) * heads + d
        each = 2 * (d + self.conv_kernel)  # projections and convolutions of B and C
        return self._affordable("mamba2", "state size", fixed, each, 8)

    @property
    def delta_dim(self) -> int:
        """Head dimension of the "delta" mixer: the even number whose parameters come nearest to `memory_budget`."""
        d, heads = self.d_model, self.memory_heads
        fixed = 2 * d * heads + 2 * heads + d
        each = (5 * d + 3 * self.conv_kernel) * heads + 1  # q, k, v, gate, out; convolutions; norm
        return self._affordable("delta", "head dimension", fixed, each, 2)

    @property
    def conv_channels(self) -> int:
        """Channels of one layer that pass through the convolutions of a mixer with a memory."""
        if self.mixer == "mamba2":
            return self.memory_heads * self.d_mem + 2 * self.mamba_state
        return 3 * self.memory_heads * (self.delta_dim if self.mixer == "delta" else self.d_mem)

    @property
    def linear_state_shape(self) -> tuple[int, int, int]:
        """(heads, Dk, Dv) of one layer's state, for "mamba2" and "delta"."""
        dim = self.delta_dim if self.mixer == "delta" else self.d_mem
        return self.memory_heads, (self.mamba_state if self.mixer == "mamba2" else dim), dim

    def _affordable(self, mixer: str, what: str, fixed: int, each: int, multiple: int) -> int:
        size = multiple * round((self.memory_budget - fixed) / (each * multiple))
        if size < multiple:
            raise ValueError(
                f"mixer={mixer!r} has no {what} of {multiple} or more within the memory's {self.memory_budget} "
                f"parameters a layer, {fixed} of which are spent without it: raise d_mem={self.d_mem}"
            )
        return size

    def replace(self, **changes: Any) -> "ModelConfig":
        """This config with some fields changed; an unknown field is a ValueError that suggests the nearest."""
        names = [field.name for field in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                close = difflib.get_close_matches(name, names, n=1)
                raise ValueError(
                    f"ModelConfig has no field {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
                )
        return dataclasses.replace(self, **changes)

    def to_json(self) -> str:
        """All fields as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "ModelConfig":
        """The inverse of `to_json`; ValueError on text that is not one config."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"not a model config: {error}") from None
        return _from_fields(cls, _with_scaling(fields))


def _with_scaling(fields: Any) -> Any:
    """Fields of a `ModelConfig` with the rope scaling that they describe, if any, as an object."""
    if not isinstance(fields, dict) or fields.get("rope_scaling") is None:
        return fields
    return fields | {"rope_scaling": _from_fields(RopeScaling, fields["rope_scaling"])}


def _from_fields(cls: Any, fields: Any) -> Any:
    """An instance from what JSON holds of it; ValueError that names a field which is unknown, missing or mistyped."""
    if not isinstance(fields, dict):
        raise ValueError(f"not a model config: {type(fields).__name__} in place of an object")
    hints = typing.get_type_hints(cls)
    if unknown := sorted(set(fields) - set(hints)):
        raise ValueError(f"not a model config: unknown fields {unknown}; a newer version may have written it")
    required = [field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING]
    if missing := [name for name in required if name not in fields]:
        raise ValueError(f"not a model config: it lacks {', '.join(missing)}")
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            raise ValueError(f"not a model config: {name}={value!r:.80} is of another type or out of range")
    return cls(**fields)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of an annotated type; whole numbers pass as floats, flags as no number."""
    if isinstance(hint, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(each, typing.get_args(hint)[0]) for each in value)
    if hint in (int, float):
        numbers = (int,) if hint is int else (int, float)
        return type(value) in numbers and abs(value) <= _MOST and value == value
    return isinstance(value, hint)


_MOST = 2**62  # sizes beyond are damage, and would overflow


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, allowed))}")


def default_n_mem(n_kv_heads: int) -> int:
    """Heads that the memory of a pretrained model has where nothing else is asked for.

    As many as there are key heads, but no more than the 8 whose 8 x 64 channels the paper has, and 4 for models with
    one or two, whose memory would be too small.
    """
    return 4 if n_kv_heads < 3 else min(n_kv_heads, 8)


def preset(name: str, **changes: Any) -> ModelConfig:
    """The config of a published model, e.g. `preset("qwen3-0.6b", window=8192)`.

    Args:
      name: one of the keys that the error of an unknown name lists.
      **changes: fields of `ModelConfig` to set otherwise.
    """
    if name not in PRESETS:
        close = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f": did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"no preset {name!r}{hint} There are {', '.join(PRESETS)}")
    fields = {"n_mem": default_n_mem(PRESETS[name]["n_kv_heads"]), **PRESETS[name]}
    return ModelConfig(**_with_scaling(fields)).replace(**changes)

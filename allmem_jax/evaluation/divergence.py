"""What a converted model loses against the original, position by position.

All variants share one backbone and are compared with the original's hidden states, which are computed once per batch.
Logits exist for a block of positions at a time (`losses.distill_losses`).

    n sequences    S variants    B rows run together    L positions    d model
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm as lm_lib
from allmem_jax.model import losses

ORIGINAL = "original"
SWA = "window + sinks"
CONVERTED = "converted"
WRITE_OFF = "converted, writing off"

Scores = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to run the backbone.

    Attributes:
      name: what reports call it.
      config: mixer, window, sinks, chunk and write decide what it is.
      memory: the memory's parameters, {"layers": {"memory": ...}}; None for a mixer without one.
    """

    name: str
    config: config_lib.ModelConfig
    memory: lm_lib.Params | None = None


def standard_variants(config: config_lib.ModelConfig, memory: lm_lib.Params | None) -> list[Variant]:
    """Window and sinks alone and, where there is a memory, the converted model with its writing on and off."""
    variants = [Variant(SWA, config.replace(mixer="swa"))]
    if memory:
        config = config.replace(mixer=config.memory_mixer)
        variants.append(Variant(CONVERTED, config, memory))
        variants.append(Variant(WRITE_OFF, config.replace(write=False), memory))
    return variants


@functools.partial(jax.jit, static_argnames="config")
def hidden_states(
    params: lm_lib.Params,
    config: config_lib.ModelConfig,
    tokens: jax.Array,
    window: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> jax.Array:
    """Final hidden states [B, L, d] of tokens [B, L]; traced `window` and `sinks` replace the config's."""
    lm = lm_lib.AllMemLM(config)
    return jnp.asarray(lm.apply({"params": params}, tokens, window=window, sinks=sinks, return_hidden=True))


@functools.partial(jax.jit, static_argnames="config")
def divergence(
    params: lm_lib.Params, config: config_lib.ModelConfig, students: jax.Array, teacher: jax.Array, targets: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """KL(teacher || student) [S, B, L], the students' cross-entropy [S, B, L] and the teacher's [B, L].

    Args:
      params: a tree with the output head.
      config: says where in it the head is.
      students: hidden states [S, B, L, d]; the teacher's logits are computed once for all of them.
      teacher: hidden states [B, L, d].
      targets: int32 [B, L].
    """
    head = lm_lib.head_kernel(params, config)
    block = max(1, 512 // len(students))
    each = functools.partial(losses.distill_losses, head=head, targets=targets, block=block)
    return jax.vmap(lambda student: each(student, teacher), out_axes=(0, 0, None))(students)


def compare(
    config: config_lib.ModelConfig,
    backbone: lm_lib.Params,
    tokens: np.ndarray,
    variants: Sequence[Variant],
    *,
    batch: int = 1,
    progress: Callable[[], Any] | None = None,
) -> Scores:
    """KL from the original and cross-entropy at every position, for each variant.

    Args:
      config: of the model; the original is this one with mixer="full".
      backbone: the parameters that all variants share.
      tokens: int32 [n, L + 1]; every position but the last is scored, the next token being its target.
      variants: what to compare with the original. One compilation per config and shape.
      batch: rows run together.
      progress: called after each variant of each batch.

    Returns:
      name -> {"kl", "ce"} float32 [n, L] in nats; under "original" the cross-entropy only.

    Raises:
      ValueError: no variant, tokens of the wrong shape, or a variant whose outputs are not finite.
    """
    if not variants:
        raise ValueError("variants is empty: give at least one to compare with the original")
    if tokens.ndim != 2 or min(tokens.shape) < 1 or tokens.shape[1] < 2:
        raise ValueError(f"tokens have shape {list(tokens.shape)}; they must be [n, L + 1] with n and L at least 1")
    teacher_config = config.replace(mixer="full")
    scores: dict[str, dict[str, list[np.ndarray]]] = {ORIGINAL: {"ce": []}}
    scores |= {variant.name: {"kl": [], "ce": []} for variant in variants}
    for start in range(0, len(tokens), batch):
        rows = tokens[start : start + batch]
        real = len(rows)
        rows = np.concatenate([rows, np.repeat(rows[-1:], batch - real, axis=0)]) if real < batch else rows
        inputs, targets = jnp.asarray(rows[:, :-1], jnp.int32), jnp.asarray(rows[:, 1:], jnp.int32)
        teacher = hidden_states(backbone, teacher_config, inputs)
        students = []
        for variant in variants:
            params = lm_lib.merge_params(backbone, variant.memory) if variant.memory else backbone
            students.append(hidden_states(params, variant.config, inputs).block_until_ready())
            if progress is not None:
                progress()
        found = divergence(backbone, teacher_config, jnp.stack(students), teacher, targets)
        kl, ce, teacher_ce = (np.asarray(x)[..., :real, :] for x in found)
        scores[ORIGINAL]["ce"].append(_finite(ORIGINAL, teacher_ce))
        for variant, divergences, entropies in zip(variants, kl, ce, strict=True):
            scores[variant.name]["kl"].append(_finite(variant.name, divergences))
            scores[variant.name]["ce"].append(_finite(variant.name, entropies))
    return {name: {key: np.concatenate(parts) for key, parts in value.items()} for name, value in scores.items()}


def _finite(name: str, values: np.ndarray) -> np.ndarray:
    bad = ~np.isfinite(values)
    if bad.any():
        first = int(np.argmax(bad.any(axis=0)))
        raise ValueError(f"{name!r} gives non-finite losses from position {first}: check its weights for NaN")
    return values


def summarise(scores: Scores, window: int, buckets: int = 16) -> dict[str, Any]:
    """Means inside and beyond the window, and curves over the position.

    Inside are positions < window: all of their past is visible to windowed attention.

    Args:
      scores: from `compare`.
      window: of the converted model, in tokens.
      buckets: points of a curve, each the mean over an equal share of the positions.

    Returns:
      variant -> {"kl_inside", "kl_beyond", "ce_inside", "ce_beyond": nats (None where there is no such position),
      "kl_curve", "ce_curve": `buckets` nats each, "kl_blocks": the mean KL of every `window` positions beyond}.
    """
    summary: dict[str, Any] = {}
    for name, values in scores.items():
        row: dict[str, Any] = {}
        for key, array in values.items():
            row[f"{key}_inside"] = _mean(array[:, :window])
            row[f"{key}_beyond"] = _mean(array[:, window:])
            row[f"{key}_curve"] = [_mean(part) for part in np.array_split(array, buckets, axis=1)]
        if "kl" in values:
            beyond = values["kl"][:, window:]
            count = beyond.shape[1] // window
            blocks = beyond[:, : count * window].reshape(len(beyond), count, window)
            row["kl_blocks"] = [float(x) for x in blocks.mean(axis=2, dtype=np.float64).ravel()]
        summary[name] = row
    return summary


def _mean(array: np.ndarray) -> float | None:
    return float(array.mean(dtype=np.float64)) if array.size else None


def evaluate(
    config: config_lib.ModelConfig,
    backbone: lm_lib.Params,
    texts: dict[str, np.ndarray],
    variants: Sequence[Variant],
    *,
    batch: int = 1,
    buckets: int = 16,
    progress: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """`compare` and `summarise` for every text, as one JSON-able dict.

    Args:
      config: of the converted model.
      backbone: shared parameters.
      texts: name -> int32 [n, L + 1], one L for all.
      variants: what to compare with the original.
      batch, buckets, progress: as in `compare` and `summarise`.

    Returns:
      {"window", "sinks", "chunk", "length", "sequences", "variants", "positions" (middles of the curves' buckets),
      "texts": text -> variant -> summary}.
    """
    lengths = {tokens.shape[1] - 1 for tokens in texts.values()}
    if len(lengths) != 1:
        raise ValueError(f"the texts must have one length; got {sorted(lengths) or 'no text'}")
    length = lengths.pop()
    buckets = min(buckets, length)
    results = {}
    for name, tokens in texts.items():
        scores = compare(config, backbone, tokens, variants, batch=batch, progress=progress)
        results[name] = summarise(scores, config.window, buckets)
    middles = [float(part.mean()) for part in np.array_split(np.arange(length), buckets)]
    return {
        "window": config.window,
        "sinks": config.sinks,
        "chunk": config.chunk,
        "length": length,
        "sequences": {name: len(tokens) for name, tokens in texts.items()},
        "variants": [ORIGINAL, *(variant.name for variant in variants)],
        "positions": middles,
        "texts": results,
    }


def gap_closed(results: dict[str, Any], variant: str, baseline: str = SWA) -> dict[str, float]:
    """The share of the baseline's KL beyond the window that `variant` removes, per text and over "all texts".

    Negative where the variant is worse. "all texts" weighs texts by their number of sequences.
    """
    return {
        name: 1.0 - _weighted(results, name, variant) / _weighted(results, name, baseline)
        for name in [*results["texts"], "all texts"]
    }


def gap_difference(
    results: dict[str, Any], variant: str, control: str, baseline: str = SWA
) -> dict[str, tuple[float, float]]:
    """How much more of the gap `variant` closes than `control`: (difference of the shares, its standard error).

    The error is that of the paired difference over blocks of `window` positions, taken as independent; it covers
    the choice of text and not that of the training seed.
    """
    differences = {}
    for name in [*results["texts"], "all texts"]:
        names = list(results["texts"]) if name == "all texts" else [name]
        rows = [results["texts"][text] for text in names]
        pairs = [np.asarray(row[control]["kl_blocks"]) - np.asarray(row[variant]["kl_blocks"]) for row in rows]
        paired = np.concatenate(pairs)
        gap = _weighted(results, name, baseline)
        share = (_weighted(results, name, control) - _weighted(results, name, variant)) / gap
        error = paired.std(ddof=1) / len(paired) ** 0.5 / gap if len(paired) > 1 else float("nan")
        differences[name] = (float(share), float(error))
    return differences


def _weighted(results: dict[str, Any], text: str, variant: str) -> float:
    """Mean KL beyond the window of one text, or over "all texts"."""
    names = list(results["texts"]) if text == "all texts" else [text]
    values = [results["texts"][name][variant]["kl_beyond"] for name in names]
    if any(value is None for value in values):
        raise ValueError(f"no position lies beyond window={results['window']} at length {results['length']}")
    return float(np.average(values, weights=[results["sequences"][name] for name in names]))


def cut(ids: Sequence[int], length: int, count: int, prefix: Sequence[int] = ()) -> np.ndarray:
    """`count` sequences of `length` + 1 tokens from a text, centred in as many equal parts of it.

    Args:
      ids: the text's tokens.
      length: positions to score.
      count: sequences, which do not overlap.
      prefix: tokens that begin each sequence (a BOS token, where the model expects one).

    Returns:
      int32 [count, length + 1].

    Raises:
      ValueError: the text is too short, or a number is not positive.
    """
    if length < 1 or count < 1:
        raise ValueError(f"length={length} and sequences={count} must be at least 1")
    take = length + 1 - len(prefix)
    if take < 1:
        raise ValueError(f"length={length} leaves no room after the {len(prefix)} tokens that begin a sequence")
    if len(ids) < take * count:
        raise ValueError(
            f"the text has {len(ids)} tokens, and {count} sequences of length {length} need {take * count}: "
            "ask for fewer or shorter ones, or give a longer text"
        )
    part = len(ids) / count
    starts = [int(part * index + (part - take) / 2) for index in range(count)]
    return np.asarray([[*prefix, *ids[start : start + take]] for start in starts], np.int32)


def cut_texts(tokenizer: Any, texts: Mapping[str, str], length: int, count: int) -> dict[str, np.ndarray]:
    """Name -> `cut` of each text, with the tokens before it that the tokenizer begins a text with."""
    prefix = tokenizer_lib.prefix_tokens(tokenizer)
    ids = {name: tokenizer.encode(text, add_special_tokens=False, verbose=False) for name, text in texts.items()}
    return {name: cut(found, length, count, prefix) for name, found in ids.items()}

"""How far a converted model is from its original, as a section of a report: measured, summed up, tabled and plotted."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import tqdm

from allmem_jax.evaluation import divergence
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import page, sections

NAME = "distance"
TITLE = "Distance from the original"


def read_texts(paths: Sequence[pathlib.Path]) -> dict[str, str]:
    """Name -> text of UTF-8 files; of no file, the documentation that Python carries with it.

    Raises:
      FileNotFoundError: not a file.
      ValueError: not UTF-8.
    """
    if not paths:
        return {"Python's documentation": python_documentation()}
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"no such file: {', '.join(missing)}")
    distinct = len({path.name for path in paths}) == len(paths)
    texts = {}
    for path in paths:
        try:
            texts[path.name if distinct else str(path)] = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from None
    return texts


def python_documentation() -> str:
    """The language reference that CPython's help() shows, about 460,000 characters."""
    from pydoc_data import topics

    return "\n\n".join(topics.topics.values())


def measure(
    config: config_lib.ModelConfig,
    params: lm.Params,
    tokenizer: Any,
    texts: dict[str, str],
    *,
    length: int,
    sequences: int,
    batch: int = 1,
    command: str = "",
) -> sections.Section:
    """The section of a model on texts: windowed attention alone, with its memory, and with the memory's writing off.

    Args:
      config: of the model; mixer "full" counts as "swa".
      params: with a memory or without.
      tokenizer: of the model.
      texts: name -> text.
      length: tokens of a sequence.
      sequences: from each text, spread over it.
      batch: sequences run together.
      command: what makes the section again.

    Raises:
      ValueError: a size is not positive, a text is too short, or the model's outputs are not finite.
    """
    for name, value in (("length", length), ("sequences", sequences), ("batch", batch)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    config = config.replace(mixer="swa") if config.mixer == "full" else config
    backbone, memory = lm.split_params(params)
    tokens = divergence.cut_texts(tokenizer, texts, length, sequences)
    variants = divergence.standard_variants(config, None if config.mixer == "swa" else memory)
    total = len(texts) * -(-sequences // batch) * len(variants)
    with tqdm.tqdm(total=total, desc="evaluating", leave=False, disable=not sys.stderr.isatty()) as bar:
        evaluation = divergence.evaluate(config, backbone, tokens, variants, batch=batch, progress=bar.update)
    names = (divergence.CONVERTED, divergence.WRITE_OFF) if len(variants) > 1 else (None, None)
    return evaluation_section(evaluation, *names, command=command)


def evaluation_section(
    evaluation: dict[str, Any], memory: str | None = None, control: str | None = None, *, command: str = ""
) -> sections.Section:
    """The section that shows an evaluation.

    Args:
      evaluation: from `divergence.evaluate`.
      memory, control: the variants whose shares of the gap are set side by side, or None.
      command: what makes the evaluation again.
    """
    text, tables = [finding(evaluation, memory, control)], []
    if memory and control and _goes_beyond(evaluation):
        text.append(
            "The gap is the KL that windowed attention with sinks alone leaves beyond the window. The control is the "
            "same module with its writing switched off (learning rate 0). The error is that of the difference over "
            "blocks of text, for one training seed."
        )
        header = ("text", memory, control, "difference (percentage points)")
        tables.append(sections.Table("Share of the gap closed", header, gap_rows(evaluation, memory, control)))
    text.append(
        f"Window {evaluation['window']}, sinks {evaluation['sinks']}, chunk {evaluation['chunk']} tokens; "
        f"{sum(evaluation['sequences'].values())} sequences of {evaluation['length']} tokens. KL is from the original "
        "(full attention), in nats per token; inside are the positions whose whole past the window holds."
    )
    tables += [
        _variant_table(evaluation, "kl_beyond", "KL beyond the window (nats per token)"),
        _variant_table(evaluation, "kl_inside", "KL inside the window (nats per token)"),
        _variant_table(evaluation, "ce_beyond", "Cross-entropy of the text beyond the window (nats per token)"),
    ]
    plots = [_curves(evaluation, name) for name in evaluation["texts"]]
    if len(evaluation["variants"]) > 2:
        plots.append(_removed(evaluation))
    return sections.Section(NAME, TITLE, command, tuple(text), tuple(tables), tuple(plots), evaluation)


def finding(evaluation: dict[str, Any], memory: str | None, control: str | None) -> str:
    """One sentence on what an evaluation shows."""
    if not _goes_beyond(evaluation):
        return (
            f"All {evaluation['length']} positions lie inside the window of {evaluation['window']} tokens, where there "
            "is nothing to remember: a longer --length would say more."
        )
    if memory and control:
        return verdict(evaluation, memory, control)
    alone = [rows[divergence.SWA]["kl_beyond"] for rows in evaluation["texts"].values()]
    share = f"{np.mean(alone):.3f} nats per token from the original"
    return f"Beyond the window, attention to window and sinks alone is {share}."


def verdict(evaluation: dict[str, Any], memory: str, control: str) -> str:
    """One sentence on whether writing helped, beyond what the same module does with writing off.

    "Cannot be told apart" is a difference of less than a percentage point, or of less than twice its error.
    """
    share, error = divergence.gap_difference(evaluation, memory, control)["all texts"]
    ours, theirs = (divergence.gap_closed(evaluation, name)["all texts"] for name in (memory, control))
    sizes = f"{ours:.1%} of the gap against {theirs:.1%}, a difference of {100 * share:+.2f} ± {100 * error:.2f} points"
    if not abs(share) > max(2 * error, 0.01):
        return (
            f"The memory and its writing-off control cannot be told apart: {sizes}. At this budget the gain is "
            "adaptation, not yet memory."
        )
    return f"The memory closes {'more' if share > 0 else 'less'} than its writing-off control: {sizes}."


def gap_rows(evaluation: dict[str, Any], memory: str, control: str) -> tuple[tuple[str, ...], ...]:
    """Per text and over all: share closed by the memory, by its control, and their difference with its error."""
    ours, theirs = (divergence.gap_closed(evaluation, name) for name in (memory, control))
    difference = divergence.gap_difference(evaluation, memory, control)
    return tuple(
        (
            text,
            f"{100 * ours[text]:.1f} %",
            f"{100 * theirs[text]:.1f} %",
            f"{100 * difference[text][0]:+.2f} ± {100 * difference[text][1]:.2f}",
        )
        for text in ours
    )


def _goes_beyond(evaluation: dict[str, Any]) -> bool:
    return evaluation["length"] > evaluation["window"]


def _variant_table(evaluation: dict[str, Any], key: str, caption: str) -> sections.Table:
    """Texts down, variants across; variants without that number (the original has no KL) are left out."""
    texts = evaluation["texts"]
    names = [name for name in evaluation["variants"] if all(key in rows[name] for rows in texts.values())]
    rows = tuple((text, *(page.number(rows[name][key]) for name in names)) for text, rows in texts.items())
    return sections.Table(caption, ("text", *names), rows)


def _curves(evaluation: dict[str, Any], text: str) -> sections.Plot:
    """KL over the position, a line a variant."""
    positions = tuple(evaluation["positions"])
    rows = evaluation["texts"][text]
    lines = {name: (positions, tuple(row["kl_curve"])) for name, row in rows.items() if "kl_curve" in row}
    return sections.Plot(
        text, "position (tokens)", "KL from the original (nats)", lines, mark_x=float(evaluation["window"])
    )


def _removed(evaluation: dict[str, Any]) -> sections.Plot:
    """Per variant, the KL of windowed attention alone minus its own, averaged over the texts."""
    texts = evaluation["texts"].values()
    positions = tuple(evaluation["positions"])
    base = [rows[divergence.SWA]["kl_curve"] for rows in texts]
    lines = {}
    for name in evaluation["variants"]:
        if name not in (divergence.ORIGINAL, divergence.SWA):
            own = [rows[name]["kl_curve"] for rows in texts]
            lines[name] = (positions, tuple(np.subtract(base, own).mean(axis=0).tolist()))
    return sections.Plot(
        "what is removed of it, mean of the texts",
        "position (tokens)",
        "less KL than window + sinks (nats)",
        lines,
        mark_x=float(evaluation["window"]),
    )

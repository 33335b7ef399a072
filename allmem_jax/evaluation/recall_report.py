"""What recall tells: shares of right answers with intervals, differences from the original, tables and plots.

An interval is of 95 %; lengths and distances are in tokens.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from allmem_jax.evaluation import divergence, recall
from allmem_jax.evaluation import questions as questions_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import sections

Z = 1.959964  # of an interval of 95 %


def wilson(right: int, total: int) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    share, spread = right / total, Z * Z / total
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / total + spread / (4 * total)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool]) -> tuple[float, float, float]:
    """The difference of two shares on the same examples, and its interval (Agresti and Min, 2005: two pairs added)."""
    if len(ours) != len(theirs) or not ours:
        raise ValueError(f"pairs need as many of one as of the other, and one at least: {len(ours)} and {len(theirs)}")
    gained = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    total = len(ours) + 2
    middle = (gained - lost) / total
    half = Z * math.sqrt(gained + lost + 1 - (gained - lost) ** 2 / total) / total
    return (gained - lost) / len(ours), max(-1.0, middle - half), min(1.0, middle + half)


def section(
    settings: recall.Settings,
    backbone: lm.Params,
    tokenizer: Any,
    texts: Mapping[str, str],
    variants: Sequence[divergence.Variant],
    *,
    questions: Sequence[questions_lib.Question] = (),
    parts: pathlib.Path | None = None,
    source: str = "",
    command: str = "",
) -> sections.Section:
    """`measure`, told and tabled. `command` is what a user types to get it again; for the rest see there."""
    results = recall.measure(
        settings, backbone, tokenizer, texts, variants, questions=questions, parts=parts, source=source
    )
    return describe(results, variants[-1].config, settings, command)


def describe(
    results: Sequence[recall.Result], config: config_lib.ModelConfig, settings: recall.Settings, command: str = ""
) -> sections.Section:
    """The section that shows results.

    Args:
      results: from `measure`.
      config: of the converted model.
      settings: that they were measured with.
      command: what a user types to get them again.
    """
    setting = (
        f"Window {config.window}, sinks {config.sinks}, chunk {config.chunk} tokens. All that an answer needs ends "
        f"{config.window} tokens or more before the question and is not among the sinks, except where a task's name "
        "begins with short_: there the whole prompt lies within the window. A distance is that from the first evidence "
        f"to the question. Answers are written greedily, to the same prompts by every variant, asked "
        f"{'through the chat template' if settings.chat else 'in plain text'}. In brackets: 95 % intervals, which take "
        f"answers as independent, also where up to {questions_lib.QUESTIONS} pairs are asked of one context. "
        f'"{recall.OTHER}" is the converted model where all of the prompt that attention does not see at the question '
        "comes from another prompt of the task, which gives no answer: what it has right, the memory has not given. "
        "It is asked where something lies beyond the window."
    )
    tables = [_accuracy(results), _by_distance(results, config.window), _against_original(results)]
    plots = [*_plots_by_length(results, config.window), *_plots_by_pairs(results)]
    plots += [plot for task in _long(results) if (plot := _plot(results, task, config.window))]
    asked = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(settings).items()}
    data = {"settings": asked, "window": config.window, "results": list(results)}
    return sections.Section(
        recall.NAME,
        "Answers to questions about what was read",
        command,
        (*finding(results), setting),
        tuple(table for table in tables if table.rows),
        tuple(plots),
        data,
    )


def finding(results: Sequence[recall.Result]) -> list[str]:
    """Sentences on what was found: beyond the window whether the memory helps, and within it what is lost."""
    sentences = []
    long = _long(results)
    far, near = (_verdicts(results, names) for names in (long, questions_lib.SHORT))
    if far:
        sentences.append(f"Of {_most(far)} answers that need what lies beyond the window, right are: {_shares(far)}.")
    for control, subject in (
        (divergence.WRITE_OFF, "Writing"),
        (recall.OTHER, "What was written of the document itself"),
    ):
        if marks := _paired(results, long, divergence.CONVERTED, control):
            middle, low, high = paired_difference(*marks)
            told = f"{subject} {'helps' if middle > 0 else 'harms'}"
            if low <= 0 <= high:
                told = f"The memory and its control ({control}) cannot be told apart"
            sentences.append(f"{told}: a difference of {points(middle, low, high)} points on the same questions.")
    if near:
        sentences.append(f"Of {_most(near)} answers to prompts within the window, right are: {_shares(near)}.")
    if marks := _paired(results, questions_lib.SHORT, divergence.CONVERTED, divergence.ORIGINAL):
        difference = points(*paired_difference(*marks))
        sentences.append(f"There the converted model differs from the original by {difference} points.")
    return sentences


def _shares(marks: Mapping[str, Sequence[bool]]) -> str:
    return ", ".join(f"{name} {share(right)}" for name, right in marks.items() if right)


def _most(marks: Mapping[str, Sequence[bool]]) -> int:
    return max(map(len, marks.values()))


def share(marks: Sequence[bool]) -> str:
    """A share of right answers with its interval, e.g. "0.97 [0.84, 0.99]"; a dash for no answers."""
    if not marks:
        return "-"
    low, high = wilson(sum(marks), len(marks))
    return f"{sum(marks) / len(marks):.2f} [{low:.2f}, {high:.2f}]"


def points(middle: float, low: float, high: float) -> str:
    """A difference of shares in percentage points, e.g. "+3.1 [-2.0, +8.4]"."""
    return f"{100 * middle:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _verdicts(
    results: Sequence[recall.Result],
    tasks: Collection[str],
    keep: Callable[[dict[str, Any]], bool] = lambda example: True,
) -> dict[str, list[bool]]:
    """Variant -> whether each answer is right, over the examples of some tasks that are to be kept."""
    marks: dict[str, list[bool]] = {}
    for result in results:
        if result["task"] in tasks:
            kept = [example["correct"] for example in result["examples"] if keep(example)]
            marks.setdefault(result["variant"], []).extend(kept)
    return marks


def _paired(
    results: Sequence[recall.Result], tasks: Collection[str], ours: str, theirs: str
) -> tuple[list[bool], list[bool]] | None:
    """Whether the answers of two variants are right, over the examples of some tasks that both were asked."""
    pairs: tuple[list[bool], list[bool]] = ([], [])
    for key in dict.fromkeys((result["task"], result["length"]) for result in results):
        marks = _verdicts([result for result in results if (result["task"], result["length"]) == key], tasks)
        if marks.get(ours) and marks.get(theirs):
            pairs[0].extend(marks[ours])
            pairs[1].extend(marks[theirs])
    return pairs if pairs[0] else None


def _long(results: Sequence[recall.Result]) -> list[str]:
    return [task for task in dict.fromkeys(result["task"] for result in results) if questions_lib.is_long(task)]


def _variants(results: Sequence[recall.Result]) -> list[str]:
    return list(dict.fromkeys(result["variant"] for result in results))


def _accuracy(results: Sequence[recall.Result]) -> sections.Table:
    """A row for each task and length, with the tokens that its prompts really have."""
    rows = []
    for task, length in dict.fromkeys((result["task"], result["length"]) for result in results):
        chosen = [result for result in results if (result["task"], result["length"]) == (task, length)]
        tokens = [example["prompt_tokens"] for example in chosen[0]["examples"]]
        marks = _verdicts(chosen, [task])
        actual = f"{min(tokens)}" if min(tokens) == max(tokens) else f"{min(tokens)} to {max(tokens)}"
        rows.append((task, actual, str(len(tokens)), *(share(marks[name]) for name in marks)))
    return sections.Table("Share of right answers", ("task", "prompt tokens", "n", *_variants(results)), tuple(rows))


def _spans(results: Sequence[recall.Result], task: str, window: int) -> list[tuple[int, int]]:
    """The doublings of the window that distances of a task fall into."""
    found = {
        int(math.log2(max(1.0, example["distance"] / window)))
        for result in results
        if result["task"] == task
        for example in result["examples"]
        if example["distance"] is not None
    }
    return [(window << power, window << power + 1) for power in sorted(found)]


def _between(low: int, high: int) -> Callable[[dict[str, Any]], bool]:
    return lambda example: low <= example["distance"] < high


def _by_distance(results: Sequence[recall.Result], window: int) -> sections.Table:
    """A row for each long task and doubling of the distance, over all lengths."""
    rows = []
    for task in _long(results):
        for low, high in _spans(results, task, window):
            marks = _verdicts(results, [task], _between(low, high))
            rows.append((task, f"{low} to {high}", str(_most(marks)), *(share(marks[name]) for name in marks)))
    header = ("task", "distance", "n", *_variants(results))
    return sections.Table("Share of right answers by the distance of what is asked for", header, tuple(rows))


def _against_original(results: Sequence[recall.Result]) -> sections.Table:
    """A row for each task, over all lengths: the paired difference of every other variant from the original."""
    names = [name for name in _variants(results) if name != divergence.ORIGINAL]
    rows = []
    for task in dict.fromkeys(result["task"] for result in results):
        pairs = [_paired(results, [task], name, divergence.ORIGINAL) for name in names]
        if any(pairs):
            rows.append((task, *(points(*paired_difference(*pair)) if pair else "-" for pair in pairs)))
    caption = "Difference from the original on the same prompts (percentage points)"
    return sections.Table(caption, ("task", *names), tuple(rows) if names else ())


def _plot(results: Sequence[recall.Result], task: str, window: int) -> sections.Plot | None:
    """Accuracy over the distance; None for a task that was not asked."""
    spans = _spans(results, task, window)
    lines = _lines({math.sqrt(low * high): _verdicts(results, [task], _between(low, high)) for low, high in spans})
    if not lines:
        return None
    return sections.Plot(
        f"{task}, by distance", "distance (tokens)", "share of right answers", lines, log_x=True, mark_x=float(window)
    )


def _plots_by_length(results: Sequence[recall.Result], window: int) -> list[sections.Plot]:
    """Accuracy over the length of the prompts, one plot a long task that was asked at several."""
    plots = []
    for task in _long(results):
        lengths = sorted({result["length"] for result in results if result["task"] == task})
        points = {
            float(length): _verdicts([result for result in results if result["length"] == length], [task])
            for length in lengths
        }
        if len(lengths) > 1:
            plots.append(
                sections.Plot(
                    f"{task}, by length",
                    "prompt and answer (tokens)",
                    "share of right answers",
                    _lines(points),
                    log_x=True,
                    mark_x=float(window),
                )
            )
    return plots


def _plots_by_pairs(results: Sequence[recall.Result]) -> list[sections.Plot]:
    """Accuracy over the number of pairs held at once, one plot a length at which several numbers were asked."""
    plots = []
    tasks = sorted((task for task in _long(results) if questions_lib.pairs(task)), key=questions_lib.pairs)
    for length in sorted({result["length"] for result in results if result["task"] in tasks}):
        chosen = [result for result in results if result["length"] == length]
        lines = _lines({float(questions_lib.pairs(task)): _verdicts(chosen, [task]) for task in tasks})
        if len(tasks) > 1:
            title = f"pairs held at once, {length} tokens"
            plots.append(sections.Plot(title, "pairs", "share of right answers", lines, log_x=True))
    return plots


def _lines(
    points: Mapping[float, Mapping[str, Sequence[bool]]],
) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """x -> variant -> whether each answer is right, as a line a variant through the x at which it was asked."""
    lines = {}
    for name in dict.fromkeys(name for marks in points.values() for name in marks):
        asked = {x: marks[name] for x, marks in points.items() if marks.get(name)}
        if asked:
            lines[name] = tuple(asked), tuple(sum(right) / len(right) for right in asked.values())
    return lines

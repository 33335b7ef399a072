"""A folder that shows an evaluation: `report.json` (numbers), `curves.png`, and `index.html`, one page on its own.

The page needs no other file and no network: the picture is inside it, and all text is escaped.
"""

import base64
import dataclasses
import functools
import html
import io
import json
import os
import pathlib
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from allmem_jax import evals

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; margin: .8rem 0; } caption { text-align: left; color: #555; padding-bottom: .3rem; }
th, td { padding: .25rem .8rem; text-align: right; border-bottom: 1px solid #ddd; font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
tr:last-child td { border-bottom: 1px solid #999; } .wide { overflow-x: auto; }
img { max-width: 100%; } pre, blockquote { background: #f5f5f5; padding: .7rem 1rem; margin: .6rem 0;
white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.45 ui-monospace, monospace; } blockquote b { color: #555; }
"""

Row = Sequence[str]


@dataclasses.dataclass(frozen=True)
class Report:
    """What goes on the page.

    Attributes:
      title: of the page.
      evaluation: from `evals.evaluate`.
      memory, control: the variants whose shares of the gap are set side by side; None leaves that section out.
      training: run -> rows of numbers, each with "step" and "loss".
      samples: (prompt, continuation) pairs.
      settings: name -> value.
      commands: how to repeat it.
      notes: sentences for the top of the page.
    """

    title: str
    evaluation: dict[str, Any]
    memory: str | None = None
    control: str | None = None
    training: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    samples: Sequence[tuple[str, str]] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    commands: Sequence[str] = ()
    notes: Sequence[str] = ()


def write(folder: str | os.PathLike[str], report: Report) -> pathlib.Path:
    """Writes the three files, each in one step, and returns the path of the page."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    picture = plot(report)
    numbers = dataclasses.asdict(report)
    _write_bytes(folder / "report.json", json.dumps(numbers, indent=1, default=str).encode())
    _write_bytes(folder / "curves.png", picture)
    _write_bytes(folder / "index.html", page(report, picture).encode())
    return folder / "index.html"


def _write_bytes(path: pathlib.Path, content: bytes) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)


def plot(report: Report) -> bytes:
    """PNG: the KL over the position for every text, what each variant removes of it and, if any, the training loss."""
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    evaluation = report.evaluation
    draw = [functools.partial(_draw_text, evaluation, text) for text in evaluation["texts"]]
    if len(evaluation["variants"]) > 2:
        draw.append(functools.partial(_draw_removed, evaluation))
    if report.training:
        draw.append(functools.partial(_draw_training, report.training))
    columns = min(len(draw), 2)
    rows = -(-len(draw) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.4 * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis, panel in zip(axes, draw, strict=False):
        panel(axis)
        axis.legend(fontsize=7)
    for axis in axes[len(draw) :]:
        axis.set_axis_off()
    buffer = io.BytesIO()
    backend_agg.FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_text(evaluation: dict[str, Any], text: str, axis: Any) -> None:
    for name, row in evaluation["texts"][text].items():
        if "kl_curve" in row:
            axis.plot(evaluation["positions"], row["kl_curve"], marker=".", label=name)
    axis.axvline(evaluation["window"], color="gray", linestyle=":", linewidth=1)
    axis.set_title(_plain(text), fontsize=10)
    axis.set(xlabel="position (tokens)", ylabel="KL from the original (nats)")


def _draw_removed(evaluation: dict[str, Any], axis: Any) -> None:
    """Per variant, the KL of windowed attention alone minus its own, averaged over the texts."""
    texts = evaluation["texts"].values()
    base = [rows[evals.SWA]["kl_curve"] for rows in texts]
    for name in evaluation["variants"]:
        if name not in (evals.ORIGINAL, evals.SWA):
            curves = zip(base, (rows[name]["kl_curve"] for rows in texts), strict=True)
            removed = np.mean([np.subtract(before, after) for before, after in curves], axis=0)
            axis.plot(evaluation["positions"], removed, marker=".", label=name)
    axis.axvline(evaluation["window"], color="gray", linestyle=":", linewidth=1)
    axis.set_title("what is removed of it, mean of the texts", fontsize=10)
    axis.set(xlabel="position (tokens)", ylabel="less KL than window + sinks (nats)")


def _draw_training(training: dict[str, list[dict[str, Any]]], axis: Any) -> None:
    for name, steps in training.items():
        axis.plot([row["step"] for row in steps], [row["loss"] for row in steps], marker=".", label=name)
    axis.set_title("training", fontsize=10)
    axis.set(xlabel="step", ylabel="loss (nats)")


def _plain(text: str) -> str:
    """A title that fits, and that matplotlib does not take for mathematics."""
    return textwrap.shorten(text, 60, placeholder=" ...").replace("$", r"\$")


def page(report: Report, picture: bytes) -> str:
    """The HTML page."""
    evaluation = report.evaluation
    encoded = base64.b64encode(picture).decode()
    setting = (
        f"Window {evaluation['window']}, sinks {evaluation['sinks']}, chunk {evaluation['chunk']} tokens; "
        f"{sum(evaluation['sequences'].values())} sequences of {evaluation['length']} tokens. KL is from the original "
        "(full attention), in nats per token; inside are the positions whose whole past the window holds."
    )
    parts = [f"<h1>{_escape(report.title)}</h1>", *(f"<p>{_escape(note)}</p>" for note in report.notes)]
    if report.memory and report.control:
        parts += _gap_section(report)
    parts += ["<h2>Distance from the original</h2>", f"<p>{_escape(setting)}</p>"]
    parts += [_variant_table(evaluation, "kl_beyond", "KL beyond the window")]
    parts += [_variant_table(evaluation, "kl_inside", "KL inside the window")]
    parts += [_variant_table(evaluation, "ce_beyond", "Cross-entropy of the text beyond the window")]
    parts += ["<h2>Curves</h2>", f'<img alt="curves of the tables above" src="data:image/png;base64,{encoded}">']
    if report.training:
        parts += ["<h2>Training</h2>", *(_training_table(name, rows) for name, rows in report.training.items())]
    if report.samples:
        parts.append("<h2>Generated text</h2>")
        parts += [f"<blockquote><b>{_escape(p)}</b>{_escape(text)}</blockquote>" for p, text in report.samples]
    if report.settings:
        rows = [(str(name), str(value)) for name, value in report.settings.items()]
        parts += ["<h2>Settings</h2>", table("", ("setting", "value"), rows)]
    if report.commands:
        parts += ["<h2>Commands</h2>", f"<pre>{_escape(chr(10).join(report.commands))}</pre>"]
    head = f'<meta charset="utf-8"><title>{_escape(report.title)}</title><style>{STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def gap_rows(evaluation: dict[str, Any], memory: str, control: str) -> list[Row]:
    """Per text and over all: share closed by the memory, by its control, and their difference with its error."""
    ours, theirs = (evals.gap_closed(evaluation, name) for name in (memory, control))
    difference = evals.gap_difference(evaluation, memory, control)
    rows: list[Row] = []
    for text in ours:
        share, error = difference[text]
        rows.append((text, f"{ours[text]:.1%}".replace("%", " %"), f"{theirs[text]:.1%}".replace("%", " %"),
                     f"{100 * share:+.2f} ± {100 * error:.2f}"))  # fmt: skip
    return rows


def verdict(evaluation: dict[str, Any], memory: str, control: str) -> str:
    """One sentence on whether writing helped, beyond what the same module does with writing off.

    "Cannot be told apart" is a difference of less than a percentage point, or of less than twice its error.
    """
    share, error = evals.gap_difference(evaluation, memory, control)["all texts"]
    ours, theirs = (evals.gap_closed(evaluation, name)["all texts"] for name in (memory, control))
    sizes = f"{ours:.1%} of the gap against {theirs:.1%}, a difference of {100 * share:+.2f} ± {100 * error:.2f} points"
    if not abs(share) > max(2 * error, 0.01):
        return (
            f"The memory and its writing-off control cannot be told apart: {sizes}. At this budget the gain is "
            "adaptation, not yet memory."
        )
    return f"The memory closes {'more' if share > 0 else 'less'} than its writing-off control: {sizes}."


def _gap_section(report: Report) -> list[str]:
    assert report.memory and report.control
    explanation = (
        "The gap is the KL that windowed attention with sinks alone leaves beyond the window. The control is the same "
        "module with its writing switched off (learning rate 0). The error is that of the difference over blocks of "
        "text, for one training seed."
    )
    header = ("text", report.memory, report.control, "difference (percentage points)")
    rows = gap_rows(report.evaluation, report.memory, report.control)
    return [
        "<h2>Share of the gap closed</h2>",
        f"<p><strong>{_escape(verdict(report.evaluation, report.memory, report.control))}</strong></p>",
        table("Share of the gap closed", header, rows),
        f"<p>{_escape(explanation)}</p>",
    ]


def _variant_table(evaluation: dict[str, Any], key: str, caption: str) -> str:
    """Texts down, variants across; variants without that number (the original has no KL) are left out."""
    texts = evaluation["texts"]
    names = [name for name in evaluation["variants"] if all(key in rows[name] for rows in texts.values())]
    rows = [(text, *(number(variants[name][key]) for name in names)) for text, variants in texts.items()]
    return table(caption, ("text", *names), rows)


def _training_table(name: str, steps: Sequence[dict[str, Any]]) -> str:
    """The numbers of a few steps, evenly spread; columns are what all rows have."""
    if not steps:
        return f"<p>{_escape(name)}: no step was recorded.</p>"
    count = min(len(steps), 8)
    chosen = [steps[round(i * (len(steps) - 1) / max(count - 1, 1))] for i in range(count)]
    columns = [key for key in chosen[0] if all(isinstance(row.get(key), int | float) for row in chosen)]
    return table(f"{name}: {len(steps)} steps recorded", columns, [[number(row[c]) for c in columns] for row in chosen])


def number(value: float | int | None) -> str:
    """A number with four significant digits; a dash for none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


def table(caption: str, header: Row, rows: Sequence[Row]) -> str:
    """An HTML table; every cell is escaped."""
    head = "".join(f"<th>{_escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    title = f"<caption>{_escape(caption)}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _escape(text: str) -> str:
    return html.escape(str(text))

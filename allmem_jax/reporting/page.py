"""A folder that shows measurements: `report.json` (all numbers), `index.html` and a PNG of each section's plots.

The page is one file: it needs no other and no network. Pictures are inside it, and all text is escaped.
"""

import base64
import dataclasses
import html
import io
import json
import os
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any

from allmem_jax.reporting import sections as sections_lib
from allmem_jax.storage import files

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1f2328; --soft: #59636e; --line: #d5dbe1; --panel: #f4f6f8;
  --link: #0b5cad; --bad: #b42318; }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171a; --ink: #dfe3e8; --soft: #9aa4af; --line: #353c44; --panel: #1e2328; --link: #6cb2ff;
    --bad: #ff8a7a; }
  img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; } }
* { box-sizing: border-box; }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 66rem; margin: 0 auto; padding: 1.5rem 1.2rem 4rem;
  background: var(--back); color: var(--ink); }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 1rem; text-wrap: balance; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 3rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line); }
p { max-width: 46rem; margin: .6rem 0; overflow-wrap: anywhere; } section > p:first-of-type { font-weight: 600; }
a { color: var(--link); } .failed, .failed a { color: var(--bad); }
nav { background: var(--panel); border-radius: 8px; padding: .8rem 1.2rem; margin: 1.4rem 0; }
nav ol { margin: 0; padding-left: 1.4rem; columns: 20rem 2; }
.wide { overflow-x: auto; margin: 1.2rem 0; } table { border-collapse: collapse; font-size: .92rem; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; white-space: normal; }
.words { text-align: left; white-space: pre-line; min-width: 7rem; max-width: 44rem; overflow-wrap: break-word; }
img { display: block; max-width: max(100%, 42rem); height: auto; }
pre { background: var(--panel); border-radius: 8px; padding: .7rem 1rem; margin: .4rem 0; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, monospace; }
.label { color: var(--soft); font-size: .85rem; margin: 1.2rem 0 0; }
"""
# Nothing may be fetched, whatever the text of a section is.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b04c95", "#c98a00", "#3aa0d8", "#6a3d9a", "#555555")
DASHES = ("-", "--", "-.", ":")
NUMBER = re.compile(r"[-+]?[\d.].{0,23}|-?")


@dataclasses.dataclass(frozen=True)
class Report:
    """What goes on the page.

    Attributes:
      title: of the page.
      sections: in order; their names must differ.
      notes: sentences for the top of the page.
      failed: names of the sections that say why there is no result.
    """

    title: str
    sections: tuple[sections_lib.Section, ...]
    notes: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()


def write(folder: str | os.PathLike[str], report: Report) -> pathlib.Path:
    """Writes the files, each in one step, and returns the path of the page.

    Raises:
      ValueError: the name of a section is not fit for a file, or is there twice.
    """
    check_names([section.name for section in report.sections])
    folder = pathlib.Path(folder)
    pictures = {section.name: draw(section) for section in report.sections if section.plots}
    for name, picture in pictures.items():
        files.write(folder / f"{name}.png", picture)
    files.write(folder / "report.json", json.dumps(dataclasses.asdict(report), indent=1))
    files.write(folder / "index.html", page(report, pictures))
    return folder / "index.html"


def check_names(names: Sequence[str]) -> None:
    """Refuses names of sections that cannot be file names, and doubles."""
    for name in names:
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise ValueError(f"a section is named {name!r}: use letters, digits, - _ and ., as it names a file")
        if names.count(name) > 1:
            raise ValueError(f"two sections are named {name!r}: leave one out, or rename it")


def draw(section: sections_lib.Section) -> bytes:
    """PNG of a section's plots, two in a row. A line has one colour in all of them.

    Raises:
      ValueError: the section has no plots.
    """
    from matplotlib.backends import backend_agg
    from matplotlib.figure import Figure

    if not section.plots:
        raise ValueError(f"section {section.name!r} has no plots to draw")
    columns = min(len(section.plots), 2)
    rows = -(-len(section.plots) // columns)
    figure = Figure(figsize=(5.5 * columns, 3.6 * rows), layout="constrained", dpi=130)
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    order = list(dict.fromkeys(name for plot in section.plots for name in plot.lines))
    for axis, plot in zip(axes, section.plots, strict=False):
        _draw_plot(axis, plot, order)
    for axis in axes[len(section.plots) :]:
        axis.set_axis_off()
    buffer = io.BytesIO()
    backend_agg.FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()


def _draw_plot(axis: Any, plot: sections_lib.Plot, order: Sequence[str]) -> None:
    """One plot; a line's place in `order` decides its colour and its dashes."""
    from matplotlib import ticker

    for name, (xs, ys) in plot.lines.items():
        place = order.index(name)
        style = dict(color=COLOURS[place % len(COLOURS)], linestyle=DASHES[place % len(DASHES)])
        width = 1.3 + 1.5 * (1 - (place + 1) / len(order))  # of lines that coincide, all are seen
        axis.plot(xs, ys, marker=".", linewidth=width, label=_plain(name), **style)
    if plot.log_x:
        axis.set_xscale("log")
        measured = sorted({x for xs, _ in plot.lines.values() for x in xs})
        if len(measured) <= 10:
            labels = [f"{x:,.0f}" if x >= 10 else f"{x:.3g}" for x in measured]
            axis.set_xticks(measured, labels, fontsize=8, rotation=30 if len(measured) > 5 else 0)
            axis.xaxis.set_minor_locator(ticker.NullLocator())
    if plot.log_y:
        axis.set_yscale("log")
        low, high = axis.get_ylim()
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
        axis.yaxis.set_major_formatter("{x:,g}")
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    if plot.mark_x is not None:
        axis.axvline(plot.mark_x, color="gray", linestyle=":", linewidth=1)
    axis.set_title(_plain(plot.title), fontsize=10)
    axis.set(xlabel=_plain(plot.x_label), ylabel=_plain(plot.y_label))
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if plot.lines:
        axis.legend(fontsize=7.5, frameon=False)


def _plain(text: str) -> str:
    """Text that fits, and that matplotlib does not take for mathematics."""
    return textwrap.shorten(text, 64, placeholder=" ...").replace("$", r"\$")


def page(report: Report, pictures: dict[str, bytes]) -> str:
    """The HTML page; `pictures` are the PNGs of the sections that have plots."""
    title = html.escape(report.title)
    parts = [f"<h1>{title}</h1>", *(f"<p>{html.escape(note)}</p>" for note in report.notes)]
    if len(report.sections) > 1:
        links = (
            f'<li{_mark(report, section)}><a href="#{section.name}">{html.escape(section.title)}</a></li>'
            for section in report.sections
        )
        parts.append(f"<nav><ol>{''.join(links)}</ol></nav>")
    for section in report.sections:
        parts.append(f'<section id="{section.name}"{_mark(report, section)}>')
        parts += _section(section, pictures.get(section.name))
        parts.append("</section>")
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}"><title>{title}</title><style>{STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def _mark(report: Report, section: sections_lib.Section) -> str:
    return ' class="failed"' if section.name in report.failed else ""


def _section(section: sections_lib.Section, picture: bytes | None) -> list[str]:
    """Heading, sentences, picture, tables, and the command that makes the figures again."""
    parts = [f"<h2>{html.escape(section.title)}</h2>", *(f"<p>{html.escape(text)}</p>" for text in section.text)]
    if picture is not None:
        about = html.escape("; ".join(plot.title for plot in section.plots), quote=True)
        data = base64.b64encode(picture).decode()
        parts.append(f'<div class="wide"><img alt="{about}" src="data:image/png;base64,{data}"></div>')
    parts += [table(each) for each in section.tables]
    if section.command:
        parts.append(f'<div class="label">Made by</div><pre>{html.escape(section.command)}</pre>')
    return parts


def table(content: sections_lib.Table) -> str:
    """An HTML table; every cell is escaped. Columns that hold more than numbers are set as words."""
    width = len(content.header)
    words = [
        column == 0 or not all(NUMBER.fullmatch(row[column]) for row in content.rows if column < len(row))
        for column in range(width)
    ]

    def line(tag: str, cells: Sequence[str]) -> str:
        marks = [' class="words"' if is_words else "" for is_words in [*words, *[True] * len(cells)]]
        return "".join(f"<{tag}{mark}>{html.escape(cell)}</{tag}>" for mark, cell in zip(marks, cells, strict=False))

    caption = f"<caption>{html.escape(content.caption)}</caption>" if content.caption else ""
    body = "\n".join(f"<tr>{line('td', row)}</tr>" for row in content.rows)
    head = f"<thead><tr>{line('th', content.header)}</tr></thead>"
    return f'<div class="wide"><table>{caption}{head}<tbody>\n{body}\n</tbody></table></div>'


def number(value: float | int | None) -> str:
    """A number with four significant digits; a dash for none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"

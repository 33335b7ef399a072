"""A folder that shows measurements: `report.json` (all numbers), `index.html` and a PNG of each section's plots.

The page is one file, `page.html` filled in: it needs no other and no network. Pictures are inside it, and all text is
escaped.
"""

import base64
import dataclasses
import io
import json
import os
import pathlib
import re
import textwrap
from collections.abc import Sequence
from typing import Any

import jinja2

from allmem_jax.reporting import sections as sections_lib
from allmem_jax.storage import files

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
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    templates = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    encoded = {name: base64.b64encode(picture).decode() for name, picture in pictures.items()}
    template = templates.get_template("page.html")
    return template.render(report=report, pictures=encoded, columns_of_words=columns_of_words)


def columns_of_words(table: sections_lib.Table) -> list[bool]:
    """Which columns of a table are set as words: the first, and those that hold more than numbers."""
    return [
        column == 0 or not all(NUMBER.fullmatch(row[column]) for row in table.rows if column < len(row))
        for column in range(max(map(len, (table.header, *table.rows))))
    ]


def number(value: float | int | None) -> str:
    """A number with four significant digits; a dash for none."""
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4g}"

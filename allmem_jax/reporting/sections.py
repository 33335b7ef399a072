"""What one measurement has to show: sentences, tables and plots, as plain data that any report can hold.

A section is made by the code that measured, saved as JSON, and drawn by `allmem_jax.reporting.page`. It carries the
command that makes its figures again.
"""

import dataclasses
import json
import os
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from allmem_jax.storage import files


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of text under a caption; the first column holds the names."""

    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Plot:
    """Lines over one axis.

    Attributes:
      title, x_label, y_label: of the plot, with units.
      lines: name -> (xs, ys).
      log_x, log_y: whether the axes are logarithmic.
      mark_x: an x that a dotted line marks (the window, for instance), or None.
    """

    title: str
    x_label: str
    y_label: str
    lines: dict[str, tuple[tuple[float, ...], tuple[float, ...]]]
    log_x: bool = False
    log_y: bool = False
    mark_x: float | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """One part of a report.

    Attributes:
      name: short, unique, fit for a file name.
      title: heading.
      command: what a user types to get these figures again.
      text: paragraphs; the first says what was found.
      tables, plots: as above.
      data: the raw numbers, any JSON value.
    """

    name: str
    title: str
    command: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    data: Any = None


def plain(table: Table) -> str:
    """A table as lines of text: its caption, then columns."""
    rows = [table.header, *table.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])]) for first, *rest in rows)
    return "\n".join([table.caption, *lines])


def command(name: str, *words: Any, **options: Any) -> str:
    """The `allmem` command that a user types: `words` and the options that are set; True is a flag, a tuple a list."""
    return _line(["allmem", name, *words], options)


def program(module: str, settings: Any, positional: Sequence[str] = ()) -> str:
    """The command line that gives `settings` (a dataclass) again: its fields that are not at their defaults.

    `positional` are the fields that are given without their names; they come first.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(settings)}
    changed = {name: value for name, value in vars(settings).items() if value != defaults[name]}
    words = [changed.pop(name) for name in positional if name in changed]
    return _line(["python", "-m", module, *words], changed)


def _line(words: Sequence[Any], options: Mapping[str, Any]) -> str:
    line = [*map(str, words)]
    for option, value in options.items():
        if value is None or value is False or value == ():
            continue
        values = () if value is True else value if isinstance(value, tuple) else (value,)
        line += [f"--{option.replace('_', '-')}", *map(str, values)]
    return shlex.join(line)


def save(path: str | os.PathLike[str], section: Section) -> None:
    """Writes a section as JSON, whole or not at all."""
    files.write(path, json.dumps(dataclasses.asdict(section), indent=1))


def load(path: str | os.PathLike[str]) -> Section:
    """Reads what `save` wrote; ValueError on anything else."""
    try:
        return parse(json.loads(pathlib.Path(path).read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{path} is not a section of a report: {error}") from None


def parse(fields: Any) -> Section:
    """The section whose fields JSON holds, as `dataclasses.asdict` gives them; ValueError on anything else."""
    try:
        tables = tuple(
            Table(table["caption"], tuple(table["header"]), tuple(tuple(row) for row in table["rows"]))
            for table in fields["tables"]
        )
        plots = tuple(
            Plot(**{**plot, "lines": {name: (tuple(xs), tuple(ys)) for name, (xs, ys) in plot["lines"].items()}})
            for plot in fields["plots"]
        )
        return Section(**{**fields, "text": tuple(fields["text"]), "tables": tables, "plots": plots})
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from None

"""Recall by number of pairs and by distance, AllMem beside Mamba-2, the gated delta rule and the controls.

    python -m train.experiments.recall_grid       # everything, one seed; what is done is not repeated
    python -m train.experiments.recall_grid --settings mqar --entrants allmem delta --seeds 0 1 2

Each setting, entrant and seed is trained on its own (see `train.experiments.recall`) and leaves
OUT/SETTING-ENTRANT-SEED-KEY.json. Commands on the same OUT share the work: what has a result is read. OUT/section.json
is the part of a report.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tqdm
import tyro

from allmem_jax.reporting import kept, sections
from allmem_jax.storage import stores
from train import errors
from train.experiments import recall

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """One comparison.

    Attributes:
      title: for tables and plots.
      config: of every entrant.
      entrants: name -> the variant, and the fields of its model that differ from the config's.
    """

    title: str
    config: recall.RecallConfig
    entrants: dict[str, tuple[recall.Variant, dict[str, Any]]]

    def of(self, name: str, seed: int, steps: int | None = None) -> recall.RecallConfig:
        """The config of one run; it has one variant."""
        variant, changes = self.entrants[name]
        model = dataclasses.replace(self.config.model, **changes)
        steps = self.config.steps if steps is None else steps
        return dataclasses.replace(self.config, variants=(variant,), model=model, seed=seed, steps=steps)


EQUAL_PARAMETERS: dict[str, tuple[recall.Variant, dict[str, Any]]] = {name: (name, {}) for name in recall.VARIANTS}
EQUAL_STATE: dict[str, tuple[recall.Variant, dict[str, Any]]] = {  # as many bytes of recurrent state as "allmem"
    "mamba2_state": ("mamba2", {"d_mem": 54}),
    "delta_state": ("delta", {"d_mem": 66}),
}
ENTRANTS = EQUAL_PARAMETERS | EQUAL_STATE
SMALL: dict[str, Any] = dict(eval_gaps=(1, 4, 16))
SETTINGS = {
    "mqar": Setting(
        "Key-value pairs",
        dataclasses.replace(recall.TASKS["mqar"], pairs=(1, 2, 4, 8, 16), steps=1600, target=0.99, **SMALL),
        ENTRANTS,
    ),
    "passkey": Setting(
        "Passkey of five digits",
        dataclasses.replace(recall.TASKS["passkey"], steps=600, target=0.99, **SMALL),
        EQUAL_PARAMETERS,
    ),
}


@dataclasses.dataclass(frozen=True)
class GridConfig:
    """Trains what has no result yet, then prints the tables and writes OUT/section.json."""

    out: pathlib.Path = pathlib.Path("out/recall_grid")
    """Folder of the results."""
    settings: tuple[str, ...] = tuple(SETTINGS)
    """Which comparisons."""
    entrants: tuple[str, ...] = tuple(ENTRANTS)
    """Which of their entrants; "mamba2_state" and "delta_state" have AllMem's bytes of state, not its parameters."""
    seeds: tuple[int, ...] = (0,)
    """Of parameters and data."""
    steps: int | None = None
    """Of training, in place of the settings' own."""

    def __post_init__(self):
        for field, names, allowed in (("settings", self.settings, SETTINGS), ("entrants", self.entrants, ENTRANTS)):
            for name in names:
                if name not in allowed:
                    raise ValueError(f"{field}={name!r} is not one of {', '.join(map(repr, allowed))}")


def trained(config: recall.RecallConfig) -> Row:
    """The row of one run, with the settings that it comes from."""
    return {"config": dataclasses.asdict(config), **recall.train(config, config.variants[0])}


def run(settings: GridConfig) -> dict[str, dict[str, list[Row]]]:
    """All rows, by setting and entrant, in the order of the seeds."""
    runs = [
        (name, entrant, seed)
        for name in settings.settings
        for entrant in SETTINGS[name].entrants
        if entrant in settings.entrants
        for seed in settings.seeds
    ]
    if not runs:
        raise ValueError(f"settings={settings.settings} have none of entrants={settings.entrants}, or there is no seed")
    found: dict[str, dict[str, list[Row]]] = {}
    for name, entrant, seed in tqdm.tqdm(runs, desc="recall", disable=None):
        config = SETTINGS[name].of(entrant, seed, settings.steps)
        work, part = functools.partial(trained, config), f"{name}-{entrant}-{seed}"
        row = kept.result(settings.out, part, dataclasses.asdict(config), work, say=tqdm.tqdm.write)
        found.setdefault(name, {}).setdefault(entrant, []).append(row)
    return found


def accuracy(rows: list[Row]) -> dict[tuple[int, int], float]:
    """(gap, pairs) -> accuracy, the mean of the seeds."""
    keys = [(gap, pairs) for gap, pairs, _ in rows[0]["accuracy"]]
    means = np.mean([[value for _, _, value in row["accuracy"]] for row in rows], axis=0)
    return dict(zip(keys, means.tolist(), strict=True))


def break_point(rows: list[Row]) -> int:
    """The largest number of pairs that the seeds' mean answers with 0.9 or more at training's distance, or 0."""
    found = accuracy(rows)
    trained = rows[0]["config"]["gap"][1]
    return max((pairs for (gap, pairs), value in found.items() if gap == trained and value >= 0.9), default=0)


def table(title: str, entrants: dict[str, list[Row]]) -> sections.Table:
    """One line per entrant: sizes, steps, break point, and accuracy by gap / pairs."""
    columns = list(accuracy(next(iter(entrants.values()))))
    header = ("mixer", "parameters", "recurrent KB", "cache KB", "steps", "break point")
    return sections.Table(
        f"{title}: accuracy by tokens of gap / number of pairs",
        (*header, *(f"{gap} / {pairs}" for gap, pairs in columns)),
        tuple(
            (
                entrant,
                f"{rows[0]['parameters']:,}",
                f"{rows[0]['recurrent'] / 1e3:.1f}",
                f"{rows[0]['cache'] / 1e3:.1f}",
                ", ".join(str(row["steps"]) for row in rows),
                str(break_point(rows)),
                *(f"{value:.3f}" for value in accuracy(rows).values()),
            )
            for entrant, rows in entrants.items()
        ),
    )


def plots(title: str, entrants: dict[str, list[Row]]) -> Iterator[sections.Plot]:
    """Accuracy by pairs (where there are several), by distance at the fewest pairs, and the first seed's training."""
    one = next(iter(entrants.values()))[0]["config"]
    found = {entrant: accuracy(rows) for entrant, rows in entrants.items()}
    trained, fewest = one["gap"][1], min(one["pairs"])

    def lines(axis: int, other: int) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
        chosen = {
            entrant: [(key[axis], value) for key, value in points.items() if key[1 - axis] == other]
            for entrant, points in found.items()
        }
        return {entrant: _columns(points) for entrant, points in chosen.items()}

    if len(one["pairs"]) > 1:
        yield sections.Plot(f"{title}: by number of pairs", "pairs", "accuracy", lines(1, trained), log_x=True)
    what = f"{title}: by distance, {fewest} pair{'s' if fewest > 1 else ''}"
    yield sections.Plot(what, "tokens of gap", "accuracy", lines(0, fewest), log_x=True, mark_x=trained)
    curves = {entrant: _columns([(s, a) for s, _, a in rows[0]["curve"]]) for entrant, rows in entrants.items()}
    yield sections.Plot(f"{title}: training, seed {one['seed']}", "steps", "accuracy", curves)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def finding(title: str, entrants: dict[str, list[Row]]) -> str:
    """What was found at training's distance: break points, or accuracies where there is one number of pairs."""
    config = next(iter(entrants.values()))[0]["config"]
    gap, counts = config["gap"][1], config["pairs"]
    if len(counts) == 1:
        listed = ", ".join(f"{name} {accuracy(rows)[gap, counts[0]]:.3f}" for name, rows in entrants.items())
        return f"{title}: accuracy {gap} tokens later is {listed}."
    listed = ", ".join(f"{name} {break_point(rows)}" for name, rows in entrants.items())
    return f"{title}: the most (of up to {max(counts)}) that 0.9 or more are right of {gap} tokens later: {listed}."


def section(settings: GridConfig, results: dict[str, dict[str, list[Row]]]) -> sections.Section:
    """The part of a report."""
    seeds = len(next(iter(next(iter(results.values())).values())))
    method = (
        f"Models of 2 layers trained from scratch, mean of {seeds} seed{'s' if seeds > 1 else ''}. Each sequence draws "
        "its number of pairs and where on the chunk grid they begin. The pairs lie beyond the reach of all windows and "
        "outside the sinks. Distances to the right of the dotted line were not trained: they show generalisation in "
        "length. write_off is AllMem trained with the memory's writing switched off. All have as many parameters as "
        "AllMem, but for swa and full, which have no memory, and for mamba2_state and delta_state, which have AllMem's "
        "bytes of recurrent state instead."
    )
    titled = [(SETTINGS[name].title, entrants) for name, entrants in results.items()]
    return sections.Section(
        name="recall_from_scratch",
        title="Recall from scratch",
        command=sections.program("train.experiments.recall_grid", settings),
        text=(" ".join(finding(*each) for each in titled), method),
        tables=tuple(table(*each) for each in titled),
        plots=tuple(plot for each in titled for plot in plots(*each)),
        data=results,
    )


def main(settings: GridConfig) -> sections.Section:
    """Trains, prints and writes."""
    stores.local_only(settings.out, "out")
    made = section(settings, run(settings))
    sections.save(settings.out / "section.json", made)
    print(*map(sections.plain, made.tables), made.text[0], sep="\n")
    return made


if __name__ == "__main__":
    with errors.one_line():
        main(tyro.cli(GridConfig, prog="python -m train.experiments.recall_grid", description=__doc__))

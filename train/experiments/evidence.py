"""Does the memory remember? Every mixer distilled with several seeds, each beside its control with writing off.

    python -m train.experiments.evidence                         # SmolLM2-135M, small enough for a CPU
    python -m train.experiments.evidence configs/smollm2_3m.py --length 4096      # with 3 million tokens, on a GPU

The control is the same module with the same start, steps, learning rate and rows, whose writing is switched off: what
it gains is adaptation. One that is then silent, so that it cannot learn, is not trained. Every mixer has the learning
rate that suits it best: the one whose loss is the lowest in the last quarter of the first seed's steps.

A memory works where every seed of it beats every seed of every control; elsewhere the result says "adapter-like". Two
things are asked on held-out books: the share of the KL gap beyond the window that is closed, and whether generated
answers name what was said before the window. All that is finished is kept and found again.
"""

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import tyro

from allmem_jax.evaluation import divergence, recall
from allmem_jax.model import config as config_lib
from allmem_jax.reporting import kept, sections
from allmem_jax.reporting import page as page_lib
from allmem_jax.storage import jit_cache, stores
from train import errors, fetch, finetune
from train import recipe as recipe_lib
from train.data import books, stream
from train.loop import batches, metrics, models
from train.recipe import FinetuneConfig

Mixer = Literal["allmem", "mamba2", "delta"]


@dataclasses.dataclass(frozen=True)
class EvidenceConfig:
    """What is distilled, and how it is judged."""

    recipe: Annotated[str, tyro.conf.Positional] = "configs/evidence.py"
    """Of every run; its mixer, seed and output folder are set here. One without texts gets SmolLM2-135M-Instruct and
    the training books."""
    out: Path = Path("out/evidence")
    """Folder for the runs and section.json, which `allmem report --include` shows."""
    mixers: tuple[Mixer, ...] = ("allmem", "mamba2", "delta")
    """Memories to compare."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each is of the memory's start and of the rows."""
    rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3)
    """Learning rates to choose each mixer's from."""
    length: int = 512
    """Tokens of a held-out sequence."""
    sequences: int = 2
    """Sequences from each held-out book."""
    samples: int = 16
    """Needles that each model is asked for; 0 asks none."""

    def __post_init__(self):
        if not self.mixers or not self.seeds or not self.rates:
            raise ValueError(
                f"mixers={self.mixers}, seeds={self.seeds} and rates={self.rates} must name at least one each"
            )


class Run(NamedTuple):
    """One training run: a mixer, a seed, its learning rate, and whether it writes."""

    mixer: Mixer
    seed: int
    learning_rate: float
    write: bool

    @property
    def folder(self) -> str:
        """Of what it made."""
        return f"{self.mixer}-{self.seed}-{self.learning_rate:g}" + ("" if self.write else "-control")


def called(mixer: Mixer, seed: int, write: bool) -> str:
    """The name of a run in results."""
    return f"{mixer}-{seed}" + ("" if write else "-control")


def run(config: EvidenceConfig) -> sections.Section:
    """Trains, judges and tells. Returns the section, which is also in OUT/section.json."""
    stores.local_only(config.out, "out")
    recipe = recipe_lib.read_recipe(config.recipe)
    if not recipe.texts:
        texts = books.write(config.out / "texts")
        recipe = dataclasses.replace(recipe, model=str(fetch.fetch("smollm2")), texts=(str(texts),))
    recipe = dataclasses.replace(recipe, export=False)
    pretrained = models.identified(models.read(recipe))
    rows = batches.read_rows(recipe, pretrained, recipe.texts)
    folder = config.out / kept.key(learnt(recipe, pretrained, rows))
    kept.say(f"what each run makes is kept in {folder}")
    memories = functools.cache(lambda mixer, seed: start(recipe, pretrained, mixer, seed))

    @functools.cache  # the first seed is tuned on runs of which one is then its own
    def train(each: Run) -> None:
        distil(each, recipe, memories(each.mixer, each.seed), rows, folder)

    losses = {mixer: tune(mixer, config, train, folder) for mixer in config.mixers}
    results = []
    for seed in config.seeds:
        runs = [Run(mixer, seed, best(losses[mixer]), write) for mixer in config.mixers for write in (True, False)]
        for each in runs:
            if learns(each, memories(each.mixer, seed).config):
                train(each)
        variants = [variant(each, memories(each.mixer, seed), folder) for each in runs]
        results.append(judge(config, pretrained, variants, folder, runs))
    section = describe(config, recipe, results, losses)
    sections.save(config.out / "section.json", section)
    page = page_lib.write(config.out, page_lib.Report("Does the memory remember?", (section,)))
    for sentence in section.text:
        kept.say(sentence)
    kept.say(f"the report is {page.resolve()}")
    return section


def learnt(recipe: FinetuneConfig, pretrained: models.Pretrained, rows: stream.Source) -> dict[str, Any]:
    """What the training of all runs depends on, beside what tells them apart."""
    own = Run._fields
    return {name: value for name, value in finetune.identity(recipe, pretrained, rows).items() if name not in own}


def start(recipe: FinetuneConfig, pretrained: models.Pretrained, mixer: Mixer, seed: int) -> models.Pretrained:
    """The model with a fresh memory."""
    seeded = dataclasses.replace(recipe, mixer=mixer, seed=seed)
    fields = pretrained.config.replace(mixer=mixer)
    memory = models.new_memory(seeded, fields, pretrained.backbone, pretrained.tokenizer)
    return pretrained._replace(config=fields, memory=memory)


def distil(each: Run, recipe: FinetuneConfig, start: models.Pretrained, rows: stream.Source, folder: Path) -> None:
    """Trains one run, or finds it trained, from the memory of its mixer and seed."""
    kept.say(f"distilling {each.folder}: {recipe.steps} steps of {recipe.batch * recipe.seq_length} tokens")
    recipe = dataclasses.replace(recipe, **each._asdict(), out=str(folder / each.folder))
    finetune.run(recipe, start._replace(config=start.config.replace(write=each.write)), rows)


def learns(each: Run, config: config_lib.ModelConfig) -> bool:
    """Whether training changes anything: a memory that writes nothing may add nothing, and has no gradient then."""
    return each.write or not (config.mixer == "delta" or (config.mixer == "allmem" and config.read_out == "difference"))


def tune(mixer: Mixer, config: EvidenceConfig, train: Callable[[Run], None], folder: Path) -> dict[float, float]:
    """Learning rate -> mean loss over the last quarter of the first seed's steps."""
    found = {}
    for rate in config.rates:
        each = Run(mixer, config.seeds[0], rate, True)
        train(each)
        lines = metrics.read_metrics(folder / each.folder / "metrics.jsonl")
        found[rate] = statistics.fmean(line["loss"] for line in lines[-max(1, len(lines) // 4) :])
    return found


def best(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss; one that diverged has none."""
    return min(losses, key=lambda rate: losses[rate] if math.isfinite(losses[rate]) else math.inf)


def variant(each: Run, start: models.Pretrained, folder: Path) -> divergence.Variant:
    """What a run trained, or what a silent control has from the start, as something to evaluate."""
    weights = models.trained_memory(folder / each.folder) if learns(each, start.config) else start.memory
    return divergence.Variant(
        called(each.mixer, each.seed, each.write), start.config.replace(write=each.write), weights
    )


def judge(
    config: EvidenceConfig,
    pretrained: models.Pretrained,
    variants: Sequence[divergence.Variant],
    folder: Path,
    runs: Sequence[Run],
) -> dict[str, Any]:
    """{"evaluation": of `distance`, "answers": of `answers`} for the models of a seed's runs."""
    given = {"books": fetch.SOURCES["shakespeare"].sha256, "runs": [each.folder for each in runs]}
    evaluation = kept.result(
        folder,
        f"evaluation-{runs[0].seed}",
        given | {"length": config.length, "sequences": config.sequences},
        lambda: distance(config, pretrained, variants),
        what=f"comparing the models of seed {runs[0].seed} with the original",
    )
    told = {}
    if config.samples:
        told = kept.result(
            folder,
            f"answers-{runs[0].seed}",
            given | {"samples": config.samples},
            lambda: answers(config, pretrained, variants, folder),
            what=f"asking the models of seed {runs[0].seed}",
        )
    return {"evaluation": evaluation, "answers": told}


def distance(
    config: EvidenceConfig, pretrained: models.Pretrained, variants: Sequence[divergence.Variant]
) -> dict[str, Any]:
    """`divergence.evaluate` on the held-out books."""
    texts = {book.title: book.text for book in books.heldout_books()}
    tokens = divergence.cut_texts(pretrained.tokenizer, texts, config.length, config.sequences)
    entrants = [*divergence.standard_variants(pretrained.config, None), *variants]
    return divergence.evaluate(pretrained.config, pretrained.backbone, tokens, entrants)


def answers(
    config: EvidenceConfig, pretrained: models.Pretrained, variants: Sequence[divergence.Variant], folder: Path
) -> dict[str, list[bool]]:
    """Variant -> one bool for each needle in the held-out books."""
    held_out = {book.title: book.text for book in books.heldout_books()}
    original = divergence.Variant(divergence.ORIGINAL, pretrained.config.replace(mixer="full"))
    settings = recall.Settings(("needle",), (4 * pretrained.config.window,), config.samples, chat=False)
    found = recall.measure(
        settings,
        pretrained.backbone,
        pretrained.tokenizer,
        held_out,
        [original, *divergence.standard_variants(pretrained.config, None), *variants],
        parts=folder / "answers",
        source=folder.name,
    )
    return {row["variant"]: [example["correct"] for example in row["examples"]] for row in found}


def describe(
    config: EvidenceConfig,
    recipe: FinetuneConfig,
    results: Sequence[dict[str, Any]],
    losses: Mapping[Mixer, Mapping[float, float]],
) -> sections.Section:
    """Tables, plot and verdicts from what `judge` found for each seed, and `tune` for each mixer."""
    closed, told = {}, {}
    for mixer in config.mixers:
        for write in (True, False):
            names = [called(mixer, seed, write) for seed in config.seeds]
            pairs = list(zip(names, results, strict=True))
            closed[mixer, write] = [divergence.gap_closed(row["evaluation"], name)["all texts"] for name, row in pairs]
            told[mixer, write] = [statistics.fmean(row["answers"].get(name, [0])) for name, row in pairs]
    tables = [_table("Share of the KL gap beyond the window that is closed", config.mixers, closed)]
    sentences = [_verdict(mixer, "of the gap", closed) for mixer in config.mixers]
    if config.samples:
        base = [
            f"{name}: {statistics.fmean(results[0]['answers'][name]):.0%}"
            for name in (divergence.ORIGINAL, divergence.SWA)
        ]
        tables.append(_table(f"Generated answers that are right ({', '.join(base)})", config.mixers, told))
        sentences += [_verdict(mixer, "of the answers", told) for mixer in config.mixers]
    tables.append(_rates_table(config, losses))
    tokens = recipe.steps * recipe.batch * recipe.seq_length
    sentences.append(
        f"{Path(recipe.model).stem}, window {recipe.window[1]}, sinks {recipe.sinks[1]}, chunk {max(recipe.chunk)}. "
        f"Each of {len(config.seeds)} seeds saw {tokens} tokens, {recipe.lessons:.0%} of the rows lessons, "
        f"and is judged on {config.sequences} sequences of {config.length} tokens of each held-out book. A control is "
        "the same module, start, steps and rows with its writing off. A memory works where every seed of it beats "
        "every seed of every control: a linear memory that writes nothing is silent, as is the difference of one that "
        "is not linear, and what is silent cannot adapt."
    )
    rates = {mixer: {f"{rate:g}": loss for rate, loss in found.items()} for mixer, found in losses.items()}
    data_ = {"closed": _flat(closed), "answers": _flat(told), "losses": rates, "results": list(results)}
    return sections.Section(
        "evidence",
        "Distilled mixers beside their controls",
        sections.program("train.experiments.evidence", config, positional=("recipe",)),
        tuple(sentences),
        tuple(tables),
        (_plot(config, results),),
        data_,
    )


def works(mixer: str, values: dict[Any, list[float]]) -> bool:
    """Whether a memory beats all controls beyond the spread of the seeds.

    Args:
      mixer: one of those in `values`; its own control may be silent, and so no measure of what adapting gains.
      values: (mixer, whether it writes) -> one number for each seed.
    """
    return min(values[mixer, True]) > max(max(found) for (_, write), found in values.items() if not write)


def _verdict(mixer: str, what: str, values: dict[Any, list[float]]) -> str:
    found = "the memory works" if works(mixer, values) else "adapter-like"
    return f"{mixer}, {found}: {_spread(values[mixer, True])} {what}, its control {_spread(values[mixer, False])}."


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.1%} ({min(values):.1%} to {max(values):.1%})"


def _table(caption: str, mixers: Sequence[str], values: dict[Any, list[float]]) -> sections.Table:
    rows = []
    for mixer in mixers:
        memory, control = values[mixer, True], values[mixer, False]
        differences = [100 * (ours - theirs) for ours, theirs in zip(memory, control, strict=True)]
        paired = f"{statistics.fmean(differences):+.2f} ({min(differences):+.2f} to {max(differences):+.2f})"
        verdict = "works" if works(mixer, values) else "adapter-like"
        rows.append((mixer, _spread(memory), _spread(control), paired, verdict))
    header = ("mixer", "memory: mean (seeds)", "control: mean (seeds)", "difference, points", "verdict")
    return sections.Table(caption, header, tuple(rows))


def _rates_table(config: EvidenceConfig, losses: Mapping[Mixer, Mapping[float, float]]) -> sections.Table:
    rows = []
    for mixer, found in losses.items():
        chosen = best(found)
        edge = len(config.rates) > 1 and chosen in (min(config.rates), max(config.rates))
        rows.append((mixer, *(f"{found[rate]:.4f}" for rate in config.rates), f"{chosen:g}" + ", at the edge" * edge))
    header = ("mixer", *(f"rate {rate:g}" for rate in config.rates), "chosen")
    return sections.Table(f"Loss at the end of seed {config.seeds[0]}, by learning rate", header, tuple(rows))


def _plot(config: EvidenceConfig, results: Sequence[dict[str, Any]]) -> sections.Plot:
    """KL that is removed, by position: mean over texts and seeds."""
    first = results[0]["evaluation"]
    lines = {}
    for mixer in config.mixers:
        for write in (True, False):
            curves = []
            for seed, row in zip(config.seeds, results, strict=True):
                for rows in row["evaluation"]["texts"].values():
                    name = called(mixer, seed, write)
                    curves.append(np.subtract(rows[divergence.SWA]["kl_curve"], rows[name]["kl_curve"]))
            label = mixer if write else f"{mixer}, control"
            lines[label] = (tuple(first["positions"]), tuple(float(y) for y in np.mean(curves, axis=0)))
    title = "What distillation removes of the KL from the original"
    return sections.Plot(title, "position (tokens)", "nats per token", lines, mark_x=first["window"])


def _flat(values: dict[Any, list[float]]) -> dict[str, list[float]]:
    return {mixer if write else f"{mixer}, control": found for (mixer, write), found in values.items()}


def main() -> None:
    """The command."""
    jit_cache.keep()  # seeds share their programs
    with errors.one_line(fetch.FetchError):
        run(tyro.cli(EvidenceConfig, prog="python -m train.experiments.evidence", description=__doc__))


if __name__ == "__main__":
    main()

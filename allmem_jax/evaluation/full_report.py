"""Everything that this machine can say of a converted model, as one page: `allmem report`.

Each part is measured on its own and kept as JSON in the folder's `sections`, under a key of all that decides it. What
is there is reused; what fails is shown as failed, and the rest goes on.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tqdm

import allmem_jax
from allmem_jax.checkpoints import layout
from allmem_jax.checkpoints import load as load_lib
from allmem_jax.evaluation import (
    cost,
    divergence_report,
    haystacks,
    latency,
    longbench,
    longbench_data,
    recall,
    recall_report,
)
from allmem_jax.evaluation import questions as questions_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import kept, sections
from allmem_jax.reporting import page as page_lib

PARTS = ("distance", "answers", "cost", "latency")  # those that a run can skip; LongBench is asked for


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to measure.

    Attributes:
      model: converted folder.
      texts: UTF-8 text files; none means Python's documentation.
      out: what the page calls the report's folder, which may be the URL that it is a copy of.
      length: tokens of a sequence that is compared with the original; None means 2048, or two windows if that is more.
      sequences: of them, from each text.
      prompt_length: tokens of a long prompt; None means 512, or four windows if that is more and the model reads it.
      samples: questions of each kind.
      questions: JSON lines about the texts (`questions.Question`), or None.
      longbench, suite: folder with the files of a suite, or None.
      skip: names out of `PARTS`.
      include: section files that other commands wrote.
      dtype: of weights and activations.
    """

    model: pathlib.Path
    texts: tuple[pathlib.Path, ...] = ()
    out: str = "out/report"
    length: int | None = None
    sequences: int = 2
    prompt_length: int | None = None
    samples: int = 8
    questions: pathlib.Path | None = None
    longbench: pathlib.Path | None = None
    suite: str = "longbench"
    skip: tuple[str, ...] = ()
    include: tuple[pathlib.Path, ...] = ()
    dtype: str = "float32"

    def __post_init__(self):
        for name in ("length", "sequences", "prompt_length", "samples"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


class Given(NamedTuple):
    """What the parts are made from: `load` returns the model's config, parameters and tokenizer.

    `sections` is the folder in which what was measured is kept.
    """

    settings: Settings
    sections: pathlib.Path
    config: config_lib.ModelConfig
    texts: dict[str, str]
    load: Callable[[], tuple[config_lib.ModelConfig, lm.Params, Any]]


class Part(NamedTuple):
    """One section that is measured here.

    Attributes:
      name: of the section.
      title, command: of the section where measuring fails.
      settings: JSON-able, all that decides the result beside the model, its dtype, the device and the versions.
      measure: returns the section.
    """

    name: str
    title: str
    command: str
    settings: dict[str, Any]
    measure: Callable[[], sections.Section]


def run(
    settings: Settings, folder: pathlib.Path, load: Callable[[], tuple[Any, Any, Any]]
) -> tuple[pathlib.Path, tuple[str, ...]]:
    """Measures what is not there yet and writes the page.

    Args:
      settings: see there.
      folder: for the page and what was measured.
      load: as in `Given`; called when the first part needs it.

    Returns:
      The path of the page, and the names of the parts that failed.

    Raises:
      ValueError, OSError: an input cannot be read; before anything is measured.
    """
    config = read_config(settings.model).replace(dtype=settings.dtype)
    given = Given(
        settings, folder / "sections", config, divergence_report.read_texts(settings.texts), functools.cache(load)
    )
    included = [sections.load(path) for path in settings.include]
    todo = [part for part in parts(given) if part.name not in settings.skip]
    page_lib.check_names(["summary", *(part.name for part in todo), *(section.name for section in included)])
    folder.mkdir(parents=True, exist_ok=True)
    machine = latency.hardware()
    common = {name: machine[name] for name in ("device", "jax")}
    common |= {"model": recall.fingerprint(settings.model), "dtype": settings.dtype}
    finished = [finish(part, given.sections, common) for part in todo]
    failed = tuple(section.name for section, ok in finished if not ok)
    shown = [*(section for section, _ in finished), *included]
    machine |= {"allmem-jax": allmem_jax.__version__}
    whole = (summary(settings, config, machine, shown), *shown)
    return page_lib.write(folder, page_lib.Report(f"Report on {settings.model.name}", whole, (), failed)), failed


def read_config(folder: pathlib.Path) -> config_lib.ModelConfig:
    """The config of a converted model, without its weights."""
    if not (folder / layout.ALLMEM_CONFIG).is_file():
        raise FileNotFoundError(f"{folder} is not a converted model: make one of it with allmem convert {folder} OUT")
    return load_lib.read_config(folder)


def finish(part: Part, folder: pathlib.Path, common: dict[str, Any]) -> tuple[sections.Section, bool]:
    """The part's section, measured or found in `folder`; and whether that went well. `common` decides all parts."""

    def work() -> dict[str, Any]:
        return dataclasses.asdict(dataclasses.replace(part.measure(), name=part.name))

    try:
        return sections.parse(kept.result(folder, part.name, common | part.settings, work, say=say)), True
    except Exception as error:  # whatever one part meets, the others go on
        line = " ".join(f"{type(error).__name__}: {error}".split())
        say(f"{part.name} failed: {line}")
        return sections.Section(part.name, part.title, part.command, (f"This part failed: {line}",)), False


def parts(given: Given) -> list[Part]:
    """What can be measured, in the page's order; nothing runs yet.

    Raises:
      ValueError, OSError: the questions or the files of LongBench cannot be read.
    """
    made = [_distance(given), _answers(given), _cost(given), _latency(given)]
    return [*made, _longbench(given)] if given.settings.longbench else made


def _distance(given: Given) -> Part:
    """KL from the original by position."""
    settings, texts = given.settings, given.texts
    length, sequences = settings.length or max(2048, 2 * given.config.window), settings.sequences
    sizes = {"length": length, "sequences": sequences}
    command = sections.command("evaluate", settings.model, *settings.texts, **sizes, dtype=settings.dtype)

    def measure() -> sections.Section:
        loaded = given.load()
        return divergence_report.measure(*loaded, texts, length=length, sequences=sequences, command=command)

    return Part("distance", divergence_report.TITLE, command, sizes | {"texts": texts}, measure)


def _answers(given: Given) -> Part:
    """Generated answers; what each variant has answered to a task is kept on its own."""
    settings, texts = given.settings, given.texts
    longest = settings.prompt_length or min(max(512, 4 * given.config.window), given.config.max_length)
    questions = questions_lib.read_questions(settings.questions) if settings.questions else []
    sizes = {"lengths": longest, "samples": settings.samples}
    options = sizes | {"dtype": settings.dtype, "questions": settings.questions}
    command = sections.command("recall", settings.model, *settings.texts, **options)
    identity = sizes | {"texts": texts, "questions": [dataclasses.asdict(question) for question in questions]}

    def measure() -> sections.Section:
        config, params, tokenizer = given.load()
        asked = recall.defaults(config, bool(questions))
        limits = dict(window=config.window, sinks=config.sinks)
        maker = haystacks.Prompts(tokenizer, texts, chat=asked.chat, questions=questions, **limits)
        left_out = {name: why for name in asked.tasks if (why := _misfit(maker, name, longest, settings.samples))}
        fitting = tuple(name for name in asked.tasks if name not in left_out)
        if not fitting:
            raise ValueError(f"no question fits: {'; '.join(left_out.values())}")
        asked = dataclasses.replace(asked, tasks=fitting, lengths=(longest,), samples=settings.samples)
        backbone, variants = recall.variants(config, params)
        exact = recall.command(settings.model, settings.texts, settings.questions, asked, config)
        section = recall_report.section(
            asked,
            backbone,
            tokenizer,
            texts,
            variants,
            questions=questions,
            parts=given.sections / "answers",
            source=recall.fingerprint(settings.model),
            command=exact,
        )
        return dataclasses.replace(section, text=(*section.text, *(f"Left out: {why}." for why in left_out.values())))

    return Part("answers", "Answers to questions about what was read", command, identity, measure)


def _misfit(maker: haystacks.Prompts, task: str, length: int, samples: int) -> str:
    """Why not all prompts of a task can be made, or nothing."""
    try:
        for index in range(max(1, maker.count(task, samples))):
            maker.make(task, maker.length(task, length), index)
    except ValueError as error:
        return str(error)
    return ""


def _cost(given: Given) -> Part:
    """Operations and bytes by formula, for this shape and its window."""
    folder, window = given.settings.model, given.config.window
    command = sections.command("cost", folder, windows=window)

    def measure() -> sections.Section:
        section = cost.section({folder.name: given.config.replace(dtype="bfloat16")}, windows=(window,))
        return dataclasses.replace(section, command=command)

    return Part("cost", "Cost of a token and bytes of state by context length", command, {}, measure)


def _latency(given: Given) -> Part:
    """Times on this machine, for two layers of this shape."""
    folder = given.settings.model
    command = sections.command("cost", folder, measure=True)

    def measure() -> sections.Section:
        section = latency.section(latency.small(given.config), folder.name)
        return dataclasses.replace(section, command=command)

    return Part("latency", "Time per token by context length", command, latency.hardware(), measure)


def _longbench(given: Given) -> Part:
    """LongBench and its like; every prediction is kept on its own."""
    settings, config = given.settings, given.config
    assert settings.longbench is not None
    chosen = longbench_data.Settings(settings.suite, limit=settings.samples, max_length=config.max_length)
    plan = longbench_data.prepare(settings.longbench, chosen)
    mixers = ("full", "swa", config.memory_mixer, longbench.WRITE_OFF)
    command = longbench.command(str(settings.model), plan, config, mixers)

    def measure() -> sections.Section:
        loaded, params, tokenizer = given.load()
        variants = longbench.variants(loaded, params, mixers)
        folder, total = given.sections / settings.suite, sum(plan.counts) * len(variants)
        with tqdm.tqdm(total=total, desc="answering", leave=False, disable=not sys.stderr.isatty()) as bar:
            results = longbench.run(plan, params, tokenizer, variants, folder, bar.update)
        return longbench.section(results, command)

    identity = dataclasses.asdict(chosen) | {"files": recall.fingerprint(settings.longbench)}
    return Part(settings.suite, longbench.TITLES[settings.suite], command, identity, measure)


def summary(
    settings: Settings, config: config_lib.ModelConfig, machine: dict[str, str], shown: Sequence[sections.Section]
) -> sections.Section:
    """The model, the machine, and what each section found."""
    given = dict(vars(settings))
    command = sections.command("report", given.pop("model"), *given.pop("texts"), **given)
    groups = cost.parameter_groups(config)
    total, added = sum(groups.values()), groups["memory"]
    facts = {
        "model": f"{settings.model}: {config.family}, {config.n_layers} layers of {config.d_model}",
        "attention": f"window {config.window}, sinks {config.sinks}",
        "memory": f"{config.memory_mixer}, {config.memory_heads} heads, chunk {config.chunk}",
        "parameters": f"{total / 1e6:.1f} M, of which conversion added {added / 1e6:.1f} M ({added / total:.1%})",
        "arithmetic": config.dtype,
        **machine,
    }
    found = tuple((section.title, section.text[0] if section.text else "") for section in shown)
    tables = (
        sections.Table("What was found", ("section", "finding"), found),
        sections.Table("Model and machine", ("", ""), tuple(facts.items())),
    )
    return sections.Section("summary", "Summary", command, tables=tables, data=facts)


def say(message: str) -> None:
    """A line on what goes on."""
    print(f"allmem: {message}", file=sys.stderr, flush=True)

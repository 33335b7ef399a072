"""The whole chain on a real model, in one command: `make demo`, or `python -m train.experiments.demo`.

First what a converted model is for: SmolLM2-135M-Instruct with its released memory is told secrets in held-out plays
and asked for them when they have left its window (`train.experiments.reading`). Then how one is made: the model is
converted anew, compared with the original on held-out books, distilled on other books, compared again, and made to
write. What a stage made is kept under the settings that made it: a second run goes on where the first stopped, and
reuses what is there.
"""

import dataclasses
import functools
import hashlib
import pathlib
import shlex
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tqdm
import tyro

from allmem_jax.checkpoints import layout, memory_file
from allmem_jax.decoding import chat
from allmem_jax.evaluation import cost, divergence, divergence_report, recall, recall_report
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import kept, sections
from allmem_jax.reporting import page as page_lib
from allmem_jax.storage import jit_cache, stores
from train import errors, fetch, finetune
from train.data import books
from train.experiments import reading
from train.loop import metrics, models
from train.recipe import MEMORY, FinetuneConfig, read_recipe

BEFORE = "converted, before distillation"
IN_WINDOW_LIMIT = 0.005  # nats
COLUMNS = (  # of the table of steps
    "step",
    "loss",
    "kl_beyond",
    "kl_inside",
    "grad_norm",
    "alpha_rms",
    "memory_lr",
    "memory_weights",
    "memory_velocity",
    "tokens_per_s",
    "skipped",
)


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Shows what SmolLM2-135M-Instruct with its released memory remembers, makes a memory anew, and writes a report."""

    memory: str = "smollm2-135m-instruct"
    """The released memory: one that comes with this package, or a file."""
    window: int = 256
    """Tokens that attention sees while that is shown."""
    told: int = 1000
    """Tokens of a prompt that hides a secret."""
    asked: int = 8
    """Such prompts."""
    read: int = 2000
    """Tokens that are read once and asked about later."""

    recipe: str = "configs/demo.py"
    """The distillation's recipe; its model, texts and output folder are the demo's."""
    out: pathlib.Path = pathlib.Path("out/demo")
    """Folder for the report and all that leads to it."""
    length: int = 1024
    """Tokens of a held-out sequence."""
    sequences: int = 1
    """Sequences from each held-out book."""
    question: str = "Why do people tell stories? Answer in three sentences."
    """What the converted model is asked."""
    passage: int = 1200
    """Tokens of a held-out book that the converted model reads and continues."""
    sample_tokens: int = 80
    """Tokens that it writes each time."""


def run(demo: DemoConfig) -> pathlib.Path:
    """The chain. Returns the path of the report's page."""
    began = time.monotonic()
    stores.local_only(demo.out, "out")
    recipe = read_recipe(demo.recipe)
    recipe = dataclasses.replace(
        recipe, model=str(fetch.fetch("smollm2")), texts=(str(books.write(demo.out / "texts")),)
    )
    begun, learnt, judged, asked, remembered = dependencies(demo, recipe)
    runs = demo.out / "runs"
    folder = runs / kept.key(learnt)
    memory = dataclasses.replace(recipe, export=True, out=str(folder / "memory"))
    load = functools.cache(lambda: load_model(memory))
    kept.say(f"what each stage makes is kept in {runs}")
    told = tell(demo, recipe.model, runs, remembered)

    what = "comparing with the original on held-out books"
    before = kept.result(
        runs,
        "before",
        begun | judged,
        lambda: evaluate(demo, load(), untrained(load())),
        what=f"{what}, before training",
    )
    for name, rows in before["texts"].items():
        gap = rows[divergence.SWA]["kl_beyond"]
        kept.say(f"  {name}: window and sinks alone are {gap:.3f} nats from the original")
    size = f"{recipe.steps} steps of {recipe.batch * recipe.seq_length} tokens"
    kept.result(folder, "memory", {}, lambda: distil(memory, load), what=f"distilling the memory, {size}")
    after = kept.result(
        folder, "after", judged, lambda: evaluate(demo, load(), trained(load(), memory)), what=f"{what}, after training"
    )
    samples = kept.result(
        folder, "samples", asked, lambda: write_samples(demo, load(), memory), what="writing with the converted model"
    )

    results = merge(before, after)
    page = page_lib.write(demo.out, make_report(demo, memory, told, results, samples))
    kept.say(divergence_report.verdict(results, divergence.CONVERTED, divergence.WRITE_OFF))
    kept.say(f"the converted model is in {pathlib.Path(memory.out, 'model')}")
    kept.say(f"done in {(time.monotonic() - began) / 60:.1f} minutes; the report is {page.resolve()}")
    return page


def tell(demo: DemoConfig, path: str, runs: pathlib.Path, depends: dict[str, Any]) -> list[sections.Section]:
    """What the released memory remembers: secrets told in plays, and a play that is read once."""
    load = functools.cache(lambda: reading.load(path, demo.memory, demo.window))
    plays = books.heldout_books()[:2]
    settings = recall.Settings(("needle",), (demo.told,), demo.asked)
    answers = kept.result(
        runs,
        "answers",
        depends | {"told": demo.told, "asked": demo.asked},
        lambda: reading.ask(load(), {book.title: book.text for book in plays}, settings),
        what=f"{demo.asked} secrets in {demo.told} tokens each, asked for beyond a window of {demo.window}",
    )
    for sentence in recall_report.finding(answers):
        kept.say(f"  {sentence}")
    story = kept.result(
        runs,
        "read",
        depends | {"read": demo.read},
        lambda: reading.read_once(load(), plays[0].text, demo.read, runs / "read.safetensors"),
        what=f"reading {demo.read} tokens once, and asking later",
    )
    for question, told, *given in story["rows"]:
        kept.say(f"  {question} ({told}) " + "; ".join(map(": ".join, zip(story["variants"], given, strict=True))))
    known = memory_file.describe(demo.memory)[0].replace(window=demo.window)
    return [recall_report.describe(answers, known, settings), reading.describe(story, plays[0].title, known)]


def dependencies(demo: DemoConfig, recipe: FinetuneConfig) -> tuple[dict[str, Any], ...]:
    """What decides on the converted model before training, what is trained, evaluations, samples, and the first part.

    Each is JSON values for `kept.key`.
    """
    sources = {name: source.sha256 for name, source in fetch.SOURCES.items()}
    begun: dict[str, Any] = {name: getattr(recipe, name) for name in (*MEMORY, "seed", "dtype", "backbone_dtype")}
    begun |= {"window": recipe.window[1], "sinks": recipe.sinks[1], "chunk": max(recipe.chunk)}
    learnt = recipe.identity() | sources
    judged = {"length": demo.length, "sequences": demo.sequences}
    asked = {"question": demo.question, "passage": demo.passage, "sample_tokens": demo.sample_tokens}
    content = hashlib.sha256(memory_file.find(demo.memory).read_bytes()).hexdigest()
    remembered = {"memory": content, "window": demo.window} | sources
    return begun | sources, learnt, judged, asked, remembered


def load_model(recipe: FinetuneConfig) -> models.Pretrained:
    """The converted model with a fresh memory, computing in float32 whatever the recipe trains in."""
    began = time.monotonic()
    kept.say("  reading and converting the model")
    loaded = models.load(recipe)
    share = cost.added_share(loaded.config)
    kept.say(f"  converted in {time.monotonic() - began:.0f} s; the memory is {share:.1%} of the parameters")
    return loaded._replace(config=loaded.config.replace(dtype="float32"))


def untrained(loaded: models.Pretrained) -> list[divergence.Variant]:
    """Windowed attention alone, and with a fresh memory, which must equal it."""
    windowed, fresh, _ = divergence.standard_variants(loaded.config, loaded.memory)
    return [windowed, dataclasses.replace(fresh, name=BEFORE)]


def trained(loaded: models.Pretrained, memory: FinetuneConfig) -> list[divergence.Variant]:
    """The distilled model, and the same with its writing switched off."""
    return divergence.standard_variants(loaded.config, models.trained_memory(memory.out))[1:]


def evaluate(demo: DemoConfig, loaded: models.Pretrained, variants: list[divergence.Variant]) -> dict[str, Any]:
    """`divergence.evaluate` on the held-out books."""
    texts = {f"{book.title} ({book.kind})": book.text for book in books.heldout_books()}
    tokens = divergence.cut_texts(loaded.tokenizer, texts, demo.length, demo.sequences)
    total = len(tokens) * demo.sequences * len(variants)
    with tqdm.tqdm(total=total, unit="run", leave=False) as bar:
        return divergence.evaluate(loaded.config, loaded.backbone, tokens, variants, progress=bar.update)


def distil(recipe: FinetuneConfig, load: Callable[[], models.Pretrained]) -> dict[str, Any]:
    """One training run, resumed where it was stopped; returns its last line of metrics."""
    loaded = load()
    finetune.run(recipe, loaded._replace(config=loaded.config.replace(dtype=recipe.dtype)))
    return metrics.read_metrics(pathlib.Path(recipe.out, "metrics.jsonl"))[-1]


def write_samples(demo: DemoConfig, loaded: models.Pretrained, memory: FinetuneConfig) -> list[tuple[str, str]]:
    """An answer, and the continuation of a passage longer than the window, printed as they are written."""
    params = lm.merge_params(loaded.backbone, models.trained_memory(memory.out))
    talk = chat.Conversation(params, loaded.config, loaded.tokenizer, max_tokens=demo.sample_tokens)
    samples = [(demo.question + "\n", show(demo.question + "\n", talk.reply(demo.question)))]
    book = books.heldout_books()[0]
    ids = loaded.tokenizer.encode(book.text, add_special_tokens=False, verbose=False)
    passage = loaded.tokenizer.decode(ids[len(ids) // 2 :][: demo.passage])
    pieces = chat.complete(params, loaded.config, loaded.tokenizer, passage, max_tokens=demo.sample_tokens)
    intro = f"[{book.title}, {demo.passage} tokens, of which the end:] ... {passage[-300:]}"
    return [*samples, (intro, show(intro, pieces))]


def show(prompt: str, pieces: Any) -> str:
    """Prints a prompt and the text that follows it as it comes; returns that text."""
    print(f"\n{prompt}", end="", flush=True)
    written = ""
    for piece in pieces:
        print(piece, end="", flush=True)
        written += piece
    print("\n", flush=True)
    return written


def merge(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """Both evaluations as one."""
    texts = {name: rows | after["texts"][name] for name, rows in before["texts"].items()}
    variants = list(dict.fromkeys([*before["variants"], *after["variants"]]))
    return before | {"variants": variants, "texts": texts}


def make_report(
    demo: DemoConfig,
    memory: FinetuneConfig,
    told: list[sections.Section],
    results: dict[str, Any],
    samples: list[tuple[str, str]],
) -> page_lib.Report:
    """What the page says."""
    command = "make demo" if demo == DemoConfig() else sections.program("train.experiments.demo", demo)
    training = metrics.read_metrics(pathlib.Path(memory.out, "metrics.jsonl"))
    parts = (
        *(dataclasses.replace(section, command=command) for section in told),
        divergence_report.evaluation_section(results, divergence.CONVERTED, divergence.WRITE_OFF, command=command),
        training_section(training, command),
        sections.Section(
            "writing",
            "Generated text",
            command,
            tables=(sections.Table("", ("prompt", "continuation"), tuple(map(tuple, samples))),),
        ),
        settings_section(memory),
    )
    return page_lib.Report("SmolLM2-135M-Instruct as AllMem", parts, notes=tuple(findings(told, results, training)))


def training_section(steps: list[dict[str, Any]], command: str) -> sections.Section:
    """The loss as a curve, and the numbers of a few steps."""
    present = tuple(name for name in COLUMNS if all(step.get(name) is not None for step in steps))
    few = [steps[index] for index in sorted({round(x) for x in np.linspace(0, len(steps) - 1, min(len(steps), 8))})]
    cells = tuple(tuple(page_lib.number(step[name]) for name in present) for step in few)
    table = sections.Table(f"memory: {len(steps)} steps recorded", present, cells)
    line = tuple(step["step"] for step in steps), tuple(step["loss"] for step in steps)
    plot = sections.Plot("training", "step", "loss (nats)", {"memory": line})
    shown = {"memory": [{name: step[name] for name in present} for step in steps]}
    return sections.Section("training", "Training", command, tables=(table,), plots=(plot,), data=shown)


def settings_section(memory: FinetuneConfig) -> sections.Section:
    """The recipe, and what to do with the model that it made."""
    exported = shlex.quote(str(pathlib.Path(memory.out, "model")))
    commands = [
        f"allmem generate {exported} 'Once upon a time' --max-tokens 100",
        f"allmem chat {exported}",
        f"allmem evaluate {exported} YOUR_TEXT.txt",
        f"allmem report {exported} --out out/report",
        f"allmem info {exported}",
    ]
    saved = config_lib.ModelConfig.from_json(pathlib.Path(memory.out, layout.ALLMEM_CONFIG).read_text())
    settings = memory.identity() | {name: getattr(saved, name) for name in MEMORY}
    rows = tuple((name, str(value)) for name, value in settings.items())
    table = sections.Table("", ("setting", "value"), rows)
    return sections.Section("settings", "Settings, and what to do next", "\n".join(commands), tables=(table,))


def findings(told: list[sections.Section], results: dict[str, Any], training: list[dict[str, Any]]) -> list[str]:
    """Sentences on what the numbers show, good or bad."""
    texts = results["texts"]
    lower = sum(rows[divergence.CONVERTED]["kl_beyond"] < rows[divergence.SWA]["kl_beyond"] for rows in texts.values())
    inside = max(rows[divergence.CONVERTED]["kl_inside"] for rows in texts.values())
    window, sinks = results["window"], results["sinks"]
    limit = "below" if inside < IN_WINDOW_LIMIT else "ABOVE"
    return [
        *told[0].text[:-1],  # the last one says how it was measured
        f"The memory made here, in {len(training)} steps, sees by attention the last {window} "
        f"tokens and the first {sinks}. None of the texts below was trained on.",
        f"Distillation lowered the KL beyond the window on {lower} of {len(texts)} held-out texts. Inside the "
        f"window it is at most {inside:.2g} nats, {limit} the limit of {IN_WINDOW_LIMIT}. Training steps that were not "
        f"finite: {training[-1]['skipped']}.",
    ]


def main() -> None:
    """The command."""
    jit_cache.keep()
    with errors.one_line(fetch.FetchError):
        run(tyro.cli(DemoConfig, prog="python -m train.experiments.demo"))


if __name__ == "__main__":
    main()

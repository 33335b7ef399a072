"""Generated answers to what was said beyond the window, and to what is within it: converted models beside the original.

Likelihood hides what a converted model loses (arXiv 2603.26556), since few tokens of a text need anything from afar.
Here every variant writes its answer, greedily, to the same prompts (`allmem_jax.evaluation.questions`), and the answer
is right or wrong. Prompts, lengths and distances are in tokens; an interval is of 95 %.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import tqdm

from allmem_jax.decoding import chat as text_lib
from allmem_jax.decoding import generation
from allmem_jax.evaluation import divergence
from allmem_jax.evaluation import questions as prompts_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import sections
from allmem_jax.storage import files

NAME = "recall"
OTHER = "another document's state"  # the converted model, asked after a text that the question is not about
PIECE = 128  # tokens of a prompt read at a time
SHORT_PIECE = 32  # of a question, where a context is read before its questions
Z = 1.959964  # of an interval of 95 %
# What `defaults` asks, and at how many windows.
TASKS = (
    "needle",
    "needle_keys",
    "book_questions",
    "short_needle",
    "short_needle_keys",
    "short_book_questions",
    "short_cloze",
    "closed_book_questions",
)
WINDOWS = (4, 8)
FORMAT = 3  # raised when what a part holds, or how an answer is scored, changes

Result = dict[str, Any]  # {"task", "length", "variant", "examples": [{"index", "prompt_tokens", ...}]}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is asked, and how often.

    Attributes:
      tasks: of `questions.TASKS`, and pairs_N: N names with a word each, held at once.
      lengths: tokens of prompt and answer of the long tasks.
      samples: examples of a task at a length; there are no more about books than questions. Of pairs, up to
        `questions.QUESTIONS` ask the same context, so that many cost little more than one.
      chat: ask through the chat template.
      seed: of the examples.
      batch: prompts run together; it changes no answer.
    """

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int = 32
    chat: bool = False
    seed: int = 0
    batch: int = 8

    def __post_init__(self):
        for name in ("tasks", "lengths"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={values} must be one or more, each once")
        for name in ("samples", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")


def defaults(config: config_lib.ModelConfig, questions: bool) -> Settings:
    """Tasks that a model of 135 million parameters can do, at several windows.

    Args:
      config: of the converted model.
      questions: whether there are questions about books.
    """
    tasks = TASKS if questions else tuple(task for task in TASKS if task not in prompts_lib.ABOUT_BOOKS)
    lengths = tuple(windows * config.window for windows in WINDOWS)
    return Settings(tasks, lengths)


def variants(config: config_lib.ModelConfig, params: lm.Params) -> tuple[lm.Params, list[divergence.Variant]]:
    """The backbone, and what is asked: the original, windowed attention, and a memory after its two controls."""
    backbone, memory = lm.split_params(params)
    original = divergence.Variant(divergence.ORIGINAL, config.replace(mixer="full"))
    if config.mixer not in config_lib.MEMORY_MIXERS:
        return backbone, [original, *divergence.standard_variants(config, None)]
    windowed, converted, write_off = divergence.standard_variants(config, memory)
    return backbone, [original, windowed, dataclasses.replace(converted, name=OTHER), write_off, converted]


def command(
    path: pathlib.Path,
    texts: Sequence[pathlib.Path],
    questions: pathlib.Path | None,
    settings: Settings,
    config: config_lib.ModelConfig,
    out: pathlib.Path | None = None,
    memory: str | None = None,
) -> str:
    """What a user types to get a section again, into `out` where that is given, whatever the defaults become."""
    mixing = {name: getattr(config, name) for name in ("mixer", "window", "sinks", "chunk", "dtype")}
    asked = vars(settings)
    return sections.command("recall", path, *texts, memory=memory, questions=questions, **asked, **mixing, out=out)


def normalise(text: str) -> str:
    """Lower case, words and numbers alone, one blank between them; 10,000 is 10000."""
    return " ".join(re.findall(r"[^\W_]+", re.sub(r"(?<=\d),(?=\d{3})", "", text.casefold())))


def named(output: str, candidates: Sequence[str]) -> list[str]:
    """The candidates that stand in an output as whole words, in the order in which they first do."""
    haystack = f" {normalise(output)} "
    found = [(haystack.find(f" {normalise(candidate)} "), candidate) for candidate in candidates]
    return [candidate for place, candidate in sorted(found, key=lambda pair: pair[0]) if place >= 0]


def correct(item: prompts_lib.Item, output: str) -> bool:
    """Whether an output is right: the first thing it names is an answer, or it names all of them and no foil."""
    given = named(output, [*item.answers, *item.foils])
    if item.every:
        return set(given) == set(item.answers)
    return given[:1] != [] and given[0] in item.answers


def reply(task: str, output: str, chat: bool) -> str:
    """The part of a generated text that is the answer: the word of a cloze; of a plain text, the first line."""
    output = output.strip()
    if task == "short_cloze":
        return output.split()[0] if output else ""
    return output if chat else output.split("\n")[0]


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


def fingerprint(path: pathlib.Path) -> str:
    """A short name for a model on disk: paths, sizes and times of its files."""
    path = path.expanduser().resolve()
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    found = [(str(file), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def measure(
    settings: Settings,
    backbone: lm.Params,
    tokenizer: Any,
    texts: Mapping[str, str],
    variants: Sequence[divergence.Variant],
    *,
    questions: Sequence[prompts_lib.Question] = (),
    parts: pathlib.Path | None = None,
    source: str = "",
) -> list[Result]:
    """Every variant's answers to the same examples.

    Args:
      settings: what is asked.
      backbone: the parameters that all variants share.
      tokenizer: of the model.
      texts: name -> text to hide things in.
      variants: one of them the original, with mixer "full"; window and sinks of the last decide what is far. One that
        is named `OTHER` is asked after another document (`prompts.Prompts.make_elsewhere`).
      questions: about the texts, for the tasks about books.
      parts: folder in which each task's answers are kept and found again; None keeps none.
      source: what tells these parameters from others (`fingerprint`); part of what a kept answer is known by.

    Returns:
      A result for each task, length and variant; the tasks that know one length have one. `OTHER` has no examples
      where there is no other document to ask after.

    Raises:
      ValueError: before anything has run, that a task does not fit its length or lacks what it needs.
    """
    config = variants[-1].config
    maker = prompts_lib.Prompts(
        tokenizer,
        texts,
        window=config.window,
        sinks=config.sinks,
        chat=settings.chat,
        seed=settings.seed,
        questions=questions,
    )
    jobs = [
        (task, length, variant, _elsewhere(maker, task, length, len(examples)) if variant.name == OTHER else examples)
        for (task, length), examples in _examples(settings, maker, config.max_length).items()
        for variant in variants
    ]
    results = []
    total = sum(len(examples) for *_, examples in jobs)
    with tqdm.tqdm(total=total, desc="asking", unit="prompt", leave=False, disable=not sys.stderr.isatty()) as bar:
        for task, length, variant, examples in jobs:
            head = {"task": task, "length": length, "variant": variant.name}
            content = hashlib.sha256(repr(examples).encode()).hexdigest()
            identity = {"format": FORMAT, "source": source, "examples": content, "chat": settings.chat}
            path = _part(parts, identity | head | {"config": variant.config.to_json()})
            if path is not None and path.exists():
                bar.update(len(examples))
                results.append(json.loads(path.read_text()))
                continue
            answered: list[dict[str, Any]] = []
            if examples:
                answered = _ask(settings, backbone, tokenizer, variant, task, length, examples, bar.update)
            results.append(head | {"examples": answered})
            if path is not None:
                files.write(path, json.dumps(results[-1], indent=1))
    return results


def _examples(
    settings: Settings, maker: prompts_lib.Prompts, trained: int
) -> dict[tuple[str, int], list[prompts_lib.Example]]:
    """(task, length) -> examples; a task that knows one length is there once. Warns of more than `trained` tokens."""
    asked = {}
    for task in settings.tasks:
        for length in dict.fromkeys(maker.length(task, length) for length in settings.lengths):
            count = max(1, maker.count(task, settings.samples))  # where there is none, the first one says why
            asked[task, length] = [maker.make(task, length, index) for index in range(count)]
            longest = max(len(example.prompt) for example in asked[task, length])
            if longest > trained:
                message = f"{task}: prompts have up to {longest} tokens, and the model was trained on {trained}"
                warnings.warn(message, stacklevel=3)
    return asked


def _elsewhere(maker: prompts_lib.Prompts, task: str, length: int, count: int) -> list[prompts_lib.Example]:
    """A task's examples, each after another document; none where one of them has no other."""
    made = [maker.make_elsewhere(task, length, index) for index in range(count)]
    found = [example for example in made if example is not None]
    return found if len(found) == count else []


def _ask(
    settings: Settings,
    backbone: lm.Params,
    tokenizer: Any,
    variant: divergence.Variant,
    task: str,
    length: int,
    examples: Sequence[prompts_lib.Example],
    progress: Callable[[int], Any],
) -> list[dict[str, Any]]:
    """One variant's answers to a task's examples, each judged.

    Batches have one shape, and the original's cache one size a length, so that a mixer compiles once, and the original
    once a length.
    """
    config, room, sharing = variant.config, prompts_lib.room(task), prompts_lib.questions(task)
    if config.mixer == "full":
        longest = max(len(example.prompt) for example in examples) + room
        config = generation.full_as_windowed(config, max(length, longest))
    params = lm.merge_params(backbone, variant.memory) if variant.memory else backbone
    chat, stops = settings.chat and task != "short_cloze", text_lib.stop_tokens(tokenizer, config)
    groups = [examples[start : start + sharing] for start in range(0, len(examples), sharing)]
    batch = min(settings.batch, len(groups))
    answered: list[dict[str, Any]] = []
    for start in range(0, len(groups), batch):
        part = groups[start : start + batch]
        rows = [*part, *[part[-1]] * (batch - len(part))]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*the model was trained on")  # which was said once for the task
            written = _write(params, config, rows, room, stops)
        for group, answers in zip(part, written, strict=False):
            for example, ids in zip(group, answers, strict=False):
                output = reply(task, tokenizer.decode(ids, skip_special_tokens=True), chat)
                answered.append(
                    {
                        "index": len(answered),
                        "prompt_tokens": len(example.prompt),
                        "depth": example.depth,
                        "distance": example.distance,
                        "question": example.item.question,
                        "answers": list(example.item.answers),
                        "output": output,
                        "correct": correct(example.item, output),
                    }
                )
            progress(len(group))
    return answered


def _write(
    params: lm.Params,
    config: config_lib.ModelConfig,
    groups: Sequence[Sequence[prompts_lib.Example]],
    room: int,
    stops: Sequence[int],
) -> list[list[list[int]]]:
    """Group -> example -> what is written to it, up to `room` tokens; where others have more, the last one's again.

    A context that a group shares is read once, and each question goes on from the state after it.
    """
    turns, state = max(map(len, groups)), None
    if turns > 1:
        contexts = [group[0].prompt[: group[0].context] for group in groups]
        _, state = generation.prefill(params, config, contexts, piece=PIECE)
    written = []
    for turn in range(turns):
        asked = [group[min(turn, len(group) - 1)] for group in groups]
        rows = [example.prompt if state is None else example.prompt[example.context :] for example in asked]
        piece = PIECE if state is None else SHORT_PIECE
        written.append(
            generation.generate(params, config, rows, max_tokens=room, stop_tokens=stops, piece=piece, state=state)
        )
    return [list(answers) for answers in zip(*written, strict=True)]


def _part(folder: pathlib.Path | None, identity: dict[str, Any]) -> pathlib.Path | None:
    """Where the answers that are known by `identity` are kept."""
    if folder is None:
        return None
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    name = re.sub(r"\W+", "-", f"{identity['task']} {identity['length']} {identity['variant']}")
    return folder / f"{name}-{key}.json"


def section(
    settings: Settings,
    backbone: lm.Params,
    tokenizer: Any,
    texts: Mapping[str, str],
    variants: Sequence[divergence.Variant],
    *,
    questions: Sequence[prompts_lib.Question] = (),
    parts: pathlib.Path | None = None,
    source: str = "",
    command: str = "",
) -> sections.Section:
    """`measure`, told and tabled. `command` is what a user types to get it again; for the rest see there."""
    results = measure(settings, backbone, tokenizer, texts, variants, questions=questions, parts=parts, source=source)
    return describe(results, variants[-1].config, settings, command)


def describe(
    results: Sequence[Result], config: config_lib.ModelConfig, settings: Settings, command: str = ""
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
        f"answers as independent, also where up to {prompts_lib.QUESTIONS} pairs are asked of one context. "
        f'"{OTHER}" is the converted model where all of the prompt that attention does not see at the question comes '
        "from another prompt of the task, which gives no answer: what it has right, the memory has not given. It is "
        "asked where something lies beyond the window."
    )
    tables = [_accuracy(results), _by_distance(results, config.window), _against_original(results)]
    plots = [*_plots_by_length(results, config.window), *_plots_by_pairs(results)]
    plots += [plot for task in _long(results) if (plot := _plot(results, task, config.window))]
    asked = {name: list(x) if isinstance(x, tuple) else x for name, x in dataclasses.asdict(settings).items()}
    data = {"settings": asked, "window": config.window, "results": list(results)}
    return sections.Section(
        NAME,
        "Answers to questions about what was read",
        command,
        (*finding(results), setting),
        tuple(table for table in tables if table.rows),
        tuple(plots),
        data,
    )


def finding(results: Sequence[Result]) -> list[str]:
    """Sentences on what was found: beyond the window whether the memory helps, and within it what is lost."""
    sentences = []
    long = _long(results)
    far, near = (_verdicts(results, names) for names in (long, prompts_lib.SHORT))
    if far:
        sentences.append(f"Of {_most(far)} answers that need what lies beyond the window, right are: {_shares(far)}.")
    for control, subject in ((divergence.WRITE_OFF, "Writing"), (OTHER, "What was written of the document itself")):
        if marks := _paired(results, long, divergence.CONVERTED, control):
            middle, low, high = paired_difference(*marks)
            told = f"{subject} {'helps' if middle > 0 else 'harms'}"
            if low <= 0 <= high:
                told = f"The memory and its control ({control}) cannot be told apart"
            sentences.append(f"{told}: a difference of {points(middle, low, high)} points on the same questions.")
    if near:
        sentences.append(f"Of {_most(near)} answers to prompts within the window, right are: {_shares(near)}.")
    if marks := _paired(results, prompts_lib.SHORT, divergence.CONVERTED, divergence.ORIGINAL):
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
    results: Sequence[Result], tasks: Collection[str], keep: Callable[[dict[str, Any]], bool] = lambda example: True
) -> dict[str, list[bool]]:
    """Variant -> whether each answer is right, over the examples of some tasks that are to be kept."""
    marks: dict[str, list[bool]] = {}
    for result in results:
        if result["task"] in tasks:
            kept = [example["correct"] for example in result["examples"] if keep(example)]
            marks.setdefault(result["variant"], []).extend(kept)
    return marks


def _paired(
    results: Sequence[Result], tasks: Collection[str], ours: str, theirs: str
) -> tuple[list[bool], list[bool]] | None:
    """Whether the answers of two variants are right, over the examples of some tasks that both were asked."""
    pairs: tuple[list[bool], list[bool]] = ([], [])
    for key in dict.fromkeys((result["task"], result["length"]) for result in results):
        marks = _verdicts([result for result in results if (result["task"], result["length"]) == key], tasks)
        if marks.get(ours) and marks.get(theirs):
            pairs[0].extend(marks[ours])
            pairs[1].extend(marks[theirs])
    return pairs if pairs[0] else None


def _long(results: Sequence[Result]) -> list[str]:
    return [task for task in dict.fromkeys(result["task"] for result in results) if prompts_lib.is_long(task)]


def _variants(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result["variant"] for result in results))


def _accuracy(results: Sequence[Result]) -> sections.Table:
    """A row for each task and length, with the tokens that its prompts really have."""
    rows = []
    for task, length in dict.fromkeys((result["task"], result["length"]) for result in results):
        chosen = [result for result in results if (result["task"], result["length"]) == (task, length)]
        tokens = [example["prompt_tokens"] for example in chosen[0]["examples"]]
        marks = _verdicts(chosen, [task])
        actual = f"{min(tokens)}" if min(tokens) == max(tokens) else f"{min(tokens)} to {max(tokens)}"
        rows.append((task, actual, str(len(tokens)), *(share(marks[name]) for name in marks)))
    return sections.Table("Share of right answers", ("task", "prompt tokens", "n", *_variants(results)), tuple(rows))


def _spans(results: Sequence[Result], task: str, window: int) -> list[tuple[int, int]]:
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


def _by_distance(results: Sequence[Result], window: int) -> sections.Table:
    """A row for each long task and doubling of the distance, over all lengths."""
    rows = []
    for task in _long(results):
        for low, high in _spans(results, task, window):
            marks = _verdicts(results, [task], _between(low, high))
            rows.append((task, f"{low} to {high}", str(_most(marks)), *(share(marks[name]) for name in marks)))
    header = ("task", "distance", "n", *_variants(results))
    return sections.Table("Share of right answers by the distance of what is asked for", header, tuple(rows))


def _against_original(results: Sequence[Result]) -> sections.Table:
    """A row for each task, over all lengths: the paired difference of every other variant from the original."""
    names = [name for name in _variants(results) if name != divergence.ORIGINAL]
    rows = []
    for task in dict.fromkeys(result["task"] for result in results):
        pairs = [_paired(results, [task], name, divergence.ORIGINAL) for name in names]
        if any(pairs):
            rows.append((task, *(points(*paired_difference(*pair)) if pair else "-" for pair in pairs)))
    caption = "Difference from the original on the same prompts (percentage points)"
    return sections.Table(caption, ("task", *names), tuple(rows) if names else ())


def _plot(results: Sequence[Result], task: str, window: int) -> sections.Plot | None:
    """Accuracy over the distance; None for a task that was not asked."""
    spans = _spans(results, task, window)
    lines = _lines({math.sqrt(low * high): _verdicts(results, [task], _between(low, high)) for low, high in spans})
    if not lines:
        return None
    return sections.Plot(
        f"{task}, by distance", "distance (tokens)", "share of right answers", lines, log_x=True, mark_x=float(window)
    )


def _plots_by_length(results: Sequence[Result], window: int) -> list[sections.Plot]:
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


def _plots_by_pairs(results: Sequence[Result]) -> list[sections.Plot]:
    """Accuracy over the number of pairs held at once, one plot a length at which several numbers were asked."""
    plots = []
    tasks = sorted((task for task in _long(results) if prompts_lib.pairs(task)), key=prompts_lib.pairs)
    for length in sorted({result["length"] for result in results if result["task"] in tasks}):
        chosen = [result for result in results if result["length"] == length]
        lines = _lines({float(prompts_lib.pairs(task)): _verdicts(chosen, [task]) for task in tasks})
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

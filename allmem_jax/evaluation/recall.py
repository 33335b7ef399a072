"""Generated answers to what was said beyond the window, and to what is within it: converted models beside the original.

Likelihood hides what a converted model loses (arXiv 2603.26556), since few tokens of a text need anything from afar.
Here every variant writes its answer, greedily, to the same prompts (`allmem_jax.evaluation.questions`), and the answer
is right or wrong. Prompts, lengths and distances are in tokens; an interval is of 95 %.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm

from allmem_jax.decoding import chat as text_lib
from allmem_jax.decoding import generation
from allmem_jax.evaluation import divergence, haystacks
from allmem_jax.evaluation import questions as prompts_lib
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import kept, sections

NAME = "recall"
OTHER = "another document's state"  # the converted model, asked after a text that the question is not about
PIECE = 128  # tokens of a prompt read at a time
SHORT_PIECE = 32  # of a question, where a context is read before its questions
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
    out: str | os.PathLike[str] | None = None,
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
    maker = haystacks.Prompts(
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
            before, answered = bar.n, list[dict[str, Any]]()
            ask = functools.partial(
                _ask, settings, backbone, tokenizer, variant, task, length, examples, progress=bar.update
            )
            if examples and parts is not None:
                content = hashlib.sha256(repr(examples).encode()).hexdigest()
                depends = {"format": FORMAT, "source": source, "examples": content, "chat": settings.chat} | head
                depends |= {"config": variant.config.to_json()}
                name = re.sub(r"\W+", "-", f"{task} {length} {variant.name}")
                answered = kept.result(parts, name, depends, ask, say=lambda line: None)
            elif examples:
                answered = ask()
            results.append(head | {"examples": answered})
            bar.update(before + len(answered) - bar.n)  # those that were found
    return results


def _examples(
    settings: Settings, maker: haystacks.Prompts, trained: int
) -> dict[tuple[str, int], list[haystacks.Example]]:
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


def _elsewhere(maker: haystacks.Prompts, task: str, length: int, count: int) -> list[haystacks.Example]:
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
    examples: Sequence[haystacks.Example],
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
    params = lm.unstack(params, dtype=config.dtype)
    chat, stops = settings.chat and task != "short_cloze", text_lib.stop_tokens(tokenizer, config)
    groups = [examples[start : start + sharing] for start in range(0, len(examples), sharing)]
    batch = min(settings.batch, len(groups))
    answered: list[dict[str, Any]] = []
    for start in range(0, len(groups), batch):
        part = groups[start : start + batch]
        for group, answers in zip(part, _write(params, config, part, batch, room, stops), strict=True):
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
    groups: Sequence[Sequence[haystacks.Example]],
    batch: int,
    room: int,
    stops: Sequence[int],
) -> list[list[list[int]]]:
    """Group -> example -> what is written to it, up to `room` tokens; where others have more, the last one's again.

    A context that a group shares is read once, and each question goes on from the state after it.
    """
    turns, state = max(map(len, groups)), None
    if turns > 1:
        contexts = [group[0].prompt[: group[0].context] for group in groups]
        contexts += contexts[-1:] * (batch - len(contexts))
        _, state = generation.prefill(params, config, contexts, piece=PIECE)
    written = []
    for turn in range(turns):
        asked = [group[min(turn, len(group) - 1)] for group in groups]
        rows = [example.prompt if state is None else example.prompt[example.context :] for example in asked]
        piece = PIECE if state is None else SHORT_PIECE
        written.append(
            generation.answers(
                params, config, rows, batch=batch, max_tokens=room, stop_tokens=stops, piece=piece, state=state
            )
        )
    return [list(answers) for answers in zip(*written, strict=True)]

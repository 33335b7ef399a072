"""The files of LongBench, InfiniteBench and LV-Eval: tasks, prompts, right answers and scores.

The published JSON lines, one file a task. What the suites publish beside them, prompts and lengths of answers, is in
longbench_prompts.json, which names its sources.
"""

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import itertools
import json
import os
import pathlib
import re
import string
from collections.abc import Iterator
from typing import Any, NamedTuple

from allmem_jax.evaluation import longbench_metrics

SUITES = ("longbench", "longbench_e", "infinitebench", "lveval")
CHATS = ("published", "always", "never")
GROUPS = ("0-4k", "4-8k", "8k+", "16k", "32k", "64k", "128k", "256k")  # LongBench-E's buckets, LV-Eval's levels
_BUCKETS = ((4000, "0-4k"), (8000, "4-8k"))  # in words
_CHINESE_WORDS = ("qa_f1_zh", "rouge_l_zh", "keyword_f1_zh", "filtered_rouge_l_zh")  # metrics that need jieba


class Task(NamedTuple):
    """One file of a suite.

    Attributes:
      name: of the file, without .jsonl.
      base: without LongBench-E's "_e" and LV-Eval's length.
      level: "e", LV-Eval's nominal length ("16k"), or "".
      prompt: template; {context}, {input} and what `_values` makes are filled in.
      max_tokens: longest answer.
      metric: a function of `longbench_metrics`.
      chat: whether the published runs put it into the model's chat template.
      first_line: whether only the prediction's first line is scored.
    """

    name: str
    base: str
    level: str
    prompt: str
    max_tokens: int
    metric: str
    chat: bool
    first_line: bool = False


class Example(NamedTuple):
    """One line of a file: its prompt, whole, its right answers as the metric takes them, and what else scores need."""

    id: str
    prompt: str
    answers: list[Any]
    group: str
    classes: list[str] | None
    keywords: str | None


@dataclasses.dataclass(frozen=True)
class Settings:
    """What to run and how.

    Attributes:
      suite: "longbench", "longbench_e" (the files whose names end in "_e"), "infinitebench" or "lveval".
      tasks: names of files without .jsonl; () means all that are there.
      limit: only the first so many lines of each file; None means all.
      max_length: tokens of a prompt; of a longer one the first and the last half stay.
      chat: "published" puts those tasks into the model's chat template that the published runs do; "always", "never".
      batch: prompts run together.
      piece: tokens of a prompt read at a time.
    """

    suite: str
    tasks: tuple[str, ...] = ()
    limit: int | None = None
    max_length: int = 131072
    chat: str = "published"
    batch: int = 1
    piece: int = 512

    def __post_init__(self):
        for name, allowed in (("suite", SUITES), ("chat", CHATS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(map(repr, allowed))}")
        for name in ("limit", "max_length", "batch", "piece"):
            least = 2 if name == "max_length" else 1
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")


class Plan(NamedTuple):
    """Files that were read and found good, how many examples each has, and why others are left out."""

    settings: Settings
    folder: pathlib.Path
    tasks: tuple[Task, ...]
    counts: tuple[int, ...]
    skipped: tuple[str, ...]


@functools.cache
def published(suite: str) -> dict[str, Any]:
    """What a suite publishes: {"source", "paper", "licence", "tasks"} and LV-Eval's {"levels", "blacklist"}."""
    content = pathlib.Path(__file__).with_name("longbench_prompts.json").read_text(encoding="utf-8")
    return json.loads(content)[suite.removesuffix("_e")]


def known_tasks(suite: str) -> dict[str, Task]:
    """All files that a suite may have, by name."""
    found = {}
    for base, fields in published(suite)["tasks"].items():
        for level in published(suite).get("levels", ["e" if suite == "longbench_e" else ""]):
            name = f"{base}_{level}" if level else base
            found[name] = Task(name, base, level, **fields)
    return found


def prepare(folder: str | os.PathLike[str], settings: Settings) -> Plan:
    """Reads every line that a run will need, before anything runs.

    Chinese words need a segmenter: without the package jieba, tasks with such metrics are left out.

    Raises:
      FileNotFoundError: the folder holds no file of the suite, or not one that was asked for.
      ValueError: an unknown task, one that needs jieba, or a damaged line; it names the file, the line and the field.
    """
    folder, known = pathlib.Path(folder).expanduser(), known_tasks(settings.suite)
    for name in settings.tasks:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"{settings.suite} has no task {name!r}{hint} There are {', '.join(known)}")
    names = settings.tasks or [name for name in known if (folder / f"{name}.jsonl").is_file()]
    missing = [f"{name}.jsonl" for name in names if not (folder / f"{name}.jsonl").is_file()]
    if missing or not names:
        raise FileNotFoundError(
            f"{folder} has no {', '.join(missing) or f'file of {settings.suite}'}: give the folder that holds the "
            f"published JSON lines, e.g. {next(iter(known))}.jsonl"
        )
    tasks = [known[name] for name in names]
    jieba = importlib.util.find_spec("jieba") is not None
    unread = [task for task in tasks if task.metric in _CHINESE_WORDS and not jieba]
    if unread and (settings.tasks or len(unread) == len(tasks)):
        raise ValueError(f"{unread[0].name} is scored on Chinese words, which needs the package jieba: install it")
    kept = tuple(task for task in tasks if task not in unread)
    skipped = tuple(f"{task.name}: its metric needs the package jieba, which is not installed" for task in unread)
    counts = tuple(sum(1 for _ in read_examples(folder, task, settings)) for task in kept)
    return Plan(settings, folder, kept, counts, skipped)


def read_examples(folder: pathlib.Path, task: Task, settings: Settings) -> Iterator[Example]:
    """Yields the lines of a file; ValueError that names the line and the field where one is not as published."""
    path = folder / f"{task.name}.jsonl"
    empty = True
    with open(path, "rb") as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        for number, line in itertools.islice(lines, settings.limit):
            empty = False
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise ValueError(f"a JSON object is wanted, not {type(fields).__name__}")
                example = _example(task, settings.suite, fields, number)
            except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
                raise ValueError(f"{path}:{number}: {error}") from None
            yield example
    if empty:
        raise ValueError(f"{path} has no lines")


def _example(task: Task, suite: str, fields: dict[str, Any], number: int) -> Example:
    values = _values(task, fields)
    infinite = suite == "infinitebench"
    answers = _labels(task.metric, fields) if infinite else _strings(fields, "answers")
    classes = _strings(fields, "all_classes") if task.metric == "classification" else None
    group = task.level
    if task.level == "e":
        length = _field(fields, "length", (int, float))
        group = next((name for limit, name in _BUCKETS if length < limit), "8k+")
    example = Example(
        id=str(fields.get("_id", fields.get("id", number))),
        prompt=task.prompt.format(**values),
        answers=answers[:1] if suite == "lveval" else answers,  # its scorer looks at the first one only
        group=group,
        classes=classes,
        keywords=_field(fields, "answer_keywords", (str, type(None))) if "answer_keywords" in fields else None,
    )
    if task.metric.startswith("retrieval"):
        score(task, "", example)  # raises where the answer names no paragraph
    return example


def _field(fields: dict[str, Any], name: str, kind: Any) -> Any:
    if name not in fields:
        raise ValueError(f"the field {name!r} is missing; there are {', '.join(map(repr, fields)) or 'none'}")
    value = fields[name]
    if not isinstance(value, kind):
        raise ValueError(f"the field {name!r} is {json.dumps(value)[:60]}, which is not of the published type")
    return value


def _strings(fields: dict[str, Any], name: str) -> list[str]:
    value = _field(fields, name, list)
    if not value or not all(isinstance(item, str) for item in value):
        raise ValueError(f"the field {name!r} is {json.dumps(value)[:60]}: a list of at least one string is wanted")
    return value


def _values(task: Task, fields: dict[str, Any]) -> dict[str, str]:
    """What the prompt's template asks for; InfiniteBench takes some of it out of the question."""
    wanted = {name for _, name, _, _ in string.Formatter().parse(task.prompt) if name}
    question = _field(fields, "input", str)
    values = {"context": _field(fields, "context", str), "input": question, "question": question}
    if "OPTION_A" in wanted:
        options = _strings(fields, "options")
        if len(options) != 4:
            raise ValueError(f"the field 'options' has {len(options)} entries; there must be 4")
        values |= {f"OPTION_{letter}": option for letter, option in zip("ABCD", options, strict=True)}
    if "func_call" in wanted:
        call = re.search(r"func_[0-9]+\(-?[0-9]+\)", question)
        if call is None:
            raise ValueError(f"the field 'input' is {question[:60]!r}, which calls no function such as func_1(2)")
        values |= {"func_call": call[0], "func": call[0].split("(")[0]}
    if "prefix" in wanted:
        target = re.search(r"The .+ of", question)
        if target is None:
            raise ValueError(f"the field 'input' is {question[:60]!r}, which does not ask for 'The ... of'")
        values["prefix"] = f"What is {target[0].lower()[:-3]} in the following list?"
    return values


def _labels(metric: str, fields: dict[str, Any]) -> list[Any]:
    """InfiniteBench's right answers, which are one value or a list, numbers or text, by task and release."""
    value = _field(fields, "answer", (str, int, float, list))
    many = value if isinstance(value, list) else [value]
    many = many[0] if many and isinstance(many[0], list) else many
    try:
        if metric in ("choice", "code_debug"):
            index = "ABCD".index(many[1]) if len(many) == 2 else fields["options"].index(many[0])
            return [(str(many[0]), "ABCD"[index])]
        if metric == "math_calc":
            return [[int(item) for item in (many[0], *many[1:])]]
        if metric in ("math_find", "code_run"):
            return [float(many[0])]
        return [str(item) for item in many] if metric in ("qa_f1", "character_f1", "rouge_lsum") else [str(many[0])]
    except (ValueError, IndexError, TypeError):
        raise ValueError(f"the field 'answer' is {json.dumps(value)[:60]}, no answer of a {metric} task") from None


def score(task: Task, prediction: str, example: Example) -> float:
    """The metric's value in [0, 1]: the best over the right answers."""
    chinese = task.metric in _CHINESE_WORDS
    extra: dict[str, Any] = {"cut": _segmenter()} if chinese else {}
    if task.metric.startswith(("keyword", "filtered")):
        extra["blacklist"] = published("lveval")["blacklist_zh" if chinese else "blacklist"]
    if task.metric.startswith("keyword"):
        extra["keywords"] = example.keywords
    if task.metric == "classification":
        extra["classes"] = example.classes
    if task.first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    metric = getattr(longbench_metrics, task.metric)
    return max(float(metric(prediction, answer, **extra)) for answer in example.answers)


@functools.cache
def _segmenter() -> longbench_metrics.Cut:
    jieba = importlib.import_module("jieba")  # optional: only Chinese words need it
    jieba.setLogLevel("ERROR")
    return jieba.lcut

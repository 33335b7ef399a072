"""LongBench, InfiniteBench and LV-Eval on local files: truncate in the middle, generate greedily, score.

The settings that the AllMem paper (arXiv 2602.13680) reports are a window of 4096 or 8192 tokens, 128 sinks, and
prompts of at most 128k tokens. Predictions are appended to OUT/TASK.jsonl as they are made, and a run that is started
again goes on from there.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import chat as chat_lib
from allmem_jax.decoding import generation
from allmem_jax.evaluation import divergence, longbench_data, questions
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.reporting import sections

TITLES = {
    "longbench": "LongBench",
    "longbench_e": "LongBench-E",
    "infinitebench": "InfiniteBench",
    "lveval": "LV-Eval",
}
WRITE_OFF = "write_off"  # the memory without its writing: the control


class Model(NamedTuple):
    """A variant with all its parameters, and a hash that tells it from others."""

    name: str
    config: config_lib.ModelConfig
    params: lm.Params
    key: str


def encode(tokenizer: chat_lib.Tokenizer, prompt: str, max_length: int, chat: bool) -> tuple[list[int], bool]:
    """Tokens of a prompt and whether it was truncated: to its first and last `max_length` // 2 tokens.

    As published, the two halves are joined as text, put into the chat template and tokenized anew, so that the result
    may be longer by the template's tokens. ValueError where the template fails.
    """
    ids = tokenizer_lib.encode_prompt(tokenizer, prompt)
    truncated = len(ids) > max_length
    if truncated:
        half = max_length // 2
        prompt = "".join(str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:half], ids[-half:]))
    if not chat:
        return (tokenizer_lib.encode_prompt(tokenizer, prompt) if truncated else ids), truncated
    rendered = questions.render(tokenizer, prompt)
    return tokenizer.encode(rendered, add_special_tokens=False, verbose=False), truncated


def variants(config: config_lib.ModelConfig, params: lm.Params, mixers: Sequence[str]) -> list[divergence.Variant]:
    """The ways to run a model that `mixers` names: a mixer of the config, or "write_off" for the control.

    Raises:
      ValueError: an unknown name, or a memory that the model does not have.
    """
    _, memory = lm.split_params(params)
    found = []
    for name in mixers:
        if name not in (*config_lib.MIXERS, WRITE_OFF):
            raise ValueError(f"mixers={name!r} is not one of {', '.join((*config_lib.MIXERS, WRITE_OFF))}")
        if name in ("swa", "full"):
            found.append(divergence.Variant(name, config.replace(mixer=name)))
            continue
        if not memory or name not in (config.memory_mixer, WRITE_OFF):
            there = f"a {config.memory_mixer} memory" if memory else "no memory"
            raise ValueError(
                f"mixers={name!r} needs a model with that memory, and this one has {there}: leave it out, or give a "
                "model that was converted with it"
            )
        config = config.replace(mixer=config.memory_mixer)
        found.append(divergence.Variant(name, config.replace(write=name != WRITE_OFF), memory))
    return found


def run(
    plan: longbench_data.Plan,
    params: lm.Params,
    tokenizer: chat_lib.Tokenizer,
    chosen: Sequence[divergence.Variant],
    out: str | os.PathLike[str],
    progress: Callable[[], Any] | None = None,
) -> dict[str, Any]:
    """Predicts and scores.

    Args:
      plan: from `longbench_data.prepare`.
      params: with the backbone that all variants share.
      tokenizer: of the model.
      chosen: what to compare.
      out: folder for TASK.jsonl. A line there that has the same model, prompt and answer length is used again.
      progress: called after each example of each variant.

    Returns:
      {"suite", "settings", "variants": name -> fields of the config, "skipped", "tasks": task -> {"metric", "base",
      "chat", "max_tokens", "groups": one name per example, "tokens": prompt lengths, "truncated": the number of prompts
      that were, "scores": variant -> one per example, in percent}}.
    """
    if plan.settings.chat == "always" and not tokenizer.chat_template:
        raise ValueError("chat='always', and the tokenizer has no chat template: use 'published' or 'never'")
    backbone, _ = lm.split_params(params)
    models = [_model(variant, backbone) for variant in chosen]
    pathlib.Path(out).mkdir(parents=True, exist_ok=True)
    return {
        "suite": plan.settings.suite,
        "settings": dataclasses.asdict(plan.settings),
        "variants": {variant.name: dataclasses.asdict(variant.config) for variant in chosen},
        "skipped": list(plan.skipped),
        "tasks": {
            task.name: _run_task(plan, task, tokenizer, models, pathlib.Path(out), progress) for task in plan.tasks
        },
    }


def _model(variant: divergence.Variant, backbone: lm.Params) -> Model:
    """The key is a hash of the config and of 64 numbers of every parameter."""
    params = lm.merge_params(backbone, variant.memory) if variant.memory else backbone
    config = variant.config
    if config.mixer == "full":  # the windowed mixers' sizes play no part
        config = config.replace(window=1, sinks=0, chunk=1)
    digest = hashlib.sha256(config.to_json().encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        values = np.asarray(leaf).ravel()
        digest.update(f"{jax.tree_util.keystr(path)} {leaf.shape} {leaf.dtype}".encode())
        digest.update(values[:: max(1, values.size // 64)].tobytes())
    return Model(variant.name, variant.config, params, digest.hexdigest())


def _run_task(
    plan: longbench_data.Plan,
    task: longbench_data.Task,
    tokenizer: chat_lib.Tokenizer,
    models: Sequence[Model],
    out: pathlib.Path,
    progress: Callable[[], Any] | None,
) -> dict[str, Any]:
    settings = plan.settings
    chat = settings.chat == "always" or (settings.chat == "published" and task.chat and bool(tokenizer.chat_template))
    examples: list[longbench_data.Example] = []
    encoded: list[list[int]] = []
    truncated = 0
    for example in longbench_data.read_examples(plan.folder, task, settings):
        tokens, shortened = encode(tokenizer, example.prompt, settings.max_length, chat)
        examples.append(example._replace(prompt=""))  # books need not stay in memory
        encoded.append(tokens)
        truncated += shortened
    longest, trained = max(map(len, encoded)), models[0].config.max_length
    if longest > trained:
        message = f"{task.name}: prompts have up to {longest} tokens, and the model was trained on {trained}"
        warnings.warn(message, stacklevel=2)
    scores = {}
    for each in models:
        made = _predict(out / f"{task.name}.jsonl", each, task, tokenizer, examples, encoded, settings, progress)
        scores[each.name] = [
            100 * longbench_data.score(task, prediction, example)
            for prediction, example in zip(made, examples, strict=True)
        ]
    return {
        "metric": task.metric,
        "base": task.base,
        "chat": chat,
        "max_tokens": task.max_tokens,
        "groups": [example.group for example in examples],
        "tokens": [len(prompt) for prompt in encoded],
        "truncated": truncated,
        "scores": scores,
    }


def _predict(
    path: pathlib.Path,
    each: Model,
    task: longbench_data.Task,
    tokenizer: chat_lib.Tokenizer,
    examples: Sequence[longbench_data.Example],
    encoded: Sequence[Sequence[int]],
    settings: longbench_data.Settings,
    progress: Callable[[], Any] | None,
) -> list[str]:
    """A prediction per example: out of the file where it is there, else made and appended to it."""
    known = load_predictions(path)
    keys = [_key(each, task, prompt) for prompt in encoded]
    found = [known.get((example.id, key)) for example, key in zip(examples, keys, strict=True)]
    todo = sorted((i for i, prediction in enumerate(found) if prediction is None), key=lambda i: -len(encoded[i]))
    if progress is not None:
        for _ in range(len(found) - len(todo)):
            progress()
    with open(path, "a", encoding="utf-8") as file:
        for index, prediction in _generate(each, task, tokenizer, todo, encoded, settings):
            found[index] = prediction
            row = {
                "id": examples[index].id,
                "mixer": each.name,
                "key": keys[index],
                "tokens": len(encoded[index]),
                "pred": prediction,
                "answers": examples[index].answers,
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()
            if progress is not None:
                progress()
    return [prediction or "" for prediction in found]


def _key(each: Model, task: longbench_data.Task, prompt: Sequence[int]) -> str:
    digest = hashlib.sha256(f"{each.key} {task.max_tokens}".encode())
    digest.update(np.asarray(prompt, np.int32).tobytes())
    return digest.hexdigest()[:16]


def _generate(
    each: Model,
    task: longbench_data.Task,
    tokenizer: chat_lib.Tokenizer,
    todo: Sequence[int],
    encoded: Sequence[Sequence[int]],
    settings: longbench_data.Settings,
) -> Iterator[tuple[int, str]]:
    """Yields (index, text) in the order of `todo`; every batch is full, so that one program serves."""
    stops = chat_lib.stop_tokens(tokenizer, each.config)
    params = lm.unstack(each.params, dtype=each.config.dtype)  # once for all batches
    for start in range(0, len(todo), settings.batch):
        rows = todo[start : start + settings.batch]
        out = generation.answers(
            params,
            each.config,
            [encoded[index] for index in rows],
            batch=settings.batch,
            max_tokens=task.max_tokens,
            stop_tokens=stops,
            piece=settings.piece,
        )
        for index, tokens in zip(rows, out, strict=True):
            yield index, str(tokenizer.decode(tokens, skip_special_tokens=True))


def load_predictions(path: pathlib.Path) -> dict[tuple[str, str], str]:
    """(id, key) -> prediction of a file that `run` wrote; a last line that was cut off is removed from it.

    Raises:
      ValueError: another line is damaged; it names the line.
    """
    if not path.is_file():
        return {}
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    found = {}
    for number, line in enumerate(content[:whole].splitlines(), 1):
        try:
            row = json.loads(line)
            found[row["id"], row["key"]] = str(row["pred"])
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: not a prediction: remove the line, or give another --out") from None
    return found


def command(
    model_path: str,
    plan: longbench_data.Plan,
    config: config_lib.ModelConfig,
    mixers: Sequence[str],
    out: str | os.PathLike[str] | None = None,
    memory: str | None = None,
) -> str:
    """What a user types to get a run's figures again, into `out` where that is given."""
    sizes = {name: getattr(config, name) for name in ("window", "sinks", "chunk", "dtype")}
    defaults = longbench_data.Settings(plan.settings.suite)
    names = ("tasks", "limit", "max_length", "chat", "batch")
    given = {name: getattr(plan.settings, name) for name in names}
    given = {name: value for name, value in given.items() if value != getattr(defaults, name)}
    asked = {"suite": plan.settings.suite, "mixers": tuple(mixers)} | sizes | given
    return sections.command("longbench", model_path, plan.folder, memory=memory, **asked, out=out)


def section(results: dict[str, Any], made_by: str) -> sections.Section:
    """What `run` found, for a report: scores by task and actual lengths, and scores by the length that a suite states.

    Args:
      results: from `run`.
      made_by: the command, from `command`.
    """
    suite, title = results["suite"], TITLES[results["suite"]]
    names = list(results["variants"])
    tables = [_scores_table(results, names)]
    if any(group for task in results["tasks"].values() for group in task["groups"]):
        tables.append(_lengths_table(results, names))
    return sections.Section(
        name=suite,
        title=title,
        command=made_by,
        text=tuple(_sentences(results, names)),
        tables=tuple(tables),
        data=results,
    )


def average(results: dict[str, Any], name: str) -> float:
    """The mean over tasks of the mean score of one variant, in percent, as the suites report it."""
    return float(np.mean([np.mean(task["scores"][name]) for task in results["tasks"].values()]))


def _scores_table(results: dict[str, Any], names: Sequence[str]) -> sections.Table:
    rows = []
    for name, task in results["tasks"].items():
        count, tokens = len(task["tokens"]), task["tokens"]
        scores = (_with_error(task["scores"][variant]) for variant in names)
        lengths = f"{np.mean(tokens):.0f}", f"{max(tokens)}", f"{task['truncated'] / count:.0%}"
        rows.append((name, task["metric"], str(count), *lengths, *scores))
    rows.append(("average", "", "", "", "", "", *(f"{average(results, variant):.2f}" for variant in names)))
    header = ("task", "metric", "examples", "mean tokens", "most tokens", "truncated", *names)
    caption = "Scores in percent, with their standard errors over examples; tokens of a prompt are after truncation."
    return sections.Table(caption, header, tuple(rows))


def _lengths_table(results: dict[str, Any], names: Sequence[str]) -> sections.Table:
    """Scores by the length that the suite tells: LongBench-E's buckets, LV-Eval's levels."""
    cells: dict[tuple[str, str], dict[str, list[float]]] = {}
    for task in results["tasks"].values():
        for variant in names:
            for group, value in zip(task["groups"], task["scores"][variant], strict=True):
                if group:
                    cells.setdefault((task["base"], variant), {}).setdefault(group, []).append(value)
    groups = [group for group in longbench_data.GROUPS if any(group in cell for cell in cells.values())]
    rows = []
    for (base, variant), cell in cells.items():
        rows.append((base, variant, *(f"{np.mean(cell[group]):.2f}" if group in cell else "-" for group in groups)))
    for variant in names:
        of = [cell for (_, name), cell in cells.items() if name == variant]
        means = ([np.mean(cell[group]) for cell in of if group in cell] for group in groups)
        rows.append(("average", variant, *(f"{np.mean(values):.2f}" for values in means)))
    return sections.Table("Scores by the length that the suite states.", ("task", "mixer", *groups), tuple(rows))


def _with_error(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{np.mean(values):.2f}"
    return f"{np.mean(values):.2f} ± {np.std(values, ddof=1) / len(values) ** 0.5:.2f}"


def _sentences(results: dict[str, Any], names: Sequence[str]) -> Iterator[str]:
    tasks, settings, suite = results["tasks"], results["settings"], results["suite"]
    title, source = TITLES[suite], longbench_data.published(suite)
    found = ", ".join(f"{name} {average(results, name):.2f}" for name in names)
    yield f"Average over {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'} of {title}: {found} (percent)."
    tokens = [length for task in tasks.values() for length in task["tokens"]]
    truncated = sum(task["truncated"] for task in tasks.values())
    yield (
        f"Prompts have {np.mean(tokens):.0f} tokens on average and {max(tokens)} at most; {truncated} of {len(tokens)} "
        f"were cut to {settings['max_length']}, without their middle. Answers are greedy and as long as published."
    )
    windows = {name: config["window"] for name, config in results["variants"].items() if config["mixer"] != "full"}
    for name, window in windows.items():
        beyond, sinks = np.mean([length > window for length in tokens]), results["variants"][name]["sinks"]
        yield f"{name}: window {window}, sinks {sinks}; {beyond:.0%} of the prompts are longer than the window."
    trained = next(iter(results["variants"].values()))["max_length"]
    if "full" in names and max(tokens) > trained:
        yield f"The original was trained on {trained} tokens, fewer than the longest prompt has."
    plain = [name for name, task in tasks.items() if not task["chat"] and longbench_data.known_tasks(suite)[name].chat]
    if plain:
        yield f"Run without a chat template, which the published runs use: {', '.join(plain)}."
    if settings["limit"] is not None:
        yield f"Only the first {settings['limit']} examples of each task were run."
    if results["skipped"]:
        yield f"Left out: {'; '.join(results['skipped'])}."
    yield f"Prompts, lengths of answers and metrics: {source['source']} ({source['paper']})."

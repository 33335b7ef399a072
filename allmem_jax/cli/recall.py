"""`allmem recall`."""

from __future__ import annotations

import dataclasses
from typing import Any

from allmem_jax.cli import options, terminal


def recall(
    model: options.Model,
    texts: options.Texts = (),
    mixing: options.MixingOptions = options.MIXING,
    questions: options.ReadPath | None = None,
    tasks: tuple[str, ...] = (),
    pairs: tuple[int, ...] = (),
    lengths: tuple[int, ...] = (),
    samples: int = 32,
    chat: bool = False,
    seed: int = 0,
    batch: int = 8,
    out: options.Out = "out/recall",
) -> None:
    """Ask a converted model, beside its original, for what it read beyond its window, and within.

    Words and numbers are hidden in the texts and asked for; with --questions the texts themselves are asked about. What
    was answered is kept in OUT/parts: a second run goes on where the first was stopped.

    Example: allmem recall smollm2-allmem moby_dick.txt --lengths 512 1024 --samples 64

    Example: allmem recall smollm2-allmem moby_dick.txt --pairs 1 3 8 16 32 --lengths 1000 2000 4000 8000

    Args:
        questions: JSON lines, each a question about one of the texts.
        tasks: Names of tasks; default: those that a small model can do, unless there are pairs to ask.
        pairs: Numbers of names with a word each that a prompt hides at once, as tasks pairs_1, pairs_3 and so on.
        lengths: Tokens of prompt and answer of the long tasks; default: several windows.
        samples: Examples of a task at a length.
        chat: Ask through the model's chat template; otherwise as a text that the answer continues.
        seed: Of the examples.
        batch: Prompts run together.
        out: Folder for the answers and recall.json, a section of a report; or its URL.
    """
    from allmem_jax.evaluation import divergence_report, recall_report
    from allmem_jax.evaluation import questions as questions_lib
    from allmem_jax.evaluation import recall as recall_lib
    from allmem_jax.reporting import sections

    with options.results(out) as folder:
        asked = questions_lib.read_questions(questions) if questions else []
        named = divergence_report.read_texts(texts)
        config, params, tokenizer = options.load_model(model, mixing)
        backbone, variants = recall_lib.variants(config, params)
        settings = recall_lib.defaults(config, bool(asked))
        tasks = (*tasks, *(f"pairs_{count}" for count in pairs)) or settings.tasks
        asking: Any = dict(tasks=tasks, lengths=lengths or settings.lengths, samples=samples, chat=chat, seed=seed)
        settings = dataclasses.replace(settings, **asking, batch=batch)
        section = recall_report.section(
            settings,
            backbone,
            tokenizer,
            named,
            variants,
            questions=asked,
            parts=folder / "parts",
            source=options.fingerprint(model, mixing),
            command=recall_lib.command(model, texts, questions, settings, config, out, memory=mixing.memory),
        )
        sections.save(folder / f"{section.name}.json", section)
    terminal.print_section(section)

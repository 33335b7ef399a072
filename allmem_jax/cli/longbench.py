"""`allmem longbench`."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from allmem_jax.cli import options, terminal

Data = Annotated[options.ReadPath, tyro.conf.Positional, tyro.conf.arg(metavar="DATA_DIR")]
Variant = Literal["allmem", "mamba2", "delta", "write_off", "swa", "full"]


def longbench(
    model: options.Model,
    data: Data,
    mixing: options.MixingOptions = options.MIXING,
    suite: options.Suite = "longbench",
    tasks: tuple[str, ...] = (),
    mixers: tuple[Variant, ...] = (),
    limit: int | None = None,
    max_length: int = 131072,
    chat: Literal["published", "always", "never"] = "published",
    batch: int = 1,
    out: options.Out = "out/longbench",
) -> None:
    """Score a model on local files of LongBench, InfiniteBench or LV-Eval, with their prompts and metrics.

    Predictions are kept in OUT/TASK.jsonl as they are made: a second run goes on where the first was stopped.
    The AllMem paper runs with --window 4096 (or 8192) --sinks 128.

    Example: allmem longbench smollm2-allmem data/LongBench --mixers full swa allmem --out out/longbench

    Args:
        data: Folder with the published JSON lines, one file a task.
        suite: Which of them.
        tasks: Names of files without .jsonl; default: all that are there.
        mixers: Several to compare; write_off is the memory without its writing. Default: the one of --mixer.
        limit: Only the first so many examples of each task.
        max_length: Tokens of a prompt; longer ones lose their middle.
        chat: When prompts go into the model's chat template: for the tasks that publish so, always, or never.
        batch: Prompts run together.
        out: Folder for the predictions and SUITE.json, a section of a report; or its URL.
    """
    from allmem_jax.evaluation import longbench as longbench_lib
    from allmem_jax.evaluation import longbench_data
    from allmem_jax.model import config as config_lib
    from allmem_jax.reporting import sections

    with options.results(out) as folder:
        plan = longbench_data.prepare(data, longbench_data.Settings(suite, tasks, limit, max_length, chat, batch))
        for line in plan.skipped:
            terminal.say(f"left out: {line}")
        memory: Any = next((name for name in mixers if name in config_lib.MEMORY_MIXERS), mixing.mixer)
        config, params, tokenizer = options.load_model(model, dataclasses.replace(mixing, mixer=memory))
        mixers = mixers or (config.mixer,)
        options.check_window(mixing, mixers)
        variants = longbench_lib.variants(config, params, mixers)
        progress = terminal.progress(sum(plan.counts) * len(variants), "answering")
        results = longbench_lib.run(plan, params, tokenizer, variants, folder, lambda: progress(1))
        section = longbench_lib.section(
            results, longbench_lib.command(str(model), plan, config, mixers, out, memory=mixing.memory)
        )
        sections.save(folder / f"{suite}.json", section)
    terminal.print_section(section)

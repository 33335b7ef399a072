"""`allmem cost`."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Annotated

import tyro

from allmem_jax.cli import options, terminal

Models = Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="MODEL ...")]


def cost(
    models: Models = ("qwen3-0.6b", "qwen3-1.7b"),
    context: int = 131072,
    windows: tuple[int, ...] = (4096, 8192),
    out: options.Out | None = None,
    measure: bool = False,
) -> None:
    """Compare full attention, windows and the memories: operations of a token and bytes of state. Loads no weights.

    By formula, at context lengths from 1,024 to 262,144 tokens. With --measure also in seconds on this machine, on two
    layers of the first model's shape with random weights, at 1,024 to 16,384 tokens.

    Example: allmem cost qwen3-0.6b --measure --out out/cost

    Args:
        models: Folders, .gguf files, or names of presets.
        context: Tokens seen when the token of the table is decoded.
        windows: Tokens that attention sees, in the mixers that have a window; the first is plotted.
        out: Folder to write the figures to, as JSON; or its URL.
        measure: Measure times as well; takes a few minutes.
    """
    from allmem_jax.checkpoints import load
    from allmem_jax.evaluation import cost as cost_lib
    from allmem_jax.evaluation import latency
    from allmem_jax.reporting import sections

    if not models or not windows:
        raise ValueError("models or windows is empty: give at least one folder, .gguf file or preset, and one window")
    with contextlib.nullcontext() if out is None else options.results(out) as folder:
        command = sections.command("cost", *models, context=context, windows=windows, out=out, measure=measure)
        configs = {name: load.read_config(name).replace(dtype="bfloat16") for name in models}
        made = [cost_lib.section(configs, windows=windows, context=context)]
        if measure:
            name, config = next(iter(configs.items()))
            made.append(latency.section(latency.small(config), name))
        for section in made:
            terminal.print_section(section)
            if folder is not None:
                sections.save(folder / f"{section.name}.json", dataclasses.replace(section, command=command))

"""`allmem report`."""

from __future__ import annotations

import functools
from typing import Literal

from allmem_jax.cli import options

Part = Literal["distance", "answers", "cost", "latency"]


def report(
    model: options.Model,
    texts: options.Texts = (),
    out: options.Out = "out/report",
    length: int | None = None,
    sequences: int = 2,
    prompt_length: int | None = None,
    samples: int = 8,
    questions: options.ReadPath | None = None,
    longbench: options.ReadPath | None = None,
    suite: options.Suite = "longbench",
    skip: tuple[Part, ...] = (),
    include: tuple[options.ReadPath, ...] = (),
    dtype: options.DType = "float32",
) -> int:
    """Measure a converted model in every way that this machine can, on one HTML page with plots.

    Each section names the command that makes it alone. What a part has measured is kept in the folder: a second run
    goes on where the first was stopped. A part that fails is shown as failed; the exit code is then 1.

    Example: allmem report smollm2-allmem moby_dick.txt --out out/report

    Args:
        out: Folder to write report.json and index.html to, or its URL.
        length: Tokens of a sequence; default: 2048, or two windows if that is more.
        sequences: Sequences from each text that are compared with the original.
        prompt_length: Tokens of a prompt that hides something; default: 512, or four windows if that is more.
        samples: Questions of each kind, and examples of each task of LongBench.
        questions: JSON lines with questions about the texts.
        longbench: Folder with the files of LongBench, InfiniteBench or LV-Eval, to be scored too.
        suite: Which of them.
        skip: Parts to leave out.
        include: Section files that other programs wrote, to show as they are.
    """
    from allmem_jax.evaluation import full_report
    from allmem_jax.storage import stores

    with options.results(out) as folder:
        sizes = length, sequences, prompt_length, samples
        settings = full_report.Settings(model, texts, out, *sizes, questions, longbench, suite, skip, include, dtype)
        load = functools.partial(options.load_model, model, options.Mixing(dtype=dtype))
        page, failed = full_report.run(settings, folder, load)
    print(f"report: {stores.join(out, page.name)}")
    return 1 if failed else 0

"""`allmem evaluate`."""

from __future__ import annotations

from allmem_jax.cli import options


def evaluate(
    model: options.Model,
    texts: options.Texts,
    mixing: options.MixingOptions = options.MIXING,
    out: options.Out = "out/evaluation",
    length: int = 2048,
    sequences: int = 2,
    batch: int = 1,
) -> None:
    """Compare a converted model with its original on text files.

    Reports the KL from the original inside and beyond the window, for windowed attention alone, with the memory, and
    with the memory's writing off, as JSON, PNG and one HTML page.

    Example: allmem evaluate smollm2-allmem moby_dick.txt persuasion.txt --out out/books

    Args:
        out: Folder to write report.json, distance.png and index.html to, or its URL.
        length: Tokens of a sequence.
        sequences: Sequences from each text, spread over it.
        batch: Sequences run together.
    """
    from allmem_jax.evaluation import divergence_report
    from allmem_jax.reporting import page as page_lib
    from allmem_jax.reporting import sections
    from allmem_jax.storage import stores

    with options.results(out) as folder:
        named = divergence_report.read_texts(texts)
        config, params, tokenizer = options.load_model(model, mixing)
        sizes = {"length": length, "sequences": sequences, "batch": batch}
        command = sections.command("evaluate", model, *texts, **vars(mixing), out=out, **sizes)
        section = divergence_report.measure(config, params, tokenizer, named, **sizes, command=command)
        settings = sections.Table("", ("setting", "value"), tuple((k, str(v)) for k, v in vars(config).items()))
        described = sections.Section("settings", "Settings", command, tables=(settings,))
        page = page_lib.write(folder, page_lib.Report(f"{model.name} against its original", (section, described)))
    for name, rows in section.data["texts"].items():
        beyond = (f"{key} {page_lib.number(row['kl_beyond'])}" for key, row in rows.items() if "kl_beyond" in row)
        print(f"{name}: KL beyond the window: {', '.join(beyond)}")
    print(f"report: {stores.join(out, page.name)}")

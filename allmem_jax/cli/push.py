"""`allmem push`."""

from __future__ import annotations

from typing import Annotated

import tyro

from allmem_jax.cli import options, terminal

Repo = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REPO", help="OWNER/NAME on the Hub.")]


def push(
    model: options.Model,
    repo: Repo,
    private: bool = False,
    message: str = "Upload a model with a memory",
    base: str | None = None,
    license: str | None = None,
    memory: str | None = None,
    figures: tuple[options.ReadPath, ...] = (),
) -> None:
    """Upload a converted model to the Hugging Face Hub, from where hf://OWNER/NAME loads it.

    The token is that of HF_TOKEN or `hf auth login`. A README.md in the folder is the model's card; without one it is
    made from the config and what is given here.

    Example: allmem push smollm2-allmem me/smollm2-allmem --base HuggingFaceTB/SmolLM2-135M-Instruct

    Args:
        private: Let only its owner see a repository that is made.
        message: Of the commit.
        base: The pretrained model on the Hub, for the card.
        license: Its license as the Hub names it, such as apache-2.0, for the card.
        memory: The trained memory that the model was converted with, whose own card is shown.
        figures: Sections of a report, such as recall.json of `allmem recall`, whose tables are shown.
    """
    from allmem_jax.checkpoints import card, layout, memory_file
    from allmem_jax.reporting import sections
    from allmem_jax.storage import hub

    if not (model / layout.ALLMEM_WEIGHTS).is_file():
        raise ValueError(f"{model} has no {layout.ALLMEM_WEIGHTS}: it is no converted model; run allmem convert first")
    config = layout.read_config(model)
    text = None
    if not (model / "README.md").is_file():
        told = ""
        if memory is not None:
            memory_file.load(memory, config)  # a ValueError where it is for another model
            told = memory_file.describe(memory)[1]
        tables = [sections.plain(table) for path in figures for table in sections.load(path).tables]
        text = card.text(repo, config, base=base, license=license, memory=told, figures="\n\n".join(tables))
    terminal.say(f"uploading {model}")
    print(hub.upload(model, repo, text, private=private, message=message))

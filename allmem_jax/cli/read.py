"""`allmem read`."""

from __future__ import annotations

from typing import Annotated

import tyro

from allmem_jax.cli import options, terminal

Text = Annotated[options.ReadPath, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT", help="UTF-8 text file.")]


def read(
    model: options.Model,
    text: Text,
    mixing: options.MixingOptions = options.MIXING,
    out: str = "out/read.state",
    state: options.ReadPath | None = None,
) -> None:
    """Read a text once, and keep what the model knows after it: a file of constant size, however long the text is.

    Example: allmem read SmolLM2.gguf book.txt --memory smollm2-135m-instruct --out book.state

    Args:
        out: File for the state, or its URL.
        state: Go on from this state, as after an earlier part; it is left as it is.
    """
    from allmem_jax.checkpoints import tokenizer as tokenizer_lib
    from allmem_jax.decoding import generation
    from allmem_jax.model import state as state_lib

    content = text.read_text(encoding="utf-8")
    if not content.strip():
        raise ValueError(f"{text} is empty: give a text to read")
    config, params, tokenizer = options.load_to_decode(model, mixing)
    if config.mixer == "full":
        raise ValueError("full attention has no state of constant size: add --memory, or --mixer swa")
    past = None if state is None else state_lib.load_state(state, config)
    ids = tokenizer_lib.encode_prompt(tokenizer, content, begins=past is None)
    progress = terminal.progress(len(ids), "reading")
    _, after = generation.prefill(params, config, [ids], state=past, progress=progress)
    state_lib.save_state(out, config, after)
    print(f"read {len(ids):,} tokens, {int(after.position[0]):,} in all; the state is {out}")

"""`allmem ask`."""

from __future__ import annotations

from typing import Annotated

import tyro

from allmem_jax.cli import options, terminal

State = Annotated[
    options.ReadPath, tyro.conf.Positional, tyro.conf.arg(metavar="STATE", help="File that `allmem read` wrote.")
]
Question = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUESTION")]


def ask(
    model: options.Model,
    state: State,
    question: Question,
    mixing: options.MixingOptions = options.MIXING,
    writing: options.WritingOptions = options.WRITING,
    plain: bool = False,
) -> None:
    """Ask about a text that `allmem read` read; the state is left as it is, so any number of questions can follow.

    Example: allmem ask SmolLM2.gguf book.state "Who is Ishmael?" --memory smollm2-135m-instruct

    Args:
        question: What to ask.
        plain: Go on from the text with the question as it is, without the model's chat template.
    """
    from allmem_jax.decoding import chat
    from allmem_jax.model import state as state_lib

    question = terminal.unicode("the question", question)
    if not question.strip():
        raise ValueError("the question is empty: write something")
    given = options.answering(writing)
    config, params, tokenizer = options.load_to_decode(model, mixing)
    after = state_lib.load_state(state, config)
    if not plain:
        asked = [{"role": "user", "content": question}]
        question = chat.render(tokenizer, asked, thinking=options.switch(writing))
    terminal.print_stream(chat.complete(params, config, tokenizer, question, **given, state=after))

"""`allmem generate`."""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from allmem_jax.cli import options, terminal

Prompt = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT")]


def generate(
    model: options.Model,
    prompt: Prompt,
    mixing: options.MixingOptions = options.MIXING,
    writing: options.WritingOptions = options.WRITING,
    chat: bool = False,
) -> None:
    """Continue a text; it appears as it is written.

    Example: allmem generate smollm2-allmem "Call me Ishmael." --max-tokens 100

    Example: cat book.txt question.txt | allmem generate smollm2-allmem - --temperature 0.7 --top-p 0.9

    Args:
        prompt: Text to continue; - reads standard input. One that begins with a dash goes last, after --.
        chat: Take the prompt as a user's message, in the model's chat template.
    """
    from allmem_jax.checkpoints import tokenizer as tokenizer_lib
    from allmem_jax.decoding import chat as chat_lib

    if writing.thinking and not chat:
        raise ValueError(f"--thinking {writing.thinking} is a switch of the chat template: add --chat")
    prompt = terminal.unicode("the prompt", sys.stdin.read() if prompt == "-" else prompt)
    if not prompt.strip():
        raise ValueError("the prompt is empty: give some text to continue, or - to read it from standard input")
    given = options.answering(writing)
    config, params, tokenizer = options.load_to_decode(model, mixing)
    options.check_window(mixing, [config.mixer])
    if chat:
        talk = chat_lib.Conversation(params, config, tokenizer, **given, thinking=options.switch(writing))
        return terminal.print_stream(talk.reply(prompt))
    progress = terminal.progress(len(tokenizer_lib.encode_prompt(tokenizer, prompt)), "reading the prompt")
    pieces = chat_lib.complete(params, config, tokenizer, prompt, **given, progress=progress)
    print(prompt, end="", flush=True)
    return terminal.print_stream(pieces)

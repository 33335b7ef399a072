"""`allmem chat`."""

from __future__ import annotations

import sys

from allmem_jax.cli import options, terminal


def chat(
    model: options.Model,
    mixing: options.MixingOptions = options.MIXING,
    writing: options.WritingOptions = options.TALKING,
    system: str = "",
    context: int = 4096,
    state: options.ReadPath | None = None,
) -> None:
    """Talk with an instruction-tuned model. An empty line or Ctrl-D ends it.

    A converted model keeps a state of constant size: a turn costs its own tokens, however long the chat is.

    Example: allmem chat smollm2-allmem --system "Answer in one sentence."

    Example: allmem chat SmolLM2-135M-Instruct.Q4_1.gguf --memory smollm2-135m-instruct

    Example: allmem chat SmolLM2.gguf --state book.state --memory smollm2-135m-instruct

    Args:
        system: What the model is told first.
        context: Longest chat with full attention, in tokens.
        state: What `allmem read` read, to talk about; it is left as it is.
    """
    from allmem_jax.decoding import chat as chat_lib
    from allmem_jax.model import state as state_lib

    given, system = options.answering(writing), terminal.unicode("the system message", system)
    config, params, tokenizer = options.load_to_decode(model, mixing)
    options.check_window(mixing, [config.mixer])
    messages = [{"role": "system", "content": system}] if system else []
    thinking = options.switch(writing)
    start = None if state is None else state_lib.load_state(state, config)
    talk = chat_lib.Conversation(
        params, config, tokenizer, **given, context=context, messages=messages, thinking=thinking, start=start
    )
    while line := _ask():
        terminal.print_stream(talk.reply(line))


def _ask() -> str:
    try:
        return terminal.unicode("the message", input("> " if sys.stdin.isatty() else "").strip())
    except EOFError:
        return ""

"""Text in and text out: streamed completions, and conversations that never read a turn twice."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import transformers

from allmem_jax import config as config_lib
from allmem_jax import generation, model, state

Tokenizer = transformers.PreTrainedTokenizerBase

# What instruction-tuned models of the supported families end a turn with, beside the tokenizer's own end of sequence.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>")


def stop_tokens(tokenizer: Tokenizer) -> list[int]:
    """The ids that end a text or a turn."""
    added = tokenizer.get_added_vocab()
    ids = {added[text] for text in TURN_ENDS if text in added}
    return sorted(ids if tokenizer.eos_token_id is None else ids | {tokenizer.eos_token_id})


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int]) -> Iterator[str]:
    """The text of tokens as they come.

    A character that is spread over several tokens comes when it is complete. Each piece is decoded after the one before
    it, since tokenizers drop a leading space at the start of a text.
    """
    before: list[int] = []
    pending: list[int] = []
    for token in ids:
        pending.append(token)
        known, text = _decode(tokenizer, before), _decode(tokenizer, before + pending)
        if text.endswith("\ufffd") and len(pending) < 8:
            continue
        if text[len(known) :]:
            yield text[len(known) :]
        before, pending = pending, []
    if pending:
        yield _decode(tokenizer, before + pending)[len(_decode(tokenizer, before)) :]


def _decode(tokenizer: Tokenizer, ids: list[int], *, special: bool = False) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=not special))


def complete(
    params: model.Params,
    config: config_lib.ModelConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    sampling: generation.Sampling = generation.GREEDY,
    seed: int = 0,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[str]:
    """Continues a prompt, yielding the new text piece by piece, until a stop token or `max_tokens`.

    Args:
      params: of the model.
      config: the model; with mixer="full" the cache is as long as prompt and continuation.
      tokenizer: of the model.
      prompt: text, not empty; a chat template is not applied.
      max_tokens: at least 1.
      sampling: greedy by default.
      seed: of the draws.
      progress: called with the number of prompt tokens just read.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    sampling.check()
    ids = tokenizer.encode(prompt)
    if config.mixer == "full":
        config = generation.full_as_windowed(config, len(ids) + max_tokens)
    logits, start = generation.prefill(params, config, [ids], progress=progress)
    stops = stop_tokens(tokenizer)
    steps = generation.stream(
        params, config, logits, start, max_tokens=max_tokens, sampling=sampling, stop_tokens=stops, seed=seed
    )
    drawn = (int(tokens[0]) for tokens, *_ in steps)
    yield from decode_stream(tokenizer, (token for token in drawn if token not in stops))


@dataclasses.dataclass
class Conversation:
    """A chat and the decode state that has read it: a turn costs its own tokens, however long the chat is.

    Attributes:
      params, config, tokenizer: the model. A "full" mixer gets a cache of `context` tokens.
      sampling, max_tokens, seed: of every reply.
      context: the longest chat of a "full" mixer, in tokens.
      messages: what was said, as chat templates take it.
    """

    params: model.Params
    config: config_lib.ModelConfig
    tokenizer: Tokenizer
    sampling: generation.Sampling = generation.GREEDY
    max_tokens: int = 512
    seed: int = 0
    context: int = 4096
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    _seen: str = ""  # the text that the state has read
    _state: state.DecodeState | None = None

    def __post_init__(self):
        if not self.tokenizer.chat_template:
            raise ValueError("the tokenizer has no chat template: use `allmem generate`, or an instruction-tuned model")
        self.sampling.check()
        self._room = None
        if self.config.mixer == "full":
            self.config = generation.full_as_windowed(self.config, self.context)
            self._room = self.config.window

    def reply(self, text: str) -> Iterator[str]:
        """Yields the model's answer to `text` piece by piece; both join `messages`."""
        if not text.strip():
            raise ValueError("the message is empty: write something")
        messages = [*self.messages, {"role": "user", "content": text}]
        rendered = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        if not rendered.startswith(self._seen):  # the template changed what was said before: read it all again
            self._seen, self._state = "", None
        new = self.tokenizer.encode(rendered[len(self._seen) :], add_special_tokens=False)
        self._check_room(len(new) + self.max_tokens)
        logits, start = generation.prefill(self.params, self.config, [new], state=self._state)
        answer: list[int] = []
        yield from decode_stream(self.tokenizer, self._tokens(logits, start, answer))
        spoken = [token for token in answer if token not in stop_tokens(self.tokenizer)]
        content = _decode(self.tokenizer, spoken)
        self.messages = [*messages, {"role": "assistant", "content": content}]
        self._seen = rendered + _decode(self.tokenizer, answer, special=True)

    def _tokens(self, logits: jax.Array, start: state.DecodeState, answer: list[int]) -> Iterator[int]:
        """Draws an answer into `answer`, stop token included, and yields it without; keeps the state after it."""
        stops = stop_tokens(self.tokenizer)
        steps = generation.stream(
            self.params, self.config, logits, start, max_tokens=self.max_tokens, sampling=self.sampling,
            stop_tokens=stops, seed=self.seed + len(self.messages),
        )  # fmt: skip
        for tokens, _, _, after in steps:
            answer.append(int(tokens[0]))
            self._state = after
            if answer[-1] not in stops:
                yield answer[-1]

    def _check_room(self, new: int) -> None:
        used = 0 if self._state is None else int(self._state.position[0])
        if self._room is not None and used + new > self._room:
            raise ValueError(
                f"the chat may reach {used + new} tokens and full attention was given a cache of {self._room}: "
                "start again with a larger --context, or with a converted model, which needs none"
            )

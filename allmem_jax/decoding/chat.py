"""Text in and text out: chat templates, streamed text and where it ends, and conversations that read a turn once."""

import dataclasses
import re
import weakref
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import transformers

from allmem_jax.checkpoints import ends
from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.decoding import generation
from allmem_jax.model import config as config_lib
from allmem_jax.model import lm
from allmem_jax.model import state as state_lib

Tokenizer = transformers.PreTrainedTokenizerBase
Messages = Sequence[dict[str, str]]

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")  # how sentencepiece vocabularies write the bytes of rare characters


def stop_tokens(tokenizer: Tokenizer, config: config_lib.ModelConfig | None = None) -> list[int]:
    """The ids that end a text or a turn: the tokenizer's and the config's."""
    return sorted(ends.of_tokenizer(tokenizer) | set(config.eos_tokens if config is not None else ()))


def render(
    tokenizer: Tokenizer, messages: Messages, *, generation_prompt: bool = True, thinking: bool | None = None
) -> str:
    """The text of a chat, by the tokenizer's template.

    Args:
      tokenizer: of an instruction-tuned model.
      messages: {"role", "content"} each.
      generation_prompt: end with what opens the assistant's turn.
      thinking: the template's switch `enable_thinking`; None leaves it as the template has it.

    Raises:
      ValueError: no template, one that refuses the messages or does not parse, or one without that switch.
    """
    if not tokenizer.chat_template:
        raise ValueError("the tokenizer has no chat template: use `allmem generate`, or an instruction-tuned model")
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generation_prompt}
    if thinking is not None:
        if "enable_thinking" not in str(tokenizer.chat_template):
            raise ValueError("the chat template has no enable_thinking: leave thinking out")
        options["enable_thinking"] = thinking
    try:
        return str(tokenizer.apply_chat_template(list(messages), **options))
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
    if any(message["role"] == "system" for message in messages):
        hint = ": models without a system role refuse one; leave it out (--system), or begin the first question with it"
    else:
        hint = ": correct the model's chat template, or use `allmem generate` without a template"
    raise ValueError(f"the chat template fails on these messages ({reason}){hint}")


class Decoder:
    """The text of tokens as they come; together exactly what decoding `before` and all of them adds to `before`.

    A character that is spread over several tokens comes when it is complete, and a run of sentencepiece's bytes with
    the token after it, which decides whether the run is text at all.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()):
        """`before`: tokens that precede. Tokenizers drop a leading space at the start of a text, not in its middle."""
        self._tokenizer = tokenizer
        self._skipped = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
        self._context = [token for token in before if token not in self._skipped]
        self._run = list[int]()
        self._known = _settled(_decode(tokenizer, self._context))

    def push(self, token: int) -> str:
        """The text that is complete with this token; special tokens have none."""
        if token in self._skipped:
            return ""
        self._run.append(token)
        if _BYTE.fullmatch(str(self._tokenizer.convert_ids_to_tokens(token))):
            return ""
        piece = _settled(_decode(self._tokenizer, self._context + self._run))[len(self._known) :]
        # Enough for a character of four tokens to begin in.
        self._context, self._run = (self._context + self._run)[-8:], []
        self._known = _settled(_decode(self._tokenizer, self._context))
        return piece

    def finish(self) -> str:
        """What is left when no token follows."""
        return _decode(self._tokenizer, self._context + self._run)[len(self._known) :]


def decode_stream(tokenizer: Tokenizer, ids: Iterable[int], before: Sequence[int] = ()) -> Iterator[str]:
    """The pieces of a `Decoder` that are not empty."""
    decoder = Decoder(tokenizer, before)
    yield from filter(None, map(decoder.push, ids))
    yield from filter(None, [decoder.finish()])


def _decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _settled(text: str) -> str:
    """`text` without the mark of an unfinished character at its end, which the next token may complete."""
    return text.removesuffix("\ufffd")


class Stopper:
    """Text up to the first of `stops` that completes; what may be the beginning of one is held back.

    However the text is cut into pieces, the result is the same text.
    """

    def __init__(self, stops: Sequence[str]):
        """`stops`: texts, none empty."""
        if "" in stops:
            raise ValueError("a stop string is empty: give the text to stop at")
        self._stops, self._held, self.stopped = stops, "", False

    def push(self, piece: str) -> str:
        """What of the text so far can be shown and was not; nothing comes after `stopped`."""
        held = self._held + piece
        found = [(place + len(stop), place) for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)[1]]
        begun = max((n for stop in self._stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        shown, self._held = held[: len(held) - begun], held[len(held) - begun :]
        return shown

    def finish(self) -> str:
        """What was held back when no text follows."""
        return self._held


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """The pieces of a `Stopper` that are not empty. After a stop no more pieces are asked for."""
    stopper = Stopper(stops)
    for piece in pieces:
        if shown := stopper.push(piece):
            yield shown
        if stopper.stopped:
            return
    yield from filter(None, [stopper.finish()])


def complete(
    params: lm.Params,
    config: config_lib.ModelConfig,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int,
    sampling: generation.Sampling = generation.GREEDY,
    seed: int = 0,
    stop: Sequence[str] = (),
    state: state_lib.DecodeState | None = None,
    progress: Callable[[int], Any] | None = None,
) -> Iterator[str]:
    """Reads a prompt and yields the text that continues it piece by piece, until a stop or `max_tokens`.

    Args:
      params: of the model.
      config: the model; with mixer="full" the cache is as long as prompt and continuation.
      tokenizer: of the model.
      prompt: text, not empty; a chat template is not applied.
      max_tokens: at least 1.
      sampling: greedy by default.
      seed: of the draws.
      stop: texts to stop at, which are not yielded.
      state: what was read before the prompt, one row; it is left as it is.
      progress: called with the number of prompt tokens just read.
    """
    if not prompt:
        raise ValueError("the prompt is empty: give some text to continue")
    if max_tokens < 1:
        raise ValueError(f"max_tokens={max_tokens} must be at least 1")
    sampling.check()
    ids = tokenizer_lib.encode_prompt(tokenizer, prompt, begins=state is None)
    past = 0 if state is None else int(state.position[0])
    generation.warn_beyond(config, past + len(ids), max_tokens)
    config, state = generation.with_room(config, state, 1, len(ids) + max_tokens)
    params = lm.unstack(params, dtype=config.dtype)
    logits, state = generation.prefill(params, config, [ids], state=state, progress=progress)
    stops = stop_tokens(tokenizer, config)
    steps = generation.stream(
        params, config, logits, state, max_tokens=max_tokens, sampling=sampling, stop_tokens=stops, seed=seed
    )
    drawn = (int(tokens[0]) for tokens, *_ in steps)
    return until(decode_stream(tokenizer, (token for token in drawn if token not in stops), before=ids), stop)


@dataclasses.dataclass
class Conversation:
    """A chat and the decode state that has read it: a turn costs its own tokens, however long the chat is.

    A reply follows from what the template makes of all messages, whatever came before. The state is kept where the
    template leaves the tokens that it has read as they are. Otherwise, as where it drops an answer's thoughts, the
    last answer is read again from the state before it, or the whole chat from its beginning.

    Attributes:
      params, config, tokenizer: the model. The cache of a "full" mixer grows with the chat.
      sampling, max_tokens, seed: of every reply.
      context: the longest chat of a "full" mixer in tokens, for which its cache is made at once; None sets no limit.
      messages: what was said, as chat templates take it.
      stop: texts that end a reply, without being part of it.
      thinking: the template's switch `enable_thinking`, or None.
      start: what was read before the chat, one row, which is left as it is; None for nothing.
    """

    params: lm.Params
    config: config_lib.ModelConfig
    tokenizer: Tokenizer
    sampling: generation.Sampling = generation.GREEDY
    max_tokens: int = 512
    seed: int = 0
    context: int | None = None
    messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
    stop: Sequence[str] = ()
    thinking: bool | None = None
    start: state_lib.DecodeState | None = None
    _tokens: list[int] = dataclasses.field(default_factory=list)  # what the state has read
    _state: state_lib.DecodeState | None = None
    _replying: weakref.ref[Generator[str, None, None]] | None = None
    _earlier: tuple[int, state_lib.DecodeState | None] = (0, None)  # the state after the first so many of them

    def __post_init__(self):
        self._encode([*self.messages, _message("user", "x")])  # raises where no reply could be made
        self.sampling.check()
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens={self.max_tokens} must be at least 1")
        self.params = lm.unstack(self.params, dtype=self.config.dtype)

    def reply(self, text: str) -> Iterator[str]:
        """Yields the model's answer to `text` piece by piece; both join `messages`.

        An answer that is not asked for to its end (it is closed, dropped, or fails; the next reply closes it) joins as
        far as it was yielded. Before its first piece the turn is as if it had not been.
        """
        if not text.strip():
            raise ValueError("the message is empty: write something")
        if unfinished := self._replying and self._replying():
            unfinished.close()
        pieces = self._reply(text)
        self._replying = weakref.ref(pieces)
        return pieces

    def _reply(self, text: str) -> Generator[str, None, None]:
        messages = [*self.messages, _message("user", text)]
        prompt, stops = self._encode(messages), stop_tokens(self.tokenizer, self.config)
        self._check_length(len(prompt))
        at, after = self._resume(prompt)
        earlier: list[tuple[int, state_lib.DecodeState]] = []
        for end in (self._lasting(messages, prompt), len(prompt)):
            if at < end:
                logits, after = generation.prefill(self.params, self.config, [prompt[at:end]], state=after)
                at = end
            earlier.append((at, after))
        steps = generation.stream(
            self.params,
            self.config,
            logits,
            after,
            max_tokens=self.max_tokens,
            sampling=self.sampling,
            stop_tokens=stops,
            seed=self.seed + len(self.messages),
        )
        answer, shown = list[int](), list[str]()

        def drawn() -> Iterator[int]:
            nonlocal after
            for tokens, _, _, newest in steps:
                after = newest
                answer.append(int(tokens[0]))
                if answer[-1] not in stops:
                    yield answer[-1]

        try:
            for piece in until(decode_stream(self.tokenizer, drawn()), self.stop):
                shown.append(piece)
                yield piece
        except BaseException:  # the reader has gone, or a step was interrupted, whose state is lost
            if shown:
                self._join(messages, shown, prompt[: earlier[0][0]], earlier[0][1], earlier[0])
            raise
        self._join(messages, shown, prompt + answer, after, earlier[0])

    def _encode(self, messages: Messages) -> list[int]:
        rendered = render(self.tokenizer, messages, thinking=self.thinking)
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))

    def _check_length(self, prompt: int) -> None:
        """An error where a chat outgrows `context`, a warning where it outgrows what the model was trained on."""
        longest = prompt + self.max_tokens
        if self.config.mixer == "full" and self.context is not None and longest > self.context:
            raise ValueError(
                f"the chat may reach {longest} tokens and full attention was given a cache of {self.context}: "
                "start again with a larger --context, or with a converted model, which needs none"
            )
        past = 0 if self.start is None else int(self.start.position[0])
        if not self._tokens or past + len(self._tokens) <= self.config.max_length:  # once
            generation.warn_beyond(self.config, past + prompt, self.max_tokens)

    def _resume(self, prompt: list[int]) -> tuple[int, state_lib.DecodeState]:
        """The longest beginning of `prompt` that was read already, and the state after it."""
        for count, after in ((len(self._tokens), self._state), self._earlier):
            if after is not None and count < len(prompt) and self._tokens[:count] == prompt[:count]:
                return count, after
        room = self.context or len(prompt) + self.max_tokens
        return 0, generation.with_room(self.config, self.start, 1, room)[1]

    def _lasting(self, messages: Messages, prompt: list[int]) -> int:
        """How many tokens of `prompt` the template keeps when the chat goes on."""
        try:
            later = self._encode([*messages, _message("assistant", "x"), _message("user", "x")])
        except ValueError:  # it does not go on
            return len(prompt)
        pairs = enumerate(zip(prompt, later, strict=False))
        return next((place for place, (now, then) in pairs if now != then), min(len(prompt), len(later)))

    def _join(self, messages, shown, tokens, after, earlier) -> None:
        """Adds an answer to the messages, and keeps the state that has read `tokens`, and an earlier one."""
        self.messages = [*messages, _message("assistant", "".join(shown))]
        self._tokens, self._state, self._earlier = tokens, after, earlier


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}

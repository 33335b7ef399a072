"""Prompts that hide what is asked in a real text, a function of the seed and an example's index alone.

In a long prompt all that an answer needs ends a window or more before the question begins and does not stand among the
sinks, so that windowed attention sees none of it; a `short_` prompt lies within the window as a whole. Lengths,
distances and offsets are in tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.evaluation import questions as questions_lib

_CONTEXT = "<<the context>>"


_ELSEWHERE = 2**32  # added to an example's index gives one that is never asked


LONGEST_SHORT = 512  # a short prompt has no more tokens, however wide the window


@dataclasses.dataclass(frozen=True)
class Example:
    """A prompt and what is right.

    Attributes:
      item: what was asked.
      prompt: token ids.
      context: how many of them come before the question; 0 without a context.
      depth: where the first evidence stands, from 0 (as early as may be) to 1 (as late); None without evidence.
      distance: tokens between the end of that evidence and the question; None without evidence.
    """

    item: questions_lib.Item
    prompt: list[int]
    context: int = 0
    depth: float | None = None
    distance: int | None = None


class Prompts:
    """Makes the prompts of every task.

    Args:
      tokenizer: of the model.
      texts: name -> text that things are hidden in.
      window, sinks: of the converted model.
      chat: ask through the tokenizer's chat template; otherwise the prompt is one plain text.
      seed: of everything drawn.
      questions: about books; those whose anchor stands in no text are left out.
    """

    def __init__(
        self,
        tokenizer: Any,
        texts: Mapping[str, str],
        *,
        window: int,
        sinks: int,
        chat: bool,
        seed: int = 0,
        questions: Sequence[questions_lib.Question] = (),
    ):
        if chat and not tokenizer.chat_template:
            raise ValueError("chat=True, and the tokenizer has no chat template: ask in plain text")
        self._tokenizer, self._chat, self._seed = tokenizer, chat, seed
        self._window, self._sinks = window, sinks
        self._texts = list(texts.values())
        self._documents = [self._encode(text) for text in self._texts]
        places = [(question, place) for question in questions if (place := _find(question.anchor, self._texts))]
        order = np.random.Generator(np.random.Philox(key=[seed, 0])).permutation(len(places))
        self._places = [places[index] for index in order]

    def count(self, task: str, samples: int) -> int:
        """How many of `samples` examples there are: no question about a book is asked twice."""
        return min(samples, len(self._places)) if task in questions_lib.ABOUT_BOOKS else samples

    def length(self, task: str, length: int) -> int:
        """Tokens of the longest prompt with its answer; `length` is that of the long tasks."""
        return length if questions_lib.is_long(task) else min(self._window, LONGEST_SHORT)

    def make(self, task: str, length: int, index: int, without: Collection[str] = ()) -> Example:
        """The example of that index.

        Args:
          task: one of `TASKS`, or pairs_N with a number.
          length: tokens of prompt and answer, at most; of pairs, a few may be missing.
          index: from 0; `questions(task)` in a row share a context.
          without: answers that nothing which is hidden may give; questions about books give what they give.

        Raises:
          ValueError: an unknown task, no room at that length, or no text that is long enough.
        """
        if task not in questions_lib.TASKS and not questions_lib.pairs(task):
            raise ValueError(
                f"tasks has {task!r}, which is not one of {', '.join(questions_lib.TASKS)}, pairs_1, pairs_2 ..."
            )
        wanted, names = questions_lib.pairs(task), len(questions_lib.NAMES)
        if wanted > names:
            raise ValueError(f"{task} needs {wanted} names and there are {names}: ask for fewer pairs")
        if task in questions_lib.ABOUT_BOOKS and not self._places:
            raise ValueError(f"{task} needs questions, and the texts that they are about: no anchor was found")
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index // questions_lib.questions(task)]))
        if questions_lib.pairs(task):
            return self._hide_pairs(task, length, index % questions_lib.questions(task), rng, without)
        if task == "short_cloze":
            return self._cloze(self.length(task, length), rng)
        if task not in questions_lib.ABOUT_BOOKS:
            item = questions_lib._ITEMS[task.removeprefix("short_")](rng, without)
            return self._hide(task, length, item, index, rng, self._cut(rng))
        question, (text, start, end) = self._places[index]
        if task == questions_lib.CLOSED_BOOK:
            item = questions_lib.Item((), question.question, question.opening, question.answers)
            return Example(item, sum(self._frame(item, context=False), []))
        item = questions_lib.Item((text[start:end],), question.question, question.opening, question.answers)
        return self._hide(task, length, item, index, rng, self._cut_around(text, start, end))

    def make_elsewhere(self, task: str, length: int, index: int) -> Example | None:
        """The example of that index as it is asked after another document: `with_context_of` another of its task.

        The other hides nothing that the answers could be taken from. About books it is the next question whose context
        names none of them; otherwise it is drawn for the purpose.

        Returns:
          None where there is no other: in prompts within the window or without a context, and where every other
          question about a book gives the answer away, or is about a text that is too short.
        """
        if not questions_lib.is_long(task):
            return None
        own, first = self.make(task, length, index), index - index % questions_lib.questions(task)
        if task in questions_lib.ABOUT_BOOKS:
            other = next(self._silent_about(own, task, length, index), None)
        else:
            sharing = [self.make(task, length, first + which).item for which in range(questions_lib.questions(task))]
            answers = {answer for item in sharing for answer in item.answers}
            other = self.make(task, length, first + _ELSEWHERE, answers)
        return with_context_of(own, other, self._window, self._sinks) if other is not None else None

    def _silent_about(self, own: Example, task: str, length: int, index: int) -> Iterator[Example]:
        """The examples about books that name no answer of the one of that index, from the next one on."""
        for step in range(1, len(self._places)):
            try:
                other = self.make(task, length, (index + step) % len(self._places))
            except ValueError:  # its text is too short
                continue
            text = str(self._tokenizer.decode(other.prompt))
            if not any(re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) for word in own.item.answers):
                yield other

    def _hide(
        self,
        task: str,
        length: int,
        item: questions_lib.Item,
        index: int,
        rng: np.random.Generator,
        cut: Callable[[int, int], list[int]],
    ) -> Example:
        """Puts the evidence of an item at its depth, and the rest anywhere, into what `cut(tokens, offset)` gives."""
        head, tail = self._frame(item, context=True)
        evidence, decoys = ([self._encode(passage) for passage in part] for part in (item.evidence, item.decoys))
        earliest, latest, free = self._free(task, length, len(head), len(tail) + sum(map(len, evidence + decoys)))
        depth = (index % questions_lib.DEPTHS + rng.random()) / questions_lib.DEPTHS
        depths = np.append(depth, np.sort(rng.uniform(depth, 1, len(evidence) - 1)))
        offsets = [earliest + int(x) for x in np.round(depths * (latest - earliest))]
        elsewhere = np.sort(rng.integers(earliest, free, len(decoys), endpoint=True)).tolist()
        places = [*zip(offsets, evidence, strict=True), *zip(elsewhere, decoys, strict=True)]
        tokens, ends = weave(cut(free, offsets[0]), places)
        context = [*head, *tokens]
        return Example(item, [*context, *tail], len(context), float(depth), len(tokens) - ends[0])

    def _hide_pairs(
        self, task: str, length: int, which: int, rng: np.random.Generator, without: Collection[str]
    ) -> Example:
        """Spreads names and their words evenly over what lies before the window, and asks for one of them.

        All of it but `which` of them is asked for is a function of `rng`.
        """
        count = questions_lib.pairs(task)
        names, words = (
            rng.choice(questions_lib.NAMES, count, replace=False).tolist(),
            questions_lib._words(rng, count, without),
        )
        told = [
            questions_lib.paragraph(questions_lib.needle(name, word)) for name, word in zip(names, words, strict=True)
        ]
        asked = int(rng.permutation(count)[which])
        decoys = (*told[:asked], *told[asked + 1 :])
        item = questions_lib.Item(
            (told[asked],),
            *questions_lib.needle_question(names[asked]),
            (words[asked],),
            decoys,
            foils=questions_lib._but(words[asked]),
        )
        head, tail = self._frame(item, context=True)
        passages = [self._encode(passage) for passage in told]
        taken = self._longest_question + sum(map(len, passages))
        earliest, latest, free = self._free(task, length, len(head), taken)
        depths = (np.arange(count) + rng.random(count)) / count
        offsets = [earliest + int(x) for x in np.round(depths * (latest - earliest))]
        tokens, ends = weave(self._cut(rng)(free, offsets[0]), [*zip(offsets, passages, strict=True)])
        context = [*head, *tokens]
        return Example(item, [*context, *tail], len(context), float(depths[asked]), len(tokens) - ends[asked])

    @functools.cached_property
    def _longest_question(self) -> int:
        """Tokens after the context, with the name that has most: room is left for any, as one context is for many."""
        items = (questions_lib.Item((), *questions_lib.needle_question(name), ()) for name in questions_lib.NAMES)
        return max(len(self._frame(item, context=True)[1]) for item in items)

    def _free(self, task: str, length: int, head: int, taken: int) -> tuple[int, int, int]:
        """Where in the text of a context something may be hidden, and how much text there is.

        Args:
          task: that hides it.
          length: of the long tasks.
          head: tokens before the text.
          taken: tokens of what is hidden and of what comes after the context.

        Returns:
          The first and the last offset, and the tokens of text.

        Raises:
          ValueError: there is no such offset.
        """
        free = self.length(task, length) - head - taken - questions_lib.room(task)
        earliest = max(0, self._sinks - head)
        latest = free - (self._window if questions_lib.is_long(task) else 0)
        if latest < earliest:
            within = "before" if questions_lib.is_long(task) else "within"
            raise ValueError(
                f"length={self.length(task, length)} leaves no room for {task!r} {within} a window of {self._window} "
                f"tokens: it takes {earliest - latest} more"
            )
        return earliest, latest, free

    def _cut(self, rng: np.random.Generator) -> Callable[[int, int], list[int]]:
        """Cuts a stretch out of a random text."""
        which, where = rng.random(2)

        def cut(tokens: int, offset: int) -> list[int]:
            del offset
            long = [document for document in self._documents if len(document) >= tokens]
            if not long:
                raise ValueError(f"no text has the {tokens} tokens that a prompt needs: give longer texts")
            document = long[int(which * len(long))]
            start = int(where * (len(document) - tokens + 1))
            return document[start : start + tokens]

        return cut

    def _cut_around(self, text: str, start: int, end: int) -> Callable[[int, int], list[int]]:
        """Cuts what stands around text[start:end]; past the text's end it goes on at its beginning."""
        rest = text[end:] + text[:start]

        def cut(tokens: int, offset: int) -> list[int]:
            after = self._encode(rest[: 8 * (tokens - offset)])[: tokens - offset]
            before = self._encode(rest[-8 * offset :])[-offset:] if offset else []
            if len(before) + len(after) < tokens or 8 * tokens > len(rest):
                raise ValueError(f"a text of {len(text)} characters is too short for {tokens} tokens around a passage")
            return before + after

        return cut

    def _cloze(self, length: int, rng: np.random.Generator) -> Example:
        """A passage that stops before a word which it holds already; the passage is plain text in any case."""
        begin = tokenizer_lib.encode_prompt(self._tokenizer, "")
        take = length - questions_lib.room("short_cloze") - len(begin)
        for _ in range(1000):
            text = self._texts[rng.integers(len(self._texts))]
            found = re.compile(r"(?<=[a-z,] )[a-z]{4,}\b").search(text, int(rng.integers(len(text))))
            if found is None:
                continue
            ids = self._encode(text[max(0, found.start() - 8 * take) : found.start()].rstrip())[-take:]
            passage = str(self._tokenizer.decode(ids))
            if len(ids) == take and re.search(rf"\b{found.group()}\b", passage):
                return Example(questions_lib.Item((), "", "", (found.group(),)), [*begin, *ids])
        raise ValueError(f"the texts hold no passage of {take} tokens that stops before a word it holds: give others")

    def _frame(self, item: questions_lib.Item, *, context: bool) -> tuple[list[int], list[int]]:
        """The tokens before and after the context; without a context they belong together."""
        if not self._chat:
            asked = questions_lib.plain_question(item.question, item.opening)
            return tokenizer_lib.encode_prompt(self._tokenizer, ""), self._encode(f"\n{asked}" if context else asked)
        content = f"{_CONTEXT}\n\n{item.question}" if context else f"{_CONTEXT}{item.question}"
        parts = questions_lib.render(self._tokenizer, content).split(_CONTEXT)
        if len(parts) != 2:
            raise ValueError(f"the chat template writes a user's message {len(parts) - 1} times: ask in plain text")
        before, after = parts
        return self._encode(before), self._encode(after + item.opening)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))


def with_context_of(example: Example, other: Example, window: int, sinks: int) -> Example:
    """An example whose question comes after another's context: what only a memory can hold of it is foreign.

    Its first `sinks` tokens and the last `window` before its question stay, so that attention sees nothing else when it
    answers. Its own evidence, which lies between those, is gone.

    Raises:
      ValueError: the other is shorter than what is to be replaced.
    """
    end = max(sinks, example.context - window)
    if len(other.prompt) < end:
        raise ValueError(f"the other prompt has {len(other.prompt)} tokens and {end} are to be replaced")
    prompt = [*example.prompt[:sinks], *other.prompt[sinks:end], *example.prompt[end:]]
    return dataclasses.replace(example, prompt=prompt)


def weave(body: Sequence[int], places: Sequence[tuple[int, Sequence[int]]]) -> tuple[list[int], list[int]]:
    """Inserts pieces into a body of tokens.

    Args:
      body: token ids.
      places: (offset in the body, token ids) of each piece; of one offset the first comes first.

    Returns:
      The tokens, and where in them each piece ends, in the order of `places`.
    """
    tokens: list[int] = []
    ends = [0] * len(places)
    done = 0
    for index in sorted(range(len(places)), key=lambda i: places[i][0]):
        offset, piece = places[index]
        tokens += [*body[done:offset], *piece]
        done, ends[index] = offset, len(tokens)
    return [*tokens, *body[done:]], ends


def _find(anchor: str, texts: Sequence[str]) -> tuple[str, int, int] | None:
    """(text, start, end) of a quotation whose white space may differ, a blank before it included."""
    pattern = re.compile(r"\s?" + r"\s+".join(map(re.escape, anchor.split())))
    for text in texts:
        if found := pattern.search(text):
            return text, found.start(), found.end()
    return None

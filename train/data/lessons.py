"""Rows that teach a memory to be used: what is told early in a text is asked for at its end.

A row of prose says little about what a memory holds, as most of what follows depends on the last words alone. In a
lesson every answer depends on something that was said before, and the text itself is the authority on it, not the
original model, which may be wrong. Five kinds, with words and names of the texts themselves:

    facts        "The secret word of NAME is WORD.", one or many, in the midst of prose
    pairs        a list of "WORD: WORD", whose first words are given again
    variables    "X = 12345.", "Y = X.", and which variables have that value
    quotes       some words of the prose, to be continued
    clues        a name or number of the prose, asked for by words that stand near it

L tokens of a row
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from allmem_jax.checkpoints import tokenizer as tokenizer_lib
from allmem_jax.evaluation import haystacks, questions
from train.data import stream

KINDS = {"facts": 0.4, "pairs": 0.2, "variables": 0.1, "quotes": 0.3, "clues": 0.3}  # in these proportions
CHAT = 0.3  # share of the lessons that are a conversation, where the tokenizer has a template
FULL = 0.6  # of a row, at most, is not prose
MOST = 40  # facts of a row
CHAIN = 3  # variables of one value
CUE, ANSWER = 8, 12  # tokens of a quotation that are given, and that follow
BEFORE, AFTER, NEAR, LED = 12, 6, 3, 5  # words about a name that it may be asked for by, how many are, and lead to it
THINGS = ("secret word", "secret word", "password", "favourite word", "code", "nickname", "second name", "treasure")
_SCANNED = 20_000  # tokens of a document that words and names are taken from


class Asked(NamedTuple):
    """A question, the beginning of its answer, and what is learned of it; each token ids."""

    question: Sequence[int]
    opening: Sequence[int]
    answer: Sequence[int]


class Frame(NamedTuple):
    """How texts and questions are put together.

    Attributes:
      head: token ids before the text.
      first, then: before the first question and before each that follows.
      answer: between a question and its answer.
      lead: what a question and an answer begin with.
    """

    head: list[int]
    first: list[int]
    answer: list[int]
    then: list[int]
    lead: str


Facts = Iterator[tuple[list[list[int]], Asked]]  # passages that are told, and what is asked of them


def check_kinds(kinds: Sequence[str]) -> Sequence[str]:
    """`kinds`, which must be some of `KINDS`; ValueError otherwise."""
    if not kinds or not set(kinds) <= set(KINDS):
        raise ValueError(f"kinds={tuple(kinds)} must be one or more of {', '.join(KINDS)}")
    return kinds


class Lessons:
    """Random access to rows, a share of them lessons, the others plain prose; each a function of seed and index alone.

    Names and words are of the texts, without those of `questions`, which models are judged by.

    Args:
      documents: the prose.
      tokenizer: of the model.
      length: L.
      share: of the rows that are lessons.
      seed: of everything drawn.
      kinds: of lessons, among `KINDS`; they keep their proportions.
      count: rows.

    Raises:
      ValueError: no document is long enough, the texts have too few words, or a kind is unknown.
    """

    def __init__(
        self,
        documents: stream.Documents,
        tokenizer: Any,
        length: int,
        *,
        share: float,
        seed: int,
        kinds: Sequence[str] = tuple(KINDS),
        count: int = 2**20,
    ):
        self._kinds = {kind: KINDS[kind] for kind in check_kinds(kinds)}
        self._documents, self._tokenizer, self._length = documents, tokenizer, length
        self._share, self._seed, self._count = share, seed, count
        self._long = np.flatnonzero(documents.lengths > length + 1)
        if not len(self._long):
            raise ValueError(
                f"no text is longer than seq_length={length} tokens: lower seq_length or give longer texts"
            )
        self._words, self._names = self._vocabulary()
        head = tokenizer_lib.encode_prompt(tokenizer, "")
        question = self._encode("\nQuestion:")
        self._plain = Frame(head, question, self._encode(" Answer:"), question, " ")
        self._chat = self._conversation() if getattr(tokenizer, "chat_template", None) else self._plain

    def __len__(self) -> int:
        return self._count

    def largest_token(self) -> int:
        """The largest token id of the texts."""
        return self._documents.largest_token()

    def content_hash(self) -> str:
        """sha256 of the texts and of what decides on the rows."""
        settings = [
            self._documents.content_hash(),
            self._length,
            self._share,
            self._seed,
            self._count,
            self._kinds,
            CHAT,
        ]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """tokens, targets, segment_ids int32 [L] and mask, answers bool [L]: where the text itself is right."""
        rng = np.random.Generator(np.random.Philox(key=[self._seed, index]))
        tokens, answers = self._lesson(rng) if rng.random() < self._share else self._prose(rng)
        ids, ones = np.asarray(tokens, np.int32), np.ones(self._length, np.int32)
        row = {"tokens": ids[:-1], "targets": ids[1:], "segment_ids": ones, "mask": ones.astype(bool)}
        return row | {"answers": np.asarray(answers[1:], bool)}

    def _prose(self, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
        head = self._plain.head
        return [*head, *self._cut(rng, self._length + 1 - len(head))], [False] * (self._length + 1)

    def _cut(self, rng: np.random.Generator, count: int) -> list[int]:
        """Consecutive tokens of a document, each place as likely as any other."""
        chances = self._documents.lengths[self._long] - count
        document = int(rng.choice(self._long, p=chances / chances.sum()))
        start = int(rng.integers(self._documents.lengths[document] - count + 1))
        return self._documents.take(document, start, start + count)[0].tolist()

    def _lesson(self, rng: np.random.Generator) -> tuple[list[int], list[bool]]:
        """Tokens of a row and the one after it, and which of them are learned as answers."""
        weights = np.asarray(list(self._kinds.values()))
        kind = str(rng.choice(list(self._kinds), p=weights / weights.sum()))
        frame = self._chat if rng.random() < CHAT else self._plain
        room = int(FULL * self._length * rng.uniform(0.2, 1)) - len(frame.head)
        prose = self._cut(rng, self._length + 1 - len(frame.head))
        told, asked = self._fill(kind, rng, room, frame, prose[: len(prose) - room])
        if not asked:  # no name in all of the prose
            return self._prose(rng)
        before = [frame.first, *[frame.then] * (len(asked) - 1)]
        taken = sum(map(len, [frame.head, *told, *before, *itertools.chain(*asked)])) + len(asked) * len(frame.answer)
        size = self._length + 1 - taken
        if size < 1:
            raise ValueError(
                f"seq_length={self._length} is too short for lessons: one of {kind!r} takes {taken} tokens, and some "
                "must be prose"
            )
        places = np.sort(rng.integers(0, size * 9 // 10 + 1, len(told))).tolist()
        body, _ = haystacks.weave(prose[:size], list(zip(places, told, strict=True)))
        tokens, answers = [*frame.head, *body], [False] * (len(frame.head) + len(body))
        for lead, (question, opening, answer) in zip(before, asked, strict=True):
            given = [*lead, *question, *frame.answer, *opening]
            tokens += [*given, *answer]
            answers += [False] * len(given) + [True] * len(answer)
        return tokens, answers

    def _fill(
        self, kind: str, rng: np.random.Generator, room: int, frame: Frame, prose: list[int]
    ) -> tuple[list[list[int]], list[Asked]]:
        """Passages and questions of a kind, as many as `room` tokens hold but one at least, the questions shuffled."""
        told: list[list[int]] = []
        asked: list[Asked] = []
        for passages, question in getattr(self, f"_{kind}")(rng, frame.lead, prose):
            room -= sum(map(len, [*passages, *question, frame.then, frame.answer]))
            if room < 0 and asked:
                break
            told += passages
            asked.append(question)
        if kind == "pairs":  # one list
            told = [[*self._encode("\n"), *itertools.chain(*told), *self._encode("\n")]]
        return told, [asked[index] for index in rng.permutation(len(asked))]

    def _facts(self, rng: np.random.Generator, lead: str, prose: list[int]) -> Facts:
        thing = THINGS[rng.integers(len(THINGS))]
        for name in _some(rng, self._names, MOST):
            value = (
                str(rng.integers(10_000, 100_000))
                if rng.random() < 0.2
                else self._words[rng.integers(len(self._words))]
            )
            sentence = f" The {thing} of {name} is {value}." + " Remember it." * int(rng.integers(2))
            told = questions.paragraph(sentence) if rng.integers(2) else sentence
            question = self._asked(
                f"{lead}What is the {thing} of {name}?", f"{lead}The {thing} of {name} is", f" {value}."
            )
            yield [self._encode(told)], question

    def _pairs(self, rng: np.random.Generator, lead: str, prose: list[int]) -> Facts:
        words = _some(rng, self._words, 2 * MOST)
        for key, value in zip(words[::2], words[1::2], strict=True):
            yield (
                [self._encode(f"\n{key}: {value}")],
                self._asked(f"{lead}What is {key}?", f"{lead}{key}:", f" {value}"),
            )

    def _variables(self, rng: np.random.Generator, lead: str, prose: list[int]) -> Facts:
        letters = (list("BDFGKLMNPRSTVZ"), list("AEIOU"), list("BDFGKLMNPRSTVZ"))
        while True:
            names = ["".join(str(rng.choice(part)) for part in letters) for _ in range(CHAIN)]
            number = str(rng.integers(10_000, 100_000))
            told = [f"Remember: {name} = {value}." for name, value in zip(names, [number, *names], strict=False)]
            question = f"{lead}Which {CHAIN} variables have the value {number}?"
            opening = f"{lead}The {CHAIN} variables with the value {number} are"
            answer = f" {', '.join(names[:-1])} and {names[-1]}."
            yield [self._encode(questions.paragraph(x)) for x in told], self._asked(question, opening, answer)

    def _quotes(self, rng: np.random.Generator, lead: str, prose: list[int]) -> Facts:
        while len(prose) > CUE + ANSWER:
            words = prose[int(rng.integers(len(prose) - CUE - ANSWER)) :]
            question = self._encode(f"{lead}How does it go on?")
            yield [], Asked(question, words[:CUE], words[CUE : CUE + ANSWER])

    def _clues(self, rng: np.random.Generator, lead: str, prose: list[int]) -> Facts:
        words = str(self._tokenizer.decode(prose)).split()
        common = {word.strip(".,;:!?") for word in words if word[0].islower()}
        for place in rng.permutation(np.arange(LED, max(LED, len(words) - AFTER))):
            name = re.match(r"[A-Z][a-z]{2,}( [A-Z][a-z]{2,})?\b|[0-9][0-9,]*[0-9]", " ".join(words[place : place + 2]))
            about = (*words[max(0, place - BEFORE) : place], *words[place + 1 : place + AFTER])
            near = sorted({word for word in about if re.fullmatch(r"[a-z]{4,}", word)})
            if not name or len(near) < NEAR or not re.search(r"[a-z],?$", words[place - 1]):
                continue
            if name[0].split()[0].lower() in common:  # a line's first word
                continue
            *most, last = (f'"{word}"' for word in _some(rng, near, NEAR))
            before = " ".join(words[place - int(rng.integers(LED + 1)) : place]) or "It is"
            question = f"{lead}What is named with {', '.join(most)} and {last}?"
            yield [], self._asked(question, f"{lead}{before}", f" {name[0]}.")

    def _asked(self, *texts: str) -> Asked:
        return Asked(*map(self._encode, texts))

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _conversation(self) -> Frame:
        """The frame that the tokenizer's chat template makes: every question but the first is a turn of its own."""
        marks = [f"<<the {name}>>" for name in ("text", "answer", "next")]
        turns = [
            {"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), marks, strict=True)
        ]
        text = str(self._tokenizer.apply_chat_template(turns, add_generation_prompt=False, tokenize=False))
        parts = re.split("|".join(map(re.escape, marks)), text)
        if len(parts) != 4 or [text.count(mark) for mark in marks] != [1, 1, 1]:
            raise ValueError("the chat template changes what is said: lessons need one that writes every turn once")
        head, answer, then = map(self._encode, parts[:3])
        return Frame(head, self._encode("\n\n"), answer, then, "")

    def _vocabulary(self) -> tuple[list[str], list[str]]:
        """Words and names of the texts, none of which `questions` uses."""
        found = []
        for document, length in enumerate(self._documents.lengths.tolist()):
            ids = self._documents.take(document, 0, min(_SCANNED, length))[0]
            found.append(str(self._tokenizer.decode(ids.tolist())))
        text, taken = " ".join(found), {word.casefold() for word in (*questions.WORDS, *questions.NAMES)}
        patterns = (r"(?<= )[a-z]{4,9}\b", r"(?<=[a-z,;] )[A-Z][a-z]{2,8}\b")
        words, names = (
            sorted(word for word in set(re.findall(pattern, text)) if word.casefold() not in taken)
            for pattern in patterns
        )
        if len(words) < 2 * MOST or len(names) < MOST:
            raise ValueError(
                f"the texts have {len(words)} words and {len(names)} names, and lessons need {2 * MOST} and {MOST}: "
                "give more"
            )
        return words, names


def _some(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """`count` different items in random order."""
    return [items[index] for index in rng.choice(len(items), count, replace=False)]

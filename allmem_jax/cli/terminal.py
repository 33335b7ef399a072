"""What a user at a terminal reads and writes: results on stdout, all else on stderr."""

import sys
from collections.abc import Callable, Iterator
from typing import Any


def say(message: str) -> None:
    """One line on stderr."""
    print(f"allmem: {message}", file=sys.stderr, flush=True)


def progress(total: int, what: str) -> Callable[[int], Any]:
    """A bar on stderr that closes itself when full; call it with the number of units just done."""
    import tqdm

    bar = tqdm.tqdm(total=total, desc=what, leave=False, disable=not sys.stderr.isatty())

    def update(count: int) -> None:
        bar.update(count)
        if bar.n >= total:
            bar.close()

    return update


def print_stream(pieces: Iterator[str]) -> None:
    """A text as it is written."""
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def print_section(section: Any) -> None:
    """A section of a report: paragraphs, and tables in columns of text."""
    from allmem_jax.reporting import sections

    print(f"{section.title}\n", *section.text, sep="\n")
    for table in section.tables:
        print(f"\n{sections.plain(table)}")
    print()


def unicode(what: str, text: str) -> str:
    """`text`, or a ValueError where it was not UTF-8: Python keeps such bytes as halves of surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{what} is not UTF-8 text: character {error.start} cannot be decoded") from None
    return text

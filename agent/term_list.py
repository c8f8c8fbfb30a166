"""Terms as an operator lists them, in a file or a message: text, perhaps a tab and a boost. No model is needed here."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from whisperlet.errors import ConfigError

MAX_TERMS = 1000
MAX_CHARS = 100  # of a term
MAX_BOOST = 20.0  # above it, a term would be heard in nearly everything
MAX_BYTES = 1_000_000  # of a file


class Term(NamedTuple):
    """A word or phrase to be preferred."""

    text: str
    boost: float | None  # added to the logits of its tokens; None: the default


def parse(line: str) -> Term:
    """The term of one line. Raises ValueError with the reason."""
    text, tab, number = line.partition("\t")
    text = " ".join(text.split())
    if not text:
        raise ValueError("there is no term before the tab" if tab else "the term is empty")
    if len(text) > MAX_CHARS:
        raise ValueError(f"the term has {len(text)} characters, more than {MAX_CHARS}")
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a character that does not print")
    return Term(text, _boost(number) if tab else None)


def _boost(number: str) -> float:
    try:
        boost = float(number)
    except ValueError:
        raise ValueError(f"the boost {number.strip()[:20]!r} is not a number") from None
    if not 0 < boost <= MAX_BOOST:  # not a number is not, either
        raise ValueError(f"the boost {number.strip()[:20]} is not above 0 and at most {MAX_BOOST:g}")
    return boost


def checked(terms: Iterable[str], origin: str, place: str = "item") -> list[Term]:
    """The terms of a list. Raises ConfigError naming origin, place and reason."""
    return _parsed(enumerate(terms, 1), origin, place)


def _parsed(numbered: Iterable[tuple[int, str]], origin: str, place: str) -> list[Term]:
    found: list[Term] = []
    for number, line in numbered:
        try:
            found.append(parse(line))
        except ValueError as error:
            raise ConfigError(f"{origin}: {place} {number}: {error}") from None
        if len(found) > MAX_TERMS:
            raise ConfigError(f"{origin}: {place} {number}: there are more than {MAX_TERMS} terms")
    return found


def read(path: Path) -> list[str]:
    """The lines of a file that hold a term, each of them checked. Raises ConfigError naming file, line and reason."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{path}: has more than {MAX_BYTES} bytes")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}: line {number}: is not UTF-8") from None
    lines = enumerate(text.replace("\r\n", "\n").split("\n"), 1)
    kept = [(number, line) for number, line in lines if line.strip() and not line.startswith("#")]
    _parsed(kept, str(path), "line")
    return [line for _, line in kept]

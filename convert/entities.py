"""Entities of a text: the terms or slot values that matter to who listens, and how many of them were heard.

Texts and entities are compared as Whisper's normaliser leaves them, word by word, or character by character where a
language has no spaces. Where entities overlap the leftmost counts, and of those the longest: "New York" is one entity
and no "York". A term that is said twice has to be heard twice.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

from agent import term_list
from whisperlet.errors import ConfigError

from . import scoring
from .scored import Scored

Words = tuple[str, ...]


class Entity(msgspec.Struct, frozen=True, kw_only=True):
    """How one entity fared over a set."""

    text: str  # normalised
    heard: int  # said and heard
    missed: int  # said and not heard
    invented: int  # heard and not said


class Entities(msgspec.Struct, frozen=True, kw_only=True):
    """Percent over all that were said or heard; None where there is nothing to divide by."""

    precision: float | None
    recall: float | None
    f1: float | None
    heard: int
    missed: int
    invented: int
    each: list[Entity]  # those that failed most often first


class Found(msgspec.Struct, frozen=True):
    """Entities of one clip, by their normalised text."""

    said: Counter[str]
    heard: Counter[str]

    @property
    def both(self) -> Counter[str]:
        """Those that were said and heard."""
        return self.said & self.heard


def read_terms(path: Path) -> list[str]:
    """Texts of a list of terms as the agent takes it; boosts do not matter here. Raises ConfigError."""
    terms = [term_list.parse(line).text for line in term_list.read(path)]
    if not terms:
        raise ConfigError(f"{path}: holds no term")
    return terms


def found(clips: Sequence[Scored], terms: Sequence[str]) -> list[Found] | None:
    """What was said and heard in each clip; None if there are neither terms nor slots to look for.

    With terms, these are looked for in texts and transcripts. Without, a clip's slot values are what was said in it,
    and the values of all clips are looked for in its transcript.
    """
    if terms:
        by_language = {language: Finder(terms, language) for language in {clip.language for clip in clips}}
        return [_by_text(clip, by_language[clip.language]) for clip in clips]
    values = sorted({value for clip in clips for value in clip.slots})
    if not values:
        return None
    by_language = {language: Finder(values, language) for language in {clip.language for clip in clips}}
    return [_by_slots(clip, by_language[clip.language]) for clip in clips]


def _by_text(clip: Scored, finder: Finder) -> Found:
    """A clip whose text is not known counts only if it is known that nobody speaks."""
    if clip.ref is None and clip.has_speech:
        return Found(Counter(), Counter())
    return Found(finder.find(clip.ref or ""), finder.find(clip.hyp))


def _by_slots(clip: Scored, finder: Finder) -> Found:
    if not clip.slots:
        return Found(Counter(), Counter())
    said = Counter(" ".join(words) for value in clip.slots if (words := split(value, clip.language)))
    return Found(said, finder.find(clip.hyp))


class Finder:
    """Finds entities of one language."""

    def __init__(self, entities: Iterable[str], language: str) -> None:
        self._language = language
        self._by_first: dict[str, list[Words]] = {}
        for words in {split(entity, language) for entity in entities} - {()}:
            self._by_first.setdefault(words[0], []).append(words)
        for candidates in self._by_first.values():
            candidates.sort(key=len, reverse=True)

    def find(self, text: str) -> Counter[str]:
        """How often each entity occurs."""
        words, counts, i = split(text, self._language), Counter[str](), 0
        while i < len(words):
            entity = next((e for e in self._by_first.get(words[i], ()) if words[i : i + len(e)] == e), ())
            if entity:
                counts[" ".join(entity)] += 1
            i += len(entity) or 1
        return counts


@functools.lru_cache(maxsize=4096)
def split(text: str, language: str) -> Words:
    """Normalised words, or characters."""
    normalised = scoring.normalise(text, language)
    return tuple("".join(normalised.split())) if language in scoring.SPACELESS else tuple(normalised.split())


def total(clips: Sequence[Found]) -> Entities:
    """Everything about a set."""
    said, heard, both = Counter[str](), Counter[str](), Counter[str]()
    for clip in clips:
        said, heard, both = said + clip.said, heard + clip.heard, both + clip.both
    each = [
        Entity(text=text, heard=both[text], missed=said[text] - both[text], invented=heard[text] - both[text])
        for text in sorted(said | heard)
    ]
    return Entities(
        precision=_percent(both.total(), heard.total()),
        recall=_percent(both.total(), said.total()),
        f1=_percent(2 * both.total(), said.total() + heard.total()),
        heard=both.total(),
        missed=said.total() - both.total(),
        invented=heard.total() - both.total(),
        each=sorted(each, key=lambda entity: -(entity.missed + entity.invented)),
    )


def _percent(part: int, whole: int) -> float | None:
    return round(100 * part / whole, 2) if whole else None

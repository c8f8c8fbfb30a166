"""When words appear on the screen, whether they stay, and whether what was called stable was. Pure functions.

Words are compared as Whisper's normaliser leaves them, one written word at a time, so "Mister" and "mr." are equal.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import msgspec

from convert import scoring

from .runs import Message


class Shown(msgspec.Struct, frozen=True):
    """What stands on the screen from `at_s` on: the finals so far, then the segment that is being heard."""

    at_s: float
    text: str
    stable_chars: int  # of `text`
    is_final: bool = False


class Emission(msgspec.Struct, frozen=True):
    """How late the words of an utterance were, in milliseconds after each was spoken."""

    shown_ms: list[float]  # to the message from which on it stays
    stable_ms: list[float]  # ... from which on it stays and is called stable
    n_words: int  # in the reference


class Flicker(msgspec.Struct, frozen=True):
    """What did not stay."""

    n_messages: int
    n_shown: int  # words that a partial brought
    n_changed: int  # of these, gone or changed in a later message
    stable_violations: int  # messages whose stable text is no prefix of a later one's text
    stable_violations_by_partials: int  # ... of a later partial's of the same segment
    stable_chars_changed: int  # characters of stable text that changed, at the worst for each violation
    n_stable_words: int  # in the last partials before each final
    stable_words_changed: int  # of these, gone or changed in that final, after normalisation


def screen(messages: Sequence[Message]) -> list[Shown]:
    """The messages of a clip as one text that grows."""
    before, shown = "", []
    for message in messages:
        transcript = message.transcript
        head = f"{before} " if before and transcript.text else before
        stable = len(head) + min(transcript.stable_chars, len(transcript.text))
        shown.append(Shown(message.at_s, head + transcript.text, stable, transcript.is_final))
        if transcript.is_final:
            before = head + transcript.text
    return shown


@functools.cache
def _normalised(word: str) -> tuple[str, ...]:
    return tuple(scoring.normalise(word, "en").split())


def words(text: str) -> list[str]:
    """Normalised words."""
    return [part for word in text.split() for part in _normalised(word)]


def timed_words(spoken: Sequence[tuple[str, float]]) -> list[tuple[str, float]]:
    """Normalised words with their times, from written ones with theirs."""
    return [(part, at_s) for word, at_s in spoken for part in _normalised(word)]


def aligned(a: Sequence[str], b: Sequence[str], *, open_end: bool = False) -> list[int | None]:
    """For each word of `a` the place in `b` of the equal word that it stands for, at the least edit distance.

    With `open_end`, `a` is what there was of `b` at an earlier time: what `b` has after it costs nothing.
    """
    costs = [list(range(len(b) + 1))]
    for i, word in enumerate(a, 1):
        row = [i]
        for j, other in enumerate(b, 1):
            row.append(min(costs[-1][j - 1] + (word != other), costs[-1][j] + 1, row[-1] + 1))
        costs.append(row)
    j = min(range(len(b) + 1), key=lambda n: (costs[-1][n], n)) if open_end else len(b)
    return _path(costs, a, b, j)


def _path(costs: list[list[int]], a: Sequence[str], b: Sequence[str], j: int) -> list[int | None]:
    places: list[int | None] = [None] * len(a)
    i = len(a)
    while i and j:
        if costs[i][j] == costs[i - 1][j - 1] + (a[i - 1] != b[j - 1]):
            i, j = i - 1, j - 1
            places[i] = j if a[i] == b[j] else None
        elif costs[i][j] == costs[i - 1][j] + 1:
            i -= 1
        else:
            j -= 1
    return places


def first_kept(texts: Sequence[Sequence[str]]) -> list[int]:
    """For each word of the last text the first text from which on every one has it at that place."""
    final = texts[-1]
    first = [len(texts) - 1] * len(final)
    kept = set(range(len(final)))
    for i in range(len(texts) - 2, -1, -1):
        kept &= {place for place in aligned(texts[i], final, open_end=True) if place is not None}
        for place in kept:
            first[place] = i
    return first


def emission(shown: Sequence[Shown], spoken: Sequence[tuple[str, float]]) -> Emission:
    """Latency of each word of the last text that was spoken; `spoken` has each word with the second it ended at."""
    reference = timed_words(spoken)
    if not shown:
        return Emission([], [], len(reference))
    texts = [words(s.text) for s in shown]
    stable = [words(s.text[: s.stable_chars]) for s in shown[:-1]] + texts[-1:]
    said = aligned(texts[-1], [word for word, _ in reference])
    heard = [(i, reference[place][1]) for i, place in enumerate(said) if place is not None]
    late = [[1e3 * (shown[first[i]].at_s - end_s) for i, end_s in heard] for first in map(first_kept, (texts, stable))]
    return Emission(late[0], late[1], len(reference))


def flicker(shown: Sequence[Shown]) -> Flicker:
    """Words and stable characters of partials that did not stay."""
    texts = [words(s.text) for s in shown]
    n_shown = n_changed = 0
    for i, (before, after) in enumerate(itertools.pairwise(texts)):
        n_kept = sum(place is not None for place in aligned(before, after, open_end=True))
        n_changed += len(before) - n_kept
        n_shown += len(after) - n_kept if i < len(texts) - 2 else 0  # the last message is the final
    n_shown += len(texts[0]) if len(texts) > 1 else 0
    changed = [stable_changed(shown[i:]) for i in range(len(shown))]
    by_partials = [stable_changed(_until_final(shown[i:])) for i in range(len(shown))]
    return Flicker(
        n_messages=len(shown),
        n_shown=n_shown,
        n_changed=n_changed,
        stable_violations=sum(n > 0 for n in changed),
        stable_violations_by_partials=sum(n > 0 for n in by_partials),
        stable_chars_changed=sum(changed),
        **_stable_words(shown),
    )


def _until_final(shown: Sequence[Shown]) -> list[Shown]:
    """The first message and the partials that follow it without a final between them."""
    return [*shown[:1], *itertools.takewhile(lambda later: not later.is_final, shown[1:])]


def _stable_words(shown: Sequence[Shown]) -> dict[str, int]:
    """How many words were stable just before each final, and how many of them the final changed."""
    n_stable = n_changed = n_before = 0
    for before, final in itertools.pairwise(shown):
        if final.is_final:
            stable, said = words(before.text[: before.stable_chars]), words(final.text)
            if not before.is_final:
                n_stable += len(stable) - n_before
                n_changed += sum(place is None for place in aligned(stable, said, open_end=True))
            n_before = len(said)
    return {"n_stable_words": n_stable, "stable_words_changed": n_changed}


def stable_changed(shown: Sequence[Shown]) -> int:
    """Characters of the first message's stable text that a later message does not keep, at the most."""
    stable = shown[0].text[: shown[0].stable_chars]
    return max((len(stable) - _n_common(stable, later.text) for later in shown[1:]), default=0)


def _n_common(a: str, b: str) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)

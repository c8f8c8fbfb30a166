"""Figures that are told with an interval: what each clip adds to them, and how they follow from all clips."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from rapidfuzz.distance import Levenshtein

from . import intervals
from .entities import Found, split
from .intervals import Array, Interval, Statistic
from .scored import Scored
from .scoring import SPACELESS

LABELS = {  # key: what it is called, its unit, digits after the point
    "wer": ("word error rate", "%", 2),
    "cer": ("character error rate", "%", 2),
    "entity_precision": ("entity precision", "%", 2),
    "entity_recall": ("entity recall", "%", 2),
    "entity_f1": ("entity F1", "%", 2),
    "invented_words_per_hour": ("words invented per hour without speech", "", 1),
    "first_word_ms": ("first voiced sample to first partial, median", "ms", 0),
    "finalise_ms": ("decision to final, median", "ms", 0),
    "end_to_final_ms": ("last voiced sample to final, median", "ms", 0),
}
Mask = np.ndarray[Any, np.dtype[np.bool_]]  # shape = (n_clips,)
NOTHING_FOUND = Found(Counter(), Counter())


class Metric:
    """A figure over clips; `values` has what each clip adds, shape = (n_clips,) each.

    Clips that have nothing to do with it are left out: with `needs_both`, a difference is taken over the clips that
    both models have a value for, otherwise over those that either has.
    """

    def __init__(self, statistic: Statistic, values: tuple[Array, ...], concerned: Mask, *, needs_both: bool) -> None:
        self._statistic, self._values = statistic, values
        self._concerned, self._needs_both = concerned, needs_both

    @property
    def value(self) -> float | None:
        """Over all clips; None where no clip has to do with it."""
        return self._value(self._concerned)

    def _value(self, kept: Mask) -> float | None:
        value = float(self._statistic(*self._only(kept))) if kept.any() else float("nan")
        return None if np.isnan(value) else value

    def _only(self, kept: Mask) -> tuple[Array, ...]:
        return tuple(values[kept] for values in self._values)

    def interval(self) -> Interval | None:
        """Interval of the value; None where nothing happened at all, of which draws can make no more than nothing."""
        if not self.value:
            return None
        return intervals.interval(self._statistic, *self._only(self._concerned))

    def difference(self, other: Metric) -> tuple[float | None, Interval | None]:
        """What this has more than `other`, over the same clips, and its interval."""
        join = np.logical_and if self._needs_both else np.logical_or
        kept = join(self._concerned, other._concerned)
        a, b = self._value(kept), other._value(kept)
        if a is None or b is None:
            return None, None
        return a - b, intervals.difference(self._statistic, self._only(kept), other._only(kept))


def _rate(scale: float, tops: Array | Sequence[float], bottoms: Array | Sequence[float]) -> Metric:
    top, bottom = scale * np.asarray(tops, float), np.asarray(bottoms, float)
    return Metric(intervals.ratio, (top, bottom), bottom > 0, needs_both=False)


def _middle(values: Sequence[float | None]) -> Metric:
    known = np.array(values, float)  # None becomes NaN
    return Metric(intervals.median, (known,), ~np.isnan(known), needs_both=True)


def error_counts(clip: Scored, *, characters: bool = False) -> tuple[int, int]:
    """Errors of a clip, and words (or characters) of its reference; nothing without a reference.

    Errors are substitutions, deletions and insertions at the least, as jiwer counts them.
    """
    ref, hyp = split(clip.ref or "", clip.language), split(clip.hyp, clip.language)
    if characters:
        ref, hyp = tuple("".join(ref)), tuple("".join(hyp))
    return (Levenshtein.distance(ref, hyp), len(ref)) if ref else (0, 0)


def n_heard(clip: Scored) -> int:
    """Words, or characters where a language has none, that the transcript shows."""
    return len("".join(clip.hyp.split())) if clip.language in SPACELESS else len(clip.hyp.split())


def metrics(clips: Sequence[Scored], entities: Sequence[Found] | None = None) -> dict[str, Metric]:
    """Every figure that a set can have; one that no clip has to do with has the value None."""
    words = [(0, 0) if clip.language in SPACELESS else error_counts(clip) for clip in clips]
    characters = [error_counts(clip, characters=True) for clip in clips]
    silent = [(0.0, 0.0) if clip.has_speech else (n_heard(clip), clip.duration_s / 3600) for clip in clips]
    return {
        "wer": _rate(100, *_columns(words)),
        "cer": _rate(100, *_columns(characters)),
        **_entity_metrics(entities or [NOTHING_FOUND] * len(clips)),
        "invented_words_per_hour": _rate(1, *_columns(silent)),
        "first_word_ms": _middle([clip.first_word_ms for clip in clips]),
        "finalise_ms": _middle([clip.finalise_ms for clip in clips]),
        "end_to_final_ms": _middle([clip.end_to_final_ms for clip in clips]),
    }


def _columns(rows: Iterable[tuple[float, float]]) -> tuple[Sequence[float], Sequence[float]]:
    tops, bottoms = zip(*rows, strict=True)
    return tops, bottoms


def _entity_metrics(found: Sequence[Found]) -> dict[str, Metric]:
    """Each is a ratio of sums over clips, F1 too."""
    said, heard, both = (np.array(counts, float) for counts in zip(*map(_totals, found), strict=True))
    return {
        "entity_precision": _rate(100, both, heard),
        "entity_recall": _rate(100, both, said),
        "entity_f1": _rate(200, both, said + heard),
    }


def _totals(found: Found) -> tuple[int, int, int]:
    return found.said.total(), found.heard.total(), found.both.total()


def number(value: float | None, figure: str, sign: str = "") -> str:
    """A figure with its unit."""
    _, unit, digits = LABELS[figure]
    return "-" if value is None else f"{value:{sign}.{digits}f} {unit}".rstrip()


def span_text(span: Interval | None, figure: str, sign: str = "") -> str:
    """An interval, without the unit."""
    digits = LABELS[figure][2]
    return "" if span is None else f"{span.low:{sign}.{digits}f} to {span.high:{sign}.{digits}f}"

"""What an evaluation notes: each clip as it was heard, and what hearing all of them took."""

from __future__ import annotations

import msgspec

NO_METER = "no meter of energy that can be read on this machine"
NOT_THROUGHOUT = "could not be read throughout"


class Scored(msgspec.Struct, frozen=True):
    """One clip."""

    id: str
    ref: str | None
    hyp: str
    duration_s: float
    finalise_ms: float | None
    end_to_final_ms: float | None
    language: str
    rejected: list[str]
    first_word_ms: float | None = None  # first voiced sample to the first partial with text
    has_speech: bool = True  # False: known to hold none, so every word heard was invented
    slots: list[str] = []  # values that a command has, as the manifest tells


class Usage(msgspec.Struct):
    """What the processes that recognised took; loading left out. Mutable."""

    core_s: float = 0.0
    rss_mb: float | None = None  # peak
    joules: float | None = 0.0  # of all that the meter meters; None: not known
    meter: str = NO_METER  # which, or why there is no figure

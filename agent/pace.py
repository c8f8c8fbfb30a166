"""How often the engine makes a partial: as often as was asked for, or less often while the machine is behind.

Partials are what can be done without: each costs about the same whatever it covers, so half as many are half the load.
Finals are never left out, and audio is dropped only when finals alone are too much.
"""

from __future__ import annotations

import math

FACTORS = (1, 2, 4)  # times the configured hop; beyond the last there are finals only
FINALS_ONLY = len(FACTORS)
MAX_LOAD = 0.8  # seconds of partials per second of speech; beyond it the hop grows
EASY_LOAD = 0.5  # it shrinks when the load at the shorter hop would be less than this ...
CALM_S = 5.0  # ... for so much speech
CALM_MAX_S = 60.0  # ... or up to this, where the shorter hop turned out to be too much
MEMORY_S = 2.0  # of speech, over which the load is averaged


class Pace:
    """The hop that the machine can keep, as measured. Knows no clock: time passes as speech does."""

    def __init__(self, hop_ms: float) -> None:
        self._hop_ms = hop_ms
        self._level = 0
        self._least = 0  # level, whatever the machine could keep up with
        self._cost = 0.0  # the load that there would be at the configured hop
        self._calm_s = 0.0  # speech for which nothing has spoken against a shorter hop
        self._patience_s = [CALM_S] * (FINALS_ONLY + 1)  # by level, before a shorter hop is tried
        self._fell_from: int | None = None  # level of the last attempt at a shorter hop, until that has failed

    @property
    def hop_ms(self) -> float | None:
        """Speech between two partials; None: finals only."""
        return None if self._level == FINALS_ONLY else self._hop_ms * FACTORS[self._level]

    @property
    def is_slowed(self) -> bool:
        """Whether partials are left out."""
        return self._level > 0

    @property
    def load(self) -> float:
        """Seconds of partials per second of speech, averaged; 0 while there are none."""
        return 0.0 if self._level == FINALS_ONLY else self._cost / FACTORS[self._level]

    def hold(self, least: int) -> None:
        """Keep at `least` this level from now on; when it is lifted, shorter hops are tried as ever."""
        self._least = least
        if self._level < least:
            self._level, self._calm_s, self._fell_from = least, 0.0, None

    def observe(self, busy_s: float, audio_s: float) -> None:
        """Take note of partial steps that took `busy_s` and of the speech that they covered.

        Speech heard with finals only belongs here too: from time to time it is worth an attempt at partials.
        """
        if self._level == FINALS_ONLY:
            self._rest(audio_s, is_easy=True)
            return
        weight = 1 - math.exp(-audio_s / MEMORY_S)
        load = busy_s / max(audio_s, self._hop_ms / 1e3)  # a step covers a hop at least
        self._cost += weight * (FACTORS[self._level] * load - self._cost)
        if self.load > MAX_LOAD:
            self._rise()
        else:
            self._rest(audio_s, is_easy=self._cost / FACTORS[max(0, self._level - 1)] < EASY_LOAD)

    def find(self, waiting_s: float) -> None:
        """Take note of speech that waited while the engine was busy, with whatever."""
        is_late = waiting_s > self._bearable_s()
        while waiting_s > self._bearable_s() and self._level < FINALS_ONLY:
            self._rise()
        if is_late:
            self._calm_s = 0.0

    def _bearable_s(self) -> float:
        """Two hops."""
        return 2e-3 * self._hop_ms * FACTORS[min(self._level, FINALS_ONLY - 1)]

    def _rise(self) -> None:
        if self._fell_from is not None:
            self._patience_s[self._fell_from] = min(2 * self._patience_s[self._fell_from], CALM_MAX_S)
            self._fell_from = None
        self._level += 1
        self._calm_s = 0.0

    def _rest(self, audio_s: float, *, is_easy: bool) -> None:
        self._calm_s = self._calm_s + audio_s if is_easy else 0.0
        if self._level == 0:
            if self._calm_s >= CALM_MAX_S:
                self._forgive(0)
        elif self._calm_s >= self._patience_s[self._level] and self._level > self._least:
            self._fall()

    def _fall(self) -> None:
        if self._level == FINALS_ONLY:
            self._cost = 0.0  # as measured long ago
        self._forgive(self._level)
        self._fell_from = self._level
        self._level -= 1
        self._calm_s = 0.0

    def _forgive(self, level: int) -> None:
        """Try a hop that has been kept up with for a while as readily as ever, should it come to that again."""
        self._fell_from = None
        for higher in range(level + 1, FINALS_ONLY + 1):
            self._patience_s[higher] = CALM_S


def pace_news(hop_ms: float | None, configured_ms: float) -> str:
    """The pace of partials in a sentence."""
    if hop_ms is None:
        return "the engine is too far behind for partials, finals go on"
    state = "is behind" if hop_ms > configured_ms else "keeps up"
    return f"the engine {state}: a partial every {hop_ms:g} ms of speech"

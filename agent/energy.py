"""What listening costs: joules over time, and of speech what it takes beyond the quiet.

The quiet is measured, not assumed: a stretch between two readings is idle if at neither end, nor in between, any
speech was waiting for the engine or was finished by it. The median of the latest idle stretches is the baseline, so
that a job of somebody else's, or a word that had just begun, does not shift it. Talk is everything from one idle
stretch to the next, and is charged what was used in that time above the baseline.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

import msgspec

from .measurements import Energy
from .power import PowerSource

N_IDLE = 60  # stretches that the baseline is taken from
N_IDLE_MIN = 5  # fewer tell nothing
SHORTEST_S = 0.2  # a shorter stretch is too coarse for the baseline
LONGEST_TALK_S = 300.0  # then it is settled as it stands, though it goes on


class Activity(msgspec.Struct, frozen=True):
    """What the engine has to do, and what it has done since the agent started."""

    is_busy: bool  # some speech has no final yet
    speech_s: float  # in finals
    utterances: int


QUIET = Activity(is_busy=False, speech_s=0.0, utterances=0)


class Talk(msgspec.Struct):
    """What one or several talks took. Mutable."""

    joules: float | None = 0.0  # None: not known throughout
    duration_s: float = 0.0
    speech_s: float = 0.0
    utterances: int = 0


class Meter:
    """Adds up what the source tells. `sample` often, `read` once a report; from any thread."""

    def __init__(
        self,
        source: PowerSource | None,
        activity: Callable[[], Activity] = lambda: QUIET,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source, self._activity, self._clock = source, activity, clock
        self._lock = threading.Lock()  # guards the rest
        self._last_s, self._last = clock(), activity()
        self._idle_watts: deque[float] = deque(maxlen=N_IDLE)
        self._interval = Talk()
        self._open: Talk | None = None  # going on
        self._ended = Talk()  # since the last report, joules above the baseline
        self._total_joules = 0.0
        if source:
            source.spent(self._last_s)

    @property
    def idle_watts(self) -> float | None:
        """The baseline; None as long as there was too little quiet."""
        return statistics.median(self._idle_watts) if len(self._idle_watts) >= N_IDLE_MIN else None

    def sample(self) -> None:
        """Take a reading."""
        with self._lock:
            self._sample()

    def read(self) -> Energy | None:
        """Report what was used since the last report; None without a source."""
        if self._source is None:
            return None
        with self._lock:
            self._sample()
            interval, self._interval = self._interval, Talk()
            ended, self._ended = self._ended, Talk()
            return Energy(
                source=self._source.name,
                quality=self._source.quality,
                joules=_rounded(interval.joules),
                watts=_ratio(interval.joules, interval.duration_s),
                idle_watts=_rounded(self.idle_watts),
                joules_per_audio_s=_ratio(ended.joules, ended.speech_s),
                joules_per_utterance=_ratio(ended.joules, ended.utterances),
                total_joules=round(self._total_joules, 3),
            )

    def _sample(self) -> None:
        if self._source is None:
            return
        now_s, now = self._clock(), self._activity()
        joules, duration_s = self._source.spent(now_s), now_s - self._last_s
        before, self._last_s, self._last = self._last, now_s, now
        self._total_joules += joules or 0.0
        _add(self._interval, joules, duration_s)
        has_finished = (now.speech_s, now.utterances) != (before.speech_s, before.utterances)
        if before.is_busy or now.is_busy or has_finished:
            self._add_talk(joules, duration_s, before, now)
        else:
            self._settle()
            if joules is not None and duration_s >= SHORTEST_S:
                self._idle_watts.append(joules / duration_s)

    def _add_talk(self, joules: float | None, duration_s: float, before: Activity, now: Activity) -> None:
        talk = self._open = self._open or Talk()
        _add(talk, joules, duration_s)
        talk.speech_s += now.speech_s - before.speech_s
        talk.utterances += now.utterances - before.utterances
        if talk.duration_s >= LONGEST_TALK_S:
            self._settle()

    def _settle(self) -> None:
        """Charge the talk that has ended; one that was not measured throughout is left out altogether."""
        talk, self._open = self._open, None
        idle_watts = self.idle_watts
        if talk is None or talk.joules is None or idle_watts is None:
            return
        _add(self._ended, talk.joules - idle_watts * talk.duration_s, talk.duration_s)
        self._ended.speech_s += talk.speech_s
        self._ended.utterances += talk.utterances


def _add(talk: Talk, joules: float | None, duration_s: float) -> None:
    talk.joules = None if joules is None or talk.joules is None else talk.joules + joules
    talk.duration_s += duration_s


def _ratio(joules: float | None, per: float) -> float | None:
    return None if joules is None or per <= 0 else round(joules / per, 3)


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)

"""Clips as the agent's gate hands them to its engine: at once, or when they would have been captured."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence

import msgspec
import numpy as np

from agent.config import VadConfig
from agent.confirm import ConfirmedGate
from agent.messages import AudioChunk, SpeechChunk
from agent.vad import Gate, Segment, quietest, segments
from whisperlet.audio import Pcm16, samples, seconds

TAIL = samples(1500)  # silence after each clip, so that the gate closes
PACED_BLOCK = samples(20)  # what the gate hands on at a time


class Playback:
    """A clip on its way to the engine; iterate once.

    With `segment` the gate cuts it, without it is one utterance. With `pace` each chunk comes when its last sample
    would have been captured; otherwise each segment comes at once.
    """

    def __init__(self, pcm: Pcm16, vad: VadConfig, *, segment: bool = False, pace: bool = False) -> None:
        self._heard = np.concatenate([pcm, np.zeros(TAIL, np.int16)])
        found = list(segments(self._heard, vad, ConfirmedGate(vad))) if segment or pace else []
        self._voiced_from = _first_voiced(self._heard, found, vad) if pace else None
        self._segments = found if segment else list(one_utterance(pcm, found, vad))
        self._voiced = _Voiced(self._heard, vad) if pace else None
        self._opened_s = 0.0  # monotonic, when the first sample was captured

    def __iter__(self) -> Iterator[SpeechChunk]:
        """What the engine is given, in order."""
        if self._voiced:
            return self._in_real_time(self._voiced)
        return (_last(self._heard, segment, segment.start) for segment in self._segments)

    def speech_began_s(self) -> float | None:
        """When the first voiced sample was captured (monotonic); None if there is none, or nobody waited for it."""
        return None if self._voiced_from is None else self._opened_s + seconds(self._voiced_from)

    def _in_real_time(self, voiced: _Voiced) -> Iterator[SpeechChunk]:
        opened_s = self._opened_s = time.monotonic()
        for segment in self._segments:
            ends = [*range(segment.start + PACED_BLOCK, segment.decision, PACED_BLOCK), segment.decision]
            start = segment.start
            for end in ends:
                time.sleep(max(0.0, opened_s + seconds(end) - time.monotonic()))
                if end == segment.decision:
                    yield _last(self._heard, segment, start, time.monotonic(), opened_s)
                else:
                    audio = self._heard[start:end]
                    yield SpeechChunk(segment.utterance, segment.segment, audio, start, voiced_end=voiced.end(end))
                start = end
        time.sleep(max(0.0, opened_s + seconds(len(self._heard)) - time.monotonic()))


def one_utterance(pcm: Pcm16, found: Sequence[Segment], vad: VadConfig) -> Iterator[Segment]:
    """The whole clip as one utterance, up to the last voiced sample if the gate found one; cut only where it must be."""
    end, decision = (found[-1].speech_end, found[-1].decision) if found else (len(pcm), len(pcm))
    longest, window = samples(1000 * vad.max_segment_s), samples(1000 * vad.cut_window_s)
    start = number = 0
    while end - start > longest:
        limit = start + longest
        cut = limit - window + quietest(pcm[limit - window : limit])
        yield Segment(1, number, start, cut, limit, continues=True)
        start, number = cut, number + 1
    yield Segment(1, number, start, end, decision, continues=False)


def _first_voiced(heard: Pcm16, found: Sequence[Segment], vad: VadConfig) -> int | None:
    """Where the first utterance begins, by the gate's first voiced frame."""
    without_pre_roll = segments(heard, msgspec.structs.replace(vad, pre_roll_ms=0)) if found else ()
    return next((each.start for each in without_pre_roll if each.utterance == found[0].utterance), None)


def _last(heard: Pcm16, segment: Segment, first: int, now_s: float | None = None, opened_s: float = 0.0) -> SpeechChunk:
    """The chunk that ends a segment, with its audio from sample `first` on."""
    return SpeechChunk(
        segment.utterance,
        segment.segment,
        heard[first : segment.speech_end if now_s is None else segment.decision],
        first,
        is_last=True,
        continues=segment.continues,
        speech_end=segment.speech_end,
        speech_end_monotonic_s=None if now_s is None else opened_s + seconds(segment.speech_end),
        decided_monotonic_s=now_s,
    )


class _Voiced:
    """What the gate knew at any time of where speech had last been heard."""

    def __init__(self, heard: Pcm16, vad: VadConfig) -> None:
        gate = Gate(vad)
        messages = gate.feed(AudioChunk(heard, 0, 0.0))
        self._known = [message.start + len(message.samples) for message in messages]
        self._ends = [message.voiced_end or message.speech_end for message in messages]

    def end(self, sample: int) -> int | None:
        """Index after the last voiced sample that was known of when `sample` had been heard."""
        n = bisect_right(self._known, sample)
        return self._ends[n - 1] if n else None

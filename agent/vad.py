"""The gate: lets through what sounds like speech, with what came just before it, cut into segments."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec
import numpy as np
import webrtcvad

from whisperlet.audio import SAMPLE_RATE, Pcm16, samples, seconds

from .config import VadConfig
from .messages import AudioChunk, SpeechChunk

FRAME_MS = 20  # webrtcvad takes 10, 20 or 30
FRAME = samples(FRAME_MS)
OPENING_WINDOW = 1.5  # voiced frames that open the gate may lie scattered over this multiple of their time
QUIET = samples(160)  # a cut is made in the middle of the quietest stretch of this length
OFFLINE_BLOCK = samples(1000)
NOTHING = np.zeros(0, np.int16)


@dataclass(slots=True)
class VadState:
    """Everything the gate carries from one frame to the next. Indices count samples, as `start` does."""

    vad: Any  # webrtcvad.Vad adapts to the noise it hears, so each unbroken stretch of audio gets a fresh one
    recent: deque[Pcm16]  # frames up to `end`, enough for pre-roll and for a cut
    voiced: deque[bool]  # of the newest frames since the gate closed
    pending: Pcm16 = field(default_factory=NOTHING.copy)  # after `end`, not yet a whole frame
    end: int = 0  # after the last frame that was judged
    arrived_end: int = 0  # after the last sample that arrived
    arrived_s: float = 0.0  # monotonic, when it did
    utterance: int = 0
    segment: int = 0
    start: int | None = None  # of the open segment; None: the gate is closed
    voiced_end: int = 0  # after the last voiced sample
    heard_until: int = 0  # where the last utterance ended: pre-roll never reaches behind it


class Segment(msgspec.Struct, frozen=True):
    """Where speech lies in a clip, in samples: `pcm[start:speech_end]` is what gets recognised."""

    utterance: int
    segment: int
    start: int
    speech_end: int
    decision: int  # what the gate had heard when it ended the segment
    continues: bool


class Gate:
    """Turns audio into speech: `feed` chunks of any size, `flush` at the end.

    What comes out depends on the samples alone, not on how they were cut into chunks: one message a frame
    while the gate is open. Consumers drop a segment's audio from `speech_end` on. A segment that follows a
    cut may turn out to hold no speech; then its `speech_end` is its first sample.
    """

    def __init__(self, config: VadConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._state = VadState(None, deque(), deque())
        self.retune(config)

    def retune(self, config: VadConfig) -> None:
        """Go on under another configuration, the gate being closed; utterances are counted on."""
        assert not self.is_open
        self._config = config
        self._n_to_open = math.ceil(config.start_ms / FRAME_MS)
        window = math.ceil(OPENING_WINDOW * self._n_to_open)
        n_recent = 1 + max(window + _n_frames(config.pre_roll_ms), _n_frames(config.cut_window_s * 1000))
        state = self._state
        state.vad, state.recent, state.voiced = _vad(config), deque(state.recent, n_recent), deque(maxlen=window)

    @property
    def is_open(self) -> bool:
        """Whether an utterance is under way."""
        return self._state.start is not None

    def feed(self, chunk: AudioChunk) -> list[SpeechChunk]:
        """Speech that `chunk` brought to light; a jump of `start` ends the open segment where the gap begins."""
        state = self._state
        speech = []
        if chunk.start != state.end + len(state.pending):
            speech = self.flush()
            state.end = chunk.start
        state.arrived_end, state.arrived_s = chunk.end, chunk.arrived_monotonic_s
        audio = np.concatenate([state.pending, chunk.samples])
        n_whole = len(audio) // FRAME * FRAME
        state.pending = audio[n_whole:]
        for frame in audio[:n_whole].reshape(-1, FRAME):
            speech += self._judge(frame)
        return speech

    def flush(self) -> list[SpeechChunk]:
        """End the open segment, if any: nothing follows what was fed so far."""
        state = self._state
        rest, state.pending = state.pending, NOTHING
        if state.voiced_end == state.end:  # too short to be judged, so it goes with the frame before it
            state.voiced_end += len(rest)
        state.end += len(rest)
        speech = [self._close(rest)] if self.is_open else []
        state.vad = _vad(self._config)
        state.recent.clear()
        state.voiced.clear()
        return speech

    def _judge(self, frame: Pcm16) -> list[SpeechChunk]:
        state = self._state
        voiced = state.vad.is_speech(frame.tobytes(), SAMPLE_RATE)
        state.end += FRAME
        state.recent.append(frame)
        state.voiced.append(voiced)
        if state.start is None:
            return [self._open()] if state.voiced.count(True) >= self._n_to_open else []
        if voiced:
            state.voiced_end = state.end
        if state.end - state.voiced_end >= samples(self._config.hang_over_ms):
            return [self._close(frame)]
        if state.end + FRAME - state.start > samples(self._config.max_segment_s * 1000):
            return self._cut(frame)
        return [self._chunk(frame)]

    def _open(self) -> SpeechChunk:
        state = self._state
        first_voiced = state.end - FRAME * (len(state.voiced) - state.voiced.index(True))
        start = max(first_voiced - samples(self._config.pre_roll_ms), self._oldest(), state.heard_until)
        state.utterance += 1
        state.segment = 0
        state.start = start
        state.voiced_end = state.end
        return self._chunk(self._since(start))

    def _close(self, newest: Pcm16) -> SpeechChunk:
        state = self._state
        assert state.start is not None
        state.heard_until = max(state.voiced_end, state.start)
        last = self._chunk(newest, speech_end=state.heard_until)
        state.start = None
        state.voiced.clear()
        return last

    def _cut(self, newest: Pcm16) -> list[SpeechChunk]:
        """End the segment at its quietest late point and begin the next one with what came after that."""
        state = self._state
        window = min(samples(self._config.cut_window_s * 1000), FRAME * len(state.recent))
        cut = state.end - window + quietest(self._since(state.end - window))
        last = self._chunk(newest, speech_end=cut, continues=True)
        state.segment += 1
        state.start = cut
        return [last, self._chunk(self._since(cut))]

    def _chunk(self, audio: Pcm16, speech_end: int | None = None, *, continues: bool = False) -> SpeechChunk:
        """Message with the newest audio; with `speech_end` the last one of its segment."""
        state = self._state
        start = state.end - len(audio)
        if speech_end is None:
            return SpeechChunk(state.utterance, state.segment, audio, start, voiced_end=state.voiced_end)
        return SpeechChunk(
            state.utterance,
            state.segment,
            audio,
            start,
            is_last=True,
            continues=continues,
            speech_end=speech_end,
            speech_end_monotonic_s=state.arrived_s - seconds(state.arrived_end - speech_end),
            decided_monotonic_s=self._clock(),
        )

    def _oldest(self) -> int:
        """Index of the first sample that is still kept."""
        return self._state.end - FRAME * len(self._state.recent)

    def _since(self, index: int) -> Pcm16:
        return np.concatenate(self._state.recent)[index - self._oldest() :]


def quietest(audio: Pcm16) -> int:
    """Index of the middle of the stretch of `QUIET` samples with the least energy; the first of equals."""
    energy = np.concatenate([[0], np.cumsum(np.square(audio, dtype=np.int64))])
    length = min(QUIET, len(audio))
    return int(np.argmin(energy[length:] - energy[:-length])) + length // 2


class Hearing(Protocol):
    """What turns audio into speech: `Gate`, or one that asks for a second opinion."""

    def feed(self, chunk: AudioChunk) -> list[SpeechChunk]:
        """See `Gate.feed`."""

    def flush(self) -> list[SpeechChunk]:
        """See `Gate.flush`."""


def segments(pcm: Pcm16, config: VadConfig, gate: Hearing | None = None) -> Iterator[Segment]:
    """Segments of a whole clip, as the gate would find them live."""
    gate = gate or Gate(config, clock=lambda: 0.0)
    start = 0
    is_first = True
    for message in _speech(pcm, gate):
        start = message.start if is_first else start
        is_first = message.is_last
        if message.is_last:
            decision = message.start + len(message.samples)
            yield Segment(*message.key, start, message.speech_end, decision, message.continues)


def _speech(pcm: Pcm16, gate: Hearing) -> Iterator[SpeechChunk]:
    for start in range(0, len(pcm), OFFLINE_BLOCK):
        yield from gate.feed(AudioChunk(pcm[start : start + OFFLINE_BLOCK], start, 0.0))
    yield from gate.flush()


def _n_frames(duration_ms: float) -> int:
    return math.ceil(duration_ms / FRAME_MS)


def _vad(config: VadConfig) -> Any:
    return webrtcvad.Vad(config.aggressiveness)

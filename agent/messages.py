"""Messages between the stages, in the order of the arrows they travel on.

    source -AudioChunk-> gate -SpeechChunk-> transcriber -Transcript-> publisher -Envelope-> outbox
    broker -Request-> dispatcher -Notice-> broker

Time is counted in samples since the source was opened, at 16 kHz; a gap in the audio shows as a jump of
`start`. `*_s` fields that end in `monotonic_s` are `time.monotonic()` of this machine, comparable between its
processes. Wall-clock time appears only in what leaves the device (`payloads.py`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np

from whisperlet.audio import Pcm16


class AudioChunk(msgspec.Struct, frozen=True):
    """Audio as it came from the source, mono, 16 kHz."""

    samples: Pcm16  # shape = (n,)
    start: int  # index of samples[0]
    arrived_monotonic_s: float  # when the last of `samples` was there

    @property
    def end(self) -> int:
        """Index of the sample after the last one."""
        return self.start + len(self.samples)


class SpeechChunk(msgspec.Struct, frozen=True, tag=True):
    """Audio that the gate holds to be part of an utterance.

    A segment is what is recognised in one piece, 28 s at the most; an utterance has one segment unless its
    talker went on for longer.
    """

    utterance: int  # counts from 1
    segment: int  # counts from 0 within the utterance
    samples: np.ndarray[Any, np.dtype[np.int16]]  # shape = (n,)
    start: int  # index of samples[0]
    voiced_end: int | None = None  # index after the last sample so far that is voiced; None: not known
    is_last: bool = False  # of this segment
    continues: bool = False  # with is_last: the talk goes on in the next segment
    speech_end: int = 0  # with is_last: index after the last voiced sample
    speech_end_monotonic_s: float | None = None  # with is_last: when that sample was captured
    decided_monotonic_s: float | None = None  # with is_last: when the gate decided that speech had ended

    @property
    def key(self) -> tuple[int, int]:
        """Utterance and segment, which name a piece of speech."""
        return self.utterance, self.segment


class Transcript(msgspec.Struct, frozen=True, tag=True):
    """Text of one segment so far (partial) or for good (final)."""

    utterance: int
    segment: int
    revision: int  # counts from 1 within the segment, over partials and the final
    text: str
    stable_chars: int  # this much of `text` is not expected to change
    start: int  # samples, first of the segment
    end: int  # samples, after the last one that was heard
    is_final: bool
    language: str  # ISO 639-1 code as Whisper spells it
    continues: bool = False  # the talk goes on in the next segment
    rejected: str | None = None  # why text was withheld: "no_speech", "repetition", "engine_failed"
    n_tokens: int = 0
    avg_logprob: float = 0.0  # natural logarithm, mean over the tokens
    no_speech_prob: float = 0.0  # 0 to 1
    encode_ms: float = 0.0
    decode_ms: float = 0.0
    n_attempts: int = 1  # to hear it: more where a text left speech out, or went round
    speech_end_monotonic_s: float | None = None  # see SpeechChunk
    decided_monotonic_s: float | None = None  # see SpeechChunk

    @property
    def key(self) -> tuple[int, int]:
        """Utterance and segment, which name a piece of speech."""
        return self.utterance, self.segment


class Thrift(enum.IntEnum):
    """What the device does without, because it is hot; each level goes without what the one before it does, too."""

    NORMAL = 0
    LONGER_HOP = 1  # half of the partials
    NO_PARTIALS = 2
    FINALS_ONLY = 3  # none is heard in advance, and what is hardly speech is not heard at all


class Kind(enum.StrEnum):
    """What an envelope holds; the outbox drops by kind when it is full, telemetry first."""

    PARTIAL = "partial"
    TELEMETRY = "telemetry"
    EVENT = "event"
    FINAL = "final"


class Envelope(msgspec.Struct, frozen=True):
    """A payload on its way to the broker."""

    topic: str  # below whisperlet/<device>/
    payload: bytes
    kind: Kind
    qos: int = 1
    retain: bool = False
    historical: bool = False  # sent late: no news, but a record


class Outbox(Protocol):
    """Where messages wait; none of its calls does. See `outbox.py`."""

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Have `on_ready` called, from any thread, whenever there is something to take."""

    @property
    def depth(self) -> int:
        """Messages that wait or are in flight."""

    def put(self, envelope: Envelope) -> int | None:
        """Store an envelope."""

    def take(self, limit: int) -> list[tuple[int, Envelope]]:
        """Oldest waiting envelopes with their ids; they are in flight from now on."""

    def ack(self, message_id: int) -> None:
        """Forget an envelope that was delivered."""

    def discard(self, message_id: int) -> None:
        """Forget an envelope that can never be delivered."""

    def put_back(self, message_id: int) -> None:
        """Have an envelope in flight wait again, in its place."""

    def requeue(self) -> None:
        """Put everything that is in flight back in its place."""

    def dropped(self) -> dict[Kind, int]:
        """Messages lost so far, by kind."""


class Request(msgspec.Struct, frozen=True):
    """Something that the broker has sent us."""

    topic: str  # below whisperlet/<device>/
    payload: bytes
    is_retained: bool = False  # it was there before we asked
    is_again: bool = False  # the broker may have sent it before
    response_topic: str | None = None  # MQTT 5: where the answer is to go ...
    correlation: bytes | None = None  # ... and with what


class Remote(Protocol):
    """Who answers what the broker sends; called from the publisher's thread."""

    def greeting(self) -> list[Notice]:
        """What a new connection begins with."""

    def handle(self, request: Request) -> list[Notice]:
        """What is to be published in answer."""


class Notice(msgspec.Struct, frozen=True):
    """A payload for those who listen now: sent on this connection or never."""

    topic: str  # as a whole
    payload: bytes
    retain: bool = False
    correlation: bytes | None = None

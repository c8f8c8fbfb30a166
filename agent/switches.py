"""The gate with what an operator may switch: muted, not transcribing, tuned otherwise.

Asked for from any thread, done by the thread that reads the source, between two of its chunks.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from .config import VadConfig
from .messages import AudioChunk, SpeechChunk
from .vad import Hearing


class Tunable(Hearing, Protocol):
    """A gate that can go on under another configuration."""

    @property
    def is_open(self) -> bool:
        """See `Gate.is_open`."""

    def retune(self, config: VadConfig) -> None:
        """See `Gate.retune`."""


class Positions(msgspec.Struct, frozen=True):
    """Of the switches."""

    muted: bool = False
    transcribing: bool = True


class SwitchedGate:
    """Hears nothing while muted; hears, but lets nothing through while not transcribing."""

    def __init__(self, gate: Tunable) -> None:
        self._gate = gate
        self._now = self._wanted = Positions()
        self._tuning: VadConfig | None = None  # that is wanted, and that holds; None: as the gate was made
        self._tuned: VadConfig | None = None

    def switch(self, positions: Positions) -> None:
        """From the next chunk on; what was under way is ended there, and still gets its text."""
        self._wanted = positions

    def retune(self, config: VadConfig) -> None:
        """From the next chunk on that finds the gate closed."""
        self._tuning = config

    def feed(self, chunk: AudioChunk) -> list[SpeechChunk]:
        """See `Gate.feed`."""
        ended = self._take_over()
        if self._now.muted:
            return ended
        return ended + self._let_through(self._gate.feed(chunk))

    def flush(self) -> list[SpeechChunk]:
        """See `Gate.flush`."""
        return self._let_through(self._gate.flush())

    def _take_over(self) -> list[SpeechChunk]:
        """Do what was asked for since the last chunk; what that ends."""
        ended: list[SpeechChunk] = []
        if (wanted := self._wanted) != self._now:
            ended = self.flush()
            self._now = wanted
        if (tuning := self._tuning) is not self._tuned and tuning is not None and not self._gate.is_open:
            self._gate.retune(tuning)
            self._tuned = tuning
        return ended

    def _let_through(self, speech: list[SpeechChunk]) -> list[SpeechChunk]:
        return speech if self._now.transcribing else []

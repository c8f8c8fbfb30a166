"""What the agent tells of itself at any moment: to systemd, and in the retained status."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

from .health import Heartbeat, Notifier
from .payloads import Condition, MicrophoneState

log = logging.getLogger(__name__)
MICROPHONE_AFTER: dict[str, MicrophoneState] = {
    "microphone_lost": "lost",
    "microphone_silent": "silent",
    "microphone_back": "listening",
}


class Sensed(NamedTuple):
    """What the other stages say when they are asked."""

    hop_ms: float | None  # None: finals only
    outbox_messages: int
    is_connected: bool


class Vitals:
    """Keeps the watchdog fed while every stage keeps its promises, and says so when one does not.

    `on_change` is called, from any thread, when what the retained status says has changed; `report` hears of a stage
    that is stuck. `is_muted` is for whoever mutes the ear: a muted loop beats as it did before.
    """

    def __init__(
        self,
        sense: Callable[[], Sensed],
        on_change: Callable[[], None],
        report: Callable[[str, str], None],
        notifier: Notifier | None = None,
    ) -> None:
        self.heartbeat = Heartbeat()
        self.notifier = notifier or Notifier()
        self._sense, self._on_change, self._report = sense, on_change, report
        self._microphone: MicrophoneState = "starting"
        self._is_muted = False
        self._stalled: set[str] = set()
        self._told_line = ""
        self._told: tuple[str, bool, float | None] | None = None

    @property
    def is_muted(self) -> bool:
        """Whether the ear has been told not to listen."""
        return self._is_muted

    @is_muted.setter
    def is_muted(self, muted: bool) -> None:
        self._is_muted = muted
        self.tell()

    def note_event(self, name: str) -> None:
        """Learn from an event what has become of the microphone."""
        if name in MICROPHONE_AFTER:
            self._microphone = MICROPHONE_AFTER[name]
            self.tell()

    def note_audio(self) -> None:
        """Learn that there is audio; for each chunk."""
        if self._microphone == "starting":
            self._microphone = "listening"
            self.tell()

    def condition(self) -> Condition:
        """What the retained status says."""
        sensed = self._sense()
        return Condition(
            microphone=self._microphone,
            muted=self._is_muted,
            hop_ms=sensed.hop_ms,
            outbox_messages=sensed.outbox_messages,
        )

    def line(self) -> str:
        """One line for a person."""
        sensed = self._sense()
        pace = "finals only" if sensed.hop_ms is None else f"a partial every {sensed.hop_ms:g} ms"
        words = [
            f"microphone {self._microphone}{', muted' if self._is_muted else ''}",
            f"broker {'connected' if sensed.is_connected else 'away'}",
            pace,
            f"{sensed.outbox_messages} messages wait",
            *([f"stuck: {', '.join(sorted(self._stalled))}"] if self._stalled else []),
        ]
        return "; ".join(words)

    def tell(self) -> None:
        """Tell systemd and the broker, if there is news."""
        if (line := self.line()) != self._told_line:
            self._told_line = line
            self.notifier.status(line)
        told = self._microphone, self._is_muted, self._sense().hop_ms
        if told != self._told:
            self._told = told
            self._on_change()

    def turn(self) -> None:
        """Feed the watchdog, unless a stage is stuck; to be called every few seconds."""
        late = set(self.heartbeat.stale())
        if new := late - self._stalled:
            self._report("stage_stalled", ", ".join(sorted(new)))
        self._stalled = late
        if not late:
            self.notifier.watchdog()
        self.tell()

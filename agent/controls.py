"""What an operator moves: the settings that hold, handed on to the stages that they are for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .commands import Settings
from .config import RecogniserConfig, VadConfig
from .switches import Positions

RESTART_STATUS = 75  # of an agent that was told to restart: systemd starts it anew


@dataclass(frozen=True)
class Levers:
    """What the stages let themselves be told, from any thread."""

    switch: Callable[[Positions], None]
    keep: Callable[[Positions], None]  # over a restart; raises OSError
    tune_gate: Callable[[VadConfig], None]
    tune_engine: Callable[[RecogniserConfig], None]
    show_muted: Callable[[bool], None]
    report: Callable[[str, str], None]  # name and detail of an event
    renew_engine: Callable[[], None]
    stop: Callable[[], None]


class Controls:
    """Moves levers when settings change, and only those whose settings do."""

    def __init__(self, settings: Settings, levers: Levers) -> None:
        self.settings = settings
        self.is_restart_asked = False
        self._levers = levers

    def apply(self, wanted: Settings) -> None:
        """Have other settings hold."""
        before, self.settings = self.settings, wanted
        if (wanted.muted, wanted.transcribing) != (before.muted, before.transcribing):
            self._switch(Positions(wanted.muted, wanted.transcribing))
        if wanted.muted != before.muted:
            self._levers.show_muted(wanted.muted)
            self._levers.report("muted" if wanted.muted else "unmuted", "no audio is heard" if wanted.muted else "")
        if wanted.transcribing != before.transcribing:
            self._levers.report("transcription_on" if wanted.transcribing else "transcription_off", "")
        if wanted.recogniser != before.recogniser:
            self._levers.tune_engine(wanted.recogniser)
        if wanted.vad != before.vad:
            self._levers.tune_gate(wanted.vad)

    def _switch(self, positions: Positions) -> None:
        self._levers.switch(positions)
        try:
            self._levers.keep(positions)
        except OSError as error:
            self._levers.report("switches_not_kept", f"{error}; they hold until the agent starts anew")

    def restart(self, what: str) -> None:
        """Start the engine anew, or end the agent so that whoever started it does it again."""
        if what == "engine":
            self._levers.renew_engine()
            return
        self.is_restart_asked = True
        self._levers.report("restarting", "a command asked for it")
        self._levers.stop()

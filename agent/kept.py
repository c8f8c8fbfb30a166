"""Switches that outlive the agent: a microphone that was muted stays so after a crash, a power cut or an update.

Each is an empty file that is there while the switch is not where it usually is, so there is nothing to misread.
"""

from __future__ import annotations

import os
from pathlib import Path

from .config import Config, outbox_dir
from .switches import Positions

MUTED, NOT_TRANSCRIBING = "muted", "not-transcribing"  # names of the files


class KeptSwitches:
    """Positions of the switches in `folder`; without one nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    @classmethod
    def of(cls, config: Config) -> KeptSwitches:
        """Those of an agent, beside its messages; nothing is kept where nobody could switch it back."""
        is_wanted = config.outbox.durable and config.mqtt.commands
        return cls(outbox_dir(config.outbox) if is_wanted else None)

    def read(self) -> Positions:
        """What was kept last."""
        if self._folder is None:
            return Positions()
        return Positions((self._folder / MUTED).exists(), not (self._folder / NOT_TRANSCRIBING).exists())

    def keep(self, positions: Positions) -> None:
        """Outlive everything from the return of this call on. Raises OSError."""
        if self._folder is None:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name, is_there in ((MUTED, positions.muted), (NOT_TRANSCRIBING, not positions.transcribing)):
            if is_there:
                (self._folder / name).touch(mode=0o600)
            else:
                (self._folder / name).unlink(missing_ok=True)
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""Everything that may help to find a fault from afar: no secret, no word that was said."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import msgspec

from .commands import Settings
from .config import Config
from .payloads import InfoPayload

MAX_LINES = 100
MAX_LINE = 300  # characters


class RecentLog(logging.Handler):
    """Keeps the newest lines of the log, but for those with a text that was said."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self._lines: deque[str] = deque(maxlen=MAX_LINES)
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line, without a traceback."""
        if getattr(record, "event", None) != "final":  # which is what was said
            plain = logging.makeLogRecord({**record.__dict__, "exc_info": None, "exc_text": None, "stack_info": None})
            self._lines.append(self.format(plain)[:MAX_LINE])

    def lines(self) -> list[str]:
        """Oldest first."""
        with self.lock or threading.RLock():
            return list(self._lines)


def dump(
    info: InfoPayload, config: Config, settings: Settings, state: dict[str, Any], log: RecentLog
) -> dict[str, Any]:
    """One JSON object. A configuration names files that hold secrets, and holds none."""
    return {
        "info": msgspec.to_builtins(info),
        "config": msgspec.to_builtins(config),
        "settings": settings.settable(),
        "state": state,
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "log": log.lines(),
    }

"""The log: one line an event, structured for the journal, and no word of what was said unless that is switched on."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from typing import Any, TextIO

from whisperlet.errors import ConfigError

from .config import LogConfig

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
LEVELS = tuple(logging.getLevelName(number) for number in PRIORITIES)
PLAIN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class OneLine(logging.Formatter):
    """A record as `text`, `logfmt` or `json`; with `<n>` in front, the journal's priority, where the journal reads it.

    What a caller gives as `extra` becomes fields of its own. A traceback is part of the line.
    """

    def __init__(self, form: str, *, has_priority: bool) -> None:
        super().__init__()
        self._form = form
        self._has_priority = has_priority

    def format(self, record: logging.LogRecord) -> str:
        """One line, without its end."""
        fields = _fields(record)
        if self._form == "json":
            line = json.dumps(fields, ensure_ascii=False, default=str)
        elif self._form == "logfmt":
            line = " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())
        else:
            line = " ".join(_flat(str(value)) for value in (record.levelname, f"{record.name}:", fields["msg"]))
            line += f" | {_flat(str(fields['traceback']))}" if "traceback" in fields else ""
        return f"<{PRIORITIES.get(record.levelno, 6)}>{line}" if self._has_priority else line


class Steady(logging.StreamHandler[TextIO]):
    """Writes to a stream, or to standard error by a descriptor of its own: `quiet.py` turns number 2 away at times."""

    def __init__(self, stream: TextIO | None) -> None:
        self._own = None if stream else _duplicate(sys.stderr)
        super().__init__(stream or self._own or sys.stderr)

    def close(self) -> None:
        """Write no more."""
        super().close()
        if self._own is not None:
            self._own.close()


def set_up(config: LogConfig, environment: Mapping[str, str] = os.environ, stream: TextIO | None = None) -> None:
    """Log to standard error as configured; $WHISPERLET_LOG overrides the level. Raises ConfigError."""
    level = environment.get("WHISPERLET_LOG", config.level)
    if level.upper() not in LEVELS:
        raise ConfigError(f"WHISPERLET_LOG: {level!r} is none of {', '.join(LEVELS).lower()}")
    handler = Steady(stream)
    is_journal = reads_journal(environment, handler.stream)
    form = ("logfmt" if is_journal else "text") if config.format == "auto" else config.format
    handler.setFormatter(OneLine(form, has_priority=is_journal))
    root = logging.getLogger()
    for former in [each for each in root.handlers if isinstance(each.formatter, OneLine)]:
        root.removeHandler(former)
        former.close()
    root.addHandler(handler)
    root.setLevel(level.upper())


def log_fault(fault: threading.ExceptHookArgs) -> None:
    """What `threading.excepthook` is for, on one line."""
    name = fault.thread.name if fault.thread else "?"
    error = (fault.exc_type, fault.exc_value or fault.exc_type(), fault.exc_traceback)
    logging.getLogger(__name__).critical("thread %s has ended by a fault of its own", name, exc_info=error)


def reads_journal(environment: Mapping[str, str], stream: TextIO) -> bool:
    """Whether the stream ends in systemd's journal, which says so by device and inode of the socket."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file behind it
        return False
    return environment.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


def _duplicate(stream: TextIO) -> TextIO | None:
    try:
        return os.fdopen(os.dup(stream.fileno()), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
    except (OSError, ValueError):  # no file behind it
        return None


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    extra = {name: value for name, value in vars(record).items() if name not in PLAIN}
    fields = {"level": record.levelname.lower(), "logger": record.name, **extra, "msg": record.getMessage()}
    if record.exc_info:
        fields["traceback"] = logging.Formatter().formatException(record.exc_info)
    return fields


def _quoted(value: object) -> str:
    text = str(value)
    return text if text and all(c.isalnum() or c in "._-:/+%" for c in text) else json.dumps(text, ensure_ascii=False)


def _flat(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\r", "\\r").replace("\n", "\\n")

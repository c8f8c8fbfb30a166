"""The log: one line an event, structured for the journal, and no word of what was said unless that is switched on."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping
from typing import Any, TextIO

from .config import LogConfig

PRIORITIES = {logging.DEBUG: 7, logging.INFO: 6, logging.WARNING: 4, logging.ERROR: 3, logging.CRITICAL: 2}
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


def set_up(config: LogConfig, environment: Mapping[str, str] = os.environ, stream: TextIO | None = None) -> None:
    """Log to standard error as configured; $WHISPERLET_LOG overrides the level."""
    stream = stream or sys.stderr
    is_journal = reads_journal(environment, stream)
    form = ("logfmt" if is_journal else "text") if config.format == "auto" else config.format
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine(form, has_priority=is_journal))
    root = logging.getLogger()
    for former in [each for each in root.handlers if isinstance(each.formatter, OneLine)]:
        root.removeHandler(former)
    root.addHandler(handler)
    root.setLevel(environment.get("WHISPERLET_LOG", config.level).upper())


def reads_journal(environment: Mapping[str, str], stream: TextIO) -> bool:
    """Whether the stream ends in systemd's journal, which says so by device and inode of the socket."""
    try:
        stat = os.fstat(stream.fileno())
    except (OSError, ValueError):  # no file behind it
        return False
    return environment.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"


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

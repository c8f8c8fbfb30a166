"""What a check of the device found, and what to change about it."""

from __future__ import annotations

import enum

import msgspec


class Level(enum.StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # it works, but not as well as it could, or nobody can tell
    FAIL = "fail"  # it does not work


class Finding(msgspec.Struct, frozen=True):
    """One line of the doctor's."""

    check: str
    level: Level
    found: str
    advice: str = ""  # what to change; "" if nothing


def ok(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(check, Level.OK, found)


def warn(check: str, found: str, advice: str) -> Finding:
    """It could be better."""
    return Finding(check, Level.WARN, found, advice)


def fail(check: str, found: str, advice: str) -> Finding:
    """It does not work."""
    return Finding(check, Level.FAIL, found, advice)

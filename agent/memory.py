"""Memory that was needed once."""

from __future__ import annotations

import contextlib
import ctypes


def give_back_memory() -> None:
    """Return to the system what was freed: with glibc it would stay ours, 30 MB after loading."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)

"""Samples and this machine's clock as UTC, for what leaves the device."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from whisperlet.audio import SAMPLE_RATE


class Clock(msgspec.Struct, frozen=True):
    """Where this machine's clocks meet UTC."""

    wall_s: float  # seconds since 1970, UTC ...
    monotonic_s: float  # ... when time.monotonic() said this
    sample0_wall_s: float  # seconds since 1970 when sample 0 was captured

    @classmethod
    def at(cls, wall_s: float, monotonic_s: float, sample: int, sample_monotonic_s: float) -> Clock:
        """Clock of a source whose sample number `sample` was captured at `sample_monotonic_s`."""
        captured_s = wall_s + (sample_monotonic_s - monotonic_s)
        return cls(wall_s, monotonic_s, captured_s - sample / SAMPLE_RATE)

    def utc_of_sample(self, index: int) -> str:
        """When sample `index` was captured."""
        return rfc3339(self.sample0_wall_s + index / SAMPLE_RATE)

    def utc_of_monotonic(self, monotonic_s: float) -> str:
        """When `time.monotonic()` said so."""
        return rfc3339(self.wall_s + (monotonic_s - self.monotonic_s))


def rfc3339(wall_s: float) -> str:
    """Seconds since 1970 as UTC with milliseconds, `2025-01-31T12:00:00.000Z`."""
    return datetime.fromtimestamp(wall_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

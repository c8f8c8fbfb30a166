"""Energy as the processor's own counters tell it (RAPL, by way of Linux's powercap tree). No counter, no figure."""

from __future__ import annotations

import logging
from pathlib import Path

from .payloads import Energy

POWERCAP = Path("/sys/class/powercap")

logger = logging.getLogger(__name__)


class RaplMeter:
    """Joules that the processor packages used between two readings."""

    def __init__(self, root: Path = POWERCAP) -> None:
        # On AMD too; a zone with another name is a part of a package, or, as psys, holds the packages once more.
        zones = sorted(root.glob("intel-rapl:*"))
        self._packages = [zone for zone in zones if _text(zone / "name").startswith("package")]
        self._ranges_uj = [_number(zone / "max_energy_range_uj") for zone in self._packages]
        self._last_uj = self._read()
        if self._last_uj is None:
            logger.info("energy is not reported: no counter below %s can be read", root)

    def read(self) -> Energy | None:
        """Energy since the last reading; None where it cannot be measured."""
        before, self._last_uj = self._last_uj, self._read()
        if before is None or self._last_uj is None:
            return None
        spent_uj = [_spent_uj(*counter) for counter in zip(before, self._last_uj, self._ranges_uj, strict=True)]
        known_uj = [uj for uj in spent_uj if uj is not None]
        return Energy(joules=round(sum(known_uj) / 1e6, 3), source="rapl") if known_uj == spent_uj else None

    def _read(self) -> list[int] | None:
        """Counter of each package, microjoules; None unless all can be read."""
        numbers = [_number(package / "energy_uj") for package in self._packages]
        known = [number for number in numbers if number is not None]
        return known if known and known == numbers else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except OSError:  # only root may read the counters on most systems
        return ""


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if text.isdecimal() else None


def _spent_uj(before: int, now: int, range_uj: int | None) -> int | None:
    """Microjoules between two readings of a counter that begins again after its range."""
    if now >= before:
        return now - before
    return None if range_uj is None else now - before + range_uj

"""Heat, and what is done without because of it: first short hops, then partials, then all but sure finals.

The governor is a table of levels and two timers, and knows no clock and no file. A level is taken after heat that
lasted, one at a time; it is given up after a longer time of being cooler than where it began, by a margin, and not
throttled. So a device at the edge changes its level seldom, and each change is an event.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from .config import PowerConfig, ThermalConfig
from .messages import Thrift
from .sysfs import Firmware, number, text, vcgencmd

PLAUSIBLE_C = range(-40, 151)  # of a sensor that works
UNDER_VOLTAGE, CAPPED_NOW = 1, 0b1110  # of `vcgencmd get_throttled`: frequency capped, throttled, soft limit
SLOWERS = re.compile(r"(thermal-)?(cpu|dev)freq|Processor")  # cooling devices that slow down; others are fans


class Reading(msgspec.Struct, frozen=True):
    """One look at the device; None: nothing tells."""

    temperature_c: float | None
    is_throttled: bool | None  # slowed down by firmware or kernel, now
    is_under_voltage: bool | None = None  # now


class Step(msgspec.Struct, frozen=True):
    """Another level, and why."""

    level: Thrift
    reason: str


class Governor:
    """Which level the heat calls for. Mutable; time comes with the readings."""

    def __init__(self, config: ThermalConfig) -> None:
        self._config = config
        self._bounds_c = {
            Thrift.LONGER_HOP: config.longer_hop_c,
            Thrift.NO_PARTIALS: config.no_partials_c,
            Thrift.FINALS_ONLY: config.finals_only_c,
        }
        self.level = Thrift.NORMAL
        self._hot_since_s: float | None = None
        self._cool_since_s: float | None = None

    def observe(self, heat: Reading, now_s: float) -> Step | None:
        """The next level, if it is time for one. Without any reading the level stays."""
        reason = self._too_hot(heat)
        if reason:
            self._cool_since_s = None
            return self._rise(reason, now_s)
        self._hot_since_s = None
        if not self._is_cool(heat):
            self._cool_since_s = None
            return None
        return self._fall(heat, now_s)

    def _too_hot(self, heat: Reading) -> str | None:
        """Why this level is not enough."""
        if self.level is Thrift.FINALS_ONLY:
            return None
        if heat.is_throttled:
            return "the processor is throttled"
        bound_c = self._bounds_c[Thrift(self.level + 1)]
        if heat.temperature_c is None or heat.temperature_c < bound_c:
            return None
        return f"{heat.temperature_c:.1f} °C, {bound_c:g} or more"

    def _is_cool(self, heat: Reading) -> bool:
        """Whether a lower level will do."""
        if self.level is Thrift.NORMAL or heat.is_throttled or heat == Reading(None, None, heat.is_under_voltage):
            return False
        bound_c = self._bounds_c[self.level] - self._config.hysteresis_c
        return heat.temperature_c is None or heat.temperature_c < bound_c

    def _rise(self, reason: str, now_s: float) -> Step | None:
        if self._hot_since_s is None:
            self._hot_since_s = now_s
        if now_s - self._hot_since_s < self._config.rise_s:
            return None
        self._hot_since_s = now_s
        self.level = Thrift(self.level + 1)
        return Step(self.level, reason)

    def _fall(self, heat: Reading, now_s: float) -> Step | None:
        if self._cool_since_s is None:
            self._cool_since_s = now_s
        if now_s - self._cool_since_s < self._config.dwell_s:
            return None
        self._cool_since_s = now_s
        self.level = Thrift(self.level - 1)
        degrees = "" if heat.temperature_c is None else f"{heat.temperature_c:.1f} °C, "
        return Step(self.level, f"{degrees}not throttled for {self._config.dwell_s:g} s")


class Thermometer:
    """Looks at zones, cooling devices and frequency limits below sysfs, and asks a Raspberry Pi's firmware."""

    def __init__(self, config: PowerConfig, firmware: Firmware = vcgencmd) -> None:
        self._root = Path(config.sysfs_dir)
        self._firmware = firmware
        self._has_firmware = bool(firmware("get_throttled"))
        self._limits_khz: dict[Path, int] = {}  # the highest seen; a lower one was chosen by whoever set up the device

    def read(self) -> Reading:
        """Look."""
        flags = self._flags()
        signs = [sign for sign in (self._is_cooled_down(), self._is_capped()) if sign is not None]
        if flags is not None:
            signs.append(bool(flags & CAPPED_NOW))
        is_under_voltage = None if flags is None else bool(flags & UNDER_VOLTAGE)
        return Reading(self._temperature_c(), any(signs) if signs else None, is_under_voltage)

    def _temperature_c(self) -> float | None:
        """Of the hottest zone."""
        zones = (number(zone / "temp") for zone in self._root.glob("class/thermal/thermal_zone*"))
        known_c = [zone / 1000 for zone in zones if zone is not None and zone // 1000 in PLAUSIBLE_C]
        return max(known_c, default=None)

    def _is_cooled_down(self) -> bool | None:
        """Whether the kernel holds the processor back."""
        devices = self._root.glob("class/thermal/cooling_device*")
        states = [number(device / "cur_state") for device in devices if SLOWERS.match(text(device / "type"))]
        known = [state for state in states if state is not None]
        return any(state > 0 for state in known) if known else None

    def _is_capped(self) -> bool | None:
        """Whether a core may run less quickly than it could before."""
        capped = []
        for policy in self._root.glob("devices/system/cpu/cpufreq/policy*"):
            limit_khz = number(policy / "scaling_max_freq")
            if limit_khz is not None:
                self._limits_khz[policy] = max(limit_khz, self._limits_khz.get(policy, 0))
                capped.append(limit_khz < self._limits_khz[policy])
        return any(capped) if capped else None

    def _flags(self) -> int | None:
        """Bits of `throttled=0x50005`."""
        found = re.search(r"throttled=0x([0-9a-fA-F]+)", self._firmware("get_throttled") if self._has_firmware else "")
        return int(found[1], 16) if found else None

"""Where energy can be measured: meters of the processor, of the board, of its battery; and one that estimates.

Each source tells the joules since it was last asked, or None where it cannot: a figure is measured or it is not there.
Only `Model` estimates; it is used where its watts are configured and nothing measures.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Protocol

from .config import PowerConfig
from .measurements import Meters, Quality
from .sysfs import Firmware, number, text, vcgencmd

log = logging.getLogger(__name__)
MAX_GAP_S = 30.0  # between two readings of watts; anything may have been in a longer one
WHOLE_BOARD = re.compile(r"(?i)(^|[^a-z])(v?dd_?in|vin|5v_?in|12v_?in|ext5v|sys(tem)?|total|board)([^a-z]|$)")
CHIPS = re.compile(r"ina\d\w*|power_meter")  # of hwmon: shunt monitors and ACPI's meter; others belong to a GPU, a disk
JOULES_PER_UWH = 3.6e-3


class PowerSource(Protocol):
    """Something that tells energy."""

    @property
    def name(self) -> Meters:
        """As published: "rapl", "hwmon", ..."""

    @property
    def quality(self) -> Quality:
        """What the figure stands for."""

    def spent(self, now_s: float) -> float | None:
        """Joules since the last call, which was before `now_s` (monotonic); None if that is not known."""


def power_source(config: PowerConfig, core_s: Callable[[], float], firmware: Firmware = vcgencmd) -> PowerSource | None:
    """The source that is configured, or the best that there is; None without one.

    `core_s` tells the processor seconds that the agent used since it was last called.
    """
    root = Path(config.sysfs_dir)
    makers: dict[str, Callable[[], PowerSource | None]] = {
        "hwmon": lambda: hwmon(root / "class/hwmon", config.hwmon_channel),
        "rpi_pmic": lambda: rpi_pmic(firmware),
        "rapl": lambda: Rapl.found(root / "class/powercap"),
        "battery": lambda: battery(root / "class/power_supply"),
        "model": lambda: Model(core_s, config.core_watts) if config.core_watts else None,
    }
    wanted = list(makers) if config.source == "auto" else [config.source]
    found = next((source for name in wanted if name in makers and (source := makers[name]())), None)
    if found:
        log.info("energy is %s by %s", found.quality.replace("_", " at the "), found.name)
    elif config.source != "none":
        log.info("energy is not reported: no source (%s) below %s can be read", config.source, root)
    return found


class Sampled:
    """Energy from a meter of watts: between two readings lies their mean."""

    def __init__(self, name: Meters, quality: Quality, watts: Callable[[], float | None]) -> None:
        self.name, self.quality = name, quality
        self._watts = watts
        self._last: tuple[float, float] | None = None  # when, and watts

    def spent(self, now_s: float) -> float | None:
        """None after a reading that failed, or that was long ago."""
        watts = self._watts()
        before, self._last = self._last, None if watts is None else (now_s, watts)
        if before is None or watts is None or now_s - before[0] > MAX_GAP_S:
            return None
        return (watts + before[1]) / 2 * (now_s - before[0])


class Counted:
    """Energy from counters that only grow, microjoules each, read all or not at all."""

    def __init__(
        self, name: Meters, quality: Quality, counters: Callable[[], list[int] | None], ranges: list[int | None]
    ) -> None:
        self.name, self.quality = name, quality
        self._counters, self._ranges = counters, ranges
        self._last = counters()

    def spent(self, now_s: float) -> float | None:  # noqa: ARG002 - a counter knows no time
        """None after a reading that failed."""
        before, self._last = self._last, self._counters()
        if before is None or self._last is None:
            return None
        spent_uj = [_spent_uj(*counter) for counter in zip(before, self._last, self._ranges, strict=True)]
        known_uj = [uj for uj in spent_uj if uj is not None]
        return sum(known_uj) / 1e6 if known_uj == spent_uj else None


def _spent_uj(before: int, now: int, range_uj: int | None) -> int | None:
    """Microjoules between two readings of a counter that begins again after its range."""
    if now >= before:
        return now - before
    return None if range_uj is None else now - before + range_uj


class Rapl(Counted):
    """The processor packages' own counters, by way of powercap; on AMD too. Only root may read them by default."""

    def __init__(self, packages: list[Path]) -> None:
        ranges = [number(package / "max_energy_range_uj") for package in packages]
        super().__init__("rapl", "measured_package", lambda: _all_numbers(packages, "energy_uj"), ranges)

    @classmethod
    def found(cls, root: Path) -> Rapl | None:
        """Below `class/powercap`; None unless all packages can be read."""
        # A zone with another name is a part of a package, or, as psys, holds the packages once more.
        packages = [zone for zone in sorted(root.glob("intel-rapl:*")) if text(zone / "name").startswith("package")]
        return cls(packages) if _all_numbers(packages, "energy_uj") else None


def _all_numbers(folders: list[Path], file: str) -> list[int] | None:
    numbers = [number(folder / file) for folder in folders]
    known = [each for each in numbers if each is not None]
    return known if known and known == numbers else None


def hwmon(root: Path, chosen: str | None) -> Sampled | None:
    """A shunt monitor (INA2xx, INA3221) or ACPI's meter below `class/hwmon`.

    Without a choice it is the channel whose label says that it is the board's input, or the only channel there is:
    rails hold each other, so a sum would count twice, and one of several would be a guess.
    """
    channels = dict(_channels(root, any_chip=chosen is not None))
    if chosen is not None:
        return Sampled("hwmon", _board_or_rail(chosen), channels[chosen]) if chosen in channels else None
    inputs = [name for name in channels if _board_or_rail(name) == "measured_board"]
    candidates = inputs or list(channels)
    if len(candidates) != 1:
        if candidates:
            log.warning("power.hwmon_channel: several could be meant, set one of %s", ", ".join(candidates))
        return None
    return Sampled("hwmon", _board_or_rail(candidates[0]), channels[candidates[0]])


def _board_or_rail(channel: str) -> Quality:
    chip, _, label = channel.partition("/")
    return "measured_board" if chip == "power_meter" or WHOLE_BOARD.search(label) else "measured_rail"


def _channels(root: Path, *, any_chip: bool) -> Iterator[tuple[str, Callable[[], float | None]]]:
    """Channels that can be read, as chip/label or chip/number, and how to read their watts."""
    for chip in sorted(root.glob("hwmon*")):
        name = text(chip / "name")
        if not any_chip and not CHIPS.fullmatch(name):
            continue
        for n in range(1, 9):
            label = text(chip / f"power{n}_label") or text(chip / f"in{n}_label") or str(n)
            watts = _watts_of(chip, n)
            if watts() is not None:
                yield f"{name}/{label}", watts


def _watts_of(chip: Path, n: int) -> Callable[[], float | None]:
    def watts() -> float | None:
        for file in (f"power{n}_input", f"power{n}_average"):
            if (microwatts := number(chip / file)) is not None:
                return max(0.0, microwatts / 1e6)
        millivolts, milliamperes = number(chip / f"in{n}_input"), number(chip / f"curr{n}_input")
        return None if millivolts is None or milliamperes is None else abs(millivolts * milliamperes) / 1e6

    return watts


def rpi_pmic(firmware: Firmware) -> Sampled | None:
    """The Raspberry Pi 5's regulators; what they lose themselves, and USB, is not in it."""

    def watts() -> float | None:
        return pmic_watts(firmware("pmic_read_adc"))

    return Sampled("rpi_pmic", "measured_rail", watts) if watts() is not None else None


def pmic_watts(answer: str) -> float | None:
    """Sum over the rails of `vcgencmd pmic_read_adc`, volts times amperes; None unless each current has its voltage."""
    amperes = {rail: float(value) for rail, value in re.findall(r"(\w+)_A current\(\d+\)=(\d+\.\d+)A", answer)}
    volts = {rail: float(value) for rail, value in re.findall(r"(\w+)_V volt\(\d+\)=(\d+\.\d+)V", answer)}
    if not amperes or not amperes.keys() <= volts.keys():
        return None
    return sum(volts[rail] * amperes[rail] for rail in amperes)


def battery(root: Path) -> PowerSource | None:
    """Batteries that feed the whole device; they tell what it uses while none of them is charged."""
    packs = [pack for pack in sorted(root.glob("*")) if text(pack / "type") == "Battery"]
    packs = [pack for pack in packs if text(pack / "scope") != "Device"]  # that one is in somebody's mouse
    if not packs:
        return None
    if all(_pack_watts(pack) is not None for pack in packs):
        return Sampled("battery", "measured_board", lambda: _discharge_watts(packs))
    return Counted("battery", "measured_board", lambda: _discharged_uj(packs), [None] * len(packs))


def _discharge_watts(packs: list[Path]) -> float | None:
    """Of all packs; None while one is charged or full, when the mains feed the device."""
    watts = [_pack_watts(pack) for pack in packs] if _is_discharging(packs) else []
    known = [each for each in watts if each is not None]
    return sum(known) if known and known == watts else None


def _is_discharging(packs: list[Path]) -> bool:
    """One of several packs may rest while another is emptied."""
    states = {text(pack / "status") for pack in packs}
    return "Discharging" in states and states <= {"Discharging", "Not charging"}


def _pack_watts(pack: Path) -> float | None:
    microwatts = number(pack / "power_now")
    if microwatts is not None:
        return abs(microwatts) / 1e6  # some drivers count what leaves as negative
    microamperes, microvolts = number(pack / "current_now"), number(pack / "voltage_now")
    return None if microamperes is None or microvolts is None else abs(microamperes) * microvolts / 1e12


def _discharged_uj(packs: list[Path]) -> list[int] | None:
    """What each pack has given so far, up to a constant."""
    left_uwh = _all_numbers(packs, "energy_now") if _is_discharging(packs) else None
    return None if left_uwh is None else [-round(uwh * JOULES_PER_UWH * 1e6) for uwh in left_uwh]


class Model:
    """An estimate: processor seconds of the agent, times what a busy core takes more than an idle one."""

    name: Meters = "model"
    quality: Quality = "estimated"

    def __init__(self, core_s: Callable[[], float], core_watts: float) -> None:
        self._core_s, self._core_watts = core_s, core_watts

    def spent(self, now_s: float) -> float | None:  # noqa: ARG002 - processor time is all that counts
        """Never None."""
        return self._core_s() * self._core_watts

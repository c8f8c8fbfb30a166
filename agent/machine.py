"""The doctor's look at the machine: processor, clock rate, heat, time, memory and disk. Reads files; changes nothing."""

from __future__ import annotations

import ctypes
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from .config import Config, default_cache_dir, outbox_dir
from .findings import Finding, fail, ok, warn
from .sysfs import Firmware, text, vcgencmd
from .thermal import Thermometer

PROC = Path("/proc")
FAST = {"avx_vnni", "avx512_vnni", "amx_int8", "i8mm", "asimddp"}  # multiply int8 by the dozen, x86 and Arm
GOOD = {"avx2"}
STEADY = {"schedutil", "ondemand", "performance", "interactive"}
FOLLOWS_LOAD = re.compile(r"intel_pstate|amd-pstate-epp")  # their "powersave" does
HOT_C = 75.0  # without load; the agent itself adds to it
LEAST_MEMORY_MB = 600  # the engine's longest segment and the ear
LOW_DISK_MB, LEAST_DISK_MB = 500, 100
TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised


class DiskUsage(Protocol):
    """What `shutil.disk_usage` tells."""

    @property
    def free(self) -> int:
        """Bytes."""


def examine(
    config: Config,
    *,
    proc: Path = PROC,
    firmware: Firmware = vcgencmd,
    clock_state: Callable[[], int | None] | None = None,
    usage: Callable[[Path], DiskUsage] = shutil.disk_usage,
) -> list[Finding]:
    """Everything about the machine. sysfs is where `power.sysfs_dir` says."""
    sysfs = Path(config.power.sysfs_dir)
    return [
        processor(config.recogniser.threads, proc),
        governor(sysfs),
        heat(config, firmware),
        memory(proc),
        time_sync((clock_state or kernel_clock)()),
        *disks(folders(config), usage),
    ]


def processor(threads: int, proc: Path) -> Finding:
    """Whether it has instructions for int8, and cores for the threads."""
    info = text(proc / "cpuinfo")
    flags = set(re.findall(r"\w+", " ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE))))
    n_cores = len(re.findall(r"^processor\s*:", info, re.MULTILINE))
    if not n_cores:
        return warn("processor", "unknown", f"{proc / 'cpuinfo'} cannot be read; see that the unit allows it")
    best = sorted(flags & FAST) or sorted(flags & GOOD)
    found = f"{n_cores} cores, {', '.join(best) or 'nothing for int8'}"
    if threads > n_cores:
        return warn("processor", found, f"recogniser.threads is {threads}: set {max(1, n_cores - 1)}")
    if not best:
        return warn(
            "processor", found, "expect a multiple of the time: set recogniser.hop_ms = 1000, or partials = false"
        )
    return ok("processor", found)


def governor(sysfs: Path) -> Finding:
    """Whether the clock goes up when somebody speaks."""
    policies = sorted(sysfs.glob("devices/system/cpu/cpufreq/policy*"))
    modes = {(text(policy / "scaling_governor"), text(policy / "scaling_driver")) for policy in policies}
    slow = sorted({mode for mode, driver in modes if mode not in STEADY and not _follows_load(mode, driver)})
    if not modes:
        return ok("governor", "the system does not set the clock rate")
    if slow:
        advice = "set schedutil: the board's tmpfiles.conf in firmware_config does so at each boot"
        return warn("governor", ", ".join(slow), advice)
    return ok("governor", ", ".join(sorted({mode for mode, _ in modes})))


def _follows_load(mode: str, driver: str) -> bool:
    return mode == "powersave" and FOLLOWS_LOAD.match(driver) is not None


def heat(config: Config, firmware: Firmware) -> Finding:
    """Whether the machine is slowed down by heat or by its power supply."""
    reading = Thermometer(config.power, firmware).read()
    degrees = "" if reading.temperature_c is None else f"{reading.temperature_c:.0f} °C"
    found = ", ".join(filter(None, [degrees, "throttled" if reading.is_throttled else ""]))
    if reading.is_under_voltage:
        return fail("heat", ", ".join(filter(None, [found, "under voltage"])), "use a stronger power supply and cable")
    if reading.is_throttled:
        return warn("heat", found, "cool the case, or set recogniser.hop_ms higher")
    if reading.temperature_c is not None and reading.temperature_c >= HOT_C:
        return warn("heat", found, "cool the case: it will be throttled under load")
    return ok("heat", found or "nothing tells the temperature")


def memory(proc: Path) -> Finding:
    """Whether there is room for the engine."""
    found = re.search(r"^MemAvailable:\s*(\d+) kB", text(proc / "meminfo"), re.MULTILINE)
    if found is None:
        return warn("memory", "unknown", f"{proc / 'meminfo'} cannot be read")
    available_mb = int(found[1]) * 1024 // 1_000_000
    if available_mb < LEAST_MEMORY_MB:
        advice = f"the agent takes up to {LEAST_MEMORY_MB} MB: end other programs, or set vad.max_segment_s lower"
        return warn("memory", f"{available_mb} MB available", advice)
    return ok("memory", f"{available_mb} MB available")


def time_sync(state: int | None) -> Finding:
    """Whether what is published has the right time."""
    if state is None:
        return warn("time", "unknown", "the kernel does not tell; see that NTP runs")
    if state == TIME_ERROR:
        return warn("time", "not synchronised", "start NTP: timedatectl set-ntp true, or chrony")
    return ok("time", "synchronised")


def kernel_clock() -> int | None:
    """State of the kernel's clock as adjtimex(2) returns it; None where there is no such call."""
    asked = ctypes.create_string_buffer(512)  # struct timex, all zero: nothing is changed
    try:
        state = int(ctypes.CDLL(None, use_errno=True).adjtimex(asked))
    except (OSError, AttributeError):
        return None
    return state if state >= 0 else None


def folders(config: Config) -> dict[str, Path]:
    """Where the agent writes, by what."""
    weights = config.recogniser.weight_cache_dir
    return {
        "outbox": outbox_dir(config.outbox),
        "weight cache": Path(weights) if weights else default_cache_dir(),
    }


def disks(places: dict[str, Path], usage: Callable[[Path], DiskUsage]) -> Iterable[Finding]:
    """Whether there is room where the agent writes."""
    for name, folder in places.items():
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        free_mb = usage(there).free // 1_000_000
        found = f"{free_mb} MB free for {folder}"
        if free_mb < LEAST_DISK_MB:
            yield fail(f"disk: {name}", found, "make room: what cannot be stored is lost when the broker is away")
        elif free_mb < LOW_DISK_MB:
            yield warn(f"disk: {name}", found, "make room, or lower the bound of the journal")
        else:
            yield ok(f"disk: {name}", found)

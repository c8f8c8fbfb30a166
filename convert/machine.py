"""What the machine is, and what processes took of it."""

from __future__ import annotations

import os
import platform
from pathlib import Path


def describe() -> str:
    """Processor and number of cores, for the record."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return (
        f"{os.cpu_count()} x {names[0] if names else platform.processor()} ({platform.machine()}), {platform.system()}"
    )


def peak_rss_mb(pid: int | str = "self") -> float:
    """Resident memory of a process at its highest; 0 where the system does not tell.

    psutil has no such figure, and getrusage's begins with what the process that started this one had.
    """
    path = Path(f"/proc/{pid}/status")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM:")), 0.0)

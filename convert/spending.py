"""What a process takes while it recognises: processor time, memory, and energy where the machine has a meter."""

from __future__ import annotations

import psutil

from agent.config import PowerConfig
from agent.energy import Meter
from agent.power import power_source

from .machine import peak_rss_mb
from .scored import NO_METER, NOT_THROUGHOUT, Usage


class Spending:
    """From now until `end`, which adds it to `usage`. Call `sample` now and then: some meters tell watts, not joules."""

    def __init__(self, usage: Usage, pid: int | None = None) -> None:
        self._usage, self._process = usage, psutil.Process(pid)
        self._is_own = pid is None  # then its peak of memory is not that of recognition alone
        self._meter = Meter(power_source(PowerConfig(), lambda: 0.0))
        self._began_core_s = _core_s(self._process)

    def sample(self) -> None:
        """Take a reading."""
        self._meter.sample()

    def end(self) -> None:
        """Add up."""
        self._add_energy()
        if self._process.is_running():
            self._usage.core_s += _core_s(self._process) - self._began_core_s
            if not self._is_own:
                self._usage.rss_mb = max(self._usage.rss_mb or 0.0, peak_rss_mb(self._process.pid))

    def _add_energy(self) -> None:
        energy = self._meter.read()
        joules = energy.joules if energy else None
        known = joules is not None and self._usage.joules is not None
        self._usage.joules = (self._usage.joules or 0.0) + (joules or 0.0) if known else None
        self._usage.meter = (
            NO_METER if energy is None else f"{energy.source} ({energy.quality.replace('_', ' at the ')})"
        )
        if energy and not known:
            self._usage.meter += f", which {NOT_THROUGHOUT}"


def _core_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

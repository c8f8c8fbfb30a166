"""Looks at power and heat at a steady pace, from a thread of its own, and tells the others what to do without."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from .config import Config
from .energy import Activity, Meter
from .measurements import Energy, Heat, Level
from .messages import Thrift
from .power import power_source
from .thermal import Governor, Reading, Thermometer

log = logging.getLogger(__name__)
STOP_S = 5.0  # for a look that is under way; a sensor that hangs must not keep the last words from being sent
LOOK_S = 30.0  # that sensors and firmware may take, each asked several times
LEVELS: dict[Thrift, tuple[Level, str]] = {
    Thrift.NORMAL: ("normal", "everything as configured"),
    Thrift.LONGER_HOP: ("longer_hop", "half of the partials"),
    Thrift.NO_PARTIALS: ("no_partials", "no partials"),
    Thrift.FINALS_ONLY: ("finals_only", "finals of sure speech only, none heard in advance"),
}


class Monitor:
    """Samples the meter and obeys the governor. `on_thrift` and `on_event` are called from its thread."""

    def __init__(
        self,
        meter: Meter,
        governor: Governor | None,
        look: Callable[[], Reading],
        sample_s: float,
        on_thrift: Callable[[Thrift], None],
        on_event: Callable[[str, str], None],
        beat: Callable[[float], None] = lambda _within_s: None,
    ) -> None:
        self._beat = beat
        self._meter, self._governor, self._look, self._sample_s = meter, governor, look, sample_s
        self._on_thrift, self._on_event = on_thrift, on_event
        self._seen = Reading(None, None)
        self.n_failed = 0  # looks
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="monitor", daemon=True)

    @property
    def thrift(self) -> Thrift:
        """What the device does without at present."""
        return self._governor.level if self._governor else Thrift.NORMAL

    def energy(self) -> Energy | None:
        """What was used since the last call; None without a source."""
        return self._meter.read()

    def heat(self) -> Heat:
        """What was seen last, and what follows from it."""
        return Heat(
            thrift=LEVELS[self.thrift][0],
            is_throttled=self._seen.is_throttled,
            is_under_voltage=self._seen.is_under_voltage,
        )

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join(STOP_S)

    def look(self) -> None:
        """Look once."""
        self._meter.sample()
        before, self._seen = self._seen, self._look()
        if self._seen.is_under_voltage and not before.is_under_voltage:
            self._on_event("under_voltage", "the power supply is too weak; the processor is slowed down for it")
        if self._governor and (step := self._governor.observe(self._seen, time.monotonic())):
            self._on_thrift(step.level)
            name, meaning = LEVELS[step.level]
            self._on_event("thermal_level", f"{name}: {meaning}; {step.reason}")

    def _run(self) -> None:
        self._beat(self._sample_s)
        while not self._stopping.wait(self._sample_s):
            self._beat(self._sample_s + LOOK_S)
            try:
                self.look()
            except Exception:
                self.n_failed += 1
                if self.n_failed == 1:
                    log.exception("power and heat could not be looked at")


def make_monitor(
    config: Config,
    activity: Callable[[], Activity],
    core_s: Callable[[], float],
    on_thrift: Callable[[Thrift], None],
    on_event: Callable[[str, str], None],
    beat: Callable[[float], None],
) -> Monitor:
    """Monitor of this device; `core_s` tells the agent's processor seconds since it was last called."""
    meter = Meter(power_source(config.power, core_s), activity)
    governor = Governor(config.thermal) if config.thermal.enabled else None
    look = Thermometer(config.power).read
    return Monitor(meter, governor, look, config.telemetry.sample_s, on_thrift, on_event, beat)

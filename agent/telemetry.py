"""The agent about itself: what it counted, how late it is, and what it takes from the machine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable

import msgspec
import numpy as np
import psutil

from whisperlet.audio import seconds

from .clock import rfc3339
from .measurements import Energy, Heat, Otel
from .messages import Kind
from .payloads import CounterValues, Percentiles, Queues, TelemetryPayload, TranscriptPayload

WINDOW = 1000  # latencies kept for an interval; the oldest goes first


class Counters(msgspec.Struct):
    """What happened since the agent started. Each field has one writer."""

    finals: int = 0
    partials: int = 0
    reheard_finals: int = 0  # heard more than once
    events: int = 0
    engine_restarts: int = 0
    skipped_partials: int = 0  # for lack of time
    rejected_segments: int = 0  # by the gate
    dropped_segments: int = 0  # from the backlog
    failed_segments: int = 0  # whose final is empty since no engine survived them
    failed_reports: int = 0  # of telemetry
    failed_looks: int = 0  # at power and heat
    dropped_samples: int = 0  # of audio
    source_overflows: int = 0  # of the capture driver
    source_faults: int = 0  # times the microphone was lost or silent


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """What outbox and publisher have to say for themselves."""

    depth: int  # messages in the outbox
    bytes: int  # in the outbox
    restored: dict[Kind, int]  # by the outbox, since the agent started
    stored: dict[Kind, int]
    sent: dict[Kind, int]
    dropped: dict[Kind, int]
    partials_dropped: int
    refused: int
    reconnects: int
    commands: dict[str, int] = {}  # by outcome


class Telemetry:
    """Collects from all stages what `snapshot` then reports for an interval."""

    def __init__(
        self,
        session: str,
        *,
        energy: Callable[[], Energy | None],
        heat: Callable[[], Heat],
        usage: Usage | None = None,
    ) -> None:
        self.counters = Counters()
        self._session = session
        self._energy, self._heat = energy, heat
        self._usage = usage or Usage()
        self._lock = threading.Lock()  # guards the rest
        self._finalise_ms: deque[float] = deque(maxlen=WINDOW)
        self._end_to_final_ms: deque[float] = deque(maxlen=WINDOW)
        self._busy_s = 0.0  # of the engine
        self._speech_s = 0.0
        self._cpu_s = 0.0  # since the start
        self._n_snapshots = 0
        self._since_s = time.monotonic()

    def add(self, transcript: TranscriptPayload) -> None:
        """Count a partial or a final and what it cost."""
        with self._lock:
            self._busy_s += (transcript.encode_ms + transcript.decode_ms) / 1e3
            if not transcript.is_final:
                self.counters.partials += 1
                return
            self.counters.finals += 1
            self.counters.reheard_finals += transcript.n_attempts > 1
            self._speech_s += seconds(transcript.end_samples - transcript.start_samples)
            if transcript.finalise_ms is not None:
                self._finalise_ms.append(transcript.finalise_ms)
            if transcript.end_to_final_ms is not None:
                self._end_to_final_ms.append(transcript.end_to_final_ms)

    def snapshot(
        self, delivery: Delivery, backlog_s: float, hop_ms: float | None, *, is_muted: bool = False
    ) -> TelemetryPayload:
        """Report the interval since the last snapshot, and begin another one. `hop_ms` None: finals only."""
        now_s = time.monotonic()
        with self._lock:
            self._n_snapshots += 1
            interval_s, self._since_s = now_s - self._since_s, now_s
            real_time_factor = self._busy_s / self._speech_s if self._speech_s else None
            finalise_ms, end_to_final_ms = percentiles(self._finalise_ms), percentiles(self._end_to_final_ms)
            self._busy_s = self._speech_s = 0.0
            self._finalise_ms.clear()
            self._end_to_final_ms.clear()
        cpu_s, resident_bytes = self._usage.read()
        self._cpu_s += cpu_s
        energy, degrees_c = self._energy(), temperature_c()
        return TelemetryPayload(
            session=self._session,
            sequence=self._n_snapshots,
            historical=False,
            time_utc=rfc3339(time.time()),
            interval_s=round(interval_s, 3),
            real_time_factor=real_time_factor,
            hop_ms=hop_ms,
            muted=is_muted,
            finalise_ms=finalise_ms,
            end_to_final_ms=end_to_final_ms,
            cpu_percent=round(100 * cpu_s / interval_s, 1) if interval_s > 0 else 0.0,
            resident_bytes=resident_bytes,
            temperature_c=degrees_c,
            queues=Queues(outbox_messages=delivery.depth, outbox_bytes=delivery.bytes, backlog_s=backlog_s),
            counters=_counter_values(self.counters, delivery),
            energy=energy,
            heat=self._heat(),
            otel=Otel(
                hw_energy=energy.total_joules if energy else None,
                hw_power=energy.watts if energy else None,
                hw_temperature=degrees_c,
                process_cpu_time=round(self._cpu_s, 2),
                process_memory_usage=resident_bytes,
            ),
        )


class Usage:
    """Processor time and memory of this process and of all below it."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._cpu_s = self._read_cpu_s(self._processes())  # by process, since it started

    def read(self) -> tuple[float, int]:
        """Processor seconds since the last call, and resident bytes now."""
        processes = self._processes()
        before, self._cpu_s = self._cpu_s, self._read_cpu_s(processes)
        cpu_s = sum(max(0.0, now_s - before.get(process, 0.0)) for process, now_s in self._cpu_s.items())
        return cpu_s, sum(_resident_bytes(process) for process in processes)

    def _processes(self) -> list[psutil.Process]:
        return [self._process, *self._process.children(recursive=True)]

    @staticmethod
    def _read_cpu_s(processes: Iterable[psutil.Process]) -> dict[psutil.Process, float]:
        return {process: _cpu_s(process) for process in processes}


def _cpu_s(process: psutil.Process) -> float:
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has just ended
        return 0.0
    return float(times.user + times.system)


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:  # it has just ended
        return 0


def temperature_c() -> float | None:
    """Reading of the hottest sensor in degrees Celsius; None where there is none."""
    read = getattr(psutil, "sensors_temperatures", dict)  # Linux and FreeBSD have it
    currents = [sensor.current for group in read().values() for sensor in group]
    return round(max(currents), 1) if currents else None


def percentiles(values: Iterable[float]) -> Percentiles:
    """Median and 95th percentile, rounded to 0.1."""
    window = list(values)
    if not window:
        return Percentiles(p50=None, p95=None)
    p50, p95 = np.percentile(window, [50, 95])
    return Percentiles(p50=round(float(p50), 1), p95=round(float(p95), 1))


def _counter_values(counters: Counters, delivery: Delivery) -> CounterValues:
    dropped = _by_name(delivery.dropped)
    dropped[Kind.PARTIAL.value] = dropped.get(Kind.PARTIAL.value, 0) + delivery.partials_dropped
    return CounterValues(
        **msgspec.structs.asdict(counters),
        restored_messages=_by_name(delivery.restored),
        stored_messages=_by_name(delivery.stored),
        sent_messages=_by_name(delivery.sent),
        dropped_messages=dropped,
        refused_messages=delivery.refused,
        reconnects=delivery.reconnects,
        commands=delivery.commands,
    )


def _by_name(counts: dict[Kind, int]) -> dict[str, int]:
    return {kind.value: n for kind, n in counts.items()}

import multiprocessing
import time
from types import SimpleNamespace

import msgspec
import psutil
import pytest

from agent.clock import Clock
from agent.measurements import Energy, Heat
from agent.messages import Kind, Transcript
from agent.payloads import Queues, final_payload, partial_payload
from agent.telemetry import WINDOW, Delivery, Telemetry, Usage, percentiles, temperature_c

DELIVERY = Delivery(
    depth=4,
    bytes=400,
    restored={Kind.EVENT: 6},
    stored={Kind.FINAL: 9},
    sent={Kind.FINAL: 8},
    dropped={Kind.FINAL: 1},
    partials_dropped=2,
    refused=3,
    reconnects=5,
)
HEARD = Transcript(1, 0, 1, "a", 0, 0, 32_000, is_final=False, language="en", encode_ms=100.0, decode_ms=50.0)
NO_HEAT = Heat(thrift="normal", is_throttled=None, is_under_voltage=None)
SPENT = Energy(
    source="rapl",
    quality="measured_package",
    joules=1.0,
    watts=0.5,
    idle_watts=None,
    joules_per_audio_s=None,
    joules_per_utterance=None,
    total_joules=7.0,
)
CLOCK = Clock(0.0, 0.0, 0.0)


def final(finalise_ms):
    heard = msgspec.structs.replace(HEARD, is_final=True, decided_monotonic_s=0.0)
    return final_payload(heard, CLOCK, "s", finalise_ms / 1e3)


@pytest.fixture
def telemetry():
    return Telemetry("s", energy=lambda: None, heat=lambda: NO_HEAT)


def test_snapshot_covers_an_interval(telemetry):
    telemetry.add(partial_payload(HEARD, CLOCK, "s"))
    telemetry.add(final(40.0))
    snapshot = telemetry.snapshot(DELIVERY, backlog_s=1.5, hop_ms=300.0)
    assert snapshot.real_time_factor == pytest.approx(0.3 / 2.0)  # both cost 150 ms, for 2 s of speech
    assert (snapshot.finalise_ms.p50, snapshot.end_to_final_ms.p50) == (40.0, None)
    assert snapshot.queues == Queues(outbox_messages=4, outbox_bytes=400, backlog_s=1.5)
    assert (snapshot.hop_ms, snapshot.sequence) == (300.0, 1)
    after = telemetry.snapshot(DELIVERY, backlog_s=0.0, hop_ms=None)
    assert (after.real_time_factor, after.finalise_ms.p50, after.finalise_ms.p95) == (None, None, None)
    assert after.interval_s < 5
    assert after.sequence == 2
    assert after.hop_ms is None
    assert (after.counters.finals, after.counters.partials) == (1, 1)  # these go on


def test_finals_that_were_heard_more_than_once_are_counted(telemetry):
    for n_attempts in (1, 2, 3):
        heard = msgspec.structs.replace(HEARD, is_final=True, n_attempts=n_attempts)
        telemetry.add(final_payload(heard, CLOCK, "s", 0.0))
    counters = telemetry.snapshot(DELIVERY, 0.0, None).counters
    assert (counters.finals, counters.reheard_finals) == (3, 2)


def test_counters_come_from_everywhere(telemetry):
    telemetry.counters.engine_restarts += 1
    telemetry.counters.dropped_samples += 320
    telemetry.counters.skipped_partials += 7
    counters = telemetry.snapshot(DELIVERY, 0.0, None).counters
    assert (counters.engine_restarts, counters.dropped_samples, counters.skipped_partials) == (1, 320, 7)
    assert (counters.restored_messages, counters.stored_messages) == ({"event": 6}, {"final": 9})
    assert counters.sent_messages == {"final": 8}
    assert counters.dropped_messages == {"final": 1, "partial": 2}
    assert (counters.refused_messages, counters.reconnects) == (3, 5)


def test_energy_and_heat_are_what_the_meters_say():
    hot = Heat(thrift="longer_hop", is_throttled=True, is_under_voltage=None)
    snapshot = Telemetry("s", energy=lambda: SPENT, heat=lambda: hot).snapshot(DELIVERY, 0.0, None)
    assert (snapshot.energy, snapshot.heat) == (SPENT, hot)


def test_measurements_go_by_the_names_of_opentelemetry_too(monkeypatch):
    monkeypatch.setattr("agent.telemetry.temperature_c", lambda: 51.5)
    uses = iter([(1.25, 1000), (0.5, 2000)])
    usage = SimpleNamespace(read=lambda: next(uses))
    telemetry = Telemetry("s", energy=lambda: SPENT, heat=lambda: NO_HEAT, usage=usage)
    telemetry.snapshot(DELIVERY, 0.0, None)
    assert msgspec.to_builtins(telemetry.snapshot(DELIVERY, 0.0, None).otel) == {
        "hw.energy": 7.0,
        "hw.power": 0.5,
        "hw.temperature": 51.5,
        "process.cpu.time": 1.75,
        "process.memory.usage": 2000,
    }


def test_latency_windows_are_bounded(telemetry):
    for n in range(WINDOW + 100):
        telemetry.add(final(float(n)))
    assert len(telemetry._finalise_ms) == WINDOW
    assert telemetry._finalise_ms[0] == 100.0


def test_percentiles():
    found = percentiles(range(101))
    assert (found.p50, found.p95) == (50.0, 95.0)


def test_usage_counts_this_process():
    usage = Usage()
    began = time.process_time()
    while time.process_time() - began < 0.1:
        pass
    cpu_s, resident_bytes = usage.read()
    assert 0.08 <= cpu_s < 5
    assert resident_bytes >= psutil.Process().memory_info().rss / 2


def _burn(seconds, may_end):
    began = time.process_time()
    while time.process_time() - began < seconds:
        pass
    may_end.wait()


def test_usage_counts_children_and_survives_their_end():
    usage = Usage()
    context = multiprocessing.get_context("spawn")
    may_end = context.Event()
    child = context.Process(target=_burn, args=(0.2, may_end), daemon=True)
    child.start()
    burnt = 0.0
    until = time.monotonic() + 20
    while burnt < 0.2 and time.monotonic() < until:
        time.sleep(0.05)
        burnt += usage.read()[0]
    assert burnt >= 0.2
    may_end.set()
    child.join()
    assert usage.read()[0] >= 0.0


def test_a_process_that_has_just_ended_costs_nothing(monkeypatch):
    usage = Usage()

    def gone(_process):
        raise psutil.NoSuchProcess(1)

    monkeypatch.setattr(psutil.Process, "cpu_times", gone)
    monkeypatch.setattr(psutil.Process, "memory_info", gone)
    assert usage.read() == (0.0, 0)


def test_temperature_is_the_hottest_sensor(monkeypatch):
    sensors = {"cpu_thermal": [SimpleNamespace(current=51.54), SimpleNamespace(current=40.0)], "none": []}
    monkeypatch.setattr(psutil, "sensors_temperatures", lambda: sensors, raising=False)
    assert temperature_c() == 51.5
    monkeypatch.setattr(psutil, "sensors_temperatures", dict)
    assert temperature_c() is None
    monkeypatch.delattr(psutil, "sensors_temperatures")
    assert temperature_c() is None

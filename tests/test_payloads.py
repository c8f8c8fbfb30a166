import json
from pathlib import Path

import jsonschema
import msgspec
import pytest

from agent import inventory, payloads, schemas
from agent.clock import Clock, rfc3339
from agent.config import Config
from agent.inventory import versions
from agent.measurements import Energy, Heat, Otel
from agent.messages import Kind, Transcript

SCHEMAS = Path(__file__).parents[1] / "docs" / "schema"
NOON = 1_738_324_800.0  # 2025-01-31 12:00:00 UTC
CLOCK = Clock(wall_s=NOON, monotonic_s=100.0, sample0_wall_s=NOON + 1)
HEARD = Transcript(
    utterance=3,
    segment=0,
    revision=2,
    text="grüß dich",
    stable_chars=4,
    start=16_000,
    end=24_000,
    is_final=False,
    language="de",
    encode_ms=7.5,
    decode_ms=4.25,
    speech_end_monotonic_s=102.4,
    decided_monotonic_s=102.9,
)
MEASURED = Energy(
    source="rapl",
    quality="measured_package",
    joules=60.0,
    watts=2.0,
    idle_watts=1.5,
    joules_per_audio_s=-0.1,
    joules_per_utterance=3.0,
    total_joules=600.0,
)
FINAL = msgspec.structs.replace(HEARD, is_final=True, revision=3)


def telemetry(**changes):
    example = payloads.TelemetryPayload(
        session="s1",
        sequence=1,
        historical=False,
        time_utc=rfc3339(NOON),
        interval_s=30.0,
        real_time_factor=None,
        hop_ms=None,
        muted=False,
        finalise_ms=payloads.Percentiles(p50=None, p95=None),
        end_to_final_ms=payloads.Percentiles(p50=700.0, p95=900.5),
        cpu_percent=12.5,
        resident_bytes=1,
        temperature_c=None,
        queues=payloads.Queues(outbox_messages=0, outbox_bytes=0, backlog_s=0.0),
        counters=payloads.CounterValues(
            finals=1,
            partials=2,
            reheard_finals=1,
            events=0,
            restored_messages={},
            stored_messages={"final": 1},
            sent_messages={"final": 1},
            dropped_messages={"partial": 2},
            refused_messages=0,
            engine_restarts=0,
            skipped_partials=3,
            rejected_segments=0,
            dropped_segments=0,
            failed_segments=0,
            failed_reports=0,
            failed_looks=0,
            reconnects=0,
            commands={"ok": 1, "refused": 2},
            dropped_samples=0,
            source_overflows=0,
            source_faults=0,
        ),
        energy=None,
        heat=Heat(thrift="normal", is_throttled=None, is_under_voltage=None),
        otel=Otel(hw_energy=None, hw_power=None, hw_temperature=None, process_cpu_time=0.5, process_memory_usage=1),
    )
    return msgspec.structs.replace(example, **changes)


def info(bundle):
    return payloads.InfoPayload(
        session="s1",
        started_utc=rfc3339(NOON),
        versions=versions("ai-edge-litert"),
        bundle=bundle,
        hardware=inventory.hardware(),
        system=inventory.system(),
        config_sha256=inventory.config_sha256(Config()),
        capabilities=["partials"],
        sample_rate_hz=16_000,
    )


EXAMPLES = [
    payloads.status_payload(
        "s1", "connected", payloads.Condition(microphone="lost", muted=False, hop_ms=None, outbox_messages=3)
    ),
    payloads.status_payload("s1", "stopped"),
    payloads.status_payload("s1", "connection_lost"),
    info(None),
    info(payloads.BundleInfo(name="base", sha256="0" * 64, languages=["en", "de"])),
    payloads.partial_payload(HEARD, CLOCK, "s1"),
    payloads.final_payload(FINAL, CLOCK, "s1", 103.0),
    payloads.final_payload(msgspec.structs.replace(FINAL, text="", rejected="no_speech"), CLOCK, "s1", 103.0),
    payloads.event_payload("s1", 1, "engine_restarted", "killed by signal 9"),
    telemetry(),
    telemetry(real_time_factor=0.1, hop_ms=600.0, temperature_c=51.5, energy=MEASURED),
    telemetry(
        energy=msgspec.structs.replace(MEASURED, joules=None, watts=None),
        heat=Heat(thrift="finals_only", is_throttled=True, is_under_voltage=False),
        otel=Otel(hw_energy=9.0, hw_power=2.0, hw_temperature=51.5, process_cpu_time=0.5, process_memory_usage=1),
    ),
]


@pytest.mark.parametrize("payload", EXAMPLES, ids=lambda payload: type(payload).__name__)
def test_every_example_is_what_its_published_schema_says(payload):
    envelope = payloads.to_envelope(payload)
    schema = json.loads((SCHEMAS / (envelope.topic.replace("/", "-") + ".json")).read_text())
    body = json.loads(envelope.payload)
    jsonschema.validate(body, schema)
    for name in body:
        with pytest.raises(jsonschema.ValidationError, match="is a required property"):
            jsonschema.validate({key: value for key, value in body.items() if key != name}, schema)


def test_the_published_schemas_are_current(tmp_path):
    schemas.main(str(tmp_path))
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in SCHEMAS.iterdir()}, (
        "run: python -m agent.schemas docs/schema"
    )


def test_every_topic_has_an_example():
    assert {payloads.to_envelope(payload).topic for payload in EXAMPLES} == set(payloads.TOPICS)


def test_samples_become_utc():
    payload = payloads.partial_payload(HEARD, CLOCK, "s1")
    assert (payload.start_samples, payload.end_samples) == (16_000, 24_000)
    assert (payload.start_utc, payload.end_utc) == ("2025-01-31T12:00:02.000Z", "2025-01-31T12:00:02.500Z")
    assert CLOCK.utc_of_monotonic(101.25) == "2025-01-31T12:00:01.250Z"


def test_clock_of_a_source():
    clock = Clock.at(wall_s=NOON, monotonic_s=100.0, sample=320, sample_monotonic_s=99.5)
    assert clock.utc_of_sample(320) == "2025-01-31T11:59:59.500Z"
    assert clock.utc_of_sample(16_320) == "2025-01-31T12:00:00.500Z"


def test_only_a_final_has_latencies():
    partial = payloads.partial_payload(HEARD, CLOCK, "s1")
    assert (partial.finalise_ms, partial.end_to_final_ms) == (None, None)
    final = payloads.final_payload(FINAL, CLOCK, "s1", now_monotonic_s=103.0)
    assert (final.finalise_ms, final.end_to_final_ms) == (100.0, 600.0)
    unknown = msgspec.structs.replace(FINAL, decided_monotonic_s=None)
    assert payloads.final_payload(unknown, CLOCK, "s1", 103.0).finalise_ms is None


@pytest.mark.parametrize(
    ("payload", "topic", "kind", "qos", "retain"),
    [
        (EXAMPLES[0], "status", Kind.EVENT, 1, True),
        (EXAMPLES[3], "info", Kind.EVENT, 1, True),
        (EXAMPLES[5], "transcript/partial", Kind.PARTIAL, 0, False),
        (EXAMPLES[6], "transcript/final", Kind.FINAL, 1, False),
        (EXAMPLES[8], "event", Kind.EVENT, 1, False),
        (EXAMPLES[9], "telemetry", Kind.TELEMETRY, 1, False),
    ],
)
def test_delivery(payload, topic, kind, qos, retain):
    envelope = payloads.to_envelope(payload)
    assert (envelope.topic, envelope.kind, envelope.qos, envelope.retain) == (topic, kind, qos, retain)


def test_text_is_not_escaped():
    assert "grüß dich".encode() in payloads.to_envelope(EXAMPLES[5]).payload


def test_versions_say_when_there_is_no_runtime():
    assert versions("no-such-distribution").runtime is None
    assert versions("msgspec").runtime.startswith("msgspec 0.")


def test_sessions_differ():
    assert payloads.new_session() != payloads.new_session()

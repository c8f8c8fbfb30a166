"""Commands over a real Mosquitto, to the publisher's own code and to a whole agent with a stub of an engine."""
# ruff: noqa: F811 - fixtures of another module

import contextlib
import json
import logging
import statistics
import time

import pytest
from asking import Operator
from brokers import Subscriber, needs_mosquitto, wait_for
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode
from test_commands import Device
from test_mqtt import final, running
from test_pipeline import DEVICE, STOP_S, make, started  # noqa: F401 - fixtures

from agent.config import TelemetryConfig
from agent.link import Link
from agent.messages import Kind

pytestmark = needs_mosquitto
VERSIONS = ["5", "3.1.1"]
SECOND = TelemetryConfig(interval_s=1.0)  # the shortest that may be set


@pytest.fixture
def device():
    return Device()


def agent_of(broker, device, **config):
    return running(broker.port, remote=device.dispatcher, **config)


@pytest.mark.parametrize("version", VERSIONS)
def test_commands_are_answered_soon(broker, device, version, record_property):
    with agent_of(broker, device, version=version) as agent, Operator(broker.port, version) as operator:
        wait_for(lambda: agent.is_connected and not agent._in_flight)
        for n in range(100):
            answer = operator.ask("dev", "mute" if n % 2 else "unmute", {"id": str(n)})
            assert (answer["outcome"], answer["id"]) == ("ok", str(n))
        assert operator.ask("dev", "dance")["outcome"] == "unknown"
    latencies_ms = sorted(1e3 * latency for latency in operator.latencies_s)
    record_property("p50_ms", statistics.median(latencies_ms))
    record_property("max_ms", latencies_ms[-1])
    print(f"MQTT {version}: p50 {statistics.median(latencies_ms):.1f} ms, max {latencies_ms[-1]:.1f} ms")  # pytest -s
    assert statistics.median(latencies_ms) < 200
    assert len(device.applied) == 99  # the first `unmute` was no news


def test_a_flood_is_answered_within_bounds_and_finals_go_on(broker, device):
    with agent_of(broker, device) as agent, Operator(broker.port) as operator:
        wait_for(lambda: agent.is_connected)
        for n in range(500):
            operator._client.publish("whisperlet/dev/cmd/dance", qos=1)
            if n == 250:
                agent.put(final(1))
        wait_for(lambda: device.dispatcher.counts["unknown"] == 500, 20)
        wait_for(lambda: agent.outbox.sent() == {Kind.FINAL: 1})
        n_lost = agent.counts().notices_dropped
        wait_for(lambda: len(operator.answers) + n_lost >= 500, 20)
        assert agent.counts().connects == 1


@pytest.mark.parametrize("version", VERSIONS)
def test_a_retained_command_is_not_done(broker, device, version):
    with Operator(broker.port, version) as operator:
        operator.tell("whisperlet/dev/cmd/restart", {}, retain=True)
        with agent_of(broker, device, version=version):
            wait_for(lambda: device.dispatcher.counts["retained"])
            assert operator.ask("dev", "mute")["outcome"] == "ok"
        assert device.restarts == []


def test_a_large_payload_is_not_even_taken(broker, device):
    with agent_of(broker, device) as agent, Operator(broker.port) as operator:
        wait_for(lambda: agent.is_connected)
        operator.tell("whisperlet/dev/cmd/set", b" " * 1_000_000)
        assert operator.ask("dev", "set", b" " * 30_000)["outcome"] == "invalid"
        assert operator.ask("dev", "mute")["outcome"] == "ok"
        assert device.dispatcher.counts == {"invalid": 1, "ok": 1}


def test_a_command_that_has_expired_at_the_broker_does_not_come(broker, device):
    with Operator(broker.port) as operator:
        with agent_of(broker, device, will_delay_s=60) as agent:  # and its session outlives it by as much
            wait_for(lambda: agent.is_connected and operator.ask("dev", "mute"))
        operator.tell("whisperlet/dev/cmd/restart", MessageExpiryInterval=1)
        operator.tell("whisperlet/dev/cmd/unmute", MessageExpiryInterval=60)
        time.sleep(2.1)  # the broker counts in seconds
        with agent_of(broker, device, will_delay_s=60):
            wait_for(lambda: len(device.applied) == 2)
        assert device.restarts == []


@pytest.mark.parametrize("version", VERSIONS)
def test_desired_settings_hold_and_are_reported(broker, device, version):
    with Operator(broker.port) as operator, Subscriber(broker.port) as heard:
        operator.tell("whisperlet/dev/desired", {"muted": True, "vad": {"start_ms": 1}}, retain=True)
        with agent_of(broker, device, version=version):
            reported = wait_for(lambda: [body for body in heard.on("reported") if body["muted"]])[0]
            assert list(reported["refused"]) == ["vad.start_ms"]
            operator.tell("whisperlet/dev/desired", {}, retain=True)
            wait_for(lambda: not heard.on("reported")[-1]["muted"])
        with Subscriber(broker.port) as late:
            wait_for(lambda: late.on("reported"))
            assert late.on("reported")[0]["muted"] is False


def test_an_agent_may_be_told_not_to_listen(broker, device):
    with agent_of(broker, device, commands=False) as agent, Operator(broker.port) as operator:
        wait_for(lambda: agent.is_connected and not agent._in_flight)
        operator.tell("whisperlet/dev/cmd/mute")
        agent.put(final(1))
        wait_for(lambda: agent.outbox.depth == 0)
    assert device.applied == []


def test_a_subscription_that_is_refused_is_said(caplog):
    codes = [ReasonCode(PacketTypes.SUBACK, identifier=0x87), ReasonCode(PacketTypes.SUBACK, identifier=1)]
    Link._on_subscribe(None, None, None, 1, codes, None)
    assert [record.message for record in caplog.records] == [
        "the MQTT broker lets nobody tell us anything on cmd/+: Not authorized"
    ]


@pytest.fixture
def told(make, broker):
    """A whole agent that hears somebody talk, the operator, and all that is published."""
    pipeline = make(telemetry=SECOND)
    with Subscriber(broker.port) as heard, Operator(broker.port) as operator:
        thread, raised = started(pipeline)
        wait_for(lambda: heard.on("transcript/partial"), 30)
        yield pipeline, operator, heard
        pipeline.stop()
        thread.join(STOP_S)
        assert raised == []


def test_mute_ends_what_is_said_and_shows(told):
    pipeline, operator, heard = told
    answer = operator.ask(DEVICE, "mute")
    assert (answer["outcome"], answer["data"]) == ("ok", {"muted": True}), answer
    wait_for(lambda: heard.on("transcript/final"))  # of what was being said
    wait_for(lambda: heard.on("status")[-1]["condition"]["muted"])
    wait_for(lambda: any(report["muted"] for report in heard.on("telemetry")))
    wait_for(lambda: pipeline.supervisor.backlog == 0)
    n_samples = pipeline._anchor[0]
    n_texts = len(heard.on("transcript/partial")), len(heard.on("transcript/final"))
    wait_for(lambda: pipeline._anchor[0] > n_samples + 16_000)  # a second that was dropped
    assert (len(heard.on("transcript/partial")), len(heard.on("transcript/final"))) == n_texts
    operator.ask(DEVICE, "unmute")
    wait_for(lambda: len(heard.on("transcript/partial")) > n_texts[0])
    assert [event["name"] for event in heard.on("event")][-2:] == ["muted", "unmuted"]


def test_settings_reach_the_stages(told):
    pipeline, operator, heard = told
    wanted = {"recogniser": {"hop_ms": 700}, "vad": {"hang_over_ms": 300}, "telemetry": {"interval_s": 1}}
    answer = operator.ask(DEVICE, "set", wanted)
    assert answer["data"] == {"recogniser.hop_ms": 700, "vad.hang_over_ms": 300, "telemetry.interval_s": 1.0}
    wait_for(lambda: any(report["hop_ms"] == 700 for report in heard.on("telemetry")))
    operator.ask(DEVICE, "transcribe", {"on": False})  # which closes the gate
    wait_for(lambda: pipeline.gate._gate._config.hang_over_ms == 300)
    reports = len(heard.on("telemetry"))
    wait_for(lambda: len(heard.on("telemetry")) >= reports + 2)
    assert heard.on("telemetry")[-1]["interval_s"] > 0.9
    assert heard.on("telemetry")[-1]["counters"]["commands"]["ok"] >= 1


def test_the_engine_is_started_anew(told):
    pipeline, operator, heard = told
    pid = pipeline.supervisor.pid
    assert operator.ask(DEVICE, "restart", {"what": "engine"})["outcome"] == "ok"
    wait_for(lambda: pipeline.supervisor.pid not in {pid, None}, 20)
    n_partials = len(heard.on("transcript/partial"))
    wait_for(lambda: len(heard.on("transcript/partial")) > n_partials, 20)
    assert "engine_restarted" in [event["name"] for event in heard.on("event")]


def test_the_agent_ends_to_be_started_anew(told):
    pipeline, operator, heard = told
    assert operator.ask(DEVICE, "restart")["outcome"] == "ok"
    wait_for(lambda: heard.on("status")[-1]["reason"] == "stopped", 20)
    assert pipeline.controls.is_restart_asked


def test_diagnostics_tell_much_but_neither_words_nor_secrets(told, caplog):
    pipeline, operator, heard = told
    caplog.set_level(logging.INFO)
    logging.getLogger("agent.test").info("a sentence")
    logging.getLogger("agent.test").info("what was said", extra={"event": "final"})
    found = operator.ask(DEVICE, "diagnostics")["data"]
    assert found["info"]["session"] == pipeline.session
    assert found["config"]["mqtt"]["device"] == DEVICE
    assert found["state"]["counters"]["partials"] > 0
    assert any("a sentence" in line for line in found["log"])
    texts = {body["text"] for body in heard.on("transcript/partial")}
    assert not any(text in json.dumps(found["log"]) for text in [*texts, "what was said"])


def test_who_was_muted_stays_so_when_it_starts_anew(make, broker):
    with Subscriber(broker.port) as heard, Operator(broker.port) as operator:
        first = make(telemetry=SECOND)
        with at_work(first):
            wait_for(lambda: heard.on("transcript/partial"), 30)
            assert operator.ask(DEVICE, "mute")["outcome"] == "ok"
        second = make(telemetry=SECOND)
        with at_work(second):
            wait_for(lambda: second._anchor[0] > 3 * 16_000, 30)  # of the same talk
            status = [body for body in heard.on("status") if body["session"] == second.session]
            assert all(body["condition"]["muted"] for body in status)
            assert not any(body["session"] == second.session for body in heard.on("transcript/partial"))
            assert operator.ask(DEVICE, "unmute")["outcome"] == "ok"
            wait_for(lambda: any(body["session"] == second.session for body in heard.on("transcript/partial")), 30)
        third = make(telemetry=SECOND)
        with at_work(third):
            wait_for(lambda: any(body["session"] == third.session for body in heard.on("transcript/partial")), 30)


@contextlib.contextmanager
def at_work(pipeline):
    thread, raised = started(pipeline)
    try:
        yield
    finally:
        pipeline.stop()
        thread.join(STOP_S)
    assert raised == []

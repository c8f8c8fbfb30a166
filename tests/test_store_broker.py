"""The durable outbox and the publisher with a real Mosquitto: killed, restarted, flapping, forgetful, refusing."""

from contextlib import contextmanager

import pytest
from brokers import Broker, Subscriber, needs_mosquitto, wait_for
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from soak.outbox import BROKER, Recorder
from soak.publisher import heard, info

from agent.clock import Clock
from agent.config import MqttConfig
from agent.messages import Kind
from agent.mqtt import Publisher
from agent.payloads import event_payload, final_payload, to_envelope

pytestmark = needs_mosquitto
PATIENT_S = 30.0


@pytest.fixture
def broker(tmp_path):
    broker = Broker(tmp_path)
    yield broker
    broker.kill()


@contextmanager
def agent(boxes, broker, *, version="5", stop_s=0.5):
    """A publisher on an outbox in the test's folder."""
    outbox = boxes.started()
    config = MqttConfig(
        url=f"mqtt://127.0.0.1:{broker.port}",
        device="soak",
        version=version,
        reconnect_min_s=0.1,
        reconnect_max_s=0.3,
        will_delay_s=0,
    )
    publisher = Publisher(config, outbox, info("s1"), lambda *_: None)
    publisher.outbox = outbox
    publisher.start()
    try:
        yield publisher
    finally:
        publisher.stop(stop_s)
        outbox.close()


def say(publisher, numbers):
    for n in numbers:
        publisher.put(to_envelope(final_payload(heard(n), Clock(0.0, 0.0, 0.0), "s1", 0.0)))


def is_empty(publisher):
    return lambda: publisher.outbox.depth == 0


@contextmanager
def recording(broker):
    recorder = Recorder(broker.port)
    try:
        yield recorder
    finally:
        recorder.close()


def test_a_broker_that_is_killed_gets_the_rest_later(broker, boxes):
    broker.start()
    with agent(boxes, broker) as publisher:
        say(publisher, range(1, 40))
        wait_for(publisher.outbox.sent)
        broker.kill()
        say(publisher, range(40, 60))
        wait_for(lambda: not publisher.is_connected)
        broker.start()
        wait_for(is_empty(publisher), PATIENT_S)
        assert publisher.outbox.sent() == publisher.outbox.stored() == {Kind.FINAL: 59}
    assert boxes.started().depth == 0


def test_a_flapping_broker_loses_and_swaps_nothing(broker, boxes):
    broker.start(BROKER, persistent=True)
    with recording(broker) as recorder, agent(boxes, broker) as publisher:
        for flap in range(5):
            say(publisher, range(20 * flap + 1, 20 * flap + 21))
            wait_for(lambda least=15 * flap: publisher.outbox.sent().get(Kind.FINAL, 0) >= least, PATIENT_S)
            broker.stop()
            broker.start(BROKER, persistent=True)
        wait_for(lambda: len(recorder.n_arrived) == 100, PATIENT_S)
        wait_for(is_empty(publisher), PATIENT_S)
    assert (recorder.n_out_of_order, recorder.n_different) == (0, 0)


def test_a_broker_that_forgot_the_session_gets_what_an_earlier_run_left(broker, boxes):
    broker.start()
    with agent(boxes, broker) as publisher:
        wait_for(lambda: publisher.is_connected)
        broker.kill()
        say(publisher, range(1, 31))
        assert publisher.outbox.flush(PATIENT_S)
    broker.start()  # it knows of nobody
    with recording(broker) as recorder, agent(boxes, broker) as publisher:
        say(publisher, [31])
        wait_for(lambda: len(recorder.n_arrived) == 31, PATIENT_S)
        assert publisher.outbox.restored() == {Kind.FINAL: 30}
        wait_for(is_empty(publisher), PATIENT_S)
    assert recorder.n_arrived.total() == 31
    assert (recorder.n_historical, recorder.n_out_of_order) == (30, 0)


@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_what_comes_late_says_so_to_the_reader_and_to_the_broker(broker, boxes, version):
    outbox = boxes.started()
    for n, name in enumerate(["old", "older"], 1):
        outbox.put(to_envelope(event_payload("s1", n, name)))
    outbox.close()
    found = []

    def on_message(_client, _userdata, message):
        found.append((message.payload.count(b'"historical":true'), getattr(message.properties, "UserProperty", [])))

    broker.start()
    reader = Client(CallbackAPIVersion.VERSION2, "reader", protocol=MQTTProtocolVersion.MQTTv5)
    subscribed = []
    reader.on_connect = lambda client, *_: client.subscribe("whisperlet/soak/event", qos=1)
    reader.on_subscribe = lambda *_: subscribed.append(True)
    reader.on_message = on_message
    reader.connect("127.0.0.1", broker.port)
    reader.loop_start()
    wait_for(lambda: subscribed)
    try:
        with agent(boxes, broker, version=version) as publisher:
            wait_for(is_empty(publisher), PATIENT_S)
            publisher.put(to_envelope(event_payload("s1", 3, "new")))
            wait_for(lambda: len(found) == 3, PATIENT_S)
    finally:
        reader.disconnect()
        reader.loop_stop()
        reader._reset_sockets()
    properties = [("historical", "true")] if version == "5" else []
    assert found == [(1, properties), (1, properties), (0, [])]


def test_what_is_refused_is_counted_and_does_not_come_back(broker, boxes, tmp_path):
    topics = ["status", "info", "event"]
    (tmp_path / "acl").write_text("".join(f"topic write whisperlet/soak/{topic}\n" for topic in topics))
    (tmp_path / "acl").chmod(0o600)
    broker.start(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}")
    with agent(boxes, broker) as publisher:
        say(publisher, range(1, 6))
        publisher.put(to_envelope(event_payload("s1", 1, "engine_restarted")))
        wait_for(is_empty(publisher), PATIENT_S)
        assert publisher.outbox.dropped() == {Kind.FINAL: 5}
        assert publisher.outbox.sent() == {Kind.EVENT: 1}
        assert publisher.counts().refused == 5
    assert boxes.started().restored() == {}


def test_a_full_disk_does_not_keep_words_from_a_broker_that_is_there(broker, boxes):
    boxes.folder.write_text("there can be no folder here")
    broker.start()
    with Subscriber(broker.port) as subscriber, agent(boxes, broker) as publisher:
        say(publisher, range(1, 11))
        wait_for(lambda: len(subscriber.on("transcript/final")) == 10, PATIENT_S)
        assert publisher.outbox.trouble
    assert boxes.names == ["outbox_not_stored"]


def test_a_final_wakes_the_publisher_once_it_is_stored(broker, boxes, monkeypatch):
    monkeypatch.setattr("agent.mqtt.TURN_S", 60.0)
    broker.start()
    with recording(broker) as recorder, agent(boxes, broker) as publisher:
        wait_for(lambda: publisher.is_connected and not publisher._in_flight)
        say(publisher, [1])
        wait_for(lambda: recorder.n_arrived, PATIENT_S)

import socket
import threading
import time
from contextlib import contextmanager

import msgspec
import pytest
from brokers import Broker, Subscriber, TakeoverBroker, free_port, needs_mosquitto, wait_for
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from agent.config import MqttConfig
from agent.inventory import hardware, system
from agent.link import Link
from agent.messages import Envelope, Kind
from agent.mqtt import MAX_PARTIALS, Publisher
from agent.outbox import Limits, MemoryOutbox
from agent.patience import Backoff
from agent.payloads import InfoPayload, Versions

INFO = InfoPayload(
    session="s1",
    started_utc="2025-01-31T12:00:00.000Z",
    versions=Versions(agent="0.1", runtime=None, python="3.11"),
    bundle=None,
    hardware=hardware(),
    system=system(),
    config_sha256="0" * 64,
    capabilities=["partials"],
    sample_rate_hz=16_000,
)


def final(n):
    return Envelope("transcript/final", msgspec.json.encode({"n": n}), Kind.FINAL)


def partial(n):
    return Envelope("transcript/partial", msgspec.json.encode({"n": n}), Kind.PARTIAL, qos=0)


def numbers(bodies):
    return [body["n"] for body in bodies]


class Agent(Publisher):
    """A publisher with its outbox and its events at hand."""

    def __init__(
        self, port, *, takeover_retry_s=30.0, quota_retry_s=10.0, capacity=1000, rng=lambda: 0.0, remote=None, **config
    ):
        values = {"device": "dev", "reconnect_min_s": 0.1, "reconnect_max_s": 1.0, "will_delay_s": 0} | config
        self.outbox = MemoryOutbox(Limits(messages=capacity))
        self.events = []
        config = MqttConfig(**{"url": f"mqtt://127.0.0.1:{port}"} | values)
        super().__init__(
            config,
            self.outbox,
            INFO,
            self._note,
            remote=remote,
            rng=rng,
            takeover_retry_s=takeover_retry_s,
            quota_retry_s=quota_retry_s,
        )

    def _note(self, name, detail):
        self.events.append(name)


@contextmanager
def running(port, *, stop_s=0.5, **config):
    agent = Agent(port, **config)
    agent.start()
    try:
        yield agent
    finally:
        agent.stop(stop_s)


@pytest.fixture
def stopped_broker(tmp_path):
    broker = Broker(tmp_path)
    yield broker
    broker.kill()


@pytest.fixture
def broker(stopped_broker):
    stopped_broker.start()
    return stopped_broker


@pytest.fixture
def links(monkeypatch):
    """Connections in the order they were made."""
    made = []
    monkeypatch.setattr("agent.mqtt.Link", lambda *args: made.append(Link(*args)) or made[-1])
    return made


def cut(link):
    """Cut the wire without a DISCONNECT."""
    link._client.socket().shutdown(socket.SHUT_RDWR)


@needs_mosquitto
def test_status_and_info_are_retained(broker):
    with running(broker.port) as agent:
        wait_for(lambda: agent.is_connected and not agent._in_flight)
        with Subscriber(broker.port) as subscriber:
            wait_for(lambda: subscriber.on("status") and subscriber.on("info"))
            retained = {topic: (body, qos) for topic, body, qos, retained in subscriber.messages if retained}
    status, qos = retained["whisperlet/dev/status"]
    assert (status["state"], status["reason"], status["session"], qos) == ("online", "connected", "s1", 1)
    assert retained["whisperlet/dev/info"][0] == msgspec.to_builtins(INFO)


@needs_mosquitto
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_last_will_says_offline(broker, version, links, monkeypatch):
    with Subscriber(broker.port) as subscriber, running(broker.port, version=version) as agent:
        wait_for(lambda: subscriber.on("status"))
        monkeypatch.setattr(Link, "connect", lambda self: (_ for _ in ()).throw(OSError("the cable is out")))
        cut(links[0])
        wait_for(lambda: len(subscriber.on("status")) == 2)
        will = {"state": "offline", "reason": "connection_lost", "session": "s1", "time_utc": None, "condition": None}
        assert subscriber.on("status")[1] == will
        wait_for(lambda: not agent.is_connected)


@needs_mosquitto
def test_the_will_waits_for_its_delay(broker, links):
    with Subscriber(broker.port) as subscriber, running(broker.port, will_delay_s=60) as agent:
        wait_for(lambda: subscriber.on("status"))
        cut(links[0])
        wait_for(lambda: agent.counts().connects == 2)
        wait_for(lambda: len(subscriber.on("status")) == 2)
        assert [body["state"] for body in subscriber.on("status")] == ["online", "online"]


@needs_mosquitto
def test_finals_wait_for_the_broker_in_order(stopped_broker):
    with running(stopped_broker.port) as agent:
        for n in range(100):
            agent.put(final(n))
        assert agent.outbox.depth == 100
        stopped_broker.start()
        with Subscriber(stopped_broker.port) as subscriber:
            agent.put(final(100))
            wait_for(lambda: agent.outbox.depth == 0)
            wait_for(lambda: 100 in numbers(subscriber.on("transcript/final")))
            arrived = numbers(subscriber.on("transcript/final"))
    assert arrived == sorted(arrived)  # it may have begun before the subscriber was there
    assert agent.outbox.sent() == {Kind.FINAL: 101}


@needs_mosquitto
def test_delivery_begins_at_once(broker):
    with running(broker.port) as agent:
        wait_for(lambda: agent.is_connected and not agent._in_flight)
        time.sleep(0.05)  # it sleeps in `select` now
        agent.put(final(1))
        wait_for(lambda: agent.outbox.depth == 0, timeout_s=0.5)


@needs_mosquitto
def test_nothing_is_lost_when_the_broker_dies(broker):
    with running(broker.port) as agent, Subscriber(broker.port) as subscriber:
        for n in range(40):
            agent.put(final(n))
            if n == 20:
                wait_for(lambda: 10 in numbers(subscriber.on("transcript/final")))
                broker.kill()
        wait_for(lambda: not agent.is_connected)
        broker.start()
        wait_for(lambda: agent.outbox.depth == 0)
        assert agent.outbox.sent() == {Kind.FINAL: 40}
        assert agent.counts().connects == 2


@needs_mosquitto
def test_unacknowledged_messages_are_sent_again(broker, links, monkeypatch):
    monkeypatch.setattr(MemoryOutbox, "ack", lambda self, message_id: self._in_flight.__getitem__(message_id))
    with Subscriber(broker.port) as subscriber, running(broker.port, stop_s=0.1) as agent:
        for n in range(5):
            agent.put(final(n))
        wait_for(lambda: len(subscriber.on("transcript/final")) == 5)
        cut(links[0])
        wait_for(lambda: len(subscriber.on("transcript/final")) == 10)
        assert numbers(subscriber.on("transcript/final")) == [0, 1, 2, 3, 4] * 2


@needs_mosquitto
def test_a_refused_login_is_tried_again(stopped_broker, tmp_path, caplog):
    (tmp_path / "password").write_text("geheim\n")
    stopped_broker.start("allow_anonymous false")
    login = {"username": "dev", "password_file": str(tmp_path / "password")}
    with running(stopped_broker.port, **login) as agent:
        agent.put(final(1))
        wait_for(lambda: agent.events)
        wait_for(lambda: sum("refused" in record.message for record in caplog.records) >= 1)
        time.sleep(0.5)  # several attempts
        assert agent.events == ["login_refused"]
        assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
            f"the MQTT broker at 127.0.0.1:{stopped_broker.port} refused to connect us: Not authorized; trying again"
        ]
        stopped_broker.kill()
        stopped_broker.start()
        wait_for(lambda: agent.outbox.sent() == {Kind.FINAL: 1})
    assert "geheim" not in caplog.text


@needs_mosquitto
def test_two_agents_of_one_name_do_not_fight(broker, monkeypatch):
    waits = []
    next_s = Backoff.next_s
    monkeypatch.setattr(Backoff, "next_s", lambda backoff: waits.append(next_s(backoff)) or waits[-1])
    fighters = {"reconnect_max_s": 60, "rng": lambda: 0.5}
    with running(broker.port, **fighters) as first, running(broker.port, **fighters) as second:
        wait_for(lambda: "connection_unstable" in first.events + second.events)
        wait_for(lambda: max(waits) > 10 * min(waits), 30)  # however slow the machine, they stay away longer and longer


def test_a_session_that_was_taken_over_is_left_alone(caplog):
    with TakeoverBroker() as broker, running(broker.port) as agent:
        wait_for(lambda: agent.events == ["session_taken_over"])
        agent.put(final(1))
        time.sleep(0.5)  # five times the shortest wait
        assert broker.n_connects == 1
        assert agent.outbox.depth == 1
    assert "another client connected as whisperlet-dev" in caplog.text


def test_a_session_that_was_taken_over_is_taken_back_later():
    with TakeoverBroker() as broker, running(broker.port, takeover_retry_s=0.2) as agent:
        wait_for(lambda: broker.n_connects == 3)
        assert agent.counts().connects >= 2


@needs_mosquitto
def test_a_message_that_is_refused_is_not_tried_for_ever(stopped_broker, tmp_path):
    (tmp_path / "acl").write_text("topic write whisperlet/dev/status\ntopic write whisperlet/dev/info\n")
    stopped_broker.start(f"allow_anonymous true\nacl_file {tmp_path / 'acl'}")
    with running(stopped_broker.port) as agent:
        agent.put(final(1))
        wait_for(lambda: agent.counts().refused == 1)
        assert agent.outbox.depth == 0
        assert agent.outbox.dropped() == {Kind.FINAL: 1}
        assert agent.is_connected


@needs_mosquitto
def test_what_the_broker_has_no_room_for_is_sent_again_later(broker, monkeypatch):
    refusals = iter([0x97] * 3)
    on_puback = Publisher._on_puback

    def refuse_at_first(self, mid, reason):
        is_final = (self._in_flight.get(mid) or (None,))[0] is not None
        value = next(refusals, None) if is_final else None
        on_puback(self, mid, reason if value is None else ReasonCode(PacketTypes.PUBACK, identifier=value))

    monkeypatch.setattr(Publisher, "_on_puback", refuse_at_first)
    with Subscriber(broker.port) as heard, running(broker.port, quota_retry_s=0.2) as agent:
        agent.put(final(1))
        wait_for(lambda: agent.outbox.sent() == {Kind.FINAL: 1})
        assert (agent.counts().refused, agent.counts().connects, agent.outbox.dropped()) == (3, 1, {})
        wait_for(lambda: heard.on("transcript/final"))


def test_the_publisher_outlives_a_login_that_cannot_be_read_at_all(monkeypatch, caplog):
    monkeypatch.setattr(Agent, "_renew_login", lambda self: (_ for _ in ()).throw(FileNotFoundError("client.pem")))
    with running(free_port()) as agent:
        wait_for(lambda: agent.counts().errors >= 2)
    assert "publishing failed, connecting again" in caplog.text


@needs_mosquitto
def test_partials_are_for_now_or_never(stopped_broker):
    with running(stopped_broker.port) as agent:
        for n in range(3):
            agent.put(partial(n))
        assert agent.counts().partials_dropped == 3
        stopped_broker.start()
        with Subscriber(stopped_broker.port) as subscriber:
            wait_for(lambda: agent.is_connected)
            agent.put(partial(3))
            wait_for(lambda: subscriber.on("transcript/partial"))
            assert numbers(subscriber.on("transcript/partial")) == [3]
            _, _, qos, retained = next(message for message in subscriber.messages if "partial" in message[0])
            assert (qos, retained) == (0, False)
    assert agent.outbox.stored() == {}


def test_the_oldest_partial_goes_when_too_many_wait():
    agent = Agent(free_port())
    agent.put(partial(99))  # no connection, nothing to wait for
    agent._is_connected = True
    for n in range(MAX_PARTIALS + 2):
        agent.put(partial(n))
    assert [msgspec.json.decode(envelope.payload)["n"] for envelope in agent._partials] == list(
        range(2, MAX_PARTIALS + 2)
    )
    assert agent.counts().partials_dropped == 3
    agent.stop(0)


@needs_mosquitto
@pytest.mark.parametrize("version", ["5", "3.1.1"])
def test_stop_delivers_says_goodbye_and_leaves_nothing(broker, version):
    threads = set(threading.enumerate())
    agent = Agent(broker.port, version=version)
    agent.start()
    for n in range(50):
        agent.put(final(n))
    agent.stop(5)
    assert set(threading.enumerate()) == threads
    assert agent.outbox.depth == 0
    with Subscriber(broker.port) as subscriber:
        wait_for(lambda: subscriber.on("status"))
        status = subscriber.on("status")[0]
        assert (status["state"], status["reason"]) == ("offline", "stopped")
    agent.put(final(51))  # late, and kept rather than an error


def test_stop_without_a_broker_is_quick():
    agent = Agent(free_port(), reconnect_min_s=60, reconnect_max_s=60)
    agent.start()
    agent.put(final(1))
    time.sleep(0.1)
    began = time.monotonic()
    agent.stop(1)
    assert time.monotonic() - began < 1
    assert agent.outbox.depth == 1


@needs_mosquitto
def test_drops_are_reported_with_the_next_connection(stopped_broker):
    with running(stopped_broker.port, capacity=10) as agent:
        for n in range(12):
            agent.put(final(n))
        stopped_broker.start()
        wait_for(lambda: agent.events == ["messages_dropped"])

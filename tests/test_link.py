import socket

from agent.broker import Broker
from agent.config import MqttConfig
from agent.link import Link, Waker
from agent.messages import Envelope, Kind
from agent.patience import Backoff


def test_backoff_grows_and_is_bounded():
    backoff = Backoff(1.0, 5.0, lambda: 1.0)
    assert [backoff.next_s() for _ in range(4)] == [2.0, 4.0, 5.0, 5.0]
    assert [Backoff(1.0, 5.0, lambda: 0.0).next_s() for _ in range(3)] == [1.0, 1.0, 1.0]


def test_backoff_forgives_a_connection_that_lasted():
    backoff = Backoff(1.0, 60.0, lambda: 1.0)
    waits = [backoff.next_s() for _ in range(3)]
    assert waits == [2.0, 4.0, 8.0]
    assert not backoff.lasted(15.0)
    assert backoff.lasted(17.0)
    assert backoff.next_s() == 2.0


def test_connect_goes_on_with_its_session_for_as_long_as_the_will_waits():
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = MqttConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}", device="dev", will_delay_s=30)
        link = Link(Broker.of(config), config, Envelope("status", b"{}", Kind.EVENT, retain=True), print)
        link.connect()
        with server.accept()[0] as connection:
            packet = connection.recv(4096)
        link.close()
    assert packet[9] == 0b0010_1100  # will: retained, QoS 1, present; no clean start
    assert packet[12:18] == b"\x0a\x11\0\0\0\x1e"  # properties, session expiry interval ...
    assert packet[18:23] == b"\x27\0\1\0\0"  # ... and how much we take at once
    assert b"\5\x18\0\0\0\x1e\0\x15whisperlet/dev/status" in packet  # will delay interval


def test_a_broker_that_hangs_up_at_once_is_one_that_says_goodbye(monkeypatch):
    """As one does that does not like our certificate; paho has let go of the socket by then."""
    config = MqttConfig(url="mqtt://127.0.0.1:1", device="dev")
    link, waker = Link(Broker.of(config), config, Envelope("status", b"{}", Kind.EVENT), print), Waker()
    monkeypatch.setattr(link._client, "connect", lambda *_, **__: None)
    link.connect()
    link.turn(waker, 0)
    assert link.goodbye is not None
    link.close()
    waker.close()

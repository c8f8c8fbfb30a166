import shutil
import socket
import subprocess

import pytest
from brokers import Broker as Mosquitto
from brokers import needs_mosquitto, wait_for

from agent.config import MqttConfig
from agent.link import Backoff, Broker, Link, Waker
from agent.messages import Envelope, Kind
from whisperlet.errors import ConfigError


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


@pytest.mark.parametrize(
    ("url", "where"),
    [
        ("mqtt://broker", ("broker", 1883, False)),
        ("mqtts://broker", ("broker", 8883, True)),
        ("mqtts://[::1]:99", ("::1", 99, True)),
    ],
)
def test_url(url, where):
    broker = Broker.of(MqttConfig(url=url, device="d"))
    assert (broker.host, broker.port, broker.is_tls) == where


def test_device_is_the_host_name_by_default():
    assert Broker.of(MqttConfig()).client_id == f"whisperlet-{socket.gethostname()}"


@pytest.mark.parametrize("url", ["mqtt://broker:99999", "mqtt://user:geheim@broker", "mqtt:broker"])
def test_bad_url(url):
    with pytest.raises(ConfigError, match=r"mqtt\.url") as error:
        Broker.of(MqttConfig(url=url))
    assert "geheim" not in str(error.value)


def test_password_is_the_first_line_and_is_not_shown(tmp_path):
    (tmp_path / "password").write_text("geheim \nmore\n")
    broker = Broker.of(MqttConfig(username="me", password_file=str(tmp_path / "password")))
    assert broker.password == "geheim "
    assert "geheim" not in f"{broker} {broker!r}"


def test_unreadable_password_names_file_and_key(tmp_path):
    with pytest.raises(ConfigError, match=rf"mqtt\.password_file: {tmp_path}/none: cannot be read: No such file"):
        Broker.of(MqttConfig(password_file=str(tmp_path / "none")))
    (tmp_path / "bad").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="is not UTF-8"):
        Broker.of(MqttConfig(password_file=str(tmp_path / "bad")))


def test_connect_goes_on_with_its_session_for_as_long_as_the_will_waits():
    with socket.create_server(("127.0.0.1", 0)) as server:
        config = MqttConfig(url=f"mqtt://127.0.0.1:{server.getsockname()[1]}", device="dev", will_delay_s=30)
        link = Link(Broker.of(config), config, Envelope("status", b"{}", Kind.EVENT, retain=True), print)
        link.connect()
        with server.accept()[0] as connection:
            packet = connection.recv(4096)
        link.close()
    assert packet[9] == 0b0010_1100  # will: retained, QoS 1, present; no clean start
    assert packet[12:18] == b"\5\x11\0\0\0\x1e"  # properties, session expiry interval
    assert b"\5\x18\0\0\0\x1e\0\x15whisperlet/dev/status" in packet  # will delay interval


@pytest.fixture
def tls_broker(tmp_path):
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    request = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2"]
    names = ["-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1"]
    subprocess.run([*request, *names, "-keyout", key, "-out", certificate], check=True, capture_output=True)
    broker = Mosquitto(tmp_path)
    broker.start(f"allow_anonymous true\ncertfile {certificate}\nkeyfile {key}")
    yield broker, certificate
    broker.kill()


def tls_link(port, acks):
    config = MqttConfig(url=f"mqtts://127.0.0.1:{port}", device="dev")
    will = Envelope("status", b"{}", Kind.EVENT)
    return Link(Broker.of(config), config, will, lambda mid, reason: acks.append((mid, reason.value)))


@needs_mosquitto
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
def test_tls(tls_broker, monkeypatch):
    broker, certificate = tls_broker
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    acks, waker = [], Waker()
    link = tls_link(broker.port, acks)
    link.connect()
    wait_for(lambda: link.turn(waker, 0.1) or link.is_up)
    mids = [link.publish(Envelope("event", b"x" * 5000, Kind.EVENT)) for _ in range(10)]
    wait_for(lambda: link.turn(waker, 0.1) or len(acks) == 10)
    assert sorted(mid for mid, _ in acks) == mids
    link.disconnect()
    link.close()
    waker.close()


@needs_mosquitto
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # paho leaves the socket of a failed handshake to the collector
def test_tls_refuses_a_stranger(tls_broker, monkeypatch):
    broker, _ = tls_broker
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    link = tls_link(broker.port, [])
    with pytest.raises(OSError, match="certificate verify failed"):
        link.connect()
    link.close()

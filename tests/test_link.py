import socket

import pytest

from agent.config import MqttConfig
from agent.link import Backoff, Broker
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

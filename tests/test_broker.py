import contextlib
import socket
import subprocess

import pytest
from brokers import Broker as Mosquitto
from brokers import needs_mosquitto, wait_for
from certificates import Authority, needs_openssl
from test_mqtt import running

from agent.broker import Broker
from agent.config import MqttConfig
from agent.link import Link, Waker
from agent.messages import Envelope, Kind
from whisperlet.errors import ConfigError

NOWHERE = {}  # an environment without credentials


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
    assert (broker.host, broker.port, broker.tls is not None) == where


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


def test_systemd_hands_over_a_login(tmp_path):
    (tmp_path / "mqtt-username").write_text("kiosk-7\n")
    (tmp_path / "mqtt-password").write_text("geheim\n")
    (tmp_path / "password").write_text("another\n")
    environment = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    broker = Broker.of(MqttConfig(), environment)
    assert (broker.username, broker.password) == ("kiosk-7", "geheim")
    chosen = Broker.of(MqttConfig(username="me", password_file=str(tmp_path / "password")), environment)
    assert (chosen.username, chosen.password) == ("me", "another")
    assert Broker.of(MqttConfig(), NOWHERE).password is None


def test_an_unreadable_credential_is_named(tmp_path):
    (tmp_path / "mqtt-password").mkdir()
    with pytest.raises(ConfigError, match=rf"the credential mqtt-password: {tmp_path}/mqtt-password: cannot be read"):
        Broker.of(MqttConfig(username="me"), {"CREDENTIALS_DIRECTORY": str(tmp_path)})


def test_a_password_wants_a_name(tmp_path):
    (tmp_path / "password").write_text("geheim\n")
    with pytest.raises(ConfigError, match=r"^mqtt\.username: is not set") as error:
        Broker.of(MqttConfig(password_file=str(tmp_path / "password")), NOWHERE)
    assert "geheim" not in str(error.value)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def files(authority):
    """Files by what is wrong with them, or right."""
    folder = authority.folder
    certificate, key = authority.sign("kiosk")
    locked = folder / "locked.key"
    subprocess.run(["openssl", "ec", "-in", key, "-aes128", "-passout", "pass:geheim", "-out", locked], check=True)
    (folder / "text").write_text("hello")
    (folder / "both").write_text(certificate.read_text() + key.read_text())
    other = authority.sign("other")[1]
    return {
        "ca": authority.file,
        "cert": certificate,
        "key": key,
        "other": other,
        "locked": locked,
        "text": folder / "text",
        "both": folder / "both",
        "none": folder / "none",
    }


@needs_openssl
@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"ca_file": "none"}, "mqtt.ca_file: {none}: cannot be read: No such file or directory"),
        ({"ca_file": "text"}, "mqtt.ca_file: {text}: holds no certificate in PEM form"),
        ({"cert_file": "none"}, "mqtt.cert_file: {none}: cannot be read: No such file or directory"),
        ({"cert_file": "text"}, "mqtt.cert_file: {text}: holds no certificate in PEM form"),
        ({"cert_file": "cert"}, "mqtt.cert_file: {cert}: holds no private key in PEM form without a password"),
        ({"cert_file": "text", "key_file": "key"}, "mqtt.cert_file: {text}: holds no certificate in PEM form"),
        ({"cert_file": "cert", "key_file": "none"}, "mqtt.key_file: {none}: cannot be read: No such file or directory"),
        ({"cert_file": "cert", "key_file": "other"}, "mqtt.key_file: {other}: is not the key of {cert}"),
        ({"cert_file": "cert", "key_file": "text"}, "mqtt.key_file: {text}: holds no private key in PEM form"),
        ({"cert_file": "cert", "key_file": "locked"}, "mqtt.key_file: {locked}: holds no private key in PEM form"),
        ({"key_file": "key"}, "mqtt.key_file: {key}: is of no use without mqtt.cert_file"),
    ],
)
def test_a_bad_file_is_named_with_its_key(files, settings, sentence):
    settings = {key: str(files[name]) for key, name in settings.items()}
    with pytest.raises(ConfigError) as error:
        Broker.of(MqttConfig(url="mqtts://broker", **settings))
    assert str(error.value).startswith(sentence.format(**files))
    assert "\n" not in str(error.value)


@needs_openssl
@pytest.mark.parametrize("key", ["ca_file", "cert_file", "key_file"])
def test_certificates_want_tls(files, key):
    with pytest.raises(ConfigError, match=rf"mqtt\.{key}: .* is of no use unless mqtt\.url begins with mqtts://"):
        Broker.of(MqttConfig(url="mqtt://broker", **{key: str(files["both"])}))


@pytest.fixture
def tls_broker(authority, tmp_path):
    """Takes only clients that show a certificate of the authority, and calls them by its common name."""
    certificate, key = authority.sign("localhost")
    broker = Mosquitto(tmp_path)
    (tmp_path / "acl").write_text("pattern readwrite whisperlet/%u/#\n")
    options = ["require_certificate true", "use_identity_as_username true", f"acl_file {tmp_path / 'acl'}"]
    broker.start("\n".join([f"certfile {certificate}", f"keyfile {key}", f"cafile {authority.file}", *options]))
    yield broker
    broker.kill()


def tls_link(port, acks, **files):
    settings = {key: str(file) for key, file in files.items()}
    config = MqttConfig(url=f"mqtts://127.0.0.1:{port}", device="kiosk", **settings)
    will = Envelope("status", b"{}", Kind.EVENT)
    return Link(Broker.of(config), config, will, lambda mid, reason: acks.append((mid, reason.value)))


@needs_mosquitto
@needs_openssl
@pytest.mark.parametrize("trust", ["ca_file", "system"])
def test_tls(tls_broker, files, trust, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(files["ca"]) if trust == "system" else "/dev/null")
    trusted = {"ca_file": files["ca"]} if trust == "ca_file" else {}
    acks, waker = [], Waker()
    link = tls_link(tls_broker.port, acks, cert_file=files["cert"], key_file=files["key"], **trusted)
    link.connect()
    wait_for(lambda: link.turn(waker, 0.1) or link.is_up)
    mids = [link.publish(Envelope("event", b"x" * 5000, Kind.EVENT)) for _ in range(10)]
    wait_for(lambda: link.turn(waker, 0.1) or len(acks) == 10)
    assert sorted(mid for mid, _ in acks) == mids
    assert {reason for _, reason in acks} <= {0, 0x10}  # success, perhaps with nobody who listens
    link.disconnect()
    link.close()
    waker.close()


@needs_mosquitto
@needs_openssl
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # paho leaves the socket of a failed handshake to the collector
def test_tls_refuses_a_stranger(tls_broker, files, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", "/dev/null")
    link = tls_link(tls_broker.port, [], cert_file=files["cert"], key_file=files["key"])
    with pytest.raises(OSError, match="certificate verify failed"):
        link.connect()
    link.close()


@needs_mosquitto
@needs_openssl
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_the_broker_refuses_whom_it_does_not_know(tls_broker, files):
    link, waker = tls_link(tls_broker.port, [], ca_file=files["ca"]), Waker()

    def is_refused():
        link.turn(waker, 0.1)
        return link.goodbye is not None

    with contextlib.suppress(OSError):  # with TLS 1.3 the refusal comes after the handshake
        link.connect()
        wait_for(is_refused)
    assert not link.is_up
    link.close()
    waker.close()


@pytest.fixture
def mosquitto(tmp_path):
    broker = Mosquitto(tmp_path)
    yield broker
    broker.kill()


@needs_mosquitto
def test_a_renewed_password_is_taken_at_the_next_attempt(mosquitto, tmp_path):
    (tmp_path / "users").write_text("")
    subprocess.run(["mosquitto_passwd", "-b", tmp_path / "users", "dev", "new"], check=True)
    mosquitto.start(f"password_file {tmp_path / 'users'}")
    (tmp_path / "password").write_text("old\n")
    with running(mosquitto.port, username="dev", password_file=str(tmp_path / "password")) as agent:
        wait_for(lambda: agent.events == ["login_refused"])
        (tmp_path / "password").write_text("new\n")
        wait_for(lambda: agent.is_connected)
        (tmp_path / "password").unlink()

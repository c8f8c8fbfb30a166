"""The runbook's Mosquitto: it starts, lets devices and operators do what they must and nothing else, and keeps its word."""

import re
import signal
import subprocess
from pathlib import Path

import msgspec
import pytest
from brokers import MOSQUITTO, free_port, needs_mosquitto, wait_for
from certificates import Authority, needs_openssl
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from test_commands import Device
from test_mqtt import Agent, final

from agent.messages import Kind

RUNBOOK = (Path(__file__).parents[1] / "docs" / "operations.md").read_text()
pytestmark = [needs_mosquitto, needs_openssl]


def block(first_line):
    """The runbook's block that begins with this line."""
    found = re.search(rf"^    {re.escape(first_line)}\n(?:(?:    .*)?\n)*", RUNBOOK, re.MULTILINE)
    return re.sub(r"^    ", "", found[0], flags=re.MULTILINE)


class Mosquitto:
    """The runbook's settings with the files of a test."""

    def __init__(self, folder, authority):
        self.port = free_port()
        certificate, key = authority.sign("localhost")
        (folder / "acl").write_text(block("pattern write whisperlet/%u/#"))
        (folder / "acl").chmod(0o600)
        text = block("persistence true")
        for runbook, ours in {
            "listener 8883": f"listener {self.port} 127.0.0.1",
            "/var/lib/mosquitto/": f"{folder}/",
            "/etc/mosquitto/ca.pem": authority.file,
            "/etc/mosquitto/server.pem": certificate,
            "/etc/mosquitto/server.key": key,
            "/etc/mosquitto/acl": folder / "acl",
        }.items():
            assert runbook in text
            text = text.replace(runbook, str(ours))
        self._config = folder / "mosquitto.conf"
        self._config.write_text(f"user root\n{text}")
        self.start()

    def start(self):
        self._process = subprocess.Popen([MOSQUITTO, "-c", str(self._config)], stderr=subprocess.DEVNULL)

    def stop(self):
        self._process.send_signal(signal.SIGTERM)
        assert self._process.wait(10) == 0


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture
def mosquitto(tmp_path, authority):
    broker = Mosquitto(tmp_path, authority)
    yield broker
    broker.stop()


class Member:
    """Somebody with a certificate; subscribed to `topics`."""

    def __init__(self, mosquitto, authority, name, topics=(), session_s=0):
        certificate, key = authority.sign(name)
        self.messages = []
        self._client = Client(CallbackAPIVersion.VERSION2, f"{name}-1", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.tls_set(str(authority.file), str(certificate), str(key))
        self._client.on_message = lambda _c, _u, message: self.messages.append((message.topic, message.payload))
        acks = []
        self._client.on_subscribe = lambda *arguments: acks.append(arguments)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = session_s
        options = {"clean_start": False, "properties": session}
        wait_for(lambda: self._try(lambda: self._client.connect("127.0.0.1", mosquitto.port, **options)))
        self._client.loop_start()
        if topics:
            self._client.subscribe([(topic, 1) for topic in topics])
            wait_for(lambda: acks)

    @staticmethod
    def _try(connect):
        try:
            return connect() == 0
        except ConnectionError:  # the broker is not there yet
            return False

    def tell(self, topic, payload=b""):
        self._client.publish(topic, payload, 1).wait_for_publish(8)

    def topics(self):
        return [topic for topic, _ in self.messages]

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()


def agent_of(mosquitto, authority, device):
    certificate, key = authority.sign("kiosk-7")
    files = {"ca_file": str(authority.file), "cert_file": str(certificate), "key_file": str(key)}
    url = f"mqtts://127.0.0.1:{mosquitto.port}"
    return Agent(mosquitto.port, url=url, remote=device.dispatcher, **files | {"device": "kiosk-7"})


def test_devices_and_operators_may_do_what_they_must(mosquitto, authority):
    operator = Member(mosquitto, authority, "operator", ["whisperlet/#"])
    stranger = Member(mosquitto, authority, "kiosk-8", ["whisperlet/kiosk-8/cmd/+", "whisperlet/#"])
    device = Device("kiosk-7")
    agent = agent_of(mosquitto, authority, device)
    agent.start()
    try:
        wait_for(lambda: "whisperlet/kiosk-7/status" in operator.topics())
        stranger.tell("whisperlet/kiosk-7/cmd/restart")
        operator.tell("whisperlet/kiosk-7/cmd/mute")
        answer = wait_for(lambda: [body for topic, body in operator.messages if topic.endswith("/cmd/mute/result")])
        assert msgspec.json.decode(answer[0])["outcome"] == "ok"
        agent.put(final(1))
        wait_for(lambda: agent.outbox.sent() == {Kind.FINAL: 1})
        wait_for(lambda: "whisperlet/kiosk-7/transcript/final" in operator.topics())
        assert device.restarts == []
        assert not [topic for topic in stranger.topics() if "kiosk-7" in topic]
        assert (agent.counts().refused, agent.events) == (0, [])
    finally:
        agent.stop(1)
        operator.close()
        stranger.close()


def test_what_a_subscriber_has_not_fetched_outlives_the_broker(mosquitto, authority):
    topics = ["whisperlet/+/transcript/final"]
    Member(mosquitto, authority, "archive", topics, session_s=3600).close()
    agent = agent_of(mosquitto, authority, Device("kiosk-7"))
    agent.start()
    for n in range(1500):  # more than Mosquitto would keep by itself
        agent.put(final(n))
        wait_for(lambda: agent.outbox.depth < 500)  # of its bound
    wait_for(lambda: agent.outbox.depth == 0, 20)
    agent.stop(1)
    mosquitto.stop()
    mosquitto.start()
    archive = Member(mosquitto, authority, "archive", session_s=3600)
    wait_for(lambda: len(archive.messages) == 1500, 20)
    archive.close()
    assert [msgspec.json.decode(body)["n"] for _, body in archive.messages] == list(range(1500))

"""Somebody who tells agents what to do, over a real broker, and hears what becomes of it."""

import itertools
import socket
import time

import msgspec
from brokers import Connected, wait_for
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties


class Operator(Connected):
    """Asks one device at a time; answers go to a topic of its own (MQTT 5) or to the command's (3.1.1)."""

    def __init__(self, port, version="5"):
        self._is_5 = version == "5"
        self.replies = f"operator/{id(self)}/replies"
        self.answers = []  # (topic, correlation or None, payload, arrived)
        self.latencies_s = []
        self._n = itertools.count()
        protocol = MQTTProtocolVersion.MQTTv5 if self._is_5 else MQTTProtocolVersion.MQTTv311
        self._client = Client(CallbackAPIVersion.VERSION2, f"operator-{id(self)}", protocol=protocol)
        self._is_ready = False
        self._client.on_subscribe = lambda *_: setattr(self, "_is_ready", True)
        self._client.on_message = self._on_message
        self._client.connect("127.0.0.1", port)
        self._client.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._client.loop_start()
        self._client.subscribe([(self.replies, 1), ("whisperlet/+/cmd/+/result", 1)])
        wait_for(lambda: self._is_ready)

    def _on_message(self, _client, _userdata, message):
        correlation = getattr(message.properties, "CorrelationData", None)
        body = msgspec.json.decode(message.payload)
        self.answers.append((message.topic, correlation, body, time.monotonic()))

    def tell(self, topic, payload=b"", **properties):
        """Publish without waiting for anything."""
        retain = properties.pop("retain", False)
        body = payload if isinstance(payload, bytes) else msgspec.json.encode(payload)
        self._client.publish(topic, body, 1, retain, self._properties(properties)).wait_for_publish(8)

    def ask(self, device, name, payload=b"", timeout_s=8.0, **properties):
        """Give a command; the answer's payload."""
        correlation = f"question {next(self._n)}".encode()
        n_before = len(self.answers)
        if self._is_5:
            properties = {"ResponseTopic": self.replies, "CorrelationData": correlation} | properties
        asked_s = time.monotonic()
        self.tell(f"whisperlet/{device}/cmd/{name}", payload, **properties)
        topic, found, body, arrived_s = wait_for(lambda: self.answers[n_before:], timeout_s)[0]
        self.latencies_s.append(arrived_s - asked_s)
        expected = properties.get("ResponseTopic") or f"whisperlet/{device}/cmd/{name}/result"
        assert (topic, found) == (expected, correlation if self._is_5 else None)
        return body

    def _properties(self, values):
        properties = Properties(PacketTypes.PUBLISH) if self._is_5 else None
        for name, value in values.items():
            setattr(properties, name, value)
        return properties

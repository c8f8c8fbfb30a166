"""One connection to the broker: paho's client, driven by the thread that owns it. `mqtt.py` decides when and what.

paho's network loop is turned from outside (`turn`), so its callbacks run in the owner's thread and share nothing.
"""

from __future__ import annotations

import contextlib
import logging
import math
import select
import socket
import time
from collections.abc import Callable
from typing import Any

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from .broker import Broker
from .config import MqttConfig
from .messages import Envelope, Notice, Request

MAX_IN_FLIGHT = 20  # messages without a PUBACK; less if the broker's Receive Maximum says so
MAX_PACKET_BYTES = 64 * 1024  # that the broker may send us; MQTT 5 only
ASKED = ("cmd/+", "desired")  # topics of this device on which it is told something
CONNECT_TIMEOUT_S = 5.0

logger = logging.getLogger(__name__)


class Waker:
    """Ends a `select` from another thread."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Readable after `wake`."""
        return self._reader.fileno()

    def wake(self) -> None:
        """End the current or the next `select`."""
        with contextlib.suppress(OSError):  # full: it is awake already; closed: nobody sleeps
            self._writer.send(b"\0")

    def drain(self) -> None:
        """Forget the calls so far."""
        with contextlib.suppress(BlockingIOError):
            self._reader.recv(4096)

    def close(self) -> None:
        """Give the descriptors back."""
        self._reader.close()
        self._writer.close()


class Link:
    """A connection from the attempt to its end.

    `on_puback(mid, reason)` and `on_request(request)` are called from within `turn`; without the latter nothing is asked
    of the broker.
    """

    def __init__(
        self,
        broker: Broker,
        config: MqttConfig,
        will: Envelope,
        on_puback: Callable[[int, ReasonCode], None],
        on_request: Callable[[Request], None] | None = None,
    ) -> None:
        self.max_in_flight = MAX_IN_FLIGHT
        self.greeting: ReasonCode | None = None  # of CONNACK
        self.goodbye: ReasonCode | None = None  # why the connection ended
        self._broker = broker
        self._config = config
        self._on_puback, self._on_request = on_puback, on_request
        self._greeted_s = math.inf  # time.monotonic()
        self._client = self._new_client(will)

    @property
    def is_pending(self) -> bool:
        """Whether CONNACK may still come."""
        return self.greeting is None and self.goodbye is None

    @property
    def is_up(self) -> bool:
        """Whether messages can be sent."""
        return self.greeting is not None and not self.greeting.is_failure and self.goodbye is None

    @property
    def is_clogged(self) -> bool:
        """Whether the network has yet to take what was sent."""
        return self._client.want_write()

    def age_s(self) -> float:
        """Seconds since CONNACK; less than 0 without one."""
        return time.monotonic() - self._greeted_s

    def connect(self) -> None:
        """Send CONNECT; raises OSError where there is no broker."""
        delay_s = self._config.will_delay_s
        if self._config.version == "5":
            # The will waits no longer than the session lives, and only for a client that goes on with its session.
            self._client.connect(
                self._broker.host,
                self._broker.port,
                self._config.keepalive_s,
                clean_start=False,
                properties=_properties(
                    PacketTypes.CONNECT, SessionExpiryInterval=delay_s, MaximumPacketSize=MAX_PACKET_BYTES
                ),
            )
        else:
            self._client.connect(self._broker.host, self._broker.port, self._config.keepalive_s)
        # An answer would wait for the acknowledgement of what was sent just before it, 40 ms.
        sock: Any = self._client.socket()
        if sock is not None:  # paho has hung up if the broker did at once
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def publish(self, envelope: Envelope) -> int:
        """Send an envelope; returns paho's id for it."""
        topic = self._broker.topic(envelope.topic)
        properties = None
        if envelope.historical and self._config.version == "5":
            properties = _properties(PacketTypes.PUBLISH, UserProperty=[("historical", "true")])
        return self._client.publish(topic, envelope.payload, envelope.qos, envelope.retain, properties).mid

    def send(self, notice: Notice) -> int:
        """Send a notice; returns paho's id for it."""
        properties = None
        if notice.correlation is not None and self._config.version == "5":
            properties = _properties(PacketTypes.PUBLISH, CorrelationData=notice.correlation)
        return self._client.publish(notice.topic, notice.payload, 1, notice.retain, properties).mid

    def turn(self, waker: Waker, timeout_s: float) -> None:
        """Wait for the network or for `waker`, then let paho read, write and look at the time."""
        sock: Any = self._client.socket()
        if sock is None:
            self.goodbye = self.goodbye or ReasonCode(PacketTypes.DISCONNECT, "Unspecified error")
            return
        has_unread = getattr(sock, "pending", int)() > 0  # decrypted already, so `select` does not see it
        writers = [sock] if self._client.want_write() else []
        readable, writable, _ = select.select([sock, waker], writers, [], 0 if has_unread else timeout_s)
        if waker in readable:
            waker.drain()
        if has_unread or sock in readable:
            self._client.loop_read()
        if sock in writable:
            self._client.loop_write()
        self._client.loop_misc()

    def disconnect(self) -> None:
        """End the session in good order: the broker forgets the will."""
        self._client.disconnect()

    def close(self) -> None:
        """Hang up, without a word if `disconnect` was not called."""
        if (sock := self._client.socket()) is not None:
            sock.close()

    def _new_client(self, will: Envelope) -> Client:
        is_mqtt5 = self._config.version == "5"
        protocol = MQTTProtocolVersion.MQTTv5 if is_mqtt5 else MQTTProtocolVersion.MQTTv311
        client = Client(
            CallbackAPIVersion.VERSION2, self._broker.client_id, protocol=protocol, reconnect_on_failure=False
        )
        client.connect_timeout = CONNECT_TIMEOUT_S
        client.username_pw_set(self._broker.username, self._broker.password)
        if self._broker.tls is not None:
            client.tls_set_context(self._broker.tls)
        delay = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=self._config.will_delay_s) if is_mqtt5 else None
        client.will_set(self._broker.topic(will.topic), will.payload, will.qos, will.retain, delay)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        client.on_subscribe = self._on_subscribe
        return client

    def _on_connect(self, _c: Client, _u: Any, _f: ConnectFlags, reason: ReasonCode, properties: Any) -> None:
        self.greeting = reason
        self._greeted_s = time.monotonic()
        self.max_in_flight = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))
        if self._on_request is not None and not reason.is_failure:
            self._client.subscribe([(self._broker.topic(name), self._subscription()) for name in ASKED])

    def _subscription(self) -> Any:
        return SubscribeOptions(qos=1) if self._config.version == "5" else 1

    def _on_subscribe(self, _c: Client, _u: Any, _mid: int, reasons: list[ReasonCode], _p: Any) -> None:
        for name, reason in zip(ASKED, reasons, strict=False):
            if reason.is_failure:
                logger.warning("the MQTT broker lets nobody tell us anything on %s: %s", name, reason)

    def _on_message(self, _c: Client, _u: Any, message: MQTTMessage) -> None:
        assert self._on_request is not None
        properties = message.properties
        request = Request(
            message.topic.removeprefix(self._broker.topic("")),
            bytes(message.payload),
            is_retained=message.retain,
            is_again=message.dup,
            response_topic=getattr(properties, "ResponseTopic", None),
            correlation=getattr(properties, "CorrelationData", None),
        )
        self._on_request(request)

    def _on_disconnect(self, _c: Client, _u: Any, _f: DisconnectFlags, reason: ReasonCode, _p: Any) -> None:
        self.goodbye = self.goodbye or reason

    def _on_publish(self, _c: Client, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
        self._on_puback(mid, reason)


def _properties(packet_type: int, **values: Any) -> Properties:
    """MQTT 5 properties by their names in the standard."""
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]  # paho annotates only its client
    for name, value in values.items():
        setattr(properties, name, value)
    return properties

"""One connection to the broker: paho's client, driven by the thread that owns it. `mqtt.py` decides when and what.

paho's network loop is turned from outside (`turn`), so its callbacks run in the owner's thread and share nothing.
"""

from __future__ import annotations

import contextlib
import math
import select
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from paho.mqtt.client import Client, ConnectFlags, DisconnectFlags
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

from whisperlet.errors import ConfigError

from .config import MqttConfig
from .messages import Envelope

MAX_IN_FLIGHT = 20  # messages without a PUBACK; less if the broker's Receive Maximum says so
CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Broker:
    """Where to connect and as whom, checked."""

    host: str
    port: int
    is_tls: bool
    device: str  # <device> in the topics
    username: str | None
    password: str | None = field(repr=False)

    @classmethod
    def of(cls, config: MqttConfig) -> Broker:
        """Broker of a configuration; raises ConfigError naming the key, and the file of the password."""
        url = urlsplit(config.url)
        if url.username is not None or url.hostname is None:
            raise ConfigError("mqtt.url: wants HOST[:PORT]; a login goes into mqtt.username and mqtt.password_file")
        try:
            port = url.port or (8883 if url.scheme == "mqtts" else 1883)
        except ValueError:
            raise ConfigError(f"mqtt.url: the port in {config.url!r} is not a number up to 65535") from None
        device = config.device or socket.gethostname()
        return cls(url.hostname, port, url.scheme == "mqtts", device, config.username, read_password(config))

    def __str__(self) -> str:
        """Host and port, for the log."""
        return f"{self.host}:{self.port}"

    @property
    def client_id(self) -> str:
        """Name of the session at the broker."""
        return f"whisperlet-{self.device}"

    def topic(self, name: str) -> str:
        """Full name of an envelope's topic."""
        return f"whisperlet/{self.device}/{name}"


def read_password(config: MqttConfig) -> str | None:
    """First line of `mqtt.password_file`; raises ConfigError naming the key and the file."""
    if config.password_file is None:
        return None
    try:
        text = Path(config.password_file).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"mqtt.password_file: {config.password_file}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"mqtt.password_file: {config.password_file}: is not UTF-8") from None
    return text.partition("\n")[0].rstrip("\r")


class Backoff:
    """Exponential back-off with jitter over the whole range."""

    def __init__(self, min_s: float, max_s: float, rng: Callable[[], float]) -> None:
        self._min_s = min_s
        self._max_s = max(min_s, max_s)
        self._rng = rng  # uniform in [0, 1)
        self._ceiling_s = min(self._max_s, 2 * min_s)

    def next_s(self) -> float:
        """Seconds to wait now."""
        wait_s = self._min_s + self._rng() * (self._ceiling_s - self._min_s)
        self._ceiling_s = min(self._max_s, 2 * self._ceiling_s)
        return wait_s

    def lasted(self, age_s: float) -> bool:
        """Begin again with short waits if a connection outlived the longest wait now; returns whether it did.

        Two clients that throw each other out live for as long as the other waits, so their waits go on growing.
        """
        if age_s > self._ceiling_s:
            self._ceiling_s = min(self._max_s, 2 * self._min_s)
            return True
        return False


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
    """A connection from the attempt to its end. `on_puback(mid, reason)` is called from within `turn`."""

    def __init__(
        self, broker: Broker, config: MqttConfig, will: Envelope, on_puback: Callable[[int, ReasonCode], None]
    ) -> None:
        self.max_in_flight = MAX_IN_FLIGHT
        self.greeting: ReasonCode | None = None  # of CONNACK
        self.goodbye: ReasonCode | None = None  # why the connection ended
        self._broker = broker
        self._config = config
        self._on_puback = on_puback
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
                properties=_properties(PacketTypes.CONNECT, SessionExpiryInterval=delay_s),
            )
        else:
            self._client.connect(self._broker.host, self._broker.port, self._config.keepalive_s)

    def publish(self, envelope: Envelope) -> int:
        """Send an envelope; returns paho's id for it."""
        topic = self._broker.topic(envelope.topic)
        return self._client.publish(topic, envelope.payload, envelope.qos, envelope.retain).mid

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
        if self._broker.is_tls:
            client.tls_set()
        delay = _properties(PacketTypes.WILLMESSAGE, WillDelayInterval=self._config.will_delay_s) if is_mqtt5 else None
        client.will_set(self._broker.topic(will.topic), will.payload, will.qos, will.retain, delay)
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_publish = self._on_publish
        return client

    def _on_connect(self, _c: Client, _u: Any, _f: ConnectFlags, reason: ReasonCode, properties: Any) -> None:
        self.greeting = reason
        self._greeted_s = time.monotonic()
        self.max_in_flight = min(MAX_IN_FLIGHT, getattr(properties, "ReceiveMaximum", MAX_IN_FLIGHT))

    def _on_disconnect(self, _c: Client, _u: Any, _f: DisconnectFlags, reason: ReasonCode, _p: Any) -> None:
        self.goodbye = self.goodbye or reason

    def _on_publish(self, _c: Client, _u: Any, mid: int, reason: ReasonCode, _p: Any) -> None:
        self._on_puback(mid, reason)


def _properties(packet_type: int, **values: int) -> Properties:
    """MQTT 5 properties by their names in the standard."""
    properties = Properties(packet_type)  # type: ignore[no-untyped-call]  # paho annotates only its client
    for name, value in values.items():
        setattr(properties, name, value)
    return properties

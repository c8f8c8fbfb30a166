"""The doctor's try at the broker: whether it is there, lets us in, and takes what we publish.

A client of its own name does it, since the broker would throw the agent out that runs under the device's. What it
publishes is an event, `doctor`, which any reader of events may see.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from paho.mqtt.reasoncodes import ReasonCode

from whisperlet.errors import ConfigError

from .broker import Broker
from .config import MqttConfig
from .findings import Finding, fail, ok, warn
from .link import Link, Waker
from .payloads import event_payload, to_envelope

TIMEOUT_S = 10.0
REFUSED = {
    0x86: "user name or password is wrong: mqtt.username, mqtt.password_file or the service's credentials",
    0x87: "the login may not connect: see the broker's access list",
}


@dataclass(frozen=True)
class Visitor(Broker):
    """The same device under another client id."""

    @property
    def client_id(self) -> str:
        """Not the agent's."""
        return f"{super().client_id}-doctor"


def examine(config: MqttConfig, timeout_s: float = TIMEOUT_S) -> list[Finding]:
    """Connect, publish to a topic of the device, say goodbye."""
    try:
        broker = Visitor.of(config)
    except ConfigError as error:
        return [fail("broker", str(error), "correct the configuration")]
    visit = Visit(broker, config, time.monotonic() + timeout_s)
    try:
        return visit.pay()
    except OSError as error:
        reason = error.strerror or str(error)
        return [fail("broker", f"{broker}: {reason}", "see mqtt.url, the network, and the broker's certificate")]
    finally:
        visit.close()


class Visit:
    """One connection, and what came of it."""

    def __init__(self, broker: Broker, config: MqttConfig, deadline_s: float) -> None:
        self._broker, self._config, self._deadline_s = broker, config, deadline_s
        self._event = to_envelope(event_payload("doctor", 1, "doctor", "tried whether this device may publish"))
        self._acknowledged: list[ReasonCode] = []
        self._waker = Waker()
        # the will is the same event: it must not say "offline" in the agent's name
        self._link = Link(broker, config, self._event, lambda _mid, reason: self._acknowledged.append(reason))

    def pay(self) -> list[Finding]:
        """Raises OSError where there is no broker."""
        self._link.connect()
        self._turn_while(lambda: self._link.is_pending)
        if not self._link.is_up:
            return [self._refusal()]
        self._link.publish(self._event)
        self._turn_while(lambda: self._link.is_up and not self._acknowledged)
        findings = [ok("broker", f"{self._broker}{', TLS' if self._broker.tls else ', in the clear'}"), self._rights()]
        self._link.disconnect()
        return findings

    def close(self) -> None:
        """Hang up."""
        self._link.close()
        self._waker.close()

    def _turn_while(self, condition: Callable[[], bool]) -> None:
        while condition() and (left_s := self._deadline_s - time.monotonic()) > 0:
            self._link.turn(self._waker, left_s)

    def _refusal(self) -> Finding:
        greeting = self._link.greeting
        if greeting is None:
            advice = "see that mqtt.url names an MQTT broker, and that mqtts:// is said where it wants TLS"
            return fail("broker", f"{self._broker}: does not answer", advice)
        advice = REFUSED.get(greeting.value, "see the broker's log")
        return fail("broker", f"{self._broker}: {greeting}", advice)

    def _rights(self) -> Finding:
        topic = self._broker.topic(self._event.topic)
        advice = f"let the login write to {self._broker.topic('#')} in the broker's access list"
        if not self._acknowledged:
            return fail("rights", f"{topic}: no acknowledgement", advice)
        if self._acknowledged[0].is_failure:
            return fail("rights", f"{topic}: {self._acknowledged[0]}", advice)
        if self._config.version != "5":
            return warn("rights", f"{topic}: acknowledged", 'MQTT 3.1.1 cannot tell a refusal; set mqtt.version = "5"')
        return ok("rights", f"may publish to {topic}")

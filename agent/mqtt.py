"""Publishing: one thread takes envelopes from the outbox and has the broker acknowledge them.

The outbox alone remembers what is still to be delivered: each connection has a paho client of its own, thrown away
with the connection, and what was in flight then goes back into the outbox: QoS 1 arrives at least once.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Callable

import msgspec
from paho.mqtt.reasoncodes import ReasonCode

from whisperlet.errors import ConfigError

from .broker import Broker
from .config import MqttConfig
from .link import CONNECT_TIMEOUT_S, Link, Waker
from .messages import Envelope, Kind, Notice, Outbox, Remote, Request
from .patience import Patience
from .payloads import Condition, InfoPayload, historical, status_payload, to_envelope

MAX_NOTICES = 64  # that wait to be sent; the oldest goes first
MAX_PARTIALS = 8  # that wait to be sent; the oldest goes first
RESOLVE_S = 60.0  # that the system may take to find the broker's address
FAREWELL_S = 1.0  # to have `offline` acknowledged when the agent stops
QUOTA_EXCEEDED = 0x97  # a reason to send less, or later; any other refusal is for good
TURN_S = 1.0  # longest sleep while connected; keep-alive is looked at in between

logger = logging.getLogger(__name__)


class PublisherCounts(msgspec.Struct, frozen=True):
    """Since the publisher was made."""

    connects: int
    partials_sent: int
    partials_dropped: int
    refused: int  # by the broker, with a reason code
    notices_dropped: int  # answers to commands
    errors: int  # of our own


class Publisher:
    """Delivers what is `put`, whether or not the broker is there at the moment.

    `on_event(name, detail)` is called from the publisher's thread; `rng` is uniform in [0, 1).
    """

    def __init__(
        self,
        config: MqttConfig,
        outbox: Outbox,
        info: InfoPayload,
        on_event: Callable[[str, str], None],
        *,
        condition: Callable[[], Condition | None] = lambda: None,
        beat: Callable[[float], None] = lambda _within_s: None,
        remote: Remote | None = None,
        rng: Callable[[], float] = random.random,
        takeover_retry_s: float = 30.0,
        quota_retry_s: float = 10.0,
    ) -> None:
        self._config = config
        self._broker = Broker.of(config)
        self._outbox = outbox
        self._info = info
        self._on_event, self._condition, self._beat = on_event, condition, beat
        self._remote = remote
        self._notices: deque[Notice] = deque(maxlen=MAX_NOTICES)
        self._has_news = threading.Event()  # the retained status is to be written again
        self._patience = Patience(config, takeover_retry_s, on_event, rng)
        self._in_flight: dict[int, tuple[int | None, str]] = {}  # by paho's id: id in the outbox, topic
        self._lock = threading.Lock()  # guards the next three
        self._partials: deque[Envelope] = deque(maxlen=MAX_PARTIALS)
        self._counts: Counter[str] = Counter()
        self._is_connected = False
        self._quota_retry_s = quota_retry_s
        self._held_until_s = -math.inf  # time.monotonic(); the broker takes nothing before
        self._reported_drops: dict[Kind, int] = {}
        self._waker = Waker()
        outbox.watch(self._waker.wake)
        self._stop = threading.Event()
        self._deadline_s = math.inf  # time.monotonic()
        self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)

    def start(self) -> None:
        """Begin to connect; the broker need not be there."""
        self._thread.start()

    def put(self, envelope: Envelope) -> None:
        """Have an envelope delivered; one with QoS 0 is for now or never."""
        if envelope.qos == 0:
            self._put_partial(envelope)
            self._waker.wake()
        else:
            self._outbox.put(envelope)

    def renew_status(self) -> None:
        """Write the retained status again; a new connection does by itself."""
        self._has_news.set()
        self._waker.wake()

    def stop(self, timeout_s: float) -> None:
        """Deliver what can be delivered within `timeout_s`, say `offline`, and end the thread."""
        self._deadline_s = time.monotonic() + timeout_s
        self._stop.set()
        self._waker.wake()
        if self._thread.ident is not None:
            self._thread.join(timeout_s + CONNECT_TIMEOUT_S + FAREWELL_S)
        if self._thread.is_alive():
            logger.error("the publisher did not stop within its time")
        else:
            self._waker.close()

    @property
    def is_connected(self) -> bool:
        """Whether the broker has accepted us and the connection stands."""
        return self._is_connected

    def counts(self) -> PublisherCounts:
        """Everything counted so far."""
        with self._lock:
            return PublisherCounts(**{name: self._counts[name] for name in PublisherCounts.__struct_fields__})

    def _count(self, name: str) -> None:
        with self._lock:
            self._counts[name] += 1

    def _put_partial(self, envelope: Envelope) -> None:
        with self._lock:
            is_full = len(self._partials) == MAX_PARTIALS  # the oldest makes room
            self._counts["partials_dropped"] += is_full or not self._is_connected
            if self._is_connected:
                self._partials.append(envelope)

    def _run(self) -> None:
        while not self._stop.is_set():
            wait_s = self._attempt()
            self._beat(wait_s)
            self._stop.wait(wait_s)
        if self._outbox.depth and self._time_left_s() > 0:  # stopped while it waited to connect again
            self._attempt()

    def _attempt(self) -> float:
        """Connect and serve until the connection ends; returns the wait before the next attempt in seconds."""
        try:
            self._renew_login()
            with contextlib.closing(self._new_link()) as link:
                if self._open(link):
                    self._serve(link)
                    return self._patience.after(link, self._broker, is_stopping=self._stop.is_set())
        except Exception:
            self._count("errors")
            logger.exception("publishing failed, connecting again")
        finally:
            self._put_back()
        return self._patience.next_s()

    def _new_link(self) -> Link:
        will = to_envelope(status_payload(self._info.session, "connection_lost"))
        on_request = self._on_request if self._remote and self._config.commands else None
        return Link(self._broker, self._config, will, self._on_puback, on_request)

    def _renew_login(self) -> None:
        """Read password and certificates again: they are renewed while the agent runs."""
        try:
            self._broker = Broker.of(self._config)
        except ConfigError as error:
            self._patience.complain(f"{error}; the former login holds")

    def _open(self, link: Link) -> bool:
        self._beat(RESOLVE_S + CONNECT_TIMEOUT_S)
        try:
            link.connect()
        except OSError as error:
            self._patience.complain(f"cannot reach the MQTT broker at {self._broker}: {error.strerror or error}")
            return False
        return True

    def _serve(self, link: Link) -> None:
        """Deliver messages until the connection is lost, or the agent is stopped and all is delivered."""
        while link.is_pending and self._time_left_s() > 0:
            self._turn(link)
        if link.is_up:
            self._greet(link)
        while link.is_up and not self._is_done():
            self._send_partials(link)
            self._send_status(link)
            self._send_waiting(link)
            self._turn(link)
        if link.is_up:
            self._say_goodbye(link)

    def _turn(self, link: Link) -> None:
        self._beat(TURN_S)
        link.turn(self._waker, max(0.0, min(TURN_S, self._time_left_s())))

    def _time_left_s(self) -> float:
        return self._deadline_s - time.monotonic()

    def _is_done(self) -> bool:
        is_empty = not self._in_flight and not self._notices and self._outbox.depth == 0
        return self._stop.is_set() and (is_empty or self._time_left_s() <= 0)

    def _greet(self, link: Link) -> None:
        """Say what a new connection begins with."""
        logger.info("connected to the MQTT broker at %s as %s", self._broker, self._broker.client_id)
        self._patience.forgive()
        self._count("connects")
        self._is_connected = True
        self._has_news.set()
        self._send_status(link)
        self._publish(link, to_envelope(self._info), None)
        self._notices.extend(self._remote.greeting() if self._remote else ())
        self._report_drops()

    def _on_request(self, request: Request) -> None:
        assert self._remote is not None
        notices = self._remote.handle(request)
        with self._lock:  # whoever floods us with commands does not get all of the answers
            self._counts["notices_dropped"] += max(0, len(self._notices) + len(notices) - MAX_NOTICES)
        self._notices.extend(notices)

    def _send_status(self, link: Link) -> None:
        """Past the outbox, where it could wait until it is not true any more."""
        if self._has_news.is_set():
            self._has_news.clear()
            payload = status_payload(self._info.session, "connected", self._condition())
            self._publish(link, to_envelope(payload), None)

    def _report_drops(self) -> None:
        if (dropped := self._outbox.dropped()) != self._reported_drops:
            self._reported_drops = dropped
            self._on_event("messages_dropped", ", ".join(f"{n} {kind.value}" for kind, n in dropped.items()))

    def _send_partials(self, link: Link) -> None:
        """Send the partials, unless the network is behind: then they are not worth their bytes any more."""
        with self._lock:
            partials = list(self._partials)
            self._partials.clear()
            self._counts["partials_dropped" if link.is_clogged else "partials_sent"] += len(partials)
        for envelope in () if link.is_clogged else partials:
            link.publish(envelope)

    def _send_waiting(self, link: Link) -> None:
        while self._notices and len(self._in_flight) < link.max_in_flight:
            notice = self._notices.popleft()
            self._in_flight[link.send(notice)] = None, notice.topic
        is_held = time.monotonic() < self._held_until_s
        for message_id, envelope in self._outbox.take(
            0 if is_held else max(0, link.max_in_flight - len(self._in_flight))
        ):
            self._publish(link, historical(envelope) if envelope.historical else envelope, message_id)

    def _publish(self, link: Link, envelope: Envelope, message_id: int | None) -> int:
        self._in_flight[mid := link.publish(envelope)] = message_id, envelope.topic
        return mid

    def _on_puback(self, mid: int, reason: ReasonCode) -> None:
        if mid not in self._in_flight:  # a partial has been written
            return
        message_id, topic = self._in_flight.pop(mid)
        if reason.is_failure:
            self._count("refused")
            logger.warning("the MQTT broker refused a message to %s: %s", topic, reason)
        if message_id is None:
            return
        if reason.value == QUOTA_EXCEEDED:
            self._outbox.put_back(message_id)
            self._held_until_s = time.monotonic() + self._quota_retry_s
        elif reason.is_failure:
            self._outbox.discard(message_id)
        else:
            self._outbox.ack(message_id)

    def _say_goodbye(self, link: Link) -> None:
        """Replace the will by our own word, then leave in good order."""
        mid = self._publish(link, to_envelope(status_payload(self._info.session, "stopped")), None)
        until_s = time.monotonic() + FAREWELL_S
        while link.is_up and mid in self._in_flight and (left_s := until_s - time.monotonic()) > 0:
            link.turn(self._waker, left_s)
        link.disconnect()

    def _put_back(self) -> None:
        """Forget the connection, but not what it did not deliver."""
        with self._lock:
            self._is_connected = False
            self._counts["partials_dropped"] += len(self._partials)
            self._partials.clear()
        self._notices.clear()
        self._in_flight.clear()
        self._outbox.requeue()

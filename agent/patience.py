"""When to connect again after a connection has ended, and what there is to say about it."""

from __future__ import annotations

import logging
from collections.abc import Callable

from .broker import Broker
from .config import MqttConfig
from .link import Link

TAKEOVER_MAX = 16  # times takeover_retry_s: the longest wait after another client took the session over
BAD_LOGIN = (0x86, 0x87)  # bad user name or password, not authorized
SESSION_TAKEN_OVER = 0x8E  # said by Mosquitto since 2.0.15; MQTT 3.1.1 has no word for it
SUSPECT_EARLY = 3  # connections in a row that ended soon
SAME_NAME_HINT = "is mqtt.device the same on two machines?"

logger = logging.getLogger(__name__)


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


class Patience:
    """Waits between attempts, each reason told once. `on_event(name, detail)` and `rng` as for the publisher."""

    def __init__(
        self,
        config: MqttConfig,
        takeover_retry_s: float,
        on_event: Callable[[str, str], None],
        rng: Callable[[], float],
    ) -> None:
        self._on_event = on_event
        self._backoff = Backoff(config.reconnect_min_s, config.reconnect_max_s, rng)
        self._takeover = Backoff(takeover_retry_s, TAKEOVER_MAX * takeover_retry_s, rng)
        self._complaint = ""
        self._n_early = 0

    def next_s(self) -> float:
        """Seconds to wait now."""
        return self._backoff.next_s()

    def forgive(self) -> None:
        """A connection stands: what was complained of is news if it comes again."""
        self._complaint = ""

    def after(self, link: Link, broker: Broker, *, is_stopping: bool) -> float:
        """Say why the connection ended; returns how long to stay away in seconds."""
        if link.greeting is not None and link.greeting.is_failure:
            is_new = self.complain(f"the MQTT broker at {broker} refused to connect us: {link.greeting}")
            if is_new and link.greeting.value in BAD_LOGIN:
                self._on_event("login_refused", str(link.greeting))
        elif link.goodbye is not None and link.goodbye.value == SESSION_TAKEN_OVER:
            return self._yield_session(link, broker)
        elif not is_stopping:
            self.complain(f"lost the connection to the MQTT broker at {broker}")
            self._count_early(link)
        return self._backoff.next_s()

    def _count_early(self, link: Link) -> None:
        """Suspect a second agent where the broker does not tell: it would throw us out again and again."""
        self._n_early = 0 if self._backoff.lasted(link.age_s()) else self._n_early + 1
        if self._n_early == SUSPECT_EARLY:
            self._on_event("connection_unstable", f"lost {SUSPECT_EARLY} times soon after connecting; {SAME_NAME_HINT}")

    def _yield_session(self, link: Link, broker: Broker) -> float:
        """Stay away for long: two agents of one name would otherwise throw each other out for ever."""
        self._takeover.lasted(link.age_s())
        wait_s = self._takeover.next_s()
        detail = f"another client connected as {broker.client_id}; {SAME_NAME_HINT}"
        logger.warning("%s; connecting again in %.0f s", detail, wait_s)
        self._on_event("session_taken_over", detail)
        return wait_s

    def complain(self, sentence: str) -> bool:
        """Log a sentence, as a warning unless it is the same as last time; returns whether it is new."""
        is_new = sentence != self._complaint
        logger.log(logging.WARNING if is_new else logging.DEBUG, "%s; trying again", sentence)
        self._complaint = sentence
        return is_new

"""Messages that wait for the broker's acknowledgement, in order, bounded.

An envelope is stored, taken (in flight), and then acknowledged, discarded, or put back by `requeue` when the
connection was lost. At the bound the oldest waiting message of the least important kind makes room: partials,
then telemetry, then events, finals last; a new message that is itself the least important is not stored. What is
in flight is never dropped: it may already have arrived.
"""

from __future__ import annotations

import threading
from collections import Counter, deque

from .messages import Envelope, Kind

LEAST_IMPORTANT_FIRST = (Kind.PARTIAL, Kind.TELEMETRY, Kind.EVENT, Kind.FINAL)


class MemoryOutbox:
    """Outbox that lives as long as the process. Safe to use from several threads; no call waits."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity  # messages, waiting or in flight
        self._lock = threading.Lock()
        self._last_id = 0
        self._waiting: dict[Kind, deque[tuple[int, Envelope]]] = {kind: deque() for kind in LEAST_IMPORTANT_FIRST}
        self._in_flight: dict[int, Envelope] = {}
        self._stored: Counter[Kind] = Counter()
        self._sent: Counter[Kind] = Counter()
        self._dropped: Counter[Kind] = Counter()

    def put(self, envelope: Envelope) -> int | None:
        """Store an envelope; returns its id, or None if there was no room for it."""
        with self._lock:
            if self._depth() >= self._capacity and not self._make_room(envelope.kind):
                self._dropped[envelope.kind] += 1
                return None
            self._last_id += 1
            self._waiting[envelope.kind].append((self._last_id, envelope))
            self._stored[envelope.kind] += 1
            return self._last_id

    def take(self, limit: int) -> list[tuple[int, Envelope]]:
        """Oldest waiting envelopes, `limit` at the most, with their ids; they are in flight from now on."""
        with self._lock:
            taken: list[tuple[int, Envelope]] = []
            while len(taken) < limit and (oldest := self._oldest()):
                taken.append(oldest.popleft())
            self._in_flight.update(taken)
            return taken

    def ack(self, message_id: int) -> None:
        """Forget an envelope that was delivered."""
        with self._lock:
            self._sent[self._in_flight.pop(message_id).kind] += 1

    def discard(self, message_id: int) -> None:
        """Forget an envelope that can never be delivered."""
        with self._lock:
            self._dropped[self._in_flight.pop(message_id).kind] += 1

    def requeue(self) -> None:
        """Put everything that is in flight back to where it was taken from."""
        with self._lock:
            for message_id, envelope in sorted(self._in_flight.items(), reverse=True):
                self._waiting[envelope.kind].appendleft((message_id, envelope))
            self._in_flight.clear()

    @property
    def depth(self) -> int:
        """Messages that wait or are in flight."""
        with self._lock:
            return self._depth()

    def stored(self) -> dict[Kind, int]:
        """Messages accepted so far, by kind."""
        with self._lock:
            return dict(self._stored)

    def sent(self) -> dict[Kind, int]:
        """Messages delivered so far, by kind."""
        with self._lock:
            return dict(self._sent)

    def dropped(self) -> dict[Kind, int]:
        """Messages lost so far, by kind: no room, or discarded."""
        with self._lock:
            return dict(self._dropped)

    def _depth(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._in_flight)

    def _oldest(self) -> deque[tuple[int, Envelope]] | None:
        """Queue whose head has waited for longest."""
        filled = [queue for queue in self._waiting.values() if queue]
        return min(filled, key=lambda queue: queue[0][0], default=None)

    def _make_room(self, kind: Kind) -> bool:
        """Drop one waiting message that is no more important than `kind`."""
        for candidate in LEAST_IMPORTANT_FIRST[: LEAST_IMPORTANT_FIRST.index(kind) + 1]:
            if self._waiting[candidate]:
                self._waiting[candidate].popleft()
                self._dropped[candidate] += 1
                return True
        return False

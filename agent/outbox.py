"""Messages that wait for the broker's acknowledgement, in order, bounded.

An envelope is stored, taken (in flight), and then acknowledged, discarded, or put back by `requeue` when the
connection was lost. At a bound the least important waiting messages make room: partials, then every second
telemetry, then the oldest events, finals last; a new message that is itself the least important is not stored. What
is in flight is never dropped: it may already have arrived. `store.py` keeps the same on disk.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from operator import attrgetter

import msgspec

from .messages import Envelope, Kind

LEAST_IMPORTANT_FIRST = (Kind.PARTIAL, Kind.TELEMETRY, Kind.EVENT, Kind.FINAL)
OVERHEAD_BYTES = 100  # that a message takes besides its topic and payload, roughly
LATE_S = 30.0  # what has waited for longer is historical


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """How much is kept, waiting and in flight together."""

    messages: int
    bytes: float = math.inf
    age_s: float = math.inf
    telemetry_age_s: float = math.inf

    def max_age_s(self, kind: Kind) -> float:
        """Seconds after which a waiting message is dropped."""
        return self.telemetry_age_s if kind is Kind.TELEMETRY else self.age_s


class Entry(msgspec.Struct, eq=False):
    """A message and where it is."""

    id: int  # in the order of arrival
    kind: Kind
    size: int  # bytes
    born_s: float  # by the outbox's clock
    envelope: Envelope | None  # None: on disk alone
    on_disk: bool = False
    is_gone: bool = False  # delivered or dropped
    is_old: bool = False  # from an earlier run


by_id = attrgetter("id")


def size_of(envelope: Envelope) -> int:
    """Bytes that an envelope takes, roughly."""
    return len(envelope.topic) + len(envelope.payload) + OVERHEAD_BYTES


def uptime_s() -> float:
    """Seconds since some point, sleep of the machine included; setting the time does not change it."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class MemoryOutbox:
    """Outbox that lives as long as the process. Safe to use from several threads; no call waits."""

    def __init__(self, limits: Limits, *, clock: Callable[[], float] = uptime_s) -> None:
        self._limits = limits
        self._clock = clock
        self._on_ready: Callable[[], None] = lambda: None
        self._lock = threading.Lock()  # guards the rest
        self._last_id = 0
        self._bytes = 0
        self._waiting: dict[Kind, deque[Entry]] = {kind: deque() for kind in LEAST_IMPORTANT_FIRST}
        self._in_flight: dict[int, Entry] = {}
        self._stored: Counter[Kind] = Counter()
        self._sent: Counter[Kind] = Counter()
        self._dropped: Counter[Kind] = Counter()

    def start(self) -> None:
        """Begin; nothing to do here."""

    def close(self) -> None:
        """End; nothing to do here."""

    def watch(self, on_ready: Callable[[], None]) -> None:
        """Have `on_ready` called, from any thread, whenever there is something to take."""
        self._on_ready = on_ready

    def put(self, envelope: Envelope) -> int | None:
        """Store an envelope; returns its id, or None if there was no room for it."""
        with self._lock:
            entry = Entry(0, envelope.kind, size_of(envelope), self._now_s(), envelope)
            self._expire()
            if not self._make_room(entry):
                self._dropped[entry.kind] += 1
                return None
            self._last_id += 1
            entry.id = self._last_id
            self._stored[entry.kind] += 1
            self._add(entry)
        self._on_ready()
        return entry.id

    def take(self, limit: int) -> list[tuple[int, Envelope]]:
        """Oldest waiting envelopes, `limit` at the most, with their ids; they are in flight from now on."""
        with self._lock:
            self._expire()
            ready = heapq.merge(*self._waiting.values(), key=by_id)
            taken = list(itertools.islice(self._takeable(ready), limit))
            self._remove(taken)
            self._in_flight.update({entry.id: entry for entry in taken})
        return [(entry.id, self._marked(entry, envelope)) for entry, envelope in self._fetched(taken)]

    def ack(self, message_id: int) -> None:
        """Forget an envelope that was delivered."""
        with self._lock:
            self._sent[self._finish(message_id).kind] += 1

    def discard(self, message_id: int) -> None:
        """Forget an envelope that can never be delivered."""
        with self._lock:
            self._dropped[self._finish(message_id).kind] += 1

    def put_back(self, message_id: int) -> None:
        """Have an envelope in flight wait again, in its place."""
        with self._lock:
            self._put_back([self._in_flight[message_id]])

    def requeue(self) -> None:
        """Put everything that is in flight back to where it was taken from."""
        with self._lock:
            self._put_back(list(self._in_flight.values()))

    @property
    def depth(self) -> int:
        """Messages that wait or are in flight."""
        with self._lock:
            return self._depth()

    @property
    def bytes(self) -> int:
        """What these messages take, roughly."""
        with self._lock:
            return self._bytes

    def stored(self) -> dict[Kind, int]:
        """Messages accepted so far, by kind."""
        with self._lock:
            return dict(self._stored)

    def restored(self) -> dict[Kind, int]:
        """Messages found from an earlier run, by kind: none."""
        return {}

    def sent(self) -> dict[Kind, int]:
        """Messages delivered so far, by kind."""
        with self._lock:
            return dict(self._sent)

    def dropped(self) -> dict[Kind, int]:
        """Messages lost so far, by kind: no room, too old, or discarded."""
        with self._lock:
            return dict(self._dropped)

    def _now_s(self) -> float:
        return self._clock()

    def _depth(self) -> int:
        return sum(map(len, self._waiting.values())) + len(self._in_flight)

    def _add(self, entry: Entry) -> None:
        self._waiting[entry.kind].append(entry)
        self._bytes += entry.size

    def _remove(self, entries: list[Entry]) -> None:
        """Take entries out of those that wait."""
        for kind in {entry.kind for entry in entries}:
            ids, queue = {entry.id for entry in entries if entry.kind is kind}, self._waiting[kind]
            while queue and queue[0].id in ids:
                ids.remove(queue.popleft().id)
            if ids:
                self._waiting[kind] = deque(entry for entry in queue if entry.id not in ids)

    def _put_back(self, entries: list[Entry]) -> None:
        for entry in entries:
            del self._in_flight[entry.id]
        for kind in {entry.kind for entry in entries}:
            back = sorted((entry for entry in entries if entry.kind is kind), key=by_id)
            self._waiting[kind] = deque(heapq.merge(back, self._waiting[kind], key=by_id))

    def _takeable(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        """Of the waiting entries, oldest first, those that may be taken now."""
        return entries

    def _fetched(self, taken: list[Entry]) -> list[tuple[Entry, Envelope]]:
        """Entries with what is to be sent."""
        return [(entry, entry.envelope) for entry in taken if entry.envelope is not None]

    def _marked(self, entry: Entry, envelope: Envelope) -> Envelope:
        is_late = entry.is_old or self._now_s() - entry.born_s > LATE_S
        return msgspec.structs.replace(envelope, historical=True) if is_late else envelope

    def _finish(self, message_id: int) -> Entry:
        entry = self._in_flight.pop(message_id)
        self._forget(entry)
        return entry

    def _forget(self, entry: Entry) -> None:
        entry.is_gone = True
        self._bytes -= entry.size

    def _drop(self, entries: list[Entry]) -> None:
        """Lose waiting entries."""
        self._remove(entries)
        for entry in entries:
            self._forget(entry)
            self._dropped[entry.kind] += 1

    def _expire(self) -> None:
        """Drop what has waited for too long."""
        now_s = self._now_s()
        for kind, queue in self._waiting.items():
            while queue and now_s - queue[0].born_s > self._limits.max_age_s(kind):
                self._drop([queue[0]])

    def _make_room(self, entry: Entry) -> bool:
        """Drop waiting messages that are no more important than the entry until it fits; whether it does."""
        if entry.size > self._limits.bytes:
            return False
        while self._is_full(entry):
            lesser = LEAST_IMPORTANT_FIRST[: LEAST_IMPORTANT_FIRST.index(entry.kind) + 1]
            victims = next(filter(None, (self._victims(kind, entry) for kind in lesser)), None)
            if victims is None:
                return False
            self._drop(victims)
        return True

    def _is_full(self, entry: Entry) -> bool:
        return self._depth() >= self._limits.messages or self._bytes + entry.size > self._limits.bytes

    def _victims(self, kind: Kind, _entry: Entry) -> list[Entry]:
        """Which of a kind make room for an entry."""
        queue = self._waiting[kind]
        return thinned(queue) if kind is Kind.TELEMETRY else list(itertools.islice(queue, 1))


def thinned(telemetry: Iterable[Entry]) -> list[Entry]:
    """Every second one, so that what is left still spans the whole time; of a single one itself."""
    entries = list(telemetry)
    return entries[1::2] or entries

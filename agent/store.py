"""The durable outbox: what `outbox.py` keeps in memory, kept on disk by a thread of its own.

`put` never waits for the disk. A thread writes all that came since its last turn in one commit and so deletes what was
delivered meanwhile; SQLite has then had the disk flush it. A final or an event is `stored` once that commit has
returned, and only then can be taken to be sent. Telemetry is written when a batch of it could not be sent, and when the
agent stops. After that a message lies on disk alone; memory holds its place in the order, 200 bytes or so.

While the disk takes nothing (full, read-only, gone) messages are kept in memory, up to MEMORY_BYTES by the same policy,
and sent from there; the disk is tried again every few seconds.
"""

from __future__ import annotations

import itertools
import logging
import os
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from whisperlet.errors import ConfigError

from .messages import Envelope, Kind
from .outbox import Entry, Limits, MemoryOutbox, thinned, uptime_s
from .pending import Pending
from .spool import Spool, SpoolDamaged, lock_folder, open_spool

FILE = "outbox.db"
TELEMETRY_BATCH = 20  # ten minutes of it, in one commit
DELETE_BATCH = 100
MEMORY_BYTES = 4_000_000  # of messages that are not on disk yet
IDLE_S = 20.0  # the longest sleep
WRITE_S = 120.0  # that a tired card may take for a commit
CLOSE_TIMEOUT_S = 10.0  # for a disk that hangs

logger = logging.getLogger(__name__)


class DurableOutbox(MemoryOutbox):
    """Outbox that outlives the process, in `folder`, which it has for itself.

    `on_event(name, detail)` is called from the outbox's thread, and from `start`.
    """

    def __init__(
        self,
        folder: Path,
        limits: Limits,
        on_event: Callable[[str, str], None],
        *,
        clock: Callable[[], float] = uptime_s,
        beat: Callable[[float], None] = lambda _within_s: None,
        delete_after_s: float = 15.0,
        retry_s: float = 5.0,
    ) -> None:
        super().__init__(limits, clock=clock)
        self._folder = folder
        self._on_event, self._beat = on_event, beat
        self._delete_after_s = delete_after_s
        self._retry_s = retry_s
        self._lock_descriptor: int | None = None
        self._spool: Spool | None = None
        self._was_opened = False
        # Guarded by the lock:
        self._pending = Pending()
        self._deletes: dict[int, float] = {}  # on disk, but delivered or dropped: id, since when
        self._offset_s = 0.0  # of our clock, which goes on from what the file says
        self._trouble = ""
        self._retry_at_s = 0.0  # time.monotonic()
        self._is_unreadable = False
        self._is_closing = False
        self._restored: Counter[Kind] = Counter()
        self._work = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="outbox", daemon=True)

    def start(self) -> None:
        """Open the file and begin to write. Raises ConfigError if another agent has the folder."""
        try:
            self._open()
        except (OSError, sqlite3.Error, SpoolDamaged) as error:
            self._suffer(error)
        self._thread.start()

    def close(self) -> None:
        """Write what is to be written, and let go of the file."""
        with self._work:
            self._is_closing = True
            self._work.notify_all()
        if self._thread.ident is not None:
            self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.error("the disk hangs, so the outbox was left as it is")
            return
        self._close_spool()
        if self._lock_descriptor is not None:
            os.close(self._lock_descriptor)
            self._lock_descriptor = None

    def flush(self, timeout_s: float) -> bool:
        """Wait until all finals and events so far are on disk; returns whether they are."""
        with self._work:
            last = self._last_id
            return self._work.wait_for(lambda: min(self._pending.finals, default=last + 1) > last, timeout_s)

    def restored(self) -> dict[Kind, int]:
        """Messages found from an earlier run, by kind."""
        with self._lock:
            return dict(self._restored)

    @property
    def trouble(self) -> str:
        """What keeps messages from being stored; empty if nothing does."""
        return self._trouble

    def commit(self) -> bool:
        """Write what waits to be written; returns whether it is on disk. For the outbox's own thread, and tests."""
        with self._lock:
            entries = [*self._pending.finals.values()]
            entries += self._pending.telemetry.values() if self._is_batch_due() else ()
            inserts = [(entry, entry.envelope) for entry in entries if entry.envelope is not None]
            deletes = list(self._deletes)
        try:
            self._opened().commit(inserts, deletes)
        except (OSError, sqlite3.Error, ConfigError, SpoolDamaged) as error:
            self._suffer(error)
            return False
        self._settle(entries, deletes)
        return True

    def _run(self) -> None:
        while self._wait_for_work():
            if self._is_unreadable and time.monotonic() >= self._retry_at_s:
                self._close_spool()  # to open it again finds what is wrong
            self.commit()
        if (self._pending or self._deletes) and not self.commit():
            logger.error("stopped with %d messages that could not be stored", len(self._pending))

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to write; returns False when the outbox is being closed."""
        with self._work:
            while not self._is_closing and (wait_s := self._due_in_s()) > 0:
                self._beat(IDLE_S)
                self._work.wait(min(wait_s, IDLE_S))
            self._beat(WRITE_S)
            return not self._is_closing

    def _due_in_s(self) -> float:
        now_s = time.monotonic()
        if self._trouble:
            return self._retry_at_s - now_s
        if self._pending.finals or self._is_batch_due() or len(self._deletes) >= DELETE_BATCH:
            return 0.0
        if self._is_unreadable:
            return self._retry_at_s - now_s
        return next(iter(self._deletes.values()), now_s + threading.TIMEOUT_MAX / 2) + self._delete_after_s - now_s

    def _is_batch_due(self) -> bool:
        return len(self._pending.telemetry) >= TELEMETRY_BATCH or self._is_closing

    def _opened(self) -> Spool:
        """The file, opened if it is not open, or is no longer where it was."""
        if self._spool is not None and not self._spool.is_in_place():
            self._close_spool()
        return self._spool or self._open()

    def _open(self) -> Spool:
        """Raises ConfigError, OSError, sqlite3.Error or SpoolDamaged."""
        if self._lock_descriptor is None:
            self._lock_descriptor = lock_folder(self._folder)
        spool, found, complaint = open_spool(self._folder / FILE)
        try:
            with self._lock:
                n_lost = self._reconcile(found) if self._was_opened else self._adopt(spool, found)
        except BaseException:
            spool.close()
            raise
        self._spool, self._was_opened, self._is_unreadable = spool, True, False
        self._retry_at_s = time.monotonic() + self._retry_s
        if complaint or n_lost:
            self._on_event("outbox_damaged", complaint or f"the file is not the same any more; {n_lost} messages lost")
        return spool

    def _adopt(self, spool: Spool, found: list[Entry]) -> int:
        """Take over what an earlier run left; it is older than what came before the file could be opened."""
        if not found:
            return 0
        if self._last_id and found[-1].id > 0:
            spool.lower(by := found[-1].id)
            for entry in found:
                entry.id -= by
        self._last_id = max(self._last_id, found[-1].id)
        ahead_s = max(entry.born_s for entry in found) - self._now_s()
        self._offset_s += ahead_s
        self._pending.shift(ahead_s)
        for entry in reversed(found):
            self._waiting[entry.kind].appendleft(entry)
            self._bytes += entry.size
            self._restored[entry.kind] += 1
        return 0  # that it knows of

    def _reconcile(self, found: list[Entry]) -> int:
        """Face what is left in a file that was opened again; returns how many messages are lost."""
        ids, now_s = {entry.id for entry in found}, time.monotonic()
        waiting = [entry for queue in self._waiting.values() for entry in queue]
        for entry in (*waiting, *self._in_flight.values()):
            if entry.on_disk and entry.id not in ids and entry.envelope is not None:
                self._pending.add(entry)
        self._drop(lost := [entry for entry in waiting if entry.envelope is None and entry.id not in ids])
        strangers = ids.difference(self._in_flight, (entry.id for entry in waiting))
        self._deletes = {n: self._deletes.get(n, now_s) for n in sorted(strangers)}
        return len(lost)

    def _close_spool(self) -> None:
        spool, self._spool = self._spool, None
        if spool is not None:
            spool.close()

    def _suffer(self, error: Exception) -> None:
        """Go on in memory, and try again later."""
        if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_FULL:
            self._close_spool()
        with self._lock:
            is_new, self._trouble = not self._trouble, str(error)
            self._retry_at_s = time.monotonic() + self._retry_s
        if is_new:
            self._on_event("outbox_not_stored", f"{self._folder / FILE}: {error}; messages are kept in memory")
        self._on_ready()

    def _settle(self, entries: list[Entry], deletes: list[int]) -> None:
        """Note what a commit has done."""
        with self._work:
            for entry in entries:
                self._pending.discard(entry)
                entry.on_disk = True
                if entry.is_gone:
                    self._deletes[entry.id] = time.monotonic()
                elif entry.id not in self._in_flight:
                    entry.envelope = None
            for n in deletes:
                self._deletes.pop(n, None)
            trouble, self._trouble = self._trouble, ""
            self._work.notify_all()
        if trouble:
            self._on_event("outbox_stored_again", f"{len(entries)} messages that were kept in memory, after: {trouble}")
        self._on_ready()

    def _now_s(self) -> float:
        return super()._now_s() + self._offset_s

    def _add(self, entry: Entry) -> None:
        super()._add(entry)
        self._pending.add(entry)
        self._work.notify_all()

    def _forget(self, entry: Entry) -> None:
        super()._forget(entry)
        self._pending.discard(entry)
        if entry.on_disk:
            self._deletes[entry.id] = time.monotonic()
            self._work.notify_all()

    def _takeable(self, entries: Iterable[Entry]) -> Iterable[Entry]:
        is_readable = self._spool is not None and not self._is_unreadable
        if self._trouble:
            return (entry for entry in entries if is_readable or entry.envelope is not None)
        first = min(self._pending.finals, default=self._last_id + 1)
        return itertools.takewhile(lambda e: e.id < first and (is_readable or e.envelope is not None), entries)

    def _fetched(self, taken: list[Entry]) -> list[tuple[Entry, Envelope]]:
        spool, found = self._spool, {}
        if spool is not None and (ids := [entry.id for entry in taken if entry.envelope is None]):
            found = spool.read(ids)
        with self._work:
            for n, entry in enumerate(taken):
                entry.envelope = entry.envelope or found.get(entry.id)  # kept while it is in flight
                if entry.envelope is None:
                    self._put_back(taken[n:])
                    self._is_unreadable = True
                    self._work.notify_all()
                    taken = taken[:n]
                    break
        return super()._fetched(taken)

    def _is_full(self, entry: Entry) -> bool:
        return super()._is_full(entry) or self._is_memory_full(entry)

    def _is_memory_full(self, entry: Entry) -> bool:
        return self._pending.bytes + entry.size > MEMORY_BYTES

    def _victims(self, kind: Kind, entry: Entry) -> list[Entry]:
        if not self._is_memory_full(entry):
            return super()._victims(kind, entry)
        in_memory = [waiting for waiting in self._waiting[kind] if not waiting.on_disk]
        return thinned(in_memory) if kind is Kind.TELEMETRY else in_memory[:1]

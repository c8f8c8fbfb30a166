"""The outbox's file: an SQLite database with one row a message, each under a checksum.

SQLite itself outlives a kill or a power cut in the middle of a write. It does not notice every byte that a worn-out
card returns wrongly; the checksums do. A file that cannot be trusted is set aside under another name, and what
can still be read of it goes into a fresh one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import zlib
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from whisperlet.errors import ConfigError

from .messages import Envelope, Kind
from .outbox import Entry, size_of

VERSION = 1  # of the format, in `PRAGMA user_version`
KEEP_ASIDE = 3  # damaged files; the oldest goes
LOGS = ("-wal", "-shm")  # files beside the file
WAL_LIMIT_BYTES = 4 << 20  # of the log that comes beside the file
# What the machine may be able to do later; any other error means that the file is not what it should be.
PASSING = frozenset(
    (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_AUTH,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_INTERRUPT,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOLFS,
    )
)
SELECT = "SELECT id, kind, topic, qos, retain, born_s, payload, crc FROM messages"
ROW = "INTO messages (id, kind, topic, qos, retain, born_s, payload, crc) VALUES (?, ?, ?, ?, ?, ?, ?, ?)"
SCHEMA = """
CREATE TABLE messages (
    id INTEGER PRIMARY KEY, kind TEXT, topic TEXT, qos INTEGER, retain INTEGER, born_s REAL, payload BLOB, crc INTEGER
)
"""


class SpoolDamaged(Exception):
    """The file is not what was written."""


class Spool:
    """An open file. One thread commits, another may read meanwhile.

    Raises SpoolDamaged, or what else SQLite says, as does each call but `close`.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._identity = path, _create(path)
        self._lock = threading.Lock()  # guards the reader
        self._writer = _connect(path)
        self._reader = _connect(path)
        try:
            with damage():
                self._set_up()
        except BaseException:
            self.close()
            raise

    def _set_up(self) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = FULL", f"journal_size_limit = {WAL_LIMIT_BYTES}"):
            self._writer.execute(f"PRAGMA {pragma}")
        if (version := self._writer.execute("PRAGMA user_version").fetchone()[0]) not in (0, VERSION):
            raise SpoolDamaged(f"its format is {version}, not {VERSION}")
        if (verdict := self._writer.execute("PRAGMA quick_check(1)").fetchone()[0]) != "ok":
            raise SpoolDamaged(" ".join(str(verdict).split()))
        if version == 0:
            with self._transaction():
                self._writer.execute(SCHEMA)
                self._writer.execute(f"PRAGMA user_version = {VERSION}")

    def entries(self) -> list[Entry]:
        """All messages, oldest first; their envelopes stay in the file."""
        with damage():
            return [_entry(values) for values in self._writer.execute(f"{SELECT} ORDER BY id")]

    def commit(self, inserts: Iterable[tuple[Entry, Envelope]], deletes: Iterable[int]) -> None:
        """Write and delete; done for good when this returns."""
        rows = (_values(entry.id, entry.born_s, envelope) for entry, envelope in inserts)
        with self._transaction():
            self._writer.executemany(f"INSERT OR REPLACE {ROW}", rows)
            self._writer.executemany("DELETE FROM messages WHERE id = ?", ((n,) for n in deletes))

    def lower(self, by: int) -> None:
        """Subtract from every id."""
        with self._transaction():
            self._writer.execute("UPDATE messages SET id = id - ?", (by,))

    def read(self, ids: Iterable[int]) -> dict[int, Envelope]:
        """Messages by id, up to the first that is missing or damaged."""
        found: dict[int, Envelope] = {}
        with self._lock, contextlib.suppress(SpoolDamaged, sqlite3.Error):
            for n in ids:
                values = self._reader.execute(f"{SELECT} WHERE id = ?", (n,)).fetchone()
                if values is None:
                    break
                found[n] = _envelope(values)
        return found

    def save_from(self, path: Path) -> int:
        """Copy what can be read of a damaged file, from its two ends; returns the number of messages."""
        with contextlib.closing(_connect(path)) as damaged, self._transaction():
            for order in ("ASC", "DESC"):
                with contextlib.suppress(sqlite3.Error):
                    for values in damaged.execute(f"{SELECT} ORDER BY id {order}"):
                        with contextlib.suppress(SpoolDamaged):
                            _envelope(values)  # or it is not worth keeping
                            self._writer.execute(f"INSERT OR IGNORE {ROW}", values)
            return int(self._writer.execute("SELECT count(*) FROM messages").fetchone()[0])

    def is_in_place(self) -> bool:
        """Whether the file is still the one at its path; what is written to one that was deleted is lost."""
        try:
            return _identity(self._path.stat()) == self._identity
        except OSError:
            return False

    def close(self) -> None:
        """Let go of the file; all that was committed is in it."""
        with self._lock:
            self._reader.close()
        with contextlib.suppress(sqlite3.Error):
            self._writer.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._writer.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._writer.execute("ROLLBACK")
            raise


def open_spool(path: Path) -> tuple[Spool, list[Entry], str]:
    """The file, made if it is not there, and what is in it; and what had to be done about a damaged one.

    Raises OSError or sqlite3.Error if there is no way to have a file now.
    """
    try:
        return *_opened(path), ""
    except SpoolDamaged as damaged:
        aside = set_aside(path)
        spool = Spool(path)
        try:
            n_saved = spool.save_from(aside)
            return spool, spool.entries(), f"{damaged}; set aside as {aside.name}, {n_saved} messages saved"
        except BaseException:
            spool.close()
            raise


def _opened(path: Path) -> tuple[Spool, list[Entry]]:
    spool = Spool(path)
    try:
        return spool, spool.entries()
    except BaseException:
        spool.close()
        raise


def set_aside(path: Path) -> Path:
    """Rename a damaged file and its log; of all that were set aside, the newest few are kept."""
    stem = f"{path.name}.corrupt-"
    name = stem + datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    while (aside := path.with_name(name)).exists():
        name += "x"  # the same second
    path.rename(aside)
    for suffix in LOGS:
        with contextlib.suppress(FileNotFoundError):
            path.with_name(path.name + suffix).rename(aside.with_name(name + suffix))
    others = sorted(file for file in path.parent.glob(stem + "*") if not file.name.endswith((*LOGS, name)))
    for old in others[: max(0, len(others) - KEEP_ASIDE + 1)]:
        for suffix in ("", *LOGS):
            old.with_name(old.name + suffix).unlink(missing_ok=True)
    return aside


def lock_folder(folder: Path) -> int:
    """Keep other agents out of a folder, made if it is not there, until the descriptor that is returned is closed.

    Raises ConfigError if one is in there, OSError if there is no way to tell.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(folder / "outbox.lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode(errors="replace").strip() or "?"
        os.close(descriptor)
        raise ConfigError(f"outbox.dir: {folder}: another agent, process {holder}, keeps its messages there") from None
    except BaseException:
        os.close(descriptor)
        raise
    with contextlib.suppress(OSError):  # a full disk; the lock is what counts
        os.truncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


@contextlib.contextmanager
def damage() -> Iterator[None]:
    """Tell a damaged file from a disk that is full, gone or not ours."""
    try:
        yield
    except sqlite3.Error as error:
        if getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF in PASSING:
            raise
        raise SpoolDamaged(str(error)) from None


def _create(path: Path) -> tuple[int, int]:
    """Make sure of a file that nobody else may read, and say which; SQLite gives its log the same mode."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.fchmod(descriptor, 0o600)
        identity = _identity(os.fstat(descriptor))
    finally:
        os.close(descriptor)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return identity


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino


def _connect(path: Path) -> sqlite3.Connection:
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False)


def _values(message_id: int, born_s: float, envelope: Envelope) -> tuple[Any, ...]:
    fields = (envelope.kind.value, envelope.topic, envelope.qos, int(envelope.retain), born_s, envelope.payload)
    return message_id, *fields, _crc(fields)


def _envelope(values: tuple[Any, ...]) -> Envelope:
    """Message of a row. Raises SpoolDamaged."""
    message_id, *fields, crc = values
    if _crc(fields) != crc:
        raise SpoolDamaged(f"message {message_id} does not fit its checksum")
    kind, topic, qos, retain, _, payload = fields
    if kind not in set(Kind):
        raise SpoolDamaged(f"message {message_id} is of the unknown kind {kind!r}")
    return Envelope(topic, payload, Kind(kind), qos, retain=bool(retain))


def _entry(values: tuple[Any, ...]) -> Entry:
    envelope = _envelope(values)
    return Entry(values[0], envelope.kind, size_of(envelope), values[5], None, on_disk=True, is_old=True)


def _crc(fields: Iterable[Any]) -> int:
    """Over everything but the id, which `lower` changes."""
    return zlib.crc32(msgspec.msgpack.encode(list(fields)))

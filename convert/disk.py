"""What lies on the disk: hashes of it, putting it there for good, one run at a time, and none left."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from whisperlet.errors import ConfigError, WhisperletError

_Stored = TypeVar("_Stored")
_POLL_S = 0.5
_WORK = ".work-"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_FULL_TEXTS = ("No space left on device", "os error 28", "Disk quota exceeded")  # of libraries without an errno
_LITTLE = 1 << 20  # bytes; a library that fails to write with less than this left has filled the disk


def read_json(path: Path, kind: type[_Stored], what: str) -> _Stored:
    """What was stored as JSON. Raises ConfigError if it cannot be read or is no such thing."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: is no {what}: {error}") from None


def hash_json(value: Any) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).hexdigest()


def hash_path(path: Path) -> str:
    """SHA-256 of a file's content, or of a folder's as `hash_folder` has it."""
    if path.is_dir():
        return hash_folder(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_folder(folder: Path, leave_out: str = "") -> str:
    """SHA-256 over names and content of all files in a folder and those below it."""
    files = {str(path.relative_to(folder)): path for path in _files(folder)}
    return hash_json({name: hash_path(path) for name, path in files.items() if name != leave_out})


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync(folder: Path) -> None:
    """Return when everything in the folder is on the disk for good."""
    for path in [*_files(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder]:
        _sync(path)


def sync_entry(path: Path) -> None:
    """Return when the name of a file or folder is on the disk for good."""
    _sync(path.parent)


def _sync(path: Path) -> None:
    with _opened(path) as descriptor:
        os.fsync(descriptor)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name to write a file under, which takes the place of `path` once it is whole, or goes."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def locked(path: Path, wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock, which ends with the process; `wait` is called again and again while another process holds it."""
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                wait()
                time.sleep(_POLL_S)
        yield


@contextmanager
def workplace(parent: Path) -> Iterator[Path]:
    """A folder below `parent` to work in, which goes with the run; one that a killed run has left goes now."""
    with _opened(parent) as entrance:
        fcntl.flock(entrance, fcntl.LOCK_EX)  # nobody clears up between a folder's making and its lock
        for left in parent.glob(f"{_WORK}*"):
            _clear_up(left)
        made = tempfile.TemporaryDirectory(prefix=_WORK, dir=parent)
        mine = os.open(made.name, os.O_RDONLY)
        fcntl.flock(mine, fcntl.LOCK_EX)
    try:
        with made:
            yield Path(made.name)
    finally:
        os.close(mine)


def _clear_up(left: Path) -> None:
    """Remove a folder that no process works in; another user's stays."""
    with suppress(BlockingIOError, FileNotFoundError, PermissionError), _opened(left) as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(left)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check_room(folder: Path, n_bytes: int, what: str) -> None:
    """Raise ConfigError if less than that is free, before any work is done."""
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise ConfigError(
            f"{folder}: the disk is too full for {what}, which needs about {n_bytes / 1e6:.0f} MB of the "
            f"{free / 1e6:.0f} MB that are free; {_ADVICE}"
        )


_ADVICE = "free some space, or set WHISPERLET_CACHE to a folder on another disk, and run the same command again"


@contextmanager
def explained(folder: Path, what: str) -> Iterator[None]:
    """Turn whatever a library raises on a full disk into a ConfigError."""
    try:
        yield
    except WhisperletError:
        raise
    except Exception as error:
        if _is_full(error, folder):
            raise ConfigError(f"{folder}: the disk is full, so {what} had to stop; {_ADVICE}") from error
        raise


def _is_full(error: BaseException, folder: Path) -> bool:
    told = (isinstance(error, OSError) and error.errno in _FULL) or any(text in str(error) for text in _FULL_TEXTS)
    untold = isinstance(error, OSError | RuntimeError) and folder.is_dir() and shutil.disk_usage(folder).free < _LITTLE
    cause = error.__cause__ or error.__context__
    return told or untold or (cause is not None and _is_full(cause, folder))

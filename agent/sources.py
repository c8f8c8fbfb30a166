"""Where audio comes from: a file, a directory of files, standard input or a microphone, all alike to the reader."""

from __future__ import annotations

import io
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np

from whisperlet.audio import Pcm16, samples, seconds
from whisperlet.errors import AudioError

from .audio_files import audio_paths, read_blocks, read_file
from .config import SourceConfig
from .messages import AudioChunk
from .reopening import ReopeningMicrophone
from .ring import SourceCounters

__all__ = ["AudioFiles", "Paced", "RawPcm", "Source", "SourceCounters", "open_source", "paced", "read_file"]

PAUSE = samples(1500)  # of silence after each of a directory's clips: what was said ends there, as before a microphone
POLL_S = 0.1  # how soon a reader of a silent pipe notices that it was closed


class Source(Protocol):
    """Audio as chunks of 16 kHz mono, each with the index of its first sample since the source was opened."""

    @property
    def counters(self) -> SourceCounters:
        """What was lost so far."""

    def __iter__(self) -> Iterator[AudioChunk]:
        """Chunks until the end of the audio or until `close`. Raises AudioError."""

    def close(self) -> None:
        """Let go of the device or file; a reader in another thread comes to its end. May be called again."""


def open_source(
    name: str,
    config: SourceConfig,
    *,
    on_event: Callable[[str, str], None] = lambda _name, _detail: None,
    beat: Callable[[float], None] = lambda _within_s: None,
    must_exist: bool = True,
    stdin: BinaryIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Source:
    """Source for "mic", "-" (raw PCM on standard input), a file or a directory. Raises AudioError.

    `on_event`, `beat` and `must_exist` are for the microphone, see `ReopeningMicrophone`.
    """
    if name == "mic":
        return ReopeningMicrophone(config, on_event, must_exist=must_exist, beat=beat)
    if name == "-":
        return RawPcm(stdin or sys.stdin.buffer, config.chunk_ms, clock)
    return AudioFiles(audio_paths(Path(name)), config.chunk_ms, clock, pause=PAUSE if Path(name).is_dir() else 0)


class AudioFiles:
    """Files one after the other, each followed by `pause` samples of silence, as fast as they are read."""

    def __init__(
        self, paths: list[Path], chunk_ms: int, clock: Callable[[], float] = time.monotonic, *, pause: int = 0
    ) -> None:
        self.counters = SourceCounters()
        self._paths = paths
        self._chunk = samples(chunk_ms)
        self._clock = clock
        self._pause = pause
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[AudioChunk]:
        """Chunks without a gap."""
        start = 0
        for pcm in rechunked(self._blocks(), self._chunk):
            if self._closed.is_set():
                return
            yield AudioChunk(pcm, start, self._clock())
            start += len(pcm)

    def close(self) -> None:
        """Stop before the next chunk."""
        self._closed.set()

    def _blocks(self) -> Iterator[Pcm16]:
        for path in self._paths:
            yield from read_blocks(path)
            yield np.zeros(self._pause, np.int16)


class RawPcm:
    """A stream of raw 16-bit little-endian mono samples at 16 kHz, such as `arecord -t raw` writes to a pipe."""

    def __init__(self, stream: BinaryIO, chunk_ms: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.counters = SourceCounters()
        self._stream = stream
        self._chunk = samples(chunk_ms)
        self._clock = clock
        self._closed = threading.Event()

    def __iter__(self) -> Iterator[AudioChunk]:
        """Chunks until the writer closes its end; half a sample at the end is left out."""
        start = 0
        for pcm in rechunked(whole_samples(self._pieces()), self._chunk):
            yield AudioChunk(pcm, start, self._clock())
            start += len(pcm)
        if start == 0 and not self._closed.is_set():
            raise AudioError("standard input: holds no audio")

    def close(self) -> None:
        """Stop waiting for the writer."""
        self._closed.set()

    def _pieces(self) -> Iterator[bytes]:
        n_bytes = 2 * self._chunk
        while not self._closed.is_set():
            piece = self._read(n_bytes)
            if piece == b"":
                return
            if piece is not None:
                yield piece

    def _read(self, n_bytes: int) -> bytes | None:
        """Read what is there now, b"" at the end, None if nothing came for a while."""
        try:
            descriptor = self._stream.fileno()
        except io.UnsupportedOperation:  # a stream in memory never waits
            return self._stream.read(n_bytes)
        ready, _, _ = select.select([descriptor], [], [], POLL_S)
        return os.read(descriptor, n_bytes) if ready else None


class Paced:
    """Any source at the pace of a microphone: a chunk comes when its last sample would have been captured."""

    def __init__(self, source: Source, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._source = source
        self._clock = clock
        self._sleep = sleep

    @property
    def counters(self) -> SourceCounters:
        """Those of the source."""
        return self._source.counters

    def __iter__(self) -> Iterator[AudioChunk]:
        """Yield the source's chunks; a reader that was late gets the next ones at once, with the time they were due."""
        opened_s = self._clock()
        for chunk in self._source:
            due_s = opened_s + seconds(chunk.end)
            wait_s = due_s - self._clock()
            if wait_s > 0:
                self._sleep(wait_s)
            yield AudioChunk(chunk.samples, chunk.start, due_s)

    def close(self) -> None:
        """Close the source."""
        self._source.close()


def paced(
    source: Source, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
) -> Source:
    """`source` in real time, by this clock."""
    return Paced(source, clock, sleep)


def rechunked(pieces: Iterable[Pcm16], size: int) -> Iterator[Pcm16]:
    """Yield the same samples in pieces of `size`; the last one may be shorter."""
    rest = np.zeros(0, np.int16)
    for piece in pieces:
        audio = np.concatenate([rest, piece])
        n_whole = len(audio) // size * size
        yield from audio[:n_whole].reshape(-1, size)
        rest = audio[n_whole:]
    if len(rest):
        yield rest


def whole_samples(pieces: Iterable[bytes]) -> Iterator[Pcm16]:
    """Little-endian 16-bit samples from bytes that were cut anywhere."""
    odd = b""
    for piece in pieces:
        data = odd + piece
        n_whole = len(data) // 2 * 2
        yield np.frombuffer(data[:n_whole], "<i2").astype(np.int16)
        odd = data[n_whole:]

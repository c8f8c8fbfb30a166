"""What stands between PortAudio's thread and the reader: a bounded ring, and the count of what was lost."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(slots=True)
class SourceCounters:
    """What a source lost; only a microphone can."""

    dropped_samples: int = 0  # at 16 kHz, given up because the ring was full
    overflows: int = 0  # times PortAudio reported that audio was lost before it reached us
    faults: int = 0  # times the microphone was lost, or brought nothing but one number


class Block(NamedTuple):
    """What one callback brought, at the device's rate."""

    data: bytes  # int16, channels interleaved
    first_frame: int  # counted since the stream was opened
    n_frames: int
    arrived_s: float  # monotonic


class Ring:
    """Bounded buffer between PortAudio's thread and the reader: at the bound the oldest block gives way."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity  # frames
        self._blocks: deque[Block] = deque()
        self._held = 0  # frames
        self._next_frame = 0
        self._closed = False
        self._changed = threading.Condition()

    def put(self, data: bytes, n_frames: int, arrived_s: float) -> int:
        """Add a block; returns how many frames were dropped to make room."""
        dropped = 0
        with self._changed:
            while self._blocks and self._held + n_frames > self._capacity:
                oldest = self._blocks.popleft().n_frames
                self._held -= oldest
                dropped += oldest
            self._blocks.append(Block(data, self._next_frame, n_frames, arrived_s))
            self._next_frame += n_frames
            self._held += n_frames
            self._changed.notify()
        return dropped

    def get(self, timeout_s: float) -> Block | None:
        """Oldest block; None once the ring is closed. Raises TimeoutError."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closed or self._blocks, timeout_s):
                raise TimeoutError
            if self._closed:
                return None
            block = self._blocks.popleft()
            self._held -= block.n_frames
            return block

    def close(self) -> None:
        """Wake the reader for good."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

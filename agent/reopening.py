"""A microphone that heals: opened again when it is gone, busy, stuck, deaf, or at a rate that it did not promise."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Protocol

from whisperlet.audio import SAMPLE_RATE, Pcm16, seconds
from whisperlet.errors import AudioDeviceLost

from .config import SourceConfig
from .messages import AudioChunk
from .microphone import Microphone
from .ring import SourceCounters

OPENING_S = 30.0  # PortAudio asks every driver what it has, and a Bluetooth device takes its time to begin
STILL_MAX_S = 600.0  # the longest patience with a microphone that goes still by itself
CURED_S = 2.0  # audio that moves this soon after opening was brought back by it
OVERFLOW_NEWS_S = 60.0  # at least, between two events about audio that was lost on the way


class Device(Protocol):
    """An open microphone."""

    def __iter__(self) -> Iterator[AudioChunk]: ...

    def close(self) -> None:
        """Release it."""


class MicrophoneStill(AudioDeviceLost):
    """The microphone is open, and has brought the same number again and again."""


class ReopeningMicrophone:
    """A microphone that may be unplugged: reopened with growing patience, and `start` jumps by the time lost.

    `on_event` hears, in the reader's thread, "microphone_lost" or "microphone_silent", then "microphone_back" once for
    each, and "microphone_overflow". `beat(within_s)` hears that the reader is alive, also while there is no microphone.
    With `must_exist` the first opening happens here, so that its AudioError goes to the caller.
    """

    def __init__(
        self,
        config: SourceConfig,
        on_event: Callable[[str, str], None],
        *,
        must_exist: bool = True,
        beat: Callable[[float], None] = lambda _within_s: None,
        open_microphone: Callable[[SourceConfig, SourceCounters], Device] = Microphone,
    ) -> None:
        self.counters = SourceCounters()
        self._config = config
        self._on_event = on_event
        self._beat = beat
        self._open_microphone = open_microphone
        self._closing = threading.Event()
        self._swapping = threading.RLock()  # a signal's handler may come between, and close
        self._device: Device | None = None
        self._stillness = Stillness(config.silent_s)
        self._overflows = OverflowNews()
        self._fault: tuple[str, int] | None = None  # name of its event, and the sample after which it began
        self._end = 0  # index after the last sample
        self._end_s: float | None = None  # monotonic, when that one was captured
        if must_exist:
            self._opened()

    def __iter__(self) -> Iterator[AudioChunk]:
        """Chunks until `close`, from one device after the other."""
        retry_s = self._config.retry_s
        while not self._closing.is_set():
            try:
                for chunk in self._chunks():
                    retry_s = self._config.retry_s
                    self._note(chunk)
                    yield chunk
                    self._stillness.check()
                self._release()  # somebody closed the device
            except MicrophoneStill as error:
                self._begin_fault("microphone_silent", str(error))
                self._release()
            except AudioDeviceLost as error:
                self._begin_fault("microphone_lost", str(error))
                self._release()
                self._beat(retry_s)
                self._closing.wait(retry_s)
                retry_s = min(2 * retry_s, self._config.retry_max_s)

    def close(self) -> None:
        """Stop for good; a reader in another thread comes to its end. May be called again."""
        self._closing.set()
        self._release()

    def _note(self, chunk: AudioChunk) -> None:
        """Report what the chunk tells about the microphone."""
        self._stillness.add(chunk.samples)
        if self._fault and (self._fault[0] == "microphone_lost" or self._stillness.is_moving):
            lasted_s = seconds(chunk.start - self._fault[1])
            self._fault = None
            self._on_event("microphone_back", f"{lasted_s:.1f} s without audio")
        if news := self._overflows.news(self.counters, chunk.arrived_monotonic_s):
            self._on_event("microphone_overflow", news)

    def _begin_fault(self, name: str, detail: str) -> None:
        """Report a fault, once, also if it has taken another form: nothing is heard either way."""
        if self._fault is None or self._fault[0] != name:
            self._fault = name, self._fault[1] if self._fault else self._end
            self.counters.faults += 1
            self._on_event(name, detail)

    def _chunks(self) -> Iterator[AudioChunk]:
        """Chunks of one device, placed where they belong on the time line of all of them."""
        offset: int | None = None
        for chunk in self._device or self._opened():
            if offset is None:
                offset = self._end + self._lost_before(chunk) - chunk.start
            placed = AudioChunk(chunk.samples, chunk.start + offset, chunk.arrived_monotonic_s)
            self._end, self._end_s = placed.end, placed.arrived_monotonic_s
            yield placed

    def _lost_before(self, chunk: AudioChunk) -> int:
        """Count the samples that nobody heard between the last chunk of the old device and this one."""
        if self._end_s is None:
            return 0
        return max(0, round((chunk.arrived_monotonic_s - self._end_s) * SAMPLE_RATE) - len(chunk.samples))

    def _opened(self) -> Device:
        self._beat(OPENING_S)
        self._stillness.begin()
        device = self._open_microphone(self._config, self.counters)
        with self._swapping:
            self._device = device
        if self._closing.is_set():  # while it was being opened
            device.close()
        return device

    def _release(self) -> None:
        with self._swapping:
            device, self._device = self._device, None
        if device is not None:
            device.close()


class Stillness:
    """How long the audio has not moved at all. A live microphone hisses; one that is stuck repeats a number.

    Some go still by themselves where nobody speaks, echo cancellers for one: where opening again did not cure it, the
    next stillness is given twice as long.
    """

    def __init__(self, patience_s: float) -> None:
        self._least_s = self._patience_s = patience_s  # 0: for ever
        self._value: int | None = None
        self.begin()

    @property
    def is_moving(self) -> bool:
        """Whether the last chunk held more than one number."""
        return self._n_still == 0

    def begin(self) -> None:
        """Another device, or the same one opened again."""
        self._n_still = self._n_heard = 0  # samples

    def add(self, pcm: Pcm16) -> None:
        """Listen to a chunk."""
        value = int(pcm[0]) if len(pcm) and (pcm == pcm[0]).all() else None
        is_first_move = value is None and self._n_heard == self._n_still
        self._n_heard += len(pcm)
        self._n_still = 0 if value is None else len(pcm) + self._n_still * (value == self._value)
        self._value = value
        if is_first_move and seconds(self._n_heard) <= CURED_S:
            self._patience_s = self._least_s

    def check(self) -> None:
        """Raise MicrophoneStill once patience is at its end."""
        if self._patience_s and seconds(self._n_still) >= self._patience_s:
            still_s, self._patience_s = self._patience_s, min(2 * self._patience_s, STILL_MAX_S)
            raise MicrophoneStill(f"microphone: nothing but {self._value} for {still_s:g} s; muted, or stuck")


class OverflowNews:
    """Tells of audio that was lost on the way, at once, and then no more often than every `OVERFLOW_NEWS_S`."""

    def __init__(self) -> None:
        self._told = (0, 0)
        self._told_s: float | None = None  # monotonic

    def news(self, counters: SourceCounters, now_s: float) -> str | None:
        """What was lost since the last news, in a sentence."""
        counts = counters.overflows, counters.dropped_samples
        is_due = self._told_s is None or now_s - self._told_s >= OVERFLOW_NEWS_S
        if counts == self._told or not is_due:
            return None
        n_overflows, n_dropped = (now - told for now, told in zip(counts, self._told, strict=True))
        self._told, self._told_s = counts, now_s
        return f"{n_overflows} overflows of the driver, {seconds(n_dropped):.2f} s dropped while the gate was busy"

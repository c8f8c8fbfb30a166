"""The microphone, through PortAudio: a callback that only hands over to the ring. `reopening.py` has the patience."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from whisperlet.audio import PCM16_SCALE, SAMPLE_RATE, Float32, seconds
from whisperlet.errors import AudioDeviceLost, AudioError

from .config import SourceConfig
from .messages import AudioChunk
from .quiet import quiet_stderr
from .resampling import Resampler
from .ring import Block, Ring, SourceCounters

START_S = 5.0  # a Bluetooth or suspended device takes its time to begin
DEAD_S = 2.0  # a stream that brings nothing for this long has died, even if PortAudio has not noticed
RATE_WINDOW_S = 10.0  # over which the frames that came are counted against the clock
RATE_TOLERANCE = 0.05  # 44.1 kHz in place of 48 kHz is 8 % off; a busy machine, late by half a second, is not
NO_PYAUDIO = (
    "microphone: PyAudio is not installed: pip install 'whisperlet[mic]', "
    "which needs PortAudio's headers first: apt install portaudio19-dev"
)


class Microphone:
    """One open input device. Raises AudioDeviceLost where trying again may help, AudioError where it cannot."""

    def __init__(
        self,
        config: SourceConfig,
        counters: SourceCounters | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counters = counters or SourceCounters()
        self.name, self.rate, self.n_channels = "", 0, 0  # of the device itself
        self._clock = clock
        self._closing = threading.Lock()
        self._stream: Any = None
        pyaudio = _import_pyaudio()
        # PortAudio lists the devices once, when it starts: a microphone plugged in since then needs a fresh start
        self._portaudio = _started(pyaudio)
        try:
            self._open(find_device(self._portaudio, config.device), config, pyaudio)
        except OSError as error:  # a device that goes away while it is looked at
            self.close()
            raise AudioDeviceLost(f"microphone: {error.args[-1]}") from None
        except BaseException:
            self.close()
            raise

    def __iter__(self) -> Iterator[AudioChunk]:
        """Chunks from the opening of the device until `close`; raises AudioDeviceLost when no more come."""
        resampler, next_frame, start = Resampler(self.rate), 0, 0
        for block in self._blocks():
            if block.first_frame != next_frame:  # dropped at the ring: time went on
                resampler = Resampler(self.rate)
                start = round(block.first_frame * SAMPLE_RATE / self.rate)
            next_frame = block.first_frame + block.n_frames
            pcm = resampler(_deinterleaved(block, self.n_channels))
            lag_s = next_frame / self.rate - seconds(start + len(pcm))  # what the resampler still holds
            if len(pcm):
                yield AudioChunk(pcm, start, block.arrived_s - lag_s)
            start += len(pcm)

    def close(self) -> None:
        """Release the device; a reader in another thread comes to its end. May be called again."""
        with self._closing:
            if self._stream is not None:
                self._ring.close()
                with contextlib.suppress(OSError):  # a device that is gone may not even be closed
                    self._stream.close()
                self._stream = None
            if self._portaudio is not None:
                self._portaudio.terminate()
                self._portaudio = None

    def _open(self, device: dict[str, Any], config: SourceConfig, pyaudio: Any) -> None:
        self.name = device["name"]
        refusal: OSError | None = None
        for self.rate, self.n_channels in _formats(device):
            self._ring = Ring(round(config.ring_s * self.rate))
            try:
                self._stream = self._portaudio.open(
                    rate=self.rate,
                    channels=self.n_channels,
                    format=pyaudio.paInt16,
                    input=True,
                    input_device_index=device["index"],
                    frames_per_buffer=self.rate * config.chunk_ms // 1000,
                    stream_callback=self._callback(pyaudio),
                )
            except OSError as error:
                refusal = error
            else:
                return
        raise AudioDeviceLost(f"microphone {self.name!r}: cannot be opened: {refusal and refusal.args[-1]}")

    def _callback(self, pyaudio: Any) -> Callable[[bytes, int, Any, int], tuple[None, int]]:
        ring, counters, clock, rate = self._ring, self.counters, self._clock, self.rate

        def callback(data: bytes, n_frames: int, _times: Any, status: int) -> tuple[None, int]:
            counters.dropped_samples += ring.put(data, n_frames, clock()) * SAMPLE_RATE // rate
            counters.overflows += bool(status & pyaudio.paInputOverflow)
            return None, pyaudio.paContinue

        return callback

    def _blocks(self) -> Iterator[Block]:
        timeout_s, watch = START_S, RateWatch(self.rate)
        try:
            while (block := self._ring.get(timeout_s)) is not None:
                timeout_s = DEAD_S
                if found := watch.wrong(block, self.counters.overflows):
                    raise AudioDeviceLost(f"microphone {self.name!r}: {found:.0f} Hz where {self.rate} were promised")
                yield block
        except TimeoutError:
            raise AudioDeviceLost(f"microphone {self.name!r}: no audio for {timeout_s:g} s") from None


class RateWatch:
    """Finds out that a device brings more or less than it has promised, as some do after the system's rate changed."""

    def __init__(self, rate: int) -> None:
        self._rate = rate
        self._first: Block | None = None  # of the window
        self._overflows = 0  # until then

    def wrong(self, block: Block, overflows: int) -> float | None:
        """Frames per second over the last window, if they are not what was promised. Known losses do not count."""
        if self._first is None or overflows != self._overflows:
            self._first, self._overflows = block, overflows
        elapsed_s = block.arrived_s - self._first.arrived_s
        if elapsed_s < RATE_WINDOW_S:
            return None
        found = (block.first_frame - self._first.first_frame) / elapsed_s
        self._first = block
        return found if abs(found / self._rate - 1) > RATE_TOLERANCE else None


def _started(pyaudio: Any) -> Any:
    try:
        with quiet_stderr():  # ALSA and JACK name every device that is not there
            return pyaudio.PyAudio()
    except OSError as error:
        raise AudioDeviceLost(f"microphone: PortAudio does not start: {error.args[-1]}") from None


def find_device(portaudio: Any, wanted: str | int | None) -> dict[str, Any]:
    """PortAudio's description of the input device with this index or this part of its name.

    Raises AudioDeviceLost, which names the devices there are.
    """
    devices = [portaudio.get_device_info_by_index(i) for i in range(portaudio.get_device_count())]
    inputs: list[dict[str, Any]] = [device for device in devices if device["maxInputChannels"] > 0]
    if not inputs:
        raise AudioDeviceLost("microphone: this machine has no audio input device")
    for device in inputs:
        if _is_wanted(device, _default_index(portaudio) if wanted is None else wanted):
            return device
    names = ", ".join(f"{device['index']}: {device['name']}" for device in inputs)
    raise AudioDeviceLost(f"microphone {wanted!r}: no such input device; there are {names}")


def _is_wanted(device: dict[str, Any], wanted: str | int) -> bool:
    if isinstance(wanted, str) and not wanted.isdecimal():
        return wanted.casefold() in device["name"].casefold()
    return bool(device["index"] == int(wanted))


def _default_index(portaudio: Any) -> int:
    try:
        return int(portaudio.get_default_input_device_info()["index"])
    except OSError:
        raise AudioDeviceLost("microphone: no default input device; name one in source.device") from None


def _formats(device: dict[str, Any]) -> list[tuple[int, int]]:
    """Rates and channel counts to try, what needs no conversion first; many I2S microphones are stereo only."""
    rates = dict.fromkeys([SAMPLE_RATE, int(device["defaultSampleRate"])])
    return [(rate, n) for n in (1, 2) if n <= device["maxInputChannels"] for rate in rates]


def _deinterleaved(block: Block, n_channels: int) -> Float32:
    """Shape = (n_frames, n_channels), in [-1, 1)."""
    pcm = np.frombuffer(block.data, np.int16).reshape(-1, n_channels)
    return pcm.astype(np.float32) / np.float32(PCM16_SCALE)


def _import_pyaudio() -> Any:
    try:
        import pyaudio  # noqa: PLC0415 - an extra: files and pipes work without it
    except ImportError:
        raise AudioError(NO_PYAUDIO) from None
    return pyaudio

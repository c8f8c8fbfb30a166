"""The doctor's ear: whether the microphone brings audio, and how loud, clean and regular."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from whisperlet.audio import SAMPLE_RATE, Pcm16, seconds
from whisperlet.errors import AudioDeviceLost, AudioError

from .config import SourceConfig
from .findings import Finding, fail, ok, warn
from .messages import AudioChunk
from .microphone import RATE_TOLERANCE, Microphone
from .ring import SourceCounters

FULL_SCALE = 32_767
QUIET_DBFS, LOUD_DBFS = -75.0, -20.0  # of a room in which nobody shouts
CLIPPED_SHARE = 1e-4
OFFSET_SHARE = 0.05  # of full scale
WARM_UP_S = 0.5  # a device may begin with a click, and with what it had stored


class Device(Protocol):
    """A microphone that can tell what it is."""

    counters: SourceCounters
    name: str
    rate: int  # Hz, of the device itself
    n_channels: int

    def __iter__(self) -> Iterator[AudioChunk]: ...

    def close(self) -> None:
        """Release it."""


def examine(
    config: SourceConfig, duration_s: float, open_microphone: Callable[[SourceConfig], Device] = Microphone
) -> list[Finding]:
    """Listen for so many seconds. The microphone must not be in use by the service."""
    try:
        device = open_microphone(config)
    except AudioDeviceLost as error:
        advice = "plug it in, set source.device, or stop the service that has it: systemctl stop whisperlet-agent"
        return [fail("microphone", str(error), advice)]
    except AudioError as error:
        return [fail("microphone", str(error), "install what is missing")]
    try:
        pcm, took_s = _listen(device, WARM_UP_S + duration_s)
    except AudioDeviceLost as error:
        return [fail("microphone", str(error), "see that it is not suspended or muted, and that its cable is sound")]
    finally:
        device.close()
    found = f"{device.name}, {device.rate} Hz, {device.n_channels} channel{'s' if device.n_channels > 1 else ''}"
    return [
        ok("microphone", found),
        sample_rate(device.rate, seconds(len(pcm)), took_s),
        overruns(device.counters),
        level(pcm),
        clipping(pcm),
    ]


def _listen(device: Device, duration_s: float) -> tuple[Pcm16, float]:
    """Audio after the warm-up, and how long it took to come, seconds."""
    chunks: list[AudioChunk] = []
    for chunk in device:
        if seconds(chunk.start) >= WARM_UP_S:
            chunks.append(chunk)
        if seconds(chunk.end) >= duration_s:
            break
    if len(chunks) < 2:
        raise AudioDeviceLost("microphone: no audio came")
    took_s = chunks[-1].arrived_monotonic_s - chunks[0].arrived_monotonic_s + seconds(len(chunks[0].samples))
    return np.concatenate([chunk.samples for chunk in chunks]), took_s


def sample_rate(rate: int, heard_s: float, took_s: float) -> Finding:
    """Whether there is a voice's whole band, at the pace of the clock."""
    share = heard_s / took_s if took_s > 0 else math.inf
    if abs(share - 1) > RATE_TOLERANCE:
        advice = "another rate in the sound server's configuration, or another driver"
        return warn("sample rate", f"{rate} Hz promised, {share * rate:.0f} Hz came", advice)
    if rate < SAMPLE_RATE:
        return warn("sample rate", f"{rate} Hz", "a telephone's band costs accuracy: use 16 kHz or more")
    return ok("sample rate", f"{rate} Hz" if rate == SAMPLE_RATE else f"{rate} Hz, resampled to {SAMPLE_RATE} Hz")


def overruns(counters: SourceCounters) -> Finding:
    """Whether audio was lost on the way."""
    if counters.overflows or counters.dropped_samples:
        found = f"{counters.overflows} overflows, {seconds(counters.dropped_samples):.2f} s dropped"
        return warn("xruns", found, "set source.chunk_ms higher, a faster governor, or fewer recogniser.threads")
    return ok("xruns", "none")


def level(pcm: Pcm16) -> Finding:
    """Whether the microphone is alive, and its gain sensible for a room in which nobody shouts."""
    if (pcm == pcm[0]).all():
        return fail("level", f"nothing but {pcm[0]}", "it is muted or stuck: see its switch, and alsamixer")
    values = pcm.astype(np.float64)
    dbfs = 20 * math.log10(max(float(values.std()), 1e-9) / FULL_SCALE)
    offset = abs(float(values.mean())) / FULL_SCALE
    found = f"{dbfs:.0f} dBFS"
    if offset > OFFSET_SHARE:
        return warn("level", f"{found}, offset of {100 * offset:.0f} %", "a broken cable, or a microphone without bias")
    if dbfs < QUIET_DBFS:
        return warn("level", found, "very quiet: raise the capture gain in alsamixer, or speak while this runs")
    if dbfs > LOUD_DBFS:
        return warn("level", found, "very loud: lower the capture gain in alsamixer, unless somebody spoke")
    return ok("level", found)


def clipping(pcm: Pcm16) -> Finding:
    """Whether loud speech is cut off."""
    share = float(np.mean((pcm >= FULL_SCALE) | (pcm <= -FULL_SCALE)))
    if share > CLIPPED_SHARE and not (pcm == pcm[0]).all():
        return warn("clipping", f"{100 * share:.2f} % of the samples", "lower the capture gain in alsamixer")
    return ok("clipping", "none" if share == 0 else f"{100 * share:.3f} % of the samples")

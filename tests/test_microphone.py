"""The microphone's parts, with a made-up PyAudio for what real hardware does; `test_portaudio.py` has the real one."""

import itertools
import sys
import threading
import time

import numpy as np
import pytest

from agent.config import SourceConfig
from agent.messages import AudioChunk
from agent.microphone import Microphone, ReopeningMicrophone, find_device
from agent.ring import Ring, SourceCounters
from agent.sources import open_source
from whisperlet.audio import SAMPLE_RATE, samples, seconds
from whisperlet.errors import AudioDeviceLost, AudioError

# The ring


def test_ring_hands_over_in_order():
    ring = Ring(10)
    assert [ring.put(bytes([i]), 2, float(i)) for i in range(5)] == [0] * 5
    assert [ring.get(0).first_frame for _ in range(5)] == [0, 2, 4, 6, 8]
    with pytest.raises(TimeoutError):
        ring.get(0)


def test_ring_that_is_read_drops_nothing():
    ring = Ring(10)
    ring.put(b"", 4, 0.0)
    for _ in range(5):
        assert ring.put(b"", 4, 0.0) == 0
        ring.get(0)


def test_ring_drops_the_oldest_and_counts():
    ring = Ring(10)
    assert [ring.put(b"", n, 0.0) for n in (4, 4, 4, 2, 10)] == [0, 0, 4, 0, 10]
    block = ring.get(0)
    assert (block.first_frame, block.n_frames) == (14, 10)


def test_closing_the_ring_wakes_its_reader():
    ring = Ring(10)
    got = []
    reader = threading.Thread(target=lambda: got.append(ring.get(30)))
    reader.start()
    ring.close()
    reader.join(2)
    assert got == [None]


# A made-up PyAudio: what hardware refuses, and what only a real driver would do


class FakeStream:
    def __init__(self, callback):
        self.callback = callback
        self.is_closed = False

    def close(self):
        self.is_closed = True


class FakePyAudio:
    """A machine with a 48 kHz stereo microphone and a loudspeaker."""

    accepted = (48_000, 2)

    def __init__(self):
        self.paInt16, self.paContinue, self.paInputOverflow = 8, 0, 2
        self.terminated = False
        self.devices = [
            {"index": 0, "name": "Loudspeaker", "maxInputChannels": 0, "defaultSampleRate": 48_000.0},
            {"index": 1, "name": "USB Headset", "maxInputChannels": 2, "defaultSampleRate": 48_000.0},
        ]
        self.tried = []

    def PyAudio(self):  # noqa: N802 - PyAudio's name
        return self

    def get_device_count(self):
        return len(self.devices)

    def get_device_info_by_index(self, index):
        return self.devices[index]

    def get_default_input_device_info(self):
        return self.devices[1]

    def open(self, *, rate, channels, stream_callback, **_):
        self.tried.append((rate, channels))
        if (rate, channels) != self.accepted:
            raise OSError(-9985, "Device unavailable")
        self.stream = FakeStream(stream_callback)
        return self.stream

    def terminate(self):
        self.terminated = True


@pytest.fixture
def fake(monkeypatch):
    pyaudio = FakePyAudio()
    monkeypatch.setitem(sys.modules, "pyaudio", pyaudio)
    return pyaudio


def test_without_pyaudio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyaudio", None)
    with pytest.raises(AudioError, match=r"pip install 'whisperlet\[mic\]'.*portaudio19-dev") as refused:
        open_source("mic", SourceConfig())
    assert not isinstance(refused.value, AudioDeviceLost)


def test_a_machine_without_microphone(fake):
    del fake.devices[1]
    with pytest.raises(AudioError, match="no audio input device"):
        open_source("mic", SourceConfig())
    assert fake.terminated


@pytest.mark.parametrize("wanted", [None, 1, "1", "headset"])
def test_device_by_index_or_part_of_its_name(fake, wanted):
    assert find_device(fake, wanted)["index"] == 1


@pytest.mark.parametrize("wanted", [0, 7, "Loudspeaker", "webcam"])
def test_an_unknown_device_is_refused_with_those_there_are(fake, wanted):
    with pytest.raises(AudioDeviceLost, match="1: USB Headset"):
        find_device(fake, wanted)


def test_a_busy_device_is_lost_and_let_go(fake):
    fake.accepted = None
    with pytest.raises(AudioDeviceLost, match="'USB Headset': cannot be opened: Device unavailable"):
        Microphone(SourceConfig())
    assert fake.tried == [(16_000, 1), (48_000, 1), (16_000, 2), (48_000, 2)]
    assert fake.terminated


def interleaved(mono):
    """Stereo whose mean is `mono`."""
    return np.stack([mono + 1000, mono - 1000], axis=1).astype(np.int16)


def test_what_the_device_gives_is_resampled_and_mixed(fake):
    microphone = Microphone(SourceConfig(), clock=itertools.count(0.02, 0.02).__next__)
    tone = 8000 * np.sin(2 * np.pi * 440 * np.arange(48_000) / 48_000)
    for part in np.split(interleaved(tone), 50):
        fake.stream.callback(part.tobytes(), len(part), {}, 0)
    chunks = []
    for chunk in microphone:
        chunks.append(chunk)
        assert chunk.arrived_monotonic_s == pytest.approx(seconds(chunk.end), abs=1e-4)  # the resampler's lag is known
        if chunk.end > samples(900):
            microphone.close()
    assert fake.stream.is_closed
    assert fake.terminated
    pcm = np.concatenate([c.samples for c in chunks])
    expected = 8000 * np.sin(2 * np.pi * 440 * np.arange(len(pcm)) / SAMPLE_RATE)
    assert len(pcm) > samples(900)
    assert np.abs(pcm - expected)[500:].max() < 20


def test_a_full_ring_shows_as_a_jump_of_start(fake):
    microphone = Microphone(SourceConfig(ring_s=0.5))
    for _ in range(50):
        fake.stream.callback(bytes(4 * 960), 960, {}, 0)
    first = next(iter(microphone))
    assert microphone.counters == SourceCounters(dropped_samples=samples(500))
    assert first.start == samples(500)


def test_reported_overflows_are_counted(fake):
    microphone = Microphone(SourceConfig())
    for status in (0, fake.paInputOverflow, fake.paInputOverflow | 1):
        fake.stream.callback(bytes(4 * 960), 960, {}, status)
    assert microphone.counters.overflows == 2


# Opening again, with made-up devices


class FakeMicrophone:
    """Delivers chunks of 320 samples that arrive at the given times, then fails or waits to be closed."""

    def __init__(self, arrivals, *, fails=True):
        self.arrivals, self.fails, self.closed = arrivals, fails, threading.Event()

    def __iter__(self):
        for i, arrived_s in enumerate(self.arrivals):
            yield AudioChunk(np.zeros(320, np.int16), 320 * i, arrived_s)
        if self.fails:
            raise AudioDeviceLost("gone")
        self.closed.wait()

    def close(self):
        self.closed.set()


def reopening(devices, events, config, **options):
    """A microphone that gets the next of `devices` at each opening; an exception among them is raised."""
    remaining = iter(devices)

    def open_microphone(_config, _counters):
        device = next(remaining)
        if isinstance(device, Exception):
            raise device
        return device

    def on_event(name, detail):
        events.append((name, detail))

    return ReopeningMicrophone(config, on_event, open_microphone=open_microphone, **options)


def test_a_loss_is_reported_once_and_start_jumps_by_the_time_lost():
    devices = [FakeMicrophone([1.0, 1.02]), *[AudioDeviceLost("busy")] * 3, FakeMicrophone([5.02], fails=False)]
    events = []
    source = reopening(devices, events, SourceConfig(retry_s=0.1, retry_max_s=0.2))
    chunks = list(itertools.islice(source, 3))
    assert [c.start for c in chunks] == [0, 320, 640 + samples(3980)]
    assert events == [("microphone_lost", "gone"), ("microphone_back", "4.0 s without audio")]
    assert devices[0].closed.is_set()


def test_patience_grows_to_its_limit(monkeypatch):
    waits = []
    events = []
    devices = [FakeMicrophone([1.0]), *[AudioDeviceLost("busy")] * 4, FakeMicrophone([2.0]), FakeMicrophone([3.0])]
    source = reopening(devices, events, SourceConfig(retry_s=1, retry_max_s=5))
    monkeypatch.setattr(source._closing, "wait", waits.append)
    assert len(list(itertools.islice(source, 3))) == 3
    assert waits == [1, 2, 4, 5, 5, 1]


def test_no_microphone_at_the_start():
    with pytest.raises(AudioError, match="none"):
        reopening([AudioDeviceLost("none")], [], SourceConfig())
    events = []
    devices = [AudioDeviceLost("none"), FakeMicrophone([1.0])]
    source = reopening(devices, events, SourceConfig(retry_s=0.1), must_exist=False)
    assert next(iter(source)).start == 0
    assert [name for name, _ in events] == ["microphone_lost", "microphone_back"]


@pytest.mark.parametrize("devices", [[FakeMicrophone([1.0], fails=False)], [FakeMicrophone([]), AudioDeviceLost("")]])
def test_closing_ends_the_reader_at_once(devices):
    source = reopening(devices, [], SourceConfig(retry_s=60, retry_max_s=60))
    reader = threading.Thread(target=lambda: list(source))
    reader.start()
    time.sleep(0.1)
    source.close()
    reader.join(2)
    assert not reader.is_alive()

"""The microphone's parts, with a made-up PyAudio for what real hardware does; `test_portaudio.py` has the real one."""

import itertools
import sys
import threading
import time

import numpy as np
import pytest

from agent.config import SourceConfig
from agent.messages import AudioChunk
from agent.microphone import Microphone, RateWatch, find_device
from agent.reopening import OPENING_S, OverflowNews, ReopeningMicrophone
from agent.ring import Block, Ring, SourceCounters
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


# A microphone that is open and wrong


def playing(chunks):
    """A device whose chunks of 20 ms hold these numbers; None stands for noise."""
    noise = np.random.default_rng(0).integers(-9, 9, 320).astype(np.int16)

    class Playing(FakeMicrophone):
        def __iter__(self):
            for i, value in enumerate(self.arrivals):
                yield AudioChunk(noise if value is None else np.full(320, value, np.int16), 320 * i, i / 50)
            raise AudioDeviceLost("gone")

    return Playing(chunks)


def events_of(devices, **config):
    events, beats = [], []
    settings = SourceConfig(retry_s=0.1, retry_max_s=0.1, **config)
    source = reopening([*devices, StopIteration()], events, settings, beat=beats.append)
    with pytest.raises(RuntimeError):  # there are no more devices
        list(source)
    return events, beats, source


def test_a_signal_between_two_devices_may_close_it():
    """The handler runs in the thread that it interrupts."""
    microphone = ReopeningMicrophone(SourceConfig(), lambda *_: None, must_exist=False)

    def interrupted():
        with microphone._swapping:
            microphone.close()

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()


@pytest.mark.parametrize("value", [0, -1, 32767])
def test_an_open_microphone_without_life_is_opened_again_and_reported_once(value):
    devices = [playing([None] * 50 + [value] * 500), playing([value] * 500), playing([None])]
    events, _, source = events_of(devices, silent_s=1.0)
    assert [name for name, _ in events] == ["microphone_silent", "microphone_back", "microphone_lost"]
    assert f"nothing but {value} for 1 s" in events[0][1]
    assert source.counters.faults == 2
    assert all(device.closed.is_set() for device in devices)


def test_a_microphone_that_goes_still_by_itself_gets_more_patience():
    """Opening it again did not cure it: the voice came back later, by itself."""
    gone_still = playing([None] + [0] * 75)
    events, _, _ = events_of([gone_still, playing([0] * 110 + [None] + [0] * 140 + [None])], silent_s=1.5)
    assert [name for name, _ in events] == ["microphone_silent", "microphone_back", "microphone_lost"]
    events, _, _ = events_of([gone_still, playing([None] + [0] * 80)], silent_s=1.5)
    names = [name for name, _ in events]
    assert names == ["microphone_silent", "microphone_back", "microphone_silent"]  # cured, so no more patience


def test_silence_may_be_allowed():
    events, _, _ = events_of([playing([0] * 2000)], silent_s=0)
    assert [name for name, _ in events] == ["microphone_lost"]


def test_a_still_microphone_that_goes_away_is_lost():
    events, _, _ = events_of([playing([0] * 50), AudioDeviceLost("unplugged"), playing([0])], silent_s=1.0)
    assert [name for name, _ in events][:3] == ["microphone_silent", "microphone_lost", "microphone_back"]


def test_a_reader_without_a_microphone_says_that_it_lives():
    _, beats, _ = events_of([playing([None]), *[AudioDeviceLost("busy")] * 3, playing([None])])
    assert beats.count(0.1) == 5  # before each wait
    assert beats.count(OPENING_S) == 6  # before each attempt


def test_lost_audio_is_news_at_once_and_then_once_a_minute():
    news, counters = OverflowNews(), SourceCounters()
    assert news.news(counters, 0.0) is None
    counters.overflows, counters.dropped_samples = 2, 1600
    assert news.news(counters, 1.0) == "2 overflows of the driver, 0.10 s dropped while the gate was busy"
    counters.overflows = 5
    assert news.news(counters, 2.0) is None
    assert news.news(counters, 61.0).startswith("3 overflows of the driver, 0.00 s")
    assert news.news(counters, 200.0) is None


def test_overflows_are_an_event():
    source = reopening([FakeMicrophone([1.0, 1.1], fails=False)], events := [], SourceConfig())
    chunks = iter(source)
    next(chunks)
    source.counters.overflows += 1
    next(chunks)
    assert [name for name, _ in events] == ["microphone_overflow"]


def bring(stream, n_frames, n_blocks):
    for _ in range(n_blocks):
        stream.callback(bytes(4 * n_frames), n_frames, {}, 0)


@pytest.mark.parametrize("n_frames", [882, 1920])
def test_a_device_that_changes_its_rate_is_opened_again(fake, n_frames):
    """A block every 20 ms makes 44.1 kHz or 96 kHz, but 48 kHz were promised."""
    microphone = Microphone(SourceConfig(ring_s=30), clock=itertools.count(0.02, 0.02).__next__)
    bring(fake.stream, n_frames, 600)
    with pytest.raises(AudioDeviceLost, match=f"{50 * n_frames} Hz where 48000 were promised"):
        list(microphone)
    microphone.close()


def wrong_rates(n_frames, overflows):
    """What is found wrong with blocks that come every 20 ms, by the count of overflows until then."""
    watch = RateWatch(48_000)
    blocks = [Block(b"", i * n_frames, n_frames, i / 50) for i in range(len(overflows))]
    return [found for found in map(watch.wrong, blocks, overflows) if found]


def test_a_rate_that_is_kept_or_whose_losses_are_known():
    assert wrong_rates(960, [0] * 2000) == []
    assert wrong_rates(930, [0] * 2000) == []  # a little late, as on a busy machine
    assert wrong_rates(800, [i // 100 for i in range(2000)]) == []
    assert wrong_rates(800, [0] * 1100) == pytest.approx([40_000] * 2)


def test_a_new_rate_is_taken_up_when_it_is_opened_again(fake, monkeypatch):
    """A tone stays the same tone."""
    plain_open = fake.open

    def open_and_play(*, rate, channels, stream_callback, **options):
        stream = plain_open(rate=rate, channels=channels, stream_callback=stream_callback, **options)
        tone = interleaved(8000 * np.sin(2 * np.pi * 440 * np.arange(rate) / rate))
        for part in np.split(tone, 50):
            stream_callback(part.tobytes(), len(part), {}, 0)
        return stream

    monkeypatch.setattr(fake, "open", open_and_play)
    source = ReopeningMicrophone(SourceConfig(), lambda *_: None)
    chunks = iter(source)
    for rate in (48_000, 44_100):
        heard = np.concatenate([next(chunks).samples for _ in range(45)])[1000:12_000]
        spectrum = np.abs(np.fft.rfft(heard))
        assert np.argmax(spectrum) * SAMPLE_RATE / len(heard) == pytest.approx(440, abs=2), rate
        fake.devices[1]["defaultSampleRate"], fake.accepted = 44_100.0, (44_100, 2)
        source._device.close()
    source.close()


def test_a_device_that_goes_while_it_is_looked_at_is_lost(fake, monkeypatch):
    def gone(_index):
        raise OSError(-9996, "Invalid device")

    monkeypatch.setattr(fake, "get_device_info_by_index", gone)
    with pytest.raises(AudioDeviceLost, match="Invalid device"):
        Microphone(SourceConfig())
    assert fake.terminated

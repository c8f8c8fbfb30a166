import io
import itertools
import os
import threading
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given
from hypothesis import strategies as st

from agent.audio_files import read_blocks
from agent.config import SourceConfig, VadConfig
from agent.messages import AudioChunk
from agent.sources import PAUSE, SourceCounters, open_source, paced, read_file, rechunked, whole_samples
from whisperlet.audio import SAMPLE_RATE, samples, seconds, to_float32
from whisperlet.errors import AudioError

CLIP = Path(__file__).parent.parent / "demo/speech/1089-134691-0000.flac"
CONFIG = SourceConfig()


@pytest.fixture(scope="module")
def speech():
    pcm, rate = soundfile.read(CLIP, dtype="int16")
    assert rate == SAMPLE_RATE
    return pcm


def tone(rate, hz=440.0, duration_s=1.5):
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(rate * duration_s)) / rate)


def joined(source):
    """Audio of a source whose chunks follow each other without a gap."""
    chunks = list(source)
    assert all(a.end == b.start for a, b in itertools.pairwise(chunks))
    assert all(len(c.samples) == samples(CONFIG.chunk_ms) for c in chunks[:-1])
    return np.concatenate([c.samples for c in chunks])


def test_sixteen_kilohertz_mono_is_exact(speech):
    np.testing.assert_array_equal(read_file(CLIP), speech)
    np.testing.assert_array_equal(joined(open_source(str(CLIP), CONFIG)), speech)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg", "aiff", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 44_100, 48_000])
def test_any_rate_and_container(tmp_path, suffix, rate):
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, tone(rate), rate)
    middle = to_float32(read_file(path))[samples(300) : samples(1_200)]
    expected = tone(SAMPLE_RATE)[samples(300) : samples(1_200)]
    assert np.abs(middle - expected).max() < (0.01 if suffix in ("wav", "flac", "aiff") else 0.1)


def test_resampled_length_is_kept(tmp_path):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(44_100, duration_s=2.0), 44_100)
    assert abs(len(read_file(path)) - 2 * SAMPLE_RATE) <= 1


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW"])
def test_any_sample_format(tmp_path, subtype):
    path = tmp_path / "tone.wav"
    soundfile.write(path, tone(SAMPLE_RATE), SAMPLE_RATE, subtype=subtype)
    assert np.abs(to_float32(read_file(path)) - tone(SAMPLE_RATE)).max() < 0.02


def test_channels_are_mixed_by_their_mean(tmp_path):
    path = tmp_path / "stereo.wav"
    left, right = np.full(1000, 0.5), np.full(1000, -0.25)
    soundfile.write(path, np.stack([left, right], axis=1), SAMPLE_RATE)
    np.testing.assert_array_equal(read_file(path), np.full(1000, 4096))


def test_float_beyond_full_scale_is_clipped(tmp_path):
    path = tmp_path / "loud.wav"
    soundfile.write(path, np.array([3.0, -3.0]), SAMPLE_RATE, subtype="FLOAT")
    np.testing.assert_array_equal(read_file(path), [32767, -32768])


def test_an_hour_is_never_in_memory_at_once(tmp_path):
    path = tmp_path / "hour.flac"
    with soundfile.SoundFile(path, "w", SAMPLE_RATE, 1) as file:
        for _ in range(60):
            file.write(np.zeros(60 * SAMPLE_RATE, np.int16))
    tracemalloc.start()
    n_samples = sum(len(chunk.samples) for chunk in open_source(str(path), SourceConfig(chunk_ms=200)))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert n_samples == 3600 * SAMPLE_RATE
    assert peak < 2_000_000


def write_nan(path):
    pcm = np.zeros(3 * SAMPLE_RATE, np.float32)
    pcm[-5] = np.nan
    soundfile.write(path, pcm, SAMPLE_RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("name", "write", "reason"),
    [
        ("missing.wav", lambda _: None, "No such file"),
        ("zero.wav", lambda p: p.touch(), "the file is empty"),
        ("header.wav", lambda p: soundfile.write(p, np.zeros(0), SAMPLE_RATE), "only a header"),
        ("text.wav", lambda p: p.write_text("hello " * 100), "not an audio file"),
        ("noise.raw", lambda p: p.write_bytes(bytes(1000)), "not an audio file"),
        ("nan.wav", write_nan, "not numbers"),
        ("inf.wav", lambda p: soundfile.write(p, np.array([np.inf]), 8_000, subtype="DOUBLE"), "not numbers"),
        ("rate.wav", lambda p: soundfile.write(p, np.zeros(9), 10), "sample rate of 10 Hz"),
        ("pipe.wav", os.mkfifo, "not a regular file"),
        ("directory", lambda p: p.mkdir(), "no audio file"),
    ],
)
def test_refused_in_one_sentence(tmp_path, name, write, reason):
    path = tmp_path / name
    write(path)
    with pytest.raises(AudioError) as refused:
        list(open_source(str(path), CONFIG))
    message = str(refused.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    assert "\n" not in message


def test_a_truncated_file_never_crashes(tmp_path):
    for suffix in ("flac", "ogg", "mp3"):
        path = tmp_path / f"cut.{suffix}"
        soundfile.write(path, tone(SAMPLE_RATE), SAMPLE_RATE)
        path.write_bytes(path.read_bytes()[:1500])
        try:
            assert len(read_file(path)) < len(tone(SAMPLE_RATE))
        except AudioError as error:
            assert str(path) in str(error)  # noqa: PT017 - either outcome will do


def test_a_directory_plays_its_audio_files_in_name_order(tmp_path, speech):
    names = ["a.FLAC", *(f"{letter}.wav" for letter in "bcdefgh")]
    for i, name in reversed(list(enumerate(names))):
        part = speech[5000 + 400 * i : 5400 + 400 * i]
        soundfile.write(tmp_path / name, part, SAMPLE_RATE, format=name[2:].upper())
    (tmp_path / "notes.txt").write_text("not audio")
    silence = np.zeros(PAUSE, np.int16)
    expected = [np.concatenate([speech[5000 + 400 * i : 5400 + 400 * i], silence]) for i in range(8)]
    np.testing.assert_array_equal(joined(open_source(str(tmp_path), CONFIG)), np.concatenate(expected))


def test_a_pause_is_long_enough_for_the_gate_to_close():
    assert samples(VadConfig().hang_over_ms) < PAUSE


def test_closing_ends_a_file():
    source = open_source(str(CLIP), CONFIG)
    chunks = iter(source)
    next(chunks)
    source.close()
    source.close()
    assert list(chunks) == []
    assert source.counters == SourceCounters()


def test_blocks_are_small():
    assert max(len(block) for block in read_blocks(CLIP)) <= 8192


@given(st.lists(st.integers(0, 50)), st.integers(1, 20))
def test_rechunking_keeps_every_sample(sizes, size):
    pcm = np.arange(sum(sizes), dtype=np.int16)
    pieces = np.split(pcm, np.cumsum(sizes))
    chunks = list(rechunked(pieces, size))
    np.testing.assert_array_equal(np.concatenate([*chunks, pcm[:0]]), pcm)
    assert {len(c) for c in chunks[:-1]} <= {size}
    assert all(len(c) > 0 for c in chunks)


@given(st.binary(max_size=60), st.lists(st.integers(0, 60)))
def test_bytes_may_be_cut_anywhere(data, cuts):
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(bounds)]
    pcm = np.concatenate(list(whole_samples(pieces)))
    assert pcm.tobytes() == data[: len(data) // 2 * 2]


@pytest.mark.parametrize("tail", [b"", b"\x01"])
def test_standard_input(speech, tail):
    stream = io.BytesIO(speech.astype("<i2").tobytes() + tail)
    np.testing.assert_array_equal(joined(open_source("-", CONFIG, stdin=stream)), speech)


def test_empty_standard_input_is_refused():
    with pytest.raises(AudioError, match="standard input"):
        list(open_source("-", CONFIG, stdin=io.BytesIO()))


def test_a_pipe_delivers_while_its_writer_goes_on(speech):
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader, os.fdopen(write_end, "wb", buffering=0) as writer:
        chunks = iter(open_source("-", CONFIG, stdin=reader))
        writer.write(speech[:700].tobytes()[:-1])
        first = next(chunks)
        np.testing.assert_array_equal(first.samples, speech[:320])
        assert abs(time.monotonic() - first.arrived_monotonic_s) < 1
        writer.write(speech[:700].tobytes()[-1:])
        writer.close()
        assert [c.start for c in chunks] == [320, 640]


def test_closing_frees_the_reader_of_a_silent_pipe():
    read_end, write_end = os.pipe()
    with os.fdopen(read_end, "rb") as reader, os.fdopen(write_end, "wb"):
        source = open_source("-", CONFIG, stdin=reader)
        heard = []
        thread = threading.Thread(target=lambda: heard.extend(source))
        thread.start()
        source.close()
        thread.join(2)
        assert not thread.is_alive()
        assert heard == []


class FakeClock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def sleep(self, duration_s):
        assert duration_s > 0
        self.now += duration_s


def test_paced_by_the_clock():
    clock = FakeClock()
    source = open_source(str(CLIP), CONFIG, clock=clock)
    for chunk in paced(source, clock, clock.sleep):
        assert clock.now == pytest.approx(100.0 + seconds(chunk.end))
        assert chunk.arrived_monotonic_s == pytest.approx(clock.now)


def test_a_late_reader_catches_up():
    clock = FakeClock()
    chunks = iter(paced(open_source(str(CLIP), CONFIG), clock, clock.sleep))
    next(chunks)
    clock.now += 0.1
    late = [next(chunks) for _ in range(4)]
    assert clock.now == pytest.approx(100.12)
    assert [c.arrived_monotonic_s for c in late] == pytest.approx([100.04, 100.06, 100.08, 100.1])
    assert isinstance(late[0], AudioChunk)


def test_closing_a_paced_source_closes_the_source():
    clock = FakeClock()
    source = paced(open_source(str(CLIP), CONFIG), clock, clock.sleep)
    chunks = iter(source)
    next(chunks)
    source.close()
    assert list(chunks) == []

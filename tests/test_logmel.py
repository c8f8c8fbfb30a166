"""The log-mel spectrogram against transformers', and its incremental form against its batch form."""

import itertools

import numpy as np
import pytest
import soundfile
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from whisperlet import audio
from whisperlet.audio import HOP_LENGTH, to_float32, to_pcm16
from whisperlet.logmel import DYNAMIC_RANGE, MAX_SAMPLES, SILENCE, LogMel, log_mel, mel_filters

TOLERANCE = 3e-5  # transformers computes in float32 here, and is itself that far from its form in float64
SPEECH = to_float32(toy.babble(3.0))


@pytest.fixture(scope="module", params=[80, 128])
def extractor(request):
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=request.param)


def theirs(extractor, samples):
    return extractor(samples, sampling_rate=16_000, return_tensors="np").input_features.transpose(0, 2, 1)


def test_filters_equal_transformers(extractor):
    from transformers.audio_utils import mel_filter_bank

    n_mels = extractor.feature_size
    expected = mel_filter_bank(201, n_mels, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    np.testing.assert_allclose(mel_filters(n_mels), expected, atol=1e-7)


@pytest.mark.parametrize("n_samples", [1, 100, 199, 201, 400, 16_000, 47_999, MAX_SAMPLES - 200])
def test_a_full_window_equals_transformers(extractor, n_samples):
    samples = np.resize(SPEECH, n_samples)
    ours = log_mel(samples, 3000, extractor.feature_size)
    assert ours.shape == (1, 3000, extractor.feature_size)
    np.testing.assert_allclose(ours, theirs(extractor, samples), atol=TOLERANCE)


def test_clips_equal_transformers(extractor, clips):
    assert clips
    for clip in clips:
        samples = to_float32(soundfile.read(clip, dtype="int16")[0])
        ours = log_mel(samples, 3000, extractor.feature_size)
        np.testing.assert_allclose(ours, theirs(extractor, samples), atol=TOLERANCE, err_msg=clip.name)
        padded = np.pad(samples, (0, MAX_SAMPLES - len(samples)))
        exact = extractor._np_extract_fbank_features(padded[None], "cpu").transpose(0, 2, 1)
        np.testing.assert_allclose(ours, exact, atol=1e-5, err_msg=clip.name)


def test_only_the_last_frames_of_a_window_that_is_full_to_the_brim_differ(extractor):
    """There transformers mirrors the audio; here zeros follow, as they do after any other audio."""
    samples = np.resize(SPEECH, MAX_SAMPLES)
    ours, expected = log_mel(samples, 3000, extractor.feature_size), theirs(extractor, samples)
    np.testing.assert_allclose(ours[:, :-2], expected[:, :-2], atol=TOLERANCE)


def test_a_short_window_is_the_start_of_a_full_one():
    full, short = log_mel(SPEECH, 3000), log_mel(SPEECH, 400)
    np.testing.assert_array_equal(short, full[:, :400])
    assert np.ptp(short[:, 310:]) == 0  # silence


def test_silence_and_nothing():
    for samples in (np.zeros(0, np.float32), np.zeros(5000, np.float32)):
        window = log_mel(samples, 100)
        assert window.dtype == np.float32
        np.testing.assert_allclose(window, np.full((1, 100, 80), -1.5), atol=1e-6)


def chunks(samples, cuts):
    edges = [0, *sorted(cut % (len(samples) + 1) for cut in cuts), len(samples)]
    return [samples[a:b] for a, b in itertools.pairwise(edges)]


CUTS = st.lists(st.integers(0, 60_000), max_size=12)
LENGTHS = st.one_of(st.integers(0, 1200), st.integers(0, len(SPEECH)))


@settings(max_examples=60, deadline=None)
@given(n=LENGTHS, cuts=CUTS)
def test_any_chunking_equals_batch(n, cuts):
    state = LogMel(80)
    for chunk in chunks(SPEECH[:n], cuts):
        state.feed(chunk)
    np.testing.assert_allclose(state.window(320), log_mel(SPEECH[:n], 320), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(n=LENGTHS, end=LENGTHS, cuts=CUTS)
def test_audio_after_the_end_does_not_matter(n, end, cuts):
    state = LogMel(80)
    for chunk in chunks(SPEECH[:n], cuts):
        state.feed(chunk)
    np.testing.assert_allclose(state.window(320, end), log_mel(SPEECH[: min(end, n)], 320), atol=1e-6)


def test_looking_does_not_disturb():
    state = LogMel(80)
    for chunk in np.array_split(SPEECH, 7):
        state.feed(chunk)
        state.window(320)
        state.window(320, state.n_samples // 2)
    np.testing.assert_allclose(state.window(320), log_mel(SPEECH, 320), atol=1e-6)


def test_loudness_of_what_is_left_out_does_not_count():
    loud_at_the_end = np.concatenate([0.001 * SPEECH[:8000], SPEECH[8000:16_000]])
    state = LogMel(80)
    state.feed(loud_at_the_end)
    np.testing.assert_allclose(state.window(100, 8000), log_mel(loud_at_the_end[:8000], 100), atol=1e-6)
    assert np.abs(state.window(100, 8000)[:, :49] - state.window(100)[:, :49]).max() > 0.1


@settings(max_examples=80, deadline=None)
@given(
    n=LENGTHS,
    cuts=CUTS,
    first=st.integers(-2, 250),
    n_real=st.integers(0, 120),
    n_silent=st.integers(0, 60),
    gain=st.sampled_from([1.0, 0.001]),
)
def test_any_chunking_gives_the_same_stretch(n, cuts, first, n_real, n_silent, gain):
    samples = np.concatenate([SPEECH[:16_000], gain * SPEECH[16_000:]])[:n]
    state = LogMel(80)
    for chunk in chunks(samples, cuts):
        state.feed(chunk)
    first, n_frames = min(first, state.n_frames), n_real + n_silent
    last = min(max(0, first + n_real), state.n_frames)
    found = state.stretch(first, n_frames, last)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, by_definition(samples, first, n_frames, last), atol=1e-6)


def by_definition(samples, first, n_frames, last):
    """A stretch, from the spectrogram of everything: zeros before the start, silence from `last` on."""
    whole = LogMel(80)
    whole.feed(samples)
    power = np.concatenate([whole.log_power(320)[:last], np.full((n_frames + 1, 80), SILENCE)])
    loudest = power.max()
    scaled = (np.maximum(power, loudest - DYNAMIC_RANGE) + 4) / 4
    return np.concatenate([np.zeros((max(0, -first), 80)), scaled[max(0, first) :]])[None, :n_frames]


def test_a_stretch_is_a_part_of_the_window():
    """Where nothing louder comes later, and before the frames that reach past the end of the audio."""
    state = LogMel(80)
    state.feed(np.concatenate([SPEECH[:16_000], 0.1 * SPEECH[16_000:]]))
    window = state.window(state.n_frames + 10)
    assert window.argmax() < 100 * 80
    for first, last in ((0, state.n_frames), (150, 200), (100, 180)):
        np.testing.assert_array_equal(state.stretch(first, last - first, last), window[:, first:last])
    np.testing.assert_array_equal(state.stretch(-2, 102, 100)[:, 2:], window[:, :100])
    assert not state.stretch(-2, 102, 100)[:, :2].any()


def test_what_comes_after_a_stretch_does_not_change_it():
    state = LogMel(80)
    state.feed(0.001 * SPEECH[:16_000])
    before = state.stretch(20, 90, 80)
    beyond = state.stretch(20, 90, 10_000)
    state.feed(SPEECH[16_000:])
    np.testing.assert_array_equal(state.stretch(20, 90, 80), before)
    assert np.ptp(before[:, 60:]) == 0  # silence
    assert np.ptp(beyond[:, 60:78]) > 0
    assert np.abs(state.stretch(20, 90, 110) - before)[:, :60].max() > 0.1  # the loudest counts once it is there


def test_too_much():
    state = LogMel(80)
    state.feed(np.zeros(MAX_SAMPLES, np.float32))
    assert state.window(3000).shape == (1, 3000, 80)
    with pytest.raises(ValueError, match=f"{MAX_SAMPLES + 1} samples are more than"):
        state.feed(np.zeros(1, np.float32))
    assert state.n_samples == MAX_SAMPLES
    with pytest.raises(ValueError, match="161 samples do not fit into 1 frames"):
        state.window(1, HOP_LENGTH + 1)
    assert state.window(1, HOP_LENGTH).shape == (1, 1, 80)


def test_pcm_there_and_back():
    every = np.arange(-32_768, 32_768).astype(np.int16)
    np.testing.assert_array_equal(to_pcm16(to_float32(every)), every)
    assert to_float32(every).dtype == np.float32
    assert to_pcm16(np.array([1.0, -1.0, 2.0, -2.0, 0.6 / 32_768])).tolist() == [32_767, -32_768, 32_767, -32_768, 1]


def test_units():
    assert (audio.FRAMES_PER_SECOND, audio.WINDOW_FRAMES, audio.SAMPLES_PER_FRAME) == (50, 1500, 320)
    assert audio.samples(20) == 320
    assert audio.seconds(8000) == 0.5
    with pytest.raises(AssertionError, match="7 is not a multiple of 2"):
        audio.exact_div(7, 2)

"""What happens to recordings: bands, levels, codec, and that equal seeds give equal sound."""

import json
import random

import msgspec
import numpy as np
import pytest
import soundfile
from test_manifests import write_set

from convert import augment, manifests, speechset
from convert.augment import Augmentation, Augmenter
from convert.manifests import Data
from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import ConfigError

RNG = np.random.default_rng(0)
WHITE = (0.05 * RNG.standard_normal(3 * SAMPLE_RATE)).astype(np.float32)
BAND = (300.0, 3400.0)


@pytest.fixture(scope="module")
def hum(tmp_path_factory):
    """Noise of a tone in the band and a stronger one below it."""
    folder = tmp_path_factory.mktemp("noise")
    time_s = np.arange(SAMPLE_RATE) / SAMPLE_RATE
    tones = 0.02 * np.sin(2 * np.pi * 1000 * time_s) + 0.5 * np.sin(2 * np.pi * 50 * time_s)
    soundfile.write(folder / "hum.wav", tones, SAMPLE_RATE)
    return (Data(str(folder)),)


def power(samples, low_hz, high_hz):
    spectrum = np.abs(np.fft.rfft(samples)) ** 2
    hz = np.fft.rfftfreq(len(samples), 1 / SAMPLE_RATE)
    return spectrum[(hz >= low_hz) & (hz < high_hz)].sum() / len(samples) ** 2


def decibels(ratio):
    return 10 * np.log10(ratio)


def test_nothing_asked_nothing_done():
    assert (Augmenter(Augmentation())(WHITE, "a") == WHITE).all()


def test_a_telephone_passes_its_band_alone():
    heard = Augmenter(Augmentation(band_hz=BAND))(WHITE, "a")
    assert decibels(power(heard, 600, 2500) / power(WHITE, 600, 2500)) == pytest.approx(0, abs=0.5)
    for low, high in ((20, 120), (6800, 8000)):
        assert decibels(power(heard, low, high) / power(WHITE, low, high)) < -20


def test_noise_has_the_level_that_is_asked_for_within_the_band(hum):
    plain = Augmenter(Augmentation(band_hz=BAND))(WHITE, "a")
    noisy = Augmenter(Augmentation(band_hz=BAND, noise=hum, snr_db=(8.0, 8.0)))(WHITE, "a")
    noise = noisy - plain
    assert decibels(np.mean(plain**2) / np.mean(noise**2)) == pytest.approx(8.0, abs=0.3)
    assert power(noise, 900, 1100) > 20 * power(noise, 20, 120)  # the tone below the band was not what counted


def test_noise_levels_are_drawn_between_the_two(hum):
    change = Augmenter(Augmentation(noise=hum, snr_db=(5.0, 15.0)))
    levels = [decibels(np.mean(WHITE**2) / np.mean((change(WHITE, str(seed)) - WHITE) ** 2)) for seed in range(12)]
    assert min(levels) > 4.9
    assert max(levels) < 15.1
    assert max(levels) - min(levels) > 4


def test_equal_seeds_give_equal_sound_and_leave_the_generators_alone(hum):
    change = Augmenter(Augmentation(speed=0.2, noise=hum, codec="mulaw"))
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    first = change(WHITE, "a")
    drawn = random.random(), np.random.rand()  # noqa: NPY002
    assert np.array_equal(change(WHITE, "a"), first)
    assert not np.array_equal(change(WHITE, "b"), first)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    assert (random.random(), np.random.rand()) == drawn  # noqa: NPY002


def test_speed_changes_the_length_both_ways():
    change = Augmenter(Augmentation(speed=0.2, speed_share=1.0))
    lengths = [len(change(WHITE, str(seed))) / len(WHITE) for seed in range(8)]
    assert 0.82 < min(lengths) < 0.97
    assert 1.03 < max(lengths) < 1.26


def test_rooms_ring_on(tmp_path):
    response = np.zeros(4000)
    response[[0, 3200]] = 1.0, 0.5  # an echo after 200 ms
    soundfile.write(tmp_path / "echo.wav", response, SAMPLE_RATE)
    click = np.zeros(SAMPLE_RATE, np.float32)
    click[1000] = 0.5
    heard = Augmenter(Augmentation(rooms=(Data(str(tmp_path)),), room_share=1.0))(click, "a")
    assert heard[4200] == pytest.approx(0.5 * heard[1000], rel=0.01)


def test_shares_are_of_recordings():
    change = Augmenter(Augmentation(band_hz=BAND, band_share=0.5))
    n_banded = sum(not np.array_equal(change(WHITE, str(seed)), WHITE) for seed in range(20))
    assert 5 <= n_banded <= 15


def test_the_codec_is_that_of_the_telephone():
    heard = augment.mulaw(WHITE, SAMPLE_RATE)
    assert len(heard) == len(WHITE)
    assert power(heard, 4500, 8000) < 1e-3 * power(WHITE, 4500, 8000)
    tone = (0.3 * np.sin(2 * np.pi * 1000 * np.arange(SAMPLE_RATE) / SAMPLE_RATE)).astype(np.float32)
    error = (augment.mulaw(tone, SAMPLE_RATE) - tone)[1000:-1000]
    assert 33 < decibels(np.mean(tone**2) / np.mean(error**2)) < 42  # some 38 dB is what it is known for


def test_what_would_be_clipped_is_scaled_down(hum):
    loud = (0.9 * np.sign(WHITE)).astype(np.float32)
    assert np.abs(Augmenter(Augmentation(noise=hum, snr_db=(0.0, 0.0)))(loud, "a")).max() == pytest.approx(0.99)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"speed": 1.0}, "speed must be"),
        ({"noise_share": 1.1}, "noise_share must be from 0 to 1"),
        ({"band_hz": [3400, 300]}, "band_hz must ascend"),
        ({"band_hz": [300, 9000]}, "band_hz must ascend"),
        ({"snr_db": [15, 5]}, "snr_db must ascend"),
        ({"codec": "gsm"}, "Invalid enum value"),
        ({"spead": 0.2}, "unknown field"),
    ],
)
def test_settings_that_cannot_be(wrong, reason):
    with pytest.raises(msgspec.ValidationError, match=reason):
        msgspec.convert(wrong, Augmentation)


def test_a_set_is_written_as_it_is_scored(tmp_path, hum):
    settings = Augmentation(band_hz=BAND, noise=hum)
    found = manifests.read(Data(str(write_set(tmp_path / "a", 2, rate=8000))))
    seen = []
    path = augment.write_set(found, settings, tmp_path / "out", seen.append)
    assert seen == ["a0", "a1"]
    again = manifests.read(Data(str(path)))
    assert manifests.problems("test", again) == []
    assert [(one.id, one.text, one.speaker) for one in again] == [(one.id, one.text, one.speaker) for one in found]
    change = Augmenter(settings)
    for was, now in zip(found, again, strict=True):
        assert np.abs(speechset.audio(now.audio) - augment.heard(was, change)).max() < 1e-4
    assert json.loads(path.read_text().splitlines()[0])["duration_s"] == pytest.approx(1.2)
    with pytest.raises(ConfigError, match="is not empty"):
        augment.write_set(found, None, tmp_path / "out", seen.append)

"""What happens to recordings before a model hears them: speed, rooms, noise, telephone. The transforms are audiomentations'.

The same settings make what is trained on, drawn anew in each epoch, and what is scored on, drawn once from the
recording's name.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import soundfile
import soxr

from whisperlet.audio import SAMPLE_RATE, Float32, seconds
from whisperlet.errors import ConfigError

from . import manifests, speechset
from .manifests import Data, Utterance

ROLLOFF_DB = 24  # an octave, at the edges of the band
TELEPHONE_RATE = 8_000  # samples per second
MU = 255.0  # of G.711's mu-law
PEAK = 0.99  # what is louder is scaled down

Transform = Callable[[Float32, int], Float32]


class Augmentation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What may happen to a recording, in this order. Shares are of the recordings to which it does happen."""

    speed: float = 0.0  # quicker or slower by up to this share, at the same pitch
    speed_share: float = 0.5
    rooms: tuple[Data, ...] = ()  # impulse responses
    room_share: float = 0.3
    band_hz: tuple[float, float] | None = None  # what is outside is filtered away, from the noise as well
    band_share: float = 1.0
    noise: tuple[Data, ...] = ()  # of each recording, one of these sets is chosen, then a file
    noise_share: float = 1.0
    snr_db: tuple[float, float] = (5.0, 15.0)
    codec: Literal["none", "mulaw"] = "none"  # mulaw: what G.711 leaves, at 8 kHz
    codec_share: float = 1.0

    def __post_init__(self) -> None:
        shares = {name: getattr(self, name) for name in self.__struct_fields__ if name.endswith("_share")}
        if wrong := [name for name, share in shares.items() if not 0.0 <= share <= 1.0]:
            raise ValueError(f"{', '.join(wrong)} must be from 0 to 1")
        if not 0.0 <= self.speed < 0.9:
            raise ValueError("speed must be from 0 to 0.9")
        if self.band_hz and not 0.0 < self.band_hz[0] < self.band_hz[1] < SAMPLE_RATE / 2:
            raise ValueError(f"band_hz must ascend, between 0 and {SAMPLE_RATE // 2}")
        if self.snr_db[0] > self.snr_db[1]:
            raise ValueError("snr_db must ascend")

    @property
    def sets(self) -> tuple[Data, ...]:
        """Everything it reads."""
        return (*self.rooms, *self.noise)


class Augmenter:
    """An augmentation with its noise and rooms at hand. Raises ConfigError if some are not there."""

    def __init__(self, settings: Augmentation) -> None:
        from audiomentations import Compose

        band = _band(*settings.band_hz) if settings.band_hz else None
        self._plain, self._banded = Compose(_steps(settings, None)), Compose(_steps(settings, band))
        self._band_share = settings.band_share

    def __call__(self, samples: Float32, seed: str) -> Float32:
        """What is left of a recording; equal seeds give equal sound. shape = (n_samples,), speed may change it."""
        with _seeded(seed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # noise that is resampled or silent, and what librosa is built upon
            steps = self._banded if random.random() < self._band_share else self._plain
            changed: Float32 = np.asarray(steps(samples, SAMPLE_RATE), np.float32)
        peak = float(np.abs(changed).max(initial=0.0))
        return changed * np.float32(PEAK / peak) if peak > PEAK else changed


def _steps(settings: Augmentation, band: Transform | None) -> list[Any]:
    """Transforms in their order; noise is filtered like the speech before it is scaled, so that its level is in band."""
    from audiomentations import AddBackgroundNoise, ApplyImpulseResponse, Lambda, OneOf, TimeStretch

    s, steps = settings, []
    if s.speed:
        rates = {"min_rate": 1.0 - s.speed, "max_rate": 1.0 + s.speed}
        steps.append(TimeStretch(**rates, leave_length_unchanged=False, p=s.speed_share))
    if s.rooms:
        steps.append(ApplyImpulseResponse(manifests.audio_files(s.rooms), p=s.room_share))
    if band:
        steps.append(band)
    if s.noise:
        level = {"min_snr_db": s.snr_db[0], "max_snr_db": s.snr_db[1], "noise_transform": band, "p": 1.0}
        noises = [AddBackgroundNoise(manifests.audio_files([noise]), **level) for noise in s.noise]
        steps.append(OneOf(noises, p=s.noise_share))
    if s.codec == "mulaw":
        steps.append(Lambda(mulaw, p=s.codec_share))
    return steps


def _band(low_hz: float, high_hz: float) -> Transform:
    from audiomentations import Compose, HighPassFilter, LowPassFilter

    slope = {"min_rolloff": ROLLOFF_DB, "max_rolloff": ROLLOFF_DB, "p": 1.0}
    band: Transform = Compose(
        [HighPassFilter(low_hz, low_hz, **slope), LowPassFilter(high_hz, high_hz, **slope)],
    )
    return band


def mulaw(samples: Float32, rate: int) -> Float32:
    """What the codec of the telephone network, ITU-T G.711 with mu-law, leaves. shape = (n_samples,)"""
    narrow = np.clip(soxr.resample(samples, rate, TELEPHONE_RATE), -1.0, 1.0)
    steps = np.rint(127.0 * np.sign(narrow) * np.log1p(MU * np.abs(narrow)) / np.log1p(MU)) / 127.0
    decoded = np.sign(steps) * np.expm1(np.abs(steps) * np.log1p(MU)) / MU
    wide: Float32 = soxr.resample(decoded.astype(np.float32), TELEPHONE_RATE, rate)
    return wide


@contextmanager
def _seeded(seed: str) -> Iterator[None]:
    """Both generators that audiomentations draws from, put back afterwards."""
    was, was_of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(random.getrandbits(32))  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(was)
        np.random.set_state(was_of_numpy)  # noqa: NPY002


def write_set(
    utterances: Sequence[Utterance],
    settings: Augmentation | None,
    folder: Path,
    advance: Callable[[str], None] = lambda _: None,
) -> Path:
    """Put a set as it is scored into a folder, for `evaluate` and for listening; its manifest.

    Raises ConfigError if the folder holds something already.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"{folder}: is not empty")
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    change = Augmenter(settings) if settings else None
    lines = [_written(one, change, folder, advance) for one in utterances]
    path = folder / "manifest.jsonl"
    path.write_bytes(b"\n".join(map(msgspec.json.encode, lines)) + b"\n")
    return path


def _written(
    one: Utterance, change: Augmenter | None, folder: Path, advance: Callable[[str], None]
) -> dict[str, object]:
    samples = heard(one, change)
    name = f"audio/{one.id}.flac"
    soundfile.write(folder / name, samples, SAMPLE_RATE)
    advance(one.id)
    about = {"text": one.text, "language": one.language, "duration_s": round(seconds(len(samples)), 3)}
    return {"id": one.id, "audio": name, **about, "speaker": one.speaker}


def heard(one: Utterance, change: Augmenter | None) -> Float32:
    """A recording as it is scored: drawn from its name, so always the same. shape = (n_samples,)"""
    samples = speechset.audio(one.audio)
    return change(samples, one.id) if change else samples

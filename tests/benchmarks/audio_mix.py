"""Speech with noise, and noise without end, the same in every run."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence

import numpy as np

from agent.audio_files import read_file
from convert.speechset import Clip
from whisperlet.audio import PCM16_SCALE, Float32, Pcm16, samples, to_float32, to_pcm16

SEED = 20261122


def random(name: str) -> np.random.Generator:
    """A generator that depends on a name only."""
    return np.random.default_rng([SEED, zlib.crc32(name.encode())])


def track(clips: Sequence[Clip]) -> Pcm16:
    """All clips one after the other."""
    return np.concatenate([read_file(clip.audio) for clip in clips])


def power(audio: Float32) -> float:
    """Mean square."""
    return float(np.mean(np.square(audio, dtype=np.float64)))


def mixed(speech: Pcm16, noise: Pcm16, snr_db: float, name: str) -> Pcm16:
    """Speech with a stretch of the noise at a signal-to-noise ratio of the clip's mean powers.

    The stretch begins anywhere, as `name` decides, and goes round the noise's end. Where the sum would clip, all of it
    is turned down.
    """
    first = int(random(name).integers(len(noise)))
    stretch = np.take(noise, np.arange(first, first + len(speech)), mode="wrap")
    clean, dirt = to_float32(speech), to_float32(stretch)
    gain = np.sqrt(power(clean) / max(power(dirt), 1e-12) / 10 ** (snr_db / 10))
    total = clean + np.float32(gain) * dirt
    loudest = float(np.abs(total).max(initial=0.0))
    return to_pcm16(total / max(1.0, loudest * PCM16_SCALE / (PCM16_SCALE - 1)))


def levels_db(name: str, lowest: float, highest: float) -> Iterator[float]:
    """Gains without end, drawn evenly."""
    generator = random(name)
    while True:
        yield float(generator.uniform(lowest, highest))


def endless(
    clips: Sequence[Clip], duration_s: float, name: str, lowest_db: float, highest_db: float
) -> Iterator[Pcm16]:
    """Clips in turn, each time at another level, until `duration_s` is full."""
    left = samples(1000 * duration_s)
    gains = levels_db(name, lowest_db, highest_db)
    audio = [read_file(clip.audio) for clip in clips]
    while left > 0:
        for pcm in audio:
            piece = louder(pcm[:left], next(gains))
            left -= len(piece)
            yield piece
            if left <= 0:
                return


def louder(pcm: Pcm16, gain_db: float) -> Pcm16:
    """The same at another level; what is too loud clips, as it would in a microphone."""
    return to_pcm16(to_float32(pcm) * np.float32(10 ** (gain_db / 20)))

"""Audio constants, each derived from the ones before it, and PCM conversion."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pcm16 = NDArray[np.int16]
Float32 = NDArray[np.float32]


def exact_div(x: int, y: int) -> int:
    """Quotient of a division that must leave no remainder."""
    assert x % y == 0, f"{x} is not a multiple of {y}"
    return x // y


SAMPLE_RATE = 16_000  # samples per second
N_FFT = 400  # samples in a spectrogram window, 25 ms
HOP_LENGTH = 160  # samples between spectrogram windows, 10 ms
SAMPLES_PER_FRAME = 2 * HOP_LENGTH  # the encoder's second convolution has stride 2
FRAMES_PER_SECOND = exact_div(SAMPLE_RATE, SAMPLES_PER_FRAME)  # encoder frames, 20 ms each
WINDOW_SECONDS = 30  # what Whisper was trained on
WINDOW_FRAMES = WINDOW_SECONDS * FRAMES_PER_SECOND  # 1500
PCM16_SCALE = 32_768.0


def to_float32(pcm: Pcm16) -> Float32:
    """PCM of shape (n,) as float32 in [-1, 1)."""
    return pcm.astype(np.float32) / np.float32(PCM16_SCALE)


def to_pcm16(samples: NDArray[np.floating]) -> Pcm16:
    """Samples in [-1, 1] of shape (n,), rounded and clipped to 16 bits."""
    scaled = np.rint(np.clip(np.asarray(samples, np.float32), -1, 1) * np.float32(PCM16_SCALE))
    clipped: Pcm16 = np.clip(scaled, -32_768, 32_767).astype(np.int16)
    return clipped


def seconds(n_samples: int) -> float:
    """Duration of `n_samples` in seconds."""
    return n_samples / SAMPLE_RATE


def samples(duration_ms: float) -> int:
    """Number of samples in `duration_ms` milliseconds."""
    return round(duration_ms * SAMPLE_RATE / 1000)

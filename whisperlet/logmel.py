"""Whisper's log-mel spectrogram. One form, incremental; the batch form feeds it everything at once.

A spectrogram frame t covers the samples [160 t - 200, 160 t + 200), the audio mirrored before its start and zero after
its end. Frames whose samples are all there are computed once, many together when a window is asked for, and kept; the
few that reach past an end are computed for that window alone, so it may end anywhere in the audio that was fed.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from .audio import HOP_LENGTH, N_FFT, SAMPLE_RATE, WINDOW_SECONDS, Float32

DYNAMIC_RANGE = 8.0  # log10 units kept below the loudest point of a window
FLOOR = np.float32(1e-10)  # power below which everything is silence
SILENCE = np.float32(-10.0)  # its log10
MAX_SAMPLES = WINDOW_SECONDS * SAMPLE_RATE
_HALF = N_FFT // 2
_BREAK_HZ, _BREAK_MEL, _HZ_PER_MEL, _LOG_STEP = 1000.0, 15.0, 200.0 / 3, np.log(6.4) / 27.0


def _hz(mel: NDArray[np.float64]) -> NDArray[np.float64]:
    """Slaney's mel scale: linear below 1 kHz, logarithmic above."""
    return np.where(mel < _BREAK_MEL, mel * _HZ_PER_MEL, _BREAK_HZ * np.exp(_LOG_STEP * (mel - _BREAK_MEL)))


@functools.cache
def mel_filters(n_mels: int) -> Float32:
    """Triangular filters of equal area up to 8 kHz. shape = (N_FFT // 2 + 1, n_mels)"""
    top = _BREAK_MEL + np.log(SAMPLE_RATE / 2 / _BREAK_HZ) / _LOG_STEP
    edges = _hz(np.linspace(0.0, top, n_mels + 2))
    bins = np.linspace(0.0, SAMPLE_RATE / 2, _HALF + 1)[:, None]
    lower, centre, upper = edges[:-2], edges[1:-1], edges[2:]
    triangles = np.minimum((bins - lower) / (centre - lower), (upper - bins) / (upper - centre))
    return (np.maximum(triangles, 0.0) * 2.0 / (upper - lower)).astype(np.float32)


@functools.cache
def _hann() -> Float32:
    return np.hanning(N_FFT + 1)[:-1].astype(np.float32)


def _log_power(padded: Float32, n_mels: int) -> Float32:
    """log10 of the mel power of each whole window in `padded`. shape = (n_frames, n_mels)"""
    windows = np.lib.stride_tricks.sliding_window_view(padded, N_FFT)[::HOP_LENGTH]
    spectrum = np.fft.rfft(windows * _hann(), axis=-1)
    power = spectrum.real**2 + spectrum.imag**2
    return np.log10(np.maximum(power @ mel_filters(n_mels), FLOOR))


def _n_complete(n_samples: int) -> int:
    """Frames that so much audio has completed."""
    return (n_samples - _HALF) // HOP_LENGTH + 1 if n_samples > _HALF else 0


class LogMel:
    """Audio of one segment and the spectrogram frames that were computed of it. Both have room for a full window."""

    def __init__(self, n_mels: int) -> None:
        self.n_mels = n_mels
        self._samples: Float32 = np.empty(MAX_SAMPLES, np.float32)
        self._frames: Float32 = np.empty((MAX_SAMPLES // HOP_LENGTH, n_mels), np.float32)
        self.n_samples = 0
        self._n_kept = 0  # frames

    @property
    def samples(self) -> Float32:
        """All that was fed. shape = (n_samples,)"""
        return self._samples[: self.n_samples]

    @property
    def n_frames(self) -> int:
        """Frames that no further audio will change."""
        return _n_complete(self.n_samples)

    def feed(self, samples: Float32) -> None:
        """Append audio of shape (n,). Raises ValueError past 30 s."""
        end = self.n_samples + len(samples)
        if end > MAX_SAMPLES:
            raise ValueError(f"{end} samples are more than a window's {MAX_SAMPLES}")
        self._samples[self.n_samples : end] = samples
        self.n_samples = end

    def _kept(self, n_frames: int) -> Float32:
        """The first complete frames, those that are new computed. shape = (n_frames, n_mels)"""
        if n_frames > self._n_kept:
            self._frames[self._n_kept : n_frames] = self._compute(self._n_kept, n_frames, self.n_samples)
            self._n_kept = n_frames
        return self._frames[:n_frames]

    def _compute(self, first: int, last: int, end: int) -> Float32:
        """Frames [first, last) of the audio up to sample `end`."""
        start, stop = first * HOP_LENGTH - _HALF, (last - 1) * HOP_LENGTH + _HALF
        audio = self._samples[max(0, start) : min(end, stop)]
        mirrored = self._samples[1 : min(end, 1 - start)][::-1] if start < 0 else audio[:0]
        mirrored = np.pad(mirrored, (max(0, -start) - len(mirrored), 0))
        padded = np.concatenate([mirrored, audio])
        return _log_power(np.pad(padded, (0, stop - start - len(padded))), self.n_mels)

    def log_power(self, n_frames: int, end: int | None = None) -> Float32:
        """log10 of the mel power of the audio up to sample `end`, then silence. shape = (n_frames, n_mels)

        Raises ValueError if the audio does not fit.
        """
        end = self.n_samples if end is None else min(end, self.n_samples)
        if end > n_frames * HOP_LENGTH:
            raise ValueError(f"{end} samples do not fit into {n_frames} frames of {HOP_LENGTH}")
        n_whole = min(_n_complete(end), n_frames)
        n_touched = min(n_frames, (end + _HALF - 1) // HOP_LENGTH + 1) if end else 0
        out = np.full((n_frames, self.n_mels), SILENCE)
        out[:n_whole] = self._kept(n_whole)
        if n_touched > n_whole:
            out[n_whole:n_touched] = self._compute(n_whole, n_touched, end)
        return out

    def window(self, n_frames: int, end: int | None = None) -> Float32:
        """What the encoder takes in: `log_power`, clamped and scaled. shape = (1, n_frames, n_mels)"""
        power = self.log_power(n_frames, end)
        return scaled(power, power.max())[None]

    def stretch(self, first: int, n_frames: int, last: int) -> Float32:
        """Complete frames [first, last), scaled by the loudest that came before `last`. shape = (1, n_frames, n_mels)

        Before the audio there is the zero padding of the first convolution, after `last` silence.
        """
        last = min(self.n_frames, last)
        kept = self._kept(last)
        out = np.full((n_frames, self.n_mels), SILENCE)
        out[max(0, -first) : last - first] = kept[max(0, first) :]
        loudest = kept.max(initial=SILENCE)
        window = scaled(out, loudest)
        window[: max(0, -first)] = 0.0
        return window[None]


def scaled(power: Float32, loudest: np.float32) -> Float32:
    """Log-mel as Whisper takes it in: clamped to `DYNAMIC_RANGE` below the loudest point, about -1 to 1."""
    clamped = np.maximum(power, loudest - np.float32(DYNAMIC_RANGE))
    return (clamped + np.float32(4.0)) / np.float32(4.0)


def log_mel(samples: Float32, n_frames: int, n_mels: int = 80) -> Float32:
    """Batch form. samples shape = (n,), result shape = (1, n_frames, n_mels)"""
    state = LogMel(n_mels)
    state.feed(samples)
    return state.window(n_frames)

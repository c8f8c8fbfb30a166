"""Any rate and any number of channels to what the rest of the agent speaks: 16 kHz mono, 16 bits."""

from __future__ import annotations

import numpy as np
import soxr

from whisperlet.audio import SAMPLE_RATE, Float32, Pcm16, to_pcm16


class Resampler:
    """Downmixes by the mean and resamples a stream block by block; what is 16 kHz mono already stays exact."""

    def __init__(self, rate: int) -> None:
        self._stream = None if rate == SAMPLE_RATE else soxr.ResampleStream(rate, SAMPLE_RATE, 1)

    def __call__(self, block: Float32, *, last: bool = False) -> Pcm16:
        """Next samples of the stream, which lag 10 to 30 ms behind until `last`.

        Parameters
        ----------
        block
            shape = (n_frames, n_channels), in [-1, 1].
        """
        mono = block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)
        if self._stream is not None:
            mono = self._stream.resample_chunk(np.ascontiguousarray(mono), last=last)
        return to_pcm16(mono)

"""How much the encoder has to compute: multiply-accumulates, from the model's sizes.

A frame of 20 ms costs, wherever it stands, what does not depend on other frames:

    stem        2 * 3 * n_mels * d  (two spectrogram frames through the first convolution)  +  3 * d^2
    layers      n_audio_layer * 12 * d^2  (four matrices of attention, two of four times the width)
    cross       n_text_layer * 2 * d^2  (keys and values that the decoder looks at)

and w frames that attend to k cost n_audio_layer * 2 * w * k * d more. So

    encode(n)   = n * frame + n_audio_layer * 2 * n^2 * d
    step        = width * frame + n_audio_layer * 2 * width * (context + width) * d

where a step computes `width` frames (C new ones, R overlapping ones, silence as padding) and looks back on `context`
places for committed ones, masked or not. An utterance of n frames takes ceil(n / C) steps; encoding it anew at each hop
takes the sum of encode(min(i * C, n)) for i = 1 ... ceil(n / C). Neither rounding to a window nor silence is counted
against encoding anew; a final pass over the whole utterance and the silence after it may be added to both.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from whisperlet.bundle import Dims


class Streaming(msgspec.Struct, frozen=True):
    """How the encoder streams, in frames of 20 ms."""

    chunk: int  # C
    width: int  # all that a step computes
    context: int


class Work(msgspec.Struct, frozen=True):
    """Multiply-accumulates for all utterances, in 10^9."""

    streamed: float
    encoded_anew: float
    final_passes: float

    @property
    def saved_percent(self) -> float:
        """How much less streaming computes than encoding anew."""
        return round(100 * (1 - self.streamed / self.encoded_anew), 1)

    @property
    def saved_with_finals_percent(self) -> float:
        """The same with a final pass on both sides."""
        return round(100 * (1 - (self.streamed + self.final_passes) / (self.encoded_anew + self.final_passes)), 1)


def frame(dims: Dims) -> int:
    """What a frame costs by itself."""
    d = dims.d_model
    return 6 * dims.n_mels * d + 3 * d**2 + dims.n_audio_layer * 12 * d**2 + dims.n_text_layer * 2 * d**2


def attention(dims: Dims, n_queries: int, n_keys: int) -> int:
    """What looking at other frames costs, in all layers."""
    return dims.n_audio_layer * 2 * n_queries * n_keys * dims.d_model


def encode(dims: Dims, n_frames: int) -> int:
    """All frames at once, each looking at every other."""
    return n_frames * frame(dims) + attention(dims, n_frames, n_frames)


def step(dims: Dims, how: Streaming) -> int:
    """One step of the streaming encoder."""
    return how.width * frame(dims) + attention(dims, how.width, how.context + how.width)


def work(dims: Dims, how: Streaming, n_frames: Sequence[int], silence: int) -> Work:
    """Both ways over utterances of these lengths; `silence` frames follow each in a final pass."""
    hops = [range(1, -(-n // how.chunk) + 1) for n in n_frames]
    streamed = sum(len(h) for h in hops) * step(dims, how)
    anew = sum(encode(dims, min(i * how.chunk, n)) for n, h in zip(n_frames, hops, strict=True) for i in h)
    finals = sum(encode(dims, n + silence) for n in n_frames)
    return Work(streamed / 1e9, anew / 1e9, finals / 1e9)

"""Where the decoder's alignment heads look, and whether it went through the audio once, from start to end.

Whisper sometimes leaves out seconds of speech, or says what it has said again in other words. Neither is a loop, and the
probabilities of the words are as good as ever; only the looks show it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from whisperlet.audio import Float32

Floats = TypeVar("Floats", Float32, NDArray[np.float64])

MEDIAN_FRAMES = 7  # over which attention is smoothed, as openai-whisper's word times are
PLACE_TOKENS = 5  # whose median look is where the decoder is; one that looks astray does not move it
# Both limits were counted before looks were smoothed, which changed no final of en_read_dev (158 clips).
MAX_SKIPPED = 120  # frames, 2.4 s; of 750 finals of read English those that left nothing out had gaps up to 102
# Heads that look further back than that have lost their place; of the same finals those that repeated nothing went back
# by 15 at the most.
MAX_BACK = 50  # frames, one second


class Looks(NamedTuple):
    """Where the alignment heads looked in the last call of `decode`, by token."""

    frames: NDArray[np.int64]  # of the audio, the one that they looked at most
    beyond: Float32  # share of their attention that went to the padding after the audio

    @classmethod
    def of(cls, attention: Float32, n_frames: int) -> Looks:
        """From weights of shape (n_tokens, n_cross).

        A single frame in a silence often draws most of the attention whatever is said; a word takes several.
        """
        speech = attention[:, :n_frames]
        return cls(median_filter(speech).argmax(-1), 1 - speech.sum(-1) / attention.sum(-1))


def median_filter(x: Floats, width: int = MEDIAN_FRAMES) -> Floats:
    """Running median along the last axis, mirrored at the ends; as it is if there are too few values. `width` is odd."""
    half = width // 2
    if x.shape[-1] <= half:
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(half, half)], mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded, width, axis=-1)
    medians: Floats = np.partition(windows, half, axis=-1)[..., half]
    return medians


def place(looks: Sequence[int]) -> float:
    """Frame at which the decoder is after tokens that looked there."""
    return float(median(looks[-PLACE_TOKENS:])) if looks else 0.0


def is_once_through(looks: Sequence[int], first: int, end: int) -> bool:
    """Whether tokens that looked at these frames, in their order, are all that was said from frame `first` to `end`.

    Where nothing at all is heard, nothing is held to be left out: it may be a noise.
    """
    return not looks or not (_skips(looks, first, end) or _goes_back(looks, end))


def _skips(looks: Sequence[int], first: int, end: int) -> bool:
    places = [first, *sorted(look for look in looks if first <= look < end), end]
    return any(b - a > MAX_SKIPPED for a, b in pairwise(places))


def _goes_back(looks: Sequence[int], end: int) -> bool:
    within = [min(look, end) for look in looks]  # what looks at the silence after the speech is at its end
    places = [median(within[i : i + PLACE_TOKENS]) for i in range(len(within) - PLACE_TOKENS + 1)]
    return any(now < before - MAX_BACK for before, now in zip(places, places[PLACE_TOKENS:], strict=False))

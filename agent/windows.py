"""Windows of the encoder: how many frames it is to look at."""

from __future__ import annotations

from collections.abc import Sequence


def joint(lengths: Sequence[int]) -> int:
    """The longest that two segments may be heard together in: short of the largest, which takes time and memory."""
    return max((n for n in lengths if n < max(lengths)), default=max(lengths))


def to_try(sizes: Sequence[int], n_frames: int) -> list[int]:
    """The smallest of the sizes that takes so many frames, then one of twice that, then the largest."""
    largest = max(sizes)
    first = min((n for n in sizes if n >= n_frames), default=largest)
    second = min((n for n in sizes if n >= 2 * first), default=largest)
    return sorted({first, second, largest})

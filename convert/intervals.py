"""How sure a figure of a set is: bootstrap intervals over clips, for one model and for the difference of two.

A rate is a ratio of sums, errors over words. Clips are drawn anew with replacement, whole, because the words of a clip
are not independent; for a difference both models are scored on the same draw (Bisani and Ney, "Bootstrap estimates for
confidence intervals in ASR performance evaluation", 2004). Intervals are percentiles of the draws.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

N_RESAMPLES = 10_000
SEED = 0
CONFIDENCE = 0.95
BATCH_VALUES = 2_000_000  # of one draw after another, that are held in memory at once

Array = np.ndarray[Any, np.dtype[np.float64]]
Statistic = Callable[..., Array]  # of samples and the keyword `axis`


class Interval(msgspec.Struct, frozen=True):
    """From `low` to `high`, in the unit of the figure that it goes with."""

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether a difference is more than chance."""
        return self.low > 0 or self.high < 0


def ratio(tops: Array, bottoms: Array, axis: int = -1) -> Array:
    """Sum over sum; not a number where there is nothing to divide by."""
    whole = bottoms.sum(axis=axis)
    quotient: Array = np.divide(tops.sum(axis=axis), whole, out=np.full(np.shape(whole), np.nan), where=whole > 0)
    return quotient


def median(values: Array, axis: int = -1) -> Array:
    """The middle one."""
    middle: Array = np.median(values, axis=axis)
    return middle


def interval(
    statistic: Statistic, *samples: Array, n_resamples: int = N_RESAMPLES, seed: int = SEED
) -> Interval | None:
    """Interval of a statistic.

    Parameters
    ----------
    statistic
        Takes the samples and `axis`, as `ratio` does.
    samples
        shape = (n_clips,) each; an item belongs to the same clip in all of them, and they are drawn together.

    Returns
    -------
    None where there are fewer than two clips, which tell nothing of how much clips vary.
    """
    n_clips = len(samples[0])
    if n_clips < 2:
        return None
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(_drawn(statistic, samples, n_resamples, seed), [tail, 1 - tail])
    return Interval(float(low), float(high))


def _drawn(statistic: Statistic, samples: tuple[Array, ...], n_resamples: int, seed: int) -> Array:
    """Return the statistic of each draw, shape = (n_resamples,)."""
    from scipy.stats import DegenerateDataWarning, bootstrap

    with warnings.catch_warnings():
        # Of draws with nothing to divide by, which spoil its own quantiles; those are not used.
        warnings.simplefilter("ignore", DegenerateDataWarning)
        drawn: Array = bootstrap(
            samples,
            statistic,
            paired=True,
            vectorized=True,
            n_resamples=n_resamples,
            batch=max(1, BATCH_VALUES // len(samples[0])),
            method="percentile",
            rng=np.random.default_rng(seed),
        ).bootstrap_distribution
    return drawn


def difference(statistic: Statistic, a: tuple[Array, ...], b: tuple[Array, ...], **options: int) -> Interval | None:
    """Interval of the statistic of `a` less that of `b`, both over the same clips."""

    def less(*samples: Array, axis: int = -1) -> Array:
        return statistic(*samples[: len(a)], axis=axis) - statistic(*samples[len(a) :], axis=axis)

    return interval(less, *a, *b, **options)

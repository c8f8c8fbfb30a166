"""Bootstrap intervals hold what they promise."""

import numpy as np
import pytest

from convert import intervals
from convert.intervals import difference, interval, median, ratio


def simulated(rng, n_clips, rate_a, rate_b):
    """Errors of two models and words of each clip; a hard clip is hard for both, and errors come in clusters."""
    words = rng.integers(3, 40, n_clips)
    hardness = rng.gamma(1.5, 1 / 1.5, n_clips)  # mean 1

    def errors(rate):
        own = rng.gamma(3.0, 1 / 3.0, n_clips)
        return rng.poisson(rate * hardness * own * words).astype(float)

    return errors(rate_a), errors(rate_b), words.astype(float)


def test_19_of_20_intervals_hold_the_true_difference():
    """Of rates whose difference is known; a percentile bootstrap of 100 clips is a little narrow, as the books say."""
    rng, n_runs, held, one_sided = np.random.default_rng(7), 300, 0, [0, 0]
    for _ in range(n_runs):
        a, b, words = simulated(rng, 100, 0.12, 0.10)
        span = difference(ratio, (a, words), (b, words), n_resamples=600)
        held += span.low <= 0.02 <= span.high
        one_sided[0] += span.high < 0.02
        one_sided[1] += span.low > 0.02
    assert 0.91 <= held / n_runs <= 0.98
    assert max(one_sided) / n_runs < 0.06  # both ends, not one at the cost of the other


def test_pairing_makes_it_narrow():
    a, b, words = simulated(np.random.default_rng(1), 100, 0.12, 0.10)
    paired = difference(ratio, (a, words), (b, words))
    apart = [interval(ratio, errors, words) for errors in (a, b)]
    assert paired.high - paired.low < sum(span.high - span.low for span in apart) * 0.75


def test_equal_models_differ_by_nothing():
    a, _, words = simulated(np.random.default_rng(2), 50, 0.1, 0.1)
    span = difference(ratio, (a, words), (a, words))
    assert (span.low, span.high) == (0, 0)
    assert not span.excludes_zero


def test_the_other_way_round_is_the_negative():
    a, b, words = simulated(np.random.default_rng(3), 50, 0.2, 0.1)
    forth = difference(ratio, (a, words), (b, words))
    back = difference(ratio, (b, words), (a, words))
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=1e-12)
    assert forth.excludes_zero
    assert back.excludes_zero


def test_it_is_of_clips_and_not_of_words():
    """Ten clips all right and ten all wrong: to draw their words one by one would claim to be surer."""
    words = np.full(20, 100.0)
    errors = np.repeat([0.0, 100.0], 10)
    span = interval(ratio, errors, words)
    assert span.low == pytest.approx(0.30, abs=0.06)
    assert span.high == pytest.approx(0.70, abs=0.06)


def test_it_is_the_same_every_time_and_in_any_batches(monkeypatch):
    a, _, words = simulated(np.random.default_rng(4), 60, 0.1, 0.1)
    first = interval(ratio, a, words)
    assert interval(ratio, a, words) == first
    assert interval(ratio, a, words, seed=1) != first
    assert interval(ratio, a, words, seed=1).low == pytest.approx(first.low, rel=0.1)


def test_draws_with_nothing_to_divide_by_are_left_out():
    span = interval(ratio, np.array([1.0, 0.0]), np.array([2.0, 0.0]))
    assert (span.low, span.high) == (0.5, 0.5)


def test_one_clip_tells_nothing():
    assert interval(ratio, np.array([1.0]), np.array([2.0])) is None


def test_median():
    values = np.random.default_rng(5).normal(100, 10, 400)
    span = interval(median, values)
    assert 97 < span.low < np.median(values) < span.high < 103
    assert intervals.median(np.array([[1.0, 2.0, 9.0], [4.0, 4.0, 4.0]]), axis=-1).tolist() == [2, 4]

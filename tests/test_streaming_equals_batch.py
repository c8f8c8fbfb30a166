"""However audio comes, and however often a partial is asked for: the final is that of the clip in one piece."""

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from listening import assert_orderly, listen, offline, said

from agent import transcriber
from agent.config import RecogniserConfig
from whisperlet.audio import SAMPLE_RATE


class Counting:
    """An engine that counts the windows it encodes."""

    def __init__(self, engine):
        self._engine = engine
        self.n_windows = 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def encode(self, state, mel):
        self.n_windows += 1
        self._engine.encode(state, mel)


def assert_same(final, expected):
    assert said(final) == said(expected)
    assert final.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
    assert final.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 5),
    n=st.integers(1, 28_000),
    n_after=st.integers(0, 4000),
    language=st.sampled_from(["en", "haw", "auto"]),
    data=st.data(),
)
def test_toy(litert, toy_bundle, seed, n, n_after, language, data):
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig(language=language, hop_ms=100))
    pcm = toy.babble(2.0, seed)[: n + n_after]
    expected = offline(ears, pcm[:n])
    edges = data.draw(st.lists(st.integers(0, n + n_after), max_size=8))
    asked = data.draw(st.sets(st.integers(0, 8)))
    partials, final = listen(ears, pcm, edges, n_after, asked.__contains__)
    assert_same(final, expected)
    assert_orderly(partials, final, hop=1600)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 5),
    n=st.integers(1, 28_000),
    n_after=st.integers(0, 9000),
    language=st.sampled_from(["en", "auto"]),
    data=st.data(),
)
def test_finals_heard_in_advance(litert, toy_bundle, seed, n, n_after, language, data):
    """Pauses come at random; what was heard in them is taken where nothing followed and else thrown away."""
    engine = Counting(litert)
    ears = transcriber.build(toy_bundle, engine, RecogniserConfig(language=language, hop_ms=100, settle_ms=60))
    pcm = toy.babble(2.4, seed)[: n + n_after]
    expected = offline(ears, pcm[:n])
    at = sorted(data.draw(st.lists(st.integers(0, n), max_size=6)))
    pauses = [(a, b) for a, b in zip(at[::2], at[1::2], strict=False) if a < b]
    edges = data.draw(st.lists(st.integers(0, n + n_after), max_size=12))
    engine.n_windows = 0
    early = set()
    partials, final = listen(ears, pcm, edges, n_after, pauses=pauses, early=early)
    assert_same(final, expected)
    assert_orderly(partials, final, hop=1600, early=early)
    assert len(early) <= 1 + len(pauses)
    assert engine.n_windows <= 2 * (len(pauses) + 2)  # a look at each pause and at the end, twice where it loops


def test_nothing_is_left_to_do_after_a_pause(litert, toy_bundle):
    engine = Counting(litert)
    ears = transcriber.build(toy_bundle, engine, RecogniserConfig(hop_ms=100))
    pcm = toy.babble(3.0, 1)
    n_after, pauses = SAMPLE_RATE // 2, [(12_000, 20_000)]
    expected = offline(ears, pcm[:-n_after])
    n_once, engine.n_windows = engine.n_windows, 0
    edges, counts = range(320, len(pcm), 320), []
    partials, final = listen(ears, pcm, edges, n_after, lambda _: counts.append(engine.n_windows) or True, pauses)
    assert_same(final, expected)
    assert len(partials) > 3
    assert engine.n_windows == counts[-1]  # the last chunk and `finish` encode nothing
    assert n_once < engine.n_windows <= 2 * n_once + 1


@pytest.mark.parametrize("final_pass", [True, False])
def test_long_segments(litert, toy_bundle, final_pass):
    """Up to the longest, across the lengths of cross-attention."""
    for duration_s in (4.7, 11.0, 28.0):
        pcm = np.concatenate([toy.babble(duration_s, 2), np.zeros(8000, np.int16)])
        finals = []
        for block in (4800, 320 * 37, len(pcm)):
            config = RecogniserConfig(hop_ms=500, final_pass=final_pass)
            ears = transcriber.build(toy_bundle, litert, config)
            partials, final = listen(ears, pcm, range(block, len(pcm), block), n_after=8000)
            assert len(partials) >= (block < len(pcm)) * duration_s // 1
            assert_orderly(partials, final, hop=8000)
            finals.append(final)
        for final in finals[1:]:
            assert_same(final, finals[0])


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 5), n=st.integers(300, 60_000), n_after=st.integers(0, 4000), data=st.data())
def test_without_a_final_pass(litert, toy_bundle, seed, n, n_after, data):
    """The stream comes to the same result however the audio was cut."""
    config = RecogniserConfig(hop_ms=100, final_pass=False)
    pcm = toy.babble(4.0, seed)[: n + n_after]
    _, expected = listen(transcriber.build(toy_bundle, litert, config), pcm, [], n_after)
    edges = data.draw(st.lists(st.integers(0, n + n_after), max_size=8))
    pauses = [(n // 3, n // 2)]
    partials, final = listen(transcriber.build(toy_bundle, litert, config), pcm, edges, n_after, pauses=pauses)
    assert_same(final, expected)
    assert_orderly(partials, final, hop=1600)


def test_what_was_heard_before_leaves_no_trace(litert, toy_bundle):
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig(hop_ms=100))
    pcm = [toy.babble(duration_s, seed) for seed, duration_s in enumerate((1.2, 2.0, 0.3, 0.9))]
    alone = []
    for clip in pcm:
        fresh = transcriber.build(toy_bundle, litert, RecogniserConfig(hop_ms=100))
        alone.append(listen(fresh, clip, range(3200, len(clip), 3200)))
    assert len({final.text for _, final in alone}) == 4
    for i in (0, 1, 2, 3, 1, 0):
        partials, final = listen(ears, pcm[i], range(3200, len(pcm[i]), 3200))
        assert_same(final, alone[i][1])
        assert [(p.text, p.stable_chars) for p in partials] == [(p.text, p.stable_chars) for p in alone[i][0]]
        assert_same(offline(ears, pcm[i]), alone[i][1])

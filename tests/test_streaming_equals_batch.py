"""However audio comes, and however often a partial is asked for: the final is that of the clip in one piece."""

import itertools

import numpy as np
import pytest
import soundfile
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import transcriber
from agent.config import RecogniserConfig
from agent.engine import LiteRtEngine
from agent.messages import SpeechChunk


def listen(ears, pcm, edges, n_after=0, step=lambda _: True):
    """Feed `pcm` cut at `edges`, the last `n_after` samples being hang-over; partials, and the final."""
    speech_end = len(pcm) - n_after
    edges = [0, *sorted(edges), len(pcm)]
    partials = []
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        is_last = i == len(edges) - 2
        ears.feed(SpeechChunk(1, 0, pcm[start:end], start, is_last=is_last, speech_end=speech_end if is_last else 0))
        if step(i) and (partial := ears.step()):
            partials.append(partial)
    return partials, ears.finish()


def said(final):
    return final.text, final.n_tokens, final.start, final.end, final.language, final.rejected, final.stable_chars


def assert_same(final, expected):
    assert said(final) == said(expected)
    assert final.avg_logprob == pytest.approx(expected.avg_logprob, abs=1e-3)
    assert final.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-4)


def assert_orderly(partials, final, hop):
    known = 0
    for i, partial in enumerate(partials):
        assert partial.revision == i + 1
        assert not partial.is_final
        assert 0 <= partial.stable_chars <= len(partial.text)
        assert partial.end - known >= hop
        known = partial.end
    assert final.is_final
    assert final.revision == len(partials) + 1
    assert final.stable_chars == len(final.text)


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
    ears.feed(transcriber.whole(pcm[:n]))
    expected = ears.finish()
    edges = data.draw(st.lists(st.integers(0, n + n_after), max_size=8))
    asked = data.draw(st.sets(st.integers(0, 8)))
    partials, final = listen(ears, pcm, edges, n_after, asked.__contains__)
    assert_same(final, expected)
    assert_orderly(partials, final, hop=1600)


def test_what_was_heard_before_leaves_no_trace(litert, toy_bundle):
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig(hop_ms=100))
    pcm = [toy.babble(duration_s, seed) for seed, duration_s in enumerate((1.2, 2.0, 0.3, 0.9))]
    alone = []
    for clip in pcm:
        fresh = transcriber.build(toy_bundle, litert, RecogniserConfig(hop_ms=100))
        fresh.feed(transcriber.whole(clip))
        alone.append(fresh.finish())
    assert len({final.text for final in alone}) == 4
    for i in (0, 1, 2, 3, 1, 0):
        ears.feed(transcriber.whole(pcm[i], utterance=i))
        assert_same(ears.finish(), alone[i])


@pytest.fixture(scope="module")
def real(real_bundle, weight_caches):
    engine = LiteRtEngine(real_bundle, 2, weight_caches)
    return transcriber.build(real_bundle, engine, RecogniserConfig(hop_ms=500))


@pytest.mark.bundle
@pytest.mark.parametrize("name", ["1089-134686-0001", "61-70968-0000"])
def test_real_speech(real, clips, name):
    path = next(clip for clip in clips if clip.stem == name)
    pcm = np.concatenate([soundfile.read(path, dtype="int16")[0], np.zeros(6400, np.int16)])
    real.feed(transcriber.whole(pcm[:-6400]))
    expected = real.finish()
    assert len(expected.text.split()) > 5
    for block in (4800, 320 * 37):
        partials, final = listen(real, pcm, range(block, len(pcm), block), n_after=6400)
        assert said(final) == said(expected)
        assert final.avg_logprob == pytest.approx(expected.avg_logprob, abs=0.02)
        assert_orderly(partials, final, hop=8000)
        assert len(partials) >= 2
        assert any(partial.stable_chars for partial in partials)
        assert sum(final.text.startswith(p.text[: p.stable_chars]) for p in partials) >= len(partials) // 2

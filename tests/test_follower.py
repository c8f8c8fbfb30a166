"""The follower on the toy: steps of the stream, hops, and a decoder that is used by others in between."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.decoding import greedy
from agent.follower import NOTHING, Bound, Follower
from whisperlet.audio import SAMPLES_PER_FRAME, WINDOW_FRAMES, to_float32
from whisperlet.logmel import LogMel

PROMPT = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
SPEC = toy.STREAMS[0]


@pytest.fixture
def follower(litert):
    return Follower(Bound(litert), litert.manifest, SPEC)


def fed(*parts):
    made = LogMel(toy.DIMS.n_mels)
    for samples in parts:
        made.feed(samples)
    return made


def hear(follower, logmel, limit=24):
    follower.listen(logmel)
    follower.attend()
    return follower.hear(PROMPT, limit)


def drafts(follower, samples, hop=4000, between=lambda: None):
    """What is heard every quarter of a second."""
    made, found = LogMel(toy.DIMS.n_mels), []
    for start in range(0, len(samples), hop):
        made.feed(samples[start : start + hop])
        if follower.is_due(made, 0):
            found.append(hear(follower, made))
            between()
    return found


SPEECH = to_float32(toy.babble(7.0, 4))


@settings(max_examples=25, deadline=None)
@given(n=st.integers(8000, len(SPEECH)), cuts=st.lists(st.integers(0, len(SPEECH)), max_size=9), data=st.data())
def test_steps_do_not_depend_on_how_audio_was_cut(litert, n, cuts, data):
    one, other = (Follower(Bound(litert), litert.manifest, SPEC) for _ in range(2))
    one.listen(fed(SPEECH[:n]))
    made = LogMel(toy.DIMS.n_mels)
    for start, end in itertools.pairwise([0, *sorted(cut for cut in cuts if cut < n), n]):
        made.feed(SPEECH[start:end])
        if other.is_due(made, data.draw(st.sampled_from([0, 500]))):
            other.listen(made)
            assert other.n_heard <= end // SAMPLES_PER_FRAME
            assert (other.n_heard - SPEC.overlap) % SPEC.chunk == 0
    other.listen(made)
    assert other.n_heard == one.n_heard > n / SAMPLES_PER_FRAME - SPEC.chunk - 3
    for name in ("cross_k_0", "cross_v_1", "past_k_1", "past_v_0"):
        a, b = ({**f._stream.cross, **f._stream.past}[name] for f in (one, other))
        used = min(a.shape[1:]) if name.startswith("past") else one.n_heard + SPEC.padding
        cut = np.s_[:, :used] if "_k_" in name else np.s_[:, :, :used]
        np.testing.assert_array_equal(a[cut], b[cut], err_msg=name)


@pytest.mark.parametrize(("hop_ms", "least"), [(0, 15), (100, 15), (300, 15), (310, 30), (1000, 60)])
def test_it_is_due_after_a_hop(follower, hop_ms, least):
    made, ends = LogMel(toy.DIMS.n_mels), [0]
    assert not follower.is_due(made, hop_ms)
    for start in range(0, len(SPEECH), 320):
        made.feed(SPEECH[start : start + 320])
        if follower.is_due(made, hop_ms):
            follower.listen(made)
            ends.append(follower.n_heard)
            assert not follower.is_due(made, hop_ms)
    hops = np.diff(ends).tolist()
    assert len(hops) > 4
    assert set(hops[1:]) == {least}
    assert hops[0] >= max(SPEC.chunk, hop_ms / 20)


def test_a_new_segment_starts_afresh(litert, follower):
    first, second = SPEECH, to_float32(toy.babble(3.0, 5))
    expected = drafts(Follower(Bound(litert), litert.manifest, SPEC), second)
    assert len({tuple(draft.tokens) for draft in expected}) > 3
    assert drafts(follower, first) != expected
    for _ in range(2):
        follower.begin()
        assert (follower.draft, follower.n_heard) == (NOTHING, 0)
        assert drafts(follower, second) == expected


def test_others_may_use_the_decoder_in_between(litert, follower):
    """What they leave in its state is not looked at, and words become stable all the same."""
    clean = Follower(Bound(litert), litert.manifest, SPEC)
    expected = drafts(clean, SPEECH, between=clean.displace)
    assert any(draft.stable for draft in expected)

    def verify():
        follower.displace()
        litert.encode(decoder.state, fed(SPEECH[:16_000]).window(256))
        greedy(decoder, toy.VOCABULARY, PROMPT, [], limit=20, block=4)

    decoder = follower._decoder
    assert drafts(follower, SPEECH, between=verify) == expected


def test_stable_text_grows_on_the_toy(follower):
    found = drafts(follower, SPEECH)
    for before, after in itertools.pairwise(found):
        assert after.stable[: len(before.stable)] == before.stable
    assert len(found) > 15


def test_the_longest_segment_fits(follower):
    """From one length of cross-attention to the next, up to where the window is full."""
    samples = np.resize(SPEECH, 30 * 16_000)
    made, lengths = LogMel(toy.DIMS.n_mels), []
    for start in range(0, len(samples), 16_000):
        made.feed(samples[start : start + 16_000])
        draft = hear(follower, made)
        assert len(draft.tokens) <= 24
        lengths.append(follower._decoder.state.n_cross)
    assert [n for n, _ in itertools.groupby(lengths)] == list(toy.CROSS_FRAMES)
    assert WINDOW_FRAMES - SPEC.chunk < follower.n_heard + SPEC.padding <= WINDOW_FRAMES
    n_heard = follower.n_heard
    hear(follower, made)
    assert follower.n_heard == n_heard


def test_no_step_without_new_audio():
    calls = []
    engine = SimpleNamespace(
        new_state=lambda: SimpleNamespace(position=0),
        new_stream=lambda spec: SimpleNamespace(spec=spec, committed=0, n_frames=0),
        listen=lambda stream, _mel, n: calls.append(n) or setattr(stream, "n_frames", stream.committed + n),
    )
    follower = Follower(Bound(engine), toy.make_manifest(), SPEC)
    for n in (0, 1000, 9000, 9001):
        follower.listen(fed(SPEECH[:n]))
    assert calls == [25]

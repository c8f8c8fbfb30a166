import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.messages import AudioChunk
from agent.vad import FRAME, QUIET, Gate, segments
from whisperlet.audio import SAMPLE_RATE, samples, seconds

SPEECH = Path(__file__).parent.parent / "demo/speech"
CONFIG = VadConfig()


def silence(duration_s):
    return np.zeros(round(duration_s * SAMPLE_RATE), np.int16)


def clip(name):
    return read_file(SPEECH / f"{name}.flac")


@pytest.fixture(scope="module")
def dialogue():
    """Two short clips with silence around them."""
    return np.concatenate(
        [silence(0.7), clip("1089-134691-0000"), silence(1.5), clip("1089-134686-0001"), silence(1.013)]
    )


@pytest.fixture(scope="module")
def monologue():
    """A minute of talk."""
    return np.concatenate([read_file(path) for path in sorted(SPEECH.glob("*.flac"))])


def chunks(pcm, sizes=(320,), start=0):
    """As a microphone would deliver them: each arrives when its last sample is captured."""
    at, i = 0, 0
    while at < len(pcm):
        part = pcm[at : at + sizes[i % len(sizes)]]
        at, i = at + len(part), i + 1
        yield AudioChunk(part, start + at - len(part), seconds(start + at))


def run(pcm, config=CONFIG, sizes=(320,)):
    gate = Gate(config, clock=lambda: -1.0)
    messages = [message for chunk in chunks(pcm, sizes) for message in gate.feed(chunk)]
    return messages + gate.flush()


def by_segment(messages):
    found = {}
    for message in messages:
        found.setdefault(message.key, []).append(message)
    return found


def heard(messages):
    """Audio of a segment as a consumer takes it: contiguous, ended once, truncated at `speech_end`."""
    assert [m.is_last for m in messages] == [False] * (len(messages) - 1) + [True]
    assert all(a.start + len(a.samples) == b.start for a, b in itertools.pairwise(messages))
    start, end = messages[0].start, messages[-1].speech_end
    assert end >= start
    return start, end, np.concatenate([m.samples for m in messages])[: end - start]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(16, 6000), min_size=1, max_size=6))
def test_output_does_not_depend_on_the_chunking(dialogue, sizes):
    def plain(messages):
        return [
            (*m.key, m.start, m.samples.tobytes(), m.is_last, m.continues, m.speech_end, m.voiced_end) for m in messages
        ]

    assert plain(run(dialogue, sizes=sizes)) == plain(run(dialogue))


def test_each_sample_of_an_utterance_is_delivered_once(dialogue):
    found = by_segment(run(dialogue))
    assert list(found) == [(1, 0), (2, 0)]
    ends = [0]
    for messages in found.values():
        start, end, audio = heard(messages)
        np.testing.assert_array_equal(audio, dialogue[start:end])
        assert start >= ends[-1]
        ends.append(end)


def test_speech_begins_with_pre_roll_and_ends_with_its_last_voiced_frame(dialogue):
    without = [s.start for s in segments(dialogue, VadConfig(pre_roll_ms=0))]
    with_pre_roll = [s.start for s in segments(dialogue, VadConfig(pre_roll_ms=300))]
    assert [a - b for a, b in zip(without, with_pre_roll, strict=True)] == [samples(300)] * 2
    first, second = segments(dialogue, CONFIG)
    assert samples(700) < first.speech_end < samples(700) + len(clip("1089-134691-0000"))
    assert second.decision - second.speech_end == samples(CONFIG.hang_over_ms)


def test_it_says_where_the_voice_was_last_heard_while_the_speech_goes_on(dialogue):
    for messages in by_segment(run(dialogue)).values():
        *going_on, last = messages
        assert last.voiced_end is None
        for before, message in itertools.pairwise(going_on):
            end = message.start + FRAME
            assert before.voiced_end <= message.voiced_end <= end
            assert message.voiced_end in (before.voiced_end, end)
        assert going_on[-1].voiced_end == last.speech_end  # what a consumer was told in the pause was right
        assert len({message.voiced_end for message in going_on}) > 10


def test_after_a_cut_the_voice_may_have_been_last_heard_before_the_segment():
    talk = clip("1272-128104-0000")[samples(500) : samples(4_800)]
    config = VadConfig(max_segment_s=5.0, hang_over_ms=1000, cut_window_s=0.5)
    second = by_segment(run(np.concatenate([talk, silence(3)]), config))[1, 1]
    assert all(message.voiced_end <= second[0].start for message in second[:-1])


def test_pre_roll_never_reaches_into_the_utterance_before(dialogue):
    """The pause is 1.5 s; its audio before the decision was sent with the first utterance, but cut off there."""
    first, second = segments(dialogue, VadConfig(pre_roll_ms=2000))
    assert second.start == first.speech_end < first.decision


def test_an_utterance_does_not_count_towards_opening_the_next(monologue):
    config = VadConfig(start_ms=1000, hang_over_ms=100, pre_roll_ms=0)
    found = list(segments(monologue, config))
    assert len(found) > 5
    assert all(b.decision - a.decision >= samples(1_100) for a, b in itertools.pairwise(found))


@pytest.mark.parametrize(("pause_s", "n_utterances"), [(0.3, 1), (1.0, 2)])
def test_hang_over_bridges_short_pauses_only(pause_s, n_utterances):
    word = clip("1089-134691-0000")[5_000:21_000]
    pcm = np.concatenate([silence(0.5), word, silence(pause_s), word, silence(1)])
    assert len(list(segments(pcm, CONFIG))) == n_utterances


def test_speech_goes_up_to_a_ragged_end_of_the_audio():
    pcm = clip("1089-134686-0000")[: 3 * SAMPLE_RATE + 123]
    (only,) = segments(pcm, CONFIG)
    assert only.speech_end == only.decision == len(pcm)


def test_times_follow_from_arrival(dialogue):
    for message in run(dialogue, sizes=(1600,)):
        if message.is_last:
            assert message.speech_end_monotonic_s == pytest.approx(seconds(message.speech_end))
            assert message.decided_monotonic_s == -1.0


@pytest.mark.parametrize("rms", [0, 1, 3, 10, 30, 100])
def test_silence_and_low_noise_open_nothing(rms):
    noise = np.random.default_rng(0).normal(0, rms, 20 * SAMPLE_RATE).astype(np.int16)
    assert run(noise) == []


def test_a_click_opens_nothing():
    pcm = np.concatenate([silence(1), clip("1089-134686-0000")[16_000:16_480], silence(1)])
    assert run(pcm) == []
    assert run(pcm, VadConfig(start_ms=20)) != []


@pytest.mark.parametrize("max_segment_s", [5.0, 11.3, 28.0])
def test_a_monologue_is_cut_without_seams(monologue, max_segment_s):
    config = VadConfig(hang_over_ms=5000, max_segment_s=max_segment_s)
    messages = list(by_segment(run(monologue, config)).values())
    assert [m[-1].key for m in messages] == [(1, i) for i in range(len(messages))]
    assert [m[-1].continues for m in messages] == [True] * (len(messages) - 1) + [False]
    pieces = [heard(m) for m in messages]
    assert all(a[1] == b[0] for a, b in itertools.pairwise(pieces))
    np.testing.assert_array_equal(np.concatenate([p[2] for p in pieces]), monologue[pieces[0][0] : pieces[-1][1]])
    longest = max(sum(len(m.samples) for m in part) for part in messages)
    assert longest <= samples(1000 * max_segment_s)


def test_a_cut_lies_at_the_quietest_point(monologue):
    config = VadConfig(hang_over_ms=5000)
    energy = np.square(monologue.astype(np.float64))
    cuts = [s for s in segments(monologue, config) if s.continues]
    assert len(cuts) == 2
    for cut in cuts:
        window = range(cut.decision - samples(1000 * config.cut_window_s), cut.decision - QUIET)
        quietest = min(energy[i : i + QUIET].sum() for i in range(window.start, window.stop, 16))
        assert energy[cut.speech_end - QUIET // 2 : cut.speech_end + QUIET // 2].sum() <= quietest


def test_a_cut_finds_the_only_pause(monologue):
    pcm = monologue.copy()
    pcm[samples(26_000) : samples(26_200)] = 0
    first = next(segments(pcm, VadConfig(hang_over_ms=5000)))
    assert first.continues
    assert samples(26_050) <= first.speech_end <= samples(26_150)


def test_silence_after_a_cut_makes_an_empty_segment():
    talk = clip("1272-128104-0000")[samples(500) : samples(4_800)]
    pcm = np.concatenate([talk, silence(3)])
    config = VadConfig(max_segment_s=5.0, hang_over_ms=1000, cut_window_s=0.5)
    first, second = segments(pcm, config)
    assert (first.continues, second.continues) == (True, False)
    assert second.start == second.speech_end == first.speech_end > len(talk)
    assert second.decision < len(pcm)


def test_a_gap_ends_the_segment_where_it_begins(monologue):
    gate = Gate(CONFIG, clock=lambda: 0.0)
    gap_at, gap = samples(2_010), samples(700)
    before = [m for c in chunks(monologue[:gap_at]) for m in gate.feed(c)]
    assert before
    assert not any(m.is_last for m in before)
    after = [m for c in chunks(monologue[gap_at : 2 * gap_at], start=gap_at + gap) for m in gate.feed(c)]
    start, end, audio = heard(before + after[:1])
    assert end == gap_at
    assert after[0].speech_end_monotonic_s == pytest.approx(seconds(gap_at))
    np.testing.assert_array_equal(audio, monologue[start:gap_at])
    assert after[1].key == (2, 0)
    assert after[1].start >= gap_at + gap


def test_a_stretch_after_a_gap_is_judged_afresh(dialogue):
    """The detector adapts to what it hears; what it heard before a gap must not matter behind it."""
    gate, fresh = Gate(CONFIG), Gate(CONFIG)
    noise = np.random.default_rng(1).normal(0, 2000, 5 * SAMPLE_RATE).astype(np.int16)
    for chunk in chunks(noise):
        gate.feed(chunk)
    gate.flush()
    n_before = len(by_segment(run(noise)))
    shifted = [m for c in chunks(dialogue, start=10 * SAMPLE_RATE) for m in gate.feed(c)]
    expected = [m for c in chunks(dialogue, start=10 * SAMPLE_RATE) for m in fresh.feed(c)]
    assert [(m.utterance - n_before, m.start, m.is_last) for m in shifted] == [
        (m.utterance, m.start, m.is_last) for m in expected
    ]


def test_flush_twice_says_nothing_twice(dialogue):
    gate = Gate(CONFIG)
    for chunk in chunks(dialogue[: samples(1_800)]):
        gate.feed(chunk)
    assert gate.is_open
    assert [m.is_last for m in gate.flush()] == [True]
    assert gate.flush() == []
    assert not gate.is_open


def test_messages_stream_a_frame_at_a_time(dialogue):
    sizes = [len(m.samples) for m in by_segment(run(dialogue))[1, 0]]
    assert sizes[0] >= samples(CONFIG.pre_roll_ms)
    assert set(sizes[1:]) == {FRAME}

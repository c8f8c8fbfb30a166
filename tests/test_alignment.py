"""What the alignment heads' looks tell of words that were left out or said twice."""

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from scripted import ScriptedEngine

from agent import transcriber
from agent.alignment import MAX_BACK, MAX_SKIPPED, Looks, is_once_through, median_filter, place
from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from agent.transcriber import Transcriber
from whisperlet.audio import SAMPLES_PER_FRAME

END = 400
STEADY = list(range(16, END, 16))
LONG = toy.babble(END / 50 + 0.1)[: END * SAMPLES_PER_FRAME]


def test_the_median_drops_a_spike_and_mirrors_the_ends():
    x = np.array([[1.0, 2.0, 90.0, 4.0, 5.0]])
    assert median_filter(x, 3).tolist() == [[2.0, 2.0, 4.0, 5.0, 4.0]]
    assert median_filter(x, 11) is x


def test_where_the_heads_look():
    attention = np.array([[0.5, 1.0, 0.2, 0.3], [0.0, 0.1, 0.0, 1.9]], np.float32)
    looks = Looks.of(attention, 3)
    assert looks.frames.tolist() == [1, 1]  # of the audio, even where most goes to the padding
    np.testing.assert_allclose(looks.beyond, [0.15, 0.95], atol=1e-6)
    assert Looks.of(attention, 4).beyond.tolist() == pytest.approx([0, 0], abs=1e-6)


@pytest.mark.parametrize("spike", [0, 4, 5, 97, 99])
def test_a_frame_that_draws_attention_whatever_is_said_is_not_looked_at(spike):
    attention = np.full((2, 120), 0.001, np.float32)
    attention[:, spike] = 0.4
    attention[0, 60:66], attention[1, 70:75] = 0.08, 0.08
    first, second = Looks.of(attention, 100).frames
    assert 60 <= first < 66
    assert 70 <= second < 75


def test_a_steady_reading_is_once_through():
    assert is_once_through(STEADY, 0, END)


def test_nothing_heard_leaves_nothing_out():
    assert is_once_through([], 0, END)


@pytest.mark.parametrize("first", [0, 100, END - MAX_SKIPPED - 1])
@pytest.mark.parametrize("n_skipped", [MAX_SKIPPED, MAX_SKIPPED + 1])
def test_what_is_left_out(first, n_skipped):
    """At the start, in the middle and at the end."""
    within = [frame for frame in range(END) if not first < frame < first + n_skipped]
    assert is_once_through(within, 0, END) == (n_skipped <= MAX_SKIPPED)


def test_a_look_beyond_the_speech_covers_nothing():
    assert not is_once_through([*range(0, 200, 10), END + 5, END + 80], 0, END)


def test_what_was_said_before_counts_from_its_end():
    assert is_once_through([250, 300, 350], 200, END)
    assert not is_once_through([250, 300, 350], 100, END)
    assert not is_once_through([3, 7, 100, 350], 200, END)  # looks at what was said before cover nothing of the rest


@given(st.integers(0, len(STEADY) - 1), st.integers(0, 1500))
def test_one_look_astray_is_forgiven(i, frame):
    assert is_once_through([*STEADY[:i], frame, *STEADY[i + 1 :]], 0, END)


@pytest.mark.parametrize(("back", "expected"), [(MAX_BACK, True), (MAX_BACK + 1, False)])
def test_what_is_said_again(back, expected):
    before = [*range(16, 300, 16), *[300] * 5]
    assert is_once_through([*before, *[300 - back] * 5], 0, END) == expected


def test_how_far_into_the_silence_it_looked_is_no_matter():
    assert is_once_through([*STEADY, *[1400] * 5, *[END - 10] * 5], 0, END)


def test_place():
    assert place([]) == 0
    assert place([5, 9]) == 7
    assert place([500, 500, 500, 10, 11, 12, 13, 900]) == 12


ASTRAY, GOOD = [10, 20, 160, 170, 175, 180], [30, 60, 90, 120, 150, 180]  # of 190 frames


def heard(*looks, **engine):
    """A final, and the windows it took; in each the words look elsewhere."""
    engine = ScriptedEngine("abcdef", encode_frames=[256, 512, 1500], **engine)
    ears = Transcriber(engine, engine.tokenizer, RecogniserConfig(silence_frames=0))
    encode, rest = engine.encode, iter(looks)

    def look_elsewhere(state, mel):
        encode(state, mel)
        engine.frames = next(rest)

    engine.encode = look_elsewhere
    ears.feed(transcriber.whole(LONG[: 190 * SAMPLES_PER_FRAME]))
    return ears.finish(), engine.windows


def test_one_look_is_enough_if_it_leaves_nothing_out():
    final, windows = heard(GOOD)
    assert (final.text, windows) == ("abcdef", [256])


def test_what_leaves_words_out_is_heard_again_in_larger_windows():
    final, windows = heard(ASTRAY, GOOD)
    assert (final.text, windows) == ("abcdef", [256, 512])
    final, windows = heard(ASTRAY, ASTRAY, ASTRAY)
    assert (final.text, windows) == ("abcdef", [256, 512, 1500])  # the last stands, better or not


def test_what_is_withheld_anyway_is_not_heard_again():
    final, windows = heard(ASTRAY, no_speech=0.99, certainty=0.1)
    assert (final.text, final.rejected, windows) == ("", "no_speech", [256])


def test_a_partial_does_not_pay_for_another_look():
    engine = ScriptedEngine("abcdef")
    ears = Transcriber(engine, engine.tokenizer, RecogniserConfig())
    ears.feed(SpeechChunk(1, 0, LONG, 0))
    assert ears.step() is not None
    assert engine.windows == []

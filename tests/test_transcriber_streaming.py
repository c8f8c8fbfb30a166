"""What streaming adds to the transcriber: finals heard in a pause, finals of the stream itself, ways of streaming."""

import msgspec
import numpy as np
import pytest
from scripted import ScriptedEngine

from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from agent.transcriber import Transcriber
from whisperlet.audio import SAMPLE_RATE, samples
from whisperlet.errors import ConfigError

SPEECH = np.full(2 * SAMPLE_RATE, 100, np.int16)
SETTLE_MS = 200
PAUSE = np.zeros(samples(SETTLE_MS), np.int16)


class Talk:
    """Hands audio to a transcriber as the gate does."""

    def __init__(self, engine, start=0, **config):
        config = {"settle_ms": SETTLE_MS, "hop_ms": 300, **config}
        self.ears = Transcriber(engine, engine.tokenizer, RecogniserConfig(**config))
        self.start = self.end = start
        self.voiced_end = None

    def hear(self, audio, *, is_voiced, **changes):
        start, self.end = self.end, self.end + len(audio)
        self.voiced_end = self.end if is_voiced else self.voiced_end
        self.ears.feed(SpeechChunk(1, 0, audio, start, **{"voiced_end": self.voiced_end, **changes}))
        return self.ears.step()

    def end_here(self):
        """The gate has decided: there was no more."""
        self.hear(PAUSE[:320], is_voiced=False, voiced_end=None, is_last=True, speech_end=self.voiced_end)
        return self.ears.finish()


def test_the_final_is_heard_in_the_pause():
    engine = ScriptedEngine("over")
    talk = Talk(engine)
    assert talk.hear(SPEECH, is_voiced=True).text == "over"
    assert talk.hear(PAUSE[:-1], is_voiced=False) is None
    assert engine.windows == []  # may be the gap between two words
    for _ in range(3):
        assert talk.hear(PAUSE[:1], is_voiced=False) is None
        assert engine.windows == [256]
    engine.passes.clear()
    engine.answer = "another"
    final = talk.end_here()
    assert (final.text, final.is_final, final.end, final.revision) == ("over", True, len(SPEECH), 2)
    assert (engine.passes, engine.windows) == ([], [256])  # nothing was left to do


def test_what_is_heard_in_the_pause_is_shown():
    engine = ScriptedEngine("over", decode_tokens=[1, 4, 16])
    talk = Talk(engine)
    talk.hear(SPEECH, is_voiced=True)
    engine.answer = "overt"
    before = talk.hear(SPEECH, is_voiced=True)
    assert (before.text, before.stable_chars) == ("overt", 4)
    engine.answer = "overture"
    shown = talk.hear(PAUSE, is_voiced=False)
    assert (shown.text, shown.stable_chars, shown.is_final, shown.revision) == ("overture", 4, False, 3)
    assert shown.end == 2 * len(SPEECH)
    assert talk.hear(PAUSE[:1], is_voiced=False) is None  # once
    assert talk.end_here().text == "overture"


def test_what_is_heard_in_the_pause_ends_no_earlier_than_what_was_heard_before():
    engine = ScriptedEngine("over")
    talk = Talk(engine, settle_ms=1000)
    silence = np.zeros(SAMPLE_RATE, np.int16)
    before = talk.hear(np.concatenate([SPEECH, silence[:-1]]), is_voiced=False, voiced_end=len(SPEECH))
    assert before.end > len(SPEECH)
    talk.voiced_end, engine.answer = len(SPEECH), "overture"
    assert talk.hear(silence[:1], is_voiced=False).end == before.end
    assert talk.end_here().end == len(SPEECH)


@pytest.mark.parametrize(
    ("answer", "changes"),
    [
        ("every", {}),  # is not what was stable
        ("overt", {}),  # is no news
        ("overture", {"partials": False}),
        ("overture", {"no_speech_threshold": -1.0, "logprob_threshold": 1.0}),  # would be withheld
    ],
)
def test_not_all_that_is_heard_in_the_pause_is_shown(answer, changes):
    engine = ScriptedEngine("over", decode_tokens=[1, 4, 16])
    talk = Talk(engine)
    talk.hear(SPEECH, is_voiced=True)
    engine.answer = "overt"
    talk.hear(SPEECH, is_voiced=True)
    engine.answer = answer
    talk.ears.config = msgspec.structs.replace(talk.ears.config, **changes)
    assert talk.hear(PAUSE, is_voiced=False) is None
    assert len(engine.windows) == 1


def test_it_is_thrown_away_if_speech_goes_on():
    engine = ScriptedEngine("well")
    talk = Talk(engine)
    talk.hear(SPEECH, is_voiced=True)
    assert talk.hear(PAUSE, is_voiced=False) is None
    assert len(engine.windows) == 1
    engine.answer = "well then"
    partial = talk.hear(SPEECH, is_voiced=True)
    assert (partial.text, partial.is_final, partial.revision) == ("well then", False, 2)
    assert talk.hear(PAUSE, is_voiced=False) is None
    assert len(engine.windows) == 2
    final = talk.end_here()
    assert (final.text, final.end, final.revision) == ("well then", 2 * len(SPEECH) + len(PAUSE), 3)
    assert len(engine.windows) == 2


def test_one_that_ends_elsewhere_is_not_taken():
    """The gate may see a last voiced frame that no step saw."""
    engine = ScriptedEngine("well")
    talk = Talk(engine)
    talk.hear(SPEECH, is_voiced=True)
    talk.hear(PAUSE, is_voiced=False)
    engine.answer = "well then"
    talk.voiced_end += 320
    assert talk.end_here().text == "well then"
    assert len(engine.windows) == 2


def test_what_was_stable_before_a_pause_is_stable_after_it():
    engine = ScriptedEngine("one two", decode_tokens=[1, 4, 16])
    talk = Talk(engine)
    talk.hear(SPEECH, is_voiced=True)
    before = talk.hear(SPEECH, is_voiced=True)
    assert before.text[: before.stable_chars] == "one two"
    talk.hear(PAUSE, is_voiced=False)
    engine.answer = "one ten, four"
    after = talk.hear(SPEECH, is_voiced=True)
    assert after.text.startswith("one two")
    assert after.stable_chars >= before.stable_chars


def test_no_partial_while_nothing_is_said():
    engine = ScriptedEngine("a")
    talk = Talk(engine, settle_ms=5000, hop_ms=300)
    assert talk.hear(SPEECH, is_voiced=True).text == "a"
    for _ in range(9):
        assert talk.hear(PAUSE, is_voiced=False) is None
    assert talk.hear(SPEECH, is_voiced=True).text == "a"


def test_where_the_voice_ends_need_not_be_known():
    engine = ScriptedEngine("a")
    talk = Talk(engine)
    for i in range(3):
        assert talk.hear(SPEECH, is_voiced=False).revision == i + 1
    assert engine.windows == []


@pytest.mark.parametrize("before", [0, 1, 8000])
def test_a_segment_that_begins_in_a_pause(before):
    """After a forced cut, the voice may have been heard last before the segment."""
    engine = ScriptedEngine("a")
    talk = Talk(engine, start=20_000)
    talk.voiced_end = 20_000 - before
    for _ in range(3):
        assert talk.hear(PAUSE, is_voiced=False) is None
    assert engine.windows == engine.passes == []
    talk.voiced_end = 20_000
    final = talk.end_here()
    assert (final.text, final.end) == ("", 20_000)


def test_without_partials_the_final_is_heard_in_advance_all_the_same():
    engine = ScriptedEngine("a")
    talk = Talk(engine, partials=False)
    assert talk.hear(SPEECH, is_voiced=True) is None
    assert talk.hear(PAUSE, is_voiced=False) is None
    assert engine.steps == []
    assert len(engine.windows) == 1
    assert talk.end_here().text == "a"
    assert len(engine.windows) == 1


@pytest.mark.parametrize("settle_ms", [0, 20])
def test_partials_come_however_soon_a_pause_counts(settle_ms):
    engine = ScriptedEngine("a")
    talk = Talk(engine, settle_ms=settle_ms)
    for i in range(3):
        assert talk.hear(SPEECH, is_voiced=True).revision == i + 1
    assert engine.windows == []


def test_a_final_may_be_what_the_stream_has_come_to():
    engine = ScriptedEngine("over and out")
    talk = Talk(engine, final_pass=False)
    talk.hear(SPEECH, is_voiced=True)
    assert talk.hear(PAUSE, is_voiced=False) is None
    n_steps = len(engine.steps)
    final = talk.end_here()
    assert (final.text, final.is_final, final.revision) == ("over and out", True, 2)
    assert final.end == len(SPEECH)
    assert engine.windows == []
    heard_until = max(first + n for _, first, n in engine.steps)
    assert heard_until >= len(SPEECH) // 320 + engine.manifest.silence_frames["default"]
    assert len(engine.steps) > n_steps


@pytest.mark.parametrize(("frame", "windows"), [(100, []), (60, [1500])])
def test_the_final_pass_is_not_left_out_where_the_stream_left_speech_out(frame, windows):
    engine = ScriptedEngine("a")
    engine.frames = [frame]  # of 200, of which 120 in a row may be silent
    talk = Talk(engine, final_pass=False)
    talk.hear(np.concatenate([SPEECH, SPEECH]), is_voiced=True)
    assert talk.end_here().text == "a"
    assert engine.windows[:1] == windows


def test_the_stream_itself_takes_in_the_longest_segment():
    engine = ScriptedEngine("a")
    talk = Talk(engine, final_pass=False)
    for _ in range(14):
        talk.hear(SPEECH, is_voiced=True)
    talk.hear(np.zeros(2 * SAMPLE_RATE - 320, np.int16), is_voiced=False)
    assert talk.end_here().text == "a"
    short = Talk(ScriptedEngine("a"), final_pass=False, partials=False)
    short.hear(SPEECH[:300], is_voiced=True)
    assert short.end_here().text == "a"


def test_a_bundle_that_cannot_stream_has_finals_only():
    for final_pass in (True, False):
        engine = ScriptedEngine("a", streams=[])
        talk = Talk(engine, final_pass=final_pass)
        assert talk.hear(SPEECH, is_voiced=True) is None
        assert talk.end_here().text == "a"
        assert engine.windows == [256]


def test_overlap_can_be_chosen():
    for overlap, name in ((None, "stream_15_40"), (10, "stream_15_10"), (40, "stream_15_40")):
        engine = ScriptedEngine("a")
        assert Talk(engine, overlap_frames=overlap).hear(SPEECH, is_voiced=True).text == "a"
        assert {step[0] for step in engine.steps} == {name}
    with pytest.raises(ConfigError, match=r"^recogniser\.overlap_frames: the bundle does not have 20; it has 40, 10$"):
        Talk(ScriptedEngine(), overlap_frames=20)

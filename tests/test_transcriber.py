"""Policy of the transcriber, on an engine that says what a test wants to hear; then on the toy."""

import msgspec
import numpy as np
import pytest
import toy
from scripted import ScriptedEngine

from agent import transcriber
from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from agent.transcriber import Transcriber
from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import ConfigError

SECOND = np.full(SAMPLE_RATE, 100, np.int16)


def make(engine, **config):
    return Transcriber(engine, engine.tokenizer, RecogniserConfig(**{"hop_ms": 300, **config}))


def part(samples, start=0, segment=0, **changes):
    return SpeechChunk(1, segment, samples, start, **changes)


def test_a_clip_start_to_end():
    ears = make(ScriptedEngine("two words"))
    ears.feed(transcriber.whole(SECOND, utterance=7, start=500))
    final = ears.finish()
    assert (final.key, final.start, final.end) == ((7, 0), 500, 16_500)
    assert (final.text, final.is_final, final.language, final.rejected) == ("two words", True, "en", None)
    assert (final.n_tokens, final.stable_chars, final.revision, final.continues) == (9, 9, 1, False)
    assert final.n_attempts == 1
    assert final.avg_logprob > -0.01
    assert final.encode_ms > 0
    assert final.decode_ms > 0


def test_what_the_last_chunk_says_is_passed_on():
    ears = make(ScriptedEngine("a"))
    ears.feed(part(SECOND, 100))
    last = part(SECOND, 16_100, is_last=True, continues=True, speech_end=20_000)
    ears.feed(msgspec.structs.replace(last, speech_end_monotonic_s=1.5, decided_monotonic_s=2.5))
    final = ears.finish()
    assert (final.start, final.end, final.continues) == (100, 20_000, True)
    assert (final.speech_end_monotonic_s, final.decided_monotonic_s) == (1.5, 2.5)


@pytest.mark.parametrize(("hop_ms", "frames"), [(300, (25, 40, 55, 70)), (100, (25, 40, 55, 70)), (600, (40, 70))])
def test_partials_keep_to_the_hop(hop_ms, frames):
    ears = make(ScriptedEngine("a"), hop_ms=hop_ms)
    assert ears.step() is None
    made = []
    for i in range(80):
        ears.feed(part(SECOND[:320], 320 * i))
        made.append(ears.step())
    ends = [partial.end for partial in made if partial]
    assert ends == [320 * n for n in frames]
    assert ears.step() is None
    assert [partial.revision for partial in made if partial] == list(range(1, len(frames) + 1))
    assert all(0 < partial.encode_ms < 1000 for partial in made if partial)


def test_each_frame_is_encoded_only_as_often_as_steps_overlap():
    engine = ScriptedEngine("a")
    ears = make(engine)
    for i in range(200):
        ears.feed(part(SECOND[:320], 320 * i))
        ears.step()
    chunk, overlap = toy.STREAMS[0].chunk, toy.STREAMS[0].overlap
    full = [(name, first) for name, first, n in engine.steps if n == chunk + overlap]
    assert full == [("stream_15_40", chunk * i) for i in range(len(full))]
    assert len(full) == (200 - 3 - overlap) // chunk
    assert len(engine.steps) - len(full) == 2  # hops before there is audio for a full step
    assert engine.windows == []


def test_no_partials_after_the_last_chunk_or_where_none_are_wanted():
    ears = make(ScriptedEngine("a"))
    ears.feed(transcriber.whole(SECOND))
    assert ears.step() is None
    assert ears.finish().revision == 1
    assert ears.step() is None
    quiet = make(ScriptedEngine("a"), partials=False)
    quiet.feed(part(SECOND))
    assert quiet.step() is None


def test_stable_is_what_two_partials_agree_on():
    engine = ScriptedEngine(decode_tokens=[1, 4, 16])
    ears = make(engine)
    seen = []
    for i, answer in enumerate(["one", "one two", "one ten", "one ten"]):
        engine.answer = answer
        ears.feed(part(SECOND, len(SECOND) * i))
        partial = ears.step()
        assert not partial.is_final
        seen.append((partial.text, partial.text[: partial.stable_chars]))
    assert seen == [("one", ""), ("one two", "one"), ("one ten", "one t"), ("one ten", "one ten")]
    engine.answer = "none"
    ears.feed(part(SECOND[:10], 4 * len(SECOND), is_last=True, speech_end=4 * len(SECOND)))
    final = ears.finish()
    assert (final.text, final.stable_chars, final.revision) == ("none", 4, 5)


def test_stable_never_ends_within_a_character():
    engine = ScriptedEngine()
    ears = make(engine)
    for i, answer in enumerate(["né", "nè"]):
        engine.answer = answer
        ears.feed(part(SECOND, len(SECOND) * i))
        partial = ears.step()
    assert (partial.text, partial.stable_chars) == ("nè", 1)


def test_the_last_hypothesis_is_verified_in_few_passes():
    engine = ScriptedEngine("abcdefg")
    ears = make(engine)
    ears.feed(part(SECOND))
    ears.step()
    assert len(engine.passes) == 8
    engine.passes.clear()
    ears.feed(part(SECOND[:1], len(SECOND), is_last=True, speech_end=len(SECOND)))
    assert ears.finish().text == "abcdefg"
    assert len(engine.passes) == 3  # prompt, then four tokens at a time


@pytest.mark.parametrize(
    ("language", "duration_s", "window"),
    [("en", 1.28, 128), ("en", 1.29, 256), ("haw", 1.12, 256), ("haw", 1.13, 1500), ("en", 29.9, 1500)],
)
def test_window(language, duration_s, window):
    """Speech and the silence after it fit; the longest window may have less silence."""
    engine = ScriptedEngine("a")
    ears = make(engine, language=language)
    ears.feed(transcriber.whole(np.zeros(round(duration_s * SAMPLE_RATE), np.int16)))
    ears.finish()
    assert engine.windows == [window]


def test_silence_can_be_set():
    engine = ScriptedEngine("a")
    engine.frames = [64]
    ears = make(engine, silence_frames=0)
    ears.feed(transcriber.whole(np.zeros(128 * 320, np.int16)))
    ears.finish()
    assert engine.windows == [128]


def test_detected_language():
    engine = ScriptedEngine("a", language=toy.HAW)
    ears = make(engine, language="auto")
    for _ in range(2):
        engine.passes.clear()
        ears.feed(transcriber.whole(SECOND))
        assert ears.finish().language == "haw"
        assert engine.passes[:2] == [[toy.SOT], [toy.SOT, toy.HAW, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]]


def test_unknown_language():
    with pytest.raises(ConfigError, match=r"recogniser\.language: the bundle does not have 'de'; it has en, haw"):
        make(ScriptedEngine(), language="de")


def test_english_only():
    vocabulary = msgspec.structs.replace(toy.VOCABULARY, transcribe=None, languages={})
    for language in ("en", "auto"):
        engine = ScriptedEngine("a", vocabulary=vocabulary)
        ears = make(engine, language=language)
        ears.feed(transcriber.whole(SECOND))
        final = ears.finish()
        assert (final.language, final.text) == ("en", "a")
        assert engine.passes[0] == [toy.SOT, toy.NO_TIMESTAMPS]
    with pytest.raises(ConfigError, match="does not have 'haw'; it has en"):
        make(ScriptedEngine(vocabulary=vocabulary), language="haw")


@pytest.mark.parametrize(
    ("no_speech", "certainty", "rejected"),
    [(0.9, 0.0, "no_speech"), (0.9, 30.0, None), (0.3, 0.0, None), (0.59, 0.0, None), (0.61, 0.0, "no_speech")],
)
def test_text_is_withheld_where_the_model_doubts_that_there_was_speech(no_speech, certainty, rejected):
    engine = ScriptedEngine("a", no_speech=no_speech, certainty=certainty)
    ears = make(engine)
    ears.feed(transcriber.whole(SECOND))
    final = ears.finish()
    assert final.rejected == rejected
    assert final.no_speech_prob == pytest.approx(no_speech, abs=0.001)
    assert bool(final.text) == (rejected is None)
    assert final.stable_chars == len(final.text)


def test_thresholds_can_be_set():
    engine = ScriptedEngine("a", no_speech=0.9, certainty=0.0)
    for config in ({"no_speech_threshold": 0.95}, {"logprob_threshold": -10.0}):
        ears = make(engine, **config)
        ears.feed(transcriber.whole(SECOND))
        assert ears.finish().rejected is None


def test_a_loop_is_heard_again_in_larger_windows():
    engine = ScriptedEngine([40, 41] * 12)
    ears = make(engine)
    ears.feed(transcriber.whole(SECOND))
    final = ears.finish()
    assert engine.windows == [128, 256, 1500]
    assert final.n_attempts == 3
    assert final.n_tokens == 2  # still one
    engine.windows.clear()
    ears.feed(part(SECOND, segment=1))
    assert ears.step().n_tokens == 2
    assert engine.windows == []  # a partial does not pay for that


def test_token_limit():
    engine = ScriptedEngine([20 + i * 7 % 101 for i in range(60)])
    ears = make(engine)
    for n_samples, limit in ((1600, 16 + 2), (SECOND.size, toy.N_TEXT_CTX - 8)):
        ears.feed(transcriber.whole(SECOND[:n_samples]))
        assert ears.finish().n_tokens == limit


def test_a_new_segment_starts_afresh():
    engine = ScriptedEngine("one")
    ears = make(engine)
    ears.feed(part(SECOND))
    assert ears.step().revision == 1
    ears.feed(part(SECOND[:12_000], 16_000, segment=1))
    partial = ears.step()
    assert (partial.key, partial.start, partial.end) == ((1, 1), 16_000, 24_000)
    assert (partial.revision, partial.stable_chars) == (1, 0)
    ears.reset()
    assert ears.step() is None


def test_a_segment_without_speech():
    """What follows a forced cut may be nothing but the hang-over."""
    engine = ScriptedEngine("a")
    ears = make(engine)
    ears.feed(part(SECOND, 5000, segment=1, is_last=True, speech_end=5000))
    final = ears.finish()
    assert (final.text, final.is_final, final.start, final.end, final.n_tokens) == ("", True, 5000, 5000, 0)
    assert engine.windows == []


def test_call_order_is_checked():
    ears = make(ScriptedEngine("a"))
    with pytest.raises(AssertionError, match="nothing was fed"):
        ears.finish()
    ears.feed(part(SECOND))
    with pytest.raises(AssertionError, match="the segment goes on"):
        ears.finish()


def test_more_than_a_window_is_refused():
    ears = make(ScriptedEngine("a"))
    thirty_s = np.zeros(30 * SAMPLE_RATE, np.int16)
    ears.feed(part(thirty_s))
    assert 0 < len(thirty_s) - ears.step().end < SAMPLE_RATE
    with pytest.raises(ValueError, match="480001 samples are more than a window's 480000"):
        ears.feed(part(thirty_s[:1], len(thirty_s)))


def test_a_partial_waits_for_the_language():
    engine = ScriptedEngine("a", language=toy.HAW)
    ears = make(engine, language="auto")
    ears.feed(part(SECOND[: SAMPLE_RATE // 2]))
    assert ears.step() is None
    ears.feed(part(np.tile(SECOND, 2), SAMPLE_RATE // 2))
    assert ears.step().language == "haw"
    assert engine.passes[:2] == [[toy.SOT], [toy.SOT, toy.HAW, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]]
    engine.language = toy.EN  # once known it stays, until the final looks at everything
    engine.passes.clear()
    ears.feed(part(SECOND, 5 * SAMPLE_RATE // 2))
    assert ears.step().language == "haw"
    assert [toy.SOT] not in engine.passes
    ears.feed(part(SECOND[:10], 7 * SAMPLE_RATE // 2, is_last=True, speech_end=3 * SAMPLE_RATE))
    assert ears.finish().language == "en"


def test_the_toy_detects_what_it_is_surest_of(litert, toy_bundle):
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig(language="auto"))
    heard = set()
    for seed in range(8):
        pcm = toy.babble(1.0, seed)
        ears.feed(transcriber.whole(pcm))
        final = ears.finish()
        heard.add(final.language)
        plain = transcriber.build(toy_bundle, litert, RecogniserConfig(language=final.language, silence_frames=64))
        plain.feed(transcriber.whole(pcm))
        assert plain.finish().text == final.text
    assert heard <= {"en", "haw"}

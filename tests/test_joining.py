"""A segment that follows another soon: heard as what comes after that one's text, in the audio of both."""

import itertools

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from scripted import ScriptedEngine

from agent import decoding, transcriber, windows
from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from agent.segment import Before
from agent.transcriber import Transcriber
from whisperlet.audio import SAMPLE_RATE, samples, to_float32
from whisperlet.logmel import LogMel

SECOND = np.full(SAMPLE_RATE, 100, np.int16)
JOIN_MS = RecogniserConfig().join_pause_ms


def said_at(start, utterance, pcm=SECOND):
    return transcriber.whole(pcm, utterance=utterance, start=start)


def heard(ears, *chunks):
    finals = []
    for chunk in chunks:
        ears.feed(chunk)
        finals.append(ears.finish())
    return finals


def scripted(**config):
    """An engine that says one text of all that it hears, word by word, and a transcriber on it."""
    engine = ScriptedEngine("we go on")
    return engine, Transcriber(engine, engine.tokenizer, RecogniserConfig(**config))


def first(engine, n_words):
    """Have the first segment's final hold so many words."""
    engine.answer = " ".join(["we", "go", "on"][:n_words])


def one_then_the_other(engine, ears, pause_ms, utterance=2):
    first(engine, 2)
    (before,) = heard(ears, said_at(0, 1))
    assert before.text == "we go"
    engine.answer = "we go on"
    engine.windows.clear()
    engine.passes.clear()
    (final,) = heard(ears, said_at(SAMPLE_RATE + samples(pause_ms), utterance))
    return final


def test_it_is_what_comes_after_the_text_before():
    engine, ears = scripted()
    final = one_then_the_other(engine, ears, 1000)
    assert (final.text, final.start, final.end, final.n_tokens) == ("on", 2 * SAMPLE_RATE, 3 * SAMPLE_RATE, 3)
    assert engine.windows == [256]  # three seconds with their silence, where one would take 128
    prompt = engine.tokenizer.prompt("en")
    assert engine.passes[0][: len(prompt) + 5] == [*prompt, *engine.tokenizer.encode("we go")]


@pytest.mark.parametrize(
    ("pause_ms", "config", "utterance"),
    [
        (JOIN_MS + 1, {}, 2),
        (300, {"join_pause_ms": 299}, 2),
        (300, {"join_pause_ms": 0}, 2),
        (300, {"language": "auto"}, 2),  # which one it is, its own audio has to tell
        (300, {}, 1),  # the same once more
        (300, {}, 3),  # another clip
        (-1200, {}, 2),  # counted anew
    ],
)
def test_by_itself(pause_ms, config, utterance):
    engine, ears = scripted(**config)
    final = one_then_the_other(engine, ears, pause_ms, utterance)
    assert final.text == "we go on"
    assert engine.windows == [128]


def test_the_longest_pause():
    engine, ears = scripted()
    assert one_then_the_other(engine, ears, JOIN_MS).text == "on"


def test_nothing_to_join():
    """A segment whose text was withheld, and one from before the engine was told to forget."""
    engine, ears = scripted(no_speech_threshold=0.5, logprob_threshold=-0.5)
    engine.no_speech, engine.certainty = 0.9, 0.0
    assert heard(ears, said_at(0, 1))[0].rejected == "no_speech"
    engine.no_speech, engine.certainty = 0.0, 30.0
    assert heard(ears, said_at(20_000, 2))[0].text == "we go on"
    ears.reset()
    assert heard(ears, said_at(40_000, 3))[0].text == "we go on"


@pytest.mark.parametrize(("n", "text"), [(1920, "on"), (1921, "we go on")])
@pytest.mark.parametrize("lengths", [[256, 1500], [128, 256, 1500]])
def test_both_have_to_fit_below_the_longest_cross_attention(n, text, lengths):
    """256 frames of 320 samples, 64 of them silence."""
    engine = ScriptedEngine("we go on", cross_frames=lengths)
    ears = Transcriber(engine, engine.tokenizer, RecogniserConfig())
    first(engine, 2)
    heard(ears, said_at(0, 1, np.resize(SECOND, 50_000)))
    engine.answer = "we go on"
    assert heard(ears, said_at(59_520, 2, np.resize(SECOND, n)))[0].text == text


def test_where_there_is_one_cross_attention_both_have_to_fit_into_that():
    assert windows.joint([1500]) == 1500


@pytest.mark.parametrize(("n_before", "n_after"), [(12, 12), (13, 24)])  # of 32 that the decoder holds
def test_both_have_to_fit_into_the_decoder(n_before, n_after):
    """Together while the text before takes no more than half of the room."""
    engine, ears = scripted()
    engine.answer = list(range(40, 40 + n_before))
    heard(ears, said_at(0, 1))
    engine.answer = list(range(40, 100))
    assert heard(ears, said_at(20_000, 2))[0].n_tokens == n_after


def test_where_nothing_seems_to_follow_it_is_heard_by_itself():
    """The same words twice may be taken for an echo."""
    engine, ears = scripted()
    first(engine, 3)
    heard(ears, said_at(0, 1))
    engine.windows.clear()
    (final,) = heard(ears, said_at(20_000, 2))
    assert final.text == "we go on"
    assert engine.windows == [256, 128]
    assert final.n_attempts == 2
    assert final.no_speech_prob < 0.01


def test_a_repetition_is_heard_again_by_itself():
    engine, ears = scripted()
    first(engine, 2)
    heard(ears, said_at(0, 1))
    engine.windows.clear()
    loop = [*engine.tokenizer.encode("we go"), *[40] * 30]
    engine.answer = loop
    final = heard(ears, said_at(20_000, 2))[0]
    assert engine.windows[:2] == [256, 128]
    assert final.n_tokens < 12


def test_audio_lies_where_it_was():
    before_audio, gap, audio = np.arange(1, 2001), 500, np.arange(5000, 5800)
    made, after_it = LogMel(80), LogMel(80)
    made.feed(before_audio.astype(np.float32))
    after_it.feed(audio.astype(np.float32))
    before = Before((1, 0), made, 100, 2000, [5], "en")
    for start, expected in (
        (100 + 2000 + gap, [*before_audio, *[0] * gap, *audio[:700]]),
        (1600, [*before_audio[:1500], *audio[:700]]),  # the pre-roll of the second is in the first as well
    ):
        segment = transcriber.Segment(SpeechChunk(2, 0, audio, start), 80)
        segment.logmel = after_it
        both = before.together(segment, 700, 100_000)
        assert both.logmel.samples.tolist() == expected
        assert (both.end, both.first, both.said) == (len(expected), start - 100, [5])


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 5),
    n=st.tuples(st.integers(3000, 24_000), st.integers(1000, 24_000)),
    pause=st.integers(0, 30_000),
    edges=st.lists(st.integers(1, 24_000), max_size=6),
    asked=st.sets(st.integers(0, 6)),
)
def test_streaming_equals_batch(litert, toy_bundle, seed, n, pause, edges, asked):
    """However the second comes, and whatever partials are asked for."""
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig(hop_ms=100))
    pcm = toy.babble(sum(n) / SAMPLE_RATE + 0.1, seed)[: sum(n)]
    first_one, second = pcm[: n[0]], pcm[n[0] :]
    start = n[0] + pause
    expected = heard(ears, said_at(0, 1, first_one), said_at(start, 2, second))[1]
    heard(ears, said_at(0, 3, first_one))
    places = [0, *sorted({edge for edge in edges if edge < n[1]}), n[1]]
    for i, (a, b) in enumerate(itertools.pairwise(places)):
        ears.feed(SpeechChunk(4, 0, second[a:b], start + a, is_last=b == n[1], speech_end=start + n[1]))
        if i in asked:
            ears.step()
    final = ears.finish()
    assert (final.text, final.n_tokens) == (expected.text, expected.n_tokens)
    assert final.no_speech_prob == pytest.approx(expected.no_speech_prob, abs=1e-3)


def test_the_decoder_goes_on_from_what_was_said(litert):
    """Going on by oneself after a text that is given equals going on after the same text that was found."""
    bound = transcriber.Bound(litert)
    logmel = LogMel(80)
    logmel.feed(to_float32(toy.babble(2.0, 20)))
    litert.encode(bound.state, logmel.window(2 * 128))
    prompt = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
    whole = decoding.greedy(bound, toy.VOCABULARY, prompt, [], limit=20, block=4)
    assert len(whole.tokens) > 4
    for n in (1, len(whole.tokens) // 2):
        bound.position = 0
        rest = decoding.greedy(bound, toy.VOCABULARY, prompt, [], limit=20 - n, block=4, said=whole.tokens[:n])
        assert whole.tokens[:n] + rest.tokens == whole.tokens

"""Real speech through the real bundle: finals, the stream alone, and talk that is too long for one segment."""

import itertools
import json

import numpy as np
import pytest
from listening import assert_orderly, listen, offline, said

from agent import decoding, transcriber
from agent.audio_files import read_file
from agent.config import RecogniserConfig, VadConfig
from agent.follower import Bound
from agent.messages import AudioChunk
from agent.vad import Gate
from convert import scoring
from whisperlet.audio import SAMPLE_RATE, samples, seconds, to_float32
from whisperlet.logmel import log_mel
from whisperlet.tokenizer import Tokenizer

pytestmark = [pytest.mark.bundle, pytest.mark.slow, pytest.mark.timeout(900)]
HOP_S = 0.5
HANG_OVER = samples(400)
LONG_S = 75.0
MAX_APART = 25.0  # percent of words that the stream alone may hear differently
MAX_LOST = 1.0  # points of word error rate that seams may cost


@pytest.fixture(scope="module")
def build(real_bundle, real_litert):
    """A transcriber with settings of its own on the one engine."""
    return lambda **config: transcriber.build(
        real_bundle, real_litert, RecogniserConfig(**{"hop_ms": int(1000 * HOP_S), **config})
    )


def heard(clips, stem):
    """A clip and the hang-over after it."""
    path = next(clip for clip in clips if clip.stem == stem)
    return np.concatenate([read_file(path), np.zeros(HANG_OVER, np.int16)])


def test_verifying_equals_one_by_one(real_litert, real_bundle, clips):
    """The transcript of each clip, out of a good draft, a bad one and none."""
    decoder, vocabulary = Bound(real_litert), real_bundle.manifest.vocabulary
    prompt = Tokenizer(real_bundle.tokenizer_json, vocabulary).prompt("en")

    def hear(draft, block):
        decoder.position = 0
        return decoding.greedy(decoder, vocabulary, prompt, draft, limit=200, block=block)

    for clip in clips:
        real_litert.encode(decoder.state, log_mel(to_float32(read_file(clip)), 3000))
        expected = hear([], 1)
        assert len(expected.tokens) > 3
        n = len(expected.tokens) // 2
        wrong = [*expected.tokens[:n], 1000, *expected.tokens[n + 1 :]]
        for draft in (expected.tokens, wrong, [1000, 1001]):
            found = hear(draft, 16)
            assert found.tokens == expected.tokens, clip.stem
            assert found.avg_logprob == pytest.approx(expected.avg_logprob, abs=0.02)


@pytest.mark.parametrize("name", ["1089-134686-0001", "61-70968-0000"])
def test_finals_equal_those_of_the_clip_in_one_piece(build, clips, name):
    pcm = heard(clips, name)
    ears = build()
    expected = offline(ears, pcm[:-HANG_OVER])
    assert len(expected.text.split()) > 5
    for block, pauses in ((4800, None), (320 * 37, None), (320, [(20_000, 26_000)])):
        early = set()
        partials, final = listen(ears, pcm, range(block, len(pcm), block), HANG_OVER, pauses=pauses, early=early)
        assert said(final) == said(expected)
        assert final.avg_logprob == pytest.approx(expected.avg_logprob, abs=0.02)
        assert_orderly(partials, final, hop=8000, early=early)
        assert len(early) <= (2 if pauses else 0)
        assert len(partials) >= 2
        assert any(partial.stable_chars for partial in partials)


def test_the_stream_alone(build, clips):
    """Without a final pass, the finals are still what was said, whichever way the audio came."""
    pairs = []
    for stem in ("1089-134686-0001", "61-70968-0000", "1272-128104-0000"):
        pcm = heard(clips, stem)
        reference = offline(build(), pcm[:-HANG_OVER]).text
        finals = [
            listen(build(final_pass=False), pcm, range(block, len(pcm), block), n_after=HANG_OVER)[1]
            for block in (4800, 320 * 61)
        ]
        assert said(finals[0]) == said(finals[1])
        pairs.append((scoring.normalise(reference, "en"), scoring.normalise(finals[0].text, "en")))
    assert scoring.word_error_rate(pairs) < MAX_APART


# Talk that goes on for longer than a segment may


@pytest.fixture(scope="module")
def long_talk(speech_dir):
    """Audio, and what is said from where to where in it."""
    folder = speech_dir / "en_long"
    (line,) = (folder / "manifest.jsonl").read_text().splitlines()
    clip = json.loads(line)
    segments = [segment for segment in clip["segments"] if segment["end"] <= LONG_S]
    pcm = read_file(folder / clip["audio"])
    return pcm[: samples(1000 * segments[-1]["end"])], segments


@pytest.fixture(scope="module")
def followed(build, long_talk):
    """Each transcript with the time at which it came, on the clock of the audio; which of them came in a pause."""
    pcm, _ = long_talk
    gate = Gate(VadConfig(hang_over_ms=5000), clock=lambda: 0.0)
    ears, found, early = build(), [], set()

    def hear(chunks, now):
        for chunk in chunks:
            ears.feed(chunk)
            if chunk.is_last:
                found.append((now, ears.finish()))
        if partial := ears.step():
            found.append((now, partial))
            if ears.in_pause:
                early.add((partial.key, partial.revision))

    for start in range(0, len(pcm), 320):
        audio = pcm[start : start + 320]
        hear(gate.feed(AudioChunk(audio, start, 0.0)), seconds(start + len(audio)))
    hear(gate.flush(), seconds(len(pcm)))
    return found, early


@pytest.fixture(scope="module")
def transcripts(followed):
    return followed[0]


def words(text):
    return scoring.normalise(text, "en").split()


def test_a_seam_loses_nothing(build, long_talk, transcripts):
    pcm, segments = long_talk
    finals = [transcript for _, transcript in transcripts if transcript.is_final]
    assert [final.continues for final in finals] == [True] * (len(finals) - 1) + [False]
    assert len(finals) >= 3
    assert all(a.end == b.start for a, b in itertools.pairwise(finals))
    ears, unsegmented = build(), []
    for segment in segments:
        start, end = (samples(1000 * segment[key]) for key in ("start", "end"))
        unsegmented.append(offline(ears, pcm[start:end]).text)
    reference = " ".join(segment["text"] for segment in segments)
    joined = " ".join(final.text for final in finals)
    rates = [
        scoring.word_error_rate([(" ".join(words(reference)), " ".join(words(text)))])
        for text in (" ".join(unsegmented), joined)
    ]
    assert rates[1] <= rates[0] + MAX_LOST, joined


def test_no_word_is_doubled_at_a_seam(long_talk, transcripts):
    _, segments = long_talk
    said_words = words(" ".join(segment["text"] for segment in segments))
    doubled = {(*a,) for n in (1, 2, 3) for a in zip(*(said_words[i:] for i in range(2 * n)), strict=False)}
    finals = [words(transcript.text) for _, transcript in transcripts if transcript.is_final]
    for before, after in itertools.pairwise(finals):
        for n in (1, 2, 3):
            if before[-n:] == after[:n]:
                assert (*before[-n:], *after[:n]) in doubled


def test_partials_keep_coming_across_a_seam(transcripts):
    for i, (now, final) in enumerate(transcripts):
        if not (final.is_final and final.continues):
            continue
        before, after = transcripts[i - 1], transcripts[i + 1]
        assert (before[1].is_final, after[1].is_final) == (False, False)
        assert before[1].key == final.key != after[1].key
        assert now - before[0] <= 2 * HOP_S
        assert after[0] - now <= 2 * HOP_S
    times = [now for now, _ in transcripts]
    assert np.diff(times).max() < LONG_S / 20


def test_what_is_stable_stays_in_a_long_segment(followed):
    found, shown_early = followed
    for key, group in itertools.groupby((transcript for _, transcript in found), key=lambda t: t.key):
        *partials, final = group
        early = {revision for of, revision in shown_early if of == key}
        assert_orderly(partials, final, hop=int(HOP_S * SAMPLE_RATE), early=early)
        assert len(partials) > 20 or not final.continues

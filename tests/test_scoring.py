"""Error rates as the field defines them, and the figures of a whole set."""

import msgspec
import numpy as np
import pytest

from convert import evaluation, scoring
from convert.evaluate import Options
from convert.scored import Scored, Usage


@pytest.mark.parametrize(
    ("language", "text", "normalised"),
    [
        ("en", "Mr. Brown's colours: it's twenty-five!", "mister brown is colors it is 25"),
        ("en", "um, I'm [noise] gonna", "i am going to"),
        ("de", "Größe: 12,5!", "größe 12 5"),
        ("zh", "這個聽說。", "这个听说"),
        ("ja", "聽說。", "聽說"),
    ],
)
def test_normalise(language, text, normalised):
    assert scoring.normalise(text, language) == normalised


def test_word_error_rate():
    assert scoring.word_error_rate([("a b c d", "a x c")]) == pytest.approx(50)
    assert scoring.word_error_rate([("a b", "a b"), ("c d e f g h", "")]) == pytest.approx(75)  # over all words
    assert scoring.word_error_rate([("a", "a b c")]) == pytest.approx(200)
    assert scoring.word_error_rate([("", "noise"), ("a", "a")]) == 0
    assert scoring.word_error_rate([("", "noise")]) is scoring.word_error_rate([]) is None


def test_character_error_rate():
    assert scoring.character_error_rate([("这个 听说", "这 个听")]) == pytest.approx(25)
    assert scoring.character_error_rate([("", "noise")]) is None


def scored(ref, hyp, language="en", **changes):
    plain = {
        "id": "c", "duration_s": 2.0, "finalise_ms": None, "end_to_final_ms": None, "rejected": [],
        "ref": ref, "hyp": hyp, "language": language,
    }  # fmt: skip
    return Scored(**plain | changes)


def summary(*clips, usage=None, terms=()):
    return evaluation.summary("m", "s", list(clips), usage or Usage(), msgspec.to_builtins(Options()), 123, terms)


def test_clips_without_text_are_counted_but_not_scored():
    """A text that is not given may have been said; only what is heard where nobody speaks was invented."""
    noise = [scored(None, "hello there", has_speech=False), scored(None, "", has_speech=False)]
    result = summary(scored("red blue", "red"), scored(None, "many more words"), *noise)
    assert (result.n, result.n_without_text, result.n_hallucinated) == (4, 3, 1)
    assert result.wer == 50
    assert (result.audio_s, result.speechless_s) == (8, 4)
    assert result.invented_words_per_hour == 2 * 3600 / 4
    assert result.rss_mb is result.finalise_ms is None
    assert summary(scored("red", "red")).invented_words_per_hour is None


def test_rates_come_with_intervals():
    clips = [scored("red blue", "red" if n % 2 else "red blue", id=str(n)) for n in range(50)]
    span = summary(*clips).intervals["wer"]
    assert 14 < span.low < 25 < span.high < 36
    assert "invented_words_per_hour" not in summary(*clips).intervals
    silent = [scored(None, "", has_speech=False, id=str(n)) for n in range(50)]
    assert summary(*silent).invented_words_per_hour == 0
    assert summary(*silent).intervals == {}  # of nothing, 0 to 0 would claim too much


def test_figures_of_clips_equal_jiwer_s():
    rng = np.random.default_rng(0)
    words = ["red", "blue", "green", "two", "mister"]
    clips = [scored(*(" ".join(rng.choice(words, rng.integers(1, 9))) for _ in range(2))) for _ in range(40)]
    pairs = [tuple(scoring.normalise(text, "en") for text in (clip.ref, clip.hyp)) for clip in clips]
    result = summary(*clips)
    assert result.wer == pytest.approx(scoring.word_error_rate(pairs), abs=0.005)
    assert result.cer == pytest.approx(scoring.character_error_rate(pairs), abs=0.005)


def test_languages_without_spaces_count_by_characters_only():
    result = summary(scored("這個聽說", "这个听", "zh"), scored("red blue", "red blue"))
    assert result.wer == 0
    assert result.cer == 9.09
    assert summary(scored("這個聽說", "这个听", "zh")).wer is None


def test_percentiles_and_usage():
    clips = [scored("a", "a", finalise_ms=float(n), end_to_final_ms=None) for n in range(101)]
    result = summary(*clips, scored("a", "a"), usage=Usage(core_s=20.4, rss_mb=99.96))
    assert (result.finalise_ms.p50, result.finalise_ms.p95) == (50, 95)
    assert result.end_to_final_ms is None
    assert (result.core_s_per_audio_s, result.rss_mb) == (0.1, 100.0)
    joules = [summary(*clips, usage=Usage(joules=j, meter="m")).joules_per_audio_s for j in (404.0, None)]
    assert joules == [2.0, None]

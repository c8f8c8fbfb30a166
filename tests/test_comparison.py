"""Two models on the same clips."""

import msgspec
import pytest

from convert import comparison, evaluation
from convert.evaluate import Options
from convert.scored import Scored, Usage
from whisperlet.errors import ConfigError

TEXT = "the quick brown fox jumps"


def clip(name, hyp, ref=TEXT, **changes):
    plain = {"duration_s": 2.0, "finalise_ms": None, "end_to_final_ms": None, "rejected": [], "language": "en"}
    return Scored(id=name, ref=ref, hyp=hyp, **plain | changes)


def evaluated(model, *clips, terms=(), **options):
    asked = msgspec.to_builtins(Options(**options))
    return evaluation.summary(model, "set", list(clips), Usage(), asked, 10, terms)


GOOD = [clip(str(n), TEXT) for n in range(20)]
BAD = [clip(str(n), "the quick brown socks jump" if n % 2 else "The quick, brown fox jumps!") for n in range(20)]


def figures(result):
    return {row.figure: (row.a, row.b, row.difference, row.interval) for row in result.differences}


def test_differences_and_changes():
    result = comparison.compare(evaluated("bad", *BAD), evaluated("good", *GOOD))
    a, b, less, span = figures(result)["wer"]
    assert (a, b, less) == (20, 0, 20)
    assert 8 < span.low < 20 < span.high < 32
    assert result.n_changed == 10  # stops and capitals are no change
    assert [(c.faults_a, c.faults_b) for c in result.changes] == [(2, 0)] * 10
    assert {"entity_f1", "finalise_ms"}.isdisjoint(figures(result))


def test_the_order_of_clips_does_not_matter():
    forth = comparison.compare(evaluated("bad", *BAD), evaluated("good", *GOOD))
    shuffled = comparison.compare(evaluated("bad", *BAD), evaluated("good", *reversed(GOOD)))
    assert shuffled.differences == forth.differences
    assert shuffled.changes == forth.changes


def test_a_model_and_itself():
    result = comparison.compare(evaluated("bad", *BAD), evaluated("bad", *BAD))
    assert all((row.difference, row.interval.low, row.interval.high) == (0, 0, 0) for row in result.differences)
    assert result.changes == []


def test_the_other_way_round_is_the_negative():
    forth = figures(comparison.compare(evaluated("bad", *BAD), evaluated("good", *GOOD)))
    back = figures(comparison.compare(evaluated("good", *GOOD), evaluated("bad", *BAD)))
    for figure, (_, _, less, span) in forth.items():
        assert back[figure][2] == -less
        assert (back[figure][3].low, back[figure][3].high) == pytest.approx((-span.high, -span.low))


def test_the_worst_change_comes_first():
    a = [clip("0", "the"), clip("1", "the quick brown fox"), clip("2", TEXT)]
    b = [clip("0", TEXT), clip("1", TEXT), clip("2", "")]
    result = comparison.compare(evaluated("a", *a), evaluated("b", *b))
    assert [(c.id, c.faults_a, c.faults_b) for c in result.changes] == [("0", 4, 0), ("1", 1, 0), ("2", 0, 5)]


def test_entities_and_invented_words():
    a = [clip("0", "the quick fox"), clip("1", "boo hoo", ref=None, has_speech=False)]
    b = [clip("0", TEXT), clip("1", "", ref=None, has_speech=False)]
    result = comparison.compare(*(evaluated("m", *clips, terms=["brown fox"]) for clips in (a, b)))
    assert figures(result)["entity_recall"][:3] == (0, 100, -100)
    assert figures(result)["invented_words_per_hour"][:3] == (3600, 0, 3600)
    assert [(c.id, c.faults_a, c.faults_b) for c in result.changes] == [("0", 2, 0), ("1", 2, 0)]


def test_slots_are_faults_where_no_text_is_known():
    a, b = (clip("0", hyp, ref=None, slots=["brown", "fox"]) for hyp in ("brown", "brown fox"))
    result = comparison.compare(evaluated("a", a), evaluated("b", b))
    assert [(c.faults_a, c.faults_b) for c in result.changes] == [(1, 0)]
    assert figures(result)["entity_f1"][:2] == (pytest.approx(200 / 3), 100)


def test_latencies_only_where_both_are_known():
    a = [clip("0", TEXT, finalise_ms=10.0), clip("1", TEXT, finalise_ms=20.0), clip("2", TEXT, finalise_ms=500.0)]
    b = [clip("0", TEXT, finalise_ms=15.0), clip("1", TEXT, finalise_ms=25.0), clip("2", TEXT)]
    result = comparison.compare(evaluated("a", *a), evaluated("b", *b))
    assert figures(result)["finalise_ms"] == (20, 20, -5, (comparison.Interval(-5, -5)))


def test_other_options_are_named():
    result = comparison.compare(evaluated("a", *GOOD), evaluated("b", *GOOD, segment=True, threads=1))
    assert result.other_options == ["segment", "threads"]


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        (GOOD, GOOD[2:], "a and b were scored on other clips: 0, 1 in only one"),
        (GOOD[:2], [*GOOD, clip("z", "")], "other clips: 10, 11, 12 and 16 more in only one"),
        (GOOD, [*GOOD[:-1], clip("19", TEXT, ref="else")], "by other texts or slots: those of 19"),
        ([*GOOD, GOOD[0]], GOOD, "a on set: some clips have the same id"),
    ],
)
def test_what_cannot_be_compared(a, b, reason):
    with pytest.raises(ConfigError, match=reason):
        comparison.compare(evaluated("a", *a), evaluated("b", *b))


def test_other_terms():
    with pytest.raises(ConfigError, match="other terms"):
        comparison.compare(evaluated("a", *GOOD, terms=["fox"]), evaluated("b", *GOOD, terms=["brown"]))

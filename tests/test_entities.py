"""Entities that were said and heard, on cases made by hand."""

from collections import Counter

import pytest

from convert import entities
from convert.entities import Finder
from convert.scored import Scored
from whisperlet.errors import ConfigError


def clip(ref, hyp, slots=(), language="en", **changes):
    plain = {"id": "c", "duration_s": 2.0, "finalise_ms": None, "end_to_final_ms": None, "rejected": []}
    return Scored(ref=ref, hyp=hyp, language=language, slots=list(slots), **plain | changes)


def counts(clips, terms=()):
    result = entities.total(entities.found(clips, terms))
    return result.heard, result.missed, result.invented


def test_precision_recall_and_f1():
    clips = [clip("call Ada and Grace", "call Ada and grays"), clip("nobody", "Grace nobody"), clip("Ada", "Ada")]
    result = entities.total(entities.found(clips, ["Ada", "Grace"]))
    assert (result.heard, result.missed, result.invented) == (2, 1, 1)
    assert (result.precision, result.recall, result.f1) == (66.67, 66.67, 66.67)
    assert [(e.text, e.heard, e.missed, e.invented) for e in result.each] == [("grace", 0, 1, 1), ("ada", 2, 0, 0)]


def test_a_term_that_is_said_twice_has_to_be_heard_twice():
    assert counts([clip("Ada, Ada!", "Ada")], ["Ada"]) == (1, 1, 0)
    assert counts([clip("Ada", "Ada Ada Ada")], ["Ada"]) == (1, 0, 2)
    assert counts([clip("Ada, Ada!", "Ada Ada")], ["Ada", "ada"]) == (2, 0, 0)


def test_terms_in_other_clips_do_not_make_up_for_it():
    assert counts([clip("Ada", ""), clip("", "Ada", has_speech=False)], ["Ada"]) == (0, 1, 1)


def test_of_overlapping_terms_the_leftmost_counts_and_of_those_the_longest():
    finder = Finder(["York", "New York", "York Road", "New York Times"], "en")
    assert finder.find("the New York Times of York") == Counter({"new york times": 1, "york": 1})
    assert finder.find("New York Road") == Counter({"new york": 1})
    assert finder.find("York Road, York") == Counter({"york road": 1, "york": 1})
    assert counts([clip("to York", "to New York")], ["York", "New York"]) == (0, 1, 1)


def test_parts_of_words_are_no_terms():
    assert Finder(["art"], "en").find("the artist departs") == Counter()
    assert Finder(["brown sugar"], "en").find("brown. Sugar") == Counter({"brown sugar": 1})  # stops do not count


def test_the_normaliser_decides_what_is_equal():
    finder = Finder(["Mr. Brown", "colour", "twenty five", "O'Hara"], "en")
    assert finder.find("mister Brown's color, O'Hara: 25") == Counter(
        {"mister brown": 1, "color": 1, "25": 1, "0 hara": 1}
    )
    assert finder.find("twenty five thousand") == Counter()  # which is 25000: a number is one word
    assert finder.find("25 O'Hara") == Counter()  # which it takes for 250 hara
    assert Finder(["um"], "en").find("um") == Counter()  # the normaliser leaves nothing of it
    assert Finder(["Größe"], "de").find("die Größe!") == Counter({"größe": 1})


def test_characters_where_a_language_has_no_spaces():
    finder = Finder(["平澤市", "三星"], "zh")
    assert finder.find("相当于平泽市人口, 三 星") == Counter({"平 泽 市": 1, "三 星": 1})


def test_slots():
    """What a command asks for is what was said; values of other commands may be invented."""
    clips = [
        clip(None, "A large coffee with soy milk", ["large", "coffee", " soy milk"]),
        clip(None, "a small copy, eight-ounce", ["small", "coffee", "eight ounce"]),
        clip(None, "a large mocha", ["mocha"]),
        clip(None, "large coffee", language="en"),  # which is no command
    ]
    result = entities.total(entities.found(clips, ()))
    assert (result.heard, result.missed, result.invented) == (6, 1, 1)
    assert {e.text for e in result.each[:2]} == {"coffee", "large"}
    assert result.recall == pytest.approx(100 * 6 / 7, abs=0.01)


def test_the_same_value_in_two_slots():
    assert counts([clip(None, "one milk", ["milk", "milk"])]) == (1, 1, 0)


def test_clips_whose_text_is_not_known_do_not_count():
    assert counts([clip(None, "Ada"), clip("Ada", "Ada")], ["Ada"]) == (1, 0, 0)
    assert counts([clip(None, "Ada", has_speech=False)], ["Ada"]) == (0, 0, 1)


def test_nothing_to_look_for():
    assert entities.found([clip("Ada", "Ada")], ()) is None
    result = entities.total(entities.found([clip("a b", "a b")], ["Ada"]))
    assert result.precision is result.recall is result.f1 is None


def test_read_terms(tmp_path):
    path = tmp_path / "terms.txt"
    path.write_text("# people\nAda  Lovelace\t3\n\nGrace\n")
    assert entities.read_terms(path) == ["Ada Lovelace", "Grace"]
    path.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="holds no term"):
        entities.read_terms(path)

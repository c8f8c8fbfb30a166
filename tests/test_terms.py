"""The dictionary: against a model that looks at everything, in both ways of decoding, and what is refused."""

from multiprocessing.connection import Connection

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from listening import offline
from scripted import ScriptedEngine
from test_decoding import PROMPT, MadeUpDecoder
from test_follow import Talker
from test_transcriber import SECOND, make

from agent import config, decoding, drafting, reader, term_list, transcriber
from agent.audio_files import read_file
from agent.commands import Settings, changed
from agent.config import Config, RecogniserConfig
from agent.follower import NOTHING
from agent.preference import Preference
from agent.protocol import Batch, Start, pair, receive_request, send
from agent.term_list import MAX_BOOST, MAX_CHARS, MAX_TERMS, Term
from agent.terms import BOOST, FIRST_SHARE, Terms, forms
from whisperlet.errors import ConfigError
from whisperlet.tokenizer import Tokenizer

LETTERS = st.integers(97, 101)
LISTED = st.lists(
    st.builds(Term, st.text("abcde", min_size=1, max_size=4), st.none() | st.sampled_from([1.0, 4.0, 9.0])), max_size=6
)


def encode(text):
    """One token a letter; a space before it makes it another token."""
    return [ord(letter) - 32 * (i > 0 and text[i - 1] == " ") for i, letter in enumerate(text) if letter != " "]


def naive_bias(listed, tokens):
    """Each continuation of each form of each term that the tokens end with a part of."""
    found = {}
    for text, boost in listed:
        for form in forms(text):
            ways = [(encode(" " + form), len(tokens) + 1), (encode(form), None)]
            for way, n_starts in ways:
                for n in range(len(way)):
                    is_begun = list(tokens[len(tokens) - n :]) == way[:n]
                    if is_begun and (n_starts is not None or n == len(tokens)):
                        share = FIRST_SHARE if n == 0 and len(way) > 1 else 1
                        value = share * (BOOST if boost is None else boost)
                        found[way[n]] = max(found.get(way[n], 0.0), value)
    return found


@settings(max_examples=150, deadline=None)
@given(listed=LISTED, tokens=st.lists(st.integers(65, 69) | LETTERS, max_size=8))
def test_bias_is_that_of_every_begun_term(listed, tokens):
    assert Terms(listed, encode).bias(tokens) == pytest.approx(naive_bias(listed, tokens))


def test_the_whole_boost_is_for_what_goes_on():
    terms = Terms([Term("Abc", 6.0), Term("D", None)], encode)
    (spaced_a, *_), (a, b, _), (spaced_d,), (d,) = map(encode, (" Abc", "Abc", " D", "D"))
    first = {spaced_a: 6.0 * FIRST_SHARE, spaced_d: BOOST}
    assert terms.bias([]) == pytest.approx(first | {a: 6.0 * FIRST_SHARE, d: BOOST})  # no space at the very start
    assert terms.bias([1, 2]) == pytest.approx(first)
    assert terms.bias([1, spaced_a]) == pytest.approx(first | {b: 6.0})
    assert terms.bias([1, spaced_a, 2]) == pytest.approx(first)
    assert terms.bias([a]) == pytest.approx(first | {b: 6.0})
    assert terms.bias([1, a]) == pytest.approx(first)  # in a word


def test_ways_to_write():
    assert forms("baker street") == ["baker street", "Baker street", "Baker Street"]
    assert forms("Baker Street") == ["Baker Street"]
    assert forms("北京") == ["北京"]


def test_what_is_written_without_spaces_follows_without_one():
    ids = {"北": 1, "京": 2}
    terms = Terms([Term("北京", 4.0)], lambda text: [3] * text.startswith(" ") + [ids[c] for c in text.strip()])
    assert terms.bias([9])[1] == pytest.approx(4.0 * FIRST_SHARE)
    assert terms.bias([9, 1])[2] == 4.0


def test_pick():
    terms = Terms([Term("ab", 4.0)], encode)
    logits = np.zeros(128, np.float32)
    logits[7] = 3.9
    assert terms.pick(logits, 7, [1, ord("A")]) == ord("b")
    logits[7] = 4.0  # no less likely than the term
    assert terms.pick(logits, 7, [1, ord("A")]) == 7
    logits[ord("b")] = -np.inf  # may not be said
    assert terms.pick(logits, 7, [1, ord("A")]) == 7
    assert Terms([], encode).pick(logits, 7, []) == 7


# Decoding. The made-up decoder says any of 250 tokens, so a strong term is begun and gone on with now and then.
STRONG = st.lists(
    st.builds(Term, st.text("abcde", min_size=1, max_size=3), st.sampled_from([0.5, 2.0, 6.0])), min_size=1, max_size=4
)


def hear(decoder, draft=(), limit=40, block=16, terms=None):
    return decoding.greedy(decoder, toy.VOCABULARY, PROMPT, list(draft), limit=limit, block=block, terms=terms)


def naive_covers(listed, tokens, place):
    """True if a term that holds the token at `place` is complete, None if it is begun, else False."""
    ways = [way for text, _ in listed for form in forms(text) for way in (encode(" " + form), encode(form))]
    begun = [
        (tokens[start:] == way, start)
        for way in ways
        for start in range(place + 1)
        if tokens[start:] == way[: len(tokens) - start] and (start == 0 or way[0] < ord("a"))
    ]
    return any(complete for complete, _ in begun) or (None if begun else False)


def one_by_one(decoder, terms, limit):
    """Tokens by the definition: the highest logit with what the naive model adds, except at the end of the text.

    From a term that comes to nothing it goes back to where the first of its tokens was not the model's own.
    """
    said, its_own, since = [], set(), None
    while len(said) < limit:
        decoder.position = 0
        row = reader.suppress(decoder.decode(PROMPT + said)[-1:].copy(), toy.VOCABULARY, first=not said)[0]
        plain = row.argmax()
        if plain != toy.EOT and len(said) not in its_own:
            for token, boost in naive_bias(terms, said).items():
                row[token] += np.float32(boost)
        said.append(int(row.argmax()))
        if since is None and said[-1] != plain:
            since = len(said) - 1
        if since is not None and (covers := naive_covers(terms, said, since)) is not None:
            if not covers:
                its_own.add(since)
                said = said[:since]
            since = None
            if not covers:
                continue
        if said[-1] == toy.EOT:
            return said[:-1]
        if (start := decoding.loop_start(said)) is not None:
            return said[:start]
    return said


@settings(max_examples=60, deadline=None)
@given(listed=STRONG, seed=st.integers(0, 1000), block=st.integers(1, 20), limit=st.integers(1, 25), data=st.data())
def test_any_draft_gives_what_one_by_one_gives(listed, seed, block, limit, data):
    terms = Terms(listed, encode)
    expected = one_by_one(MadeUpDecoder(seed), listed, limit)
    n_right = data.draw(st.integers(0, len(expected)))
    draft = expected[:n_right] + data.draw(st.lists(st.integers(0, 255), max_size=20))
    alone = hear(MadeUpDecoder(seed), (), limit, 1, terms)
    found = hear(MadeUpDecoder(seed), draft, limit, block, terms)
    assert found.tokens == alone.tokens == expected
    assert found.avg_logprob == pytest.approx(alone.avg_logprob)


def test_probabilities_are_those_without_terms():
    decoder = MadeUpDecoder(answer=[40, 41])
    found = hear(decoder, terms=Terms([Term("abc", 20.0)], encode))
    assert found.tokens == [40, 41]
    assert found.avg_logprob == hear(MadeUpDecoder(answer=[40, 41])).avg_logprob


def test_the_end_is_not_put_off():
    terms = Terms([Term("ab", MAX_BOOST)], encode)
    logits = np.full((1, toy.DIMS.n_vocab), -9.0, np.float32)
    logits[0, toy.EOT] = 0.0
    assert Preference(terms, toy.EOT).picks(logits, [5], []) == [toy.EOT]


def test_a_term_that_comes_to_nothing_is_taken_back():
    begun, own, other, end = encode(" aab")[0], 90, 91, ord("b")
    preference = Preference(Terms([Term("aab", 6.0)], encode), toy.EOT)

    def picked(said, best, second):
        logits = np.zeros((1, toy.DIMS.n_vocab), np.float32)
        logits[0, [best, second]] = 9.0, 8.0
        return preference.picks(logits, said, [])

    assert picked([], own, begun) == [begun]  # for its boost
    assert preference.goes_back([begun]) is None
    assert picked([begun], ord("a"), 98) == [ord("a")]
    assert preference.goes_back([begun, ord("a")]) is None
    assert picked([begun, ord("a")], other, 92) == [other]  # the end of the term is out of the question
    assert preference.goes_back([begun, ord("a"), other]) == 0
    assert picked([], own, begun) == [own]  # the model has its way
    assert preference.goes_back([own]) is None
    assert picked([own], other, begun) == [begun]  # elsewhere it may begin, and is complete in the end
    for said in ([begun], [begun, ord("a")], [begun, ord("a"), end], [begun, ord("a"), end, other]):
        assert preference.goes_back([own, *said]) is None


def test_no_terms_are_never_asked(monkeypatch):
    monkeypatch.setattr(Terms, "pick", lambda *_: pytest.fail("was asked"))
    hear(MadeUpDecoder(4))


SAYINGS = st.lists(st.tuples(st.lists(LETTERS, min_size=1, max_size=12), st.integers(0, 200)), max_size=5)


@settings(max_examples=50, deadline=None)
@given(sayings=SAYINGS, listed=STRONG)
def test_following_says_the_same_in_passes_of_any_size(sayings, listed):
    """From every draft on, so that its unstable tokens are verified in one pass, in several, or one by one."""
    terms, draft = Terms(listed, encode), NOTHING
    for answer, frontier in sayings:
        found = [
            drafting.follow(
                Talker(*answer, height=3.0),
                toy.VOCABULARY,
                PROMPT,
                draft,
                frontier=frontier,
                edge=10_000,
                limit=11,  # too few for a loop
                block=block,
                terms=terms,
            )
            for block in (1, 4, 32)
        ]
        draft = found[-1]
        assert [each.tokens for each in found] == [draft.tokens] * 3


# The transcriber.


def test_terms_hold_from_the_next_segment_on():
    ears = make(ScriptedEngine("axc", certainty=3.0))
    assert offline(ears, SECOND).text == "axc"
    ears.retune(RecogniserConfig(terms=["abc\t6"]))
    assert offline(ears, SECOND).text == "abc"
    ears.retune(RecogniserConfig())
    assert offline(ears, SECOND).text == "axc"


def test_the_dictionary_is_made_once_a_list():
    ears = make(ScriptedEngine("a"), terms=["abc"])
    before = ears._terms
    ears.retune(RecogniserConfig(hop_ms=700, terms=["abc"]))
    offline(ears, SECOND)
    assert ears._terms is before is not None


def test_they_reach_the_engines_process():
    tuning = RecogniserConfig(terms=["Rhabarber\t4"])
    for request in (Start("b", "c", tuning), Batch([], is_live=True, tuning=tuning)):
        ours, theirs = pair(1.0)
        with ours, Connection(theirs.detach()) as engine:
            send(ours, request)
            assert receive_request(engine) == request


# What is refused.


def read(tmp_path, data):
    path = tmp_path / "terms.txt"
    path.write_bytes(data)
    return term_list.read(path)


def test_a_file_of_terms(tmp_path):
    lines = read(tmp_path, "\ufeff# streets\r\nBaker  Street\t4.5\r\n\r\n  Rhabarber\n北京\t 2\n".encode())
    terms = [Term("Baker Street", 4.5), Term("Rhabarber", None), Term("北京", 2.0)]
    assert [term_list.parse(line) for line in lines] == terms
    assert read(tmp_path, b"") == []
    assert len(read(tmp_path, b"a\n" * MAX_TERMS)) == MAX_TERMS
    assert read(tmp_path, b"a" * MAX_CHARS) == ["a" * MAX_CHARS]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"one\n\n\xff\xfe", r"line 3: is not UTF-8"),
        (b"# all\n" + b"a\n" * (MAX_TERMS + 1), r"line 1002: there are more than 1000 terms"),
        (b"one\n" + b"a" * (MAX_CHARS + 1), r"line 2: the term has 101 characters, more than 100"),
        (b"one\t0", r"line 1: the boost 0 is not above 0 and at most 20"),
        (b"one\t20.1", r"line 1: the boost 20.1 is not above 0"),
        (b"one\tnan", r"line 1: the boost nan is not above 0"),
        (b"one\tmuch", r"line 1: the boost 'much' is not a number"),
        (b"one\t1\t2", r"line 1: the boost '1\t2' is not a number"),
        (b"\t3", r"line 1: there is no term before the tab"),
        (b"a\x07b", r"line 1: 'a\x07b' holds a character that does not print"),
        (b"#" * 1_000_001, r"has more than 1000000 bytes"),
    ],
)
def test_a_file_is_refused_in_one_sentence(tmp_path, data, reason):
    with pytest.raises(ConfigError) as refused:
        read(tmp_path, data)
    assert str(refused.value).startswith(f"{tmp_path / 'terms.txt'}: {reason}")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ConfigError, match=f"^{tmp_path}/no.txt: cannot be read: No such file"):
        config.load(None, {"recogniser.terms_file": str(tmp_path / "no.txt")})


def test_configured(tmp_path):
    file = tmp_path / "terms.txt"
    file.write_text("# drugs\nibuprofen\t4\n")
    path = tmp_path / "agent.toml"
    path.write_text(f'[recogniser]\nterms_file = "{file}"')
    assert config.load(path).recogniser.terms == ["ibuprofen\t4"]
    path.write_text('[recogniser]\nterms = ["ibuprofen\\t4"]')
    assert config.load(path).recogniser.terms == ["ibuprofen\t4"]
    path.write_text('[recogniser]\nterms = ["a", "b\\t-1"]')
    with pytest.raises(ConfigError, match=f"^{path}: recogniser.terms: item 2: the boost -1 is not above 0"):
        config.load(path)
    path.write_text(f'[recogniser]\nterms = ["a"]\nterms_file = "{file}"')
    with pytest.raises(ConfigError, match=f"^{path}: recogniser.terms: cannot be set beside recogniser.terms_file"):
        config.load(path)


def test_set_from_afar():
    now = Settings.of(Config(recogniser=RecogniserConfig(terms=["ibuprofen"])))
    wanted = {"recogniser.terms": ["Rhabarber", "Baker Street\t4"]}
    assert changed(now, wanted, {}).recogniser.terms == wanted["recogniser.terms"]
    assert changed(now, {"recogniser.terms": []}, {}).recogniser.terms == []
    for terms, reason in ((["a", ""], "item 2: the term is empty"), (["a\tb"], "item 1: the boost 'b' is not")):
        with pytest.raises(ConfigError, match=f"^recogniser.terms: {reason}"):
            changed(now, {"recogniser.terms": terms}, {})


@pytest.mark.bundle
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_real_speech_is_heard_better(real_bundle, real_litert, clips):
    """The plain bundle hears "flour-fatten sauce"; what is not listed stays as it was, also under a hundred terms."""
    pcm = read_file(next(clip for clip in clips if clip.stem == "1089-134686-0000"))
    draft = []

    def hear(*terms):
        ears = transcriber.build(real_bundle, real_litert, RecogniserConfig(terms=list(terms)))
        ears.feed(transcriber.whole(pcm))
        ears._segment.draft = draft
        return ears.finish()

    plain = hear()
    assert "flour-fatten " in plain.text
    better = hear("flour-fattened\t4")
    assert better.text == plain.text.replace("flour-fatten ", "flour-fattened ")
    assert better.avg_logprob < plain.avg_logprob  # for these are the model's own
    assert hear("Rhabarber", "ibuprofen", *(f"Baker Street {n}" for n in range(98))).text == plain.text
    draft = Tokenizer(real_bundle.tokenizer_json, real_bundle.manifest.vocabulary).encode(" " + plain.text)
    again = hear("flour-fattened\t4")  # verifies a draft that was heard without
    assert (again.text, again.avg_logprob) == (better.text, pytest.approx(better.avg_logprob, abs=0.02))

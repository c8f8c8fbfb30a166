"""Decoding policy: pure functions, and the greedy loop on a decoder that is made up."""

import hashlib
import random

import numpy as np
import pytest
import scipy.special
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.alignment import Looks
from agent.decoding import MAX_PERIOD, MIN_REPEATED, MIN_REPEATS, best_language, greedy, loop_start
from agent.guess import agreed
from agent.reader import log_softmax_at, probability_at, suppress

VOCABULARY = toy.VOCABULARY
PROMPT = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
N_VOCAB = toy.DIMS.n_vocab


class MadeUpDecoder(toy.TokenState):
    """Logits are a function of all tokens so far; `answer`, if given, is what it wants to say."""

    def __init__(self, seed=0, answer=None, n_words=250):
        super().__init__()
        self.seed, self.answer, self.n_words = seed, answer, n_words

    def decode(self, tokens):
        self.passes.append(len(tokens))
        rows = []
        for token in tokens:
            self.tokens.append(token)
            rows.append(self._logits())
        frames = [7 * n for n in range(len(self.tokens) - len(tokens), len(self.tokens))]
        self.looks = Looks(np.array(frames), np.zeros(len(frames), np.float32))
        return np.stack(rows)

    def _logits(self):
        digest = hashlib.sha256(f"{self.seed} {self.tokens}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8]))
        logits = rng.normal(size=N_VOCAB).astype(np.float32)
        logits[self.n_words : toy.EOT] -= 20
        said = len(self.tokens) - len(PROMPT)
        if self.answer is not None and said >= 0:
            logits[self.answer[said] if said < len(self.answer) else toy.EOT] += 30
        return logits


def hear(decoder, draft=(), limit=40, block=16):
    return greedy(decoder, VOCABULARY, PROMPT, list(draft), limit=limit, block=block)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n_words=st.sampled_from([3, 10, 250]),  # few words: many loops
    block=st.integers(1, 20),
    limit=st.integers(1, 40),
    data=st.data(),
)
def test_any_draft_gives_what_no_draft_gives(seed, n_words, block, limit, data):
    expected = hear(MadeUpDecoder(seed, n_words=n_words), limit=limit, block=1)
    n_right = data.draw(st.integers(0, len(expected.tokens)))
    draft = expected.tokens[:n_right] + data.draw(st.lists(st.integers(0, N_VOCAB - 1), max_size=30))
    decoder = MadeUpDecoder(seed, n_words=n_words)
    found = hear(decoder, draft, limit, block)
    assert (found.tokens, found.looped) == (expected.tokens, expected.looped)
    assert found.looks == [7 * (len(PROMPT) - 1 + i) for i in range(len(found.tokens))]
    assert found.avg_logprob == pytest.approx(expected.avg_logprob)
    assert found.no_speech_prob == pytest.approx(expected.no_speech_prob)
    assert max(decoder.passes[1:], default=0) <= block


def answer_of(n):
    return [10 + i % 7 * 13 + i for i in range(n)]


def test_says_what_the_decoder_wants_until_its_end():
    found = hear(MadeUpDecoder(answer=answer_of(9)))
    assert found.tokens == answer_of(9)
    assert not found.looped
    assert -0.01 < found.avg_logprob <= 0


def test_a_right_draft_saves_passes():
    answer = answer_of(30)
    decoder = MadeUpDecoder(answer=answer)
    assert hear(decoder, answer).tokens == answer
    assert decoder.passes == [16, 16, 2]  # of 4 + 30 tokens and what is said to them
    decoder = MadeUpDecoder(answer=answer)
    hear(decoder)
    assert len(decoder.passes) == 31


def test_a_wrong_draft_costs_no_pass():
    decoder = MadeUpDecoder(answer=answer_of(12))
    hear(decoder, [200] * 12)
    assert len(decoder.passes) == 13


@pytest.mark.parametrize(
    ("mistaken", "passes"),
    [
        (lambda right: [*right[:6], 200, *right[7:]], [16, 4, 14]),  # a wrong token
        (lambda right: [*right[:6], *right[7:]], [16, 4, 4, 13]),  # one too few
        (lambda right: [*right[:6], 200, *right[6:]], [16, 4, 14]),  # one too many
        (lambda right: [*right[:6], *right[10:]], [16, 4, 4, 4, 4, 4, 10]),  # a part left out
        (lambda right: right[:6], [10] + 18 * [1]),  # no more to guess
    ],
)
def test_a_draft_is_of_use_after_a_mistake(mistaken, passes):
    answer = answer_of(24)
    decoder = MadeUpDecoder(answer=answer)
    assert hear(decoder, mistaken(answer)).tokens == answer
    assert decoder.passes == passes


def test_limit():
    found = hear(MadeUpDecoder(answer=answer_of(30)), limit=5)
    assert found.tokens == answer_of(5)
    assert not found.looped


def test_a_loop_is_cut_to_one_round():
    loop = [11, 12, 13, 14]
    found = hear(MadeUpDecoder(answer=[41, 42, *loop * 9]))
    assert found.looped
    assert found.tokens == [41, 42, *loop]


def test_average_and_no_speech_are_those_of_the_logits():
    class Flat(MadeUpDecoder):
        def _logits(self):
            logits = np.zeros(N_VOCAB, np.float32)
            if len(self.tokens) == 1:
                logits[toy.NO_SPEECH] = 3.0
            elif len(self.tokens) == 6:
                logits[toy.EOT] = 1.0
            return logits

    found = hear(Flat())
    n_sayable = toy.EOT + 1 - len(VOCABULARY.suppress)
    first = -np.log(n_sayable - len(VOCABULARY.suppress_begin))
    last = 1 - np.log(n_sayable - 1 + np.e)
    assert found.tokens == [0, 0]
    assert found.avg_logprob == pytest.approx((first - np.log(n_sayable) + last) / 3)
    assert found.no_speech_prob == pytest.approx(np.exp(3) / (np.exp(3) + N_VOCAB - 1))


def test_suppress():
    logits = suppress(np.zeros((2, N_VOCAB), np.float32), VOCABULARY, first=True)
    forbidden = {*VOCABULARY.suppress, *range(toy.EOT + 1, N_VOCAB)}
    assert set(np.flatnonzero(np.isneginf(logits[0]))) == forbidden | set(VOCABULARY.suppress_begin)
    assert set(np.flatnonzero(np.isneginf(logits[1]))) == forbidden
    assert toy.EOT not in forbidden
    logits = suppress(np.zeros((1, N_VOCAB), np.float32), VOCABULARY, first=False)
    assert set(np.flatnonzero(np.isneginf(logits[0]))) == forbidden


def test_never_says_what_is_suppressed():
    for seed in range(20):
        for token in (*VOCABULARY.suppress, toy.NO_TIMESTAMPS):
            assert token not in hear(MadeUpDecoder(seed, answer=[50, token, 51])).tokens
        assert hear(MadeUpDecoder(seed, answer=[])).tokens != []  # the end of text is not a first word


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 99), n=st.integers(1, 5), scale=st.sampled_from([1.0, 100.0]))
def test_log_softmax_equals_scipys(seed, n, scale):
    rng = np.random.default_rng(seed)
    logits = (scale * rng.normal(size=(n, 50))).astype(np.float32)
    logits[:, 3] = -np.inf
    tokens = [int(token) for token in rng.integers(4, 50, n)]
    expected = scipy.special.log_softmax(logits.astype(np.float64), -1)[np.arange(n), tokens]
    np.testing.assert_allclose(log_softmax_at(logits, tokens), expected, rtol=1e-5, atol=1e-5)
    assert probability_at(logits[0], tokens[0]) == pytest.approx(np.exp(expected[0]), rel=1e-4)
    assert log_softmax_at(logits[:1], [3]) == [-np.inf]


def test_best_language():
    logits = np.zeros(N_VOCAB, np.float32)
    logits[toy.SOT], logits[toy.HAW], logits[toy.EN] = 50, 3, 1
    code, share = best_language(logits, VOCABULARY)
    assert code == "haw"
    assert share == pytest.approx(np.exp(3) / (np.exp(3) + np.exp(1)))


@given(common=st.lists(st.integers(0, 3)), a=st.lists(st.integers(0, 3)), b=st.lists(st.integers(0, 3)))
def test_agreed(common, a, b):
    n = agreed(common + a, common + b)
    assert n == agreed(common + b, common + a) >= len(common)
    assert (common + a)[:n] == (common + b)[:n]
    assert (common + a)[n : n + 1] != (common + b)[n : n + 1] or n == len(common + a) == len(common + b)


@given(
    before=st.lists(st.integers(100, 200), max_size=20, unique=True),
    loop=st.lists(st.integers(0, 99), min_size=1, max_size=MAX_PERIOD, unique=True),
    more=st.integers(0, 20),
)
def test_loops_are_found(before, loop, more):
    n_needed = max(MIN_REPEATED, (MIN_REPEATS - 1) * len(loop)) + len(loop)
    tokens = before + (loop * 100)[: n_needed + more]
    assert loop_start(tokens) == len(before) + len(loop)
    assert loop_start(tokens[: len(before) + n_needed - 1]) is None


@given(st.lists(st.integers(0, 1000), max_size=60, unique=True))
def test_text_without_repetition_is_left_alone(tokens):
    assert loop_start(tokens) is None


@pytest.mark.parametrize(
    "tokens",
    [
        [5, 5, 5, 5, 5, 5],  # "no, no, no"
        [7, 8] * 6,
        [21, 9, 22, 9, 23, 9, 24, 9, 25, 9, 26, 9, 27, 9, 28, 9, 29, 9],  # "one, two, three, ..."
        [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] * 2,  # a sentence said twice
        [],
    ],
)
def test_ordinary_repetition_is_left_alone(tokens):
    assert loop_start(tokens) is None


def test_numbers_spelt_digit_by_digit():
    rng = random.Random(3)
    lists = [[rng.randrange(10) for _ in range(40)] for _ in range(300)]
    assert not [digits for digits in lists if any(loop_start(digits[:n]) for n in range(41))]

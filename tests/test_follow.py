"""Following speech as policy: what is stable and where to stop, on a decoder that is made up."""

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import drafting
from agent.alignment import Looks
from agent.follower import NOTHING

PROMPT = [toy.SOT, toy.EN, toy.TRANSCRIBE, toy.NO_TIMESTAMPS]
FAR = 1400  # frames
END = 10_000  # no token looks as far


class Talker(toy.TokenState):
    """Says `answer`: tokens, or tuples of a token, the frame that it looks at and the share beyond the audio."""

    def __init__(self, *answer, height=30.0):
        super().__init__()
        self.height = height
        self.says(*answer)

    def says(self, *answer):
        full = [x if isinstance(x, tuple) else (x, 10 * i) for i, x in enumerate(answer)]
        self.answer = [(*x, 0.0)[:3] for x in full]
        return self

    def decode(self, tokens):
        self.passes.append(len(tokens))
        first = len(self.tokens) + 1 - len(PROMPT)
        self.tokens += tokens
        end = (toy.EOT, 0, 0.0)
        said = [self.answer[i] if 0 <= i < len(self.answer) else end for i in range(first, first + len(tokens))]
        picks, frames, beyond = zip(*said, strict=True)
        self.looks = Looks(np.array(frames), np.array(beyond, np.float32))
        logits = np.zeros((len(tokens), toy.DIMS.n_vocab), np.float32)
        logits[np.arange(len(tokens)), picks] = self.height
        return logits


def follow(talker, draft=NOTHING, frontier=END, limit=60, block=16, edge=END):
    return drafting.follow(
        talker, toy.VOCABULARY, PROMPT, draft, frontier=frontier, edge=edge, limit=limit, block=block
    )


def parts(draft):
    return draft.stable, draft.unstable


def twice(talker, frontier=END):
    return follow(talker, follow(talker, frontier=frontier), frontier)


def test_what_is_heard_for_the_first_time_is_not_stable():
    assert parts(follow(Talker(40, 41, 42))) == ([], [40, 41, 42])
    assert parts(follow(Talker())) == ([], [0])  # the end may not come first


def test_what_is_heard_twice_is_stable_up_to_the_frontier():
    answer = (40, 10), (41, 20), (42, 30), (43, 15)
    assert parts(twice(Talker(*answer))) == ([40, 41, 42, 43], [])
    assert parts(twice(Talker(*answer), frontier=30)) == ([40, 41], [42, 43])
    assert parts(twice(Talker(*answer), frontier=31)) == ([40, 41, 42, 43], [])
    assert parts(twice(Talker(*answer), frontier=0)) == ([], [40, 41, 42, 43])


def test_what_is_heard_differently_is_not_stable():
    talker = Talker(40, 41, 42, 43)
    first = follow(talker)
    second = follow(talker.says(40, 41, 50, 43, 44), first)
    assert parts(second) == ([40, 41], [50, 43, 44])
    third = follow(talker, second)
    assert parts(third) == ([40, 41, 50, 43, 44], [])


def test_what_is_stable_stays_even_if_it_would_be_said_differently_now():
    talker = Talker(40, 41, 42)
    draft = twice(talker)
    assert parts(follow(talker.says(90, 91, 92, 43), draft)) == ([40, 41, 42], [43])
    assert parts(follow(talker.says(), draft)) == ([40, 41, 42], [])


def test_nothing_is_said_that_looks_at_the_padding():
    assert follow(Talker(40, (41, 10, 0.0), (42, 20, 1.0), 43)).tokens == [40, 41]
    assert follow(Talker((40, 0, 1.0))).tokens == []


def test_nothing_is_said_that_looks_far_back():
    there = [(40, 0), *((41 + i, FAR + 7 - i) for i in range(8))]
    said = [token for token, _ in there]
    assert follow(Talker(*there, (60, 0), (61, FAR))).tokens == said
    talker = Talker(*there)
    draft = twice(talker)
    assert draft.stable == said
    assert follow(talker.says(*there, (60, 0), (61, FAR)), draft).tokens == said  # also if it is said later
    assert follow(talker.says(*there, (60, FAR - 1), (61, FAR + 9)), draft).tokens == [*said, 60, 61]


def test_one_stray_look_does_not_stop_the_words():
    answer = [(40 + i, 10 * i) for i in range(12)]
    answer[4] = (44, FAR)
    assert twice(Talker(*answer)).stable == [40 + i for i in range(12)]


def test_a_place_that_nothing_is_found_at_is_given_up():
    there = [(40 + i, FAR) for i in range(8)]
    talker = Talker(*there)
    draft = twice(talker)
    talker.says(*there, (60, 20), (61, 30))
    for _ in range(20):
        draft = follow(talker, draft)
    assert draft.stable == [*range(40, 48), 60, 61]


def test_what_is_not_stable_may_be_taken_back():
    """Also where it looked: what is said instead may lie before."""
    talker = Talker(40, *((41 + i, FAR) for i in range(8)))
    draft = follow(talker)
    assert parts(follow(talker.says(40, (60, 20)), draft)) == ([40], [60])


def test_a_loop_is_cut_to_one_round():
    loop = [11, 12, 13, 14]
    found = follow(Talker(41, 42, *loop * 9))
    assert (*parts(found), found.looped) == ([], [41, 42, *loop], True)
    assert follow(Talker(41, 42, *loop)).looped is False


def test_a_loop_takes_back_nothing_that_is_stable():
    loop = [11, 12, 13, 14]
    talker = Talker(41, *loop, *loop[:2])
    draft = twice(talker)
    assert draft.stable == [41, *loop, *loop[:2]]
    found = follow(talker.says(41, *loop * 9), draft)
    assert (found.tokens, found.looped) == (draft.stable, True)


def test_limit():
    talker = Talker(*range(40, 60))
    for _ in range(4):
        assert follow(talker, follow(talker, limit=5), limit=5).tokens == list(range(40, 45))
    draft = twice(Talker(*range(40, 45)))
    assert parts(follow(talker, draft, limit=5)) == parts(draft)


def test_one_pass_where_nothing_is_new():
    talker = Talker(40, 41, 42, 43)
    draft = follow(talker)
    for _ in range(3):
        talker.passes.clear()
        draft = follow(talker, draft)
        assert len(talker.passes) == 1
    assert talker.passes == [1]  # of the last token, to hear whether another comes
    talker.says(40, 41, 42, 43, 44, 45)
    talker.passes.clear()
    follow(talker, draft)
    assert talker.passes == [1, 1, 1]


def test_each_token_keeps_the_probability_that_it_was_heard_with_last():
    talker = Talker(40, 41, 42, height=9.0)
    first = follow(talker, frontier=15)
    talker.height = 5.0
    second = follow(talker.says(40, 41, 43), first, frontier=15)  # verified and heard anew: less sure this time
    assert parts(second) == ([40, 41], [43])
    assert all(new < old < 0 for new, old in zip(second.logprobs, first.logprobs, strict=True))
    talker.height = 9.0
    third = follow(talker.says(40, 41, 44), second, frontier=15)
    assert third.logprobs == [*second.logprobs[:2], first.logprobs[2]]
    assert third.hypothesis.avg_logprob == sum(third.logprobs) / 3


def test_the_doubt_that_anyone_spoke_stands_after_the_first_token():
    talker = Talker(40, 41, height=0.0)
    draft = follow(talker)
    assert draft.hypothesis.no_speech_prob == pytest.approx(1 / toy.DIMS.n_vocab)
    talker.height = 9.0
    assert follow(talker.says(40, 41, 42), draft).no_speech_prob == draft.no_speech_prob


def test_nothing_is_asked_for_after_a_token_at_the_edge():
    talker = Talker(40, 41, 42, 43, 44)  # that look at 0, 10, 20 ...
    draft = follow(talker, edge=20)
    assert draft.tokens == [40, 41, 42]
    assert len(talker.passes) == 3
    assert follow(talker, draft, edge=40).tokens == [40, 41, 42, 43, 44]  # the verifying pass may tell what follows


def test_nothing_heard_has_no_probability():
    assert follow(Talker((40, 0, 1.0))).hypothesis.avg_logprob == 0.0


HEARINGS = st.lists(
    st.tuples(
        st.lists(
            st.tuples(st.integers(40, 44), st.integers(0, FAR), st.sampled_from([0, 0, 0, 0, 1.0])),
            min_size=1,
            max_size=25,
        ),
        st.integers(0, FAR),  # the frontier
    ),
    max_size=8,
)


@settings(max_examples=150, deadline=None)
@given(hearings=HEARINGS, limit=st.integers(1, 30), block=st.sampled_from([1, 4, 16]))
def test_stable_tokens_never_change(hearings, limit, block):
    draft, talker = NOTHING, Talker()
    for answer, frontier in hearings:
        before, draft = draft, follow(talker.says(*answer), draft, frontier, limit, block)
        assert draft.stable[: len(before.stable)] == before.stable
        assert len(draft.tokens) <= limit
        new = draft.stable[len(before.stable) :]
        assert new == before.unstable[: len(new)]
        said = answer[len(before.stable) : len(draft.tokens)]
        assert [token for token, _, _ in said] == draft.tokens[len(before.stable) :]
        assert all(frame < frontier for _, frame, _ in said[: len(new)])
        assert all(share < 1 for _, _, share in said)


@settings(max_examples=100, deadline=None)
@given(hearings=HEARINGS, data=st.data(), block=st.sampled_from([4, 16]))
def test_a_decoder_that_was_used_by_others_says_the_same(hearings, data, block):
    ours, others = Talker(), Talker()
    draft = same = NOTHING
    for answer, frontier in hearings:
        draft = follow(ours.says(*answer), draft, frontier, block=block)
        others.position = data.draw(st.integers(0, others.position))
        same = follow(others.says(*answer), same, frontier, block=block)
        assert same == draft

"""The policy alone, on any speech and any engine; a step costs seconds here because somebody says so."""

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.pace import CALM_MAX_S, CALM_S, FACTORS, FINALS_ONLY, MAX_LOAD, Pace

HOP_MS = 300
LONGEST_MS = HOP_MS * FACTORS[-1]
FIRST_LEVELS = [HOP_MS * factor for factor in FACTORS]

seconds = st.floats(0, 60)
steps = st.tuples(st.just("observe"), seconds, st.floats(0, 30))
waits = st.tuples(st.just("find"), seconds)
histories = st.lists(steps | waits, max_size=60)


def lived(history):
    """A pace after all this, and the hops that it had."""
    pace, hops = Pace(HOP_MS), []
    for verb, *values in history:
        getattr(pace, verb)(*values)
        hops.append(pace.hop_ms)
    return pace, hops


def length(hop_ms):
    return float("inf") if hop_ms is None else hop_ms


def speak(pace, step_s, speech_s, *, waits=True):
    """Speech to an engine whose every step takes so long; the hops of the steps, None where there was none."""
    hops, said_s = [], 0.0
    while said_s < speech_s:
        hop_ms = pace.hop_ms
        covered_s = LONGEST_MS / 1e3 if hop_ms is None else max(hop_ms / 1e3, step_s)  # what waits is heard too
        pace.observe(0.0 if hop_ms is None else step_s, covered_s)
        if hop_ms is not None and waits:
            pace.find(step_s)
        hops.append(hop_ms)
        said_s += covered_s
    return hops


def test_it_begins_with_what_is_configured():
    pace = Pace(HOP_MS)
    assert (pace.hop_ms, pace.is_slowed, pace.load) == (HOP_MS, False, 0)


@given(histories)
def test_the_hop_is_never_below_the_configured(history):
    _, hops = lived(history)
    assert set(hops) <= {None, *FIRST_LEVELS}


@given(histories, seconds, seconds, st.floats(0.001, 30))
def test_a_slower_step_never_leads_to_a_shorter_hop(history, one_s, another_s, audio_s):
    pace, _ = lived(history)
    quick, slow = pace, copy.deepcopy(pace)
    quick.observe(min(one_s, another_s), audio_s)
    slow.observe(max(one_s, another_s), audio_s)
    assert length(quick.hop_ms) <= length(slow.hop_ms)


@given(histories, seconds, seconds)
def test_a_longer_wait_never_leads_to_a_shorter_hop(history, one_s, another_s):
    pace, _ = lived(history)
    before_ms = pace.hop_ms
    patient, late = pace, copy.deepcopy(pace)
    patient.find(min(one_s, another_s))
    late.find(max(one_s, another_s))
    assert length(before_ms) <= length(patient.hop_ms) <= length(late.hop_ms)


@given(st.lists(st.floats(0, 1.2), max_size=40), st.floats(0, 0.5))
def test_a_slower_engine_never_has_the_shorter_hop(costs, more_s):
    """The same speech, step by step, on two engines; as long as neither tries its way back to partials."""
    quick, slow = Pace(HOP_MS), Pace(HOP_MS)
    for cost_s in costs:
        quick.observe(cost_s, LONGEST_MS / 1e3)
        slow.observe(cost_s + more_s, LONGEST_MS / 1e3)
        if slow.hop_ms is None:
            return
        assert length(quick.hop_ms) <= length(slow.hop_ms)


@given(histories)
def test_it_recovers_from_anything(history):
    pace, _ = lived(history)
    speak(pace, 0.05, (len(FACTORS) + 1) * (CALM_MAX_S + CALM_S))
    assert pace.hop_ms == HOP_MS


@settings(deadline=None)
@given(st.floats(0.0, 10.0))
def test_it_comes_to_rest_where_the_engine_keeps_up(step_s):
    hops = speak(Pace(HOP_MS), step_s, 2000)
    late = hops[len(hops) // 2 :]
    fitting = [hop_ms for hop_ms in FIRST_LEVELS if step_s <= MAX_LOAD * hop_ms / 1e3]
    if fitting:
        assert set(late) == {fitting[0]}
    else:
        assert late.count(None) >= 0.8 * len(late)


def test_load_alone_makes_the_hop_longer():
    pace = Pace(HOP_MS)
    assert sorted(set(speak(pace, 0.29, 30, waits=False))) == [300, 600]
    assert sorted(set(speak(pace, 0.58, 30, waits=False))) == [600, 1200]
    assert None in speak(pace, 1.15, 30, waits=False)


def test_one_slow_step_is_forgotten():
    pace = Pace(HOP_MS)
    speak(pace, 0.1, 10)
    pace.observe(0.5, 0.3)
    assert pace.hop_ms == HOP_MS
    assert pace.load > 0.4


def test_waiting_speech_is_answered_at_once():
    for waiting_s, hop_ms in ((0.59, 300), (0.61, 600), (1.19, 600), (1.21, 1200), (2.41, None)):
        pace = Pace(HOP_MS)
        pace.find(waiting_s)
        assert pace.hop_ms == hop_ms


def test_a_shorter_hop_has_to_look_easy_for_a_while():
    pace = Pace(HOP_MS)
    pace.find(1.0)
    for _ in range(8):  # 4.8 s
        pace.observe(0.1, 0.6)
    assert pace.hop_ms == 600
    pace.observe(0.1, 0.6)
    assert pace.hop_ms == 300


@pytest.mark.parametrize(("step_s", "hop_ms"), [(0.14, 300), (0.2, 600)])
def test_what_would_be_too_much_at_the_shorter_hop_is_not_tried(step_s, hop_ms):
    pace = Pace(HOP_MS)
    pace.find(1.0)
    speak(pace, step_s, 100)
    assert pace.hop_ms == hop_ms


def test_calm_is_interrupted_by_waiting_speech():
    pace = Pace(HOP_MS)
    for _ in range(10):
        pace.find(2.5)
        pace.observe(0.0, 4.0)
    assert pace.hop_ms is None


def test_attempts_at_partials_become_rare():
    """An engine that takes ten seconds a step must not be asked for one every few seconds."""
    hops = speak(Pace(HOP_MS), 10.0, 3600)
    n_attempts = sum(hop_ms is not None for hop_ms in hops)
    assert 3600 / (CALM_MAX_S + 20) <= n_attempts <= 3600 / CALM_MAX_S + 10


def test_after_an_easy_minute_old_failures_are_forgotten():
    pace = Pace(HOP_MS)
    speak(pace, 10.0, 3600)
    speak(pace, 0.05, 3 * CALM_MAX_S)
    assert pace.hop_ms == HOP_MS
    pace.find(10.0)
    assert pace.hop_ms is None
    speak(pace, 0.05, 3 * CALM_S + 3.0)
    assert pace.hop_ms == HOP_MS


def test_what_was_measured_before_there_were_finals_only_is_forgotten():
    pace = Pace(HOP_MS)
    for _ in range(9):
        pace.observe(30.0, 1.2)
    assert pace.hop_ms is None
    hops = speak(pace, 0.1, 60)
    assert hops == sorted(hops, key=length, reverse=True)
    assert pace.hop_ms == HOP_MS


def test_a_step_without_end_is_forgotten_too():
    pace = Pace(HOP_MS)
    pace.observe(1.0, 1e-313)
    speak(pace, 0.1, 60)
    assert pace.hop_ms == HOP_MS


def test_no_speech_says_nothing():
    pace = Pace(HOP_MS)
    pace.observe(5.0, 0.0)
    pace.find(0.0)
    assert (pace.hop_ms, pace.load) == (HOP_MS, 0)


@given(histories, st.integers(0, FINALS_ONLY), histories)
def test_held_it_never_goes_below_the_level(before, least, after):
    pace, _ = lived(before)
    pace.hold(least)
    allowed = [*FIRST_LEVELS, None][least:]
    assert pace.hop_ms in allowed
    for verb, *values in after:
        getattr(pace, verb)(*values)
        assert pace.hop_ms in allowed


@given(histories, st.integers(0, FINALS_ONLY))
def test_let_go_it_comes_back_by_itself(history, least):
    pace, _ = lived(history)
    pace.hold(least)
    speak(pace, 0.05, 100)
    pace.hold(0)
    speak(pace, 0.05, (len(FACTORS) + 1) * (CALM_MAX_S + CALM_S))
    assert pace.hop_ms == HOP_MS

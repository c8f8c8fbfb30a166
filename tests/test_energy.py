"""What listening costs, by a clock and a source that a test moves."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.energy import LONGEST_TALK_S, N_IDLE_MIN, Activity, Meter


class Device:
    """Uses `watts`, and `talk_watts` more while somebody speaks; `is_blind` while its meter fails."""

    name, quality = "rapl", "measured_package"

    def __init__(self, watts=2.0, talk_watts=3.0):
        self.watts, self.talk_watts = watts, talk_watts
        self.now_s = self.asked_s = 0.0
        self.joules = 0.0
        self.is_blind = False
        self.is_busy, self.speech_s, self.utterances = False, 0.0, 0
        self.meter = Meter(self, lambda: Activity(self.is_busy, self.speech_s, self.utterances), lambda: self.now_s)

    def spent(self, _now_s):
        joules, self.joules = self.joules, 0.0
        return None if self.is_blind else joules

    def run(self, duration_s, sample_s=2.0):
        """Time passes, looked at now and then."""
        until_s = self.now_s + duration_s
        while self.now_s < until_s - 1e-9:
            step_s = min(sample_s, until_s - self.now_s)
            self.now_s += step_s
            self.joules += step_s * (self.watts + self.talk_watts * self.is_busy)
            self.meter.sample()

    def talk(self, duration_s):
        """One utterance."""
        self.is_busy = True
        self.run(duration_s)
        self.is_busy = False
        self.speech_s += duration_s
        self.utterances += 1
        self.meter.sample()


def test_an_interval():
    device = Device()
    device.run(30.0)
    energy = device.meter.read()
    assert (energy.source, energy.quality) == ("rapl", "measured_package")
    assert (energy.joules, energy.watts, energy.idle_watts, energy.total_joules) == (60.0, 2.0, 2.0, 60.0)
    assert (energy.joules_per_audio_s, energy.joules_per_utterance) == (None, None)
    device.run(10.0)
    energy = device.meter.read()
    assert (energy.joules, energy.total_joules) == (20.0, 80.0)


def test_talk_is_charged_what_it_takes_beyond_the_quiet():
    device = Device()
    device.run(30.0)
    for _ in range(4):
        device.talk(5.0)
        device.run(10.0)
    energy = device.meter.read()
    assert energy.joules_per_audio_s == pytest.approx(3.0)
    assert energy.joules_per_utterance == pytest.approx(15.0)
    assert energy.idle_watts == pytest.approx(2.0)
    assert device.meter.read().joules_per_audio_s is None


def test_talk_that_is_not_over_is_charged_to_the_report_in_which_it_ends():
    device = Device()
    device.run(30.0)
    device.is_busy = True
    device.run(6.0)
    assert device.meter.read().joules_per_utterance is None
    device.talk(4.0)
    device.run(2.0)
    assert device.meter.read().joules_per_utterance == pytest.approx(30.0)


def test_a_word_between_two_looks_is_not_quiet():
    device = Device()
    device.run(20.0)
    for _ in range(100):
        device.now_s += 2.0
        device.joules += 40.0
        device.utterances += 1
        device.speech_s += 1.0
        device.meter.sample()
    device.run(2.0)
    energy = device.meter.read()
    assert energy.idle_watts == 2.0
    assert energy.joules_per_utterance == 36.0


def test_without_enough_quiet_there_is_no_baseline_and_no_share_of_speech():
    device = Device()
    device.run(2.0 * (N_IDLE_MIN - 2))
    device.talk(5.0)
    device.run(2.0)
    energy = device.meter.read()
    assert energy.idle_watts is None
    assert energy.joules_per_utterance is None
    assert energy.joules == pytest.approx(device.meter.read().total_joules)


def test_somebody_elses_job_does_not_shift_the_baseline():
    device = Device()
    device.run(60.0)
    device.watts = 20.0
    device.run(20.0)
    device.watts = 2.0
    device.run(20.0)
    assert device.meter.read().idle_watts == 2.0


def test_the_baseline_follows_a_change_that_stays():
    device = Device()
    device.run(300.0)
    device.watts = 4.0
    device.run(300.0)
    assert device.meter.read().idle_watts == 4.0


def test_what_was_not_measured_throughout_is_not_reported():
    device = Device()
    device.run(30.0)
    device.meter.read()
    device.is_blind = True
    device.run(2.0)
    device.is_blind = False
    device.run(8.0)
    energy = device.meter.read()
    assert (energy.joules, energy.watts, energy.total_joules) == (None, None, 76.0)
    device.run(10.0)
    assert device.meter.read().joules == 20.0


def test_a_talk_that_was_not_measured_throughout_is_left_out():
    device = Device()
    device.run(30.0)
    device.is_busy = device.is_blind = True
    device.run(2.0)
    device.is_blind = False
    device.talk(8.0)
    device.run(4.0)
    device.talk(5.0)
    device.run(2.0)
    assert device.meter.read().joules_per_utterance == pytest.approx(15.0)


def test_talk_without_end_is_settled_now_and_then():
    device = Device()
    device.run(30.0)
    device.is_busy = True
    for _ in range(50):
        device.run(10.0)
        device.speech_s += 10.0
    assert device.now_s > LONGEST_TALK_S
    assert device.meter.read().joules_per_audio_s == pytest.approx(3.0, rel=0.05)


def test_no_source_no_report():
    meter = Meter(None)
    meter.sample()
    assert meter.read() is None


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.sampled_from(["run", "talk", "read", "blind"]), st.floats(0.1, 20.0)), max_size=30),
    st.floats(0.1, 50.0),
)
def test_joules_add_up_whatever_happens(history, watts):
    device = Device(watts)
    measured_j, reported_j = 0.0, 0.0
    for verb, duration_s in history:
        if verb == "read":
            reported_j += device.meter.read().joules or 0.0
            continue
        device.is_blind = verb == "blind"
        if verb == "talk":
            device.talk(duration_s)
        else:
            device.run(duration_s)
        if verb != "blind":
            measured_j += duration_s * (watts + device.talk_watts * (verb == "talk"))
    device.is_blind = False
    last = device.meter.read()
    assert last.total_joules == pytest.approx(measured_j, abs=0.01)
    assert reported_j + (last.joules or 0.0) <= measured_j + 0.02 * (len(history) + 1)
    assert last.idle_watts is None or math.isclose(last.idle_watts, watts, abs_tol=1e-3)

"""The governor on made-up weather, and the thermometer on trees of files as devices have them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_power import tree

from agent.config import PowerConfig, ThermalConfig
from agent.energy import Meter
from agent.messages import Thrift
from agent.monitor import Monitor
from agent.thermal import Governor, Reading, Thermometer

CONFIG = ThermalConfig()  # 80, 85, 90 °C; 5 less to go back; 10 s up, 60 s down
SAMPLE_S = 2.0


def live(governor, readings, now_s=0.0):
    """Steps that the readings, one each 2 s, lead to: when, which level."""
    steps = []
    for n, reading in enumerate(readings, 1):
        if step := governor.observe(reading, now_s + n * SAMPLE_S):
            assert step.level is governor.level
            steps.append((now_s + n * SAMPLE_S, step.level))
    return steps


def degrees(celsius, duration_s, *, is_throttled=None):
    return [Reading(celsius, is_throttled)] * int(duration_s / SAMPLE_S)


def test_a_cool_device_does_without_nothing():
    assert live(Governor(CONFIG), degrees(79.9, 3600)) == []


def test_heat_that_lasts_is_answered_step_by_step():
    steps = live(Governor(CONFIG), degrees(95.0, 600))
    assert steps == [(12.0, Thrift.LONGER_HOP), (22.0, Thrift.NO_PARTIALS), (32.0, Thrift.FINALS_ONLY)]


@pytest.mark.parametrize(("celsius", "level"), [(80.0, 1), (84.9, 1), (85.0, 2), (89.9, 2), (90.0, 3)])
def test_each_level_has_its_temperature(celsius, level):
    governor = Governor(CONFIG)
    live(governor, degrees(celsius, 600))
    assert governor.level == level


def test_a_peak_is_not_answered():
    assert live(Governor(CONFIG), [*degrees(95.0, 8), *degrees(79.0, 2)] * 20) == []


def test_it_steps_back_one_by_one_after_a_while_of_less_heat():
    governor = Governor(CONFIG)
    live(governor, degrees(95.0, 60))
    steps = live(governor, degrees(60.0, 600), now_s=60.0)
    assert steps == [(122.0, Thrift.NO_PARTIALS), (182.0, Thrift.LONGER_HOP), (242.0, Thrift.NORMAL)]


def test_a_little_less_heat_changes_nothing():
    governor = Governor(CONFIG)
    live(governor, degrees(80.0, 60))
    assert live(governor, degrees(75.0, 3600)) == []
    assert [level for _, level in live(governor, degrees(74.9, 3600))] == [Thrift.NORMAL]


def test_cool_moments_do_not_add_up():
    governor = Governor(CONFIG)
    live(governor, degrees(80.0, 60))
    assert live(governor, [*degrees(70.0, 58), *degrees(78.0, 2)] * 20) == []


def test_throttling_counts_at_any_temperature():
    governor = Governor(CONFIG)
    steps = live(governor, degrees(50.0, 40, is_throttled=True))
    assert [level for _, level in steps] == [Thrift.LONGER_HOP, Thrift.NO_PARTIALS, Thrift.FINALS_ONLY]
    assert [level for _, level in live(governor, degrees(50.0, 200, is_throttled=False))] == [2, 1, 0]


def test_a_device_that_tells_nothing_keeps_its_level():
    governor = Governor(CONFIG)
    assert live(governor, degrees(None, 3600)) == []
    live(governor, degrees(80.0, 60))
    assert live(governor, [Reading(None, None, is_under_voltage=False)] * 1000) == []
    assert governor.level is Thrift.LONGER_HOP


def test_the_reason_is_a_sentence():
    governor = Governor(ThermalConfig(rise_s=0.0))
    assert governor.observe(Reading(81.04, is_throttled=False), 0.0).reason == "81.0 °C, 80 or more"
    assert governor.observe(Reading(50.0, is_throttled=True), 1.0).reason == "the processor is throttled"


readings = st.lists(
    st.builds(Reading, st.none() | st.floats(20, 110), st.sampled_from([None, False, True])), max_size=400
)


@settings(deadline=None)
@given(readings)
def test_levels_are_taken_one_at_a_time_and_seldom(history):
    steps = live(Governor(CONFIG), history)
    levels = [Thrift.NORMAL, *(level for _, level in steps)]
    assert all(abs(after - before) == 1 for before, after in itertools.pairwise(levels))
    for (before_s, before), (after_s, after) in itertools.pairwise(steps):
        assert after_s - before_s >= (CONFIG.rise_s if after > before else CONFIG.dwell_s)


@settings(deadline=None)
@given(readings)
def test_it_recovers_from_anything(history):
    governor = Governor(CONFIG)
    live(governor, history)
    live(governor, degrees(40.0, 300), now_s=1e4)
    assert governor.level is Thrift.NORMAL


@pytest.mark.parametrize("ambient_c", [20, 40, 50, 60, 70, 80])
def test_a_device_that_the_levels_cool_comes_to_rest_or_changes_seldom(ambient_c):
    """Heated by what it does, with a time constant of a minute."""
    governor, celsius, changes_s = Governor(CONFIG), float(ambient_c), []
    for n in range(1800):
        target_c = ambient_c + (30, 20, 10, 5)[governor.level]
        celsius += (target_c - celsius) * SAMPLE_S / 60
        if governor.observe(Reading(celsius, None), n * SAMPLE_S):
            changes_s.append(n * SAMPLE_S)
    assert celsius < 91 or governor.level is Thrift.FINALS_ONLY
    assert len([when_s for when_s in changes_s if when_s > 600]) <= 3000 / CONFIG.dwell_s


# the thermometer


def thermometer(root, answers=()):
    answers = iter(answers)
    return Thermometer(PowerConfig(sysfs_dir=str(root)), lambda command: next(answers, "")).read


def test_the_hottest_zone_that_can_be_true(tmp_path):
    zones = tmp_path / "class/thermal"
    for n, value in enumerate([51_500, 63_250, -274_000, 200_000, "n/a"]):
        tree(zones / f"thermal_zone{n}", temp=value, type="cpu-thermal")
    assert thermometer(tmp_path)() == Reading(63.25, None, None)


def test_a_device_without_any_sensor(tmp_path):
    assert thermometer(tmp_path)() == Reading(None, None, None)


def test_a_processor_that_is_held_back_but_no_fan(tmp_path):
    devices = tmp_path / "class/thermal"
    tree(devices / "cooling_device0", type="pwm-fan", cur_state=3)
    read = thermometer(tmp_path)
    assert read().is_throttled is None
    for kind in ("cpufreq-cpu0", "thermal-cpufreq-0", "Processor"):
        tree(devices / "cooling_device1", type=kind, cur_state=0)
        assert read().is_throttled is False
        tree(devices / "cooling_device1", cur_state=2)
        assert read().is_throttled is True


def test_a_limit_below_what_was_allowed_before(tmp_path):
    policy = tree(
        tmp_path / "devices/system/cpu/cpufreq/policy0", cpuinfo_max_freq=2_400_000, scaling_max_freq=1_800_000
    )
    read = thermometer(tmp_path)
    assert read().is_throttled is False  # chosen by whoever set up the device
    tree(policy, scaling_max_freq=1_500_000)
    assert read().is_throttled is True
    tree(policy, scaling_max_freq=2_400_000)
    assert read().is_throttled is False
    tree(policy, scaling_max_freq=1_800_000)
    assert read().is_throttled is True


@pytest.mark.parametrize(
    ("flags", "is_throttled", "is_under_voltage"),
    [
        ("0x0", False, False),
        ("0x50000", False, False),  # some time ago
        ("0x50005", True, True),
        ("0x1", False, True),
        ("0x2", True, False),
        ("0x4", True, False),
        ("0x8", True, False),
    ],
)
def test_flags_of_a_raspberry_pi(tmp_path, flags, is_throttled, is_under_voltage):
    read = thermometer(tmp_path, ["throttled=0x0", f"throttled={flags}"])
    assert read() == Reading(None, is_throttled, is_under_voltage)


def test_a_firmware_that_stops_to_answer(tmp_path):
    read = thermometer(tmp_path, ["throttled=0x0", "", "throttled=oops"])
    assert [read(), read()] == [Reading(None, None, None)] * 2


# the monitor


class Told:
    """A monitor, and what it said."""

    def __init__(self, readings, config=None):
        self.readings = iter(readings)
        self.levels, self.events = [], []
        governor = Governor(config) if config else None
        self.monitor = Monitor(
            Meter(None), governor, self.look, 0.001, self.levels.append, lambda *event: self.events.append(event)
        )

    def look(self):
        reading = next(self.readings)
        if isinstance(reading, Exception):
            raise reading
        return reading


def test_each_step_is_an_event_and_obeyed():
    told = Told([Reading(95.0, None)] * 3, ThermalConfig(rise_s=0.0))
    for _ in range(3):
        told.monitor.look()
    assert told.levels == [Thrift.LONGER_HOP, Thrift.NO_PARTIALS, Thrift.FINALS_ONLY]
    assert [name for name, _ in told.events] == ["thermal_level"] * 3
    assert told.events[0][1] == "longer_hop: half of the partials; 95.0 °C, 80 or more"
    assert told.monitor.heat().thrift == "finals_only"


def test_switched_off_it_only_reports():
    told = Told([Reading(95.0, is_throttled=True)])
    told.monitor.look()
    assert (told.levels, told.events) == ([], [])
    assert (told.monitor.heat().thrift, told.monitor.heat().is_throttled) == ("normal", True)


def test_a_weak_power_supply_is_reported_when_it_begins():
    told = Told([Reading(None, None, is_under_voltage=bad) for bad in (None, True, True, False, True)])
    for _ in range(5):
        told.monitor.look()
    assert [name for name, _ in told.events] == ["under_voltage"] * 2


def test_a_look_that_fails_is_counted_and_the_next_one_comes(caplog):
    told = Told(
        [OSError("no such sensor"), ValueError("odd"), *[Reading(95.0, None)] * 100_000], ThermalConfig(rise_s=0.0)
    )
    told.monitor.start()
    for _ in range(2000):
        if told.levels:
            break
        told.monitor._stopping.wait(0.01)
    told.monitor.stop()
    assert told.levels[0] is Thrift.LONGER_HOP
    assert told.monitor.n_failed == 2
    assert caplog.text.count("could not be looked at") == 1

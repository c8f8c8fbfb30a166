"""What outlives the agent, and what an operator hears when it cannot."""

import pytest

from agent.commands import Settings
from agent.config import Config, MqttConfig, OutboxConfig
from agent.controls import Controls, Levers
from agent.kept import KeptSwitches
from agent.switches import Positions


@pytest.mark.parametrize("muted", [False, True])
@pytest.mark.parametrize("transcribing", [False, True])
def test_positions_are_found_again(tmp_path, muted, transcribing):
    folder = tmp_path / "state"
    assert KeptSwitches(folder).read() == Positions()
    for positions in (Positions(not muted, not transcribing), Positions(muted, transcribing)):
        KeptSwitches(folder).keep(positions)
        assert KeptSwitches(folder).read() == positions


def test_a_device_that_nobody_can_tell_anything_is_not_left_muted(state_dir):
    KeptSwitches(state_dir).keep(Positions(muted=True))
    assert KeptSwitches.of(Config()).read() == Positions(muted=True)
    assert KeptSwitches.of(Config(mqtt=MqttConfig(commands=False))).read() == Positions()
    assert KeptSwitches.of(Config(outbox=OutboxConfig(durable=False))).read() == Positions()


def test_without_a_folder_nothing_is_kept():
    kept = KeptSwitches(None)
    kept.keep(Positions(muted=True))
    assert kept.read() == Positions()


def test_a_mute_that_cannot_be_kept_holds_and_is_reported(tmp_path):
    (tmp_path / "file").touch()
    switched, events = [], []
    ignored = dict.fromkeys(["tune_gate", "tune_engine", "show_muted"], lambda _: None)
    levers = Levers(
        switch=switched.append,
        keep=KeptSwitches(tmp_path / "file").keep,
        report=lambda *event: events.append(event),
        renew_engine=lambda: None,
        stop=lambda: None,
        **ignored,
    )
    settings = Settings.of(Config())
    Controls(settings, levers).apply(
        Settings(muted=True, **{k: getattr(settings, k) for k in ("recogniser", "vad", "telemetry")})
    )
    assert switched == [Positions(muted=True)]
    assert [name for name, _ in events] == ["switches_not_kept", "muted"]
    assert "File exists" in events[0][1]

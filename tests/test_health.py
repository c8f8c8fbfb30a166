"""Signs of life: what systemd hears, and who is held for dead."""

import logging
import socket
import time

import pytest

from agent.health import SLACK_S, Heartbeat, Notifier
from agent.vitals import Sensed, Vitals


@pytest.mark.parametrize("form", ["path", "abstract"])
def test_systemd_is_told(tmp_path, form):
    address = f"{tmp_path}/notify" if form == "path" else f"@whisperlet-{tmp_path.name}-{time.monotonic_ns()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(address.replace("@", "\0"))
        systemd.settimeout(2)
        notifier = Notifier({"NOTIFY_SOCKET": address, "WATCHDOG_USEC": "30000000"})
        notifier.ready()
        notifier.status("listening\nand more")
        notifier.watchdog()
        notifier.stopping()
        assert [systemd.recv(100) for _ in range(4)] == [b"READY=1", b"STATUS=listening", b"WATCHDOG=1", b"STOPPING=1"]
    assert notifier.watchdog_s == 30.0


def test_without_systemd_nothing_happens(caplog):
    notifier = Notifier({})
    notifier.ready()
    assert notifier.watchdog_s is None
    assert not caplog.records


def test_a_deaf_systemd_is_logged_once(tmp_path, caplog):
    notifier = Notifier({"NOTIFY_SOCKET": f"{tmp_path}/nobody"})
    with caplog.at_level(logging.WARNING):
        notifier.watchdog()
        notifier.watchdog()
    (record,) = caplog.records
    assert "systemd was not told WATCHDOG=1" in record.message


class Hand:
    """A clock that is moved by hand."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


def test_a_stage_is_stale_when_it_breaks_its_promise():
    clock = Hand()
    heartbeat = Heartbeat(clock)
    heartbeat.beat("ear", 1.0)
    heartbeat.of("engine")(60.0)
    clock.now_s += 1.0 + SLACK_S
    assert heartbeat.stale() == []
    clock.now_s += 0.1
    assert heartbeat.stale() == ["ear"]
    clock.now_s += 59.0
    assert heartbeat.stale() == ["ear", "engine"]
    heartbeat.beat("ear", 1.0)
    assert heartbeat.stale() == ["engine"]
    heartbeat.forget("engine")
    assert heartbeat.stale() == []


class Systemd(Notifier):
    """Remembers what it was told."""

    def __init__(self):
        self.heard = []

    def _send(self, message):
        self.heard.append(message)

    def take(self):
        heard, self.heard = self.heard, []
        return heard


class Told:
    """Vitals, and all who hear of them."""

    def __init__(self):
        self.sensed = Sensed(300.0, 0, is_connected=True)
        self.n_changes = 0
        self.events = []
        self.systemd = Systemd()
        self.vitals = Vitals(lambda: self.sensed, self.changed, lambda *event: self.events.append(event), self.systemd)

    def changed(self):
        self.n_changes += 1


def test_the_watchdog_is_fed_only_while_no_stage_is_stuck(monkeypatch):
    told = Told()
    clock = Hand()
    monkeypatch.setattr(told.vitals.heartbeat, "_clock", clock)
    told.vitals.heartbeat.beat("ear", 1.0)
    told.vitals.turn()
    assert told.systemd.take()[0] == "WATCHDOG=1"
    clock.now_s += 60
    for _ in range(3):
        told.vitals.turn()
    assert told.systemd.take() == [
        "STATUS=microphone starting; broker connected; a partial every 300 ms; 0 messages wait; stuck: ear"
    ]
    assert told.events == [("stage_stalled", "ear")]
    told.vitals.heartbeat.beat("ear", 1.0)
    told.vitals.turn()
    assert told.systemd.take()[0] == "WATCHDOG=1"


def test_the_status_follows_the_microphone_and_is_told_once():
    told = Told()
    for news, state in [
        (told.vitals.note_audio, "listening"),
        (lambda: told.vitals.note_event("microphone_silent"), "silent"),
        (lambda: told.vitals.note_event("microphone_lost"), "lost"),
        (told.vitals.note_audio, "lost"),  # only "microphone_back" knows that it is
        (lambda: told.vitals.note_event("engine_restarted"), "lost"),
        (lambda: told.vitals.note_event("microphone_back"), "listening"),
    ]:
        news()
        news()
        assert told.vitals.condition().microphone == state
    assert told.n_changes == 4
    lines = [line.partition(";")[0] for line in told.systemd.take()]
    assert lines == [f"STATUS=microphone {state}" for state in ("listening", "silent", "lost", "listening")]


def test_the_status_tells_of_mute_pace_broker_and_queue():
    told = Told()
    told.vitals.note_audio()
    told.vitals.is_muted = True
    told.sensed = Sensed(None, 12, is_connected=False)
    told.vitals.turn()
    assert told.systemd.take()[-1] == ("STATUS=microphone listening, muted; broker away; finals only; 12 messages wait")
    condition = told.vitals.condition()
    assert (condition.muted, condition.hop_ms, condition.outbox_messages) == (True, None, 12)
    n_changes = told.n_changes
    told.sensed = Sensed(None, 13, is_connected=True)
    told.vitals.turn()
    assert told.n_changes == n_changes  # what waits changes all the time

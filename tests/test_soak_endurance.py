"""The soak over eight hours (`make soak SOAK=endurance`), as seven minutes; and what it would find fault with."""

import copy
import subprocess

import pytest
from brokers import needs_mosquitto
from soak import endurance

GOOD = {
    "finals_lost": 0,
    "dropped_messages": 0,
    "dropped_segments": 0,
    "failed_segments": 0,
    "failed_reports": 0,
    "finals": 10,
    "clips_spoken": 9,
    "microphone_losses": 2,
    "microphone_losses_told": 2,
    "microphone_returns_told": 2,
    "broker_outages": 1,
    "memory_growth_bytes": 4_999_999,
    "threads_growth": 0,
    "handles_growth": -1,
}


@needs_mosquitto
@pytest.mark.slow
def test_minutes_of_a_device(tmp_path):
    result = endurance.run(tmp_path, hours=0.12, outage_every_min=4.0)
    assert endurance.failures(result) == [], result
    assert result["finals"] >= 5
    assert result["microphone_losses"] == 1
    assert result["rejected_segments"] >= 1, "no noise was played"
    assert result["max_outbox_messages"] >= 1, "nothing ever waited"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"finals_lost": 1}, "1 finals lost"),
        ({"dropped_segments": 2}, "2 dropped segments"),
        ({"finals": 8}, "9 clips were spoken, and 8 finals made"),
        ({"microphone_returns_told": 1}, "not each loss of the microphone was told and healed"),
        ({"broker_outages": 0}, "the broker was never away"),
        ({"memory_growth_bytes": 5_000_000}, "memory has grown by 5.0 MB"),
        ({"threads_growth": 1}, "threads grew by 1"),
        ({"handles_growth": 3}, "handles grew by 3"),
    ],
)
def test_what_must_not_be(change, complaint):
    assert endurance.failures(copy.copy(GOOD)) == []
    assert endurance.failures(GOOD | change) == [complaint]


def test_growth_is_measured_after_the_warm_up():
    def minute(n, **changes):
        usual = {"resident_bytes": 100, "threads": 5, "handles": 7, "outbox_messages": 0}
        return endurance.Minute(minute=n, **(usual | changes))

    quiet = [minute(n, resident_bytes=10 * min(n, 10)) for n in range(100)]
    assert endurance._drift(quiet)["memory_growth_bytes"] == 0
    leaking = [minute(n, resident_bytes=n, handles=7 + n // 30, threads=5 - n % 2) for n in range(100)]
    found = endurance._drift(leaking)
    assert found["memory_growth_bytes"] == pytest.approx(60, abs=2)
    assert (found["handles_growth"], found["threads_growth"]) == (1, -1)


def test_an_agent_that_dies_is_not_taken_for_one_that_lost_nothing(tmp_path, monkeypatch):
    plain = subprocess.Popen
    monkeypatch.setattr(
        endurance.subprocess, "Popen", lambda command, **options: plain([command[0], "-c", "1 / 0"], **options)
    )
    relay = endurance.Relay(1)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        endurance._lived(tmp_path, relay, 1.0, 20.0)
    relay._server.close()

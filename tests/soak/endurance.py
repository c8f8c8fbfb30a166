"""Hours of a device's life in minutes: speech, silence, noise, a microphone that goes and a broker that is away.

The agent is the real one but for two ends: the microphone's samples come as fast as they are taken, with the time that
they would have had, and the engine's process says what it was given instead of recognising it. It runs in a process of
its own (`endurance_agent.py`), which tells of itself once a simulated minute.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
from brokers import Broker, Subscriber, wait_for

from soak.relay import Relay

ROOT = Path(__file__).parents[2]
OUTAGE_EVERY_MIN, OUTAGE_SHARE = 20.0, 0.15  # simulated; the first comes after half of the time
LAST_MIN = 2.0  # in which the broker can be reached
WARM_UP = 0.2  # of the time, before which memory is still being taken for the first time
MAX_GROWTH_BYTES = 5_000_000
ARRIVE_S = 30.0
DEVICE = "kiosk"


class Minute(msgspec.Struct, frozen=True):
    """What the agent tells of itself."""

    minute: int  # simulated
    resident_bytes: int  # of the ear
    threads: int
    handles: int
    outbox_messages: int


def run(folder: Path, hours: float = 8.0, outage_every_min: float = OUTAGE_EVERY_MIN) -> dict[str, Any]:
    """Everything counted."""
    broker = Broker(folder)
    broker.start()
    began_s = time.monotonic()
    try:
        with Relay(broker.port) as relay, Subscriber(broker.port) as heard:
            minutes, said = _lived(folder, relay, hours, outage_every_min)
            arrived: dict[tuple[Any, ...], int] = {}
            wait_for(lambda: heard.on("status") and heard.on("status")[-1]["reason"] == "stopped", ARRIVE_S)
            for final in heard.on("transcript/final"):
                key = final["session"], final["utterance"], final["segment"]
                arrived[key] = arrived.get(key, 0) + 1
            events = [event["name"] for event in heard.on("event")]
            n_outages = relay.n_cuts
    finally:
        broker.kill()
    wall_s = time.monotonic() - began_s
    return {
        "simulated_hours": hours,
        "wall_s": round(wall_s, 1),
        "times_real_time": round(3600 * hours / wall_s, 1),
        **said,
        "finals_arrived": len(arrived),
        "finals_lost": said["finals"] - len(arrived),
        "finals_repeated": sum(n - 1 for n in arrived.values()),
        "broker_outages": n_outages,
        "microphone_losses_told": events.count("microphone_lost"),
        "microphone_returns_told": events.count("microphone_back"),
        **_drift(minutes),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    wrong = [
        f"{result[key]} {key.replace('_', ' ')}"
        for key in ("finals_lost", "dropped_messages", "dropped_segments", "failed_segments", "failed_reports")
        if result[key]
    ]
    if result["finals"] < result["clips_spoken"]:
        wrong.append(f"{result['clips_spoken']} clips were spoken, and {result['finals']} finals made")
    if not result["microphone_losses"] == result["microphone_losses_told"] == result["microphone_returns_told"]:
        wrong.append("not each loss of the microphone was told and healed")
    if not result["broker_outages"]:
        wrong.append("the broker was never away")
    if result["memory_growth_bytes"] >= MAX_GROWTH_BYTES:
        wrong.append(f"memory has grown by {result['memory_growth_bytes'] / 1e6:.1f} MB")
    wrong += [
        f"{key} grew by {result[f'{key}_growth']}" for key in ("threads", "handles") if result[f"{key}_growth"] > 0
    ]
    return wrong


def _lived(folder: Path, relay: Relay, hours: float, outage_every_min: float) -> tuple[list[Minute], dict[str, Any]]:
    """What the agent told each minute, and at its end."""
    command = [sys.executable, "-m", "soak.endurance_agent", str(relay.port), str(folder), str(hours)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "STATE_DIRECTORY": str(folder)}
    minutes: list[Minute] = []
    with (
        (folder / "agent.log").open("w") as log,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment) as agent,
    ):
        assert agent.stdout is not None
        last = b""
        for line in agent.stdout:
            if b'"minute"' in line:
                minutes.append(msgspec.json.decode(line, type=Minute))
                phase = (minutes[-1].minute / outage_every_min + 0.5) % 1
                relay.is_open = phase >= OUTAGE_SHARE or minutes[-1].minute > 60 * hours - LAST_MIN
            last = line
    if agent.returncode:
        raise RuntimeError(
            f"the agent ended with status {agent.returncode}: {(folder / 'agent.log').read_text()[-3000:]}"
        )
    return minutes, json.loads(last)


def _drift(minutes: list[Minute]) -> dict[str, Any]:
    """How much more there is in the last quarter than after the warm-up.

    Of memory, medians are compared. Threads and handles come and go with a connection, so what has grown is what there
    is at the least in the end beyond what there was at the most before.
    """
    warm = minutes[int(WARM_UP * len(minutes)) :]
    quarter = max(1, len(warm) // 4)
    first, last, earlier = warm[:quarter], warm[-quarter:], warm[: 2 * quarter]
    tenths = [minutes[len(minutes) * n // 10 : len(minutes) * (n + 1) // 10] or minutes[-1:] for n in range(10)]
    return {
        "resident_bytes_by_tenth": [_median_bytes(tenth) for tenth in tenths],
        "memory_growth_bytes": _median_bytes(last) - _median_bytes(first),
        "threads": max(minute.threads for minute in last),
        "threads_growth": min(minute.threads for minute in last) - max(minute.threads for minute in earlier),
        "handles": max(minute.handles for minute in last),
        "handles_growth": min(minute.handles for minute in last) - max(minute.handles for minute in earlier),
        "max_outbox_messages": max(minute.outbox_messages for minute in minutes),
    }


def _median_bytes(minutes: list[Minute]) -> int:
    return round(statistics.median(minute.resident_bytes for minute in minutes))

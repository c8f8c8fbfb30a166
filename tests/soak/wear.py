"""What the outbox writes to the disk in a day, as the kernel counts it for this process.

A kiosk's day: a final every 30 s for 12 hours and telemetry every 30 s all day, with the broker there and without it.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

from agent.clock import Clock
from agent.messages import Envelope, Kind
from agent.outbox import Limits
from agent.payloads import final_payload, to_envelope
from agent.store import DurableOutbox
from soak.publisher import heard

N_FINALS = 1440
N_TELEMETRY = 2880
TELEMETRY_BYTES = 1500  # with every counter and measurement filled in


def run(folder: Path) -> dict[str, Any]:
    """Bytes and commits of a day, by whether the broker was there."""
    began_s = time.monotonic()
    result: dict[str, Any] = {"finals_a_day": N_FINALS, "telemetry_a_day": N_TELEMETRY}
    for name, is_connected in (("connected", True), ("alone", False)):
        place = folder / name
        before = _written()
        outbox = DurableOutbox(place, Limits(messages=100_000), print)
        outbox._open()  # commits are ours to make, at the times at which its thread makes them
        _live_a_day(outbox, is_connected=is_connected)
        result[f"{name}_file_bytes"] = sum(path.stat().st_size for path in place.iterdir())
        outbox.close()
        result[f"{name}_written_bytes"] = _written() - before
    return result | {"wall_s": round(time.monotonic() - began_s, 1)}


def _live_a_day(outbox: DurableOutbox, *, is_connected: bool) -> None:
    for n in range(N_TELEMETRY):
        outbox.put(Envelope("telemetry", b"t" * TELEMETRY_BYTES, Kind.TELEMETRY))
        if n < N_FINALS:
            outbox.put(to_envelope(final_payload(heard(n), Clock(0.0, 0.0, 0.0), "0" * 16, 0.0)))
        while is_connected and (taken := outbox.take(20)):
            for message_id, _ in taken:
                outbox.ack(message_id)
        if outbox._pending.finals or outbox._is_batch_due():
            outbox.commit()
        while is_connected and (taken := outbox.take(20)):
            for message_id, _ in taken:
                outbox.ack(message_id)
        if outbox._deletes:
            outbox.commit()  # 15 s later, since the next final takes 30


def _written() -> int:
    """Bytes that this process had the kernel write to disks so far."""
    return int(re.search(r"^write_bytes: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)[1])


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    if result["connected_written_bytes"] == 0:
        return ["the kernel counted nothing: is the folder on a disk?"]
    return []

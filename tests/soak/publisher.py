"""A part of the agent that can be killed: outbox and publisher as they ship, no ear and no engine.

`python -m soak.publisher PORT FOLDER FIRST LAST` says `put N` before and `stored N` after final N was committed, a few at
a time, then delivers all and ends.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path

from agent.clock import Clock
from agent.config import MqttConfig
from agent.inventory import hardware, system, versions
from agent.messages import Transcript
from agent.mqtt import Publisher
from agent.outbox import Limits
from agent.payloads import InfoPayload, final_payload, new_session, to_envelope
from agent.store import DurableOutbox

BURST = 4  # finals in one commit, at the most
PAUSE_S = 0.004  # between bursts, at the most


def main(port: int, folder: Path, first: int, last: int) -> None:
    session = new_session()
    outbox = DurableOutbox(folder, Limits(messages=1_000_000), lambda name, detail: say(f"event {name}: {detail}"))
    config = MqttConfig(
        url=f"mqtt://127.0.0.1:{port}", device="soak", reconnect_min_s=0.1, reconnect_max_s=0.5, will_delay_s=0
    )
    publisher = Publisher(config, outbox, info(session), lambda *_: None)
    outbox.start()
    publisher.start()
    n = first
    while n <= last:
        burst = range(n, min(last, n + random.randrange(BURST)) + 1)
        for n in burst:
            say(f"put {n}")
            publisher.put(to_envelope(final_payload(heard(n), Clock(0.0, 0.0, 0.0), session, 0.0)))
        if outbox.flush(30):
            say(f"stored {burst[0]} {burst[-1]}")
        n = burst[-1] + 1
        time.sleep(random.uniform(0, PAUSE_S))
    while outbox.depth:
        time.sleep(0.05)
    publisher.stop(5)
    outbox.close()
    say("done")


def info(session: str) -> InfoPayload:
    return InfoPayload(
        session=session,
        started_utc="2025-01-31T12:00:00.000Z",
        versions=versions("ai-edge-litert"),
        bundle=None,
        hardware=hardware(),
        system=system(),
        config_sha256="0" * 64,
        capabilities=["finals"],
        sample_rate_hz=16_000,
    )


def heard(n: int) -> Transcript:
    text = "He began a confused complaint against the wizard who had vanished behind the curtain on the left."
    return Transcript(n, 0, 1, text, len(text), 16_000 * n, 16_000 * n + 96_000, is_final=True, language="en")


def say(line: str) -> None:
    os.write(1, line.encode() + b"\n")  # at once, and whole


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))

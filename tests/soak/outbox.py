"""Finals through kills of the agent and restarts of the broker: none that was stored may be lost.

Lost is a final whose commit had returned and that no subscriber ever received. What was on its way to the disk at a
kill is counted apart: the agent had made no promise yet.
"""

from __future__ import annotations

import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
from brokers import Broker, wait_for
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

ROOT = Path(__file__).parents[2]
# A broker that loses nothing while a subscriber is away, see docs/outbox.md.
BROKER = "allow_anonymous true\nmax_queued_messages 0\nautosave_interval 1800"
ARRIVE_S = 60.0  # for what the broker still has when the agent is done


class Recorder:
    """A subscriber whose session outlives its connections; remembers how often each final came, and what it said."""

    def __init__(self, port: int) -> None:
        self.n_arrived: Counter[int] = Counter()
        self.n_out_of_order = 0  # first arrivals after a later one's
        self.n_different = 0  # repetitions that are not what came first
        self.n_historical = 0
        self._bodies: dict[int, dict[str, Any]] = {}
        self._last = 0
        self._client = Client(CallbackAPIVersion.VERSION2, "recorder", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe("whisperlet/soak/transcript/final", qos=1)
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(1, 1)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 86_400
        self._client.connect("127.0.0.1", port, clean_start=False, properties=session)
        self._client.loop_start()
        assert subscribed.wait(20)

    def _on_message(self, _client: Any, _userdata: Any, message: Any) -> None:
        body = msgspec.json.decode(message.payload)
        n = body["utterance"]
        self.n_historical += body.pop("historical")
        if n not in self._bodies:
            self.n_out_of_order += n < self._last
            self._last = max(self._last, n)
        self.n_different += self._bodies.setdefault(n, body) != body
        self.n_arrived[n] += 1

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()


class Agents:
    """One publisher after the other, each going on where the last one was killed."""

    def __init__(self, port: int, folder: Path, n_finals: int) -> None:
        self.put: set[int] = set()
        self.stored: set[int] = set()
        self.events: list[str] = []
        self.is_done = False
        self._command = [sys.executable, "-m", "soak.publisher", str(port), str(folder)]
        self._n_finals = n_finals
        self._environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}

    def run(self, n_to_store: int | None) -> None:
        """Until so many more are stored, then kill it; None: to its end."""
        first = max(self.put, default=0) + 1
        goal = len(self.stored) + (n_to_store or 0)
        command = [*self._command, str(first), str(self._n_finals)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=self._environment) as agent:
            assert agent.stdout is not None
            for line in agent.stdout:
                self._note(line.decode())
                if n_to_store is not None and len(self.stored) >= goal and agent.poll() is None:
                    time.sleep(random.uniform(0, 0.01))
                    agent.kill()
                    n_to_store = None  # what it had said by then still counts

    def _note(self, line: str) -> None:
        what, *rest = line.split()
        if what == "put":
            self.put.add(int(rest[0]))
        elif what == "stored":
            self.stored.update(range(int(rest[0]), int(rest[1]) + 1))
        elif what == "done":
            self.is_done = True
        else:
            self.events.append(line.strip())


class Restarts(threading.Thread):
    """Stops and starts the broker whenever another share of the finals has been stored."""

    def __init__(self, broker: Broker, agents: Agents, n_restarts: int, n_finals: int) -> None:
        super().__init__(name="restarts")
        self.n = 0
        self._broker, self._agents = broker, agents
        self._goals = [n_finals * (k + 1) // (n_restarts + 1) for k in range(n_restarts)]

    def run(self) -> None:
        for goal in self._goals:
            while len(self._agents.stored) < goal and not self._agents.is_done:
                time.sleep(0.01)
            self._broker.stop()
            time.sleep(random.uniform(0, 0.5))
            self._broker.start(BROKER, persistent=True)
            self.n += 1


def run(folder: Path, n_finals: int = 10_000, n_kills: int = 100, n_restarts: int = 20) -> dict[str, Any]:
    """Everything counted."""
    began_s = time.monotonic()
    broker = Broker(folder)
    broker.start(BROKER, persistent=True)
    recorder = Recorder(broker.port)
    agents = Agents(broker.port, folder / "state", n_finals)
    restarts = Restarts(broker, agents, n_restarts, n_finals)
    restarts.start()
    try:
        for _ in range(n_kills):
            agents.run(max(1, round(random.uniform(0, 1.8) * n_finals / n_kills)))
        agents.run(None)
        restarts.join()
        wait_for(lambda: agents.stored <= recorder.n_arrived.keys() or None, ARRIVE_S) if agents.is_done else None
    except AssertionError:
        pass  # the result tells what did not arrive
    finally:
        recorder.close()
        broker.kill()
    return _result(agents, recorder, restarts.n, n_kills) | {"wall_s": round(time.monotonic() - began_s, 1)}


def _result(agents: Agents, recorder: Recorder, n_restarts: int, n_kills: int) -> dict[str, Any]:
    arrived = recorder.n_arrived.keys()
    in_flight = agents.put - agents.stored
    return {
        "kills": n_kills,
        "broker_restarts": n_restarts,
        "finals_put": len(agents.put),
        "finals_stored": len(agents.stored),
        "lost": len(agents.stored - arrived),
        "lost_numbers": sorted(agents.stored - arrived)[:20],
        "in_flight_at_a_kill": len(in_flight),
        "of_these_arrived": len(in_flight & arrived),
        "arrivals": recorder.n_arrived.total(),
        "repeated": sum(n > 1 for n in recorder.n_arrived.values()),
        "repeated_differently": recorder.n_different,
        "marked_historical": recorder.n_historical,
        "out_of_order": recorder.n_out_of_order,
        "events": agents.events,
        "is_done": agents.is_done,
        "agents_cpu_s": round(sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2]), 1),
    }


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    wrong = [key for key in ("lost", "repeated_differently", "out_of_order") if result[key]]
    return [f"{result[key]} {key.replace('_', ' ')}" for key in wrong] + (
        [] if result["is_done"] else ["not delivered"]
    )

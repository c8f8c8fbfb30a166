"""Many devices on one Mosquitto: the agent's own publisher and link, with transcripts that nobody has spoken.

A minute in the life of a device is one utterance with its partials and its final, and two reports. `run` has a thousand
devices live for some minutes, each of them in a few seconds, and counts what arrives. Devices share processes, which say
on standard output when they are connected, and when all that they had to say is acknowledged.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import psutil
from brokers import Broker, wait_for
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from test_payloads import CLOCK, FINAL, HEARD, info, telemetry

from agent.config import MqttConfig
from agent.mqtt import Publisher
from agent.outbox import Limits, MemoryOutbox
from agent.payloads import final_payload, partial_payload, to_envelope

ROOT = Path(__file__).parents[2]
BROKER = "allow_anonymous true\nsys_interval 1\nmax_queued_messages 0\nmax_inflight_messages 1000"
SENTENCE = "He began a confused complaint against the wizard who had vanished behind the curtain on the left."
PARTIALS = 8  # of an utterance; as many as wait for the network at once
REPORTS = 2  # a minute
PATIENCE_S = 120.0


class Device:
    """One agent's publisher; `live` through a minute."""

    def __init__(self, number: int, port: int) -> None:
        self.session = f"{number:016x}"
        config = MqttConfig(
            url=f"mqtt://127.0.0.1:{port}", device=f"kiosk-{number:04}", reconnect_min_s=0.5, reconnect_max_s=5
        )
        self.outbox = MemoryOutbox(Limits(messages=1000))
        about = msgspec.structs.replace(info(None), session=self.session)
        self.publisher = Publisher(config, self.outbox, about, lambda _name, _detail: None)

    def live(self, minute: int) -> None:
        """Say and report what there is in a minute."""
        for n in range(PARTIALS):
            said = SENTENCE[: len(SENTENCE) * (n + 1) // PARTIALS]
            partial = msgspec.structs.replace(HEARD, utterance=minute, revision=n + 1, text=said)
            self.publisher.put(to_envelope(partial_payload(partial, CLOCK, self.session)))
        final = msgspec.structs.replace(FINAL, utterance=minute, text=SENTENCE)
        self.publisher.put(to_envelope(final_payload(final, CLOCK, self.session, 103.0)))
        for _ in range(REPORTS):
            self.publisher.put(to_envelope(telemetry(session=self.session)))


def devices(port: int, first: int, n: int, minutes: int, minute_s: float) -> None:
    """Let `n` devices live; what a process of the fleet does. Waits for a line on standard input in between."""
    fleet = [Device(first + i, port) for i in range(n)]
    for device in fleet:
        device.publisher.start()
    wait_for(lambda: all(device.publisher.is_connected for device in fleet), PATIENCE_S)
    print("connected", flush=True)
    sys.stdin.readline()
    began_s = time.monotonic()
    for minute in range(minutes):
        for i, device in enumerate(fleet):
            due_s = began_s + (minute + i / n) * minute_s  # devices do not speak all at once
            time.sleep(max(0.0, due_s - time.monotonic()))
            device.live(minute)
    wait_for(lambda: all(device.outbox.depth == 0 for device in fleet), PATIENCE_S)
    dropped = sum(device.publisher.counts().partials_dropped for device in fleet)
    print(json.dumps({"partials_dropped": dropped}), flush=True)
    sys.stdin.readline()
    for device in fleet:
        device.publisher.stop(5)


class Collector:
    """Takes everything that the fleet says, and what the broker says of itself."""

    def __init__(self, port: int) -> None:
        self.finals: set[tuple[str, int]] = set()  # session, utterance
        self.n_repeated, self.n_messages, self.n_partials = 0, 0, 0
        self.broker: dict[str, int] = {}  # by topic below $SYS/broker/
        self._is_ready = False
        self._client = Client(CallbackAPIVersion.VERSION2, "collector", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_message = self._on_message
        self._client.on_subscribe = lambda *_: setattr(self, "_is_ready", True)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        self._client.subscribe([("whisperlet/#", 1), ("$SYS/broker/bytes/+", 0)])
        wait_for(lambda: self._is_ready)

    def _on_message(self, _client: Client, _userdata: Any, message: MQTTMessage) -> None:
        if message.topic.startswith("$SYS/"):
            self.broker[message.topic.removeprefix("$SYS/broker/")] = int(message.payload)
            return
        self.n_messages += 1
        self.n_partials += message.topic.endswith("/transcript/partial")
        if message.topic.endswith("/transcript/final"):
            body = json.loads(message.payload)
            key = body["session"], body["utterance"]
            self.n_repeated += key in self.finals
            self.finals.add(key)

    def close(self) -> None:
        """Let go of the connection."""
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()


@contextlib.contextmanager
def processes(port: int, n: int, n_processes: int, minutes: int, minute_s: float) -> Iterator[list[Any]]:
    """Processes that share `n` devices."""
    share = n // n_processes
    started: list[subprocess.Popen[str]] = []
    code = "import sys; from soak.fleet import devices; devices(*map(int, sys.argv[1:5]), float(sys.argv[5]))"
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    try:
        for first in range(0, n, share):
            command = [sys.executable, "-c", code, *map(str, (port, first, min(share, n - first), minutes, minute_s))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            started.append(subprocess.Popen(command, env=path, cwd=ROOT, text=True, **pipes))  # type: ignore[call-overload]
        yield started
    finally:
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired, BrokenPipeError):
                process.communicate("\n", timeout=60)
            process.kill()
            process.wait()


def _line(stream: IO[str] | None) -> str:
    assert stream is not None
    line = stream.readline()
    assert line, "a process of the fleet has ended"
    return line


def _go(process: Any) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


def measure(folder: Path, n: int, n_processes: int, minutes: int, minute_s: float) -> dict[str, Any]:
    """Let `n` devices live for so many of their minutes, each in `minute_s`; what came of it."""
    broker = Broker(folder)
    broker.start(BROKER)
    collector = Collector(broker.port)
    mosquitto = psutil.Process(broker._process.pid)
    try:
        began_s = time.monotonic()
        with processes(broker.port, n, n_processes, minutes, minute_s) as fleet:
            for process in fleet:
                _line(process.stdout)
            connected_s = time.monotonic() - began_s
            before, bytes_before = collector.n_messages, _broker_bytes(collector)
            began_s, cpu_before_s = time.monotonic(), _cpu_s(mosquitto)
            for process in fleet:
                _go(process)
            dropped = sum(json.loads(_line(process.stdout))["partials_dropped"] for process in fleet)
            wall_s = time.monotonic() - began_s
            with contextlib.suppress(AssertionError):
                wait_for(lambda: len(collector.finals) == n * minutes, PATIENCE_S)
            cpu_s = _cpu_s(mosquitto) - cpu_before_s
            n_messages = collector.n_messages - before
            received = _broker_bytes(collector) - bytes_before
            resident = mosquitto.memory_info().rss
    finally:
        collector.close()
        broker.kill()
    return {
        "devices": n,
        "processes": n_processes,
        "connected_s": round(connected_s, 1),
        "finals": n * minutes,
        "finals_lost": n * minutes - len(collector.finals),
        "finals_repeated": collector.n_repeated,
        "partials_dropped": dropped,
        "messages": n_messages,
        "wall_s": round(wall_s, 1),
        "messages_per_s": round(n_messages / wall_s),
        "broker_cpu_percent": round(100 * cpu_s / wall_s, 1),
        "broker_cpu_us_per_message": round(1e6 * cpu_s / n_messages, 1),
        "broker_resident_bytes": resident,
        "messages_per_device_hour": 60 * (PARTIALS + 1 + REPORTS),
        "bytes_per_device_hour": round(60 * received / (n * minutes)),
        "broker_cpu_percent_at_real_pace": round(100 * cpu_s / (60 * minutes), 2),
    }


def _broker_bytes(collector: Collector) -> int:
    """Bytes that the broker has received, once it has said so anew."""
    collector.broker.pop("bytes/received", None)
    return wait_for(lambda: collector.broker.get("bytes/received"), 10)  # type: ignore[no-any-return]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def run(folder: Path) -> dict[str, Any]:
    """A thousand devices, ten of their minutes."""
    return measure(folder, n=1000, n_processes=4, minutes=10, minute_s=6.0)


def failures(result: dict[str, Any]) -> list[str]:
    """What must not be."""
    return [f"{result['finals_lost']} finals were lost"] if result["finals_lost"] else []

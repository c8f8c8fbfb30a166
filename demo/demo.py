"""The agent at work on recorded speech, in real time, and what it publishes: `make demo`.

Starts an embedded MQTT broker and the agent, subscribes to all that the agent says, and ends when the clips have ended.
"""

from __future__ import annotations

import json
import os
import queue
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iotcore import Broker
from paho.mqtt.client import Client, MQTTMessage
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from rich.console import Console
from rich.live import Live
from rich.text import Text

SPEECH = Path(__file__).parent / "speech"
CLIPS = ("1272-128104-0000", "1089-134691-0001", "61-70968-0000", "2412-153948-0000")
DEVICE = "demo"
ROOT = f"whisperlet/{DEVICE}/"
TIMEOUT_S = 150.0  # the clips take 36 s; the rest is for a slow machine's first packing of the weights
POLL_S = 0.1
GOODBYE_S = 2.0  # what was published may arrive after the agent has ended

AGENT_CONFIG = f"""
[mqtt]
device = "{DEVICE}"
[outbox]
durable = false
[telemetry]
interval_s = 5
"""
# rumqttd: an MQTT 5 listener on the loopback
BROKER_CONFIG = """
id = 0
[router]
id = 0
max_connections = 10
max_outgoing_packet_count = 200
max_segment_size = 1048576
max_segment_count = 10
[v5.1]
name = "loopback"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 5000
max_payload_size = 20480
max_inflight_count = 100
"""

Message = tuple[str, dict[str, Any]]  # topic below ROOT, payload


class Screen:
    """Messages as lines; on a terminal the partial is one grey line that keeps changing."""

    def __init__(self, live: Live) -> None:
        self.live = live
        self.texts: list[str] = []  # of the finals

    def show(self, topic: str, payload: dict[str, Any]) -> None:
        """Show a message."""
        line = Text.assemble((f"{ROOT + topic:<36}", "cyan"), described(topic, payload), overflow="fold")
        is_partial = topic == "transcript/partial"
        if is_partial and self.live.console.is_terminal:
            self.live.update(line)
            return
        if topic == "transcript/final":
            self.live.update("")
            self.texts.append(payload["text"])
        self.live.console.print(line, soft_wrap=not self.live.console.is_terminal)


def described(topic: str, payload: dict[str, Any]) -> Text:
    """Payload, in short."""
    match topic:
        case "transcript/partial":
            return Text(payload["text"], "bright_black")
        case "transcript/final":
            waited = f"  [{payload['end_to_final_ms']:.0f} ms after the last word]"
            return Text.assemble((payload["text"] or f"({payload['rejected']})", "bold"), (waited, "green"))
        case "telemetry":
            return Text(measured(payload), "magenta")
        case "status":
            return Text(f"{payload['state']}: {payload['reason']}", "yellow")
        case "info":
            versions = payload["versions"]
            return Text(f"{payload['bundle']['name']} on {versions['runtime']}, Python {versions['python']}", "yellow")
        case _:
            return Text(json.dumps(payload), "red")


def measured(telemetry: dict[str, Any]) -> str:
    """Telemetry as a row of a table."""
    factor, latency = telemetry["real_time_factor"], telemetry["end_to_final_ms"]["p50"]
    energy = telemetry["energy"]
    return " | ".join((
        f"cpu {telemetry['cpu_percent']:5.1f} %",
        f"{telemetry['resident_bytes'] / 2**20:4.0f} MiB",
        f"real-time factor {'   -' if factor is None else f'{factor:4.2f}'}",
        f"latency {'   -' if latency is None else f'{latency:4.0f}'} ms",
        f"waiting {telemetry['queues']['outbox_messages']}",
        f"{energy['joules']:.0f} J" if energy and energy["joules"] is not None else "no power meter",
    ))  # fmt: skip


@contextmanager
def subscribed(port: int) -> Iterator[queue.Queue[Message]]:
    """What arrives below ROOT."""
    messages: queue.Queue[Message] = queue.Queue()
    client = Client(CallbackAPIVersion.VERSION2, "listener", protocol=MQTTProtocolVersion.MQTTv5)

    def on_connect(client: Client, *_: object) -> None:
        client.subscribe(ROOT + "#", qos=1)

    def on_message(_client: Client, _userdata: object, message: MQTTMessage) -> None:
        messages.put((message.topic.removeprefix(ROOT), json.loads(message.payload)))

    client.on_connect, client.on_message = on_connect, on_message
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        yield messages
    finally:
        client.disconnect()
        client.loop_stop()


def folder_of_clips(folder: Path) -> Path:
    """Make a folder with links to the clips, in the order of CLIPS."""
    folder.mkdir()
    for number, name in enumerate(CLIPS):
        (folder / f"{number}.flac").symlink_to(SPEECH / f"{name}.flac")
    return folder


@contextmanager
def agent(bundle: Path, port: int, work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run the agent on the clips; it is ended if it has not ended by itself."""
    config = work / "agent.toml"
    config.write_text(AGENT_CONFIG, encoding="utf-8")
    command: list[str | Path] = [
        sys.executable,
        "-m",
        "agent",
        "run",
        "--source",
        folder_of_clips(work / "clips"),
        "--pace",
    ]
    command += ["--bundle", bundle, "--broker", f"mqtt://127.0.0.1:{port}", "--config", config]
    process = subprocess.Popen(command, env={"WHISPERLET_LOG": "WARNING", **os.environ})
    try:
        yield process
    finally:
        process.terminate()
        process.wait()


@contextmanager
def broker(work: Path) -> Iterator[int]:
    """Run an MQTT 5 broker; gives its port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    config = work / "broker.toml"
    config.write_text(BROKER_CONFIG.format(port=port), encoding="utf-8")
    with Broker(config_path=str(config)):
        yield port


def watch(process: subprocess.Popen[bytes], messages: queue.Queue[Message], screen: Screen) -> None:
    """Show messages until the agent has ended and its last one is there, or it takes too long."""
    until_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < until_s:
        if process.poll() is not None:
            until_s = min(until_s, time.monotonic() + GOODBYE_S)
        try:
            topic, payload = messages.get(timeout=POLL_S)
        except queue.Empty:
            continue
        screen.show(topic, payload)
        if topic == "status" and payload["reason"] == "stopped":
            return


def main(bundle: Path) -> int:
    """Run the demo; returns the exit code."""
    console = Console()
    console.print(f"{len(CLIPS)} recorded clips, played in real time to the agent; this is what it publishes:")
    with (
        tempfile.TemporaryDirectory() as folder,
        broker(work := Path(folder)) as port,
        subscribed(port) as messages,
        agent(bundle, port, work) as process,
        Live("", console=console, transient=True) as live,
    ):
        screen = Screen(live)
        watch(process, messages, screen)
        code = process.wait(GOODBYE_S)
    n_heard = sum(bool(text) for text in screen.texts)
    console.print(f"{n_heard} finals with text from {len(CLIPS)} clips; the agent ended with {code}")
    return int(code != 0 or n_heard < len(CLIPS))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""A real Mosquitto on a loopback port, to be killed and started again, and a subscriber that remembers."""

import contextlib
import random
import shutil
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path

import msgspec
import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

MOSQUITTO = shutil.which("mosquitto", path="/usr/sbin:/usr/local/sbin:/usr/bin:/opt/homebrew/sbin")
needs_mosquitto = pytest.mark.skipif(MOSQUITTO is None, reason="mosquitto is not installed")


def wait_for(condition, timeout_s=8.0):
    """Poll until the condition holds; returns what it said."""
    until = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
    return found


def free_port():
    """One that no outgoing connection gets while its broker is down: those begin at 32768 on Linux, 49152 elsewhere."""
    for port in random.sample(range(10_000, 32_768), 100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("none of 100 ports of the loopback interface can be bound")


class Broker:
    """Mosquitto; `options` are lines of its configuration."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self._folder = folder
        self._process = None

    def start(self, options="allow_anonymous true", *, persistent=False):
        config = self._folder / "mosquitto.conf"
        kept = f"persistence true\npersistence_location {self._folder}/" if persistent else "persistence false"
        config.write_text(f"listener {self.port} 127.0.0.1\n{kept}\nset_tcp_nodelay true\nuser root\n{options}\n")
        self._process = subprocess.Popen(
            [MOSQUITTO, "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_for(self._answers)

    def _answers(self):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def kill(self):
        self._end(signal.SIGKILL)

    def stop(self):
        """End it as its service manager does: it writes down what it keeps."""
        self._end(signal.SIGTERM)

    def _end(self, number):
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None


class TakeoverBroker:
    """Accepts every client and tells it at once that another one has taken its session over."""

    CONNACK = bytes.fromhex("20 03 00 00 00")
    DISCONNECT = bytes.fromhex("e0 02 8e 00")

    def __init__(self):
        self.n_connects = 0
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = self._server.getsockname()[1]
        self._thread = threading.Thread(target=self._serve)

    def _serve(self):
        while True:
            connection, _ = self._server.accept()
            with connection:
                if not connection.recv(4096):
                    return
                self.n_connects += 1
                connection.sendall(self.CONNACK)
                connection.recv(4096)
                connection.sendall(self.DISCONNECT)
                while connection.recv(4096):
                    pass

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        socket.create_connection(("127.0.0.1", self.port)).close()
        self._thread.join()
        self._server.close()


class Connected:
    """Has a client with a thread of its own, until the end of a `with`."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._client.disconnect()
        self._client.loop_stop()
        self._client._reset_sockets()


class Subscriber(Connected):
    """Everything below whisperlet/, in the order of arrival."""

    def __init__(self, port):
        self.messages = []  # (topic, decoded payload, qos, retained)
        self._subscribed = False
        self._client = Client(CallbackAPIVersion.VERSION2, "listener", protocol=MQTTProtocolVersion.MQTTv5)
        self._client.on_connect = lambda client, *_: client.subscribe("whisperlet/#", qos=2)
        self._client.on_subscribe = lambda *_: setattr(self, "_subscribed", True)
        self._client.on_message = self._on_message
        self._client.reconnect_delay_set(0.05, 0.05)
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        wait_for(lambda: self._subscribed)

    def _on_message(self, _client, _userdata, message):
        body = msgspec.json.decode(message.payload or b"null")
        self.messages.append((message.topic, body, message.qos, message.retain))

    def on(self, topic):
        """Payloads that came on a topic below the device's."""
        return [body for name, body, *_ in list(self.messages) if name.split("/", 2)[2] == topic]

"""A password is seen by nobody: not in the process list, not in the environment, not in the log. And the exit code."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from asking import Operator
from brokers import Broker, Subscriber, needs_mosquitto, wait_for

from agent.controls import RESTART_STATUS

SECRET = "Rhabarber-7"


@pytest.fixture
def broker(tmp_path):
    (tmp_path / "users").write_text("")
    subprocess.run(["mosquitto_passwd", "-b", tmp_path / "users", "dev", SECRET], check=True)
    broker = Broker(tmp_path)
    broker.start(f"allow_anonymous true\npassword_file {tmp_path / 'users'}")
    yield broker
    broker.kill()


def start(broker, bundle, folder, where):
    """An agent that waits for audio on its standard input, with a password from `where`."""
    state, credentials = folder / "state", folder / "credentials"
    credentials.mkdir()
    environment = {**os.environ, "WHISPERLET_LOG": "DEBUG", "STATE_DIRECTORY": str(state)}
    settings = f'[mqtt]\nurl = "mqtt://127.0.0.1:{broker.port}"\ndevice = "dev"\nusername = "dev"\n'
    if where == "file":
        (folder / "password").write_text(SECRET + "\n")
        settings += f'password_file = "{folder / "password"}"\n'
    else:
        (credentials / "mqtt-password").write_text(SECRET + "\n")
        environment["CREDENTIALS_DIRECTORY"] = str(credentials)
    (folder / "agent.toml").write_text(settings)
    command = [sys.executable, "-m", "agent", "run", "--config", folder / "agent.toml", "--bundle", bundle.path]
    log = (folder / "log").open("wb")
    with log:
        return subprocess.Popen(
            [*map(str, command), "--source", "-"], env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log
        )


def public(process):
    """What anybody, or anybody of the same user, can see of a process."""
    return b"".join(Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))


@needs_mosquitto
@pytest.mark.bundle
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="there is no /proc")
@pytest.mark.parametrize("where", ["file", "credential"])
def test_nobody_sees_the_password_and_a_restart_has_its_exit_code(broker, real_bundle, tmp_path, where):
    agent = start(broker, real_bundle, tmp_path, where)
    try:
        with Subscriber(broker.port) as heard, Operator(broker.port) as operator:
            wait_for(lambda: heard.on("status"), 60)
            parent = psutil.Process(agent.pid)
            wait_for(parent.children)  # the engine
            processes = [parent, *parent.children(recursive=True)]
            assert not any(SECRET.encode() in public(process) for process in processes)
            found = operator.ask("dev", "diagnostics")
            assert found["data"]["config"]["mqtt"]["username"] == "dev"
            assert SECRET not in str(found)
            assert operator.ask("dev", "restart")["outcome"] == "ok"
            assert agent.wait(60) == RESTART_STATUS
            assert SECRET not in str(heard.messages)
    finally:
        agent.kill()
        agent.wait()
        agent.stdin.close()
    log = (tmp_path / "log").read_text()
    assert "connected to the MQTT broker" in log
    assert SECRET not in log

"""The whole agent as a process: real bundle, real broker, real speech."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import soundfile
from brokers import Broker, Subscriber, needs_mosquitto, wait_for

from whisperlet.audio import SAMPLE_RATE

pytestmark = [pytest.mark.bundle, needs_mosquitto]
DEVICE = "kiosk"


@pytest.fixture
def broker(tmp_path):
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture
def run(real_bundle, broker, tmp_path):
    agents = []
    config = tmp_path / "agent.toml"
    config.write_text(f'[mqtt]\ndevice = "{DEVICE}"\nwill_delay_s = 0\n[telemetry]\ninterval_s = 2\n')

    def start(source, *options):
        command = [sys.executable, "-m", "agent", "run", "--config", str(config), "--bundle", str(real_bundle.path)]
        where = ["--source", str(source), "--broker", f"mqtt://127.0.0.1:{broker.port}"]
        agents.append(subprocess.Popen([*command, *where, *options], stdin=subprocess.DEVNULL))
        return agents[-1]

    yield start
    for agent in agents:
        agent.kill()
        agent.wait()


def named(clips, stem):
    return next(path for path in clips if path.stem == stem)


def test_words_arrive_while_and_after_they_are_spoken(run, broker, clips):
    with Subscriber(broker.port) as heard:
        agent = run(named(clips, "61-70968-0000"), "--pace")
        assert agent.wait(60) == 0
        wait_for(lambda: [status["state"] for status in heard.on("status")] == ["online", "offline"])
        finals, partials, telemetry = (
            heard.on("transcript/final"),
            heard.on("transcript/partial"),
            heard.on("telemetry"),
        )
    assert heard.on("status")[-1]["reason"] == "stopped"
    assert heard.on("info")[0]["bundle"]["name"] == "base_wi8"
    assert [final["text"] for final in finals] == [
        "He began a confused complaint against the wizard who had vanished behind the curtain on the left."
    ]
    assert len(partials) >= 3
    assert partials[0]["revision"] < finals[0]["revision"]
    assert finals[0]["text"].startswith(partials[-1]["text"][: partials[-1]["stable_chars"]])
    assert finals[0]["finalise_ms"] < finals[0]["end_to_final_ms"]
    assert telemetry[-1]["counters"]["finals"] == 1
    assert telemetry[-1]["counters"]["dropped_samples"] == 0


def test_an_engine_killed_in_the_middle_costs_no_word(run, broker, clips):
    with Subscriber(broker.port) as heard:
        agent = run(named(clips, "1995-1837-0001"), "--pace")
        wait_for(lambda: len(heard.on("transcript/partial")) >= 3, 40)
        engine = next(c for c in psutil.Process(agent.pid).children() if "agent.worker" in c.cmdline())
        os.kill(engine.pid, signal.SIGKILL)
        assert agent.wait(60) == 0
        final = wait_for(lambda: heard.on("transcript/final"))[0]
        assert "engine_restarted" in [event["name"] for event in heard.on("event")]
    assert final["text"].startswith("It was the first great sorrow of his life")
    assert "the dreams" in final["text"]


def test_a_broker_that_comes_late_gets_every_final(run, broker, clips):
    broker.kill()
    agent = run(named(clips, "1089-134691-0000"), "--pace")
    time.sleep(3)
    broker.start()
    with Subscriber(broker.port) as heard:
        assert agent.wait(60) == 0
        assert wait_for(lambda: heard.on("transcript/final"))[0]["text"] == "He could wait no longer."


def test_a_signal_ends_it_in_good_order(run, broker, clips):
    with Subscriber(broker.port) as heard:
        agent = run(clips[0].parent, "--pace")
        wait_for(lambda: heard.on("transcript/partial"), 40)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == 0
        wait_for(lambda: heard.on("status")[-1]["reason"] == "stopped")
        assert heard.on("transcript/final"), "what had been said by then was lost"


@pytest.mark.parametrize("kind", ["silence", "hiss", "hum"])
def test_no_words_without_speech(run, broker, tmp_path, kind):
    random = np.random.default_rng(1)
    t = np.arange(8 * SAMPLE_RATE) / SAMPLE_RATE
    audio = {"silence": 0 * t, "hiss": 0.1 * random.standard_normal(len(t)), "hum": 0.3 * np.sin(314 * t)}[kind]
    folder = tmp_path / "noise"
    folder.mkdir()
    soundfile.write(folder / "noise.wav", audio, SAMPLE_RATE)
    with Subscriber(broker.port) as heard:
        assert run(folder).wait(60) == 0
        wait_for(lambda: len(heard.on("status")) == 2)
    assert [final["text"] for final in heard.on("transcript/final") if final["text"]] == []

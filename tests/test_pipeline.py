"""The whole agent: as a process with real bundle, broker and speech; in this process with a stub of an engine."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import msgspec
import numpy as np
import psutil
import pytest
import soundfile
import toy
from brokers import Subscriber, needs_mosquitto, wait_for
from ears import workers
from test_power import tree
from test_worker_process import replace_engine

from agent import pipeline as pipelines
from agent.audio_files import read_file
from agent.config import (
    Config,
    LogConfig,
    MqttConfig,
    PowerConfig,
    RecogniserConfig,
    SourceConfig,
    TelemetryConfig,
    ThermalConfig,
)
from agent.messages import AudioChunk, Thrift, Transcript
from agent.pipeline import Pipeline
from agent.reopening import ReopeningMicrophone
from agent.sources import SourceCounters, paced
from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import AudioDeviceLost, AudioError, BundleError

pytestmark = needs_mosquitto
DEVICE = "kiosk"


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


@pytest.mark.bundle
def test_words_arrive_while_and_after_they_are_spoken(run, broker, clips):
    with Subscriber(broker.port) as heard:
        agent = run(named(clips, "61-70968-0000"), "--pace")
        assert agent.wait(60) == 0
        states = wait_for(lambda: [s["state"] for s in heard.on("status")][-1:] == ["offline"] and heard.on("status"))
        # A slow engine is told in a status of its own, with the microphone as before.
        microphone = [state["condition"] and state["condition"]["microphone"] for state in states]
        assert [m for m, _ in itertools.groupby(microphone)] == ["starting", "listening", None]
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
    for partial, later in itertools.pairwise(partials):  # the final, which hears all, may still correct stable text
        assert later["text"].startswith(partial["text"][: partial["stable_chars"]])
    assert finals[0]["finalise_ms"] < finals[0]["end_to_final_ms"]
    assert telemetry[-1]["counters"]["finals"] == 1
    assert telemetry[-1]["counters"]["dropped_samples"] == 0


@pytest.mark.bundle
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


@pytest.mark.bundle
def test_a_broker_that_comes_late_gets_every_final(run, broker, clips):
    broker.kill()
    agent = run(named(clips, "1089-134691-0000"), "--pace")
    time.sleep(3)
    broker.start()
    with Subscriber(broker.port) as heard:
        assert agent.wait(60) == 0
        assert wait_for(lambda: heard.on("transcript/final"))[0]["text"] == "He could wait no longer."


@pytest.mark.bundle
def test_a_signal_ends_it_in_good_order(run, broker, clips):
    with Subscriber(broker.port) as heard:
        agent = run(clips[0].parent, "--pace")
        wait_for(lambda: heard.on("transcript/partial"), 40)
        agent.send_signal(signal.SIGTERM)
        assert agent.wait(30) == 0
        wait_for(lambda: heard.on("status")[-1]["reason"] == "stopped")
        assert heard.on("transcript/final"), "what had been said by then was lost"


@pytest.mark.bundle
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
        wait_for(lambda: heard.on("status")[-1]["state"] == "offline")
    assert [final["text"] for final in heard.on("transcript/final") if final["text"]] == []


class Talk:
    """A clip again and again, until it is closed or fails."""

    def __init__(self, clip):
        self.counters = SourceCounters()
        self.fails = False
        self._pcm = read_file(clip)
        self._closed = threading.Event()

    def __iter__(self):
        start = 0
        while not self._closed.is_set():
            for samples in np.array_split(self._pcm, len(self._pcm) // 320):
                yield AudioChunk(samples, start, time.monotonic())
                start += len(samples)
                if self.fails:
                    raise AudioError("the microphone is on fire")
                if self._closed.is_set():
                    return

    def close(self):
        self._closed.set()


@pytest.fixture
def make(monkeypatch, tmp_path, broker, clips):
    """A pipeline with a stub of an engine, told what to do by files in `tmp_path`."""
    replace_engine(monkeypatch, tmp_path)
    monkeypatch.setattr(pipelines, "DRAIN_S", 0.5)
    bundle = SimpleNamespace(path=tmp_path / "no.tflite", manifest=toy.make_manifest(), sha256="0" * 64)
    plain = Config(
        mqtt=MqttConfig(url=f"mqtt://127.0.0.1:{broker.port}", device=DEVICE),
        telemetry=TelemetryConfig(interval_s=0.1),
        recogniser=RecogniserConfig(reply_timeout_s=60),
    )
    made = []

    def make(source=lambda *_: paced(Talk(named(clips, "1995-1837-0001"))), **changes):
        config = msgspec.structs.replace(plain, **changes)
        made.append(Pipeline(config, bundle, source, tmp_path))
        return made[-1]

    yield make
    for pipeline in made:  # if the test did not
        getattr(pipeline.source, "_source", pipeline.source).close()


def started(pipeline):
    """Run it in a thread; what it raised, as a list."""
    raised = []

    def run():
        try:
            pipeline.run(realtime=True)
        except (AudioError, BundleError) as error:
            raised.append(error)

    thread = threading.Thread(target=run, name="ear")
    thread.start()
    return thread, raised


STOP_S = 15.0  # at most; an engine that hangs would be waited for for longer


@pytest.mark.parametrize("state", ["hearing", "hung", "dead", "refusing", "failing", "no broker"])
def test_it_starts_and_stops_again_and_again_and_leaves_nothing(make, broker, tmp_path, state):
    before = set(threading.enumerate())
    for _ in range(3):
        pipeline = make()
        if state == "refusing":
            (tmp_path / "refuse").touch()
        if state == "no broker":
            broker.kill()
        thread, raised = started(pipeline)
        if state != "refusing":
            wait_for(lambda p=pipeline: p.telemetry.counters.partials, 30)
        if state == "hung":
            os.kill(pipeline.supervisor.pid, signal.SIGSTOP)
        if state == "dead":
            (tmp_path / "refuse").touch()
            os.kill(pipeline.supervisor.pid, signal.SIGKILL)
            wait_for(lambda p=pipeline: p.supervisor.pid is None)
        pipeline.source._source.fails = state == "failing"
        if state not in {"refusing", "failing"}:
            pipeline.stop()
        thread.join(STOP_S)
        assert not thread.is_alive()
        assert set(threading.enumerate()) == before
        assert not workers()
        assert [type(error) for error in raised] == {"refusing": [BundleError], "failing": [AudioError]}.get(state, [])
        (tmp_path / "refuse").unlink(missing_ok=True)


def test_a_stage_that_cannot_be_stopped_does_not_keep_the_others_running(make, monkeypatch):
    before = set(threading.enumerate())
    pipeline = make()
    thread, raised = started(pipeline)
    wait_for(lambda: pipeline.telemetry.counters.partials)

    def close(plain=pipeline.source.close):
        plain()
        raise AudioError("it is stuck")

    monkeypatch.setattr(pipeline.source, "close", close)
    pipeline.source._source.close()
    thread.join(STOP_S)
    assert set(threading.enumerate()) == before
    assert [str(error) for error in raised] == ["it is stuck"]


def test_a_report_that_fails_is_counted_and_the_next_one_comes(make, broker, monkeypatch, caplog):
    pipeline = make()
    beats = []
    monkeypatch.setattr(
        pipeline.vitals.notifier, "watchdog", lambda: beats.append(pipeline.telemetry.counters.failed_reports)
    )

    def failing(*args, plain=pipeline.telemetry.snapshot, **more):
        if pipeline.telemetry.counters.failed_reports < 2:
            raise OSError("no such sensor")
        return plain(*args, **more)

    monkeypatch.setattr(pipeline.telemetry, "snapshot", failing)
    with Subscriber(broker.port) as heard:
        thread, _ = started(pipeline)
        reports = wait_for(lambda: heard.on("telemetry"))
        pipeline.stop()
        thread.join(STOP_S)
    assert reports[0]["counters"]["failed_reports"] == 2
    assert {0, 1, 2} <= set(beats)
    assert "no such sensor" in caplog.text


def test_a_hot_device_says_so_and_does_without(make, broker, tmp_path, monkeypatch):
    zone = tree(tmp_path / "sys/class/thermal/thermal_zone0", temp=95_000)
    tree(tmp_path / "sys/class/hwmon/hwmon0", name="ina226", power1_input=4_000_000)
    pipeline = make(
        power=PowerConfig(sysfs_dir=str(tmp_path / "sys")),
        thermal=ThermalConfig(rise_s=0.0, dwell_s=1.0),
        telemetry=TelemetryConfig(interval_s=1.0, sample_s=0.1),
    )
    with Subscriber(broker.port) as heard:
        thread, _ = started(pipeline)
        wait_for(lambda: pipeline.monitor.thrift is Thrift.FINALS_ONLY, 30)
        wait_for(lambda: pipeline.supervisor.hop_ms is None, 30)
        assert pipeline.gate.is_strict
        hot = wait_for(
            lambda: [report for report in heard.on("telemetry") if report["heat"]["thrift"] == "finals_only"]
        )
        tree(zone, temp=40_000)
        wait_for(lambda: pipeline.supervisor.thrift is Thrift.NORMAL, 30)
        assert not pipeline.gate.is_strict
        pipeline.stop()
        thread.join(STOP_S)
        details = [event["detail"] for event in heard.on("event") if event["name"] == "thermal_level"]
    assert [detail.partition(":")[0] for detail in details] == [
        *("longer_hop", "no_partials", "finals_only"),
        *("no_partials", "longer_hop", "normal"),
    ]
    assert hot[0]["energy"]["quality"] == "measured_rail"
    assert hot[-1]["otel"]["hw.power"] == pytest.approx(4.0)


def test_telemetry_tells_what_the_stages_counted(make):
    pipeline = make()
    engine, gate, source = pipeline.supervisor, pipeline.gate, pipeline.source
    counters = engine.counters
    counters.restarts, counters.skipped_partials, counters.dropped_segments, counters.failed_segments = 1, 2, 3, 4
    gate.n_rejected, source.counters.dropped_samples, source.counters.overflows = 5, 6, 7
    source.counters.faults = 8
    published = []
    pipeline._publish = published.append
    for hop_ms in (600.0, None):
        engine.hop_ms = hop_ms
        pipeline._publish_telemetry()
    found = published[0].counters
    assert (found.engine_restarts, found.skipped_partials, found.dropped_segments, found.failed_segments) == (
        1,
        2,
        3,
        4,
    )
    assert (found.rejected_segments, found.dropped_samples, found.source_overflows) == (5, 6, 7)
    assert found.source_faults == 8
    assert [report.hop_ms for report in published] == [600.0, None]
    pipeline.publisher.stop(0)


@pytest.mark.parametrize("transcripts", [False, True])
def test_what_was_said_is_in_the_log_only_if_that_is_wanted(make, caplog, transcripts):
    pipeline = make()
    pipeline.config = msgspec.structs.replace(pipeline.config, log=LogConfig(level="debug", transcripts=transcripts))
    caplog.set_level("DEBUG")
    said = "my number is five"
    pipeline._on_transcript(Transcript(1, 0, 1, said, 0, 0, 1600, is_final=False, language="en"))
    pipeline._on_transcript(Transcript(1, 0, 2, said, 0, 0, 1600, is_final=True, language="en"))
    assert caplog.text.count(said) == transcripts
    assert pipeline.outbox.depth == 1
    pipeline.publisher.stop(0)


class Systemd:
    """The socket on which a service says how it is."""

    def __init__(self, folder, monkeypatch, watchdog_s):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(folder / "notify"))
        self._socket.setblocking(False)
        self.heard = []
        monkeypatch.setenv("NOTIFY_SOCKET", str(folder / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", str(round(watchdog_s * 1e6)))

    def listen(self):
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self._socket.recv(1000).decode())
        return self.heard

    def count(self, message):
        return self.listen().count(message)

    def close(self):
        self._socket.close()


@pytest.fixture
def systemd(tmp_path, monkeypatch):
    systemd = Systemd(tmp_path, monkeypatch, watchdog_s=0.8)
    yield systemd
    systemd.close()


def without_microphone(_config, _counters):
    raise AudioDeviceLost("there is none")


def test_neither_microphone_nor_broker_and_yet_alive(make, broker, systemd):
    """Nothing for systemd to restart: every loop goes on, and says so."""
    broker.kill()
    config = SourceConfig(retry_s=0.1, retry_max_s=0.3)
    pipeline = make(
        lambda on_event, beat: ReopeningMicrophone(
            config, on_event, beat=beat, must_exist=False, open_microphone=without_microphone
        )
    )
    pipeline.vitals.heartbeat._slack_s = 1.0
    thread, raised = started(pipeline)
    wait_for(lambda: systemd.count("READY=1"), 30)
    wait_for(lambda: any("microphone lost; broker away" in line for line in systemd.listen()))
    n_fed = systemd.count("WATCHDOG=1")
    wait_for(lambda: systemd.count("WATCHDOG=1") > n_fed + 15, 30)
    assert pipeline.vitals.heartbeat.stale() == []
    assert {"ear", "engine", "monitor", "outbox", "publisher"} <= set(pipeline.vitals.heartbeat._due_s)
    pipeline.stop()
    thread.join(STOP_S)
    assert not thread.is_alive()
    assert raised == []
    assert systemd.count("STOPPING=1") == 1


def test_an_ear_that_is_stuck_is_not_held_for_alive(make, systemd, monkeypatch):
    pipeline = make()
    pipeline.vitals.heartbeat._slack_s = 0.5
    monkeypatch.setattr(pipelines, "EAR_S", 0.5)
    may_go_on = threading.Event()

    def stuck(_chunk):
        may_go_on.wait(60)
        return []

    thread, _ = started(pipeline)
    wait_for(lambda: systemd.count("WATCHDOG=1"), 30)
    monkeypatch.setattr(pipeline.gate, "feed", stuck)
    wait_for(lambda: any("stuck: ear" in line for line in systemd.listen()), 30)
    n_fed = systemd.count("WATCHDOG=1")
    time.sleep(1.5)  # in which it would have been fed seven times
    assert systemd.count("WATCHDOG=1") == n_fed
    may_go_on.set()
    wait_for(lambda: systemd.count("WATCHDOG=1") > n_fed, 30)
    pipeline.stop()
    thread.join(STOP_S)

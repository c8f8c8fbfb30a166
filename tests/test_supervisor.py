"""The engine process and its supervisor: whatever happens to the engine, every segment gets its final, once."""

import os
import signal
import threading
import time

import numpy as np
import pytest
from brokers import wait_for
from ears import NOISE, Ear, checksum, heard, is_gone, links, workers
from test_worker_process import replace_engine

from agent import engine_process
from agent import supervisor as supervisors
from agent.messages import Thrift
from agent.supervisor import EngineLost
from whisperlet.errors import BundleError


@pytest.fixture
def start(weight_caches):
    ears = []

    def make(bundle, **config):
        ears.append(Ear(bundle, weight_caches, **config))
        ears[-1].engine.start()
        return ears[-1]

    yield make
    for ear in ears:
        ear.engine.stop()


@pytest.fixture
def stub(monkeypatch, tmp_path):
    """A folder in which files tell the stub what to do."""
    replace_engine(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def ear(start, stub):
    return start(stub / "no.tflite", reply_timeout_s=10)


def test_finals_of_all_that_was_said(ear):
    for utterance in range(1, 6):
        ear.say(NOISE[: 1000 * utterance], utterance, pieces=utterance)
    ear.hear_all()
    assert list(ear.finals) == [(n, 0) for n in range(1, 6)]
    for (utterance, _), final in ear.finals.items():
        assert heard(final)[:2] == checksum(NOISE[: 1000 * utterance])
    assert ear.engine.counters.speech_s == pytest.approx(15_000 / 16_000)
    assert ear.engine.counters.utterances == 5
    assert ear.engine.counters.busy_s >= 0
    assert (ear.engine.backlog, ear.engine.backlog_s, ear.events) == (0, 0, [])


def test_a_hot_device_makes_no_partials_and_does_not_blame_the_engine(ear):
    ear.engine.thrift = Thrift.NO_PARTIALS
    ear.say(NOISE[:3000], pieces=3)
    ear.hear_all()
    assert [transcript.is_final for transcript in ear.transcripts] == [True]
    assert ear.engine.hop_ms is None
    assert ear.events == []


def test_speech_that_waits_is_joined(ear, stub):
    (stub / "wait 1").touch()
    ear.say(NOISE[:100], ends=False)
    wait_for(lambda: not supervisors._unsent(ear.engine._pending[1, 0]))
    ear.say(NOISE[100:20_000], first=100, pieces=50)
    ear.say(NOISE[:500], utterance=2, pieces=5)
    assert ear.engine.backlog == 2
    assert ear.engine.backlog_s == pytest.approx(20_500 / 16_000)
    (stub / "wait 1").unlink()
    ear.hear_all()
    assert heard(ear.finals[1, 0]) == [*checksum(NOISE[:20_000]), 2]
    assert heard(ear.finals[2, 0]) == [*checksum(NOISE[:500]), 1]


def test_an_engine_killed_in_the_middle_of_an_utterance(ear):
    ear.say(NOISE[:3000], pieces=3, ends=False)
    wait_for(lambda: ear.transcripts)
    before = ear.engine.pid
    os.kill(before, signal.SIGKILL)
    ear.say(NOISE[3000:9000], first=3000, pieces=3)
    ear.hear_all()
    assert [heard(final)[:2] for final in ear.finals.values()] == [checksum(NOISE[:9000])]
    assert ear.events == [("engine_restarted", f"it ended with status {-signal.SIGKILL}")]
    assert ear.engine.counters.restarts == 1
    assert ear.engine.pid != before
    assert is_gone(before)


@pytest.mark.parametrize("n", [1600, 448_000])  # the second does not fit into the socket's buffer
def test_an_engine_that_hangs_is_replaced(start, stub, n):
    ear = start(stub / "no.tflite", reply_timeout_s=1)
    before = ear.engine.pid
    os.kill(before, signal.SIGSTOP)
    ear.say(NOISE[:n])
    ear.hear_all()
    assert heard(ear.finals[1, 0])[:2] == checksum(NOISE[:n])
    assert ear.events == [("engine_restarted", "no answer within 1 s")]
    assert is_gone(before)


def test_a_segment_that_kills_every_engine_is_given_up_and_no_other(ear, stub):
    (stub / "wait 1").touch()
    (stub / "poison 2").touch()
    for utterance in (1, 2, 3):
        ear.say(NOISE[:1000], utterance)
    (stub / "wait 1").unlink()
    ear.hear_all()
    assert {key: final.rejected for key, final in ear.finals.items()} == {
        (1, 0): None,
        (2, 0): "engine_failed",
        (3, 0): None,
    }
    failed = ear.finals[2, 0]
    assert (failed.text, failed.start, failed.end, failed.continues) == ("", 0, 1000, False)
    assert ear.engine.counters.failed_segments == 1
    assert ear.engine.counters.restarts == supervisors.MAX_ATTEMPTS
    assert {name for name, _ in ear.events} == {"engine_restarted"}
    ear.say(NOISE[:1000], 4)
    ear.hear_all()
    assert heard(ear.finals[4, 0])[:2] == checksum(NOISE[:1000])


def test_poison_in_an_utterance_that_goes_on(ear, stub):
    """It is given up when its end is known, so that its final says where that was."""
    (stub / "poison 1").touch()
    ear.say(NOISE[:1000], ends=False)
    wait_for(lambda: ear.engine.counters.restarts > supervisors.MAX_ATTEMPTS)
    assert not ear.finals
    ear.say(NOISE[1000:2000], first=1000)
    ear.hear_all()
    assert (ear.finals[1, 0].rejected, ear.finals[1, 0].end) == ("engine_failed", 2000)


def test_too_much_speech_for_a_stuck_engine(start, stub):
    ear = start(stub / "no.tflite", max_backlog_s=30)
    (stub / "wait 1").touch()
    for utterance in range(1, 6):
        ear.say(NOISE[:160_000], utterance, pieces=4)
        assert ear.engine.backlog_s <= 30
    assert ear.engine.backlog == 3
    assert ear.engine.counters.dropped_segments == 2
    assert ear.events == [("speech_dropped", f"utterance {n} segment 0: the engine is too far behind") for n in (1, 2)]
    (stub / "wait 1").unlink()
    ear.hear_all()
    for utterance in (3, 4, 5):
        assert heard(ear.finals[utterance, 0])[:2] == checksum(NOISE[:160_000])
    assert (2, 0) not in ear.finals


def test_no_final_comes_after_a_segment_was_dropped(start, stub):
    """Its audio was with the engine already when there was too much of it."""
    ear = start(stub / "no.tflite", max_backlog_s=30)
    (stub / "wait 1").touch()
    ear.say(NOISE[:160_000], 1)
    wait_for(lambda: not supervisors._unsent(ear.engine._pending[1, 0]))
    for utterance in (2, 3, 4):
        ear.say(NOISE[:160_000], utterance)
    assert [name for name, _ in ear.events] == ["speech_dropped"]
    (stub / "wait 1").unlink()
    ear.hear_all()
    assert list(ear.finals) == [(2, 0), (3, 0), (4, 0)]
    assert ear.engine.counters.speech_s == 30


def test_a_segment_whose_final_is_there_is_not_dropped(start, stub):
    """Nor does it take room: what comes while its final is handed on may stay."""
    ear = start(stub / "no.tflite", max_backlog_s=30)
    is_busy, may_go_on = threading.Event(), threading.Event()

    def hand_on(transcript):
        ear.transcripts.append(transcript)
        is_busy.set()
        may_go_on.wait(10)

    ear.engine._on_transcript = hand_on
    ear.say(NOISE[:160_000], 1)
    assert is_busy.wait(10)
    for utterance in (2, 3, 4):
        ear.say(NOISE[:160_000], utterance)
    assert ear.events == []
    ear.say(NOISE[:160_000], 5)
    may_go_on.set()
    ear.hear_all()
    assert list(ear.finals) == [(n, 0) for n in (1, 3, 4, 5)]
    assert ear.engine.counters.dropped_segments == 1


def test_a_single_long_segment_is_not_dropped(start, stub):
    ear = start(stub / "no.tflite", max_backlog_s=30)
    (stub / "wait 1").touch()
    ear.say(np.concatenate([NOISE, NOISE]), pieces=9)
    assert ear.engine.backlog == 1
    (stub / "wait 1").unlink()
    ear.hear_all()
    assert heard(ear.finals[1, 0])[0] == 2 * len(NOISE)


def test_a_file_waits_for_the_engine(start, stub):
    ear = start(stub / "no.tflite", max_backlog_s=30)
    (stub / "wait 1").touch()
    ear.say(NOISE[:320_000], 1, wait=True)
    reader = threading.Thread(target=ear.say, args=(NOISE[:16_000], 2), kwargs={"wait": True})
    reader.start()
    reader.join(0.3)
    assert reader.is_alive()
    assert ear.engine.backlog == 1
    (stub / "wait 1").unlink()
    reader.join(5)
    assert not reader.is_alive()
    ear.hear_all()
    assert len(ear.finals) == 2


def test_draining_does_not_keep_the_engine_from_its_work(ear):
    """Both wait for the same condition; news must reach the one that it is for."""
    ear.say(NOISE[:1000], ends=False)
    drained = []
    waiter = threading.Thread(target=lambda: drained.append(ear.engine.drain(8)))
    waiter.start()
    wait_for(lambda: ear.transcripts)
    time.sleep(0.1)
    ear.say(NOISE[1000:2000], first=1000)
    waiter.join()
    assert drained == [True]
    assert not ear.engine.drain(0) or ear.finals


def test_drain_gives_up(ear):
    ear.say(NOISE[:1000], ends=False)
    assert not ear.engine.drain(0.1)


def test_an_engine_that_does_not_start_again_at_once(ear, stub):
    (stub / "refuse").touch()
    ear.say(NOISE[:1000], ends=False)
    os.kill(ear.engine.pid, signal.SIGKILL)
    ear.say(NOISE[1000:2000], first=1000)
    wait_for(lambda: ("engine_not_starting", "it is gone") in ear.events)
    assert ear.engine.pid is None
    (stub / "refuse").unlink()
    ear.hear_all()
    assert heard(ear.finals[1, 0])[:2] == checksum(NOISE[:2000])


@pytest.mark.parametrize("state", ["idle", "busy", "dead", "refusing", "hung", "deaf"])
def test_stop_leaves_nothing(start, stub, state):
    ear = start(stub / "no.tflite", reply_timeout_s=60)
    pids = [ear.engine.pid]
    if state == "busy":
        (stub / "wait 1").touch()
    if state == "refusing":
        (stub / "refuse").touch()
    if state in {"dead", "refusing"}:
        os.kill(ear.engine.pid, signal.SIGKILL)
    if state in {"hung", "deaf"}:
        os.kill(ear.engine.pid, signal.SIGSTOP)
    if state != "idle":
        ear.say(NOISE if state == "deaf" else NOISE[:1000], ends=False)  # so much is not even taken
        time.sleep(0.2)
        pids.append(ear.engine.pid)
    assert links()
    assert workers() or state != "idle"
    began = time.monotonic()
    ear.engine.stop()
    ear.engine.stop()  # does no harm
    assert time.monotonic() - began < 8
    assert not links()
    assert not workers()
    assert all(is_gone(pid) for pid in pids if pid)


def test_a_broken_bundle(start, tmp_path, toy_path):
    content = bytearray(toy_path.read_bytes())
    content[len(content) // 2] ^= 4
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(content)
    with pytest.raises(BundleError, match=r"broken\.tflite: is damaged"):
        start(broken)
    with pytest.raises(BundleError, match=r"none\.tflite: cannot be read"):
        start(tmp_path / "none.tflite")
    assert not links()
    assert not workers()


def test_an_engine_that_dies_at_its_first_start(start, monkeypatch, tmp_path):
    monkeypatch.setattr(engine_process.sys, "executable", "/bin/false")
    with pytest.raises(EngineLost, match="it ended with status 1"):
        start(tmp_path / "any.tflite")

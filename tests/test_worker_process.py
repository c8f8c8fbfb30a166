"""The engine's process, slow and slower, behind its supervisor; and its end."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
import toy
from brokers import wait_for
from ears import NOISE, STUB, Ear, checksum, heard, is_gone

from agent import engine_process, transcriber
from agent import supervisor as supervisors
from agent.config import RecogniserConfig
from agent.pace import pace_news
from whisperlet.audio import SAMPLE_RATE, samples

CHUNK = samples(20)

# In addition: takes the hop, and while there is a file "slow" keeps to it and takes so many seconds for each partial.
SLOW_STUB = (
    STUB.removesuffix("worker.main()\n")
    + """
stepped = {}

def step(self, hop_ms=None, plain=Ears.step):
    slow = folder / "slow"
    if slow.exists() and not self.last.is_last:
        if self.n - stepped.get(self.key, 0) < 16 * (hop_ms or 100):
            return None
        stepped[self.key] = self.n
        time.sleep(float(slow.read_text()))
    return plain(self)

Ears.step = step
worker.main()
"""
)


def replace_engine(monkeypatch, folder):
    """From now on every engine is the stub; files in the folder tell it what to do."""
    plain = subprocess.Popen

    def popen(command, **kwargs):
        if command[1:3] == ["-m", "agent.worker"]:
            command = [command[0], "-c", SLOW_STUB, *command[3:]]
        return plain(command, **kwargs)

    monkeypatch.setenv("STUB", str(folder))
    monkeypatch.setattr(engine_process.subprocess, "Popen", popen)


@pytest.fixture
def ear(monkeypatch, tmp_path):
    replace_engine(monkeypatch, tmp_path)
    ear = Ear(tmp_path / "no.tflite", tmp_path, reply_timeout_s=30)
    yield ear
    ear.engine.stop()


def speak(ear, pcm, utterance):
    """Say it in real time."""
    for first in range(0, len(pcm), CHUNK):
        part = pcm[first : first + CHUNK]
        ear.say(part, utterance, first=first, ends=first + len(part) == len(pcm))
        time.sleep(len(part) / SAMPLE_RATE)


def test_an_engine_slower_than_speech_loses_none_of_it(ear, monkeypatch, tmp_path):
    """Its partials take longer than what they are about, so they give way; every final comes, of all audio."""
    monkeypatch.setattr(supervisors, "PACE_NEWS_S", 0.0)
    (tmp_path / "slow").write_text("0.7")
    ear.engine.start()
    assert ear.engine.hop_ms == 100
    for utterance in (1, 2, 3):
        speak(ear, NOISE[: 24_000 + utterance], utterance)
    assert ear.engine.hop_ms is None
    ear.hear_all()
    for utterance in (1, 2, 3):
        assert heard(ear.finals[utterance, 0])[:2] == checksum(NOISE[: 24_000 + utterance])
    n_partials = sum(not transcript.is_final for transcript in ear.transcripts)
    assert ear.engine.counters.skipped_partials + n_partials == pytest.approx(45, abs=8)
    assert n_partials < 10
    assert ear.engine.counters.dropped_segments == ear.engine.counters.restarts == 0
    assert {name for name, _ in ear.events} == {"engine_pace"}
    assert ear.events[-1][1] == pace_news(None, 100)


def test_news_of_the_pace_are_rare(ear, monkeypatch, tmp_path):
    monkeypatch.setattr(supervisors, "PACE_NEWS_S", 60.0)
    (tmp_path / "slow").write_text("0.15")
    ear.engine.start()
    speak(ear, NOISE[:32_000], 1)
    (tmp_path / "slow").write_text("1.5")
    speak(ear, NOISE[:32_000], 2)
    ear.hear_all()
    assert ear.engine.hop_ms is None
    assert len(ear.events) == 1


def test_speech_from_a_file_is_marked_as_such(ear, monkeypatch):
    batches = []

    def listening(self, batch, timeout_s, plain=engine_process.EngineProcess.hear):
        batches.append(batch)
        return plain(self, batch, timeout_s)

    monkeypatch.setattr(engine_process.EngineProcess, "hear", listening)
    ear.engine.start()
    for utterance, wait in enumerate([True, False], 1):
        ear.say(NOISE[:1000], utterance, wait=wait)
        ear.hear_all()
    assert [batch.is_live for batch in batches] == [False, True]


def test_pace_in_words():
    assert pace_news(600.0, 300) == "the engine is behind: a partial every 600 ms of speech"
    assert pace_news(300.0, 300) == "the engine keeps up: a partial every 300 ms of speech"
    assert pace_news(None, 300) == "the engine is too far behind for partials, finals go on"


def test_the_toy_says_what_it_says_in_this_process(toy_path, toy_bundle, litert, weight_caches):
    """Through both pipes and after a restart: not a letter less."""
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig())
    clips = [toy.babble(1.0 + 0.5 * seed, seed) for seed in range(3)]
    expected = {}
    for number, pcm in enumerate(clips, 1):
        ears.feed(transcriber.whole(pcm, number))
        expected[number, 0] = ears.finish()
    ear = Ear(toy_path, weight_caches)
    ear.engine.start()
    for number, pcm in enumerate(clips, 1):
        ear.say(pcm[:12_000], number, pieces=4, ends=False)  # enough for a partial
        if number == 2:
            wait_for(lambda: [t for t in ear.transcripts if t.utterance == 2])
            os.kill(ear.engine.pid, signal.SIGKILL)
        ear.say(pcm[12_000:], number, pieces=4, first=12_000)
    ear.hear_all(30)
    for key, final in expected.items():
        assert ear.finals[key].text == final.text
        assert (ear.finals[key].end, ear.finals[key].n_tokens) == (final.end, final.n_tokens)
    assert len({final.text for final in expected.values()}) == 3
    assert ear.engine.counters.restarts == 1
    assert any(not t.is_final for t in ear.transcripts)
    ear.engine.stop()


def test_the_engine_has_as_many_threads_as_configured(toy_path, weight_caches):
    """None of numpy's, which wait awake once they were needed."""
    ear = Ear(toy_path, weight_caches)
    ear.engine.start()
    ear.say(toy.babble(10.0, 1), 1)
    ear.hear_all(30)
    assert psutil.Process(ear.engine.pid).num_threads() == RecogniserConfig().threads == 1
    ear.engine.stop()


ORPHANING = """
import sys, time
from pathlib import Path
from agent.config import RecogniserConfig
from agent.supervisor import Supervisor
engine = Supervisor(Path(sys.argv[1]), RecogniserConfig(), Path(sys.argv[2]), print, print)
engine.start()
print(engine.pid, flush=True)
time.sleep(60)
"""


def test_the_engine_ends_with_the_ear(toy_path, weight_caches):
    command = [sys.executable, "-c", ORPHANING, str(toy_path), str(weight_caches)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as ear:
        engine = int(ear.stdout.readline())
        assert not is_gone(engine)
        ear.kill()
    wait_for(lambda: is_gone(engine))

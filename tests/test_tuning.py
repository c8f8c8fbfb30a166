"""Settings that reach the engine while it runs, from the supervisor to the transcriber."""

import msgspec
import numpy as np
from brokers import wait_for
from ears import NOISE
from scripted import ScriptedEngine
from test_supervisor import ear, start, stub  # noqa: F401 - fixtures
from test_transcriber import SECOND, make, part
from test_worker import HOP, Simulation

from agent import transcriber
from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from agent.protocol import Batch


def test_a_segment_keeps_the_language_that_it_began_with():
    ears = make(ScriptedEngine("a"))
    ears.feed(part(SECOND))
    ears.retune(RecogniserConfig(language="haw"))
    ears.feed(part(SECOND, 16_000, is_last=True, speech_end=32_000))
    assert ears.finish().language == "en"
    ears.feed(transcriber.whole(SECOND, utterance=2))
    assert ears.finish().language == "haw"
    assert ears.engine.passes[-1][:2] != ears.engine.passes[0][:2]


def test_another_hop_holds_from_the_next_batch_on():
    machine = Simulation()
    chunk = SpeechChunk(1, 0, np.zeros(HOP, np.int16), 0, voiced_end=HOP)
    assert machine.hear(chunk).hop_ms == 300
    assert len(machine.partials) == 1
    tuning = RecogniserConfig(hop_ms=600)
    machine.retune = lambda config: setattr(machine, "config", config)
    later = [msgspec.structs.replace(chunk, start=n * HOP, voiced_end=(n + 1) * HOP) for n in (1, 2)]
    told = machine.listener.hear(Batch([later[0]], is_live=True, tuning=tuning))
    assert (told.hop_ms, told.transcripts, told.skipped) == (600, [], 0)
    assert len(machine.hear(later[1]).transcripts) == 1


def test_partials_can_be_left_out():
    machine = Simulation()
    machine.retune = lambda config: setattr(machine, "config", config)
    chunk = SpeechChunk(1, 0, np.zeros(2 * HOP, np.int16), 0, voiced_end=2 * HOP)
    told = machine.listener.hear(Batch([chunk], is_live=True, tuning=RecogniserConfig(partials=False)))
    assert (told.hop_ms, told.transcripts) == (None, [])


def test_the_engine_is_told_with_the_speech_that_follows(ear, monkeypatch):  # noqa: F811
    told = []
    plain = ear.engine._engine.hear
    monkeypatch.setattr(
        ear.engine._engine, "hear", lambda batch, timeout_s: told.append(batch.tuning) or plain(batch, timeout_s)
    )
    ear.say(NOISE[:1000])
    ear.hear_all()
    tuning = RecogniserConfig(hop_ms=700)
    ear.engine.retune(tuning)
    assert ear.engine.hop_ms == 700
    ear.say(NOISE[:1000], utterance=2)
    ear.say(NOISE[:1000], utterance=3)
    ear.hear_all()
    assert told[0] is None
    assert [config for config in told if config] == [tuning]
    assert ear.events == []  # whoever asked for it need not be told


def test_a_new_engine_is_started_with_the_settings_that_hold(ear):  # noqa: F811
    ear.engine.retune(RecogniserConfig(hop_ms=700))
    pid = ear.engine.pid
    ear.engine.renew()
    wait_for(lambda: ear.engine.pid not in {pid, None}, 15)
    assert ear.engine._engine._start.config.hop_ms == 700


def test_an_idle_engine_is_replaced_at_once_and_speech_goes_on(ear):  # noqa: F811
    pid = ear.engine.pid
    ear.engine.renew()
    wait_for(lambda: ear.engine.pid not in {pid, None}, 15)
    assert [name for name, _ in ear.events] == ["engine_restarted"]
    ear.say(NOISE[:1000])
    ear.hear_all()
    assert ear.engine.counters.restarts == 1


def test_a_busy_engine_is_replaced_and_what_it_heard_is_heard_again(ear, stub):  # noqa: F811
    (stub / "wait 1").touch()
    ear.say(NOISE[:1000])
    wait_for(lambda: ear.engine._pending[1, 0].n_sent)
    ear.engine.renew()
    wait_for(lambda: ear.engine.counters.restarts == 1)
    (stub / "wait 1").unlink()
    ear.hear_all()
    assert list(ear.finals) == [(1, 0)]

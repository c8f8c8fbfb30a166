import numpy as np
import pytest

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.confirm import ConfirmedGate
from agent.messages import AudioChunk
from agent.switches import Positions, SwitchedGate
from agent.vad import FRAME, Gate
from whisperlet.audio import samples

PLAIN = VadConfig(confirm_probability=0)
MUTED, DEAF = Positions(muted=True), Positions(transcribing=False)


@pytest.fixture(scope="module")
def talk(clips):
    """Three seconds of talk without a pause at its start, and silence after it."""
    pcm = read_file(clips[0])
    return np.concatenate([pcm[: samples(3000)], np.zeros(samples(1000), np.int16)])


class Ear:
    """A switched gate that is fed a clip again and again."""

    def __init__(self, talk, gate=None):
        self.gate = gate or Gate(PLAIN)
        self.switched = SwitchedGate(self.gate)
        self.speech, self.position, self._talk = [], 0, talk

    def hear(self, duration_ms):
        until = self.position + samples(duration_ms)
        while self.position < until:
            start = self.position % len(self._talk)
            pcm = self._talk[start : start + FRAME]
            self.speech += self.switched.feed(AudioChunk(pcm, self.position, 0.0))
            self.position += len(pcm)

    def hear_out(self):
        """To the end of the clip, when all is silent."""
        self.hear((len(self._talk) - self.position % len(self._talk)) / 16)

    @property
    def utterances(self):
        """First sample, and sample after the last, of each that has ended."""
        found = {}
        for chunk in self.speech:
            first = found.setdefault(chunk.key, [chunk.start, None])
            if chunk.is_last:
                assert first[1] is None
                first[1] = chunk.speech_end
        return list(map(tuple, found.values()))


@pytest.fixture
def ear(talk):
    return Ear(talk)


@pytest.mark.parametrize("positions", [MUTED, DEAF])
def test_what_was_being_said_ends_with_the_switch_and_nothing_follows(ear, positions):
    ear.hear(1500)
    assert ear.gate.is_open
    switched_at = ear.position
    ear.switched.switch(positions)
    ear.hear_out()
    ((_, end),) = ear.utterances
    assert end <= switched_at
    assert max(chunk.start + len(chunk.samples) for chunk in ear.speech) <= switched_at


@pytest.mark.parametrize("positions", [MUTED, DEAF])
def test_what_is_said_after_is_an_utterance_of_its_own(ear, positions):
    ear.hear(1000)
    ear.switched.switch(positions)
    ear.hear(1000)
    back_at = ear.position
    ear.switched.switch(Positions())
    ear.hear_out()
    (_, first_end), (second_start, second_end) = ear.utterances
    assert first_end < back_at <= second_start < second_end  # not even the pre-roll reaches back


def test_a_muted_gate_hears_nothing(ear):
    ear.switched.switch(MUTED)
    ear.gate.feed = pytest.fail
    ear.hear(100)


def test_flushing_while_it_is_off_lets_nothing_through(ear):
    ear.switched.switch(DEAF)
    ear.hear(1500)
    assert ear.gate.is_open
    assert ear.switched.flush() == []


def test_another_tuning_waits_for_the_gate_to_close(ear):
    ear.hear(1500)
    ear.switched.retune(VadConfig(confirm_probability=0, hang_over_ms=200))
    assert ear.gate._config == PLAIN
    ear.hear_out()
    ear.hear_out()
    assert ear.gate._config.hang_over_ms == 200
    decided = [chunk.start + len(chunk.samples) - chunk.speech_end for chunk in ear.speech if chunk.is_last]
    assert decided == [samples(500), samples(200)]
    assert [key for key, _ in {chunk.key: 0 for chunk in ear.speech}.items()] == [(1, 0), (2, 0)]


def test_a_gate_with_a_second_opinion_is_tuned_too(talk):
    ear = Ear(talk, ConfirmedGate(VadConfig()))
    ear.switched.retune(PLAIN)
    ear.hear(500)
    assert ear.gate.is_open
    assert ear.speech  # confirmed at once

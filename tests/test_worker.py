"""What the engine's listener makes of speech on machines of any speed; time passes because the test says so."""

from collections import deque

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.config import RecogniserConfig
from agent.messages import SpeechChunk, Thrift, Transcript
from agent.protocol import Batch
from agent.worker import Listener
from whisperlet.audio import samples, seconds

CHUNK = samples(20)
HOP = samples(300)


class Simulation:
    """A machine on which nothing takes time but what a test says, with an engine that proves what it was given."""

    def __init__(self, step_s=0.0, final_s=0.0, **config):
        self.now_s = 0.0
        self.step_s, self.final_s = step_s, final_s
        self.config = RecogniserConfig(**{"hop_ms": 300, **config})
        self.listener = Listener(self, self.config, clock=lambda: self.now_s)
        self.n, self.n_stepped = 0, 0
        self.finals, self.partials, self.hops, self.lateness_s = {}, [], [], []
        self.n_skipped = 0
        self.is_live = True
        self.thrift = Thrift.NORMAL
        self.n_in_advance = 0  # finals that could have been heard in advance
        self.n_steps = 0  # that were asked for
        self.in_pause = False

    # what the transcriber does

    def feed(self, chunk):
        if self.n == 0:
            self.start = chunk.start
        assert chunk.start == self.start + self.n, "audio is missing"
        self.n += len(chunk.samples)
        self.last = chunk

    def step(self, hop_ms=None):
        self.n_steps += 1
        self.n_in_advance += not self.last.is_last
        if self.n - self.n_stepped < samples(hop_ms or self.config.hop_ms) or not self.config.partials:
            return None
        self.n_stepped = self.n
        self.now_s += self.step_s
        return self._transcript()

    def finish(self):
        self.now_s += self.final_s
        final = self._transcript()
        self.n = self.n_stepped = 0
        return final

    def _transcript(self):
        end = self.start + self.n
        return Transcript(*self.last.key, 1, "", 0, self.start, end, is_final=self.last.is_last, language="en")

    # what the supervisor does

    def hear(self, *chunks):
        """One batch, now."""
        result = self.listener.hear(Batch(list(chunks), self.is_live, self.thrift))
        self.n_skipped += result.skipped
        self.hops.append(result.hop_ms)
        for transcript in result.transcripts:
            if transcript.is_final:
                assert transcript.key not in self.finals
                self.finals[transcript.key] = transcript
                self.lateness_s.append(self.now_s - seconds(transcript.end))
            else:
                self.partials.append(transcript)
        return result

    def say(self, *durations_s, pause_s=1.0, held_s=0.0, silence_s=None):
        """Utterances in real time; the gate holds the first `held_s` of each back, and knows of `silence_s` after it."""
        coming, end_s = deque(), 0.0
        first = samples(1e3 * self.now_s)
        for number, duration_s in enumerate(durations_s, len(self.finals) + 1):
            n = samples(1e3 * duration_s)
            for start in range(0, n, CHUNK):
                size = min(CHUNK, n - start)
                chunk = SpeechChunk(number, 0, np.zeros(size, np.int16), first + start)
                voiced_end = first + min(start + size, n - samples(1e3 * (silence_s or 0.0)))
                if start + size == n:
                    chunk = msgspec.structs.replace(chunk, is_last=True, speech_end=voiced_end)
                elif silence_s is not None:
                    chunk = msgspec.structs.replace(chunk, voiced_end=voiced_end)
                due_s = seconds(first + max(start + size, min(samples(1e3 * held_s), n)))
                coming.append((due_s, chunk))
            end_s = seconds(first + n)
            first += n + samples(1e3 * pause_s)
        while coming:
            self.now_s = max(self.now_s, coming[0][0])
            ready = []
            while coming and coming[0][0] <= self.now_s + 1e-9:
                ready.append(coming.popleft()[1])
            self.hear(*_joined(ready))
        self.now_s = max(self.now_s, end_s + pause_s)

    def assert_all_is_heard(self, *durations_s):
        lengths = [final.end - final.start for final in self.finals.values()]
        assert lengths == [samples(1e3 * duration_s) for duration_s in durations_s]


def _joined(chunks):
    """One chunk a segment, as the supervisor joins what waits."""
    by_key = {}
    for chunk in chunks:
        by_key.setdefault(chunk.key, []).append(chunk)
    for parts in by_key.values():
        audio = np.concatenate([part.samples for part in parts])
        yield msgspec.structs.replace(parts[-1], samples=audio, start=parts[0].start)


def test_a_quick_engine_makes_every_partial():
    machine = Simulation(step_s=0.1, final_s=0.2)
    machine.say(3.0, 2.0, 10.0)
    assert set(machine.hops) == {300}
    assert len(machine.partials) == 9 + 6 + 33
    assert machine.n_skipped == 0
    machine.assert_all_is_heard(3.0, 2.0, 10.0)


@pytest.mark.parametrize("held_s", [0.4, 1.5, 3.0])
def test_what_the_gate_held_back_did_not_wait_for_the_engine(held_s):
    """However much of an utterance comes at once, a quick engine is not behind and misses nothing."""
    machine = Simulation(step_s=0.2, final_s=0.5)
    machine.say(*[3.5] * 30, held_s=held_s)
    assert set(machine.hops) == {300}
    assert machine.n_skipped == 0


@pytest.mark.parametrize(("step_s", "hop_ms"), [(0.26, 600), (0.45, 600), (0.5, 1200), (0.9, 1200)])
def test_a_slower_engine_makes_fewer_partials_and_says_how_many_less(step_s, hop_ms):
    machine = Simulation(step_s)
    machine.say(28.0, 28.0, pause_s=0.0)
    assert machine.hops[-1] == hop_ms
    assert len(machine.partials) + machine.n_skipped == pytest.approx(2 * 28.0 / 0.3, abs=6)
    machine.assert_all_is_heard(28.0, 28.0)


def test_finals_only():
    machine = Simulation(step_s=5.0)
    machine.say(*[6.0] * 20)
    assert machine.hops.count(None) > len(machine.hops) / 2
    assert len(machine.partials) < 20
    assert len(machine.partials) + machine.n_skipped == pytest.approx(20 * 6.0 / 0.3, abs=20)
    machine.assert_all_is_heard(*[6.0] * 20)


def test_partials_come_back():
    machine = Simulation(step_s=5.0)
    machine.say(*[6.0] * 20)
    machine.step_s = 0.1
    machine.say(*[6.0] * 30)
    assert machine.hops[-1] == 300
    n_skipped, n_partials = machine.n_skipped, len(machine.partials)
    machine.say(6.0)
    assert (machine.n_skipped, len(machine.partials)) == (n_skipped, n_partials + 20 - 1)  # the last is the final's


@settings(deadline=None, max_examples=30)
@given(
    st.floats(0.0, 20.0),
    st.floats(0.0, 0.5),
    st.lists(st.floats(0.05, 28.0), min_size=1, max_size=12),
    st.floats(0.0, 3.0),
    st.floats(0.0, 2.0),
)
def test_whatever_the_engine_is_worth_it_hears_everything(step_s, final_s, durations_s, pause_s, held_s):
    durations_s = [round(duration_s, 2) for duration_s in durations_s]
    machine = Simulation(step_s, final_s)
    machine.say(*durations_s, pause_s=pause_s, held_s=held_s)
    machine.assert_all_is_heard(*durations_s)
    assert all(hop_ms is None or hop_ms >= 300 for hop_ms in machine.hops)
    assert len(machine.partials) + machine.n_skipped <= sum(durations_s) / 0.3 + len(durations_s)


def test_finals_are_not_kept_waiting_by_partials_that_are_too_slow():
    """With a step every hop they would come ever later: each of these utterances is worth a hundred seconds of it."""
    machine = Simulation(step_s=5.0, final_s=0.3)
    machine.say(*[6.0] * 100)
    assert np.median(machine.lateness_s) < 0.5
    assert max(machine.lateness_s[20:]) < 6.0


def test_a_long_final_makes_the_hop_longer_for_a_while():
    machine = Simulation(step_s=0.1, final_s=1.0)
    machine.say(28.0, 3.0, pause_s=0.0)
    assert machine.hops[-1] == 600
    assert machine.n_skipped == pytest.approx(3.0 / 0.3 - 3.0 / 0.6, abs=2)
    machine.say(10.0)
    assert machine.hops[-1] == 300


def test_what_ended_while_another_final_was_made_had_no_partial():
    machine = Simulation(step_s=0.1, final_s=0.55)
    machine.say(3.0, 0.5, pause_s=0.0)
    assert set(machine.hops) == {300}
    assert (len(machine.partials), machine.n_skipped) == (9, 1)


def test_a_file_is_never_waited_for():
    """It is read as fast as the engine takes it, so there is always more of it."""
    machine = Simulation(step_s=0.2, final_s=2.0)
    machine.is_live = False
    pcm = np.zeros(samples(9000), np.int16)
    for number in range(1, 20):
        machine.hear(SpeechChunk(number, 0, pcm, 0, is_last=True), SpeechChunk(number + 1, 0, pcm[:HOP], 0))
        machine.n = machine.n_stepped = 0
    assert set(machine.hops) == {300}
    assert machine.n_skipped == 0
    assert len(machine.finals) == 19


def test_without_partials_nothing_is_missed():
    machine = Simulation(step_s=1.0, final_s=5.0, partials=False)
    machine.say(3.0, 3.0, pause_s=0.0)
    assert set(machine.hops) == {None}
    assert (machine.partials, machine.n_skipped) == ([], 0)
    assert machine.n_steps == len(machine.hops)  # a pause may be used to hear the final in advance
    machine.assert_all_is_heard(3.0, 3.0)


def test_silence_needs_no_partial():
    machine = Simulation(step_s=5.0)
    machine.say(*[6.0] * 20, silence_s=3.0)
    assert machine.hops.count(None) > len(machine.hops) / 2
    assert len(machine.partials) + machine.n_skipped == pytest.approx(20 * 3.0 / 0.3, abs=20)


def test_load_is_over_the_speech_that_a_step_covers(monkeypatch):
    """Not over what was left of another segment, which only its final heard."""
    machine = Simulation(step_s=0.1)
    covered = []
    monkeypatch.setattr(machine.listener._pace, "observe", lambda busy_s, audio_s: covered.append((busy_s, audio_s)))
    machine.say(*[0.5] * 10)
    assert covered == [(pytest.approx(0.1), pytest.approx(0.3))] * 10


def test_a_transcriber_without_news_is_not_late():
    machine = Simulation()
    machine.step = lambda hop_ms=None: None
    machine.say(5.0)
    assert (machine.hops[-1], machine.n_skipped) == (300, 0)


@pytest.mark.parametrize("in_pause", [False, True])
def test_what_is_heard_in_a_pause_says_nothing_of_the_pace(in_pause):
    machine = Simulation(step_s=0.5)
    machine.in_pause = in_pause
    machine.is_live = False
    machine.say(5.0)
    assert (machine.hops[-1] == 300) is in_pause


@pytest.mark.parametrize(
    ("thrift", "hop_ms", "n_partials", "in_advance"),
    [
        (Thrift.NORMAL, 300, 33, True),
        (Thrift.LONGER_HOP, 600, 16, True),
        (Thrift.NO_PARTIALS, None, 0, True),
        (Thrift.FINALS_ONLY, None, 0, False),
    ],
)
def test_a_hot_device_does_without(thrift, hop_ms, n_partials, in_advance):
    machine = Simulation(step_s=0.1, final_s=0.2)
    machine.thrift = thrift
    machine.say(10.0, 10.0)
    assert set(machine.hops) == {hop_ms}
    assert len(machine.partials) == 2 * n_partials
    assert (machine.n_in_advance > 0) is in_advance
    assert machine.n_skipped == pytest.approx(2 * (33 - n_partials), abs=2)
    machine.assert_all_is_heard(10.0, 10.0)


def test_once_cool_again_partials_come_back():
    machine = Simulation(step_s=0.1)
    machine.thrift = Thrift.FINALS_ONLY
    machine.say(10.0)
    machine.thrift = Thrift.NORMAL
    machine.say(10.0, 10.0, 10.0)
    assert (machine.hops[0], machine.hops[-1]) == (None, 300)


@pytest.mark.parametrize("thrift", Thrift)
def test_without_partials_only_the_final_in_advance_is_at_stake(thrift):
    machine = Simulation(partials=False)
    machine.thrift = thrift
    machine.say(5.0)
    assert (machine.n_in_advance > 0) is (thrift is not Thrift.FINALS_ONLY)
    machine.assert_all_is_heard(5.0)

"""The second opinion: noise that the first gate takes for speech goes no further, speech goes through whole."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.confirm import BLOCK, LATENESS, SURROUNDINGS, ConfirmedGate, Evidence, Look
from agent.messages import AudioChunk
from agent.vad import Gate, segments
from whisperlet.audio import SAMPLE_RATE, samples

GOLDEN = sorted((Path(__file__).parent.parent / "convert/golden").glob("*.flac"))
CONFIG = VadConfig()
PLAIN = VadConfig(aggressiveness=0)
ENOUGH = samples(CONFIG.confirm_ms) / BLOCK * (1 - CONFIG.confirm_probability)
PROBABILITIES = st.lists(st.floats(0, 1), max_size=60)
QUIET, LOUD = 1.0, 1e6  # energy of a block


def silence(duration_s):
    return np.zeros(round(duration_s * SAMPLE_RATE), np.int16)


def rattle():
    """Bursts of loud noise: webrtcvad opens for them."""
    random = np.random.default_rng(0)
    noise = (random.standard_normal(5 * SAMPLE_RATE) * 4_000).clip(-32_768, 32_767)
    return (noise * (np.sin(np.arange(len(noise)) / 2_000) > 0)).astype(np.int16)


def clicks():
    """Ten a second, each ringing for a while."""
    time_s = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE % 0.1
    return (12_000 * np.exp(-60 * time_s) * np.sin(2 * np.pi * 900 * time_s)).astype(np.int16)


def hum():
    """The mains, with its harmonics and unsteady."""
    time_s = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    tones = sum(np.sin(2 * np.pi * 50 * k * time_s) / k for k in range(1, 30, 2))
    return (5_000 * tones * (1 + 0.5 * np.sin(7 * time_s))).astype(np.int16)


def siren():
    """A voice-like pitch that glides, of many harmonics."""
    time_s = np.arange(5 * SAMPLE_RATE) / SAMPLE_RATE
    phase = 2 * np.pi * np.cumsum(400 + 200 * np.sin(3 * time_s)) / SAMPLE_RATE
    return (4_000 * sum(np.sin(k * phase) / k for k in range(1, 8))).astype(np.int16)


def through(gate, pcm, size=320):
    pieces = [gate.feed(AudioChunk(pcm[i : i + size], i, 0.0)) for i in range(0, len(pcm), size)]
    return [chunk for piece in [*pieces, gate.flush()] for chunk in piece]


def fed(evidence, probabilities, energies=itertools.repeat(LOUD)):  # noqa: B008 - endless
    """What `add` said to each."""
    return [evidence.add(p, e) for p, e in zip(probabilities, energies, strict=False)]


@pytest.fixture(scope="module")
def clip(clips):
    return np.concatenate([read_file(clips[0]), silence(1)])


@pytest.mark.parametrize("noise", [rattle, clicks, hum, siren])
@pytest.mark.parametrize("gain", [0.3, 1.0, 2.0])
def test_noise_stops_at_the_second_opinion(noise, gain):
    pcm = np.concatenate([silence(0.5), (gain * noise()).clip(-32_768, 32_767).astype(np.int16), silence(1)])
    assert through(Gate(PLAIN), pcm), "the first gate was to be fooled"
    gate = ConfirmedGate(PLAIN)
    assert through(gate, pcm) == []
    assert gate.n_rejected > 0


def test_without_a_threshold_the_first_gate_decides():
    gate = ConfirmedGate(VadConfig(aggressiveness=0, confirm_probability=0.0))
    assert len(through(gate, rattle())) == len(through(Gate(PLAIN), rattle()))


def test_speech_goes_through_whole(clips):
    for path in [*clips, *GOLDEN]:
        pcm = np.concatenate([read_file(path), silence(1)])
        plain = list(segments(pcm, CONFIG))
        assert list(segments(pcm, CONFIG, ConfirmedGate(CONFIG))) == plain, path.name


@pytest.mark.parametrize("gain", [0.1, 0.3, 2.0])
def test_quiet_and_loud_speech_goes_through(clip, gain):
    pcm = (gain * clip).clip(-32_768, 32_767).astype(np.int16)
    assert list(segments(pcm, CONFIG, ConfirmedGate(CONFIG))) == list(segments(pcm, CONFIG))


@pytest.mark.parametrize("lead_s", [0.0, 1.0])
@pytest.mark.parametrize(("start_ms", "end_ms"), [(560, 920), (1320, 1600), (3260, 3640)])
def test_a_word_alone_is_heard(clips, start_ms, end_ms, lead_s):
    spoken = read_file(next(path for path in clips if path.stem == "1089-134686-0000"))
    word = spoken[samples(start_ms) : samples(end_ms)]
    found = list(segments(np.concatenate([silence(lead_s), word, silence(1)]), CONFIG, ConfirmedGate(CONFIG)))
    assert len(found) == 1


def test_a_strict_gate_still_hears_clear_speech(clips):
    for path in [*clips, *GOLDEN]:
        gate = ConfirmedGate(CONFIG)
        gate.is_strict = True
        pcm = np.concatenate([read_file(path), silence(1)])
        assert through(gate, pcm), path.name


def test_a_strict_gate_does_not_believe_what_is_only_likely(monkeypatch):
    """From the next segment on; and it believes it again when it is no longer strict."""
    monkeypatch.setattr(Look, "hear", lambda _look, _block: CONFIG.confirm_probability + 0.15)
    gate = ConfirmedGate(PLAIN)
    noise = np.concatenate([rattle(), silence(1)])
    heard = []
    for is_strict in (False, True, False):
        gate.is_strict = is_strict
        heard.append(bool(through(gate, noise)))
    assert heard == [True, False, True]


def test_speech_comes_while_it_is_spoken(clip):
    gate = ConfirmedGate(CONFIG)
    heard_after = next(
        end for end in range(320, len(clip), 320) if gate.feed(AudioChunk(clip[end - 320 : end], end - 320, 0.0))
    )
    opened = next(segments(clip, CONFIG)).start
    assert heard_after - opened < samples(CONFIG.pre_roll_ms + 2 * CONFIG.confirm_ms)


def test_what_is_held_back_comes_in_order_and_once(clip):
    starts = [(chunk.start, len(chunk.samples)) for chunk in through(ConfirmedGate(CONFIG), clip)]
    assert starts == [(chunk.start, len(chunk.samples)) for chunk in through(Gate(CONFIG), clip)]


def test_each_segment_is_judged_anew(clip):
    gate = ConfirmedGate(PLAIN)
    heard = through(gate, np.concatenate([clip, rattle(), silence(1), clip]))
    assert all(end <= len(clip) or end > len(clip) + 5 * SAMPLE_RATE for end in (chunk.start for chunk in heard))
    assert gate.n_rejected > 0


def test_how_audio_is_cut_into_chunks_does_not_matter(clip):
    pcm = np.concatenate([rattle(), silence(1), clip])
    found = {tuple(segments(pcm, PLAIN, ConfirmedGate(PLAIN)))}
    for size in (320, 1_000, 4_096):
        chunks = through(ConfirmedGate(PLAIN), pcm, size)
        found.add(
            tuple(segment for segment in segments(pcm, PLAIN) if segment.utterance in {c.utterance for c in chunks})
        )
    assert len(found) == 1


def test_a_look_that_began_anew_forgot_what_it_heard(clip):
    look, blocks = Look(BLOCK // 2), clip[: 40 * BLOCK].reshape(-1, BLOCK)
    look.begin()
    first = [look.hear(block) for block in blocks]
    look.begin()
    assert [look.hear(block) for block in blocks] == first
    assert max(first) > 0.9


def test_certainty_convinces_after_its_time():
    said = fed(Evidence(CONFIG), [1.0] * 30)
    assert said.index(True) == np.ceil(ENOUGH / (1 - CONFIG.confirm_probability)) - 1


@given(PROBABILITIES)
def test_the_weight_is_that_of_the_best_stretch(probabilities):
    """Quiet words aside, the evidence convinces when some blocks in a row weigh enough."""
    evidence = Evidence(VadConfig(confirm_share=1.0))
    said = any(fed(evidence, [0.999 * p for p in probabilities]))
    ends = np.cumsum([0.0, *(0.999 * p - CONFIG.confirm_probability for p in probabilities)])
    best = max(float(ends[j] - ends[i]) for i in range(len(ends)) for j in range(i, len(ends)))
    assert said == (best >= ENOUGH) or abs(best - ENOUGH) < 1e-6


@given(PROBABILITIES, st.integers(0, 59), st.floats(0, 1))
def test_more_probability_never_convinces_less(probabilities, where, more):
    raised = [min(1.0, p + more) if i == where else p for i, p in enumerate(probabilities)]
    strict = VadConfig(confirm_share=1.0)
    assert any(fed(Evidence(strict), [0.999 * p for p in raised])) >= any(
        fed(Evidence(strict), [0.999 * p for p in probabilities])
    )


@given(st.lists(st.floats(0, CONFIG.confirm_probability), max_size=200), st.floats(0, 1e9))
def test_what_is_never_likely_never_convinces(probabilities, energy):
    evidence = Evidence(CONFIG)
    assert not any(fed(evidence, probabilities, itertools.repeat(energy)))
    assert not evidence.is_word()


def word(n_certain, around):
    """Probabilities and energies of a word with energy `around` it; the opinions come late."""
    before, after = [0.0] * 20, [0.0] * 20
    energies = [around] * 20 + [LOUD] * n_certain + [around] * 20
    return [0.0] * LATENESS + before + [1.0] * n_certain + after, energies + [around] * LATENESS


def test_a_short_word_convinces_when_it_is_over():
    probabilities, energies = word(8, QUIET)
    said = fed(Evidence(CONFIG), probabilities, energies)
    assert said.count(True) == 1
    assert 20 + 8 + LATENESS <= said.index(True) < 20 + 8 + LATENESS + SURROUNDINGS + 1


def test_at_the_end_of_the_segment_the_word_is_over():
    evidence = Evidence(CONFIG)
    assert not any(fed(evidence, *word(8, QUIET))[: 20 + 8 + LATENESS])
    evidence.clear()
    probabilities, energies = word(8, QUIET)
    n = 20 + 8 + LATENESS
    assert not any(fed(evidence, probabilities[:n], energies[:n]))
    assert evidence.is_word()
    evidence.clear()
    assert not evidence.is_word()


@pytest.mark.parametrize(("n_certain", "around"), [(8, LOUD / 3), (2, QUIET)])
def test_a_burst_in_noise_and_a_click_are_no_words(n_certain, around):
    assert not any(fed(Evidence(CONFIG), *word(n_certain, around)))


def test_words_in_noise_are_compared_with_the_noise_next_to_them():
    """What was loud long before does not matter."""
    probabilities, energies = word(8, QUIET)
    energies[: 20 - SURROUNDINGS - 1] = [100 * LOUD] * (20 - SURROUNDINGS - 1)
    assert any(fed(Evidence(CONFIG), probabilities, energies))
    energies[20 - 2] = LOUD * 100
    assert not any(fed(Evidence(CONFIG), probabilities, energies))


def test_what_is_remembered_is_bounded():
    evidence = Evidence(CONFIG)
    fed(evidence, [0.0] * 10_000)
    assert len(evidence._blocks) == SURROUNDINGS + LATENESS


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads by what Linux says")
@pytest.mark.parametrize("limit", [None, "7"])
def test_the_network_has_one_thread_and_limits_nobody_else(limit):
    """Threads that wait for each other wait awake, and would cost most of what the gate takes."""
    code = """if True:
        import os
        from agent.confirm import Look
        look, before = Look(0), len(os.listdir("/proc/self/task"))
        look.begin()
        print(len(os.listdir("/proc/self/task")) - before, os.environ.get("OMP_THREAD_LIMIT"))
    """
    environment = {key: value for key, value in os.environ.items() if key != "OMP_THREAD_LIMIT"}
    environment |= {"OMP_THREAD_LIMIT": limit} if limit else {}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == ["0", str(limit)]

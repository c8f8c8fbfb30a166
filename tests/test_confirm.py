"""The second opinion: noise that the first gate takes for speech goes no further, speech goes through whole."""

import numpy as np
import pytest

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.confirm import ConfirmedGate
from agent.messages import AudioChunk
from agent.vad import Gate, segments

PLAIN = VadConfig(aggressiveness=0)


def rattle():
    """Bursts of loud noise: webrtcvad opens for them."""
    random = np.random.default_rng(0)
    noise = (random.standard_normal(5 * 16_000) * 4_000).clip(-32_768, 32_767)
    return (noise * (np.sin(np.arange(len(noise)) / 2_000) > 0)).astype(np.int16)


def through(gate, pcm, size=320):
    pieces = [gate.feed(AudioChunk(pcm[i : i + size], i, 0.0)) for i in range(0, len(pcm), size)]
    return [chunk for piece in [*pieces, gate.flush()] for chunk in piece]


@pytest.fixture(scope="module")
def clip(clips):
    return np.concatenate([read_file(clips[0]), np.zeros(16_000, np.int16)])


def test_noise_stops_at_the_second_opinion():
    assert through(Gate(PLAIN), rattle()), "the first gate was to be fooled"
    gate = ConfirmedGate(PLAIN)
    assert through(gate, rattle()) == []
    assert gate.n_rejected > 0


def test_without_a_threshold_the_first_gate_decides():
    gate = ConfirmedGate(VadConfig(aggressiveness=0, confirm_probability=0.0))
    assert len(through(gate, rattle())) == len(through(Gate(PLAIN), rattle()))


def test_speech_goes_through_whole(clips):
    for path in clips:
        pcm = np.concatenate([read_file(path), np.zeros(16_000, np.int16)])
        plain = list(segments(pcm, VadConfig()))
        assert list(segments(pcm, VadConfig(), ConfirmedGate(VadConfig()))) == plain, path.name


def test_what_is_held_back_comes_in_order_and_once(clip):
    starts = [(chunk.start, len(chunk.samples)) for chunk in through(ConfirmedGate(VadConfig()), clip)]
    assert starts == [(chunk.start, len(chunk.samples)) for chunk in through(Gate(VadConfig()), clip)]


def test_each_segment_is_judged_anew(clip):
    gate = ConfirmedGate(PLAIN)
    heard = through(gate, np.concatenate([clip, rattle(), np.zeros(16_000, np.int16), clip]))
    assert all(end <= len(clip) or end > len(clip) + 5 * 16_000 for end in (chunk.start for chunk in heard))
    assert gate.n_rejected > 0

"""The pure parts of what the benchmarks say about long audio and noise."""

from pathlib import Path

import numpy as np
import pytest
import toy
from benchmarks import audio_mix, energy, long_audio, macs, noise
from benchmarks.long_audio import MINUTE, Minute
from benchmarks.macs import Streaming
from benchmarks.runs import Message

from agent.messages import Transcript
from convert.speechset import Clip
from whisperlet.bundle import Dims, StreamSpec

# ---- encoder work

BASE = Dims(n_mels=80, d_model=512, n_head=8, n_audio_layer=6, n_text_layer=6, n_vocab=51865, n_text_ctx=224)


def test_a_full_window_of_whisper_base_costs_what_is_known():
    weights = 3 * 80 * 512 * 2 + 3 * 512**2 + 6 * 12 * 512**2  # a frame goes through each once, the stem's first twice
    cross = 6 * 2 * 512**2
    assert macs.frame(BASE) == weights + cross
    assert macs.encode(BASE, 1500) == 1500 * (weights + cross) + 6 * 2 * 1500 * 1500 * 512


def test_a_step_without_past_or_overlap_is_an_encoding():
    assert macs.step(BASE, Streaming(300, 300, 0)) == macs.encode(BASE, 300)
    assert macs.work(BASE, Streaming(300, 300, 0), [300], 0).saved_percent == 0.0


def test_work_adds_up_over_hops_and_utterances():
    how = Streaming(15, 55, 512)
    found = macs.work(BASE, how, [40, 500], silence=128)
    assert found.streamed == pytest.approx((3 + 34) * macs.step(BASE, how) / 1e9)
    anew = sum(macs.encode(BASE, n) for n in (15, 30, 40)) + sum(
        macs.encode(BASE, min(15 * i, 500)) for i in range(1, 35)
    )
    assert found.encoded_anew == pytest.approx(anew / 1e9)
    assert found.final_passes == pytest.approx((macs.encode(BASE, 168) + macs.encode(BASE, 628)) / 1e9)
    assert 60 < found.saved_with_finals_percent < found.saved_percent < 85


# ---- long audio


def test_a_recording_goes_round():
    pcm = np.arange(1, 30_000, dtype=np.int16)
    whole = np.concatenate(list(long_audio.minutes_of(pcm, 2)))
    period = len(pcm) + long_audio.BETWEEN
    assert len(whole) == 2 * MINUTE
    assert np.array_equal(whole[:period], np.concatenate([pcm, np.zeros(long_audio.BETWEEN, np.int16)]))
    assert np.array_equal(whole[period:], whole[:-period])


def test_trends():
    minutes = [Minute(i + 1, 6.0 + (i >= 6), 200.0 + i, 100.0) for i in range(8)]
    found = long_audio.trends(minutes)
    assert found["core_s_per_audio_s"] == pytest.approx(6.25 / 60, abs=1e-4)
    assert found["last_quarter_to_first"] == pytest.approx(7 / 6, abs=1e-3)
    assert (found["engine_growth_mb"], found["ear_growth_mb"], found["engine_most_mb"]) == (6.0, 0.0, 207.0)
    assert long_audio.round_ratio(minutes, 2 * MINUTE) == pytest.approx(7 / 6, abs=1e-3)
    assert long_audio.round_ratio(minutes, 5 * MINUTE) is None


def test_how_a_bundle_streams():
    spec = StreamSpec(chunk=15, overlap=40, padding=32, context=510)
    assert long_audio.streaming(toy.make_manifest(streams=[spec])) == (Streaming(15, 87, 510), True)
    assert long_audio.streaming(toy.make_manifest(streams=[])) == (Streaming(15, 55, 512), False)


# ---- noise


def transcript(utterance, text, *, is_final):
    return Message(0.0, Transcript(utterance, 0, 1, text, 0, start=0, end=1, is_final=is_final, language="en"))


def test_what_came_of_a_noise():
    messages = [
        transcript(1, "Thank", is_final=False),
        transcript(1, "Thank you.", is_final=True),
        transcript(2, "Oh", is_final=False),
        transcript(2, "", is_final=True),
        transcript(3, "", is_final=False),
        transcript(3, "", is_final=True),
    ]
    found = noise.counted(messages, n_rejected=4, audio_s=1800.0)
    assert (found.n_opened, found.n_passed, found.n_with_words, found.n_words, found.n_flashed) == (7, 3, 1, 2, 1)
    assert (found.texts, found.per_hour(found.n_words)) == (["Thank you."], 4.0)


def test_noise_goes_on_for_as_long_as_was_asked(monkeypatch):
    lengths = iter([16_000, 24_000])
    monkeypatch.setattr(audio_mix, "read_file", lambda _path: np.full(next(lengths), 1000, np.int16))
    clips = [Clip(name, Path(name), None, "none") for name in "ab"]
    pieces = list(audio_mix.endless(clips, 4.0, "x", -20.0, 6.0))
    assert [len(piece) for piece in pieces] == [16_000, 24_000, 16_000, 8_000]
    assert len({int(piece[0]) for piece in pieces}) == 4


# ---- energy


def test_energy_above_idle():
    used = energy.Used(core_s=8.0, wall_s=10.0, joules=150.0)
    assert energy.per_second(used, 100.0, 5.0) == {"core_s": 0.08, "joules": 1.5, "joules_above_idle": 1.0}
    without = energy.per_second(energy.Used(8.0, 10.0, None), 100.0, None)
    assert without == {"core_s": 0.08, "joules": None, "joules_above_idle": None}

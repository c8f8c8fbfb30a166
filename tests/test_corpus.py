"""Audio to train on: what is read, how it is cut, and how batches are drawn."""

import json
import random
from collections import Counter

import numpy as np
import pytest
import soundfile
import soxr
import torch
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from convert import corpus, speechset
from convert.corpus import Corpus
from convert.speechset import Source
from whisperlet.audio import HOP_LENGTH, SAMPLE_RATE, to_float32
from whisperlet.errors import ConfigError
from whisperlet.logmel import SILENCE

N_MELS = 80


def write(folder, *durations_s, suffix=".wav"):
    """Recordings of these lengths, in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, duration_s in enumerate(durations_s):
        soundfile.write(folder / f"{i:03}{suffix}", toy.babble(duration_s, i), SAMPLE_RATE)
    return folder


def write_manifest(folder, **durations_s):
    """A set with a list of lengths for each language."""
    entries = []
    for language, lengths in durations_s.items():
        write(folder / language, *lengths)
        entries += [
            {"id": f"{language}{i}", "audio": f"{language}/{i:03}.wav", "language": language}
            for i in range(len(lengths))
        ]
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, entries)))
    return folder


def read(*folders):
    return Corpus([Source(folder) for folder in folders], N_MELS)


# what is read


def test_a_few_of_many(tmp_path):
    folders = [write(tmp_path / name, *(0.6 + 0.1 * i for i in range(n))) for name, n in (("a", 8), ("b", 3))]
    few = Corpus([Source(folder) for folder in folders], N_MELS, at_most=4)
    assert [source["clips"] for source in few.described()] == [3, 1]
    assert len(few) == 4
    assert len(read(*folders)) == 11


@pytest.mark.parametrize(
    ("text", "path", "limit"),
    [
        ("speech", "speech", None),
        ("speech:20", "speech", 20),
        ("a:b/manifest.jsonl:7", "a:b/manifest.jsonl", 7),
        ("a:b", "a:b", None),
        ("a:-1", "a:-1", None),
    ],
)
def test_sources(text, path, limit):
    source = Source.parse(text)
    assert (str(source.path), source.limit) == (path, limit)


@settings(max_examples=50, deadline=None)
@given(n_samples=st.integers(0, 70 * SAMPLE_RATE))
def test_pieces(n_samples):
    audio = np.arange(n_samples, dtype=np.float32)
    pieces = corpus.pieces(audio)
    if n_samples < 0.5 * SAMPLE_RATE:
        assert pieces == []
    else:
        assert np.array_equal(np.concatenate(pieces), audio)
        lengths = [len(piece) for piece in pieces]
        assert max(lengths) <= 20 * SAMPLE_RATE
        assert max(lengths) - min(lengths) <= 1
        assert (len(pieces) - 1) * 20 * SAMPLE_RATE < n_samples


def test_a_folder_is_searched_for_audio_of_every_kind(tmp_path):
    write(tmp_path, 1.0)
    write(tmp_path / "deep" / "deeper", 1.5, suffix=".flac")
    write(tmp_path / "loud", 2.0, suffix=".OGG")
    (tmp_path / "notes.txt").write_text("not audio")
    found = read(tmp_path)
    assert [round(len(clip) * HOP_LENGTH / SAMPLE_RATE, 1) for clip in found.by_language["unknown"]] == [1.0, 1.5, 2.0]
    assert found.described() == [{"name": tmp_path.name, "clips": 3, "seconds": 4.5}]


def test_a_manifest_says_which_language_is_spoken(tmp_path):
    folder = write_manifest(tmp_path / "set", en=[2.0, 1.0], de=[1.5])
    for found in (read(folder), read(folder / "manifest.jsonl")):
        assert {name: [len(clip) for clip in clips] for name, clips in found.by_language.items()} == {
            "en": [100, 200],
            "de": [150],
        }


def test_only_the_first_of_a_source(tmp_path):
    folder = write(tmp_path / "first", 1.0, 2.0, 3.0)
    seen = []
    found = Corpus([Source(folder, 2), Source(write(tmp_path / "second", 1.2))], N_MELS, seen.append)
    assert [len(clip) for clip in found.by_language["unknown"]] == [100, 120, 200]
    assert seen == ["000", "001", "000"]
    assert found.described() == [
        {"name": "first", "clips": 2, "seconds": 3.0},
        {"name": "second", "clips": 1, "seconds": 1.2},
    ]


def test_what_is_long_is_cut_and_what_is_too_short_left_out(tmp_path):
    found = read(write(tmp_path / "set", 25.0, 0.3, 1.0))
    assert [len(clip) for clip in found.by_language["unknown"]] == [100, 1250, 1250]


def test_other_rates_and_channels(tmp_path):
    audio = to_float32(toy.babble(1.0))
    wide = soxr.resample(audio, SAMPLE_RATE, 44_100)
    soundfile.write(tmp_path / "wide.wav", np.stack([0.7 * wide, 1.3 * wide], 1), 44_100, subtype="FLOAT")
    heard = speechset.audio(tmp_path / "wide.wav")
    assert abs(len(heard) - len(audio)) <= 1
    n = min(len(heard), len(audio)) - 500
    assert np.abs(heard[500:n] - audio[500:n]).max() < 0.05
    assert np.corrcoef(heard[:n], audio[:n])[0, 1] > 0.99


# how batches are drawn


def silent_clips(*lengths):
    return [torch.full((n, N_MELS), float(SILENCE)) for n in lengths]


def made_of(**lengths):
    """A corpus of clips of these lengths (10 ms), by language."""
    made = Corpus.__new__(Corpus)
    made.by_language = {language: silent_clips(*sorted(lengths[language])) for language in lengths}
    made._weights = [sum(map(len, clips)) ** 0.5 for clips in made.by_language.values()]
    return made


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(50, 400), min_size=1, max_size=20),
    budget=st.integers(100, 1500),
    silence=st.integers(0, 100),
    seed=st.integers(0, 999),
)
def test_a_batch_stays_within_its_budget(lengths, budget, silence, seed):
    made = made_of(en=lengths)
    batch = made.batch(random.Random(seed), budget, silence)
    padded = len(batch) * (max(map(len, batch)) // 2 + silence)
    assert padded <= budget or len(batch) == 1
    first = next(i for i, clip in enumerate(made.by_language["en"]) if clip is batch[0])
    *drawn, following = [*made.by_language["en"], None][first : first + len(batch) + 1]
    assert all(clip is neighbour for clip, neighbour in zip(batch, drawn, strict=True))  # in length
    assert following is None or (len(batch) + 1) * (len(following) // 2 + silence) > budget  # there was no more room


def test_a_batch_is_of_one_language_and_the_same_for_the_same_seed():
    made = made_of(en=range(100, 200), de=range(201, 301))
    for seed in range(20):
        lengths = [len(clip) for clip in made.batch(random.Random(seed), 2000, 50)]
        assert max(lengths) < 200 or min(lengths) > 200
        assert lengths == [len(clip) for clip in made.batch(random.Random(seed), 2000, 50)]


def test_a_small_language_is_drawn_more_often_than_its_share(tmp_path):
    found = read(write_manifest(tmp_path / "set", en=[3.0] * 12, de=[1.0] * 4))
    rng = random.Random(1)
    drawn = Counter(len(found.batch(rng, 10, 0)[0]) for _ in range(1000))
    share = 4 * 1.0 / (12 * 3.0 + 4 * 1.0)
    assert drawn[100] / 1000 == pytest.approx((4 * 1.0) ** 0.5 / ((12 * 3.0) ** 0.5 + (4 * 1.0) ** 0.5), abs=0.04)
    assert drawn[100] / 1000 > 2 * share


def test_what_is_held_out_is_not_trained_on(tmp_path):
    found = read(write(tmp_path / "set", *(0.6 + 0.02 * i for i in range(40))))
    held_out = [clip for batch in found.held_out for clip in batch]
    assert [len(batch) for batch in found.held_out] == [4, 4, 4]
    assert len(found.by_language["unknown"]) == 40 - 12
    kept = {len(clip) for clip in found.by_language["unknown"]}
    assert not kept & {len(clip) for clip in held_out}
    assert all(max(map(len, batch)) - min(map(len, batch)) <= 3 * 2 for batch in found.held_out)  # of like length


def test_of_few_recordings_none_is_held_back(tmp_path):
    found = read(write(tmp_path / "set", 1.0, 2.0))
    assert [len(batch) for batch in found.held_out] == [2, 2, 2]
    assert len(found.by_language["unknown"]) == 2


# refusals


def write_nan(path):
    soundfile.write(path, np.full(SAMPLE_RATE, np.nan, np.float32), SAMPLE_RATE, subtype="FLOAT")


@pytest.mark.parametrize(
    ("prepare", "reason"),
    [
        (lambda folder: None, "set: no such folder or manifest.jsonl"),
        (lambda folder: folder.mkdir(), "set: holds neither a manifest.jsonl nor audio (.flac, "),
        (lambda folder: (write(folder, 1.0) / "bad.wav").write_text("noise" * 99), "bad.wav: cannot be read: "),
        (lambda folder: (write(folder, 1.0) / "bad.wav").touch(), "bad.wav: cannot be read: "),
        (lambda folder: (write(folder, 1.0) / "bad.wav").mkdir(), "bad.wav: cannot be read: "),
        (lambda folder: write_nan(write(folder, 1.0) / "bad.wav"), "bad.wav: cannot be trained on: some samples are"),
        (lambda folder: write(folder, 0.4, 0.1), "set: too little audio to train on: no recording is 0.5 s long"),
        (lambda folder: (write(folder, 1.0) / "manifest.jsonl").write_text("{}"), "manifest.jsonl: line 1: "),
        (lambda folder: (write(folder, 1.0) / "manifest.jsonl").write_text(""), "manifest.jsonl: names no clips"),
    ],
)
def test_audio_that_cannot_be_trained_on(tmp_path, prepare, reason):
    prepare(tmp_path / "set")
    with pytest.raises(ConfigError) as error:
        read(tmp_path / "set")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_none_of_a_source(tmp_path):
    with pytest.raises(ConfigError, match="too little audio to train on"):
        Corpus([Source.parse(f"{write(tmp_path / 'set', 1.0)}:0")], N_MELS)


def test_a_missing_folder_is_noticed_before_anything_is_read(tmp_path):
    seen = []
    with pytest.raises(ConfigError, match="gone: no such folder"):
        Corpus([Source(write(tmp_path / "set", 1.0)), Source(tmp_path / "gone")], N_MELS, seen.append)
    assert seen == []

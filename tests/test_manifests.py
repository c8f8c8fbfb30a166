"""Sets to fine-tune on: in which forms they may come, how they are split, and that all that is wrong is said at once."""

import csv
import json

import msgspec
import numpy as np
import pytest
import soundfile
import toy

from convert import manifests
from convert.manifests import Data, Utterance
from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import ConfigError

SPEAKERS = ("ann", "bob", "cat", "dan", "eve")


def write_set(folder, n=5, rate=SAMPLE_RATE, **changes):
    """A set of n recordings, each of another speaker; `changes` are columns for all."""
    (folder / "audio").mkdir(parents=True)
    rows = []
    for i in range(n):
        name = f"audio/{folder.name}{i}.wav"
        soundfile.write(folder / name, toy.babble(0.6 + i / 10, i), rate)
        row = {"id": f"{folder.name}{i}", "audio": name, "text": f"word {i}", "speaker": SPEAKERS[i % len(SPEAKERS)]}
        rows.append(row | changes)
    write_rows(folder, rows)
    return folder


def write_rows(folder, rows):
    (folder / "manifest.jsonl").write_text("\n".join(map(json.dumps, rows)))


def read_rows(folder):
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def ids(data):
    return [one.id for one in manifests.read(data)]


def test_a_manifest_is_read(tmp_path):
    folder = write_set(tmp_path / "a", 2)
    expected = Utterance("a0", folder / "audio/a0.wav", "word 0", "en", "ann")
    for path in (folder, folder / "manifest.jsonl"):
        assert manifests.read(Data(str(path)))[0] == expected
    assert manifests.read(Data(str(folder), language="de"))[1].language == "de"


def test_a_path_may_name_the_environment(tmp_path, monkeypatch):
    write_set(tmp_path / "a", 1)
    monkeypatch.setenv("MY_SPEECH", str(tmp_path))
    assert ids(Data("$MY_SPEECH/a")) == ["a0"]


def test_an_audio_folder_of_hugging_face_is_read(tmp_path):
    folder = write_set(tmp_path / "a", 2)
    (folder / "manifest.jsonl").unlink()
    rows = [{"file_name": f"audio/a{i}.wav", "transcription": f"word  {i}\n", "speaker_id": 7 + i} for i in range(2)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    expected = Utterance("a1", folder / "audio/a1.wav", "word 1", "en", "8")
    assert manifests.read(Data(str(folder)))[1] == expected
    (folder / "metadata.jsonl").unlink()
    with (folder / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert manifests.read(Data(str(folder)))[1] == expected


def test_parts_share_no_speaker_and_lose_none(tmp_path):
    folder = write_set(tmp_path / "a", 12)
    parts = [ids(Data(str(folder), (part,), 3)) for part in range(3)]
    assert sorted(id_ for part in parts for id_ in part) == sorted(ids(Data(str(folder))))
    assert parts[0] == ["a0", "a3", "a5", "a8", "a10"]  # ann and dan
    assert ids(Data(str(folder), (1, 2), 3)) == [x for x in ids(Data(str(folder))) if x in parts[1] + parts[2]]
    assert ids(Data(str(folder), (0,), 3, limit=2)) == ["a0", "a3"]


def test_without_speakers_parts_are_of_recordings(tmp_path):
    folder = write_set(tmp_path / "a", 4, speaker=None)
    assert ids(Data(str(folder), (1,), 2)) == ["a1", "a3"]


@pytest.mark.parametrize("wrong", [{"parts": [2], "n_parts": 2}, {"parts": [-1]}, {"n_parts": 0}, {"limit": 0}])
def test_a_part_that_cannot_be(wrong):
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert({"path": "a", **wrong}, Data)


def test_what_is_no_set(tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    for path, reason in ((folder, "holds none of manifest.jsonl"), (tmp_path / "gone", "no such folder or manifest")):
        with pytest.raises(ConfigError, match=reason):
            manifests.read(Data(str(path)))
    for text, reason in (("{", "line 1: Input data"), ('\n{"id": "a"}', "line 2: has neither audio nor file_name")):
        (folder / "manifest.jsonl").write_text(text)
        with pytest.raises(ConfigError, match=reason):
            manifests.read(Data(str(folder)))
    (folder / "manifest.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        manifests.read(Data(str(folder)))


def test_everything_wrong_with_a_set_is_said_at_once(tmp_path):
    folder = write_set(tmp_path / "a", 10)
    rows = read_rows(folder)
    (folder / rows[0]["audio"]).unlink()
    rows[1]["text"] = " "
    rows[3]["id"] = rows[2]["id"]
    for row, audio, rate in (
        (rows[4], np.zeros(29 * 8000), 8000),
        (rows[5], np.zeros(9000), 4000),
        (rows[6], np.zeros(100), SAMPLE_RATE),
    ):
        soundfile.write(folder / row["audio"], audio, rate)
    (folder / rows[7]["audio"]).write_text("noise" * 99)
    write_rows(folder, rows)
    found = manifests.problems("train", manifests.read(Data(str(folder))))
    assert found == [
        "train: 1 audio files are missing: a0.wav",
        "train: 1 have no text: a1",
        "train: 1 ids occur more than once: a2",
        "train: 1 are longer than 28 s, which is what fits into Whisper's window: cut them: a4.wav",
        "train: 1 have fewer than 8,000 samples per second (other rates are resampled to 16,000): a5.wav",
        "train: 1 are shorter than 0.1 s: a6.wav",
        "train: 1 are no audio that can be read: a7.wav",
    ]


def test_a_good_set_has_no_problems_and_an_empty_one_has(tmp_path):
    found = manifests.read(Data(str(write_set(tmp_path / "a", rate=8000))))
    assert manifests.problems("train", found) == []
    assert manifests.resampled(found) == {"8000": 5}
    assert manifests.problems("train", []) == ["train: names no recordings"]


def test_a_long_list_is_cut(tmp_path):
    found = manifests.read(Data(str(write_set(tmp_path / "a", 7, text=""))))
    assert manifests.problems("dev", found) == ["dev: 7 have no text: a0, a1, a2, a3, a4, ..."]


def test_what_two_sets_share(tmp_path):
    a = manifests.read(Data(str(write_set(tmp_path / "a", 3))))
    b = manifests.read(Data(str(write_set(tmp_path / "b", 2))))
    shared = "train and dev share 2 speakers: ann, bob"
    assert manifests.overlaps("train", a, "dev", b, speakers=True) == [shared]
    assert manifests.overlaps("train", a, "dev", b, speakers=False) == []
    assert manifests.overlaps("train", a, "dev", a[:1], speakers=False) == ["train and dev share 1 ids: a0"]
    nameless = [msgspec.structs.replace(one, speaker=None) for one in a]
    assert manifests.overlaps("train", nameless, "dev", b, speakers=True) == []


def test_languages_that_a_checkpoint_does_not_know(tmp_path):
    found = manifests.read(Data(str(write_set(tmp_path / "a", 2)), language="xx"))
    assert manifests.unknown_languages("train", found, ["en"]) == [
        "train: 1 languages are unknown to the checkpoint: xx"
    ]
    assert manifests.unknown_languages("train", found, ["en", "xx"]) == []


def test_noise_is_a_manifest_or_a_folder(tmp_path):
    folder = write_set(tmp_path / "a", 4, text=None, speaker=None)
    listed = manifests.audio_files([Data(str(folder), (0,), 2)])
    assert [path.name for path in listed] == ["a0.wav", "a2.wav"]
    found = manifests.audio_files([Data(str(folder / "audio"), (0,), 2), Data(str(folder / "audio"), (1,), 2, 1)])
    assert [path.name for path in found] == ["a0.wav", "a2.wav", "a1.wav"]
    assert manifests.files(Data(str(folder), (0,), 2)) == [folder / "manifest.jsonl", *listed]
    assert manifests.files(Data(str(folder / "audio"), (0,), 2)) == listed
    (folder / "audio" / "a2.wav").unlink()
    with pytest.raises(ConfigError, match=r"1 audio files are missing: a2\.wav"):
        manifests.audio_files([Data(str(folder))])
    (tmp_path / "bare").mkdir()
    with pytest.raises(ConfigError, match="holds no audio"):
        manifests.audio_files([Data(str(tmp_path / "bare"))])

"""Sets of recordings, and `whisperlet-convert evaluate` from end to end on the toy."""

import itertools
import json
import os

import numpy as np
import pytest
import soundfile
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from agent import transcriber
from agent.config import RecogniserConfig, VadConfig
from agent.vad import segments
from convert import evaluate, model, playing, scoring, speechset
from convert.__main__ import app
from convert.playing import one_utterance
from whisperlet.errors import ConfigError

# ---- sets of recordings


def speech_set(folder, *entries):
    """Write clips given as (id, PCM, text, keys); returns the folder."""
    with (folder / "manifest.jsonl").open("w") as file:
        for name, pcm, text, *more in entries:
            soundfile.write(folder / f"{name}.flac", pcm, 16_000)
            line = {"id": name, "audio": f"{name}.flac", "text": text, "duration_s": len(pcm) / 16_000, "other": 1}
            file.write(json.dumps(line | (more[0] if more else {})) + "\n\n")
    return folder


BLIP = toy.babble(0.3)


def test_read(tmp_path):
    folder = speech_set(tmp_path, ("a", BLIP, "x"), ("b", toy.babble(1.0), None, {"language": "zh"}), ("c", BLIP, "z"))
    clips = speechset.read(folder)
    assert [(clip.id, clip.text, clip.language) for clip in clips] == [
        ("a", "x", "en"),
        ("b", None, "zh"),
        ("c", "z", "en"),
    ]
    assert all(clip.audio.is_file() for clip in clips)
    assert speechset.read(folder / "manifest.jsonl") == clips
    assert speechset.read(folder, 2) == clips[:2]
    assert speechset.read(folder, 2, max_s=0.5) == [clips[0], clips[2]]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "names no clips"),
        ('{"id": "a", "audio": "a.flac"}\n{"id": 7, "audio": "b"}', "line 2: .*`str`, got `int`"),
        ('{"id": "a"}', "line 1: .*audio"),
        ("text", "line 1: "),
        (
            '{"id": "a", "audio": "a.flac"}\n{"id": "b", "audio": "b.flac"}',
            r"2 audio files are missing: a\.flac, b\.flac",
        ),
    ],
)
def test_manifests_that_are_wrong(tmp_path, content, reason):
    (tmp_path / "manifest.jsonl").write_text(content)
    with pytest.raises(ConfigError, match=rf"manifest\.jsonl: {reason}"):
        speechset.read(tmp_path)


def test_no_manifest(tmp_path):
    with pytest.raises(ConfigError, match=r"manifest\.jsonl: cannot be read"):
        speechset.read(tmp_path)


def test_the_sets_of_recordings_can_be_read(speech_dir):
    for name in ("en_read_dev", "zh_read", "en_commands"):
        assert speechset.read(speech_dir / name, 5)


# ---- clips into segments

VAD = VadConfig(max_segment_s=5, cut_window_s=2)
LOUD = np.random.default_rng(0).integers(-9000, 9000, 40 * 16_000).astype(np.int16)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, len(LOUD)))
def test_one_utterance_loses_nothing(n):
    found = list(one_utterance(LOUD[:n], [], VAD))
    assert [segment.segment for segment in found] == list(range(len(found)))
    assert {segment.utterance for segment in found} == {1}
    assert (found[0].start, found[-1].speech_end) == (0, n)
    assert all(a.speech_end == b.start for a, b in itertools.pairwise(found))
    assert all(0 < segment.speech_end - segment.start <= 5 * 16_000 for segment in found)
    assert all(segment.speech_end <= segment.decision <= n for segment in found)
    assert [segment.continues for segment in found] == [True] * (len(found) - 1) + [False]


def test_a_long_clip_is_cut_where_it_is_quiet():
    pcm = LOUD[: 8 * 16_000].copy()
    pcm[4 * 16_000 : 4 * 16_000 + 4000] = 0
    first, second = one_utterance(pcm, [], VAD)
    assert 4 * 16_000 <= first.speech_end <= 4 * 16_000 + 4000
    assert second.speech_end == len(pcm)


def test_one_utterance_ends_where_the_gate_heard_it_end(clips):
    pcm = soundfile.read(clips[2], dtype="int16")[0]
    heard = np.concatenate([pcm, np.zeros(24_000, np.int16)])
    found = list(segments(heard, VadConfig()))
    whole = list(one_utterance(pcm, found, VadConfig()))
    assert len(whole) == 1
    assert (whole[0].start, whole[0].speech_end, whole[0].decision) == (0, found[-1].speech_end, found[-1].decision)
    assert whole[0].speech_end <= whole[0].decision <= len(heard)


# ---- the command


@pytest.fixture
def run(tmp_path, weight_caches, monkeypatch):
    def invoke(model, folder, *options):
        monkeypatch.setenv("XDG_CACHE_HOME", str(weight_caches))
        out = tmp_path / "result.json"
        arguments = ["evaluate", str(model), str(folder), "--threads", "1", "--json", str(out), *options]
        result = CliRunner().invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0, result.output
        assert "word error rate" in result.output
        return json.loads(out.read_text())

    return invoke


def in_process(toy_bundle, litert, *clips, **config):
    ears = transcriber.build(toy_bundle, litert, RecogniserConfig(**config))
    texts = []
    for pcm in clips:
        ears.feed(transcriber.whole(pcm))
        texts.append(ears.finish().text)
    return texts


def test_evaluate(run, tmp_path, toy_path, toy_bundle, litert):
    clips = [toy.babble(0.9, seed) for seed in (0, 4, 8)]
    texts = in_process(toy_bundle, litert, *clips)
    assert len(set(texts)) == 3
    entries = [
        (f"clip{i}", pcm, text) for i, (pcm, text) in enumerate(zip(clips, ("some words", None, "more"), strict=True))
    ]
    found = run(toy_path, speech_set(tmp_path, *entries))
    assert (found["n"], found["n_without_text"], found["audio_s"]) == (3, 1, 2.7)
    assert found["bundle_bytes"] == toy_path.stat().st_size
    assert [(u["id"], u["ref"], u["hyp"], u["duration_s"]) for u in found["utterances"]] == [
        ("clip0", "some words", texts[0], 0.9),
        ("clip1", None, texts[1], 0.9),
        ("clip2", "more", texts[2], 0.9),
    ]
    assert [u["finalise_ms"] for u in found["utterances"]] == [None] * 3
    assert found["finalise_ms"] is found["end_to_final_ms"] is None
    pairs = [
        (scoring.normalise(u["ref"], "en"), scoring.normalise(u["hyp"], "en")) for u in found["utterances"] if u["ref"]
    ]
    assert found["wer"] == pytest.approx(scoring.word_error_rate(pairs), abs=0.01)
    assert found["cer"] == pytest.approx(scoring.character_error_rate(pairs), abs=0.01)
    assert 0 < found["core_s_per_audio_s"] < 10
    assert 20 < found["rss_mb"] < 2000
    assert f"{os.cpu_count()} x " in found["machine"]
    assert found["threads"] == 1
    assert found["model"] == "toy.tflite"


def test_a_clip_of_minutes_waits_for_the_engine(tmp_path, toy_path, monkeypatch, caplog):
    """Its segments come at once, more than the agent keeps for an engine that is behind."""
    folder = speech_set(tmp_path, ("a", np.tile(LOUD, 4), None))
    monkeypatch.setattr(evaluate, "_config", lambda language, _: RecogniserConfig(language=language, max_backlog_s=30))
    evaluate.evaluate_bundle(toy_path, speechset.read(folder), evaluate.Options())
    assert "speech_dropped" not in caplog.text


def test_clips_of_several_languages_keep_their_order(run, tmp_path, toy_path, toy_bundle, litert):
    clips = [toy.babble(0.9, seed) for seed in range(3)]
    languages = ["haw", "en", "haw"]
    entries = [
        (f"clip{i}", pcm, "a", {"language": language})
        for i, (pcm, language) in enumerate(zip(clips, languages, strict=True))
    ]
    folder = speech_set(tmp_path, *entries)
    found = run(toy_path, folder)["utterances"]
    expected = [
        in_process(toy_bundle, litert, pcm, language=language)[0]
        for pcm, language in zip(clips, languages, strict=True)
    ]
    assert [(u["id"], u["language"], u["hyp"]) for u in found] == [
        (f"clip{i}", language, text) for i, (language, text) in enumerate(zip(languages, expected, strict=True))
    ]
    detected = run(toy_path, folder, "--detect-language", "--limit", "2")["utterances"]
    assert [u["hyp"] for u in detected] == in_process(toy_bundle, litert, *clips[:2], language="auto")


def test_segment(run, tmp_path, toy_path, toy_bundle, litert, clips):
    """Two sentences with a pause too long to hear them together: one utterance as a clip, two for the gate."""
    spoken = soundfile.read(clips[2], dtype="int16")[0]
    pcm = np.concatenate([spoken, np.zeros(48_000, np.int16), spoken[:20_000], np.zeros(16_000, np.int16)])
    found = list(segments(np.concatenate([pcm, np.zeros(playing.TAIL, np.int16)]), VadConfig()))
    assert len(found) == 2
    texts = in_process(toy_bundle, litert, *(pcm[s.start : s.speech_end] for s in found), pcm)
    folder = speech_set(tmp_path, ("a", pcm, "x"))
    assert run(toy_path, folder, "--segment")["utterances"][0]["hyp"] == " ".join(filter(None, texts[:2]))
    whole = run(toy_path, folder, "--no-join")
    assert whole["utterances"][0]["hyp"] == texts[2]
    assert whole["options"]["join"] is False


@pytest.mark.parametrize(("join", "pause_ms"), [(True, RecogniserConfig().join_pause_ms), (False, 0)])
def test_pieces_are_heard_together_or_not(toy_folder, join, pause_ms):
    """In the bundle as in the checkpoint."""
    options = evaluate.Options(join=join)
    assert evaluate._config("en", options).join_pause_ms == pause_ms
    checkpoint = model.load_directory(toy_folder / "checkpoint", "toy")
    assert evaluate._reference(checkpoint, "en", options).config.join_pause_ms == pause_ms


def test_pace(run, tmp_path, toy_path, clips):
    """In real time there are latencies: from the decision of the gate, and from the last voiced sample before it."""
    spoken = soundfile.read(clips[2], dtype="int16")[0]
    found = run(toy_path, speech_set(tmp_path, ("a", spoken, "x")), "--pace")
    clip = found["utterances"][0]
    assert 0 < clip["finalise_ms"] < clip["end_to_final_ms"] - 450  # the hang-over lies between
    assert clip["end_to_final_ms"] < 5000
    assert 0 < clip["first_word_ms"] < 1e3 * clip["duration_s"]
    assert found["first_word_ms"] == {"p50": clip["first_word_ms"], "p95": clip["first_word_ms"]}
    assert found["finalise_ms"] == {"p50": clip["finalise_ms"], "p95": clip["finalise_ms"]}
    assert found["options"]["pace"] is True


def test_the_checkpoint_itself(run, tmp_path, toy_folder):
    found = run(toy_folder / "checkpoint", speech_set(tmp_path, ("a", toy.babble(0.9), "one two")))
    assert (found["n"], found["audio_s"]) == (1, 0.9)
    assert found["utterances"][0]["hyp"]
    assert found["bundle_bytes"] is found["rss_mb"] is None
    assert found["core_s_per_audio_s"] > 0
    assert found["wer"] is not None


@pytest.mark.bundle
def test_the_real_bundle_understands_english(run, tmp_path, real_bundle, clips):
    pcm = soundfile.read(clips[2], dtype="int16")[0]
    found = run(real_bundle.path, speech_set(tmp_path, ("a", pcm, "He could wait no longer.")))
    assert found["wer"] == 0

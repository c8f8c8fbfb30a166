"""The commands as a user meets them: bad input ends with one sentence and exit code 2, odd input is heard."""

import os
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
import soundfile
import soxr

from convert import disk
from whisperlet import bundle as bundles
from whisperlet.audio import SAMPLE_RATE

CLIP = Path(__file__).parent.parent / "demo/speech/1089-134691-0000.flac"
WORDS = "he could wait no longer"


def run(command, *arguments, cwd, **environment):
    """A command of ours, in a folder of its own."""
    program = Path(sys.executable).with_name(command)
    settings = {"XDG_CACHE_HOME": str(cwd.with_name("cache")), "WHISPERLET_LOG": "WARNING", **environment}
    return subprocess.run(
        [program, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def refusal(command, *arguments, cwd, **environment):
    """The one sentence a command ends with; it must have left nothing behind."""
    before = set(cwd.rglob("*"))
    done = run(command, *arguments, cwd=cwd, **environment)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    *bars, sentence = done.stderr.splitlines()
    assert all(re.fullmatch(r"load +━+ .*", bar) for bar in bars)  # of a build, which has begun then
    assert sentence.startswith(f"{command}: ")
    left = {path for path in cwd.rglob("*") if path.is_file() and "__pycache__" not in path.parts} - before
    assert left == set()
    return sentence.removeprefix(f"{command}: ")


# bundles


def truncate(source, target):
    data = source.path.read_bytes()
    target.write_bytes(data[: len(data) // 2])


def cut_the_last_byte(source, target):
    target.write_bytes(source.path.read_bytes()[:-1])


def flip_a_weight(source, target):
    data = bytearray(source.path.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(data)


def flip_the_tokenizer(source, target):
    data = bytearray(source.path.read_bytes())
    data[source.manifest.model_bytes + 2000] ^= 1
    target.write_bytes(data)


def make_it_of_tomorrow(source, target):
    model = target.with_suffix(".model")
    model.write_bytes(source.path.read_bytes()[: source.manifest.model_bytes])
    manifest = msgspec.structs.replace(source.manifest, format_version=bundles.FORMAT_VERSION + 1)
    bundles.write(target, model, manifest, source.tokenizer_json)


def leave_only_the_model(source, target):
    target.write_bytes(source.path.read_bytes()[: source.manifest.model_bytes])


@pytest.mark.bundle
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "truncated"),
        (cut_the_last_byte, "truncated|damaged"),
        (flip_a_weight, "damaged"),
        (flip_the_tokenizer, "damaged"),
        (make_it_of_tomorrow, f"format version {bundles.FORMAT_VERSION + 1}"),
        (leave_only_the_model, "not a whisperlet bundle"),
        (lambda _, target: target.write_text("not a model"), "not a whisperlet bundle"),
        (lambda _, target: target.touch(), "not a whisperlet bundle"),
        (lambda _, target: target.mkdir(), "Is a directory"),
        (lambda *_: None, "No such file"),
    ],
)
def test_a_bundle_that_cannot_be_used(real_bundle, tmp_path, damage, reason):
    path = tmp_path / "bad.tflite"
    damage(real_bundle, path)
    for command in (
        ["whisperlet-agent", "transcribe", CLIP, "--bundle", path],
        ["whisperlet-convert", "inspect", path],
    ):
        sentence = refusal(*command, cwd=tmp_path)
        assert sentence.startswith(f"{path}: ")
        assert re.search(reason, sentence)


def test_nothing_to_inspect(tmp_path):
    (tmp_path / "bad.tflite").write_text("not a model")
    assert "not a whisperlet bundle" in refusal("whisperlet-convert", "inspect", "bad.tflite", cwd=tmp_path)


@pytest.mark.parametrize("arguments", [["transcribe", CLIP], ["run", "--source", CLIP]])
def test_no_bundle(tmp_path, arguments):
    assert refusal("whisperlet-agent", *arguments, cwd=tmp_path).startswith("recogniser.bundle: is not set; ")


# audio


def write_nan(path):
    pcm = np.zeros(SAMPLE_RATE, np.float32)
    pcm[-1] = np.nan
    soundfile.write(path, pcm, SAMPLE_RATE, subtype="FLOAT")


@pytest.mark.bundle
@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.touch(), "the file is empty"),
        (lambda path: soundfile.write(path, np.zeros(0), SAMPLE_RATE), "only a header"),
        (lambda path: path.write_text("hello " * 100), "not an audio file"),
        (write_nan, "not numbers"),
        (lambda path: path.mkdir(), "no audio file in this directory"),
    ],
)
def test_audio_that_cannot_be_used(real_bundle, tmp_path, write, reason):
    path = tmp_path / "bad.wav"
    write(path)
    sentence = refusal("whisperlet-agent", "transcribe", path, "--bundle", real_bundle.path.absolute(), cwd=tmp_path)
    assert sentence.startswith(f"{path}: ")
    assert reason in sentence


def telephone(pcm):
    return soxr.resample(pcm, SAMPLE_RATE, 8_000), 8_000


def compact_disc(pcm):
    wide = soxr.resample(pcm, SAMPLE_RATE, 44_100)
    return np.stack([0.7 * wide, 0.3 * wide], axis=1), 44_100


@pytest.mark.bundle
@pytest.mark.parametrize("convert", [telephone, compact_disc])
def test_other_rates_and_channels_give_the_same_words(real_bundle, tmp_path, convert):
    pcm, rate = convert(soundfile.read(CLIP, dtype="float32")[0])
    soundfile.write(tmp_path / "clip.wav", pcm, rate)
    done = run("whisperlet-agent", "transcribe", "clip.wav", "--bundle", real_bundle.path.absolute(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    name, _, text = done.stdout.partition(": ")
    assert name == "clip.wav"
    assert re.sub(r"[^a-z ]", "", text.strip().lower()) == WORDS


# configuration


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[vad]\nstrat_ms = 100", "vad.strat_ms: unknown key"),
        ('[vad]\nstart_ms = "soon"', "vad.start_ms: Expected `int`, got `str`"),
        ("[vad]\nstart_ms = 5", "vad.start_ms: Expected `int` >= 20"),
        ("[vad", "is not TOML"),
        ('[mqtt]\nurl = "mqtt://broker:port"', "mqtt.url: 'mqtt://broker:port' is not"),
        (
            '[mqtt]\nurl = "mqtt://me:geheim@broker:port"',
            "mqtt.url: wants HOST[:PORT]; a login goes into mqtt.username",
        ),
    ],
)
@pytest.mark.parametrize("arguments", [["transcribe", CLIP], ["run", "--source", CLIP]])
def test_a_wrong_configuration(tmp_path, text, reason, arguments):
    path = tmp_path / "agent.toml"
    path.write_text(text)
    sentence = refusal("whisperlet-agent", *arguments, "--config", path, cwd=tmp_path)
    assert sentence.startswith(f"{path}: {reason}")


def test_a_wrong_level_of_the_log(tmp_path):
    assert refusal("whisperlet-agent", "doctor", cwd=tmp_path, WHISPERLET_LOG="loud").startswith(
        "WHISPERLET_LOG: 'loud'"
    )


# microphone


def stand_in(folder, source):
    """A folder for PYTHONPATH that holds a made-up PyAudio."""
    folder.mkdir()
    (folder / "pyaudio.py").write_text(source)
    return str(folder)


NO_DEVICES = """
class PyAudio:
    def get_device_count(self):
        return 0

    def terminate(self):
        pass
"""


@pytest.mark.bundle
@pytest.mark.parametrize(
    ("pyaudio", "reason"),
    [
        ("raise ImportError('no pyaudio here')", "PyAudio is not installed: pip install 'whisperlet[mic]'"),
        (NO_DEVICES, "this machine has no audio input device"),
    ],
)
def test_no_microphone(real_bundle, tmp_path, pyaudio, reason):
    path = stand_in(tmp_path / "stub", pyaudio)
    arguments = ["run", "--source", "mic", "--bundle", real_bundle.path.absolute()]
    assert reason in refusal("whisperlet-agent", *arguments, cwd=tmp_path, PYTHONPATH=path)


# recipes and checkpoints


@contextmanager
def building(tmp_path, source, out):
    """A build of a toy that has begun to work."""
    recipe = tmp_path / "toy.toml"
    recipe.write_text(RECIPE.format(source=source))
    program = Path(sys.executable).with_name("whisperlet-convert")
    with subprocess.Popen([program, "build", recipe, "--out", out], stdout=subprocess.DEVNULL) as build:
        deadline_s = time.monotonic() + 60
        while not list(out.glob(".work-*/*")) and time.monotonic() < deadline_s:  # what it works on lies there
            time.sleep(0.05)
        yield build


def test_a_build_that_is_told_to_end_tidies_up(tmp_path, folder):
    out = tmp_path / "build"
    with building(tmp_path, folder, out) as build:
        build.terminate()
    assert build.returncode in {1, 130}
    assert list(out.iterdir()) == []


def test_what_a_killed_build_left_goes_with_the_next(tmp_path, folder):
    out = tmp_path / "build"
    with building(tmp_path, folder, out) as build:
        (busy,) = out.glob(".work-*")
        with disk.workplace(out) as mine:
            assert set(out.iterdir()) == {busy, mine}  # nobody takes away what is worked on
        build.kill()
    assert list(out.iterdir()) == [busy]
    with disk.workplace(out) as mine:
        assert list(out.iterdir()) == [mine]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("huge_wi1", "huge_wi1: no such recipe; there are base_domain_example, "),
        ("missing.toml", "missing.toml: cannot be read: No such file"),
    ],
)
def test_an_unknown_recipe(tmp_path, recipe, reason):
    assert refusal("whisperlet-convert", "build", recipe, "--out", "build", cwd=tmp_path).startswith(reason)


RECIPE = """source = "{source}"
stages = [{{ stage = "export" }}, {{ stage = "quantise" }}, {{ stage = "package", silence_frames = {{ default = 64 }} }}]
"""


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"config.json": '{"model_type": "bert"}'}, "model is not a Whisper"),
        ({"config.json": "not JSON"}, "model/config.json is not JSON"),
        ({}, "model is no checkpoint"),
    ],
)
def test_a_model_that_is_not_whisper(tmp_path, files, reason):
    model = tmp_path / "model"
    model.mkdir()
    for name, text in files.items():
        (model / name).write_text(text)
    (tmp_path / "mine.toml").write_text(RECIPE.format(source=model))
    sentence = refusal("whisperlet-convert", "build", "mine.toml", "--out", "build", cwd=tmp_path)
    assert sentence.startswith(reason)


def test_a_set_of_recordings_that_is_not_there(tmp_path):
    sentence = refusal("whisperlet-convert", "evaluate", "none.tflite", tmp_path / "none", cwd=tmp_path)
    assert str(tmp_path / "none") in sentence

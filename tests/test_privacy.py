"""What the microphone hears stays in memory: no file that the agent writes holds audio, nor any it does not need."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import toy

CLIP = toy.REPOSITORY / "demo/speech/1089-134691-0000.flac"
HOOK = """
import os, sys
log = os.open(os.environ["OPENED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def note(event, arguments):
    if event != "open" or isinstance(arguments[0], int):  # a descriptor was opened, and noted, by its path before
        return
    if isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        os.write(log, os.fsencode(str(arguments[0])) + b"\\n")

sys.addaudithook(note)
"""
HARMLESS = ("/dev/null", "/dev/tty", "/proc/")


def loud_pieces(pcm, size=64):
    """Stretches of the clip that no file would hold by chance, as bytes, in the forms that audio has in here."""
    for start in np.argsort([-np.abs(part.astype(int)).sum() for part in np.array_split(pcm, len(pcm) // 400)])[:40]:
        piece = pcm[400 * start : 400 * start + size]
        yield piece.tobytes()
        yield (piece.astype(np.float32) / np.float32(32_768)).tobytes()


@pytest.fixture
def ran(toy_path, tmp_path):
    """The agent on a clip, both its processes watched; the folders that it could write to, and what it opened."""
    hook, home = tmp_path / "hook", tmp_path / "home"
    for folder in (hook, home, home / "tmp", home / "work"):
        folder.mkdir()
    (hook / "sitecustomize.py").write_text(HOOK)
    opened = tmp_path / "opened"
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": os.pathsep.join([str(hook), str(toy.REPOSITORY)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "OPENED": str(opened),
    }
    command = [sys.executable, "-m", "agent", "run", "--source", str(CLIP), "--bundle", str(toy_path)]
    command += ["--broker", "mqtt://127.0.0.1:9"]  # nobody listens there
    done = subprocess.run(
        command, env=environment, cwd=home / "work", capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    return home, [Path(line) for line in opened.read_text().splitlines()], done.stderr


def test_no_file_holds_audio(ran):
    home, opened, _ = ran
    pieces = list(loud_pieces(soundfile.read(CLIP, dtype="int16")[0]))
    written = {path for path in [*home.rglob("*"), *opened] if path.is_file()}
    assert written, "the agent keeps its weights and its messages somewhere"
    for path in written:
        contents = path.read_bytes()
        assert not any(piece in contents for piece in pieces), path


def test_only_weights_and_messages_are_written(ran):
    home, opened, said = ran
    outside = [path for path in opened if home not in path.parents and not str(path).startswith(HARMLESS)]
    assert outside == []
    suffixes = {path.suffix for path in home.rglob("*") if path.is_file()}
    assert suffixes <= {".weights", ".xnnpack", ".cache", ".db", ".db-wal", ".db-shm", ".lock", ".json"}, suffixes
    assert not list((home / "tmp").iterdir())
    assert "engine ready" in said or "ready" in said


def test_the_search_finds_audio(tmp_path):
    """Else the first test could not fail."""
    pcm = soundfile.read(CLIP, dtype="int16")[0]
    kept = b"header" + (pcm[:50_000].astype(np.float32) / np.float32(32_768)).tobytes()
    assert any(piece in kept for piece in loud_pieces(pcm))
    assert any(piece in pcm.tobytes() for piece in loud_pieces(pcm))

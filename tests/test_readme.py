"""The README's commands exist, and those that end by themselves are run as they stand there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toy import REPOSITORY

README = (REPOSITORY / "README.md").read_text()
COMMANDS = [
    shlex.split(line, comments=True)
    for line in re.findall(r"^ {4}((?:make|pip|whisperlet-\w+) .*)$", README, re.MULTILINE)
]


def called(program):
    return [command for command in COMMANDS if command[0] == program]


def in_python(command):
    module = command[0].removeprefix("whisperlet-")
    return [sys.executable, "-m", module, *command[1:]]


@pytest.mark.parametrize("command", called("make"), ids=" ".join)
def test_make_has_the_target(command):
    assert re.search(rf"^{command[1]}:", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", called("pip"), ids=" ".join)
def test_the_extra_exists(command):
    extra = re.search(r"\[(\w+)\]", " ".join(command))[1]
    assert re.search(rf"^{extra} = \[", (REPOSITORY / "pyproject.toml").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", called("whisperlet-agent") + called("whisperlet-convert"), ids=" ".join)
def test_the_options_exist(command):
    shown = subprocess.run([*in_python(command[:2]), "--help"], capture_output=True, text=True, check=True).stdout
    assert [option for option in command if option.startswith("--") and option not in shown] == []


@pytest.mark.bundle
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c[1] in {"inspect", "evaluate", "transcribe"}], ids=lambda c: " ".join(c[:2])
)
def test_it_runs(command, real_bundle, clips, tmp_path):
    (tmp_path / "manifest.jsonl").write_text(
        f'{{"id": "a", "audio": "{clips[0]}", "text": "he hoped", "language": "en"}}'
    )
    stands_for = {
        "build/base_wi8.tflite": real_bundle.path,
        "base_wi8.tflite": real_bundle.path,
        "clip.wav": clips[0],
        "scores.json": tmp_path / "scores.json",
        "../shared/speech/en_read_dev": tmp_path,
    }
    words = [str(stands_for.get(word, word)) for word in command]
    done = subprocess.run(in_python(words), capture_output=True, text=True, cwd=Path(tmp_path), check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()

"""What a device gets: the wheel and the `agent` extra, in an environment of its own, far from the checkout."""

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile

REPOSITORY = Path(__file__).parent.parent
CONSTRAINTS = REPOSITORY / "constraints.txt"
PACKAGES = ("whisperlet", "agent", "convert")
CLIP = REPOSITORY / "demo/speech/1089-134691-0000.flac"
TEXT = "He could wait no longer."
AARCH64 = [f"manylinux_2_{minor}_aarch64" for minor in (28, 27, 26, 17)] + ["manylinux2014_aarch64"]

pytestmark = pytest.mark.slow


def run(*command, cwd=None):
    """Run a program that must succeed; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def pip(python, *arguments):
    return run(python, "-m", "pip", "-qq", "--no-input", "--disable-pip-version-check", *arguments)


def pinned(*names):
    """The requirements for these distributions, as constraints.txt has them."""
    pins = dict(re.findall(r"^([\w.-]+)(==\S+)$", CONSTRAINTS.read_text(), re.MULTILINE))
    return [name + pins[name] for name in names]


def environment(folder):
    """Interpreter of a fresh environment."""
    run(sys.executable, "-m", "venv", folder)
    return str(folder / "bin/python")


@pytest.fixture(scope="module")
def registry(tmp_path_factory):
    """Skips where no package index can be reached."""
    command = ["-m", "pip", "download", "-qq", "--no-deps", "--no-cache-dir", "--retries=0", "--timeout=15"]
    folder = tmp_path_factory.mktemp("probe")
    done = subprocess.run(
        [sys.executable, *command, *pinned("iniconfig")], cwd=folder, capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("no package index can be reached")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, since setuptools works in the folder of the sources."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKAGES:
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def device(registry, wheel, tmp_path_factory):
    """Interpreter of an environment with the wheel and its `agent` extra."""
    python = environment(tmp_path_factory.mktemp("device"))
    pip(python, "install", "-c", CONSTRAINTS, f"{wheel}[agent]")
    return python


def test_the_wheel_holds_every_file_of_the_packages_and_nothing_else(wheel):
    expected = {
        path.relative_to(REPOSITORY).as_posix()
        for name in PACKAGES
        for path in (REPOSITORY / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    names = zipfile.ZipFile(wheel).namelist()
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_the_agent_works_from_another_folder(device, real_bundle, tmp_path):
    command = Path(device).with_name("whisperlet-agent")
    heard = run(command, "transcribe", "--json", "--bundle", real_bundle.path.absolute(), CLIP, cwd=tmp_path)
    assert json.loads(heard)["text"] == TEXT
    assert list(tmp_path.iterdir()) == []


def test_the_device_gets_neither_torch_nor_transformers(device):
    installed = {entry["name"].lower() for entry in json.loads(run(device, "-m", "pip", "list", "--format=json"))}
    assert {"whisperlet", "ai-edge-litert"} <= installed
    assert not installed & {"torch", "transformers", "litert-torch", "ai-edge-quantizer", "pyaudio", "pytest"}


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
def test_the_agent_resolves_from_wheels_on_aarch64(registry, wheel, version, tmp_path):
    platforms = [f"--platform={tag}" for tag in AARCH64]
    target = ["--only-binary=:all:", f"--python-version={version}", *platforms, "--target", tmp_path / "target"]
    report = tmp_path / "report.json"
    options = ["--dry-run", "--ignore-installed", "--report", report, "-c", CONSTRAINTS]
    pip(sys.executable, "install", *options, *target, f"{wheel}[agent]")
    found = {
        entry["metadata"]["name"]: entry["download_info"]["url"] for entry in json.loads(report.read_text())["install"]
    }
    assert found["ai-edge-litert"].endswith("aarch64.whl")
    assert not {"torch", "transformers"} & set(found)


OLD_RUNTIME = """
import sys
from pathlib import Path
import numpy as np
from tflite_runtime.interpreter import Interpreter
from agent import transcriber
from agent.config import RecogniserConfig
from agent.engine import InterpreterEngine, load_engine
from whisperlet.bundle import open_bundle

bundle = open_bundle(Path(sys.argv[1]))
assert type(load_engine(bundle, 1, Path("cache"))) is InterpreterEngine
ready = transcriber.build(bundle, InterpreterEngine(bundle, 2, Interpreter), RecogniserConfig())
ready.feed(transcriber.whole(np.load(sys.argv[2])))
print(ready.finish().text)
"""


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="tflite-runtime 2.14 ends with Python 3.11")
@pytest.mark.skipif(platform.system() != "Linux", reason="tflite-runtime 2.14 is for Linux")
def test_the_same_bundle_on_the_old_runtime(registry, wheel, real_bundle, tmp_path):
    python = environment(tmp_path / "old")
    pip(python, "install", "numpy<2", "tflite-runtime==2.14.0", *pinned("msgspec", "tokenizers"))
    pip(python, "install", "--no-deps", wheel)
    pcm, _ = soundfile.read(CLIP, dtype="int16")
    np.save(tmp_path / "clip.npy", pcm)
    heard = run(python, "-c", OLD_RUNTIME, real_bundle.path.absolute(), tmp_path / "clip.npy", cwd=tmp_path)
    assert heard.strip() == TEXT

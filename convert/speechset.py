"""Sets of recordings: a `manifest.jsonl` with one JSON object a line, audio paths relative to it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import soundfile
import soxr

from whisperlet.audio import SAMPLE_RATE, Float32
from whisperlet.errors import ConfigError

SUFFIXES = (".flac", ".ogg", ".opus", ".wav")  # of audio in a folder without a manifest
NO_LANGUAGE = "none"  # of a clip without speech


class Entry(msgspec.Struct, frozen=True):
    """A line of the manifest; keys that are not named here are ignored."""

    id: str
    audio: str
    text: str | None = None
    language: str = "en"
    duration_s: float | None = None
    slots: dict[str, str] = {}


class Clip(msgspec.Struct, frozen=True):
    """A recording and what was said in it, None if that is unknown or nothing."""

    id: str
    audio: Path
    text: str | None
    language: str
    slots: dict[str, str] = {}  # what a spoken command asks for, by name

    @property
    def has_speech(self) -> bool:
        """Whether anybody speaks, as far as is known: a text that is not given may still have been said."""
        return bool(self.text or self.slots) or (self.text is None and self.language != NO_LANGUAGE)


def read(manifest: Path, limit: int | None = None, max_s: float | None = None) -> list[Clip]:
    """The first `limit` clips of a manifest, or of the one in a folder, that are no longer than `max_s`.

    Raises ConfigError naming file and line.
    """
    path = manifest / "manifest.jsonl" if manifest.is_dir() else manifest
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    entries = [_entry(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    kept = [entry for entry in entries if max_s is None or (entry.duration_s or 0.0) <= max_s][:limit]
    clips = [Clip(entry.id, path.parent / entry.audio, entry.text, entry.language, entry.slots) for entry in kept]
    if not clips:
        raise ConfigError(f"{path}: names no clips")
    missing = [clip.audio.name for clip in clips if not clip.audio.is_file()]
    if missing:
        raise ConfigError(f"{path}: {len(missing)} audio files are missing: {', '.join(missing[:5])}")
    return clips


def _entry(path: Path, number: int, line: str) -> Entry:
    try:
        return msgspec.json.decode(line, type=Entry)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: line {number}: {error}") from None


def audio(path: Path) -> Float32:
    """A recording at Whisper's rate, its channels averaged. shape = (n_samples,). Raises ConfigError."""
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    mono = samples.mean(1)
    if not np.isfinite(mono).all():
        raise ConfigError(f"{path}: cannot be trained on: some samples are not numbers")
    resampled: Float32 = mono if rate == SAMPLE_RATE else soxr.resample(mono, rate, SAMPLE_RATE)
    return resampled


@dataclass(frozen=True)
class Source:
    """A set of recordings, or the first `limit` of it."""

    path: Path
    limit: int | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        """`FOLDER`, `MANIFEST`, or either with `:N` for its first N recordings."""
        path, separator, limit = text.rpartition(":")
        return cls(Path(path), int(limit)) if separator and limit.isdecimal() else cls(Path(text))

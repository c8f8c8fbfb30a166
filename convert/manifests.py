"""Speech with its text to fine-tune on: what a recipe names, read and checked before anything is trained.

A set is a folder with a `manifest.jsonl` (see `speechset`), or an audio folder of Hugging Face's `datasets`: a
`metadata.jsonl` or `metadata.csv` with `file_name` and `transcription` or `text`.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import soundfile

from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import ConfigError

from .speechset import SUFFIXES
from .stages import located

LONGEST_S = 28.0  # Whisper's window, less some silence
SHORTEST_S = 0.1
LOWEST_RATE = 8_000  # samples per second; below, too much of what tells sounds apart is missing
NAMES = ("manifest.jsonl", "metadata.jsonl", "metadata.csv")
ID, AUDIO = ("id",), ("audio", "file_name")  # what columns may be called
TEXT, SPEAKER, LANGUAGE = ("text", "transcription", "sentence"), ("speaker", "speaker_id"), ("language",)
N_SHOWN = 5  # ids in a message


class Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A set of recordings as a recipe names it, whole or in part.

    Speakers are counted round into `n_parts` parts in the order of their names, so that no speaker is in two of them;
    where none is known, recordings are.
    """

    path: str  # a folder, manifest.jsonl or metadata file; `$NAME` is taken from the environment
    parts: tuple[int, ...] = ()  # those to take, from 0; none named: all
    n_parts: int = 1
    limit: int | None = None  # the first so many of what is left
    language: str = "en"  # of what does not say it

    def __post_init__(self) -> None:
        if self.n_parts < 1 or any(not 0 <= part < self.n_parts for part in self.parts):
            raise ValueError("parts must be from 0 to n_parts - 1")
        if self.limit is not None and self.limit < 1:
            raise ValueError("limit must be positive")


class Utterance(msgspec.Struct, frozen=True):
    """A recording and what is said in it."""

    id: str
    audio: Path
    text: str
    language: str
    speaker: str | None
    is_general: bool = False  # replayed as it is, so that the model does not forget how others speak


def read(data: Data) -> list[Utterance]:
    """What a recipe's entry stands for. Raises ConfigError naming file and line."""
    path = manifest(data)
    found = [_utterance(path, number, row, data.language) for number, row in _rows(path)]
    return _part(found, data)[: data.limit]


def manifest(data: Data) -> Path:
    """The file that lists a set. Raises ConfigError."""
    path = located(data.path)
    if not path.is_dir():
        if path.is_file():
            return path
        raise ConfigError(f"{path}: no such folder or manifest")
    for name in NAMES:
        if (path / name).is_file():
            return path / name
    raise ConfigError(f"{path}: holds none of {', '.join(NAMES)}")


def _rows(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    """Line number and columns."""
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            reader = csv.DictReader(io.StringIO(text), strict=True)
            return [(reader.line_num, row) for row in reader]
        lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [(number, _object(path, number, line)) for number, line in lines]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None


def _object(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(line, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: line {number}: {error}") from None


def _utterance(path: Path, number: int, row: dict[str, Any], language: str) -> Utterance:
    audio = _column(row, AUDIO)
    if audio is None:
        raise ConfigError(f"{path}: line {number}: has neither {' nor '.join(AUDIO)}")
    return Utterance(
        id=_column(row, ID) or Path(audio).stem,
        audio=path.parent / audio,
        text=" ".join((_column(row, TEXT) or "").split()),
        language=_column(row, LANGUAGE) or language,
        speaker=_column(row, SPEAKER),
    )


def _column(row: dict[str, Any], names: Sequence[str]) -> str | None:
    values = (row.get(name) for name in names)
    return next((str(value) for value in values if value not in (None, "")), None)


def _part(found: list[Utterance], data: Data) -> list[Utterance]:
    if not data.parts:
        return found
    names = sorted({_group(one) for one in found})
    part_of = {name: number % data.n_parts for number, name in enumerate(names)}
    return [one for one in found if part_of[_group(one)] in data.parts]


def _group(one: Utterance) -> str:
    return one.speaker or one.id


def audio_files(sets: Sequence[Data]) -> list[Path]:
    """Files of noise or of impulse responses: those that a manifest lists, or all of a folder. Raises ConfigError."""
    return [path for data in sets for path in _audio_files(data)]


def files(data: Data) -> list[Path]:
    """All that a set is read from: its list, if it has one, and its recordings. Raises ConfigError."""
    listed = [] if _is_bare(located(data.path)) else [manifest(data)]
    return listed + _audio_files(data)


def _is_bare(path: Path) -> bool:
    """Whether it is a folder of nothing but audio."""
    return path.is_dir() and not any((path / name).is_file() for name in NAMES)


def _audio_files(data: Data) -> list[Path]:
    path = located(data.path)
    if _is_bare(path):
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES)
        found = _part([Utterance(str(file), file, "", "", None) for file in files], data)[: data.limit]
    else:
        found = read(data)
    if not found:
        raise ConfigError(f"{path}: holds no audio ({', '.join(SUFFIXES)})")
    if missing := [one.audio.name for one in found if not one.audio.is_file()]:
        raise ConfigError(f"{path}: {_listed('audio files are missing', missing)}")
    return [one.audio for one in found]


# what would spoil a training


def problems(name: str, utterances: Sequence[Utterance]) -> list[str]:
    """Everything that is wrong with one of a recipe's sets, a sentence for each kind."""
    if not utterances:
        return [f"{name}: names no recordings"]
    ids = Counter(one.id for one in utterances)
    missing = [one.audio.name for one in utterances if not one.audio.is_file()]
    kinds = {
        "audio files are missing": missing,
        "have no text": [one.id for one in utterances if not one.text],
        "ids occur more than once": [id_ for id_, n in ids.items() if n > 1],
    }
    for one in utterances:
        if one.audio.is_file() and (wrong := _wrong_audio(one.audio)):
            kinds.setdefault(wrong, []).append(one.audio.name)
    return [f"{name}: {_listed(kind, found)}" for kind, found in kinds.items() if found]


def _wrong_audio(path: Path) -> str | None:
    """What is wrong with a recording, as far as its header tells."""
    try:
        info = soundfile.info(str(path))
    except (soundfile.LibsndfileError, OSError):
        return "are no audio that can be read"
    if info.samplerate < LOWEST_RATE:
        return f"have fewer than {LOWEST_RATE:,} samples per second (other rates are resampled to {SAMPLE_RATE:,})"
    if info.duration > LONGEST_S:
        return f"are longer than {LONGEST_S:g} s, which is what fits into Whisper's window: cut them"
    return f"are shorter than {SHORTEST_S:g} s" if info.duration < SHORTEST_S else None


def unknown_languages(name: str, utterances: Sequence[Utterance], languages: Sequence[str]) -> list[str]:
    """A sentence if some are in a language that is none of these."""
    found = sorted({one.language for one in utterances} - set(languages))
    return [f"{name}: {_listed('languages are unknown to the checkpoint', found)}"] if found else []


def overlaps(
    name: str, utterances: Sequence[Utterance], other: str, others: Sequence[Utterance], *, speakers: bool
) -> list[str]:
    """Recordings, and speakers where they are known, that two sets share which must share none."""
    kinds = {"ids": {one.id for one in utterances} & {one.id for one in others}}
    if speakers:
        theirs = {one.speaker for one in others}
        kinds["speakers"] = {one.speaker for one in utterances if one.speaker and one.speaker in theirs}
    return [f"{name} and {other} share {_listed(kind, sorted(found))}" for kind, found in kinds.items() if found]


def _listed(kind: str, found: Sequence[str]) -> str:
    dots = ", ..." if len(found) > N_SHOWN else ""
    return f"{len(found)} {kind}: {', '.join(found[:N_SHOWN])}{dots}"


def resampled(utterances: Iterable[Utterance]) -> dict[str, int]:
    """How many recordings have another rate than Whisper's, by rate; they are resampled as they are read."""
    rates = Counter(soundfile.info(str(one.audio)).samplerate for one in utterances)
    return {str(rate): n for rate, n in sorted(rates.items()) if rate != SAMPLE_RATE}

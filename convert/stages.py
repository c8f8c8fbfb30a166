"""Stages that turn one checkpoint into another, and the runner that keeps their results.

A stage is data; the module that defines it does the work, in a function `run`:

    class Prune(Stage, frozen=True, kw_only=True, tag="prune"): ...
    def run(stage: Prune, in_dir: Path, out_dir: Path, progress: Progress) -> StageReport: ...

`in_dir` holds a checkpoint in Hugging Face's form, which `out_dir` is to hold afterwards. `out_dir` is empty, or as an
interrupted run of the same stage left it; a stage that takes long keeps what it needs to go on in `CHECKPOINTS` there.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from rich.progress import Progress

from whisperlet.errors import ConfigError

from . import disk

CHECKPOINTS = "checkpoints"  # folder in `out_dir`; does not become part of the result
RECORD = "stage.json"  # beside the checkpoint, written last
_VARIABLE = re.compile(r"\$\{?(\w+)")
_KEY_LENGTH = 16  # hexadecimal digits in a folder's name

Wait = Callable[[], None]  # called again and again while another run makes the same


class Stage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="stage"):
    """One step of a build. Settings that cannot be are refused by `__post_init__`, with a ValueError."""

    recovers: ClassVar[bool] = False  # it wins back accuracy that the stages before it have cost
    once: ClassVar[bool] = False  # a recipe may have only one

    @property
    def keeps_encoder(self) -> bool:
        """Whether the encoder's tensors stay as they are, so that an adapter made for them still fits."""
        return False

    def inputs(self) -> list[Path]:
        """Files and folders besides the checkpoint whose content the result depends on."""
        return []

    def problems(self) -> list[str]:
        """What would stop the stage, found out before anything is run; a sentence each."""
        return [f"{path}: no such file or folder" for path in self.inputs() if not path.exists()]


class StageReport(msgspec.Struct, frozen=True):
    """What a stage did. `details` are plain data, and the same whenever the stage is run again."""

    stage: str
    seconds: float
    details: dict[str, Any] = {}


class Result(msgspec.Struct, frozen=True):
    """A checkpoint that a stage has made, or the source that the first one takes."""

    folder: Path
    sha256: str  # over names and content of its files
    report: StageReport


class _Record(msgspec.Struct, frozen=True):
    """What lies beside a result."""

    report: StageReport
    settings: dict[str, Any]  # all that the result depends on
    sha256: str


def tag(stage: Stage) -> str:
    """The stage's name in a recipe."""
    return str(stage.__struct_config__.tag)


def located(path: str) -> Path:
    """A path as a recipe names it: `~` and `$NAME` stand for what they do in a shell, and it may be relative."""
    return Path(os.path.expandvars(path)).expanduser()


def check(stages: Sequence[Stage]) -> None:
    """Raise ConfigError with everything that would stop one of them, each thing once."""
    found = dict.fromkeys(f"{tag(stage)}: {problem}" for stage in stages for problem in stage.problems())
    unset = {name for problem in found for name in _unset(problem)}
    said = [f"${name}: is not set, and paths of the recipe begin with it" for name in sorted(unset)]
    if said := [*said, *(problem for problem in found if not _unset(problem))]:
        raise ConfigError("; ".join(said))


def _unset(problem: str) -> list[str]:
    """Variables that a problem's path names and that nobody has set."""
    return [name for name in _VARIABLE.findall(problem) if name not in os.environ]


def run(stage: Stage, source: Result, root: Path, progress: Progress, wait: Wait) -> Result:
    """What the stage makes of a checkpoint: what is kept if settings, checkpoint and every other input are the same."""
    module = importlib.import_module(type(stage).__module__)
    settings = {
        "stage": msgspec.to_builtins(stage),
        "source": source.sha256,
        "inputs": [disk.hash_path(path) for path in stage.inputs()],
        "code": {path.name: disk.hash_path(path) for path in program(Path(inspect.getfile(module)))},
    }

    def make(out: Path) -> StageReport:
        disk.check_room(root, disk.size(source.folder), tag(stage))
        report: StageReport = module.run(stage, source.folder, out, progress)
        return report

    return keep(root, tag(stage), settings, make, wait)


def program(path: Path) -> list[Path]:
    """A module and the modules of its folder that it imports, and those that they do."""
    found, todo = set[Path](), {path}
    while todo:
        found |= todo
        todo = {used for path in todo for used in _used(path)} - found
    return sorted(found)


def _used(path: Path) -> list[Path]:
    """What a module imports by `from . import name` or `from .name import something`."""
    nodes = [node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, ast.ImportFrom)]
    relative = [node for node in nodes if node.level == 1]
    names = [name for node in relative for name in ([node.module] if node.module else [a.name for a in node.names])]
    return [used for name in names if (used := path.with_name(f"{name}.py")).is_file()]


def keep(root: Path, name: str, settings: dict[str, Any], make: Callable[[Path], StageReport], wait: Wait) -> Result:
    """The kept result of these settings, made first if it is not there.

    It has its name only once all of it is on the disk, so what is interrupted, whenever that is, never counts as one.
    Raises ConfigError where the disk is full.
    """
    folder = root / f"{name}-{disk.hash_json(settings)[:_KEY_LENGTH]}"
    with disk.explained(root, name):
        root.mkdir(parents=True, exist_ok=True)
        with disk.locked(folder.with_name(f"{folder.name}.lock"), wait):
            found = _kept(folder)
            if found is None:
                part = folder.with_name(f"{folder.name}.part")
                part.mkdir(exist_ok=True)
                found = _publish(part, folder, make(part), settings)
    return Result(folder, found.sha256, found.report)


def _kept(folder: Path) -> _Record | None:
    """The record of a result that is whole; what is not is removed."""
    if not folder.is_dir():
        return None
    try:
        record = msgspec.json.decode((folder / RECORD).read_bytes(), type=_Record)
        if record.sha256 == disk.hash_folder(folder, leave_out=RECORD):
            return record
    except (OSError, msgspec.DecodeError):
        pass
    shutil.rmtree(folder)
    return None


def _publish(part: Path, folder: Path, report: StageReport, settings: dict[str, Any]) -> _Record:
    shutil.rmtree(part / CHECKPOINTS, ignore_errors=True)
    record = _Record(report, settings, disk.hash_folder(part, leave_out=RECORD))
    (part / RECORD).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
    disk.sync(part)
    part.rename(folder)
    disk.sync_entry(folder)
    return record

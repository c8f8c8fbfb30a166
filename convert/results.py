"""What builds, evaluations and searches have left in a folder, told apart by what is in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from whisperlet.errors import ConfigError

from . import sensitivity
from .evaluation import Evaluation
from .sensitivity import Sensitivity

LARGEST_BYTES = 50_000_000  # of a file that is looked into


class BuildReport(msgspec.Struct, frozen=True):
    """What `build` writes beside a bundle, as far as it is shown; keys that are not named here are ignored."""

    bundle: str
    bundle_bytes: int
    recipe: dict[str, Any]
    seconds: dict[str, float]  # by step
    peak_rss_mb: float | None = None
    adapter: str | None = None
    folding_max_abs: float | None = None
    parity: list[dict[str, Any]] = []
    texts: list[dict[str, Any]] = []
    stages: list[dict[str, Any]] = []  # reports of those that changed the checkpoint
    losses: list[dict[str, Any]] = []


class Results(msgspec.Struct):
    """Everything that was found, each with its file. Mutable while it is gathered."""

    builds: list[tuple[Path, BuildReport]] = []
    evaluations: list[tuple[Path, Evaluation]] = []  # oldest first
    sensitivities: list[tuple[Path, Sensitivity]] = []
    bundles: list[Path] = []
    unreadable: list[str] = []  # a sentence each


def gather(folder: Path) -> Results:
    """Look through a folder and those below it. Raises ConfigError if there is nothing to report."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder")
    results = Results(bundles=sorted(folder.rglob("*.tflite")))
    files = [path for path in folder.rglob("*.json") if path.is_file() and path.stat().st_size <= LARGEST_BYTES]
    for path in sorted(files, key=lambda path: (path.stat().st_mtime, path)):
        _add(path, results)
    if not (results.builds or results.evaluations or results.sensitivities or results.bundles):
        raise ConfigError(
            f"{folder}: holds no bundle, no report of a build, no evaluation (`evaluate --json`) and no {sensitivity.FILE}"
        )
    return results


def _add(path: Path, results: Results) -> None:
    """File it under what it is; a JSON file of something else is none of our business."""
    try:
        found = msgspec.json.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        results.unreadable.append(f"{path}: {error}")
        return
    keys = found.keys() if isinstance(found, dict) else set()
    try:
        if {"bundle", "recipe", "seconds"} <= keys:
            results.builds.append((path, msgspec.convert(found, BuildReport)))
        elif {"model", "utterances"} <= keys:
            results.evaluations.append((path, msgspec.convert(found, Evaluation)))
        elif {"a", "b", "differences"} <= keys:
            results.evaluations += [(path, msgspec.convert(found[side], Evaluation)) for side in "ba"]
        elif {"unit", "amount_unit", "rows"} <= keys:
            results.sensitivities.append((path, msgspec.convert(found, Sensitivity)))
    except msgspec.ValidationError as error:
        results.unreadable.append(f"{path}: {error}")

"""Models on trial: bundles, checkpoints, and what earlier evaluations wrote of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from whisperlet.bundle import open_bundle
from whisperlet.errors import ConfigError

from . import disk, evaluation, model
from .evaluate import Options, evaluate_bundle, evaluate_reference
from .evaluation import Evaluation, summary
from .speechset import Clip

Advance = Callable[[], None]
Trial = Callable[[Advance], Evaluation]  # takes what is called after each clip


def is_stored(name: str) -> bool:
    """Whether it names an earlier evaluation."""
    return name.endswith(".json")


def trial(
    name: str, manifest: Path | None, clips: Sequence[Clip] | None, options: Options, terms: Sequence[str]
) -> Trial:
    """Get a model ready. Everything that may be wrong with it is found here, before any long work.

    Raises ConfigError, BundleError or ModelError.
    """
    if terms and clips and not any(clip.text for clip in clips):
        raise ConfigError(f"{manifest}: no clip has a text in which a term could be looked for")
    if is_stored(name):
        stored = _stored(Path(name), clips, terms)
        return lambda _: stored
    if manifest is None or clips is None:
        raise ConfigError(f"{name}: to score it, name a manifest.jsonl or its folder after it")
    path, asked, origin = Path(name), msgspec.to_builtins(options), str(manifest)
    if path.suffix == ".tflite":
        size = open_bundle(path).path.stat().st_size
        return lambda advance: summary(
            path.name, origin, *evaluate_bundle(path, clips, options, advance), asked, size, terms
        )
    if options.pace or options.detect_language:
        raise ConfigError(f"{name}: --pace and --detect-language are for bundles, and this is the original")
    checkpoint = model.load(name)
    return lambda advance: summary(
        name, origin, *evaluate_reference(checkpoint, clips, options, advance), asked, None, terms
    )


def read(path: Path) -> Evaluation:
    """What `evaluate --json` wrote. Raises ConfigError."""
    return disk.read_json(path, Evaluation, "evaluation that `evaluate --json` wrote")


def _stored(path: Path, clips: Sequence[Clip] | None, terms: Sequence[str]) -> Evaluation:
    """Score again by the terms, if there are any, and only the clips that are asked for."""
    found = read(path)
    if clips is None and not terms:
        return found
    by_id = {clip.id: clip for clip in found.utterances}
    wanted = list(by_id) if clips is None else [clip.id for clip in clips]
    missing = [name for name in wanted if name not in by_id]
    if missing:
        raise ConfigError(f"{path}: holds no score of {len(missing)} of the clips, as {missing[0]}")
    return msgspec.structs.replace(found, **evaluation.figures([by_id[name] for name in wanted], terms or found.terms))

"""What the stages cost in accuracy: every checkpoint on the way is scored as the source was, in PyTorch float32."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from whisperlet.errors import ModelError

from . import disk, evaluate, model, scoring, speechset
from .recipe import Budget
from .scored import Scored
from .speechset import Clip
from .stages import Result, Stage, located, tag

SCORES = "scores"  # folder beside the kept checkpoints


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint against the source, on one set of recordings."""

    stage: str  # after which it was measured
    manifest: str
    n: int  # clips
    error_percent: float  # of words; of characters where the language has no spaces
    source_error_percent: float
    relative_loss: float  # share of the source's accuracy


def clips_of(budget: Budget) -> dict[str, list[Clip]]:
    """The recordings to score, by manifest. Raises ConfigError."""
    return {name: speechset.read(located(name), budget.limit) for name in budget.manifests}


def relative_loss(source_percent: float, percent: float) -> float:
    """Share of the accuracy, 100 % minus the error rate, that is gone; below 0 where there is more of it."""
    kept, had = 100.0 - percent, 100.0 - source_percent
    return 1.0 - kept / had if had > 0 else 0.0


def error_percent(result: Result, clips: Sequence[Clip], root: Path, advance: Callable[[], None]) -> float:
    """Error rate of a kept checkpoint; measured once, then read."""
    heard = [(clip.id, clip.text, clip.language, disk.hash_path(clip.audio)) for clip in clips]
    path = root / SCORES / f"{disk.hash_json([result.sha256, heard])[:16]}.json"
    if path.is_file():
        return disk.read_json(path, float, "error rate")
    checkpoint = model.load_directory(result.folder, result.folder.name)
    scored, _ = evaluate.evaluate_reference(checkpoint, clips, evaluate.Options(), advance)
    rate = scored_error_percent(scored)
    if rate is None:
        raise ModelError("the recordings of the budget have no texts to score against")
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk.replacing(path) as partial:
        partial.write_bytes(msgspec.json.encode(rate))
    return rate


def scored_error_percent(scored: Sequence[Scored]) -> float | None:
    """Of words, in the languages that write them with spaces; of characters if there are only others."""
    texts = [
        (clip.language, (scoring.normalise(clip.ref, clip.language), scoring.normalise(clip.hyp, clip.language)))
        for clip in scored
        if clip.ref
    ]
    words = scoring.word_error_rate([pair for language, pair in texts if language not in scoring.SPACELESS])
    rate = scoring.character_error_rate([pair for _, pair in texts]) if words is None else words
    return None if rate is None else round(rate, 2)


def losses(
    stage: Stage, result: Result, source: Result, budget: Budget, root: Path, advance: Callable[[], None]
) -> list[Loss]:
    """What the checkpoint after a stage has lost, on each set."""
    found = []
    for name, clips in clips_of(budget).items():
        before, after = (error_percent(checkpoint, clips, root, advance) for checkpoint in (source, result))
        loss = Loss(
            stage=tag(stage),
            manifest=located(name).name,
            n=len(clips),
            error_percent=after,
            source_error_percent=before,
            relative_loss=round(relative_loss(before, after), 4),
        )
        found.append(loss)
    return found


def check(found: Sequence[Loss], budget: Budget) -> None:
    """Raise ModelError if a loss is beyond the budget."""
    for loss in found:
        if loss.relative_loss > budget.max_relative_loss:
            raise ModelError(
                f"the accuracy budget is exceeded after {loss.stage}: on {loss.n} clips of {loss.manifest} its error "
                f"rate is {loss.error_percent:.2f} %, the source's {loss.source_error_percent:.2f} %, a relative loss "
                f"of {100 * loss.relative_loss:.1f} %, and max_relative_loss allows {100 * budget.max_relative_loss:.1f} %"
            )

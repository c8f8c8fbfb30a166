"""Two models on the same clips: which is better, by how much, and how sure that is."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from whisperlet.errors import ConfigError

from . import entities, intervals
from .entities import Found, split
from .evaluation import Evaluation
from .intervals import Interval
from .metrics import LABELS, error_counts, metrics, n_heard
from .scored import Scored


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """One figure of both models, in the unit that `metrics.LABELS` tells."""

    figure: str
    a: float
    b: float
    difference: float | None  # a less b; latencies: over the clips for which both are known
    interval: Interval | None  # 95 %, of the difference; None where there are fewer than two clips


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A clip in which the two heard different words."""

    id: str
    ref: str | None
    a: str
    b: str
    faults_a: int  # wrong words; entities, where no text is known; words heard where nobody speaks
    faults_b: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """What `--against --json` writes."""

    a: Evaluation
    b: Evaluation
    differences: list[Difference]
    n_changed: int  # clips in which other words were heard
    changes: list[Change]  # those in which `a` lost most first
    other_options: list[str]  # names of options that were not the same
    n_resamples: int = intervals.N_RESAMPLES
    seed: int = intervals.SEED


def compare(a: Evaluation, b: Evaluation) -> Comparison:
    """Raise ConfigError unless both were scored on the same clips and by the same terms."""
    if a.terms != b.terms:
        raise ConfigError(f"{a.model} and {b.model} were scored by other terms; name them once more with --terms")
    clips_a, clips_b = a.utterances, _in_the_same_order(a, b)
    found_a, found_b = (entities.found(clips, a.terms) for clips in (clips_a, clips_b))
    changes = _changes(clips_a, clips_b, found_a, found_b)
    return Comparison(
        a=a,
        b=b,
        differences=_differences(clips_a, clips_b, found_a, found_b),
        n_changed=len(changes),
        changes=changes,
        other_options=sorted(key for key in a.options | b.options if a.options.get(key) != b.options.get(key)),
    )


def _in_the_same_order(a: Evaluation, b: Evaluation) -> list[Scored]:
    """Return the clips of `b`, each at the place that it has in `a`."""
    by_id = {clip.id: clip for clip in b.utterances}
    for evaluation in (a, b):
        if len({clip.id for clip in evaluation.utterances}) < len(evaluation.utterances):
            raise ConfigError(f"{evaluation.model} on {evaluation.manifest}: some clips have the same id")
    apart = by_id.keys() ^ {clip.id for clip in a.utterances}
    if apart:
        raise ConfigError(f"{a.model} and {b.model} were scored on other clips: {_some(sorted(apart))} in only one")
    differing = [clip.id for clip in a.utterances if _given(clip) != _given(by_id[clip.id])]
    if differing:
        raise ConfigError(f"{a.model} and {b.model} were scored by other texts or slots: those of {_some(differing)}")
    return [by_id[clip.id] for clip in a.utterances]


def _given(clip: Scored) -> tuple[str | None, bool, list[str]]:
    return clip.ref, clip.has_speech, clip.slots


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _differences(
    a: Sequence[Scored], b: Sequence[Scored], found_a: list[Found] | None, found_b: list[Found] | None
) -> list[Difference]:
    told_a, told_b = metrics(a, found_a), metrics(b, found_b)
    rows = []
    for key in LABELS:
        value_a, value_b = told_a[key].value, told_b[key].value
        if value_a is None or value_b is None:
            continue
        less, span = told_a[key].difference(told_b[key])
        rows.append(Difference(figure=key, a=value_a, b=value_b, difference=less, interval=span))
    return rows


def _changes(
    a: Sequence[Scored], b: Sequence[Scored], found_a: list[Found] | None, found_b: list[Found] | None
) -> list[Change]:
    changes = [
        Change(
            id=one.id,
            ref=one.ref,
            a=one.hyp,
            b=other.hyp,
            faults_a=faults(one, found_a[i] if found_a else None),
            faults_b=faults(other, found_b[i] if found_b else None),
        )
        for i, (one, other) in enumerate(zip(a, b, strict=True))
        if split(one.hyp, one.language) != split(other.hyp, other.language)
    ]
    return sorted(changes, key=lambda change: change.faults_b - change.faults_a)


def faults(clip: Scored, found: Found | None) -> int:
    """Wrong words; entities, where no text is known; words heard where nobody speaks."""
    if clip.ref:
        return error_counts(clip)[0]
    if not clip.has_speech:
        return n_heard(clip)
    return (found.said - found.both).total() + (found.heard - found.both).total() if found else 0

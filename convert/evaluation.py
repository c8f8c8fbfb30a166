"""What an evaluation found: every clip's score, and the figures of the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from . import entities
from .entities import Entities
from .intervals import Interval
from .machine import describe
from .metrics import metrics
from .scored import Scored, Usage


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p95: float


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes. Rates in percent."""

    model: str
    manifest: str
    n: int
    n_without_text: int
    n_hallucinated: int  # clips without speech in which text was heard
    audio_s: float
    wer: float | None  # over languages that are written with spaces
    cer: float | None
    bundle_bytes: int | None
    finalise_ms: Percentiles | None
    end_to_final_ms: Percentiles | None
    core_s_per_audio_s: float | None
    rss_mb: float | None
    machine: str
    threads: int
    options: dict[str, Any]
    utterances: list[Scored]
    first_word_ms: Percentiles | None = None  # first voiced sample to first partial, of each clip
    speechless_s: float = 0.0  # audio without speech, of `audio_s`
    invented_words_per_hour: float | None = None  # of such audio
    terms: list[str] = []  # that entities were looked for by; none: by slots, if there are any
    entities: Entities | None = None
    intervals: dict[str, Interval] = {}  # 95 %, by resampling clips, of the figures named in `metrics.LABELS`
    joules_per_audio_s: float | None = None
    meter: str | None = None  # what told the joules, or why there are none


def summary(
    model: str,
    manifest: str,
    scored: Sequence[Scored],
    usage: Usage,
    options: dict[str, Any],
    size: int | None,
    terms: Sequence[str] = (),
) -> Evaluation:
    """Everything about a run, from its clips."""
    audio_s = sum(clip.duration_s for clip in scored)
    return Evaluation(
        model=model,
        manifest=manifest,
        bundle_bytes=size,
        core_s_per_audio_s=round(usage.core_s / audio_s, 4) if audio_s else None,
        rss_mb=_rounded(usage.rss_mb, 1),
        joules_per_audio_s=None if usage.joules is None or not audio_s else round(usage.joules / audio_s, 4),
        meter=usage.meter,
        machine=describe(),
        threads=options["threads"],
        options=options,
        **figures(scored, terms),
    )


def figures(scored: Sequence[Scored], terms: Sequence[str]) -> dict[str, Any]:
    """The fields of an evaluation that follow from its clips."""
    found = entities.found(scored, terms)
    told = metrics(scored, found)
    spans = {key: metric.interval() for key, metric in told.items()}
    return {
        "n": len(scored),
        "n_without_text": sum(clip.ref is None for clip in scored),
        "n_hallucinated": sum(1 for clip in scored if clip.hyp and not clip.has_speech),
        "audio_s": round(sum(clip.duration_s for clip in scored), 3),
        "wer": _rounded(told["wer"].value),
        "cer": _rounded(told["cer"].value),
        "finalise_ms": _percentiles([clip.finalise_ms for clip in scored]),
        "end_to_final_ms": _percentiles([clip.end_to_final_ms for clip in scored]),
        "utterances": list(scored),
        "first_word_ms": _percentiles([clip.first_word_ms for clip in scored]),
        "speechless_s": round(sum(clip.duration_s for clip in scored if not clip.has_speech), 3),
        "invented_words_per_hour": _rounded(told["invented_words_per_hour"].value),
        "terms": list(terms),
        "entities": entities.total(found) if found else None,
        "intervals": {key: _rounded_interval(span) for key, span in spans.items() if span},
    }


def _rounded_interval(span: Interval) -> Interval:
    return Interval(round(span.low, 3), round(span.high, 3))


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


def _percentiles(values: Sequence[float | None]) -> Percentiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Percentiles(*(round(float(p), 1) for p in np.percentile(known, [50, 95])))

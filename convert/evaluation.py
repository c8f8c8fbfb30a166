"""What an evaluation found: every clip's score, and the figures of the whole set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from . import scoring
from .machine import describe


class Percentiles(msgspec.Struct, frozen=True):
    """Milliseconds."""

    p50: float
    p95: float


class Scored(msgspec.Struct, frozen=True):
    """One clip."""

    id: str
    ref: str | None
    hyp: str
    duration_s: float
    finalise_ms: float | None
    end_to_final_ms: float | None
    language: str
    rejected: list[str]


class Evaluation(msgspec.Struct, frozen=True, kw_only=True):
    """What `--json` writes. Rates in percent."""

    model: str
    manifest: str
    n: int
    n_without_text: int
    n_hallucinated: int  # clips without text in which text was heard
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


class Usage(msgspec.Struct):
    """What the engine processes took. Mutable."""

    core_s: float = 0.0  # loading left out
    rss_mb: float = 0.0  # peak


def summary(
    model: str, manifest: str, scored: Sequence[Scored], usage: Usage | None, options: dict[str, Any], size: int | None
) -> Evaluation:
    """Everything about a run, from its clips."""
    audio_s = sum(clip.duration_s for clip in scored)
    worded = [(clip, _pair(clip)) for clip in scored if clip.ref is not None]
    return Evaluation(
        model=model,
        manifest=manifest,
        n=len(scored),
        n_without_text=len(scored) - len(worded),
        n_hallucinated=sum(1 for clip in scored if clip.ref is None and clip.hyp),
        audio_s=round(audio_s, 3),
        wer=_rounded(scoring.word_error_rate([p for clip, p in worded if clip.language not in scoring.SPACELESS])),
        cer=_rounded(scoring.character_error_rate([pair for _, pair in worded])),
        bundle_bytes=size,
        finalise_ms=_percentiles([clip.finalise_ms for clip in scored]),
        end_to_final_ms=_percentiles([clip.end_to_final_ms for clip in scored]),
        core_s_per_audio_s=round(usage.core_s / audio_s, 4) if usage and audio_s else None,
        rss_mb=round(usage.rss_mb, 1) if usage else None,
        machine=describe(),
        threads=options["threads"],
        options=options,
        utterances=list(scored),
    )


def _pair(clip: Scored) -> tuple[str, str]:
    return scoring.normalise(clip.ref or "", clip.language), scoring.normalise(clip.hyp, clip.language)


def _rounded(rate: float | None) -> float | None:
    return None if rate is None else round(rate, 2)


def _percentiles(values: Sequence[float | None]) -> Percentiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Percentiles(*(round(float(p), 1) for p in np.percentile(known, [50, 95])))

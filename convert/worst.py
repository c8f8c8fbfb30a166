"""The utterances that went worst, with their audio and what became of each word."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import msgspec
import soundfile
from rapidfuzz.distance import Levenshtein

from whisperlet.audio import SAMPLE_RATE
from whisperlet.errors import ConfigError

from . import entities, scoring, speechset
from .comparison import faults
from .entities import split
from .evaluation import Evaluation
from .scored import Scored

LONGEST_S = 30.0  # of the audio in the page


class Word(msgspec.Struct, frozen=True):
    """Words that were right, or that were not."""

    kind: str  # "equal", "missed" (said, not heard) or "invented" (heard, not said)
    text: str


class Utterance(msgspec.Struct, frozen=True, kw_only=True):
    """One of them."""

    clip: Scored
    faults: int
    words: list[Word]  # said against heard, normalised; nothing where no text is known
    slots: list[Word]  # values that were asked for
    audio: str | None  # a data URI
    why_silent: str  # where there is no audio


def worst(found: Evaluation, n: int) -> list[Utterance]:
    """Up to `n` clips with the most faults, and the shorter of two with as many."""
    said = entities.found(found.utterances, found.terms)
    ranked = [(faults(clip, said[i] if said else None), clip) for i, clip in enumerate(found.utterances)]
    ranked = sorted((pair for pair in ranked if pair[0]), key=lambda pair: (-pair[0], pair[1].duration_s, pair[1].id))
    paths, why = _paths(found)
    return [_utterance(clip, count, paths.get(clip.id), why) for count, clip in ranked[:n]]


def _slots(clip: Scored) -> list[Word]:
    """Each value, "equal" if it was heard."""
    heard = entities.Finder(clip.slots, clip.language).find(clip.hyp)
    keys = [" ".join(split(value, clip.language)) for value in clip.slots]
    return [Word("equal" if key in heard else "missed", v.strip()) for key, v in zip(keys, clip.slots, strict=True)]


def _paths(found: Evaluation) -> tuple[dict[str, Path], str]:
    """Audio by id, as the manifest tells; or why not."""
    try:
        return {clip.id: clip.audio for clip in speechset.read(Path(found.manifest))}, "the manifest names it no more"
    except ConfigError as error:
        return {}, str(error)


def _utterance(clip: Scored, count: int, path: Path | None, why: str) -> Utterance:
    audio, why = (None, why) if path is None else sound(path)
    words = difference(clip) if clip.ref else []
    return Utterance(clip=clip, faults=count, words=words, slots=_slots(clip), audio=audio, why_silent=why)


def difference(clip: Scored) -> list[Word]:
    """The reference with what was missed and what was put in its place, in order."""
    said, heard = split(clip.ref or "", clip.language), split(clip.hyp, clip.language)
    gap = "" if clip.language in scoring.SPACELESS else " "
    words = []
    for step in Levenshtein.opcodes(said, heard):
        missed, invented = said[step.src_start : step.src_end], heard[step.dest_start : step.dest_end]
        if step.tag == "equal":
            words.append(Word("equal", gap.join(missed)))
            continue
        for kind, texts in (("missed", missed), ("invented", invented)):
            words += [Word(kind, gap.join(texts))] if texts else []
    return words


def sound(path: Path) -> tuple[str | None, str]:
    """16 kHz mono FLAC, which every browser plays, as a data URI; or None and why."""
    try:
        samples = speechset.audio(path)[: round(LONGEST_S * SAMPLE_RATE)]
    except ConfigError as error:
        return None, str(error)
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    return f"data:audio/flac;base64,{base64.b64encode(buffer.getvalue()).decode()}", ""

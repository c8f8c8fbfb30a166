"""Scores what ships with the code that ships: clips go through the agent's own engine process and transcriber."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import msgspec

from agent.audio_files import read_file
from agent.config import RecogniserConfig, VadConfig, default_cache_dir
from agent.messages import SpeechChunk, Transcript
from agent.supervisor import Supervisor
from agent.transcriber import Transcriber
from whisperlet.audio import Pcm16, seconds
from whisperlet.errors import ConfigError
from whisperlet.tokenizer import Tokenizer

from . import reference, scoring
from .model import Checkpoint
from .playing import Playback
from .scored import Scored, Usage
from .speechset import NO_LANGUAGE, Clip
from .spending import Spending

FINAL_TIMEOUT_S = 120.0
log = logging.getLogger(__name__)


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to evaluate."""

    threads: int = 2
    segment: bool = False  # let the gate cut, join the finals
    join: bool = True  # hear what follows soon with what was said before
    pace: bool = False  # in real time, partials on
    detect_language: bool = False
    vad: VadConfig = VadConfig()


def evaluate_bundle(
    bundle: Path, clips: Sequence[Clip], options: Options, advance: Callable[[], None] = lambda: None
) -> tuple[list[Scored], Usage]:
    """Run every clip, one engine process a language."""
    usage, by_id = Usage(), {}
    for language, group in groupby(sorted(clips, key=_language), key=_language):
        config = _config(language, options)
        with _EngineRun(bundle, config, usage) as run:
            for clip in group:
                by_id[clip.id] = _scored(clip, run, options)
                advance()
    return [by_id[clip.id] for clip in clips], usage


def _complain(name: str, detail: str) -> None:
    log.warning("%s: %s", name, detail)


def _config(language: str, options: Options) -> RecogniserConfig:
    return RecogniserConfig(
        language="auto" if options.detect_language else language,
        partials=options.pace,
        threads=options.threads,
        join_pause_ms=RecogniserConfig().join_pause_ms if options.join else 0,
    )


def _language(clip: Clip) -> str:
    return "en" if clip.language == NO_LANGUAGE else clip.language


class _EngineRun:
    """An engine process of the agent with a collector of what it says, and a note of what it used."""

    def __init__(self, bundle: Path, config: RecogniserConfig, usage: Usage) -> None:
        self._supervisor = Supervisor(bundle, config, default_cache_dir(), self._collect, _complain)
        self._usage = usage
        self._finals: list[tuple[Transcript, float]] = []  # with the monotonic time at which each was handed over
        self.first_word_s: float | None = None  # monotonic, when the clip's first partial with text came
        self._n_clips = 0

    def __enter__(self) -> Self:
        self._supervisor.start()
        self._spending = Spending(self._usage, self._supervisor.pid)
        return self

    def __exit__(self, *_: object) -> None:
        self._spending.end()
        self._supervisor.stop()

    def _collect(self, transcript: Transcript) -> None:
        now_s = time.monotonic()
        if transcript.is_final:
            self._finals.append((transcript, now_s))
        elif transcript.text and self.first_word_s is None:
            self.first_word_s = now_s

    def hear(self, chunks: Iterable[SpeechChunk], *, wait: bool) -> list[tuple[Transcript, float]]:
        """Finals of a clip's chunks, in order, with the times at which they came.

        Without `wait` an engine that is minutes behind leaves speech out, as on a device.
        """
        self._n_clips += 1
        self._finals, self.first_word_s = [], None
        for chunk in chunks:
            chunk = msgspec.structs.replace(chunk, utterance=1000 * self._n_clips + chunk.utterance)  # noqa: PLW2901
            self._supervisor.submit(chunk, wait=wait)
        if not self._supervisor.drain(FINAL_TIMEOUT_S):
            raise ConfigError(f"the engine gave no final within {FINAL_TIMEOUT_S:g} s")
        self._spending.sample()
        return self._finals


def _scored(clip: Clip, run: _EngineRun, options: Options) -> Scored:
    pcm = read_file(clip.audio)
    playback = Playback(pcm, options.vad, segment=options.segment, pace=options.pace)
    finals = run.hear(playback, wait=not options.pace)
    last, arrived_s = finals[-1] if finals else (None, 0.0)
    plain = _unheard(clip, seconds(len(pcm)), last.language if last else _language(clip))
    return msgspec.structs.replace(
        plain,
        hyp=_joined([final.text for final, _ in finals], plain.language),
        first_word_ms=_since(playback.speech_began_s(), run.first_word_s),
        finalise_ms=_since(last.decided_monotonic_s, arrived_s) if last else None,
        end_to_final_ms=_since(last.speech_end_monotonic_s, arrived_s) if last else None,
        rejected=[final.rejected for final, _ in finals if final.rejected],
    )


def _unheard(clip: Clip, duration_s: float, language: str) -> Scored:
    """What is known of a clip before anything was heard in it."""
    return Scored(
        id=clip.id,
        ref=clip.text,
        hyp="",
        duration_s=round(duration_s, 3),
        finalise_ms=None,
        end_to_final_ms=None,
        language=language,
        rejected=[],
        has_speech=clip.has_speech,
        slots=list(clip.slots.values()),
    )


def _joined(texts: Sequence[str], language: str) -> str:
    return ("" if language in scoring.SPACELESS else " ").join(filter(None, texts))


def _since(then_s: float | None, now_s: float | None) -> float | None:
    return None if then_s is None or now_s is None else round(1e3 * (now_s - then_s), 1)


def evaluate_reference(
    checkpoint: Checkpoint, clips: Sequence[Clip], options: Options, advance: Callable[[], None] = lambda: None
) -> tuple[list[Scored], Usage]:
    """Every clip through PyTorch float32 with a full window, by the agent's transcriber, in this process.

    Of the options, `segment` and `join` count; the others are a bundle's.
    """
    scored, usage = [], Usage()
    spending = Spending(usage)
    for clip in clips:
        scored.append(_scored_by_reference(checkpoint, clip, options))
        spending.sample()
        advance()
    spending.end()
    return scored, usage


def _scored_by_reference(checkpoint: Checkpoint, clip: Clip, options: Options) -> Scored:
    pcm = read_file(clip.audio)
    heard = _heard(_reference(checkpoint, _language(clip), options), pcm, options)
    plain = _unheard(clip, seconds(len(pcm)), _language(clip))
    return msgspec.structs.replace(
        plain,
        hyp=_joined([final.text for final in heard], plain.language),
        rejected=[final.rejected for final in heard if final.rejected],
    )


def _heard(ears: Transcriber, pcm: Pcm16, options: Options = Options()) -> list[Transcript]:  # noqa: B008 - frozen
    finals = []
    for chunk in Playback(pcm, options.vad, segment=options.segment):
        ears.feed(chunk)
        finals.append(ears.finish())
    return finals


def _reference(checkpoint: Checkpoint, language: str, options: Options = Options()) -> Transcriber:  # noqa: B008 - frozen
    engine: Any = reference.TorchEngine(checkpoint.model, reference.manifest(checkpoint, checkpoint.source))
    tokenizer = Tokenizer(checkpoint.tokenizer_json, engine.manifest.vocabulary)
    return Transcriber(engine, tokenizer, _config(language, Options(join=options.join)))


def reference_texts(checkpoint: Checkpoint, clips: Sequence[Pcm16], language: str) -> list[str]:
    """What the checkpoint hears in each clip."""
    ears = _reference(checkpoint, language)
    return [" ".join(final.text for final in _heard(ears, pcm)) for pcm in clips]


def bundle_texts(bundle: Path, clips: Sequence[Pcm16], language: str) -> list[str]:
    """What a bundle hears in each clip."""
    with _EngineRun(bundle, RecogniserConfig(language=language, partials=False), Usage()) as run:
        return [" ".join(final.text for final, _ in run.hear(Playback(pcm, VadConfig()), wait=True)) for pcm in clips]

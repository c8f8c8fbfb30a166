"""Scores what ships with the code that ships: clips go through the agent's own engine process and transcriber.

The only part of the workstation that imports the agent.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Self

import msgspec
import numpy as np
import psutil

from agent.audio_files import read_file
from agent.config import RecogniserConfig, VadConfig, default_cache_dir
from agent.confirm import ConfirmedGate
from agent.messages import AudioChunk, SpeechChunk, Transcript
from agent.supervisor import Supervisor
from agent.transcriber import Transcriber
from agent.vad import Gate, Segment, quietest, segments
from whisperlet.audio import SAMPLE_RATE, Pcm16, samples, seconds
from whisperlet.errors import ConfigError
from whisperlet.tokenizer import Tokenizer

from . import reference, scoring
from .evaluation import Scored, Usage
from .machine import peak_rss_mb
from .model import Checkpoint
from .speechset import Clip

TAIL = samples(1500)  # silence after each clip in a paced run
PACED_BLOCK = samples(20)  # what the gate hands on at a time
FINAL_TIMEOUT_S = 120.0
NO_LANGUAGE = "none"  # what manifests call a clip without speech


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """How to evaluate."""

    threads: int = 2
    segment: bool = False  # let the gate cut, join the finals
    pace: bool = False  # in real time, partials on
    detect_language: bool = False
    vad: VadConfig = VadConfig()


def evaluate_bundle(
    bundle: Path, clips: Sequence[Clip], options: Options, advance: Callable[[], None] = lambda: None
) -> tuple[list[Scored], Usage]:
    """Run every clip, one engine process a language."""
    usage, by_id = Usage(), {}
    for language, group in groupby(sorted(clips, key=_language), key=_language):
        config = RecogniserConfig(
            language="auto" if options.detect_language else language, partials=options.pace, threads=options.threads
        )
        with _EngineRun(bundle, config, usage) as run:
            for clip in group:
                by_id[clip.id] = _scored(clip, run, options)
                advance()
    return [by_id[clip.id] for clip in clips], usage


def _language(clip: Clip) -> str:
    return "en" if clip.language == NO_LANGUAGE else clip.language


class _EngineRun:
    """An engine process of the agent with a collector of its finals, and a note of what it used."""

    def __init__(self, bundle: Path, config: RecogniserConfig, usage: Usage) -> None:
        self._supervisor = Supervisor(bundle, config, default_cache_dir(), self._collect, lambda _name, _detail: None)
        self._usage = usage
        self._finals: list[tuple[Transcript, float]] = []  # with the monotonic time at which each was handed over
        self._n_clips = 0

    def __enter__(self) -> Self:
        self._supervisor.start()
        assert self._supervisor.pid is not None
        self._process = psutil.Process(self._supervisor.pid)
        self._loaded_core_s = _core_s(self._process)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.is_running():
            self._usage.core_s += _core_s(self._process) - self._loaded_core_s
            self._usage.rss_mb = max(self._usage.rss_mb, peak_rss_mb(self._process.pid))
        self._supervisor.stop()

    def _collect(self, transcript: Transcript) -> None:
        if transcript.is_final:
            self._finals.append((transcript, time.monotonic()))

    def hear(self, chunks: Iterable[SpeechChunk]) -> list[tuple[Transcript, float]]:
        """Finals of a clip's chunks, in order, with the times at which they came."""
        self._n_clips += 1
        self._finals = []
        for chunk in chunks:
            self._supervisor.submit(msgspec.structs.replace(chunk, utterance=1000 * self._n_clips + chunk.utterance))
        if not self._supervisor.drain(FINAL_TIMEOUT_S):
            raise ConfigError(f"the engine gave no final within {FINAL_TIMEOUT_S:g} s")
        return self._finals


def _scored(clip: Clip, run: _EngineRun, options: Options) -> Scored:
    pcm = read_file(clip.audio)
    finals = run.hear(_speech(pcm, options))
    language = finals[-1][0].language if finals else _language(clip)
    last, arrived_s = finals[-1] if finals else (None, 0.0)
    return Scored(
        id=clip.id,
        ref=clip.text,
        hyp=("" if language in scoring.SPACELESS else " ").join(final.text for final, _ in finals if final.text),
        duration_s=round(seconds(len(pcm)), 3),
        finalise_ms=_since(last.decided_monotonic_s, arrived_s) if last else None,
        end_to_final_ms=_since(last.speech_end_monotonic_s, arrived_s) if last else None,
        language=language,
        rejected=[final.rejected for final, _ in finals if final.rejected],
    )


def _since(then_s: float | None, now_s: float) -> float | None:
    return None if then_s is None else round(1e3 * (now_s - then_s), 1)


def _speech(pcm: Pcm16, options: Options) -> Iterator[SpeechChunk]:
    """The clip as the gate would hand it to the engine; in a paced run when the gate would."""
    heard = np.concatenate([pcm, np.zeros(TAIL, np.int16)])
    found = list(segments(heard, options.vad, ConfirmedGate(options.vad))) if options.segment or options.pace else []
    if not options.segment:
        found = list(one_utterance(pcm, found, options.vad))
    if options.pace:
        return _in_real_time(heard, found, _Voiced(heard, options.vad))
    return (_last(heard, segment, segment.start) for segment in found)


def one_utterance(pcm: Pcm16, found: Sequence[Segment], vad: VadConfig) -> Iterator[Segment]:
    """The whole clip as one utterance, up to the last voiced sample if the gate found one; cut only where it must be."""
    end, decision = (found[-1].speech_end, found[-1].decision) if found else (len(pcm), len(pcm))
    longest, window = samples(1000 * vad.max_segment_s), samples(1000 * vad.cut_window_s)
    start = number = 0
    while end - start > longest:
        limit = start + longest
        cut = limit - window + quietest(pcm[limit - window : limit])
        yield Segment(1, number, start, cut, limit, continues=True)
        start, number = cut, number + 1
    yield Segment(1, number, start, end, decision, continues=False)


def _last(heard: Pcm16, segment: Segment, first: int, now_s: float | None = None, opened_s: float = 0.0) -> SpeechChunk:
    """The chunk that ends a segment, with its audio from sample `first` on."""
    return SpeechChunk(
        segment.utterance,
        segment.segment,
        heard[first : segment.speech_end if now_s is None else segment.decision],
        first,
        is_last=True,
        continues=segment.continues,
        speech_end=segment.speech_end,
        speech_end_monotonic_s=None if now_s is None else opened_s + seconds(segment.speech_end),
        decided_monotonic_s=now_s,
    )


class _Voiced:
    """What the gate knew at any time of where speech had last been heard."""

    def __init__(self, heard: Pcm16, vad: VadConfig) -> None:
        gate = Gate(vad)
        messages = gate.feed(AudioChunk(heard, 0, 0.0))
        self._known = [message.start + len(message.samples) for message in messages]
        self._ends = [message.voiced_end or message.speech_end for message in messages]

    def end(self, sample: int) -> int | None:
        """Index after the last voiced sample that was known of when `sample` had been heard."""
        n = bisect_right(self._known, sample)
        return self._ends[n - 1] if n else None


def _in_real_time(heard: Pcm16, found: Sequence[Segment], voiced: _Voiced) -> Iterator[SpeechChunk]:
    """Each chunk when its last sample would have been captured."""
    opened_s = time.monotonic()
    for segment in found:
        ends = [*range(segment.start + PACED_BLOCK, segment.decision, PACED_BLOCK), segment.decision]
        start = segment.start
        for end in ends:
            time.sleep(max(0.0, opened_s + seconds(end) - time.monotonic()))
            if end == segment.decision:
                yield _last(heard, segment, start, time.monotonic(), opened_s)
            else:
                audio = heard[start:end]
                yield SpeechChunk(segment.utterance, segment.segment, audio, start, voiced_end=voiced.end(end))
            start = end
    time.sleep(max(0.0, opened_s + seconds(len(heard)) - time.monotonic()))


def evaluate_reference(
    checkpoint: Checkpoint, clips: Sequence[Clip], options: Options, advance: Callable[[], None] = lambda: None
) -> list[Scored]:
    """Every clip through PyTorch float32 with a full window, by the agent's transcriber, in this process."""
    scored = []
    for clip in clips:
        heard = _heard(_reference(checkpoint, _language(clip)), read_file(clip.audio), options.vad)
        scored.append(
            Scored(
                id=clip.id,
                ref=clip.text,
                hyp=("" if clip.language in scoring.SPACELESS else " ").join(f.text for f in heard if f.text),
                duration_s=round(heard[-1].end / SAMPLE_RATE, 3),
                finalise_ms=None,
                end_to_final_ms=None,
                language=clip.language,
                rejected=[f.rejected for f in heard if f.rejected],
            )
        )
        advance()
    return scored


def _heard(ears: Transcriber, pcm: Pcm16, vad: VadConfig = VadConfig()) -> list[Transcript]:  # noqa: B008 - frozen
    finals = []
    for segment in one_utterance(pcm, [], vad):
        ears.feed(_last(pcm, segment, segment.start))
        finals.append(ears.finish())
    return finals


def _reference(checkpoint: Checkpoint, language: str) -> Transcriber:
    engine: Any = reference.TorchEngine(checkpoint.model, reference.manifest(checkpoint, checkpoint.source))
    tokenizer = Tokenizer(checkpoint.tokenizer_json, engine.manifest.vocabulary)
    return Transcriber(engine, tokenizer, RecogniserConfig(language=language, partials=False))


def reference_texts(checkpoint: Checkpoint, clips: Sequence[Pcm16], language: str) -> list[str]:
    """What the checkpoint hears in each clip."""
    ears = _reference(checkpoint, language)
    return [" ".join(final.text for final in _heard(ears, pcm)) for pcm in clips]


def bundle_texts(bundle: Path, clips: Sequence[Pcm16], language: str) -> list[str]:
    """What a bundle hears in each clip."""
    with _EngineRun(bundle, RecogniserConfig(language=language, partials=False), Usage()) as run:
        return [" ".join(final.text for final, _ in run.hear(_speech(pcm, Options()))) for pcm in clips]


def _core_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)

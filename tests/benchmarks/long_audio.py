"""Hours of talk: whether the last minute costs what the first did, and whether memory grows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psutil

from agent.audio_files import read_file
from agent.config import RecogniserConfig, VadConfig
from agent.confirm import ConfirmedGate
from agent.messages import Transcript
from convert import scoring
from whisperlet.audio import FRAMES_PER_SECOND, SAMPLE_RATE, SAMPLES_PER_FRAME, Pcm16, samples, seconds
from whisperlet.bundle import Manifest, open_bundle

from . import macs, plots
from .base import Context, Result, Table, bar, number
from .macs import Streaming, Work
from .runs import Meter, Stepped, audio_chunks, rss_mb

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("en_long",)
HOURS = 2.0
QUICK_S = 120.0
MINUTE = 60 * SAMPLE_RATE
BETWEEN = samples(1000)  # silence between two rounds of the recording
ASSUMED_OVERLAP = 40  # frames, of a bundle without a streaming encoder
METHOD = """A chapter of 19 minutes, read aloud, goes round until two hours are full, through the gate and the engine \
process as fast as they can, 20 ms at a time, with partials. Every minute of audio: processor time of the engine in \
it, and resident memory of the engine and of this process, which does the ear's part (and holds the recording; only \
its growth counts). *Last quarter : first quarter* and *growth* compare means over these quarters of the minutes; \
*last round : first round* compares the same audio. Encoder work is counted in multiply-accumulates from the model's \
sizes and the segments of the first round: the steps of the streaming encoder against encoding the segment anew at \
each hop (see the formula in `tests/benchmarks/macs.py`)."""


class Minute(msgspec.Struct, frozen=True):
    """What a minute of audio took."""

    minute: int  # counts from 1
    core_s: float  # of the engine
    engine_mb: float  # resident at its end
    ear_mb: float


def run(context: Context) -> Result:
    """Two hours, a minute at a time."""
    clip = context.clips("en_long")[0]
    pcm = read_file(clip.audio)[: samples(1000 * QUICK_S / 2) if context.quick else None]
    total_s = QUICK_S if context.quick else HOURS * 3600
    minutes, finals = hear(context, pcm, total_s)
    manifest = open_bundle(context.bundle).manifest
    first_round = [final for final in finals if final.start < len(pcm)]
    how, is_real = streaming(manifest)
    lengths = [-(-(final.end - final.start) // SAMPLES_PER_FRAME) for final in first_round]
    silence = manifest.silence_frames.get("en", manifest.silence_frames["default"])
    work = macs.work(manifest.dims, how, lengths, silence)
    figures: dict[str, Any] = {
        **trends(minutes),
        "last_round_to_first": round_ratio(minutes, len(pcm) + BETWEEN),
        "wer_first_round": None if context.quick else word_error_rate(clip.text or "", first_round),
        "encoder_work_gmac": work,
        "encoder_work_saved_percent": work.saved_percent,
        "encoder_work_saved_with_finals_percent": work.saved_with_finals_percent,
        "streaming": how,
        "streaming_is_assumed": not is_real,
        "n_segments": len(lengths),
        "mean_segment_s": round(float(np.mean(lengths)) / FRAMES_PER_SECOND, 2) if lengths else None,
    }
    return Result(
        title="Long audio",
        method=METHOD,
        tables=[_trend_table(figures), _work_table(work, how, is_real=is_real)],
        figures=figures,
        details=minutes,
        data=[f"en_long (1 clip, {seconds(len(pcm)) / 60:.1f} min, repeated to {total_s / 60:.0f} min)"],
        draw=lambda figure: _draw(figure, minutes),
    )


def hear(context: Context, pcm: Pcm16, total_s: float) -> tuple[list[Minute], list[Transcript]]:
    """The recording again and again; what each minute took, and the finals."""
    gate, finals, minutes = ConfirmedGate(VadConfig()), list[Transcript](), list[Minute]()
    ear = psutil.Process()
    n_minutes = int(total_s / 60)
    with Stepped(context.bundle, context.recogniser()) as engine, bar("minutes of audio", n_minutes) as advance:
        before_s = engine.meter.core_s
        for number_of, minute in enumerate(minutes_of(pcm, n_minutes)):
            for chunk in audio_chunks(minute, start=number_of * MINUTE):
                messages = [message for speech in gate.feed(chunk) for message in engine.ask(speech)]
                finals += [message.transcript for message in messages if message.transcript.is_final]
            minutes.append(_minute(number_of + 1, engine.meter, before_s, ear))
            before_s = engine.meter.core_s
            advance()
    return minutes, finals


def _minute(number_of: int, engine: Meter, before_s: float, ear: psutil.Process) -> Minute:
    return Minute(number_of, round(engine.core_s - before_s, 3), round(engine.rss_mb, 1), round(rss_mb(ear), 1))


def minutes_of(pcm: Pcm16, n_minutes: int) -> Iterator[Pcm16]:
    """Minutes of a recording that goes round with a pause in between."""
    whole = np.concatenate([pcm, np.zeros(BETWEEN, np.int16)])
    for first in range(0, n_minutes * MINUTE, MINUTE):
        yield np.take(whole, np.arange(first, first + MINUTE), mode="wrap")


def trends(minutes: Sequence[Minute]) -> dict[str, float]:
    """First quarter against last."""
    n = max(1, len(minutes) // 4)
    first, last = minutes[:n], minutes[-n:]

    def mean(part: Sequence[Minute], name: str) -> float:
        return float(np.mean([getattr(minute, name) for minute in part]))

    return {
        "core_s_per_audio_s": round(mean(minutes, "core_s") / 60, 4),
        "last_quarter_to_first": round(mean(last, "core_s") / mean(first, "core_s"), 3),
        "engine_growth_mb": round(mean(last, "engine_mb") - mean(first, "engine_mb"), 1),
        "ear_growth_mb": round(mean(last, "ear_mb") - mean(first, "ear_mb"), 1),
        "engine_most_mb": max(minute.engine_mb for minute in minutes),
    }


def round_ratio(minutes: Sequence[Minute], n_samples: int) -> float | None:
    """Processor time of the last whole round of the recording over that of the first; by whole minutes."""
    n_each = n_samples // MINUTE
    n_rounds = len(minutes) * MINUTE // n_samples
    if n_each == 0 or n_rounds < 2:
        return None
    begins = -(-(n_rounds - 1) * n_samples // MINUTE)
    last = minutes[begins : begins + n_each]
    first = minutes[: len(last)]
    return round(sum(minute.core_s for minute in last) / sum(minute.core_s for minute in first), 3)


def streaming(manifest: Manifest) -> tuple[Streaming, bool]:
    """How the bundle streams, and whether it does; else what would be assumed."""
    specs: list[Any] = getattr(manifest, "streams", [])
    if specs:
        return Streaming(specs[0].chunk, specs[0].width, specs[0].context), True
    chunk = RecogniserConfig().hop_ms * FRAMES_PER_SECOND // 1000
    return Streaming(chunk, chunk + ASSUMED_OVERLAP, 512), False


def word_error_rate(text: str, finals: Sequence[Transcript]) -> float | None:
    """Of the whole chapter, joined finals."""
    heard = " ".join(final.text for final in finals)
    rate = scoring.word_error_rate([(scoring.normalise(text, "en"), scoring.normalise(heard, "en"))])
    return None if rate is None else round(rate, 2)


def _trend_table(figures: dict[str, Any]) -> Table:
    rows = [
        ["engine, core-s per audio-s", number(figures["core_s_per_audio_s"], 3)],
        ["processor time, last quarter : first quarter", number(figures["last_quarter_to_first"], 2)],
        ["processor time, last round : first round", number(figures["last_round_to_first"], 2)],
        ["engine, growth of resident memory (MB)", number(figures["engine_growth_mb"], 1)],
        ["engine, resident at most (MB)", number(figures["engine_most_mb"])],
        ["ear's part, growth of resident memory (MB)", number(figures["ear_growth_mb"], 1)],
        ["WER of the first round (%)", number(figures["wer_first_round"], 2)],
        ["segments in the first round; their mean length (s)", f"{figures['n_segments']}; {figures['mean_segment_s']}"],
    ]
    return Table("From the first minute to the last", ["", "figure"], rows)


def _work_table(work: Work, how: Streaming, *, is_real: bool) -> Table:
    title = f"Encoder work: steps of {how.width} frames, {how.chunk} of them new, context {how.context}"
    rows = [
        ["steps", number(work.streamed), number(work.streamed + work.final_passes)],
        ["anew at each hop", number(work.encoded_anew), number(work.encoded_anew + work.final_passes)],
        ["less by (%)", number(work.saved_percent, 1), number(work.saved_with_finals_percent, 1)],
    ]
    header = ["10^9 multiply-accumulates", "partials", "and final passes"]
    return Table(title if is_real else f"{title}; assumed, this bundle does not stream", header, rows)


def _draw(figure: Figure, minutes: Sequence[Minute]) -> None:
    left, right = figure.subplots(1, 2)
    x = [minute.minute for minute in minutes]
    cost = {"engine": [minute.core_s / 60 for minute in minutes]}
    memory = {"engine": [minute.engine_mb for minute in minutes], "ear's part": [minute.ear_mb for minute in minutes]}
    plots.lines(left, x, cost, ("audio (min)", "core-s per audio-s"))
    plots.lines(right, x, memory, ("audio (min)", "resident memory (MB)"))

"""Others on the same audio, machine and threads, taking turns: faster-whisper and whisper.cpp."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.confirm import ConfirmedGate
from agent.vad import segments
from convert import scoring
from convert.speechset import Clip
from whisperlet.audio import Pcm16, seconds

from . import plots
from .alignment import spoken_words
from .base import Context, Result, Table, bar, described, number, p50_p95, percent, spread
from .latency import measured
from .peer import FASTER_WHISPER, Peer, models
from .runs import TAIL, Live, Stepped, joined, one_segment
from .words import Emission, Flicker, Shown, emission, flicker

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("en_read_dev",)
N_CLIPS = 20
N_ROUNDS = 3
PAUSE_S = 0.3  # between two peers: the threads of some spin for a while after their work is done
OURS, STREAMED = "ours", "LocalAgreement-2 over faster-whisper int8"
METHOD = """All have the weights of the same checkpoint, each in a process of its own, all loaded at once and taking \
turns: one clip through every peer, three times, then the next clip. The complete utterance is handed over as \
samples; *wall* is the median of three until the text is there. Peers decode greedily (beam 1), without time stamps, \
without falling back to other temperatures, with the language given; everything else is their default, so they encode \
a full 30 s window. faster-whisper runs the weights as CTranslate2's int8; whisper.cpp runs float16 and q5_1 files \
written from the checkpoint, in the build that its wheel on the package index has. Processor time is that of the \
process until its answer; memory is its peak, with Python and the library. *Streamed*: the clip is played in real \
time. Ours goes through gate, supervisor and engine. The peer transcribes its growing buffer anew whenever a second \
of audio has come (later if the last transcription took longer), confirms what two transcripts in a row begin with, \
and transcribes the utterance once more when our gate has decided that speech has ended (the last time, if it did so \
more than once). Latencies are those of the benchmark `latency`."""


class Turn(msgspec.Struct, frozen=True):
    """One clip through one peer."""

    text: str
    wall_s: float
    core_s: float


class StreamedClip(msgspec.Struct, frozen=True):
    """A clip that was played in real time."""

    text: str
    finalise_ms: list[float]
    words: Emission
    flicker: Flicker
    core_s: float


def run(context: Context) -> Result:
    """Offline, then streamed."""
    clips = context.clips("en_read_dev", N_CLIPS)
    spoken = spoken_words("en_read_dev", clips, context.source)
    audio_s = sum(seconds(len(read_file(clip.audio))) for clip in clips)
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        peers = {
            label: stack.enter_context(Peer(kind, model, context.threads, Path(name)))
            for label, (kind, model) in models(context.source).items()
        }
        began_s = time.monotonic()
        ours = stack.enter_context(Stepped(context.bundle, context.recogniser(partials=False)))
        load_s = {OURS: time.monotonic() - began_s} | {label: peer.load_s for label, peer in peers.items()}
        take_turns(clips[:1], ours, peers, n_rounds=1)  # so that the first utterance does not pay for what is made once
        turns = take_turns(clips, ours, peers)
        peak = {OURS: ours.meter.peak_rss_mb} | {label: peer.meter.peak_rss_mb for label, peer in peers.items()}
        streamed = stream(context, clips, spoken, peers[FASTER_WHISPER])
    offline = {label: _offline(clips, turns[label], audio_s, peak[label], load_s[label]) for label in turns}
    for found in offline.values():
        found["ours_over_this"] = round(offline[OURS]["total_wall_s"] / found["total_wall_s"], 3)
    live = {label: _streamed(clips, heard, audio_s) for label, heard in streamed.items()}
    return Result(
        title="Peers",
        method=METHOD,
        tables=[_offline_table(offline), _streamed_table(live)],
        figures={"offline": offline, "streamed": live},
        details={"offline": turns, "streamed": streamed},
        data=[described("en_read_dev", clips, audio_s)],
        draw=lambda figure: _draw(figure, offline, streamed),
    )


def take_turns(
    clips: Sequence[Clip], ours: Stepped, peers: dict[str, Peer], n_rounds: int = N_ROUNDS
) -> dict[str, list[Turn]]:
    """Every clip through everyone, three times; medians."""
    asked: dict[str, Callable[[Pcm16], Turn]] = {OURS: lambda pcm: _ask_ours(ours, pcm)}
    for label, peer in peers.items():
        asked[label] = lambda pcm, peer=peer: msgspec.convert(peer.ask(pcm), Turn)  # type: ignore[misc]
    found: dict[str, list[Turn]] = {label: [] for label in asked}
    with bar("complete utterances, in turns", n_rounds * len(clips)) as advance:
        for clip in clips:
            pcm = read_file(clip.audio)
            rounds: dict[str, list[Turn]] = {label: [] for label in asked}
            for _ in range(n_rounds):
                for label, ask in asked.items():
                    rounds[label].append(ask(pcm))
                    time.sleep(PAUSE_S)
                advance()
            for label, three in rounds.items():
                wall_s, core_s = median(t.wall_s for t in three), median(t.core_s for t in three)
                found[label].append(Turn(three[0].text, round(wall_s, 4), round(core_s, 4)))
    return found


def _ask_ours(engine: Stepped, pcm: Pcm16) -> Turn:
    began_s, began_core_s = time.perf_counter(), engine.meter.core_s
    text = joined(engine.hear(one_segment(pcm, None)))
    return Turn(text, time.perf_counter() - began_s, engine.meter.core_s - began_core_s)


def stream(
    context: Context, clips: Sequence[Clip], spoken: dict[str, list[tuple[str, float]]], peer: Peer
) -> dict[str, list[StreamedClip]]:
    """Every clip in real time, through us and then through the peer."""
    found: dict[str, list[StreamedClip]] = {OURS: [], STREAMED: []}
    with Live(context.bundle, context.recogniser()) as live, bar("in real time", len(clips)) as advance:
        for clip in clips:
            pcm, before_s = read_file(clip.audio), live.meter.core_s
            heard = measured(clip, pcm, live.play(pcm), spoken[clip.id])
            core_s = live.meter.core_s - before_s
            found[OURS].append(StreamedClip(heard.text, heard.finalise_ms, heard.words, heard.flicker, core_s))
            time.sleep(PAUSE_S)
            found[STREAMED].append(_stream_peer(peer, pcm, spoken[clip.id]))
            advance()
    return found


def _stream_peer(peer: Peer, pcm: Pcm16, spoken: list[tuple[str, float]]) -> StreamedClip:
    vad, heard = VadConfig(), np.concatenate([pcm, np.zeros(TAIL, np.int16)])
    speech = list(segments(heard, vad, ConfirmedGate(vad)))
    decision, end = (speech[-1].decision, speech[-1].speech_end) if speech else (len(heard), len(pcm))
    answer = peer.ask(heard, decision_s=seconds(decision), speech_end_s=seconds(end))
    *partials, (at_s, text, n_chars) = answer["messages"]
    shown = [*(Shown(*message) for message in partials), Shown(at_s, text, n_chars, is_final=True)]
    late_ms = [round(1e3 * (shown[-1].at_s - seconds(decision)), 1)]
    return StreamedClip(shown[-1].text, late_ms, emission(shown, spoken), flicker(shown), answer["core_s"])


def _word_error_rate(clips: Sequence[Clip], texts: Sequence[str]) -> float | None:
    pairs = zip(clips, texts, strict=True)
    rate = scoring.word_error_rate(
        [(scoring.normalise(clip.text or "", "en"), scoring.normalise(text, "en")) for clip, text in pairs]
    )
    return None if rate is None else round(rate, 2)


def _offline(
    clips: Sequence[Clip], turns: Sequence[Turn], audio_s: float, rss_mb: float, load_s: float
) -> dict[str, Any]:
    return {
        "wall_ms": spread([1e3 * turn.wall_s for turn in turns]),
        "total_wall_s": sum(turn.wall_s for turn in turns),
        "wer": _word_error_rate(clips, [turn.text for turn in turns]),
        "core_s_per_audio_s": round(sum(turn.core_s for turn in turns) / audio_s, 4),
        "peak_rss_mb": round(rss_mb, 1),
        "load_s": round(load_s, 2),
    }


def _streamed(clips: Sequence[Clip], heard: Sequence[StreamedClip], audio_s: float) -> dict[str, Any]:
    n_shown = sum(h.flicker.n_shown for h in heard)
    return {
        "finalise_ms": spread([ms for h in heard for ms in h.finalise_ms]),
        "word_shown_ms": spread([ms for h in heard for ms in h.words.shown_ms]),
        "word_stable_ms": spread([ms for h in heard for ms in h.words.stable_ms]),
        "changed_words_percent": percent(sum(h.flicker.n_changed for h in heard), n_shown),
        "stable_violations": sum(h.flicker.stable_violations for h in heard),
        "stable_words_changed_percent": percent(
            sum(h.flicker.stable_words_changed for h in heard), sum(h.flicker.n_stable_words for h in heard)
        ),
        "core_s_per_audio_s": round(sum(h.core_s for h in heard) / audio_s, 4),
        "wer": _word_error_rate(clips, [h.text for h in heard]),
    }


def _offline_table(offline: dict[str, dict[str, Any]]) -> Table:
    header = ["complete utterance", "wall (ms), p50 / p95", "ours : this", "WER (%)", "core-s per audio-s"]
    rows = [
        [
            label,
            p50_p95(found["wall_ms"]),
            number(found["ours_over_this"], 2),
            number(found["wer"], 2),
            number(found["core_s_per_audio_s"], 3),
            number(found["peak_rss_mb"]),
            number(found["load_s"], 1),
        ]
        for label, found in offline.items()
    ]
    return Table("Offline", [*header, "peak memory (MB)", "start and load (s)"], rows)


def _streamed_table(live: dict[str, dict[str, Any]]) -> Table:
    times = {
        "decision to final (ms), p50 / p95": "finalise_ms",
        "word shown (ms), p50 / p95": "word_shown_ms",
        "word stable (ms), p50 / p95": "word_stable_ms",
    }
    figures = {
        "words of partials that changed later (%)": "changed_words_percent",
        "stable words that the final changed (%)": "stable_words_changed_percent",
        "core-s per audio-s": "core_s_per_audio_s",
        "WER (%)": "wer",
    }
    rows = [[label, *(p50_p95(found[key]) for found in live.values())] for label, key in times.items()]
    rows += [[label, *(number(found[key], 2) for found in live.values())] for label, key in figures.items()]
    return Table("Streamed", ["", *live], rows)


def _draw(figure: Figure, offline: dict[str, dict[str, Any]], streamed: dict[str, list[StreamedClip]]) -> None:
    left, right = figure.subplots(1, 2)
    labels = [label.replace(" ", "\n") for label in offline]
    plots.bars(left, labels, {"": [found["wall_ms"]["p50"] for found in offline.values()]}, "complete utterance (ms)")
    series = {label: [ms for h in heard for ms in h.words.stable_ms] for label, heard in streamed.items()}
    known = [np.percentile(values, 99) for values in series.values() if values]
    plots.shares(right, series, "word spoken to stable (ms)", most=1.05 * float(max(known, default=1000.0)))

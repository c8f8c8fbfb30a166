"""What recognition takes: processor time, memory, time to start; and how far a token is from what memory allows."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import soundfile

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.confirm import ConfirmedGate
from agent.messages import SpeechChunk
from convert import speechset
from convert.speechset import Clip
from whisperlet.audio import Pcm16, seconds
from whisperlet.bundle import open_bundle

from . import plots
from .base import Context, Result, Table, bar, described, evenly, number
from .floor import Token, Traffic, copy_bandwidth, traffic
from .resident import cold_start_s, measure_resident
from .runs import Live, Message, Meter, Stepped, audio_chunks, gated, one_segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("en_read_dev",)
N_CLIPS = 60
N_PACED = 8  # clips in real time
N_TOKENS = 200
COLD_CLIP_S = 3.0
METHOD = """Processor time is that of the engine process (user and system, loading left out) per second of audio. \
*Finals only*: each clip handed over at once. *With partials*: through the gate, 20 ms at a time, each answered \
before the next, so no partial is left out however slow the machine. *In real time*: through gate and supervisor, \
where an engine that is behind makes fewer. Shares of encoder and decoder are of their wall time together. *Gate*: \
both voice detectors, in this process. *A token*: the decoder's signature for one token, run again and again in a \
process of its own; it has to read every int8 weight of the decoder with the vocabulary, read the keys and values of \
the tokens and of the audio (as long as the signature's tensors are) and write those of the tokens. The floor is \
these bytes at the rate at which numpy copies 512 MiB on as many threads, read and written bytes counted, best of \
five. A machine whose cache holds the weights can be faster than this floor. Memory: `whisperlet-agent run` on clips \
in real time with a broker, both processes at the moment when they had most together. *First final*: \
`whisperlet-agent transcribe` on the clip nearest to 3 s, from its start to its first line; once with an empty cache \
of packed weights, then the median of three."""


class Spent(msgspec.Struct, frozen=True):
    """What an engine process took for some clips."""

    audio_s: float
    core_s: float
    encode_share: float | None  # percent of the wall time of encoder and decoder
    peak_rss_mb: float
    load_s: float

    @property
    def rate(self) -> float:
        """Core-seconds per second of audio."""
        return round(self.core_s / self.audio_s, 4)


def run(context: Context) -> Result:
    """One measurement after the other, so that none disturbs the next."""
    clips = context.clips("en_read_dev", N_CLIPS)
    few = evenly(clips, N_PACED)
    spent = {
        "finals only": spend(context, clips, lambda pcm: one_segment(pcm, None), partials=False),
        "with partials": spend(context, clips, gated, partials=True),
        "with partials, in real time": spend_live(context, few),
    }
    gate = gate_rate(clips)
    manifest = open_bundle(context.bundle).manifest
    token = time_token(context)
    bandwidth = copy_bandwidth(context.threads)
    resident = measure_resident(context.bundle, evenly(clips, 6), context.threads)
    first_s, later_s = cold_start_s(context.bundle, cold_clip(context))
    moved = traffic(manifest, token.n_cross)
    floor_ms = 1e3 * moved.total / bandwidth
    figures: dict[str, Any] = {
        "core_s_per_audio_s": {name: s.rate for name, s in spent.items()} | {"gate": round(gate, 4)},
        "encode_share_percent": {name: s.encode_share for name, s in spent.items()},
        "engine_peak_rss_mb": {name: round(s.peak_rss_mb, 1) for name, s in spent.items()},
        "engine_load_s": round(spent["finals only"].load_s, 3),
        "token": token,
        "token_traffic_bytes": moved,
        "copy_bytes_per_s": round(bandwidth),
        "floor_ms": round(floor_ms, 3),
        "token_over_floor": round(token.token_ms / floor_ms, 2),
        "resident": resident,
        "first_start_s": round(first_s, 2),
        "cold_start_s": round(later_s, 2),
    }
    rates = {name: s.rate for name, s in spent.items()}
    memory = {"ear": resident.ear_mb, "engine": resident.engine_mb}
    return Result(
        title="Cost",
        method=METHOD,
        tables=[_spent_table(spent, gate), _token_table(token, moved, bandwidth, floor_ms), _agent_table(figures)],
        figures=figures,
        data=[described("en_read_dev", clips, spent["with partials"].audio_s)],
        draw=lambda figure: _draw(figure, rates, memory),
    )


def spend(
    context: Context, clips: Sequence[Clip], cut: Callable[[Pcm16], Iterable[SpeechChunk]], *, partials: bool
) -> Spent:
    """Clips through an engine process, a chunk at a time."""
    messages, audio_s = [], 0.0
    what = "with partials" if partials else "finals only"
    with Stepped(context.bundle, context.recogniser(partials=partials)) as engine, bar(what, len(clips)) as advance:
        for clip in clips:
            pcm = read_file(clip.audio)
            messages += engine.hear(cut(pcm))
            audio_s += seconds(len(pcm))
            advance()
        return _spent(engine.meter, engine.load_s, audio_s, messages)


def spend_live(context: Context, clips: Sequence[Clip]) -> Spent:
    """Clips in real time."""
    messages, audio_s = [], 0.0
    with Live(context.bundle, context.recogniser()) as live, bar("in real time", len(clips)) as advance:
        for clip in clips:
            pcm = read_file(clip.audio)
            messages += live.play(pcm).messages
            audio_s += seconds(len(pcm))
            advance()
        return _spent(live.meter, live.load_s, audio_s, messages)


def _spent(meter: Meter, load_s: float, audio_s: float, messages: Sequence[Message]) -> Spent:
    encode_ms = sum(message.transcript.encode_ms for message in messages)
    total_ms = encode_ms + sum(message.transcript.decode_ms for message in messages)
    share = round(100 * encode_ms / total_ms, 1) if total_ms else None
    return Spent(audio_s, meter.core_s, share, meter.peak_rss_mb, load_s)


def gate_rate(clips: Sequence[Clip]) -> float:
    """Core-seconds per second of audio of both voice detectors."""
    core_s = audio_s = 0.0
    for clip in clips:
        pcm = read_file(clip.audio)
        gate = ConfirmedGate(VadConfig())
        began_s = time.process_time()
        for chunk in audio_chunks(pcm):
            gate.feed(chunk)
        core_s += time.process_time() - began_s
        audio_s += seconds(len(pcm))
    return core_s / audio_s


def time_token(context: Context) -> Token:
    """`floor.time_token` in a process that does nothing else."""
    n_tokens = 20 if context.quick else N_TOKENS
    command = [sys.executable, "-m", "tests.benchmarks.floor", str(context.bundle), str(context.threads), str(n_tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Token)


def cold_clip(context: Context) -> Clip:
    """The clip nearest to 3 s."""
    clips = speechset.read(context.speech / "en_read_dev")
    return min(clips, key=lambda clip: abs(soundfile.info(clip.audio).duration - COLD_CLIP_S))


def _spent_table(spent: dict[str, Spent], gate: float) -> Table:
    rows = [
        [name, number(s.rate, 3), number(s.encode_share, 0), number(s.peak_rss_mb), number(s.audio_s / 60, 1)]
        for name, s in spent.items()
    ]
    header = ["engine process", "core-s per audio-s", "encoder's share (%)", "peak memory (MB)", "audio (min)"]
    return Table("Processor time", header, [*rows, ["gate", number(gate, 4), "-", "-", "-"]])


def _token_table(token: Token, moved: Traffic, bandwidth: float, floor_ms: float) -> Table:
    rows = [
        ["weights with the vocabulary (MB)", number(moved.weights / 1e6, 1)],
        [f"keys and values read, {token.n_cross} frames (MB)", number(moved.state_read / 1e6, 1)],
        ["keys and values written (MB)", number(moved.state_written / 1e6, 1)],
        ["copying (GB/s)", number(bandwidth / 1e9, 1)],
        ["floor (ms)", number(floor_ms, 2)],
        ["measured (ms)", number(token.token_ms, 2)],
        ["measured / floor", number(token.token_ms / floor_ms, 2)],
    ]
    return Table("A token", ["", "figure"], rows)


def _agent_table(figures: dict[str, Any]) -> Table:
    resident = figures["resident"]
    rows = [
        ["ear, resident (MB)", number(resident.ear_mb)],
        ["engine, resident (MB)", number(resident.engine_mb)],
        ["both (MB)", number(resident.total_mb)],
        ["both, shared pages counted once (MB)", number(resident.total_pss_mb)],
        ["first start ever to first final of 3 s (s)", number(figures["first_start_s"], 2)],
        ["later start to first final of 3 s (s)", number(figures["cold_start_s"], 2)],
    ]
    return Table("The agent", ["", "figure"], rows)


def _draw(figure: Figure, rates: dict[str, float], memory: dict[str, float]) -> None:
    left, right = figure.subplots(1, 2, width_ratios=[3, 2])
    plots.bars(left, [name.replace(", ", ",\n") for name in rates], {"": list(rates.values())}, "core-s per audio-s")
    plots.bars(right, list(memory), {"": list(memory.values())}, "resident memory (MB)")

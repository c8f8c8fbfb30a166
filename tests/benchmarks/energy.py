"""Joules, where the processor tells them, and processor time: ours against the model as it was published."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from agent.audio_files import read_file
from agent.config import PowerConfig
from agent.energy import Meter
from agent.power import power_source
from convert.speechset import Clip
from whisperlet.audio import Pcm16, seconds

from . import plots
from .base import Context, Result, Table, bar, described, number
from .peer import Peer
from .runs import Stepped, gated, one_segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("en_read_dev",)
N_CLIPS = 20
IDLE_S = 20.0
NO_METER = "the processor's RAPL counters are not there or cannot be read"
STREAMING, FINALS, TORCH = "ours, streaming", "ours, finals only", "PyTorch float32, full window"
METHOD = """The same clips, as fast as they can be heard, by the engine process through the gate, 20 ms at a time \
with partials, by the engine process at once without partials, and by the checkpoint in PyTorch float32 with the full \
30 s window and the same greedy rules. Processor time is that of the process that does it. Energy is that of the \
processor package (RAPL) during the run, everything else on the machine included; *above idle* leaves out what the \
package used, in as long a time, while nothing was heard."""


class Used(msgspec.Struct, frozen=True):
    """What it took to hear the clips."""

    core_s: float
    wall_s: float
    joules: float | None  # of the package; None without a meter


def run(context: Context) -> Result:
    """One way after the other."""
    clips = context.clips("en_read_dev", N_CLIPS)
    audio_s = sum(seconds(len(read_file(clip.audio))) for clip in clips)
    meter = Meter(power_source(PowerConfig(source="rapl"), lambda: 0.0))
    idle_watts = idle(meter, 2.0 if context.quick else IDLE_S)
    used = {
        STREAMING: _ours(context, clips, meter, STREAMING, partials=True),
        FINALS: _ours(context, clips, meter, FINALS, partials=False),
        TORCH: _torch(context, clips, meter),
    }
    figures: dict[str, Any] = {
        "per_audio_s": {name: per_second(u, audio_s, idle_watts) for name, u in used.items()},
        "idle_watts": idle_watts,
        "meter": "rapl" if idle_watts is not None else None,
        "no_meter_because": None if idle_watts is not None else NO_METER,
    }
    return Result(
        title="Energy",
        method=METHOD if idle_watts is not None else f"{METHOD} On this machine there is no meter: {NO_METER}.",
        tables=[_table(figures["per_audio_s"])],
        figures=figures,
        details=used,
        data=[described("en_read_dev", clips, audio_s)],
        draw=lambda figure: _draw(figure, figures["per_audio_s"]),
    )


def idle(meter: Meter, duration_s: float) -> float | None:
    """Watts of the package while nothing is heard."""
    meter.read()
    time.sleep(duration_s)
    energy = meter.read()
    return energy.watts if energy else None


def _ours(context: Context, clips: Sequence[Clip], meter: Meter, what: str, *, partials: bool) -> Used:
    with Stepped(context.bundle, context.recogniser(partials=partials)) as engine:

        def hear(pcm: Pcm16) -> None:
            engine.hear(gated(pcm) if partials else one_segment(pcm, None))

        return measured(what, clips, hear, lambda: engine.meter.core_s, meter)


def _torch(context: Context, clips: Sequence[Clip], meter: Meter) -> Used:
    with tempfile.TemporaryDirectory() as name, Peer("pytorch", context.source, context.threads, Path(name)) as peer:
        return measured(TORCH, clips, peer.ask, lambda: peer.meter.core_s, meter)


def measured(
    what: str, clips: Sequence[Clip], hear: Callable[[Pcm16], object], core_s: Callable[[], float], meter: Meter
) -> Used:
    """All clips, one after the other; the first is heard once before, so that what is made once does not count."""
    audio = [read_file(clip.audio) for clip in clips]
    hear(audio[0])
    meter.read()
    began_s, began_core_s = time.monotonic(), core_s()
    with bar(what, len(clips)) as advance:
        for pcm in audio:
            hear(pcm)
            advance()
    energy = meter.read()
    return Used(
        core_s=round(core_s() - began_core_s, 2),
        wall_s=round(time.monotonic() - began_s, 2),
        joules=energy.joules if energy else None,
    )


def per_second(used: Used, audio_s: float, idle_watts: float | None) -> dict[str, float | None]:
    """Processor time and energy for a second of audio."""
    joules = used.joules
    above = None if joules is None or idle_watts is None else joules - idle_watts * used.wall_s
    return {
        "core_s": round(used.core_s / audio_s, 4),
        "joules": None if joules is None else round(joules / audio_s, 3),
        "joules_above_idle": None if above is None else round(above / audio_s, 3),
    }


def _table(found: dict[str, dict[str, float | None]]) -> Table:
    header = ["per second of audio", "core-s", "J", "J above idle", "core-s : PyTorch"]
    torch_core_s = found[TORCH]["core_s"] or 1.0
    rows = [
        [
            name,
            number(f["core_s"], 3),
            number(f["joules"], 2),
            number(f["joules_above_idle"], 2),
            number((f["core_s"] or 0.0) / torch_core_s, 2),
        ]
        for name, f in found.items()
    ]
    return Table("Energy", header, rows)


def _draw(figure: Figure, found: dict[str, dict[str, float | None]]) -> None:
    names = [name.replace(", ", ",\n") for name in found]
    has_joules = any(f["joules"] is not None for f in found.values())
    panels = figure.subplots(1, 2) if has_joules else [figure.subplots()]
    plots.bars(panels[0], names, {"": [f["core_s"] for f in found.values()]}, "core-s per audio-s")
    if has_joules:
        kinds = {"total": "joules", "above idle": "joules_above_idle"}
        series = {label: [f[key] for f in found.values()] for label, key in kinds.items()}
        plots.bars(panels[1], names, series, "J per audio-s")

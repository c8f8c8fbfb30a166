"""How right: finals, finals after partials, and what the stream alone heard; clean, in noise, and by overlap."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from agent.audio_files import read_file
from agent.config import RecogniserConfig
from agent.messages import SpeechChunk
from convert import scoring
from convert.speechset import Clip
from whisperlet.audio import Pcm16, seconds
from whisperlet.bundle import open_bundle

from . import plots
from .audio_mix import mixed, track
from .base import Context, Result, Table, bar, described, number
from .runs import Message, Stepped, joined, one_segment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("en_read_dev", "zh_read", "noise_babble", "noise_room")
SNR_DB = 10.0
MIN_PERIOD, MIN_ROUNDS = 4, 3  # words, and how often they must come, to be a loop
OFFLINE, FINAL, STREAM = "finals, partials off", "finals after partials", "the stream alone"
METHOD = """Each clip is one segment, without the gate. *Finals, partials off*: handed over at once. *Finals after \
partials*: 20 ms at a time, each answered before the next. *The stream alone*: the same without the last pass over \
the whole utterance (`final_pass = false`; of a version without that setting, its last partial). Noise: a stretch of \
the set, its place drawn by the clip's name, is added at a ratio of 10 dB between the mean powers of clip and noise. \
English is scored as word error rate after Whisper's English normaliser, Chinese as character error rate after \
folding to Simplified. *Loops*: transcripts that were withheld as a repetition or end in at least three rounds of at \
least four words, per 100 utterances. *Overlap*: frames of 20 ms that a step of the streaming encoder hears beyond \
those it commits. These are development sets: en_read_dev comes from a training partition of LibriSpeech."""


class Heard(msgspec.Struct, frozen=True):
    """A clip as it was heard in one way."""

    id: str
    n_errors: int  # words or characters
    n_reference: int
    looped: bool


class Task(msgspec.Struct, frozen=True):
    """What is to be heard."""

    name: str
    clips: list[Clip]
    sound: Callable[[Clip], Pcm16]


def run(context: Context) -> Result:
    """Every way on every condition, then the overlaps."""
    tasks = conditions(context)
    found: dict[str, dict[str, list[Heard]]] = {task.name: {} for task in tasks}
    audio_s: dict[str, float] = {}
    for task in tasks:
        offline, _ = hear(context, task, OFFLINE, lambda pcm: one_segment(pcm, None), partials=False)
        final, last = hear(context, task, FINAL, one_segment)
        if "final_pass" in RecogniserConfig.__struct_fields__:
            last, _ = hear(context, task, STREAM, one_segment, final_pass=False)
        found[task.name] = {OFFLINE: offline, FINAL: final, STREAM: last}
        audio_s[task.name] = sum(seconds(len(task.sound(clip))) for clip in task.clips)
    by_overlap = overlaps(context, tasks[0])
    rates = {name: {way: rate(heard) for way, heard in ways.items()} for name, ways in found.items()}
    loops = {name: {way: loops_per_100(heard) for way, heard in ways.items()} for name, ways in found.items()}
    rows = [
        [name, *(f"{number(rates[name][way], 2)} ({number(loops[name][way], 1)})" for way in rates[name])]
        for name in rates
    ]
    tables = [Table("Error rate in percent (loops per 100 utterances)", ["", OFFLINE, FINAL, STREAM], rows)]
    return Result(
        title="Accuracy",
        method=METHOD,
        tables=[*tables, *_overlap_tables(by_overlap)],
        figures={
            "error_rate_percent": rates,
            "loops_per_100": loops,
            "by_overlap": {
                bundle: {str(r): {"wer": rate(h), "loops_per_100": loops_per_100(h)} for r, h in heard.items()}
                for bundle, heard in by_overlap.items()
            },
        },
        details=found,
        data=[described(task.name, task.clips, audio_s[task.name]) for task in tasks],
        draw=lambda figure: _draw(figure, rates, by_overlap),
    )


def conditions(context: Context) -> list[Task]:
    """Clean English and Chinese, English in babble and in the noise of rooms."""
    english = context.clips("en_read_dev")
    tasks = [Task("en_read_dev", english, _clean), Task("zh_read", context.clips("zh_read"), _clean)]
    noises = {name: _noisy(context, name) for name in ("noise_babble", "noise_room")}
    return [*tasks, *(Task(f"en_read_dev + {name}, {SNR_DB:g} dB", english, sound) for name, sound in noises.items())]


def _clean(clip: Clip) -> Pcm16:
    return read_file(clip.audio)


def _noisy(context: Context, name: str) -> Callable[[Clip], Pcm16]:
    noise = track(msgspec.structs.replace(context, limit=None, quick=False).clips(name))
    return lambda clip: mixed(read_file(clip.audio), noise, SNR_DB, f"{name} {clip.id}")


def hear(
    context: Context,
    task: Task,
    way: str,
    cut: Callable[[Pcm16], Iterable[SpeechChunk]],
    bundle: Path | None = None,
    **config: object,
) -> tuple[list[Heard], list[Heard]]:
    """Finals of every clip, and the last partials."""
    language = task.clips[0].language
    finals, lasts = [], []
    settings = context.recogniser(language=language, **config)
    with Stepped(bundle or context.bundle, settings) as engine, bar(f"{task.name}: {way}", len(task.clips)) as advance:
        for clip in task.clips:
            messages = engine.hear(cut(task.sound(clip)))
            finals.append(scored(clip, joined(messages, language), messages))
            partials = [m.transcript.text for m in messages if not m.transcript.is_final]
            lasts.append(scored(clip, partials[-1] if partials else "", []))
            advance()
    return finals, lasts


def scored(clip: Clip, text: str, messages: Sequence[Message]) -> Heard:
    """Errors of a clip."""
    pair = scoring.normalise(clip.text or "", clip.language), scoring.normalise(text, clip.language)
    spaceless = clip.language in scoring.SPACELESS
    units = len("".join(pair[0].split())) if spaceless else len(pair[0].split())
    error_rate = (scoring.character_error_rate if spaceless else scoring.word_error_rate)([pair]) or 0.0
    withheld = any(message.transcript.rejected == "repetition" for message in messages)
    return Heard(clip.id, round(error_rate * units / 100), units, withheld or is_loop(text, spaceless=spaceless))


def is_loop(text: str, *, spaceless: bool = False) -> bool:
    """Whether a text ends in at least three rounds of at least four words, or of as many characters."""
    words = list("".join(text.split())) if spaceless else text.lower().split()
    for period in range(MIN_PERIOD, len(words) // MIN_ROUNDS + 1):
        rounds = [words[len(words) - (i + 1) * period : len(words) - i * period] for i in range(MIN_ROUNDS)]
        if all(one == rounds[0] for one in rounds):
            return True
    return False


def rate(heard: Sequence[Heard]) -> float | None:
    """Errors in percent of the reference."""
    total = sum(h.n_reference for h in heard)
    return round(100 * sum(h.n_errors for h in heard) / total, 2) if total else None


def loops_per_100(heard: Sequence[Heard]) -> float:
    """Loops per 100 utterances."""
    return round(100 * sum(h.looped for h in heard) / len(heard), 2)


def overlaps(context: Context, task: Task) -> dict[str, dict[int, list[Heard]]]:
    """What the stream alone hears, by bundle and overlap; nothing of a version that has no such setting."""
    if "overlap_frames" not in RecogniserConfig.__struct_fields__:
        return {}
    found: dict[str, dict[int, list[Heard]]] = {}
    for bundle in filter(None, (context.bundle, context.without_adapter)):
        offered = [spec.overlap for spec in getattr(open_bundle(bundle).manifest, "streams", [])]
        found[bundle.stem] = {}
        for overlap in context.overlaps or offered:
            settings = {"final_pass": False, "overlap_frames": overlap}
            way = f"{bundle.stem}, overlap {overlap}"
            found[bundle.stem][overlap], _ = hear(context, task, way, one_segment, bundle, **settings)
    return found


def _overlap_tables(by_overlap: dict[str, dict[int, list[Heard]]]) -> list[Table]:
    every = sorted({overlap for heard in by_overlap.values() for overlap in heard})
    if not every:
        return []
    rows = [
        [name, *(f"{number(rate(heard[r]), 2)} ({number(loops_per_100(heard[r]), 1)})" for r in every)]
        for name, heard in by_overlap.items()
    ]
    title = "The stream alone by overlap (frames): WER in percent (loops per 100 utterances)"
    return [Table(title, ["", *map(str, every)], rows)]


def _draw(
    figure: Figure, rates: dict[str, dict[str, float | None]], by_overlap: dict[str, dict[int, list[Heard]]]
) -> None:
    ways = next(iter(rates.values()))
    panels = figure.subplots(1, 2, width_ratios=[3, 2]) if by_overlap else [figure.subplots()]
    names = [name.replace(" + noise_", "\n+ ").replace(", ", "\n") for name in rates]
    plots.bars(panels[0], names, {way: [found[way] for found in rates.values()] for way in ways}, "error rate (%)")
    if by_overlap:
        for name, heard in by_overlap.items():
            panels[1].plot(sorted(heard), [rate(heard[r]) or 0.0 for r in sorted(heard)], marker="o", label=name)
        panels[1].set_ylim(bottom=0)
        panels[1].legend(frameon=False, fontsize="small")
        plots.plain(panels[1], "overlap (frames of 20 ms)", "WER of the stream alone (%)")

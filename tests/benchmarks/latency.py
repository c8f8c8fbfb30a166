"""How soon: the final after the last word, the first partial after the first, and every word after it was spoken."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from agent.audio_files import read_file
from convert import scoring
from convert.speechset import Clip
from whisperlet.audio import Pcm16, seconds

from . import plots
from .alignment import Spoken, spoken_words
from .base import Context, Result, Table, bar, described, number, p50_p95, percent, spread
from .runs import Live, Message, Played, Stepped, joined, one_segment
from .words import Emission, Flicker, emission, flicker, screen

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SETS = ("en_read_dev", "en_prompts")
METHOD = """Each clip is played in real time, 20 ms at a time, through the agent's own gate (hang-over included) and \
supervisor to its engine process, one clip after the other. *Decision to final*: from when the gate decides that \
speech has ended to when the final is there. *Last voiced sample to final*: the same with the hang-over. *First \
partial*: from the gate's first voiced frame to the first partial with text. *Word shown*: from the end of the spoken \
word to the first message from which on every later one and the final keep it at that place; *word stable*: the same, \
and called stable. Words are compared after Whisper's normaliser, and messages aligned to the final, and the final to \
the reference, at the least edit distance; words that the final has wrong have no latency. A word ends where forced \
alignment says: the reference in small letters is forced through the float model over the full window, the \
cross-attention of its alignment heads is normalised, smoothed by a median over 140 ms and averaged, and dynamic time \
warping finds where each token begins (the method of openai-whisper, good to about 100 ms). *Changed words*: share of \
the words that a partial brought which a later message dropped or changed. *Stable violations*: messages whose stable \
text is no prefix of a later text, were it for a comma; *by a partial*: ... of a later partial's, the final left \
aside; *stable words*: words of the last partial's stable text, after normalisation."""


class Heard(msgspec.Struct, frozen=True):
    """What was measured on a clip. `*_ms` in milliseconds."""

    id: str
    duration_s: float
    reference: str
    text: str
    unsegmented_text: str  # the whole clip heard at once, without the gate
    n_utterances: int
    finalise_ms: list[float]  # of each final
    end_to_final_ms: list[float]
    first_partial_ms: list[float]  # of each utterance that had one
    words: Emission
    flicker: Flicker


def run(context: Context) -> Result:
    """Both sets, one after the other."""
    sets = {name: context.clips(name) for name in SETS}
    spoken = {name: spoken_words(name, clips, context.source) for name, clips in sets.items()}
    heard: dict[str, list[Heard]] = {}
    for name, clips in sets.items():
        unsegmented = hear_unsegmented(clips, context)
        with Live(context.bundle, context.recogniser()) as live, bar(f"{name}: in real time", len(clips)) as advance:
            heard[name] = []
            for clip in clips:
                heard[name].append(_heard(clip, live, spoken[name][clip.id], unsegmented[clip.id]))
                advance()
    return result(heard)


def hear_unsegmented(clips: Sequence[Clip], context: Context) -> dict[str, str]:
    """Text of each clip as one segment, without the gate and without partials."""
    texts = {}
    with (
        Stepped(context.bundle, context.recogniser(partials=False)) as engine,
        bar("hearing each clip at once", len(clips)) as advance,
    ):
        for clip in clips:
            texts[clip.id] = joined(engine.hear(one_segment(read_file(clip.audio), None)))
            advance()
    return texts


def _heard(clip: Clip, live: Live, spoken: Spoken, unsegmented: str) -> Heard:
    pcm = read_file(clip.audio)
    return measured(clip, pcm, live.play(pcm), spoken, unsegmented)


def measured(clip: Clip, pcm: Pcm16, played: Played, spoken: Spoken, unsegmented: str = "") -> Heard:
    """Everything about a clip that was played."""
    shown = screen(played.messages)
    return Heard(
        id=clip.id,
        duration_s=round(seconds(len(pcm)), 3),
        reference=clip.text or "",
        text=joined(played.messages),
        unsegmented_text=unsegmented,
        n_utterances=len({message.transcript.utterance for message in played.finals}),
        finalise_ms=_since(played, "decided_monotonic_s"),
        end_to_final_ms=_since(played, "speech_end_monotonic_s"),
        first_partial_ms=first_partials(played),
        words=emission(shown, spoken),
        flicker=flicker(shown),
    )


def _since(played: Played, event: str) -> list[float]:
    """Milliseconds from an event to each final."""
    happened = [(getattr(message.transcript, event), message.at_s) for message in played.finals]
    return [round(1e3 * (at_s + played.opened_s - then_s), 1) for then_s, at_s in happened if then_s is not None]


def first_partials(played: Played) -> list[float]:
    """Milliseconds from the first voiced sample of each utterance to its first partial with text."""
    first: dict[int, Message] = {}
    for message in played.messages:
        if message.transcript.text and not message.transcript.is_final:
            first.setdefault(message.transcript.utterance, message)
    return [round(1e3 * (message.at_s - played.speech_starts[key]), 1) for key, message in first.items()]


def figures(heard: Sequence[Heard]) -> dict[str, Any]:
    """Figures of a set."""
    n_shown = sum(h.flicker.n_shown for h in heard)
    n_words = sum(h.words.n_words for h in heard)
    shown = [ms for h in heard for ms in h.words.shown_ms]
    return {
        "n_clips": len(heard),
        "n_utterances": sum(h.n_utterances for h in heard),
        "finalise_ms": spread([ms for h in heard for ms in h.finalise_ms]),
        "end_to_final_ms": spread([ms for h in heard for ms in h.end_to_final_ms]),
        "first_partial_ms": spread([ms for h in heard for ms in h.first_partial_ms]),
        "word_shown_ms": spread(shown),
        "word_stable_ms": spread([ms for h in heard for ms in h.words.stable_ms]),
        "words_matched_percent": percent(len(shown), n_words),
        "changed_words_percent": percent(sum(h.flicker.n_changed for h in heard), n_shown),
        "n_messages": sum(h.flicker.n_messages for h in heard),
        "stable_violations": sum(h.flicker.stable_violations for h in heard),
        "stable_violations_by_partials": sum(h.flicker.stable_violations_by_partials for h in heard),
        "stable_words_changed_percent": percent(
            sum(h.flicker.stable_words_changed for h in heard), sum(h.flicker.n_stable_words for h in heard)
        ),
        "stable_chars_changed": sum(h.flicker.stable_chars_changed for h in heard),
        "clips_cut_percent": percent(sum(h.n_utterances > 1 for h in heard), len(heard)),
        "clips_missed_percent": percent(sum(h.n_utterances == 0 for h in heard), len(heard)),
        "wer_segmented": _word_error_rate([(h.reference, h.text) for h in heard]),
        "wer_unsegmented": _word_error_rate([(h.reference, h.unsegmented_text) for h in heard]),
    }


def _word_error_rate(pairs: Sequence[tuple[str, str]]) -> float | None:
    rate = scoring.word_error_rate([(scoring.normalise(a, "en"), scoring.normalise(b, "en")) for a, b in pairs])
    return None if rate is None else round(rate, 2)


def result(heard: dict[str, list[Heard]]) -> Result:
    """Tables and picture."""
    found = {name: figures(clips) for name, clips in heard.items()}
    times = {
        "decision to final": "finalise_ms",
        "last voiced sample to final": "end_to_final_ms",
        "first voiced sample to first partial": "first_partial_ms",
        "word shown": "word_shown_ms",
        "word stable": "word_stable_ms",
    }
    shares = {
        "words of the reference that were matched": "words_matched_percent",
        "words of partials that changed later": "changed_words_percent",
        "stable words that the final changed": "stable_words_changed_percent",
        "clips that the gate cut": "clips_cut_percent",
        "clips that the gate missed": "clips_missed_percent",
        "WER, joined finals": "wer_segmented",
        "WER, each clip heard at once": "wer_unsegmented",
    }
    counts = {
        "stable violations": "stable_violations",
        "stable violations by a partial": "stable_violations_by_partials",
        "messages": "n_messages",
        "utterances": "n_utterances",
        "clips": "n_clips",
    }
    rows = [[label, *(number(f[key], 2) for f in found.values())] for label, key in shares.items()]
    rows += [[label, *(number(f[key]) for f in found.values())] for label, key in counts.items()]
    return Result(
        title="Latency",
        method=METHOD,
        tables=[
            Table(
                "Milliseconds, p50 / p95",
                ["", *found],
                [[label, *(p50_p95(f[key]) for f in found.values())] for label, key in times.items()],
            ),
            Table("Percent, and counts", ["", *found], rows),
        ],
        figures=found,
        details=heard,
        data=[described(name, clips, sum(h.duration_s for h in clips)) for name, clips in heard.items()],
        draw=lambda figure: _draw(figure, [h for clips in heard.values() for h in clips]),
    )


def _draw(figure: Figure, heard: Sequence[Heard]) -> None:
    left, right = figure.subplots(1, 2)
    finals = {
        "decision to final": [ms for h in heard for ms in h.finalise_ms],
        "last voiced sample to final": [ms for h in heard for ms in h.end_to_final_ms],
    }
    words = {
        "word shown": [ms for h in heard for ms in h.words.shown_ms],
        "word stable": [ms for h in heard for ms in h.words.stable_ms],
        "first partial": [ms for h in heard for ms in h.first_partial_ms],
    }
    plots.shares(left, finals, "latency of finals (ms)", most=_most(finals))
    plots.shares(right, words, "latency of words (ms)", most=_most(words))


def _most(series: dict[str, list[float]]) -> float | None:
    """Where to end the axis: beyond all but the last percent."""
    known = [np.percentile(values, 99) for values in series.values() if values]
    return 1.05 * float(max(known)) if known else None

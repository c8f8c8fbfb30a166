"""An hour of noise: how much of it passes for speech, and what words are invented; and what speech the gate misses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from agent.audio_files import read_file
from agent.config import VadConfig
from agent.confirm import ConfirmedGate
from agent.vad import Gate, Hearing, segments
from convert.speechset import Clip
from whisperlet.audio import Pcm16, seconds

from . import plots
from .audio_mix import endless
from .base import Context, Result, Table, bar, described, number, percent
from .runs import TAIL, Message, Stepped, audio_chunks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NOISES = {"noise_events": 3600.0, "noise_room": 3600.0, "noise_babble": 900.0, "noise_music": 900.0}  # seconds of each
SPEECH = ("en_read_dev", "en_prompts", "en_nonnative", "zh_read")
SETS = (*NOISES, *SPEECH)
QUICK_S = 120.0
LOWEST_DB, HIGHEST_DB = -20.0, 6.0
METHOD = """Noise: the clips of a set in turn, each time at another level (drawn evenly from -20 to +6 dB, the same \
in every run), go through the gate with its confirmation and the engine process with partials, 20 ms at a time. \
*Opened*: utterances that webrtcvad alone would have passed; *passed*: those that Silero's network confirmed; *with \
words*: those whose final has text, and how many words. *Flashed*: utterances whose partials showed words that the \
final took back. Babble is many people talking at once, so what is heard there need not be invented; music may be \
sung. Missed speech: clips, with a second and a half of silence after each, in which the gate finds no utterance at \
all."""


class NoiseHeard(msgspec.Struct, frozen=True):
    """What came of a noise."""

    audio_s: float
    n_opened: int
    n_passed: int
    n_with_words: int
    n_words: int
    n_flashed: int
    texts: list[str]

    def per_hour(self, n: int) -> float:
        """A count, per hour of noise."""
        return round(n * 3600 / self.audio_s, 1)


class Missed(msgspec.Struct, frozen=True):
    """Clips in which a gate found no speech."""

    n_clips: int
    by_first_gate: list[str]  # webrtcvad alone
    by_both_gates: list[str]


def run(context: Context) -> Result:
    """Noise first, then speech."""
    noises = {name: hear(context, name, QUICK_S if context.quick else s) for name, s in NOISES.items()}
    speech = {name: context.clips(name) for name in SPEECH}
    missed = {name: missing(name, clips) for name, clips in speech.items()}
    lengths = {name: sum(seconds(len(read_file(clip.audio))) for clip in clips) for name, clips in speech.items()}
    played = [f"{name} (repeated to {found.audio_s / 60:.0f} min)" for name, found in noises.items()]
    return Result(
        title="Noise",
        method=METHOD,
        tables=[_noise_table(noises), _missed_table(missed)],
        figures={
            "noise": {name: _per_hour(found) for name, found in noises.items()},
            "missed_percent": {
                name: {
                    "first_gate": percent(len(found.by_first_gate), found.n_clips),
                    "both_gates": percent(len(found.by_both_gates), found.n_clips),
                }
                for name, found in missed.items()
            },
        },
        details={"noise": noises, "missed": missed},
        data=[*played, *(described(name, clips, lengths[name]) for name, clips in speech.items())],
        draw=lambda figure: _draw(figure, noises, missed),
    )


def hear(context: Context, name: str, duration_s: float) -> NoiseHeard:
    """A noise through gate and engine."""
    clips = msgspec.structs.replace(context, limit=None, quick=False).clips(name)
    gate, messages, start = ConfirmedGate(VadConfig()), list[Message](), 0
    with Stepped(context.bundle, context.recogniser()) as engine, bar(name, round(duration_s)) as advance:
        for piece in endless(clips, duration_s, name, LOWEST_DB, HIGHEST_DB):
            for chunk in audio_chunks(piece, start=start):
                messages += [message for speech in gate.feed(chunk) for message in engine.ask(speech)]
            for _ in range(int(seconds(start + len(piece))) - int(seconds(start))):
                advance()
            start += len(piece)
        messages += [message for speech in gate.flush() for message in engine.ask(speech)]
    return counted(messages, gate.n_rejected, seconds(start))


def counted(messages: Iterable[Message], n_rejected: int, audio_s: float) -> NoiseHeard:
    """Utterances and words among the messages."""
    finals: dict[tuple[int, int], str] = {}
    partials: set[tuple[int, int]] = set()
    for message in messages:
        transcript = message.transcript
        if transcript.is_final:
            finals[transcript.key] = transcript.text
        elif transcript.text:
            partials.add(transcript.key)
    texts = [text for text in finals.values() if text]
    return NoiseHeard(
        audio_s=round(audio_s, 1),
        n_opened=len(finals) + n_rejected,
        n_passed=len(finals),
        n_with_words=len(texts),
        n_words=sum(len(text.split()) for text in texts),
        n_flashed=sum(not finals.get(key) for key in partials),
        texts=texts,
    )


def missing(name: str, clips: Sequence[Clip]) -> Missed:
    """Clips without an utterance, by each gate."""
    gates: dict[str, Callable[[VadConfig], Hearing]] = {"first": Gate, "both": ConfirmedGate}
    lost: dict[str, list[str]] = {key: [] for key in gates}
    with bar(f"{name}: through the gates", len(clips)) as advance:
        for clip in clips:
            pcm = read_file(clip.audio)
            for key, make in gates.items():
                if not hears_speech(pcm, make):
                    lost[key].append(clip.id)
            advance()
    return Missed(len(clips), lost["first"], lost["both"])


def hears_speech(pcm: Pcm16, make: Callable[[VadConfig], Hearing]) -> bool:
    """Whether a gate finds an utterance."""
    heard = np.concatenate([pcm, np.zeros(TAIL, np.int16)])
    return any(True for _ in segments(heard, VadConfig(), make(VadConfig())))


def _per_hour(found: NoiseHeard) -> dict[str, Any]:
    names = ("n_opened", "n_passed", "n_with_words", "n_words", "n_flashed")
    return {f"{name.removeprefix('n_')}_per_hour": found.per_hour(getattr(found, name)) for name in names}


def _noise_table(noises: dict[str, NoiseHeard]) -> Table:
    rows = [
        [name, *(number(value, 1) for value in _per_hour(found).values()), number(found.audio_s / 60)]
        for name, found in noises.items()
    ]
    return Table("Per hour of noise", ["", "opened", "passed", "with words", "words", "flashed", "heard (min)"], rows)


def _missed_table(missed: dict[str, Missed]) -> Table:
    rows = [
        [
            name,
            number(percent(len(found.by_first_gate), found.n_clips), 1),
            number(percent(len(found.by_both_gates), found.n_clips), 1),
            number(found.n_clips),
        ]
        for name, found in missed.items()
    ]
    return Table("Clips without an utterance (%)", ["", "webrtcvad alone", "both gates", "clips"], rows)


def _draw(figure: Figure, noises: dict[str, NoiseHeard], missed: dict[str, Missed]) -> None:
    left, right = figure.subplots(1, 2)
    kinds = {"opened": "n_opened", "passed": "n_passed", "with words": "n_with_words"}
    counts = {label: [f.per_hour(getattr(f, key)) for f in noises.values()] for label, key in kinds.items()}
    plots.bars(left, [name.replace("_", "\n") for name in noises], counts, "utterances per hour of noise")
    shares = {
        "webrtcvad alone": [percent(len(f.by_first_gate), f.n_clips) for f in missed.values()],
        "both gates": [percent(len(f.by_both_gates), f.n_clips) for f in missed.values()],
    }
    plots.bars(right, [name.replace("_", "\n") for name in missed], shares, "clips without an utterance (%)")

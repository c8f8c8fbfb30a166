"""The stage `heal`: a smaller Whisper learns from the one it was cut from, from nothing but audio.

Encoder outputs first: the teacher's frames are known, and nothing has to be said for them. Then both halves together, on
the teacher's own transcripts: frames, the decoder's last hidden states, and the distribution of each next token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import msgspec
from rich.progress import Progress

from whisperlet.errors import ConfigError

from .prune import TEACHER
from .speechset import Source
from .stages import CHECKPOINTS, Stage, StageReport, located

if TYPE_CHECKING:
    from .healing import Healing

MAX_SILENCE = 256  # frames that the teacher hears after an utterance


class Heal(Stage, frozen=True, kw_only=True, tag="heal"):
    """Self-distillation of all weights. Frames are 20 ms."""

    recovers: ClassVar[bool] = True

    audio: tuple[str, ...]  # folders or manifests, `:N` for the first N recordings; texts are not needed
    teacher: str = ""  # a checkpoint in Hugging Face's form; by default the one that `prune` has put beside its result
    steps: int = 600
    encoder_steps: int = 150  # of them, in which only the encoder learns
    batch_frames: int = 6000  # of audio in a step, over all its utterances
    learning_rate: float = 5e-5  # at 3e-4 what `prune` had fitted fell apart: the gap of tokens grew for 150 steps
    warmup_steps: int = 20
    final_rate: float = 0.02  # of the learning rate, at the end of a cosine
    clip_norm: float = 1.0
    frames_weight: float = 1.0  # of the encoder's error relative to the teacher's energy
    hidden_weight: float = 1.0  # of the same of the decoder's last hidden states
    tokens_weight: float = 1.0  # of the divergence of the next token's distribution, nats
    silence: tuple[int, int] = (64, 192)  # after an utterance: drawn between the two
    cache_mb: int = 2000  # of the teacher's frames are kept in memory, instead of computing them in every epoch
    seed: int = 0
    gap_every: int = 50  # steps between measurements on held-out utterances
    save_every: int = 25  # steps between checkpoints

    def __post_init__(self) -> None:
        if not self.audio:
            raise ValueError("`audio` must name something")
        if not 0 <= self.encoder_steps <= self.steps:
            raise ValueError("`encoder_steps` must be between 0 and `steps`")
        if min(self.steps, self.batch_frames, self.gap_every, self.save_every) < 1 or self.learning_rate <= 0:
            raise ValueError("`steps`, `batch_frames`, `gap_every`, `save_every` and `learning_rate` must be positive")
        if not 0 <= self.silence[0] <= self.silence[1] <= MAX_SILENCE:
            raise ValueError(f"`silence` must be two numbers of frames up to {MAX_SILENCE}, the smaller one first")

    def inputs(self) -> list[Path]:
        """The recordings, and the teacher if the recipe names it."""
        return [*(source.path for source in self.sources()), *([located(self.teacher)] if self.teacher else [])]

    def sources(self) -> list[Source]:
        """Where the recordings lie, and how many of them to take."""
        return [Source.parse(str(located(text))) for text in self.audio]


def run(stage: Heal, in_dir: Path, out_dir: Path, progress: Progress) -> StageReport:
    """Train, from where an interrupted run was."""
    from . import model as models
    from . import training
    from .healing import Healing
    from .utterances import listen

    began = time.monotonic()
    training.read(out_dir / CHECKPOINTS)  # if it is damaged, that is better known before the teacher transcribes
    teacher = models.load_directory(find_teacher(stage, in_dir), "teacher")
    lessons = listen("heal", teacher, stage.sources(), out_dir / CHECKPOINTS, progress)
    healing = Healing(stage, models.load_directory(in_dir, in_dir.name), lessons)
    bar = progress.add_task("heal", total=stage.steps)

    def show(healing: Healing) -> None:
        gap = healing.curve[-1]
        text = f"heal, gap of frames {gap.frames:.4f}, hidden {gap.hidden:.4f}, tokens {gap.tokens:.4f} nats"
        progress.update(bar, completed=healing.step, description=text)

    healing.run(out_dir / CHECKPOINTS, show)
    models.save_directory(healing.healed(), out_dir)
    curve = [msgspec.to_builtins(point) for point in healing.curve]
    details = {"data": healing.lessons.corpus.described(), "curve": curve, "training_s": round(healing.seconds, 1)}
    return StageReport("heal", round(time.monotonic() - began, 1), details)


def find_teacher(stage: Heal, in_dir: Path) -> Path:
    """The folder of the checkpoint to learn from. Raises ConfigError."""
    if stage.teacher:
        return located(stage.teacher)
    if not (in_dir / TEACHER).is_dir():
        raise ConfigError(
            "heal: nobody to learn from: put it after `prune`, or name a checkpoint's folder as `teacher`"
        )
    return in_dir / TEACHER

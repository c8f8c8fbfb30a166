"""Teaches an encoder to stream, from nothing but audio.

Teacher and student are the same encoder: the teacher sees a whole utterance with ample silence after it, the student
has a low-rank adapter and sees it in chunks with cached keys and values, or whole with little silence. The loss is the
squared error of the student's frames relative to the teacher's energy, and the divergence of what the decoder expects
over them from what it expects over the teacher's, on the teacher's own transcripts: nobody needs to know what was said.
An adapter that will stay beside the encoder's matrices, for streaming alone, need not learn to hear the whole.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from whisperlet.errors import ConfigError, ModelError

from . import adapter, divergence, losses, precision, streaming, training
from .corpus import Corpus
from .machine import describe
from .model import Checkpoint
from .speechset import Source
from .training import Run, mean
from .utterances import Lessons, listen

ROWS_PER_FRAME = 6  # computed for a frame of audio; where a step's overlap takes more, the batch is smaller: memory


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How to train. Frames are 20 ms."""

    steps: int = 140
    batch_frames: int = 3000  # of audio in a step, over all its utterances
    learning_rate: float = 4e-4
    warmup_steps: int = 10
    final_rate: float = 0.05  # of the learning rate, at the end of a cosine
    clip_norm: float = 1.0
    rank: int = 16
    alpha: int = 32
    chunks: tuple[int, ...] = (15, 15, 15, 20, 25, 45)  # C is drawn from these ...
    overlaps: tuple[int, ...] = (10, 20, 40, 40, 75)  # ... and R from these
    padding: int = 32  # frames of silence after a step's own
    context: int = 255  # committed frames that a step looks back on
    silence: tuple[int, int] = (48, 128)  # after an utterance, for the student: drawn between the two
    teacher_silence: int = 256
    tail_weight: float = 0.25  # of the frames that are not committed yet
    tokens_weight: float = 2.0  # of the divergence of the next token's distribution, nats
    n_reads: int = 3  # steps of an utterance at which the decoder reads
    whole_weight: float = 0.0  # of the error with the whole utterance in view, for an adapter that is to be merged
    seed: int = 0
    gap_every: int = 20  # steps between measurements on held-out utterances
    save_every: int = 10  # steps between checkpoints


class Point(msgspec.Struct, frozen=True):
    """One measurement on the held-out utterances: errors relative to the teacher's energy, divergence in nats a token."""

    step: int
    loss: float | None  # mean over the steps since the last point; of the first there are none
    streamed: float  # C 15, R 40
    short: float  # whole, 64 frames of silence
    tokens: float | None = None  # over what was streamed; of training without the decoder there is none


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """How an adapter came about; written beside it."""

    file: str
    source: str
    source_sha256: str
    data: list[dict[str, Any]]
    start: dict[str, Any] | None = None  # the adapter that was trained on: its file, SHA-256 and record
    settings: Settings
    curve: list[Point]
    seconds: float
    machine: str


class Training(Run):
    """An encoder that learns to stream."""

    point = Point

    def __init__(
        self,
        checkpoint: Checkpoint,
        corpus: Corpus,
        settings: Settings,
        start: Path | None = None,
        lessons: Lessons | None = None,  # the corpus with transcripts, where the decoder is to have its say
    ) -> None:
        self.checkpoint, self.corpus, self.lessons = checkpoint, corpus, lessons
        torch.manual_seed(settings.seed)
        self.encoder: Any = checkpoint.model.model.encoder
        self.start = _attach(self.encoder, settings, start, checkpoint.sha256)
        super().__init__(settings, [p for p in self.encoder.parameters() if p.requires_grad])

    def loss(self, rng: random.Random) -> float:
        """One batch, streamed and whole."""
        settings = self.settings
        silence = rng.randint(*settings.silence)
        chunk, overlap = rng.choice(settings.chunks), rng.choice(settings.overlaps)
        width = chunk + overlap + settings.padding
        n_frames = min(settings.batch_frames, settings.batch_frames * ROWS_PER_FRAME * chunk // width)
        return self._loss(self.corpus.batch(rng, n_frames, silence), silence, chunk, overlap, rng)

    def _loss(self, clips: Sequence[Tensor], silence: int, chunk: int, overlap: int, rng: random.Random) -> float:
        """Leaves its gradients on the parameters; the two halves one after the other, for the sake of memory."""
        target, lengths = self._teacher(clips, silence), losses.own_frames(clips, silence)
        power = streaming.pad(list(clips), 2 * target.shape[1])
        with precision.autocast():
            frames = self._streamed(power, chunk, overlap)
            steps = divergence.steps(rng, frames.shape[1], self.settings.n_reads)
            tokens = self._tokens_error(clips, silence, target, frames, chunk, steps)
        own = frames[:, :, : chunk + overlap].float()
        streamed = losses.stream_error(own, target, lengths, chunk, self.settings.tail_weight)
        streamed = streamed + self.settings.tokens_weight * tokens
        streamed.backward()
        if not self.settings.whole_weight:
            return float(streamed.detach())
        with precision.autocast():
            whole = streaming.full(self.encoder, power)
        short = self.settings.whole_weight * losses.mean_error(whole.float(), target, lengths)
        short.backward()
        return float(streamed.detach() + short.detach())

    def _streamed(self, power: Tensor, chunk: int, overlap: int) -> Tensor:
        """Every step's frames. shape = (batch, n_steps, chunk + overlap + padding, d_model)"""
        return streaming.streamed(self.encoder, power, chunk, overlap, self.settings.context, self.settings.padding)

    def _tokens_error(
        self, clips: Sequence[Tensor], silence: int, target: Tensor, frames: Tensor, chunk: int, steps: Sequence[int]
    ) -> Tensor:
        """Divergence at the given steps, their mean."""
        if self.lessons is None:
            return torch.zeros(())
        model, heads = self.checkpoint.model, self.checkpoint.generation.alignment_heads
        batch = self.lessons.together(clips, silence)
        wanted = divergence.wanted(model, batch, silence, target, heads)
        padding = self.settings.padding
        errors = [divergence.at_step(model, batch, wanted, frames, step, chunk, padding) for step in steps]
        return torch.stack(errors).mean()

    def _teacher(self, clips: Sequence[Tensor], silence: int) -> Tensor:
        """What the encoder makes of whole utterances, as many frames as the student will have."""
        n_frames = max(len(clip) for clip in clips) // 2
        power = streaming.pad(list(clips), 2 * min(n_frames + self.settings.teacher_silence, streaming.MAX_FRAMES))
        with torch.no_grad(), precision.autocast(), adapter.without(self.encoder):
            return streaming.full(self.encoder, power)[:, : n_frames + silence].float()

    @torch.no_grad()
    def measured(self) -> Point:
        """The gap now."""
        found = [self._gap(clips) for clips in self.corpus.held_out]
        streamed, short, tokens = (mean([float(errors[i]) for errors in found]) for i in range(3))
        loss = mean(self.losses) if self.losses else None
        return Point(self.step, loss, streamed, short, tokens if self.lessons else None)

    def _gap(self, clips: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Of frames as they are committed, of frames with the whole in view, and of tokens after the last step."""
        target, lengths = self._teacher(clips, 64), losses.own_frames(clips, 64)
        power = streaming.pad(list(clips), 2 * target.shape[1])
        with precision.autocast():
            frames = self._streamed(power, 15, 40)
            tokens = self._tokens_error(clips, 64, target, frames, 15, [frames.shape[1] - 1])
            whole = streaming.full(self.encoder, power).float()
        own = frames[:, :, : 15 + 40].float()
        streamed = losses.stream_error(own, target, lengths, 15, 0.0)
        return streamed, losses.mean_error(whole, target, lengths), tokens

    def identity(self) -> dict[str, Any]:
        """Settings, checkpoint, audio and the adapter that was begun with."""
        settings, data = msgspec.json.encode(self.settings), msgspec.json.encode(self.corpus.described())
        start = self.start["sha256"] if self.start else None
        return {"settings": settings, "source": self.checkpoint.sha256, "data": data, "start": start}

    def tensors(self) -> dict[str, Tensor]:
        """The adapter's."""
        return adapter.state(self.encoder)

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        adapter.restore(self.encoder, tensors)

    def write(self, target: Path) -> Record:
        """The adapter and, beside it, how it came about."""
        settings, sha256 = self.settings, self.checkpoint.sha256
        rank, alpha, padding = settings.rank, settings.alpha, settings.padding
        adapter.save(target, self.encoder, rank=rank, alpha=alpha, padding=padding, source_sha256=sha256)
        record = Record(
            file=target.name,
            source=self.checkpoint.source,
            source_sha256=sha256,
            data=self.corpus.described(),
            start=self.start,
            settings=settings,
            curve=self.curve,
            seconds=round(self.seconds, 1),
            machine=describe(),
        )
        target.with_suffix(".json").write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        return record


def check_target(target: Path) -> None:
    """Before hours of work: can the adapter be written there? Raises ConfigError."""
    if target.suffix != adapter.SUFFIX:
        raise ConfigError(f"{target}: an adapter's name must end with {adapter.SUFFIX}")
    folder = next(folder for folder in target.absolute().parents if folder.exists())
    if target.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{target}: cannot be written")


def _attach(encoder: Any, settings: Settings, start: Path | None, source_sha256: str) -> dict[str, Any] | None:
    """A new adapter, or the one to train on, cut to the settings' rank. Raises ModelError if that one does not fit."""
    if start is None:
        adapter.attach(encoder, settings.rank, settings.alpha)
        return None
    found = adapter.put(encoder, start, source_sha256, settings.rank)
    if found != (settings.rank, settings.alpha):
        raise ModelError(f"{start}: has rank and alpha {found}, not {(settings.rank, settings.alpha)}")
    record = start.with_suffix(".json")
    was = msgspec.json.decode(record.read_bytes()) if record.is_file() else None
    return {"file": start.name, "sha256": hashlib.sha256(start.read_bytes()).hexdigest(), "record": was}


def distil(
    checkpoint: Checkpoint,
    sources: Sequence[Source],
    settings: Settings,
    target: Path,
    console: Console,
    start: Path | None = None,
) -> Record:
    """Train an adapter, anew or from `start`, and write it; what was begun in `<target>.work` is gone on with."""
    check_target(target)
    work = target.with_suffix(".work")
    training.read(work)  # if it is damaged, that is better known before the recordings are transcribed
    if start is not None:
        adapter.checked(start, checkpoint.model.model.encoder, checkpoint.sha256)
    target.parent.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        lessons = listen("distil", checkpoint, sources, work, progress) if settings.tokens_weight else None
        corpus = lessons.corpus if lessons else Corpus(sources, checkpoint.model.config.num_mel_bins)
        run = Training(checkpoint, corpus, settings, start, lessons)
        task = progress.add_task("distil", total=settings.steps)

        def show(run: Training) -> None:
            gap = run.curve[-1]
            text = f"distil, gap streamed {gap.streamed:.4f} tokens {gap.tokens or 0.0:.4f}"
            progress.update(task, completed=run.step, description=text)

        run.run(work, show)
    record = run.write(target)
    shutil.rmtree(work, ignore_errors=True)
    return record

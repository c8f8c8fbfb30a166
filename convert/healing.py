"""How a smaller Whisper learns from its teacher: what stage `heal` does in every step."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from . import losses, model, precision, sublayers
from .answers import Answers
from .heal import Heal
from .model import Checkpoint
from .training import Run, mean
from .utterances import Batch, Lessons


class Point(msgspec.Struct, frozen=True):
    """One measurement on the held-out utterances: errors relative to the teacher's energy, divergence in nats a token."""

    step: int
    loss: float | None  # mean over the steps since the last point; of the first there are none
    frames: float
    hidden: float
    tokens: float


class Gap(msgspec.Struct, frozen=True):
    """How far the student is from the teacher, each a tensor of no axes; without the decoder if that has not been run."""

    frames: Any
    hidden: Any = 0.0
    tokens: Any = 0.0


class Healing(Run):
    """A student that learns with all its weights but the token embedding.

    Most tokens never occur in a few hours of speech, and an optimiser that scales every gradient would move them at
    random.
    """

    point = Point

    def __init__(self, settings: Heal, student: Checkpoint, lessons: Lessons) -> None:
        self.student, self.lessons = student, lessons
        self.answers = Answers(lessons, settings.cache_mb * 10**6)
        self.started_from = student.sha256
        torch.manual_seed(settings.seed)
        fixed = {"model.encoder.embed_positions.weight", "model.decoder.embed_tokens.weight", model.PROJECTION}
        self.named = {n: p for n, p in student.model.named_parameters() if n not in fixed}
        super().__init__(settings, [p.requires_grad_() for p in self.named.values()])

    def loss(self, rng: random.Random) -> float:
        """A batch, with or without the decoder."""
        settings = self.settings
        batch = self.lessons.batch(rng, settings.batch_frames, rng.randint(*settings.silence))
        gap = self.gap(batch, is_decoding=self.step >= settings.encoder_steps)
        loss = settings.frames_weight * gap.frames
        loss = loss + settings.hidden_weight * gap.hidden + settings.tokens_weight * gap.tokens
        loss.backward()
        return float(loss.detach())

    def gap(self, batch: Batch, *, is_decoding: bool = True) -> Gap:
        """Between teacher and student, with gradients of the student's."""
        student, answers = self.student.model, self.answers
        with precision.autocast():
            frames = sublayers.encode(student, batch.power)
            error = losses.frame_error(frames[batch.is_own].float(), answers.frames(batch).float()).mean()
            if not is_decoding:
                return Gap(error)
            wanted = answers.hidden(batch)
            with torch.no_grad():
                said = answers.logits(wanted).float().log_softmax(-1)
            hidden = sublayers.decode(student, batch.read, frames)[batch.is_said]
            found = student.proj_out(hidden).float().log_softmax(-1)
        divergence = F.kl_div(found, said, reduction="batchmean", log_target=True)
        return Gap(error, losses.frame_error(hidden.float(), wanted.float()).mean(), divergence)

    @torch.no_grad()
    def measured(self) -> Point:
        """The gap on held-out utterances."""
        gaps = [self.gap(batch) for batch in self.lessons.held_out()]
        means = (mean([float(getattr(gap, name)) for gap in gaps]) for name in ("frames", "hidden", "tokens"))
        return Point(self.step, mean(self.losses) if self.losses else None, *means)

    def identity(self) -> dict[str, Any]:
        """Settings, both checkpoints and the audio."""
        data = msgspec.json.encode(self.lessons.corpus.described())
        hashes = {"source": self.started_from, "teacher": self.lessons.teacher.sha256}
        return {"settings": msgspec.json.encode(self.settings), "data": data, **hashes}

    def tensors(self) -> dict[str, Tensor]:
        """All that learns."""
        return {name: parameter.detach() for name, parameter in self.named.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Put them back."""
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(tensors[name])

    def healed(self) -> Checkpoint:
        """The student, no longer learning."""
        self.student.model.requires_grad_(requires_grad=False)
        return replace(self.student, sha256=model.hash_tensors(self.student.model))

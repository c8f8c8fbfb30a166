"""What the teacher makes of an utterance: its frames, and its last hidden states for each token of its transcript."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import precision, sublayers
from .heal import MAX_SILENCE
from .utterances import Batch, Lessons


class Answer(NamedTuple):
    """Of one utterance; bfloat16, to remember twice as many."""

    frames: Tensor  # shape = (n, d_model), its silence included
    hidden: Tensor  # shape = (n_said, d_model)


class Answers:
    """A teacher that is asked about each utterance once, as long as there is room to remember what it said.

    It hears every utterance by itself, so an answer is the same in whatever batch it is asked for.
    """

    def __init__(self, lessons: Lessons, max_bytes: int) -> None:
        self.lessons, self._room = lessons, max_bytes
        self._known: dict[int, Answer] = {}

    def frames(self, batch: Batch) -> Tensor:
        """Of all utterances, one after the other, those that only fill up left out. shape = (n, d_model)"""
        lengths = batch.n_frames.tolist()
        return torch.cat([self._of(clip).frames[:n] for clip, n in zip(batch.clips, lengths, strict=True)])

    def hidden(self, batch: Batch) -> Tensor:
        """The same for all tokens that are said. shape = (n, d_model)"""
        return torch.cat([self._of(clip).hidden for clip in batch.clips])

    def logits(self, hidden: Tensor) -> Tensor:
        """Of the next token. shapes = (n, d_model) -> (n, n_vocab)"""
        found: Tensor = self.lessons.teacher.model.proj_out(hidden.float())
        return found

    def _of(self, clip: Tensor) -> Answer:
        if id(clip) in self._known:
            return self._known[id(clip)]
        answer = self._ask([clip])
        if (n_bytes := sum(2 * tensor.numel() for tensor in answer)) <= self._room:
            self._room -= n_bytes
            self._known[id(clip)] = answer
        return answer

    @torch.no_grad()
    def _ask(self, clips: Sequence[Tensor]) -> Answer:
        teacher, batch = self.lessons.teacher.model, self.lessons.together(clips, MAX_SILENCE)
        with precision.autocast():
            frames = sublayers.encode(teacher, batch.power)
            hidden = sublayers.decode(teacher, batch.read, frames)[batch.is_said]
        return Answer(frames[0].bfloat16(), hidden.bfloat16())

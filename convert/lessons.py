"""What a fine-tuning learns from: recordings as tensors, drawn anew in each epoch, and how they are batched."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import soundfile
import tokenizers
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from whisperlet.audio import WINDOW_FRAMES

from . import correction, greedy, speechset, streaming
from .augment import Augmentation, Augmenter
from .manifests import Utterance
from .model import Checkpoint

IGNORED = -100  # a label that teaches nothing
POOL_BATCHES = 16  # batches' worth of recordings are sorted by length together
START_OF_PREVIOUS = "<|startofprev|>"  # what stands before it is context, in Whisper's training too


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What of a stage's settings decides over its lessons."""

    augment: Augmentation
    replay_share: float
    corrections: bool
    mistakes: float  # share of words
    silence: int  # frames of 20 ms after the longest recording of a batch
    batch: int
    seed: int


class Lessons(Dataset[dict[str, list[int] | Tensor]]):
    """Recordings with their texts, each under a number for each epoch.

    Number `epoch * len(self) + i` is the i-th recording as it sounds in that epoch: all that is drawn depends on seed,
    epoch and recording alone, so that a run that was interrupted goes on as if it had not been.
    """

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, train: Sequence[Utterance], replay: Sequence[Utterance]
    ) -> None:
        self.plan, self.generation = plan, checkpoint.generation
        self._train, self._replay = train, replay
        share = plan.replay_share if replay else 0.0
        self.n_general = round(len(train) * share / (1.0 - share))
        self._change = Augmenter(plan.augment)
        self._tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer_json.decode())
        self._start = self._tokenizer.token_to_id(START_OF_PREVIOUS) or 0  # `Tuning` has checked that it is there
        self._n_mels = checkpoint.model.config.num_mel_bins
        self._max_tokens = checkpoint.model.config.max_target_positions
        self._words = sorted({word for one in train for word in one.text.split()})
        self._lengths: dict[str, float] = {}

    def __len__(self) -> int:
        return len(self._train) + self.n_general

    def utterance(self, number: int) -> Utterance:
        """The recording behind a number; of those to be replayed, each epoch draws others."""
        epoch, place = divmod(number, len(self))
        if place < len(self._train):
            return self._train[place]
        return random.Random(f"{self.plan.seed} {epoch} {place}").choice(self._replay)

    def length(self, number: int) -> float:
        """Seconds of the recording."""
        path = str(self.utterance(number).audio)
        if path not in self._lengths:
            self._lengths[path] = soundfile.info(path).duration
        return self._lengths[path]

    def __getitem__(self, number: int) -> dict[str, list[int] | Tensor]:
        one, seed = self.utterance(number), f"{self.plan.seed} {number}"
        samples = speechset.audio(one.audio)
        if not one.is_general:
            samples = self._change(samples, seed)
        prompt = greedy.prompt(self.generation, one.language)
        item: dict[str, list[int] | Tensor] = {
            "power": streaming.log_power(samples, self._n_mels)[: 2 * (WINDOW_FRAMES - self.plan.silence)],
            "said": self._ids([], prompt, one.text),
        }
        if self.plan.corrections:
            wrong = correction.corrupt(one.text, self._words, random.Random(seed), self.plan.mistakes)
            item["corrected"] = self._ids([self._start, *self._encoded(wrong)], prompt, one.text)
        return item

    def _ids(self, context: Sequence[int], prompt: Sequence[int], text: str) -> list[int]:
        """How many ids only lead up to the text, then all of them; the last is the end."""
        text_ids = [*self._encoded(text), self.generation.eot]
        ids = [*context, *prompt, *text_ids][: self._max_tokens + 1]
        return [len(context) + len(prompt), *ids]

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(f" {text}", add_special_tokens=False).ids
        return ids

    def collate(self, items: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """A batch: power shape = (batch, 2n, n_mels), ids and labels (batch, n_tokens), labels one place on."""
        clips = [item["power"] for item in items]
        n_frames = max(len(clip) for clip in clips) // 2 + self.plan.silence
        batch = {"power": streaming.pad(clips, 2 * n_frames)}
        for name in ("said", "corrected"):
            if name in items[0]:
                batch[f"{name}_ids"], batch[f"{name}_labels"] = self._padded([item[name] for item in items])
        return batch

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
        longest = max(map(len, rows)) - 2
        ids = torch.full((len(rows), longest), self.generation.eot)
        labels = torch.full((len(rows), longest), IGNORED)
        for place, (n_before, *row) in enumerate(rows):
            ids[place, : len(row) - 1] = torch.tensor(row[:-1])
            labels[place, n_before - 1 : len(row) - 1] = torch.tensor(row[n_before:])
        return ids, labels


class ByLength(Sampler[int]):
    """Numbers of one epoch, so that those of a batch are of like length. `epoch` is set by who trains."""

    def __init__(self, lessons: Lessons) -> None:
        self._lessons = lessons
        self.epoch = 0

    def __len__(self) -> int:
        return len(self._lessons)

    def __iter__(self) -> Iterator[int]:
        rng, size = random.Random(f"{self._lessons.plan.seed} {self.epoch}"), self._lessons.plan.batch
        numbers = [self.epoch * len(self) + place for place in range(len(self))]
        rng.shuffle(numbers)
        pool = size * POOL_BATCHES
        numbers = [
            number
            for first in range(0, len(numbers), pool)
            for number in sorted(numbers[first : first + pool], key=self._lessons.length)
        ]
        batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
        rest = [batches.pop()] if len(batches[-1]) < size else []  # must come last
        rng.shuffle(batches)
        return iter([number for batch in [*batches, *rest] for number in batch])

"""Utterances with the teacher's own transcripts: what a smaller model is measured on and learns from.

Nobody needs to know what was said. The transcripts are greedy, made once for a teacher and its audio, and kept.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.progress import Progress
from torch import Tensor

from whisperlet.errors import ConfigError

from . import disk, greedy, losses, precision, streaming, sublayers
from .corpus import HELD_OUT_SIZE, Corpus
from .model import Checkpoint
from .speechset import Source

SILENCE = 128  # frames of 20 ms after an utterance, for the teacher
MAX_TOKENS = 200  # in an utterance; a transcript that goes on longer repeats itself ...
FRAMES_A_TOKEN = 5  # ... as one does with more than 10 tokens in a second of speech, and a few
BATCH_FRAMES = 12_000
SAMPLED_EVERY = 3  # frames
TRANSCRIPTS = "transcripts.json"


@dataclass(frozen=True)
class Batch:
    """Utterances side by side."""

    clips: Sequence[Tensor]
    power: Tensor  # log10 mel power with silence after it. shape = (batch, 2n, n_mels)
    n_frames: Tensor  # of each one's own, its silence included. shape = (batch,)
    tokens: Tensor  # prompt, transcript, end; then ends. shape = (batch, m)
    is_said: Tensor  # which of the tokens after the first the model has to find. shape = (batch, m - 1), bool

    @property
    def read(self) -> Tensor:
        """The tokens that the decoder takes in. shape = (batch, m - 1)"""
        return self.tokens[:, :-1]

    @property
    def is_read(self) -> Tensor:
        """Those of them that only fill up are left out. shape = (batch, m - 1), bool"""
        return self.is_said.flip(1).cumsum(1).flip(1) > 0

    @property
    def is_own(self) -> Tensor:
        """Frames that do not only fill up. shape = (batch, n), bool"""
        return torch.arange(self.power.shape[1] // 2) < self.n_frames[:, None]

    @property
    def is_sampled(self) -> Tensor:
        """Some of those; neighbours are much alike. shape = (batch, n), bool"""
        return self.is_own & (torch.arange(self.power.shape[1] // 2) % SAMPLED_EVERY == 0)


class _Kept(msgspec.Struct):
    """The file of transcripts."""

    made_by: list[Any]  # the teacher's hash and the audio
    transcripts: list[list[int] | None]


class Lessons:
    """A corpus with what the teacher hears in it. Utterances in which it finds no end are left out."""

    def __init__(
        self,
        corpus: Corpus,
        teacher: Checkpoint,
        kept: Path | None = None,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.corpus, self.teacher = corpus, teacher
        clips = [(clip, name) for name, clips in corpus.by_language.items() for clip in clips]
        clips += [(clip, "") for group in corpus.held_out for clip in group]
        by_id = {id(clip): (clip, name) for clip, name in reversed(clips)}  # small corpora hold out what they have
        self._tokens = dict(zip(by_id, self._transcripts(list(by_id.values()), kept, advance), strict=True))
        if not any(self._tokens[id(clip)] for group in corpus.by_language.values() for clip in group):
            raise ConfigError("the recordings hold nothing in which the teacher hears speech that ends")

    def _transcripts(
        self, clips: Sequence[tuple[Tensor, str]], kept: Path | None, advance: Callable[[int], None]
    ) -> list[list[int] | None]:
        made_by = [self.teacher.sha256, self.corpus.described(), len(clips)]
        found = _read(kept, made_by)
        order = sorted(range(len(clips)), key=lambda i: (clips[i][1], len(clips[i][0])))
        largest = max(self.corpus.by_language, key=lambda name: len(self.corpus.by_language[name]))
        while len(found) < len(clips):
            group = _next(order[len(found) :], clips)
            language = clips[group[0]][1] or largest
            found += transcribe(self.teacher, [clips[i][0] for i in group], language)
            _write(kept, _Kept(made_by, found))
            advance(len(found))
        by_clip = dict(zip(order, found, strict=True))
        return [by_clip[i] for i in range(len(clips))]

    def batch(self, rng: random.Random, n_frames: int, silence: int) -> Batch:
        """Utterances of one language and of like length, `n_frames` with padding and silence."""
        while True:
            if clips := self._heard(self.corpus.batch(rng, n_frames, silence)):
                return self.together(clips, silence)

    def held_out(self, silence: int = SILENCE) -> list[Batch]:
        """Utterances that are measured on; if the teacher hears nothing in them, some others."""
        groups = [self._heard(group) for group in self.corpus.held_out]
        return [self.together(group, silence) for group in groups if group] or self.sample(HELD_OUT_SIZE)

    def _heard(self, clips: Sequence[Tensor]) -> list[Tensor]:
        return [clip for clip in clips if self._tokens[id(clip)]]

    def sample(self, n_clips: int, n_frames: int = BATCH_FRAMES, silence: int = SILENCE) -> list[Batch]:
        """About so many utterances of all lengths, evenly taken."""
        clips = sorted(self._heard([clip for group in self.corpus.by_language.values() for clip in group]), key=len)
        clips = clips[:: max(1, len(clips) // n_clips)][:n_clips]
        batches: list[Batch] = []
        while clips:
            n = max(1, n_frames // (len(clips[0]) // 2 + silence))
            batches.append(self.together(clips[:n], silence))
            clips = clips[n:]
        return batches

    def together(self, clips: Sequence[Tensor], silence: int) -> Batch:
        """Some utterances of the corpus as a batch."""
        n_frames = min(max(len(clip) for clip in clips) // 2 + silence, streaming.MAX_FRAMES)
        eot, n_prompt = self.teacher.generation.eot, 4 if self.teacher.multilingual else 2
        texts = [self._tokens[id(clip)] or [] for clip in clips]
        tokens = torch.full((len(texts), max(n_prompt + 1, *map(len, texts))), eot)  # it may have heard nothing
        for row, text in zip(tokens, texts, strict=True):
            row[: len(text)] = torch.tensor(text)
        places = torch.arange(1, tokens.shape[1])
        is_said = (places >= n_prompt) & (places < torch.tensor([len(text) for text in texts])[:, None])
        own = losses.own_frames(clips, silence).clamp(max=n_frames)
        return Batch(clips, streaming.pad(list(clips), 2 * n_frames), own, tokens, is_said)


def _next(order: Sequence[int], clips: Sequence[tuple[Tensor, str]]) -> list[int]:
    """The first few of some clips, of one language and together not too long."""
    group = [order[0]]
    for i in order[1:]:
        n_frames = (len(group) + 1) * (len(clips[i][0]) // 2 + SILENCE)
        if clips[i][1] != clips[group[0]][1] or n_frames > BATCH_FRAMES:
            break
        group.append(i)
    return group


def _read(kept: Path | None, made_by: list[Any]) -> list[list[int] | None]:
    """Transcripts made so far; none if the file is another teacher's or cannot be read."""
    if kept is None or not kept.is_file():
        return []
    try:
        found = msgspec.json.decode(kept.read_bytes(), type=_Kept)
    except msgspec.DecodeError:
        return []
    return found.transcripts if found.made_by == msgspec.to_builtins(made_by) else []


def _write(kept: Path | None, found: _Kept) -> None:
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with disk.replacing(kept) as partial:
            partial.write_bytes(msgspec.json.encode(found))


@torch.no_grad()
def transcribe(checkpoint: Checkpoint, clips: Sequence[Tensor], language: str) -> list[list[int] | None]:
    """Prompt, greedy transcript and end of each clip of log-mel power; None where no end is found.

    `language` is a code; if the checkpoint does not know it, each clip's own is detected.
    """
    model, g = checkpoint.model, checkpoint.generation
    n_frames = min(max(len(clip) for clip in clips) // 2 + SILENCE, streaming.MAX_FRAMES)
    with precision.autocast():
        encoded = sublayers.encode(model, streaming.pad(list(clips), 2 * n_frames))
    prompts = _prompts(checkpoint, encoded.float(), language)
    # In half precision by itself: a token at a time, it is memory that takes the time, or casting weights.
    decoder = copy.deepcopy(model.model.decoder).to(dtype := precision.processor_precision())
    rows = greedy.say(decoder, prompts, encoded.to(dtype), g, min(MAX_TOKENS, 8 + n_frames // FRAMES_A_TOKEN))
    return [[*prompt, *row] if row[-1] == g.eot else None for prompt, row in zip(prompts.tolist(), rows, strict=True)]


def _prompts(checkpoint: Checkpoint, encoded: Tensor, language: str) -> Tensor:
    """What stands before each transcript. shape = (batch, n)"""
    g, n = checkpoint.generation, len(encoded)
    if language in g.lang_ids or not checkpoint.multilingual:
        return torch.tensor([greedy.prompt(g, language)] * n)
    ids = torch.tensor(list(g.lang_ids.values()))
    hidden = sublayers.decode(checkpoint.model, torch.full((n, 1), g.sot), encoded)
    spoken = ids[checkpoint.model.proj_out(hidden[:, 0])[:, ids].argmax(-1)]
    names = {number: name for name, number in g.lang_ids.items()}
    return torch.tensor([greedy.prompt(g, names[number]) for number in spoken.tolist()])


def listen(
    what: str, teacher: Checkpoint, sources: Sequence[Source], work: Path, progress: Progress, n: int | None = None
) -> Lessons:
    """Read recordings, at most n of them, and have the teacher transcribe them. `what` stands before the bars."""
    bar = progress.add_task(f"{what}: read", total=None)
    corpus = Corpus(sources, teacher.model.config.num_mel_bins, lambda _: progress.advance(bar), n)
    progress.update(bar, total=progress.tasks[bar].completed)
    bar = progress.add_task(f"{what}: transcribe", total=len(corpus))
    return Lessons(corpus, teacher, work / TRANSCRIPTS, lambda done: progress.update(bar, completed=done))

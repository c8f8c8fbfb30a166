"""The stage `vocabulary`: keep the tokens that a language or a corpus needs, and those that steer decoding.

The embedding is the decoder's largest matrix, and every step multiplies by all of it. What is left out can still be
spelled, by smaller tokens and in the end by bytes; what is kept is said and spelled as before.
"""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from typing import Any, ClassVar

from rich.progress import Progress

from whisperlet.errors import ModelError

from . import model, stages, words
from .model import Checkpoint, Generation
from .stages import Stage, StageReport
from .tokens import Bpe

_LANGUAGE = re.compile(r"<\|([a-z]{2,3})\|>")
_TIMESTAMP = re.compile(r"<\|\d+\.\d+\|>")  # the device's decoder never says one


class Vocabulary(Stage, frozen=True, kw_only=True, tag="vocabulary"):
    """Checkpoint -> the same with fewer tokens."""

    once: ClassVar[bool] = True

    languages: tuple[str, ...] = ()  # whose words are kept, the most frequent first; none: only what the corpus needs
    corpus: tuple[str, ...] = ()  # manifests or text files; every token of theirs is kept
    max_tokens: int | None = None  # in all, bytes and special ones too; by default all that the languages need

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        if not (self.languages or self.corpus):
            raise ValueError("vocabulary: needs languages, a corpus, or both")
        if len(set(self.languages)) < len(self.languages):
            raise ValueError("vocabulary: languages: must be distinct")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ValueError("vocabulary: max_tokens: must be positive")

    @property
    def keeps_encoder(self) -> bool:
        """Only the embedding changes."""
        return True

    def inputs(self) -> list[Path]:
        """The corpus: of a folder its manifest."""
        paths = [stages.located(path) for path in self.corpus]
        return [path / "manifest.jsonl" if path.is_dir() else path for path in paths]

    def problems(self) -> list[str]:
        """Files that are missing, and languages without a list."""
        found, lists = super().problems(), words.available()
        for language in self.languages:
            if words.LISTS.get(language, language) not in lists:
                found.append(
                    f"languages: {language} has no word list, unlike {', '.join(sorted(lists))}; name a corpus"
                )
        return found


def run(stage: Vocabulary, in_dir: Path, out_dir: Path, progress: Progress) -> StageReport:
    """Choose tokens, write the checkpoint with those only. Raises ModelError."""
    began = time.monotonic()
    checkpoint = model.load_directory(in_dir, in_dir.name)
    bpe = Bpe(checkpoint.tokenizer_json)
    special = _special(stage, checkpoint, bpe)
    chosen = _chosen(stage, checkpoint, bpe, len(special), progress)
    tokenizer_json, had = bpe.reduced(chosen, special)
    n_before = checkpoint.model.config.vocab_size
    model.save_directory(_reduced(checkpoint, tokenizer_json, had), out_dir)
    details: dict[str, Any] = {
        "n_tokens_before": n_before,
        "n_tokens": len(had),
        "n_special": len(special),
        "spelled_as_before": {code: round(words.coverage(bpe, code, chosen), 5) for code in stage.languages},
    }
    return StageReport("vocabulary", round(time.monotonic() - began, 1), details)


def _special(stage: Vocabulary, checkpoint: Checkpoint, bpe: Bpe) -> set[str]:
    """Special tokens to keep: those of the languages, if they are named, and all others but timestamps."""
    known = checkpoint.generation.lang_ids
    if checkpoint.multilingual and (unknown := [code for code in stage.languages if code not in known]):
        raise ModelError(f"vocabulary: languages: the checkpoint does not know {', '.join(unknown)}")
    kept = set(stage.languages or known)
    return {token for token in bpe.special if not _TIMESTAMP.fullmatch(token) and _of(token) in {None, *kept}}


def _of(token: str) -> str | None:
    """The language that a special token stands for."""
    match = _LANGUAGE.fullmatch(token)
    return match[1] if match else None


def _chosen(stage: Vocabulary, checkpoint: Checkpoint, bpe: Bpe, n_special: int, progress: Progress) -> set[str]:
    """Text tokens to keep. Raises ModelError if not even what must be kept finds room."""
    weights: dict[str, float] = {}
    kept = words.symbols(bpe) - _never_said(checkpoint, bpe)
    task = progress.add_task("words", total=len(stage.languages) + len(stage.corpus))
    for language in stage.languages:
        for token, share in words.weights(bpe, language).items():
            weights[token] = weights.get(token, 0.0) + share
        progress.advance(task)
    for corpus in stage.inputs():
        kept |= words.needed(bpe, corpus)
        progress.advance(task)
    needed = len(bpe.choose({}, 0, kept)) + n_special
    limit = checkpoint.model.config.vocab_size if stage.max_tokens is None else stage.max_tokens
    if needed > limit:
        raise ModelError(
            f"vocabulary: max_tokens: {limit} is too few: bytes, digits, punctuation, the corpus and special "
            f"tokens take {needed}"
        )
    return bpe.choose(weights, limit - n_special, kept)


def _never_said(checkpoint: Checkpoint, bpe: Bpe) -> set[str]:
    return {token for token, token_id in bpe.text.items() if token_id in set(checkpoint.generation.suppress_tokens)}


def _reduced(checkpoint: Checkpoint, tokenizer_json: bytes, had: list[int]) -> Checkpoint:
    """The checkpoint with the rows `had` of its embedding. The given one is used up."""
    import torch
    from torch import nn

    whisper, new = checkpoint.model, {old: i for i, old in enumerate(had)}
    whisper.config.vocab_size = len(had)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        setattr(whisper.config, name, new[getattr(whisper.config, name)])
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_decoder_ids"):
        if hasattr(whisper.config, name):
            setattr(whisper.config, name, None)  # generation_config.json has them
    rows = whisper.model.decoder.embed_tokens.weight[torch.tensor(had)]
    n, width = rows.shape
    whisper.model.decoder.embed_tokens = nn.Embedding(n, width, whisper.config.pad_token_id, _weight=rows)
    whisper.requires_grad_(requires_grad=False)
    whisper.proj_out.weight = whisper.model.decoder.embed_tokens.weight
    generation = _renumbered(checkpoint.generation, new)
    return dataclasses.replace(checkpoint, tokenizer_json=tokenizer_json, generation=generation)


def _renumbered(generation: Generation, new: dict[int, int]) -> Generation:
    """The same tokens by their new ids; what is gone needs no suppressing."""
    return Generation(
        suppress_tokens=tuple(new[i] for i in generation.suppress_tokens if i in new),
        begin_suppress_tokens=tuple(new[i] for i in generation.begin_suppress_tokens if i in new),
        alignment_heads=generation.alignment_heads,
        lang_ids={code: new[i] for code, i in generation.lang_ids.items() if i in new},
        sot=new[generation.sot],
        eot=new[generation.eot],
        transcribe=new[generation.transcribe],
        translate=new[generation.translate],
        no_timestamps=new[generation.no_timestamps],
        no_speech=new[generation.no_speech],
    )

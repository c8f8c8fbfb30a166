"""What a model does on calibration recordings: what its matrices take in, and how far it is from what it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from whisperlet.audio import SAMPLES_PER_FRAME, Float32
from whisperlet.bundle import Vocabulary
from whisperlet.logmel import log_mel

from .fold import FoldedWhisper, normalise
from .graphs import MASKED, inverse_timescales, positions

Matrix = nn.Linear | nn.Embedding
SILENCE = 128  # frames after the speech, as the recipes for English have it
MAX_TOKENS = 200


@dataclass(frozen=True)
class Heard:
    """A recording in the teacher's ears."""

    mel: Tensor  # shape = (1, 2n, n_mels)
    tokens: list[int]  # prompt, text and end of text
    n_prompt: int


@torch.inference_mode()
def listen(whisper: FoldedWhisper, ids: Vocabulary, speech: Float32, language: str) -> Heard:
    """Let a model write down what it hears, greedily."""
    n_frames = -(-len(speech) // SAMPLES_PER_FRAME) + SILENCE
    mel = torch.from_numpy(log_mel(speech, 2 * n_frames, whisper.conv1.in_channels))
    memory = Memory(whisper, encoded(whisper, mel))
    prompt = prompt_of(ids, language)
    tokens, new = list(prompt), prompt
    while new != [ids.eot] and len(tokens) < MAX_TOKENS:
        logits = decoded(whisper, new, memory)[-1]
        logits[[*ids.suppress, *(ids.suppress_begin if new is prompt else [])]] = -torch.inf
        logits[ids.eot + 1 :] = -torch.inf
        new = [int(logits.argmax())]
        tokens += new
    return Heard(mel, tokens, len(prompt))


def prompt_of(ids: Vocabulary, language: str) -> list[int]:
    """What asks for a transcript; in the model's first language where it lacks this one."""
    if ids.transcribe is None:
        return [ids.sot, ids.no_timestamps]
    asked = ids.languages.get(language) or ids.languages.get("en") or min(ids.languages.values())
    return [ids.sot, asked, ids.transcribe, ids.no_timestamps]


def encoded(whisper: FoldedWhisper, mel: Tensor) -> Tensor:
    """What the decoder looks at. mel shape = (1, 2n, n_mels), result (1, n, d_model)"""
    x = whisper.stem(mel)
    x = x + positions(torch.arange(float(x.shape[1])), inverse_timescales(x.shape[2]))
    for layer in whisper.encoder_layers:
        x = layer(x)
    return normalise(x)


class Memory:
    """Keys and values by layer: those of the audio, (1, n, d_model), and those of the tokens so far."""

    def __init__(self, whisper: FoldedWhisper, audio: Tensor) -> None:
        self.n_tokens = 0
        self.audio = [layer.cross.keys_values(audio) for layer in whisper.decoder_layers]
        self.tokens: dict[int, tuple[Tensor, Tensor]] = {}

    def with_new(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All tokens' keys and values, the new ones at the end."""
        if layer in self.tokens:
            k, v = torch.cat([self.tokens[layer][0], k], 1), torch.cat([self.tokens[layer][1], v], 2)
        self.tokens[layer] = k, v
        return k, v


def decoded(whisper: FoldedWhisper, tokens: Sequence[int], memory: Memory) -> Tensor:
    """Logits after each of some more tokens, all in one pass. shape = (n_tokens, n_vocab)"""
    old, new = memory.n_tokens, len(tokens)
    mask = torch.full((new, old + new), MASKED).triu(1 + old)
    x = whisper.token_embedding(torch.tensor([list(tokens)])) + whisper.positions[old : old + new]
    for i, layer in enumerate(whisper.decoder_layers):
        y = normalise(x)
        x = x + layer.attention(y, *memory.with_new(i, *layer.attention.keys_values(y)), mask)
        x = x + layer.cross(normalise(x), *memory.audio[i])
        x = x + layer.mlp(x)
    memory.n_tokens += new
    return whisper.logits(x)[0]


class Judge:
    """Knows what a model said while it was whole, and measures how far a changed one is from that."""

    @torch.inference_mode()
    def __init__(self, whisper: FoldedWhisper, heard: Sequence[Heard]) -> None:
        self.whisper, self.heard = whisper, heard
        self._audio = [encoded(whisper, one.mel) for one in heard]
        self._said = [self._log_probs(one, audio) for one, audio in zip(heard, self._audio, strict=True)]

    def _log_probs(self, one: Heard, audio: Tensor) -> Tensor:
        """Of every token at each place after the prompt. shape = (n, n_vocab)"""
        logits = decoded(self.whisper, one.tokens[:-1], Memory(self.whisper, audio))[one.n_prompt - 1 :]
        return F.log_softmax(logits, -1)

    @torch.inference_mode()
    def divergence(self, *, encoder: bool = True) -> float:
        """Kullback-Leibler divergence from what it said, nats a token; without `encoder`, that one is as it was."""
        total, n_tokens = 0.0, 0
        for one, audio, said in zip(self.heard, self._audio, self._said, strict=True):
            now = self._log_probs(one, encoded(self.whisper, one.mel) if encoder else audio)
            total += float(F.kl_div(now, said, log_target=True, reduction="sum"))
            n_tokens += len(said)
        return total / n_tokens


@torch.inference_mode()
def energies(whisper: FoldedWhisper, heard: Sequence[Heard], matrices: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Second moments of what each matrix takes in. shapes = (n_in, n_in)"""
    found: dict[str, Tensor] = {}
    with _watched(whisper, matrices, found):
        for one in heard:
            decoded(whisper, one.tokens[:-1], Memory(whisper, encoded(whisper, one.mel)))
    return found


@contextmanager
def _watched(whisper: FoldedWhisper, matrices: Mapping[str, Matrix], found: dict[str, Tensor]) -> Iterator[None]:
    """Add up in `found` what the matrices take in; the embedding as projection takes in what the last norm puts out."""

    def add(name: str, x: Tensor) -> None:
        rows = x.flatten(0, -2)
        found[name] = found[name] + rows.T @ rows if name in found else rows.T @ rows

    def hook(name: str, matrix: Matrix) -> Any:
        if matrix is whisper.token_embedding:
            return whisper.final_norm.register_forward_hook(lambda _module, _x, out: add(name, out))
        return matrix.register_forward_pre_hook(lambda _module, x: add(name, x[0]))

    hooks = [hook(name, matrix) for name, matrix in matrices.items()]
    try:
        yield
    finally:
        for one in hooks:
            one.remove()

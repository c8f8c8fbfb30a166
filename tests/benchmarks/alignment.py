"""When each word of a reference ends: forced alignment by the original float model.

The method is that of openai-whisper's word timing. The reference, in small letters, is forced through the decoder over
the full 30 s window. The cross-attention of the alignment heads is cut to the audio's frames and renormalised there;
each head and frame is standardised over the tokens, smoothed by a median over 7 frames (140 ms) along time, and
averaged over the heads. The cheapest monotonic path through the negated matrix (dynamic time warping) says at which
frame each token begins; a word ends where the token after it begins. Times are good to about 100 ms, and no word ends
after the audio.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from agent.alignment import median_filter
from agent.audio_files import read_file
from convert.speechset import Clip
from whisperlet.audio import FRAMES_PER_SECOND, SAMPLES_PER_FRAME, WINDOW_FRAMES, Pcm16, seconds, to_float32
from whisperlet.logmel import log_mel

from .base import bar, cache_folder

VERSION = "1"  # of the method; part of the cache's name
Matrix = NDArray[np.float64]
Spoken = list[tuple[str, float]]  # written word, second at which it ends


def warp(cost: Matrix) -> NDArray[np.int64]:
    """First column of each row on the cheapest path from the first cell to the last, down, right or both a step.

    cost shape = (n_rows, n_columns), result shape = (n_rows,)
    """
    n_rows, n_columns = cost.shape
    total = np.full((n_rows + 1, n_columns + 1), np.inf)
    total[0, 0] = 0.0
    step = np.zeros((n_rows + 1, n_columns + 1), np.int8)
    for i in range(1, n_rows + 1):
        for j in range(1, n_columns + 1):
            ways = (total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
            best = min(range(3), key=ways.__getitem__)
            total[i, j], step[i, j] = cost[i - 1, j - 1] + ways[best], best
    first = np.zeros(n_rows, np.int64)
    i, j = n_rows, n_columns
    while i > 0:
        first[i - 1] = j - 1
        i, j = i - (step[i, j] != 2), j - (step[i, j] != 1)
    return first


def token_frames(attention: Matrix, n_frames: int) -> NDArray[np.int64]:
    """Frame at which each row's token begins. attention shape = (n_heads, n_tokens, >= n_frames), not negative"""
    weights = attention[:, :, :n_frames]
    weights = weights / weights.sum(-1, keepdims=True)
    deviation = weights.std(1, keepdims=True)
    weights = (weights - weights.mean(1, keepdims=True)) / np.maximum(deviation, 1e-12)
    return warp(-median_filter(weights).mean(0))


class Aligner:
    """A checkpoint that says when the words of a text end."""

    def __init__(self, source: str) -> None:
        from convert import model, reference
        from whisperlet.tokenizer import Tokenizer

        checkpoint = model.load(source)
        self._model: Any = checkpoint.model
        self._model.set_attn_implementation("eager")  # the only one that gives its attention away
        self._heads = checkpoint.generation.alignment_heads
        self._eot = checkpoint.generation.eot
        self._tokenizer = Tokenizer(checkpoint.tokenizer_json, reference.vocabulary(checkpoint))
        self.sha256 = checkpoint.sha256

    def ends(self, pcm: Pcm16, text: str, language: str = "en") -> Spoken:
        """Words of a text with the seconds at which they end."""
        written = text.split()
        pieces = [self._tokenizer.encode(f" {word.lower()}") for word in written]
        prompt = self._tokenizer.prompt(language)
        tokens = [*prompt, *(token for piece in pieces for token in piece), self._eot]
        n_frames = min(WINDOW_FRAMES, -(-len(pcm) // SAMPLES_PER_FRAME))
        attention = self._attention(pcm, tokens)
        # Row i tells where the model looks for token i + 1; the last row of interest looks for the end of the text.
        frames = token_frames(attention[:, len(prompt) - 1 : -1], n_frames)
        after = np.cumsum([len(piece) for piece in pieces])
        ends_s = np.minimum(frames[after] / FRAMES_PER_SECOND, seconds(len(pcm)))
        return [(word, round(float(end_s), 3)) for word, end_s in zip(written, ends_s, strict=True)]

    def _attention(self, pcm: Pcm16, tokens: Sequence[int]) -> Matrix:
        """Cross-attention of the alignment heads. shape = (n_heads, n_tokens, WINDOW_FRAMES)"""
        import torch

        mel = log_mel(to_float32(pcm), 2 * WINDOW_FRAMES, self._model.config.num_mel_bins)
        with torch.inference_mode():
            out = self._model(
                input_features=torch.from_numpy(mel).transpose(1, 2),
                decoder_input_ids=torch.tensor([list(tokens)]),
                output_attentions=True,
            )
        heads: Matrix = np.stack([out.cross_attentions[layer][0, head].double().numpy() for layer, head in self._heads])
        return heads


def spoken_words(
    name: str, clips: Sequence[Clip], source: str, read: Callable[[Path], Pcm16] = read_file
) -> dict[str, Spoken]:
    """Each clip's reference words with their ends; kept in the cache, as this takes a second a clip."""
    path = cache_folder() / f"alignment-{VERSION}-{name}-{source.replace(':', '-').replace('/', '-')}.json"
    kept: dict[str, Spoken] = {}
    if path.is_file():
        kept = msgspec.json.decode(path.read_bytes(), type=dict[str, list[tuple[str, float]]])
    missing = [clip for clip in clips if _key(clip) not in kept]
    if missing:
        aligner = Aligner(source)
        with bar(f"{name}: aligning words", len(missing)) as advance:
            for clip in missing:
                kept[_key(clip)] = aligner.ends(read(clip.audio), clip.text or "", clip.language)
                advance()
        path.write_bytes(msgspec.json.encode(kept))
    return {clip.id: kept[_key(clip)] for clip in clips}


def _key(clip: Clip) -> str:
    return f"{clip.id}-{hashlib.sha256((clip.text or '').encode()).hexdigest()[:8]}"

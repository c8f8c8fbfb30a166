"""State that is carried between runs of the graphs, and the masks that say which part of it counts."""

from __future__ import annotations

from typing import Any

import numpy as np

from whisperlet.audio import Float32
from whisperlet.bundle import Dims, StreamSpec, kv_shapes

from .alignment import Looks

MASKED = np.float32(-1e9)  # added to a score, leaves no weight after softmax


class DecoderState:
    """Everything that is carried from one decoder pass to the next.

    `cross` holds keys and values of the encoded audio by cross length, `self_kv` those of the tokens so far: two sets,
    read and written in turn. What lies beyond `position` is masked, so going back is setting `position`.
    """

    def __init__(self, cross: dict[int, dict[str, Any]], self_kv: tuple[dict[str, Any], dict[str, Any]]) -> None:
        self.cross = cross
        self.self_kv = self_kv
        self.n_cross = 0  # cross length in use
        self.position = 0  # tokens so far
        self.n_frames = 0  # of audio, what follows is padding
        self.looks = Looks(np.zeros(0, np.int64), np.zeros(0, np.float32))


class StreamState:
    """Everything that is carried from one step of the streaming encoder to the next, in the process's own memory.

    `past` holds keys and values of the committed frames in a ring of whole chunks, `cross` those of cross-attention by frame: the
    committed ones, then those that the next step will compute again, then padding.
    """

    def __init__(self, dims: Dims, spec: StreamSpec, n_cross: int) -> None:
        self.spec = spec
        self.past = _zeros(dims, "past", spec.context)
        self.cross = _zeros(dims, "cross", n_cross)
        self.n_cross = n_cross  # frames that `cross` has room for
        self._dims, self._n_least = dims, n_cross
        self.committed = 0
        self.n_frames = 0  # of audio that `cross` holds

    def begin(self) -> None:
        """Go back to the start. What the tensors hold is masked, and overwritten in time.

        `cross` is as small again as at first: long talk is rare, and the decoder is slower over more frames.
        """
        self.committed = self.n_frames = 0
        if self.n_cross > self._n_least:
            self.cross, self.n_cross = _zeros(self._dims, "cross", self._n_least), self._n_least

    def take_in(self, outputs: dict[str, Float32], n_frames: int) -> None:
        """Keep what a step found out about `n_frames` frames; a step that was full commits its chunk."""
        self.n_frames = self.committed + n_frames
        _put(self.cross, outputs, self.committed, n_frames + self.spec.padding)
        if n_frames == self.spec.reach:
            new = {name: outputs[name.replace("past", "new")] for name in self.past}
            _put(self.past, new, self.committed % self.spec.context, self.spec.chunk)
            self.committed += self.spec.chunk

    def grow(self, n_cross: int) -> None:
        """Make room for more frames. What of it is never written takes no memory."""
        smaller, self.cross, n, self.n_cross = self.cross, _zeros(self._dims, "cross", n_cross), self.n_cross, n_cross
        _put(self.cross, smaller, 0, n)


def _put(state: dict[str, Float32], new: dict[str, Float32], first: int, n: int) -> None:
    """Write keys and values of the first n frames in `new` to the places from `first` on."""
    for name, tensor in state.items():
        if "_k_" in name:
            tensor[:, first : first + n] = new[name][:, :n]
        else:
            tensor[:, :, first : first + n] = new[name][:, :, :n]


def _zeros(dims: Dims, kind: str, n: int) -> dict[str, Float32]:
    return {name: np.zeros(shape, np.float32) for name, shape in kv_shapes(dims, kind, n).items()}


def self_mask(n_tokens: int, position: int, n_text_ctx: int) -> Float32:
    """Each token sees those before it and itself. shape = (n_tokens, n_text_ctx)"""
    sees = np.arange(n_text_ctx)[None] <= position + np.arange(n_tokens)[:, None]
    return np.where(sees, np.float32(0), MASKED)


def cross_mask(n_frames: int, n_cross: int) -> Float32:
    """Hides the padding after the encoded frames. shape = (1, n_cross)"""
    return np.where(np.arange(n_cross)[None] < n_frames, np.float32(0), MASKED)


def stream_mask(spec: StreamSpec, committed: int, n_frames: int) -> Float32:
    """Hides the empty places of the ring, and what is left of a step that is not full. shape = (1, context + width)"""
    is_filled = np.arange(spec.context) < committed
    is_there = np.arange(spec.width) < n_frames + spec.padding
    return np.where(np.concatenate([is_filled, is_there])[None], np.float32(0), MASKED)

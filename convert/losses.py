"""How far a student's frames are from its teacher's: squared error relative to the teacher's energy, by frame."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def frame_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared error relative to the teacher's energy, by frame. shapes = (..., d_model)"""
    return (student - teacher).square().sum(-1) / teacher.square().sum(-1)


def own_frames(clips: Sequence[Tensor], silence: int) -> Tensor:
    """Frames of each clip with its silence; those that only fill the batch up teach nothing. shape = (batch,)"""
    return torch.tensor([len(clip) // 2 + silence for clip in clips])


def mean_error(student: Tensor, teacher: Tensor, lengths: Tensor) -> Tensor:
    """Of every clip's own frames. shapes = (batch, n, d_model), lengths (batch,)"""
    is_own = torch.arange(teacher.shape[1]) < lengths[:, None]
    return (frame_error(student, teacher) * is_own).sum() / is_own.sum()


def stream_error(frames: Tensor, target: Tensor, lengths: Tensor, chunk: int, tail_weight: float) -> Tensor:
    """Mean error of the frames as they are committed, plus that of the others as they were at first.

    frames shape = (batch, n_steps, width, d_model), target (batch, n, d_model), lengths (batch,)
    """
    n, width = target.shape[1], frames.shape[2]
    places = torch.arange(frames.shape[1])[:, None] * chunk + torch.arange(width)
    errors = frame_error(frames, target[:, places.clamp(max=n - 1)])
    is_own = places < lengths[:, None, None]
    weights = torch.full((width,), tail_weight * chunk / max(1, width - chunk))
    weights[:chunk] = 1.0
    return (errors * weights * is_own).sum() / is_own[:, :, :chunk].sum()

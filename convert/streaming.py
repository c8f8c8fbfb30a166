"""The streaming encoder in PyTorch: all steps of an utterance at once, for training and for comparing.

The device goes step by step: C new frames and R frames of overlap to their right, attending to the keys and values of
the frames committed before; the C oldest are then committed. Here the steps lie side by side and are computed layer by
layer, since within a layer no step waits for another: what a step commits depends only on the layer below.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from whisperlet.audio import HOP_LENGTH, WINDOW_FRAMES, Float32
from whisperlet.logmel import DYNAMIC_RANGE, SILENCE, LogMel

MAX_FRAMES = WINDOW_FRAMES
MASKED = -1e4  # a score that leaves no weight, within bfloat16 and float16
CONV_CONTEXT = 2  # mel frames that the stem sees before an encoder frame's own two; one after them


def log_power(samples: Float32, n_mels: int) -> Tensor:
    """log10 mel power of a clip, not yet clamped. shape = (n // HOP_LENGTH, n_mels)"""
    state = LogMel(n_mels)
    state.feed(samples)
    return torch.from_numpy(state.log_power(-(-len(samples) // HOP_LENGTH)))


def pad(clips: list[Tensor], n_frames: int) -> Tensor:
    """Clips with silence after them. shape = (n_clips, n_frames, n_mels)"""
    out = torch.full((len(clips), n_frames, clips[0].shape[1]), float(SILENCE))
    for row, clip in zip(out, clips, strict=True):
        row[: len(clip)] = clip[:n_frames]
    return out


def clamp(power: Tensor, loudest: Tensor) -> Tensor:
    """What Whisper takes in. power shape = (..., n_frames, n_mels), loudest as it is to be broadcast."""
    return (torch.maximum(power, loudest - DYNAMIC_RANGE) + 4.0) / 4.0


def full(encoder: Any, power: Tensor) -> Tensor:
    """Every frame sees every other. power shape = (batch, 2n, n_mels), result (batch, n, d_model)"""
    mel = clamp(power, power.amax((1, 2), keepdim=True))
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mel.transpose(1, 2))))).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        q, k, v = _projected(layer, x)
        x = _rest(layer, x, F.scaled_dot_product_attention(q, k, v))
    normed: Tensor = encoder.layer_norm(x)
    return normed


def streamed(encoder: Any, power: Tensor, chunk: int, overlap: int, context: int, padding: int = 0) -> Tensor:
    """Every step's frames as the device computes them, running maximum included.

    Parameters
    ----------
    encoder
        Of a WhisperForConditionalGeneration, with or without an adapter.
    power
        log10 mel power. shape = (batch, 2n, n_mels)
    chunk, overlap, context, padding
        C and R; how many committed frames a step looks back on at the most; frames of silence after its own, which
        the decoder takes for the end of the speech.

    Returns
    -------
    Tensor
        shape = (batch, n_steps, chunk + overlap + padding, d_model), n_steps = ceil(n / chunk): frame i of step s is
        frame s * chunk + i of the audio, and is committed if i < chunk.
    """
    x = _stem(encoder, power, chunk, chunk + overlap, padding)
    hidden = _hidden(x.shape[1], chunk, context, min(context, chunk * (x.shape[1] - 1)))
    for layer in encoder.layers:
        x = _rest(layer, x, _attend(*_projected(layer, x), chunk, hidden))
    normed: Tensor = encoder.layer_norm(x)
    return normed


def n_steps(n_frames: int, chunk: int) -> int:
    """Steps that cover `n_frames`."""
    return -(-n_frames // chunk)


def _stem(encoder: Any, power: Tensor, chunk: int, n_real: int, padding: int = 0) -> Tensor:
    """Windows of all steps through the convolutions. shape = (batch, n_steps, n_real + padding, d_model)"""
    width = n_real + padding
    batch, n_mels = power.shape[0], power.shape[2]
    steps = n_steps(power.shape[1] // 2, chunk)
    n_rows = 2 * width + 1 + CONV_CONTEXT
    after = 2 * (chunk * (steps - 1) + width) + 1 - power.shape[1]
    power = F.pad(power, (0, 0, CONV_CONTEXT, max(0, after)), value=float(SILENCE))
    windows = power.unfold(1, n_rows, 2 * chunk)[:, :steps].transpose(2, 3)
    n_real_rows = CONV_CONTEXT + 2 * n_real + 1
    loudest = windows[:, :, :n_real_rows].amax((2, 3), keepdim=True).cummax(1).values
    is_real = torch.arange(n_rows)[:, None] < n_real_rows
    mel = clamp(torch.where(is_real, windows, float(SILENCE)), loudest)
    is_first = torch.arange(steps) == 0
    mel = torch.where(is_first[:, None, None] & (torch.arange(n_rows) < CONV_CONTEXT)[:, None], 0.0, mel)
    x = F.gelu(F.conv1d(mel.reshape(-1, n_rows, n_mels).transpose(1, 2), encoder.conv1.weight, encoder.conv1.bias))
    x = x.view(batch, steps, *x.shape[1:])
    x = torch.where(is_first[:, None, None] & (torch.arange(x.shape[-1]) == 0), 0.0, x).flatten(0, 1)
    x = F.gelu(F.conv1d(x, encoder.conv2.weight, encoder.conv2.bias, stride=2)).transpose(1, 2)
    frames = torch.arange(steps)[:, None] * chunk + torch.arange(width)
    positions = encoder.embed_positions.weight[frames.clamp(max=encoder.embed_positions.weight.shape[0] - 1)]
    placed: Tensor = x.view(batch, steps, width, -1) + positions
    return placed


def _hidden(steps: int, chunk: int, context: int, n_before: int) -> Tensor:
    """Of the frames before a step, those that it does not look back on: too long ago, or before the audio.

    shape = (steps, 1, 1, n_before), bool
    """
    back = torch.arange(-n_before, 0)
    frames = torch.arange(steps)[:, None] * chunk + back
    return ((frames < 0) | (back < -context))[:, None, None]


def _projected(layer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values. shape of each = (..., n_head, n, d_head)"""
    attention, y = layer.self_attn, layer.self_attn_layer_norm(x)
    linears = attention.q_proj, attention.k_proj, attention.v_proj
    q, k, v = (f(y).unflatten(-1, (attention.num_heads, -1)).transpose(-3, -2) for f in linears)
    return q, k, v


def _attend(q: Tensor, k: Tensor, v: Tensor, chunk: int, hidden: Tensor) -> Tensor:
    """Each step attends to what was committed before it and to itself. shapes = (batch, steps, n_head, width, d_head)

    Written out: with a mask, the fused kernel takes longer backwards.
    """
    n_before = hidden.shape[-1]
    k, v = (torch.cat([_before(x, chunk, n_before), x], 3) for x in (k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    scores = scores.masked_fill(F.pad(hidden, (0, q.shape[3])), MASKED)
    attended: Tensor = scores.softmax(-1, dtype=scores.dtype) @ v
    return attended


def _before(x: Tensor, chunk: int, n_before: int) -> Tensor:
    """Each step's last `n_before` frames of those committed before it, zeros where there are not so many.

    shape = (batch, steps, n_head, n_before, d_head)
    """
    steps = x.shape[1]
    committed = x[:, :, :, :chunk].transpose(1, 2).flatten(2, 3)[:, :, : chunk * (steps - 1)]
    return F.pad(committed, (0, 0, n_before, 0)).unfold(2, n_before, chunk).permute(0, 2, 1, 4, 3)


def _rest(layer: Any, x: Tensor, attended: Tensor) -> Tensor:
    """A layer after its attention. x shape = (..., n, d_model), attended (..., n_head, n, d_head)"""
    x = x + layer.self_attn.out_proj(attended.transpose(-3, -2).flatten(-2))
    fed: Tensor = x + layer.fc2(F.gelu(layer.fc1(layer.final_layer_norm(x))))
    return fed

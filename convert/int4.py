"""Matrices of four bits: one scale for every 32 inputs of an output, or one an output, and rounding that minds the data.

LiteRT's kernels take codes from -8 to 7. Scales of blocks are float16 values with bfloat16's precision, as its tools
write them. Which scale serves a block best is searched for: cutting its largest weight often costs less than the
coarser steps that it would ask for. Rounding is GPTQ's (arXiv:2210.17323): what rounding a column does wrong is made up
for by the columns after it, as far as the inputs that were seen in calibration allow.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32  # inputs; what the runtime has kernels for
LOWEST, HIGHEST = -8, 7
RATIOS = torch.arange(16, 43) / 40  # of the scale that would just hold a block's largest weight
DAMPING = 0.2  # of the mean input energy, added to every input: few recordings do not tell which are redundant
GROUP = 128  # columns after which the rest is corrected, where scales do not ask for it sooner


@dataclass(frozen=True)
class Packed:
    """A matrix of four bits."""

    codes: Tensor  # int8, from LOWEST to HIGHEST. shape = (n_out, n_in)
    scales: Tensor  # float32, by output and block. shape = (n_out, n_blocks)

    @property
    def block(self) -> int:
        """Inputs that share a scale; 0 if an output has one scale."""
        return 0 if self.scales.shape[1] == 1 else self.codes.shape[1] // self.scales.shape[1]

    @property
    def n_bytes(self) -> int:
        """What it takes in a file."""
        per_scale = 2 if self.block else 4
        return (self.codes.numel() + 1) // 2 + per_scale * self.scales.numel()

    def values(self) -> Tensor:
        """The weights that it stands for. shape = (n_out, n_in)"""
        return self.codes * self.scales.repeat_interleave(self.codes.shape[1] // self.scales.shape[1], 1)


def pack(weight: Tensor, block: int = BLOCK, energy: Tensor | None = None) -> Packed:
    """Round a matrix, (n_out, n_in), to the nearest codes. `block` 0: one scale an output.

    `energy` is the inputs' second moment, (n_in, n_in): with it errors are made up for.
    """
    width = block or weight.shape[1]
    if energy is None:
        scales = torch.cat([best_scales(part, is_block=block > 0) for part in torch.split(weight, width, 1)], 1)
        return Packed(_codes(weight, scales.repeat_interleave(width, 1)), scales)
    return _pack_by(weight, width, energy, is_block=block > 0)


def best_scales(weight: Tensor, *, is_block: bool) -> Tensor:
    """The scale of each row that loses least. shape = (n_out, 1)"""
    largest = torch.maximum(weight.amax(1) / HIGHEST, weight.amin(1) / LOWEST).clamp(min=1e-12)[:, None]
    best, least = largest, torch.full_like(largest, torch.inf)
    for ratio in RATIOS.to(weight.dtype):
        scale = (largest * ratio).bfloat16().float() if is_block else largest * ratio
        error = (_codes(weight, scale) * scale - weight).square().sum(1, keepdim=True)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best


def _codes(weight: Tensor, scale: Tensor) -> Tensor:
    return (weight / scale).round().clamp(LOWEST, HIGHEST).to(torch.int8)


def _pack_by(weight: Tensor, width: int, energy: Tensor, *, is_block: bool) -> Packed:
    """GPTQ: column after column, each one's error pushed on to those not rounded yet."""
    columns = weight.T.contiguous()
    codes, push = torch.zeros_like(columns, dtype=torch.int8), _push(energy)
    scales: list[Tensor] = []
    for start in range(0, len(columns), min(width, GROUP)):
        group = slice(start, min(start + min(width, GROUP), len(columns)))
        if start % width == 0:
            scales.append(best_scales(columns[start : start + width].T, is_block=is_block))
        errors = _round_group(columns[group], codes[group], scales[-1][:, 0], push[group, group])
        columns[group.stop :] -= push[group, group.stop :].T @ errors
    return Packed(codes.T.contiguous(), torch.cat(scales, 1))


def _round_group(columns: Tensor, codes: Tensor, scale: Tensor, push: Tensor) -> Tensor:
    """Round columns, (n_columns, n_out), in place; their errors, as `push` counts them, in the same shape."""
    errors = torch.empty_like(columns)
    for i in range(len(columns)):
        codes[i] = _codes(columns[i], scale)
        errors[i] = (columns[i] - codes[i] * scale) / push[i, i]
        columns[i + 1 :].addr_(push[i, i + 1 :], errors[i], alpha=-1.0)
    return errors


def _push(energy: Tensor) -> Tensor:
    """How the error of a column is spread over the others: upper Cholesky factor of the inverse. (n_in, n_in)"""
    damped = energy.double() + DAMPING * energy.diag().mean().clamp(min=1e-12) * torch.eye(len(energy))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.float()

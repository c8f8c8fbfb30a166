"""What a Whisper's heads and channels are worth, on the teacher's own transcripts.

The measure is Fisher's: how far the loss would move, squared and added up over utterances, if the part's inner values
were scaled. It looks at what comes out in the end, unlike the size of weights or activations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from . import precision, sublayers
from .utterances import Batch


def fisher(model: Any, batches: Sequence[Batch], advance: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Worth of each part by the name of its sublayer. shape of each = (n_parts,)"""
    row = sublayers.every(model)
    found = {sublayer.name: torch.zeros(sublayer.n_parts) for sublayer in row}
    for batch in batches:
        gates = {s.name: torch.ones(len(batch.tokens), 1, s.n_parts * s.part_width, requires_grad=True) for s in row}
        loss = spoken_loss(model, batch, gates)
        gradients = torch.autograd.grad(loss, list(gates.values()))
        for sublayer, gradient in zip(row, gradients, strict=True):
            by_part = gradient.reshape(len(batch.tokens), sublayer.n_parts, -1).sum(-1)
            found[sublayer.name] += by_part.float().square().sum(0)
        advance()
    return found


def spoken_loss(model: Any, batch: Batch, gates: sublayers.Gates | None = None) -> Tensor:
    """Cross-entropy of the transcripts: mean over an utterance's tokens, sum over utterances."""
    with precision.autocast():
        hidden = sublayers.decode(model, batch.read, sublayers.encode(model, batch.power, gates), gates)
        logits = model.proj_out(hidden)
    losses = F.cross_entropy(logits.float().transpose(1, 2), batch.tokens[:, 1:], reduction="none")
    return ((losses * batch.is_said).sum(1) / batch.is_said.sum(1)).sum()


def order(worth: Tensor, protected: Sequence[int] = ()) -> list[int]:
    """Parts from the one worth most; those that must stay come first."""
    ranked = worth.clone()
    ranked[list(protected)] = torch.inf
    return ranked.argsort(descending=True, stable=True).tolist()


@torch.no_grad()
def moments(model: Any, batches: Sequence[Batch], advance: Callable[[], None] = lambda: None) -> dict[str, Tensor]:
    """Second moments of each sublayer's inner values and a constant. shape of each = (width + 1, width + 1)"""
    found: dict[str, Tensor] = {}
    for batch in batches:
        with precision.autocast():
            for sublayer, x, encoded in sublayers.walk(model, batch.power, batch.read):
                values = sublayer.inner(x, encoded)[batch.is_sampled if encoded is None else batch.is_read]
                found[sublayer.name] = found.get(sublayer.name, torch.zeros(())) + gram(with_constant(values))
        advance()
    return found


def with_constant(values: Tensor) -> Tensor:
    """A column of ones after the others, for the bias. shape = (n, width) -> (n, width + 1)"""
    return F.pad(values.float(), (0, 1), value=1.0)


def gram(values: Tensor, others: Tensor | None = None) -> Tensor:
    """Sums of products of columns; `others` by default the same. shapes = (n, a), (n, b) -> (a, b)"""
    with torch.autocast("cpu", enabled=False):
        return values.T @ (values if others is None else others.float())

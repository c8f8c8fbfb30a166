"""Least squares for a closing matrix that has lost some of its columns: what is left learns to do without.

A matrix and its bias are one here: the inner values have a constant after them. The solution is drawn towards what the
matrix was, so that values that hardly occur keep their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import importance, precision, sublayers
from .sublayers import Sublayer
from .utterances import Batch

RIDGE = 0.01  # of the mean second moment


def affine(closing: Any) -> Tensor:
    """Weights and bias of a linear. shape = (width + 1, d_model)"""
    return torch.cat([closing.weight.T, closing.bias[None]])


def put(closing: Any, weights: Tensor) -> None:
    """The opposite."""
    closing.weight.copy_(weights[:-1].T)
    closing.bias.copy_(weights[-1])


def solve(moments: Tensor, products: Tensor, before: Tensor) -> Tensor:
    """Weights with which the inner values come nearest to what is wanted.

    Parameters
    ----------
    moments
        Of the inner values and a constant. shape = (width + 1, width + 1)
    products
        Of those and what is wanted, added up over the same frames. shape = (width + 1, d_model)
    before
        Where the solution is drawn to. shape = (width + 1, d_model)
    """
    moments, products, before = moments.double(), products.double(), before.double()
    ridge = RIDGE * moments.diagonal().mean()
    pulled = moments + ridge * torch.eye(len(moments), dtype=moments.dtype)
    found: Tensor = torch.linalg.solve(pulled, products + ridge * before)
    return found.float()


def without(closing: Any, kept: Tensor, moments: Tensor) -> Tensor:
    """The matrix that comes nearest to `closing` with some of its columns alone; the others are zero.

    shapes: kept (n,), moments (width + 1, width + 1), result (width + 1, d_model)
    """
    before = affine(closing)
    kept = torch.cat([kept, torch.tensor([closing.in_features])])
    found = torch.zeros_like(before)
    found[kept] = solve(moments[kept][:, kept], moments[kept].double() @ before.double(), before[kept])
    return found


class Following:
    """A pruned model and its parent, walked through side by side on the same utterances.

    Each closing matrix is fitted so that the stream comes back to the parent's, errors of the sublayers before it
    included.
    """

    def __init__(self, small: Any, parent: Any, numbers: dict[str, list[int]], batches: Sequence[Batch]) -> None:
        self.small, self.parent, self.numbers, self.batches = small, parent, numbers, batches

    @torch.no_grad()
    def run(self, advance: Callable[[str], None] = lambda _: None) -> None:
        """Fit every matrix, one after the other. `numbers` are the parent's of the layers that are left, by half."""
        with precision.autocast():
            encoders = self.parent.model.encoder, self.small.model.encoder
            theirs, ours = ([sublayers.heard(e, batch.power) for batch in self.batches] for e in encoders)
            encoded = self._half("encoder", theirs, ours, None, advance)
            decoders = self.parent.model.decoder, self.small.model.decoder
            theirs, ours = ([sublayers.read(d, batch.read) for batch in self.batches] for d in decoders)
            self._half("decoder", theirs, ours, encoded, advance)

    def _half(
        self,
        half: str,
        theirs: list[Tensor],
        ours: list[Tensor],
        encoded: tuple[list[Tensor], list[Tensor]] | None,
        advance: Callable[[str], None],
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The parent's frames and the small model's after the half, by batch."""
        nothing: list[Tensor | None] = [None] * len(ours)
        to_them: Sequence[Tensor | None] = encoded[0] if encoded else nothing
        to_us: Sequence[Tensor | None] = encoded[1] if encoded else nothing
        for sublayer, group in self._pairs(half):
            theirs = [_through(group, x, e) for x, e in zip(theirs, to_them, strict=True)]
            ours = self._fit(sublayer, theirs, ours, to_us)
            advance(sublayer.name)
        norms = [getattr(model.model, half).layer_norm for model in (self.parent, self.small)]
        after, ours_after = ([norm(x) for x in xs] for norm, xs in zip(norms, (theirs, ours), strict=True))
        return after, ours_after

    def _pairs(self, half: str) -> Iterator[tuple[Sublayer, list[Sublayer]]]:
        """Each sublayer with those of the parent that bring its stream as far: layers that are gone follow the last."""
        numbers, parents = self.numbers[half], sublayers.of(self.parent, half)
        for sublayer in sublayers.of(self.small, half):
            number = numbers[sublayer.number]
            group = [s for s in parents if s.number == number and s.kind == sublayer.kind]
            if sublayer.kind == sublayers.FFN:
                following = [n for n in numbers if n > number]
                end = min(following, default=parents[-1].number + 1)
                group += [s for s in parents if number < s.number < end]
            if sublayer.number == 0 and sublayer.kind == sublayers.SELF:
                group = [s for s in parents if s.number < number] + group
            yield sublayer, group

    def _fit(
        self, sublayer: Sublayer, wanted: Sequence[Tensor], ours: Sequence[Tensor], encoded: Sequence[Tensor | None]
    ) -> list[Tensor]:
        """The small model's stream after the sublayer, its closing matrix fitted."""
        is_encoder = sublayer.half == "encoder"
        moments, products = torch.zeros(()), torch.zeros(())
        inners = []
        for batch, goal, x, e in zip(self.batches, wanted, ours, encoded, strict=True):
            inners.append(sublayer.inner(x, e))
            own = batch.is_sampled if is_encoder else batch.is_read
            values = importance.with_constant(inners[-1][own])
            moments = moments + importance.gram(values)
            products = products + importance.gram(values, (goal.float() - x.float())[own])
        put(sublayer.closing, solve(moments, products, affine(sublayer.closing)))
        return [x + sublayer.closing(inner) for x, inner in zip(ours, inners, strict=True)]


def _through(group: Sequence[Sublayer], x: Tensor, encoded: Tensor | None) -> Tensor:
    for sublayer in group:
        x = sublayer.add(x, encoded)
    return x

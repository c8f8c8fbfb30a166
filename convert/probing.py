"""What each cut of a Whisper costs alone: how far what it says then is from what it said, on its own transcripts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from . import disk, precision, pruned, refit, sensitivity, sublayers
from .search import Cut
from .sensitivity import Row, Sensitivity
from .sublayers import CROSS, FFN, Sublayer
from .utterances import Batch

UNIT, AMOUNT_UNIT = "KL divergence, nats per token", "share removed"
_KINDS = {FFN: "channels", CROSS: "cross heads"}


class Probe:
    """A model with what it does to some utterances, so that only what follows a change is computed anew."""

    @torch.no_grad()
    def __init__(self, model: Any, batches: Sequence[Batch]) -> None:
        self.model, self.batches, self.row = model, batches, sublayers.every(model)
        self._streams: list[list[Tensor]] = []
        self._encoded: list[Tensor] = []
        for batch in batches:
            with precision.autocast():
                steps = list(sublayers.walk(model, batch.power, batch.read))
            self._streams.append([x for _, x, _ in steps])
            self._encoded.append(next(encoded for _, _, encoded in reversed(steps) if encoded is not None))
        self._said = [self._log_probabilities(i, len(self.row) - 1) for i in range(len(batches))]

    @torch.no_grad()
    def cost(self, first: int, gone: Sequence[Sublayer] = ()) -> float:
        """KL divergence from what the model said, a token, when sublayers from `first` on are changed or gone."""
        total, n = 0.0, 0
        for i, batch in enumerate(self.batches):
            now, said = self._log_probabilities(i, first, gone), self._said[i]
            total += float(F.kl_div(now, said, reduction="sum", log_target=True))
            n += int(batch.is_said.sum())
        return total / n

    @torch.no_grad()
    def distance(self, other: Any) -> float:
        """The same for another model."""
        total, n = 0.0, 0
        for batch, said in zip(self.batches, self._said, strict=True):
            with precision.autocast():
                hidden = sublayers.decode(other, batch.read, sublayers.encode(other, batch.power))
                logits = other.proj_out(hidden[batch.is_said])
            total += float(F.kl_div(logits.float().log_softmax(-1), said, reduction="sum", log_target=True))
            n += int(batch.is_said.sum())
        return total / n

    def _log_probabilities(self, i: int, first: int, gone: Sequence[Sublayer] = ()) -> Tensor:
        """Of every token that is said. shape = (n, n_vocab)"""
        batch, model = self.batches[i], self.model
        x, encoded = self._streams[i][first], None if self.row[first].half == "encoder" else self._encoded[i]
        with precision.autocast():
            for sublayer in self.row[first:]:
                if sublayer.half == "decoder" and encoded is None:
                    encoded, x = model.model.encoder.layer_norm(x), sublayers.read(model.model.decoder, batch.read)
                x = x if sublayer in gone else sublayer.add(x, encoded)
            logits: Tensor = model.proj_out(model.model.decoder.layer_norm(x)[batch.is_said])
        return logits.float().log_softmax(-1)


class Table:
    """The costs of all allowed cuts, measured one after the other and kept in between."""

    def __init__(
        self, probe: Probe, ranks: Mapping[str, Sequence[int]], moments: Mapping[str, Tensor], kept: Path | None = None
    ) -> None:
        self.probe, self.ranks, self.moments, self.kept = probe, ranks, moments, kept
        found = sensitivity.read(kept).rows if kept is not None and kept.is_file() else []
        self._rows = {(row.name, row.amount): row for row in found}

    def measure(
        self, levels: Mapping[str, Sequence[int]], *, layers: bool, advance: Callable[[str], None] = lambda _: None
    ) -> list[Cut]:
        """A cut for each number of parts in `levels`, by sublayer, and for each layer."""
        cuts = []
        for index, sublayer in enumerate(self.probe.row):
            cuts += [self._parts(index, sublayer, n) for n in levels[sublayer.name]]
            advance(sublayer.name)
            self._save()
        if layers:
            cuts += [self._layer(half, layer) for half in pruned.HALVES for layer in self._layers(half)]
            self._save()
        return cuts

    def table(self) -> Sensitivity:
        """For people and for the report."""
        return Sensitivity(unit=UNIT, amount_unit=AMOUNT_UNIT, rows=list(self._rows.values()))

    def _save(self) -> None:
        if self.kept is not None:
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            with disk.replacing(self.kept) as partial:
                sensitivity.write(self.table(), partial)

    def _layers(self, half: str) -> list[list[Sublayer]]:
        numbers = {s.number for s in self.probe.row if s.half == half}
        return [[s for s in self.probe.row if (s.half, s.number) == (half, number)] for number in sorted(numbers)]

    def _parts(self, index: int, sublayer: Sublayer, n: int) -> Cut:
        amount = round(1 - n / sublayer.n_parts, 4)
        if (sublayer.name, amount) not in self._rows:
            kept = columns(sublayer, self.ranks[sublayer.name][:n])
            with _changed(sublayer.closing, refit.without(sublayer.closing, kept, self.moments[sublayer.name])):
                cost = self.probe.cost(index)
            kind = f"{sublayer.half} {_KINDS.get(sublayer.kind, 'heads')}"
            self._note(sublayer.name, kind, sublayer.number, amount, cost)
        saved = (sublayer.n_parts - n) * sublayer.part_weights
        layer = f"{sublayer.half}.{sublayer.number}"
        return Cut(sublayer.name, layer, n, saved, self._rows[sublayer.name, amount].cost)

    def _layer(self, half: str, layer: Sequence[Sublayer]) -> Cut:
        name = f"{half}.{layer[0].number}"
        if (name, 1.0) not in self._rows:
            cost = self.probe.cost(self.probe.row.index(layer[0]), layer)
            self._note(name, f"{half} layers", layer[0].number, 1.0, cost)
        return Cut(name, name, 0, sum(s.n_parts * s.part_weights for s in layer), self._rows[name, 1.0].cost)

    def _note(self, name: str, kind: str, layer: int, amount: float, cost: float) -> None:
        row = Row(name=name, kind=kind, layer=layer, amount=amount, cost=round(cost, 6))
        self._rows[name, amount] = row


def columns(sublayer: Sublayer, parts: Sequence[int]) -> Tensor:
    """Of the closing matrix, in ascending order."""
    width = sublayer.part_width
    return (torch.tensor(sorted(parts))[:, None] * width + torch.arange(width)).flatten()


@contextmanager
def _changed(closing: Any, weights: Tensor) -> Iterator[None]:
    """The matrix with other weights for a while."""
    before = refit.affine(closing)
    with torch.no_grad():
        refit.put(closing, weights)
        try:
            yield
        finally:
            refit.put(closing, before)

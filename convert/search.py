"""Which cuts to make: the cheapest by weight saved, from a table of what each costs alone, until enough is saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import msgspec

from whisperlet.errors import ConfigError


class Cut(msgspec.Struct, frozen=True):
    """One way to make a part of a model smaller. A part is a sublayer or a whole layer."""

    part: str  # "encoder.3.ffn", or "encoder.3"
    layer: str  # "encoder.3"
    kept: int  # heads or channels; of a layer none
    saved: int  # weights
    cost: float

    @property
    def is_layer(self) -> bool:
        """Whether all of the layer goes."""
        return self.part == self.layer


def monotone(cuts: Sequence[Cut]) -> list[Cut]:
    """The same with no cut cheaper than a smaller one of the same part: what is measured on few clips wavers."""
    by_part: dict[str, list[Cut]] = defaultdict(list)
    for cut in sorted(cuts, key=lambda cut: cut.saved):
        floor = by_part[cut.part][-1].cost if by_part[cut.part] else 0.0
        by_part[cut.part].append(msgspec.structs.replace(cut, cost=max(floor, cut.cost)))
    return [cut for part in by_part.values() for cut in part]


def search(cuts: Sequence[Cut], total: int, keep: float) -> list[Cut]:
    """One cut a part at the most, which together leave `keep` of `total` weights or a little less.

    Raises ConfigError where all allowed cuts together leave more; it says how much.
    """
    cuts, most = monotone(cuts), keep * total
    chosen: list[Cut] = []
    while (left := total - sum(cut.saved for cut in chosen)) > most:
        moves = list(_moves(cuts, chosen))
        if not moves:
            raise ConfigError(f"keep = {keep:g}: no allowed cut goes that far; the nearest keeps {left / total:.3f}")
        best = min(moves, key=_Move.rate)
        if left - best.saved <= most:  # the last one: cheap, rather than cheap by weight
            best = min((move for move in moves if left - move.saved <= most), key=lambda move: move.cost)
        chosen = [*best.rest, best.cut]
    return chosen


class _Move(msgspec.Struct, frozen=True):
    """From some cuts to others: one more, or one in the place of smaller ones."""

    cut: Cut
    rest: list[Cut]
    cost: float
    saved: int

    def rate(self) -> float:
        """Cost by weight."""
        return self.cost / self.saved


def _moves(cuts: Sequence[Cut], chosen: Sequence[Cut]) -> Iterator[_Move]:
    gone = {cut.layer for cut in chosen if cut.is_layer}
    for cut in cuts:
        if cut.layer in gone or (cut.is_layer and _is_last(cut.layer, cuts, gone)):
            continue
        replaced = [c for c in chosen if c.part == cut.part or (cut.is_layer and c.layer == cut.layer)]
        saved = cut.saved - sum(c.saved for c in replaced)
        if saved > 0:
            rest = [c for c in chosen if c not in replaced]
            yield _Move(cut, rest, max(0.0, cut.cost - sum(c.cost for c in replaced)), saved)


def _is_last(layer: str, cuts: Sequence[Cut], gone: set[str]) -> bool:
    """Whether it is the only layer left of its half."""
    half = layer.partition(".")[0]
    return not {cut.layer for cut in cuts if cut.layer.partition(".")[0] == half} - gone - {layer}

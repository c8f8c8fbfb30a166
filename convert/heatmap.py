"""A table of sensitivities as a map: kinds and amounts down, layers across, the darker the dearer."""

from __future__ import annotations

from collections import defaultdict

import msgspec

from .sensitivity import Row, Sensitivity

NO_LAYER = "whole"


class Cell(msgspec.Struct, frozen=True):
    """One part, or the dearest of several in the same place."""

    text: str
    background: str  # colours, as in "#00224e"
    ink: str
    hint: str  # which parts


class Band(msgspec.Struct, frozen=True):
    """A row of the map."""

    kind: str
    amount: str
    cells: list[Cell | None]  # by column


class HeatMap(msgspec.Struct, frozen=True):
    """What is drawn."""

    columns: list[str]
    bands: list[Band]
    scale: list[tuple[str, str]]  # colour and the cost that it stands for, from the cheapest to the dearest


def heat_map(table: Sensitivity) -> HeatMap:
    """Lay the rows out; the scale is by square root, since most parts cost little and a few cost much."""
    layers = sorted({row.layer for row in table.rows}, key=lambda layer: (layer is None, layer))
    places: dict[tuple[str, float], dict[int | None, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in table.rows:
        places[row.kind, row.amount][row.layer].append(row)
    scale = _Scale([row.cost for row in table.rows])
    bands = [
        Band(kind, f"{amount:g}", [_cell(by_layer[layer], scale) if layer in by_layer else None for layer in layers])
        for (kind, amount), by_layer in sorted(places.items())
    ]
    return HeatMap([NO_LAYER if layer is None else str(layer) for layer in layers], bands, scale.legend())


def _cell(rows: list[Row], scale: _Scale) -> Cell:
    dearest = max(rows, key=lambda row: row.cost)
    background, ink = scale.colours(dearest.cost)
    others = f", the dearest of {len(rows)}" if len(rows) > 1 else ""
    return Cell(_short(dearest.cost), background, ink, f"{dearest.name}: {dearest.cost:g}{others}")


def _short(cost: float) -> str:
    return f"{cost:.2g}" if abs(cost) < 10 else f"{cost:.0f}"


class _Scale:
    """Costs to colours. Cividis looks the same to nearly everybody, and grows evenly in a grey print as well."""

    def __init__(self, costs: list[float]) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import PowerNorm

        self._low, self._high = min(0.0, *costs), max(costs)
        self._norm = PowerNorm(0.5, self._low, max(self._high, self._low + 1e-12))
        self._map = colormaps["cividis_r"]

    def colours(self, cost: float) -> tuple[str, str]:
        """Background, and what is readable on it."""
        from matplotlib.colors import to_hex

        red, green, blue, _ = rgba = self._map(self._norm(cost))
        luminance = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2  # WCAG, nearly
        return to_hex(rgba), "#000000" if luminance > 0.18 else "#ffffff"

    def legend(self) -> list[tuple[str, str]]:
        """Eight steps of the scale."""
        steps = [float(self._norm.inverse(i / 7)) for i in range(8)]
        return [(self.colours(cost)[0], _short(cost)) for cost in steps]

"""What each part of a model costs when it is cut or made coarser: a table that searches write and the report draws."""

from __future__ import annotations

from pathlib import Path

import msgspec

from . import disk

FILE = "sensitivity.json"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One part, changed by one amount, everything else left as it was."""

    name: str  # of the part, as the checkpoint or the graph calls it
    kind: str  # parts of a kind make a band of the heat map: "encoder heads", "decoder fc1", "embedding"
    layer: int | None  # counts from 0; None: the part belongs to no layer
    amount: float  # how much was changed, in `amount_unit`
    cost: float  # in `unit`; more is worse


class Sensitivity(msgspec.Struct, frozen=True, kw_only=True):
    """The whole table."""

    unit: str  # of `cost`: "WER, percentage points", "relative squared error"
    amount_unit: str  # of `amount`: "share removed", "bits"
    rows: list[Row]


def write(table: Sensitivity, path: Path) -> None:
    """As JSON, for people too."""
    path.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=1))


def read(path: Path) -> Sensitivity:
    """A table that `write` wrote. Raises ConfigError naming the file and the reason."""
    return disk.read_json(path, Sensitivity, "table of sensitivities")

"""Gives a quantised model its matrices of four bits: those the recipe names, or as many as its budget asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from whisperlet.bundle import Vocabulary
from whisperlet.errors import ConfigError

from . import compact, mixed, packing, sensitivity
from .fold import FoldedWhisper
from .int4 import Packed
from .mixed import Precision, Search
from .recipe import Quantise

MARGIN = 6_000  # bytes that a manifest grows by after the choice: parity and what was heard


class Mixture(NamedTuple):
    """The matrices that have four bits, and the report on them; None where every matrix could stay as it was."""

    packed: Mapping[str, Packed]
    precision: Precision | None


def apply(
    stage: Quantise,
    whisper: FoldedWhisper,
    ids: Vocabulary,
    quantised: Sequence[Path],
    target: Path,
    bundle_bytes: Callable[[], int],
    advance: Callable[[str], None] = lambda _: None,
) -> Mixture:
    """Write `target` anew from the int8 files with some matrices at four bits.

    `bundle_bytes` says how large a bundle with `target` as it is now would be. Raises ConfigError where the budget
    cannot be met, naming what comes nearest.
    """
    excess = 0 if stage.max_bytes is None else bundle_bytes() + MARGIN - stage.max_bytes
    if stage.max_bytes is not None and excess <= 0:
        return Mixture({}, None)
    search = Search(stage, whisper, ids, advance)
    chosen = search.allowed if stage.max_bytes is None else _affordable(search, excess)
    while True:
        packed = {name: search.packed[name] for name in chosen}
        _write(search, quantised, target, packed)
        over = 0 if stage.max_bytes is None else bundle_bytes() + MARGIN - stage.max_bytes
        if over <= 0:
            return Mixture(packed, search.report(packed))
        excess += over  # tables in the file's head, which no matrix knows of
        chosen = _affordable(search, excess)


def _affordable(search: Search, excess: int) -> list[str]:
    """What to give four bits. Raises ConfigError if nothing suffices."""
    saves = {name: search.saves(name) for name in search.allowed}
    chosen = mixed.choose(search.costs, saves, excess)
    if chosen is None:
        limit = search.stage.max_bytes or 0
        nearest = limit + excess - sum(saves.values())
        raise ConfigError(
            f"quantise.max_bytes: {limit:,} cannot be reached: with all that int4_parts allow "
            f"({', '.join(search.stage.int4_parts)}) at four bits the bundle still has about {nearest:,} bytes; "
            "trim the vocabulary, prune, or allow more parts"
        )
    return chosen


def _write(search: Search, quantised: Sequence[Path], target: Path, packed: Mapping[str, Packed]) -> None:
    weights = {name: matrix.weight for name, matrix in search.matrices.items()}

    def change(model: Any, contents: list[bytes]) -> None:
        packing.pack_in(model, contents, weights, packed)

    compact.compact(quantised, target, change)


def record(precision: Precision, out: Path, name: str) -> None:
    """What each matrix costs, beside the bundle."""
    table = mixed.sensitivities(precision)
    if table.rows:
        sensitivity.write(table, out / f"{name}.{sensitivity.FILE}")

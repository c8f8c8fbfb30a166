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
    limit = stage.max_bytes
    wanted = 0 if limit is None else bundle_bytes() + MARGIN - limit
    if limit is not None and wanted <= 0:
        return Mixture({}, None)
    search = Search(stage, whisper, ids, advance)
    while True:
        chosen = search.allowed if limit is None else _affordable(search, wanted)
        packed = {name: search.packed[name] for name in (search.allowed if chosen is None else chosen)}
        _write(search, quantised, target, packed)
        over = 0 if limit is None else bundle_bytes() + MARGIN - limit
        if over <= 0:
            return Mixture(packed, search.report(packed))
        if chosen is None:
            raise ConfigError(
                f"quantise.max_bytes: {limit:,} cannot be reached: with all that int4_parts allow "
                f"({', '.join(stage.int4_parts)}) at four bits the bundle still has {(limit or 0) + over:,} bytes; "
                "trim the vocabulary, prune, or allow more parts"
            )
        wanted += over  # tables in the file's head, which no matrix knows of


def _affordable(search: Search, wanted: int) -> list[str] | None:
    """What to give four bits so that the matrices alone save so many bytes; None if they cannot."""
    return mixed.choose(search.costs, {name: search.saves(name) for name in search.allowed}, wanted)


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

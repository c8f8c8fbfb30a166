"""Which matrices get four bits: those that lose least for the bytes they save, until a budget is met.

What a matrix loses is measured, not guessed: the model with this one at four bits and everything else whole goes
through what the whole model said of calibration recordings, and its distributions are compared token by token.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import msgspec
from torch import Tensor, nn

from whisperlet.bundle import Vocabulary
from whisperlet.errors import ConfigError

from . import calibration, corpus, int4, speechset
from .calibration import Heard, Judge, Matrix
from .fold import FoldedWhisper
from .int4 import Packed
from .recipe import Quantise
from .sensitivity import Row, Sensitivity
from .stages import located

EMBEDDING = "token_embedding"


class MatrixError(msgspec.Struct, frozen=True):
    """What rounding does to a matrix."""

    name: str
    part: str
    bits: int  # that it has in the bundle
    n_weights: int
    int8_error: float  # squared error of what it puts out on calibration audio, relative to its energy
    int4_error: float | None  # None: its inputs do not divide into blocks
    int4_cost: float | None  # nats a token when it alone has four bits; None: it was not asked


class Precision(msgspec.Struct, frozen=True, kw_only=True):
    """What was decided, and why."""

    max_bytes: int | None
    n_recordings: int
    divergence: float  # nats a token, with all choices together, on recordings that rounding was not fitted to
    matrices: list[MatrixError]


def part(name: str) -> str:
    """Where a matrix runs. Keys and values of the cross-attention are computed with the encoder, for every frame."""
    if name == EMBEDDING:
        return "embedding"
    return "encoder" if name.startswith("encoder") or re.search(r"\.cross\.(key|value)$", name) else "decoder"


def matrices(whisper: FoldedWhisper) -> dict[str, Matrix]:
    """Every matrix that is multiplied with, by name; a streaming adapter's stay as they are."""
    found: dict[str, Matrix] = {name: m for name, m in whisper.named_modules() if isinstance(m, nn.Linear)}
    found = {name: m for name, m in found.items() if not name.startswith("streaming")}
    return {**found, EMBEDDING: whisper.token_embedding}


@contextmanager
def swapped(found: Mapping[str, Matrix], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let matrices have other values for a while."""
    kept = {name: found[name].weight for name in values}
    for name, value in values.items():
        found[name].weight = nn.Parameter(value, requires_grad=False)
    try:
        yield
    finally:
        for name, weight in kept.items():
            found[name].weight = weight


def in_eight_bits(weight: Tensor) -> Tensor:
    """What int8 with a scale an output makes of a matrix."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
    return (weight / scale).round() * scale


def output_error(weight: Tensor, rounded: Tensor, energy: Tensor) -> float:
    """Squared error of `x @ weight.T`, relative to its energy. `energy` is the second moment of x."""
    lost = weight - rounded
    return float(((lost @ energy) * lost).sum() / ((weight @ energy) * weight).sum().clamp(min=1e-30))


class Search:
    """Everything about the matrices that a choice needs."""

    def __init__(
        self,
        stage: Quantise,
        whisper: FoldedWhisper,
        ids: Vocabulary,
        advance: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.stage, self.whisper, self.matrices = stage, whisper, matrices(whisper)
        heard = _recordings(stage, whisper, ids, advance)
        self.n_recordings = len(heard)
        advance("what matrices take in")
        self.energies = calibration.energies(whisper, [h for i, h in enumerate(heard) if i % 3], self.matrices)
        self.judge = Judge(whisper, heard[::3])
        self.allowed = [name for name in self.matrices if part(name) in stage.int4_parts and self._divides(name)]
        self.packed = {name: self._pack(name, advance) for name in self.allowed}
        self.costs = {name: self._cost(name, advance) for name in self.allowed} if stage.max_bytes else {}

    def _divides(self, name: str) -> bool:
        return not self.matrices[name].weight.shape[1] % (self.stage.int4_block or 1)

    def _pack(self, name: str, advance: Callable[[str], None]) -> Packed:
        advance(f"rounding {name}")
        return int4.pack(self.matrices[name].weight, self.stage.int4_block, self.energies[name])

    def _cost(self, name: str, advance: Callable[[str], None]) -> float:
        advance(f"trying {name}")
        return self.divergence([name])

    def divergence(self, names: Sequence[str]) -> float:
        """Nats a token with these matrices at four bits."""
        with swapped(self.matrices, {name: self.packed[name].values() for name in names}):
            return self.judge.divergence(encoder=any(name.startswith("encoder") for name in names))

    def saves(self, name: str) -> int:
        """Bytes that four bits take off a matrix with eight and a float32 scale an output."""
        weight = self.matrices[name].weight
        return weight.numel() + 4 * len(weight) - self.packed[name].n_bytes

    def report(self, chosen: Mapping[str, Packed]) -> Precision:
        """Every matrix, whatever it got."""
        return Precision(
            max_bytes=self.stage.max_bytes,
            n_recordings=self.n_recordings,
            divergence=self.divergence(list(chosen)),
            matrices=[self._error(name, 4 if name in chosen else 8) for name in self.matrices],
        )

    def _error(self, name: str, bits: int) -> MatrixError:
        weight, energy = self.matrices[name].weight, self.energies[name]
        packed = self.packed.get(name)
        if packed is None and self._divides(name):
            packed = int4.pack(weight, self.stage.int4_block)
        return MatrixError(
            name=name,
            part=part(name),
            bits=bits,
            n_weights=weight.numel(),
            int8_error=output_error(weight, in_eight_bits(weight), energy),
            int4_error=None if packed is None else output_error(weight, packed.values(), energy),
            int4_cost=self.costs.get(name),
        )


def choose(costs: Mapping[str, float], saves: Mapping[str, int], wanted: int) -> list[str] | None:
    """The matrices to give four bits so that `wanted` bytes are saved, at little cost; None if all are not enough.

    The cheapest by byte come first; then, the dearest first, those are taken back that the budget can do without.
    """
    chosen, saved = [], 0
    for name in sorted(costs, key=lambda name: (max(costs[name], 0.0) / saves[name], -saves[name])):
        if saved >= wanted:
            break
        chosen.append(name)
        saved += saves[name]
    for name in sorted(chosen, key=lambda name: -costs[name]):
        if saved - saves[name] >= wanted:
            chosen.remove(name)
            saved -= saves[name]
    return chosen if saved >= wanted else None


def sensitivities(precision: Precision) -> Sensitivity:
    """The table for the report: what each matrix costs at four bits."""
    rows = [
        Row(name=m.name, kind=_kind(m.name), layer=_layer(m.name), amount=4.0, cost=m.int4_cost)
        for m in precision.matrices
        if m.int4_cost is not None
    ]
    return Sensitivity(unit="nats per token", amount_unit="bits", rows=rows)


def _kind(name: str) -> str:
    return re.sub(r"_layers\.\d+\.", " ", name).replace(EMBEDDING, "embedding")


def _layer(name: str) -> int | None:
    found = re.search(r"_layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _recordings(
    stage: Quantise, whisper: FoldedWhisper, ids: Vocabulary, advance: Callable[[str], None]
) -> list[Heard]:
    """What the model says of the calibration recordings."""
    clips = corpus.find(located(stage.calibration))
    n = min(stage.n_calibration, len(clips))
    heard = []
    for clip in (clips[i * len(clips) // n] for i in range(n)):
        advance(f"hearing {clip.id}")
        pieces = corpus.pieces(speechset.audio(clip.audio))
        heard += [calibration.listen(whisper, ids, piece, clip.language) for piece in pieces]
    if len(heard) < 2:
        raise ConfigError(f"{stage.calibration}: too little to calibrate on: two recordings are the least")
    return heard

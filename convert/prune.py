"""The stage `prune`: a smaller Whisper, by attention heads, feed-forward channels and whole layers.

What each cut costs alone is measured on recordings; the search takes the cheapest by weight until the target is met.
What is left is fitted by least squares to what the parent did, and goes on to `heal`, the parent beside it.
"""

from __future__ import annotations

import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from rich.progress import Progress

from . import disk, pruned
from .pruned import Kept, KeptLayer
from .speechset import Source
from .stages import CHECKPOINTS, Stage, StageReport, located

if TYPE_CHECKING:
    from torch import Tensor

    from .model import Checkpoint
    from .search import Cut
    from .sensitivity import Sensitivity
    from .sublayers import Sublayer
    from .utterances import Batch, Lessons

TEACHER = "teacher"  # folder in the result: the checkpoint before pruning
N_FRAMES_WITH_GRADIENTS = 3000  # in a batch whose activations are kept for the way back
N_FRAMES = 768  # 20 ms each, for which work is counted: the usual window
MIN_HEADS = 2  # a product of two single matrices is exported as something slow


class Prune(Stage, frozen=True, kw_only=True, tag="prune"):
    """Cut heads, channels and layers away until `keep` of the layers' weights are left."""

    keep: float  # of the weights of encoder and decoder; embeddings and convolutions stay
    audio: tuple[str, ...]  # folders or manifests to measure on, `:N` for the first N recordings; texts are not needed
    n_clips: int = 128  # that are taken of them, evenly by length
    channels: int = 32  # feed-forward channels stay in multiples of this, which suits the device's kernels
    layers: bool = True  # whole ones may go
    levels: int = 8  # steps between all and nothing that are measured of each sublayer

    def __post_init__(self) -> None:
        if not 0 < self.keep < 1:
            raise ValueError("`keep` must be between 0 and 1")
        if min(self.n_clips, self.channels, self.levels) < 1 or not self.audio:
            raise ValueError("`n_clips`, `channels` and `levels` must be positive, and `audio` must name something")

    def inputs(self) -> list[Path]:
        """The recordings."""
        return [source.path for source in self.sources()]

    def sources(self) -> list[Source]:
        """Where they lie, and how many of them to take."""
        return [Source.parse(str(located(text))) for text in self.audio]


def run(stage: Prune, in_dir: Path, out_dir: Path, progress: Progress) -> StageReport:
    """Measure, search, cut, fit. Raises ConfigError if the target is out of reach, naming what came nearest."""
    from . import model as models
    from . import sensitivity

    began = time.monotonic()
    job = _Job(stage, models.load_directory(in_dir, in_dir.name), out_dir / CHECKPOINTS, progress)
    small, details = job.run()
    models.save_directory(small, out_dir)
    sensitivity.write(job.sensitivity, out_dir / sensitivity.FILE)
    hand_on_teacher(in_dir, out_dir)
    return StageReport("prune", round(time.monotonic() - began, 1), details)


def hand_on_teacher(in_dir: Path, out_dir: Path) -> None:
    """Put the checkpoint before pruning beside the result, without a copy where the file system can do so."""
    target = out_dir / TEACHER
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    folder = in_dir / TEACHER if (in_dir / TEACHER).is_dir() else in_dir
    for path in folder.iterdir():
        if path.is_file():
            try:
                os.link(path.resolve(), target / path.name)
            except OSError:
                shutil.copyfile(path, target / path.name)


class _Job:
    """One run of the stage, and what its steps hand on."""

    sensitivity: Sensitivity

    def __init__(self, stage: Prune, parent: Checkpoint, work: Path, progress: Progress) -> None:
        self.stage, self.parent, self.work, self.progress = stage, parent, work, progress
        self.d_head = pruned.d_head(parent.model)
        self.total = pruned.sizes_of(parent.model).weights(parent.model.config.d_model, self.d_head)

    def run(self) -> tuple[Checkpoint, dict[str, Any]]:
        """The small model and what is to be said of it."""
        from . import probing, search
        from .utterances import listen

        stage = self.stage
        lessons = listen("prune", self.parent, stage.sources(), self.work, self.progress, stage.n_clips)
        batches = lessons.sample(stage.n_clips)
        self.probe = probing.Probe(self.parent.model, lessons.held_out())
        ranks, cuts = self._measure(lessons)
        kept = keep(self.parent.model, search.search(cuts, self.total, stage.keep), ranks)
        small = pruned.cut(self.parent, kept)
        kl_cut = self.probe.distance(small.model)
        self._fit(small, kept, batches)
        costs = {"kl_cut": round(kl_cut, 4), "kl_fitted": round(self.probe.distance(small.model), 4)}
        return pruned.rehashed(small), {**self._described(small), **costs}

    def _measure(self, lessons: Lessons) -> tuple[dict[str, list[int]], list[Cut]]:
        """Parts of every sublayer by worth, and all allowed cuts."""
        from . import importance, probing, sensitivity

        worth, moments = self._measured(lessons)
        ranks = {name: importance.order(worth[name], self._protected(name)) for name in worth}
        table = probing.Table(self.probe, ranks, moments, self.work / sensitivity.FILE)
        allowed = {sublayer.name: self._levels(sublayer) for sublayer in self.probe.row}
        step = self._bar("cuts", len(allowed))
        cuts = table.measure(allowed, layers=self.stage.layers, advance=lambda _: step())
        self.sensitivity = table.table()
        return ranks, cuts

    def _measured(self, lessons: Lessons) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Worth of the parts and moments of the inner values, by sublayer, from a few of the utterances."""
        from . import importance

        def measure(what: str, of: Callable[..., dict[str, Tensor]], n: int, n_frames: int) -> dict[str, Tensor]:
            batches = lessons.sample(max(1, n), n_frames)
            path, source = self.work / f"{what}.pt", [self.parent.sha256, [len(batch.clips) for batch in batches]]
            return _kept(path, source, lambda: of(self.parent.model, batches, self._bar(what, len(batches))))

        worth = measure("worth", importance.fisher, self.stage.n_clips // 8, N_FRAMES_WITH_GRADIENTS)
        return worth, measure("moments", importance.moments, self.stage.n_clips // 4, 4 * N_FRAMES_WITH_GRADIENTS)

    def _bar(self, what: str, total: int) -> Callable[[], None]:
        bar = self.progress.add_task(f"prune: {what}", total=total)
        return lambda: self.progress.advance(bar)

    def _protected(self, name: str) -> list[int]:
        """Heads whose attention follows the audio; streaming relies on them."""
        half, number, kind = name.split(".")
        heads = self.parent.generation.alignment_heads if (half, kind) == ("decoder", "cross") else ()
        return [head for layer, head in heads if layer == int(number)]

    def _levels(self, sublayer: Sublayer) -> list[int]:
        """Numbers of parts that may stay, most first."""
        stage, n_parts = self.stage, sublayer.n_parts
        unit = stage.channels if sublayer.kind == "ffn" else 1
        least = unit if sublayer.kind == "ffn" else max(MIN_HEADS, len(self._protected(sublayer.name)))
        steps = (round(n_parts * step / stage.levels / unit) * unit for step in range(1, stage.levels))
        return sorted({n for n in steps if least <= n < n_parts}, reverse=True)

    def _fit(self, small: Checkpoint, kept: Kept, batches: Sequence[Batch]) -> None:
        from . import refit

        numbers = {half: [layer.number for layer in getattr(kept, half)] for half in pruned.HALVES}
        step = self._bar("fit", 2 * len(kept.encoder) + 3 * len(kept.decoder))
        refit.Following(small.model, self.parent.model, numbers, batches).run(lambda _: step())

    def _described(self, small: Checkpoint) -> dict[str, Any]:
        sizes = pruned.sizes_of(small.model)
        left = sizes.weights(small.model.config.d_model, self.d_head)
        weights = {"weights_before": self.total, "weights": left, "kept": round(left / self.total, 4)}
        works = [pruned.multiply_adds(checkpoint.model, N_FRAMES) for checkpoint in (self.parent, small)]
        work = {"frames": N_FRAMES, "multiply_adds_before": works[0], "multiply_adds": works[1]}
        return {**weights, **work, "sizes": msgspec.to_builtins(sizes)}


def _kept(path: Path, source: list[Any], make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors that an interrupted run of the same has left, or new ones."""
    import torch

    if path.is_file() and (found := torch.load(path, weights_only=True))["source"] == source:
        tensors: dict[str, Tensor] = found["tensors"]
        return tensors
    tensors = make()
    with disk.replacing(path) as partial:
        torch.save({"source": source, "tensors": tensors}, partial)
    return tensors


def keep(model: Any, cuts: Sequence[Cut], ranks: Mapping[str, Sequence[int]]) -> Kept:
    """What some cuts leave of a model; `ranks` are the parts of each sublayer, the most worthy first."""
    from . import sublayers

    counts = {cut.part: cut.kept for cut in cuts}
    kept: dict[str, dict[int, dict[str, tuple[int, ...]]]] = {half: defaultdict(dict) for half in pruned.HALVES}
    for sublayer in sublayers.every(model):
        if f"{sublayer.half}.{sublayer.number}" not in counts:
            n = counts.get(sublayer.name, sublayer.n_parts)
            kept[sublayer.half][sublayer.number][sublayer.kind] = tuple(sorted(ranks[sublayer.name][:n]))
    halves = (
        tuple(KeptLayer(n, layer["self"], layer["ffn"], layer.get("cross")) for n, layer in kept[half].items())
        for half in pruned.HALVES
    )
    return Kept(*halves)

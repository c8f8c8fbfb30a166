"""From a recipe to a bundle: load, export, quantise, package. Every step shows its progress."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from whisperlet import bundle
from whisperlet.bundle import GraphSpec, Manifest
from whisperlet.errors import ModelError

from . import (
    adapter,
    chain,
    compact,
    disk,
    evaluate,
    export,
    four_bits,
    graphs,
    model,
    parity,
    quantise,
    reference,
    stages,
    tokens,
)
from . import recipe as recipes
from .budget import Loss
from .fold import FoldedWhisper, LowRank
from .machine import peak_rss_mb
from .mixed import Precision
from .parity import SignatureParity, TextParity
from .recipe import Export, Package, Quantise, Recipe
from .stages import StageReport

TOOLS = ("whisperlet", "torch", "transformers", "litert-torch", "ai-edge-quantizer", "ai-edge-litert")


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a build did; written beside the bundle as JSON."""

    recipe: dict[str, Any]
    adapter: str | None  # what the encoder was adapted by; its hash stands in the recipe
    bundle: str
    bundle_bytes: int
    bundle_sha256: str
    seconds: dict[str, float]  # by stage
    peak_rss_mb: float
    folding_max_abs: float  # logits, folded modules against transformers'
    parity: list[SignatureParity]
    texts: list[TextParity]
    stages: list[StageReport] = []  # those that changed the checkpoint
    losses: list[Loss] = []  # what they cost, if the recipe has a budget
    precision: Precision | None = None  # bits by matrix, if some have four


class Build:
    """One run of a recipe: the folder it works in, the bars it shows, and what its stages hand on."""

    def __init__(self, recipe: Recipe, work: Path, progress: Progress) -> None:
        self.recipe, self.work, self.progress = recipe, work, progress
        self.stages = recipes.stages(recipe)
        self.chain = chain.Chain(recipe, progress, self.step)
        self.adapter: str | None = None
        self.seconds: dict[str, float] = {}
        self.model = work / "model.tflite"
        self.graphs: list[GraphSpec] = []
        self.floats: list[Path] = []
        self.mixture = four_bits.Mixture({}, None)

    @contextlib.contextmanager
    def step(self, name: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """A bar; what it yields says what comes next and counts it."""
        task = self.progress.add_task(name, total=total)
        began = time.monotonic()

        def advance(what: str) -> None:
            self.progress.update(task, description=f"{name} {what}", advance=1)

        with _tools_write_to(self.work / "tools.log"):
            yield advance
        self.seconds[name] = round(time.monotonic() - began, 1)
        self.progress.update(task, description=name, total=total or 1, completed=total or 1)

    def load(self) -> None:
        """Source -> checkpoint, through the stages that change it, and its modules with the gains folded away."""
        with self.step("load"):
            self.checkpoint = model.load(self.recipe.source)
            self.source_sha256 = self.checkpoint.sha256
        self._check_adapter()
        if recipes.model_stages(self.recipe):
            self.checkpoint = self.chain.run(self.checkpoint)
        with self.step("fold"):
            beside = self._adapt()
            self.dims = export.model_dims(self.checkpoint.model, self.stages[0].n_text_ctx)
            self.whisper = FoldedWhisper(self.checkpoint.model, self.checkpoint.generation.alignment_heads, beside)
            self.loaded_mb = peak_rss_mb()

    def _check_adapter(self) -> None:
        """Refuse an adapter that cannot fit what the stages will make, before they take their time."""
        stage = recipes.adapter(self.recipe)
        if stage is None:
            return
        changing = [stages.tag(stage) for stage in recipes.model_stages(self.recipe) if not stage.keeps_encoder]
        adapter.check(
            adapter.find(stage.file),
            self.checkpoint.model.model.encoder,
            self.source_sha256,
            self.stages[0].stream_padding,
            changing,
        )

    def _adapt(self) -> list[dict[str, LowRank]] | None:
        """Merge the recipe's adapter into the encoder, or return it; the checkpoint's hash stays its source's."""
        stage = recipes.adapter(self.recipe)
        if stage is None:
            return None
        path = adapter.find(stage.file)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if stage.sha256 not in ("", sha256):
            raise ModelError(f"{path}: is not the adapter that the recipe names: its SHA-256 is {sha256}")
        self.adapter, found = stage.file, msgspec.structs.replace(stage, sha256=sha256)
        first = recipes.model_stages(self.recipe)
        self.recipe = msgspec.structs.replace(self.recipe, stages=[*first, found, *self.stages])
        encoder = self.checkpoint.model.model.encoder
        if not stage.merge:
            return adapter.apart(encoder, path, self.checkpoint.sha256)
        adapter.merge(encoder, path, self.checkpoint.sha256)
        return None

    def run_export(self, stage: Export) -> None:
        """Modules -> float .tflite, and how far folding moved the logits."""
        with self.step("export", 2 * stage.n_signatures) as advance:
            self.graphs, self.floats, self.exporting_mb = export.export_float(
                self.whisper, self.dims, stage, self.work, advance
            )

    def run_quantise(self, stage: Quantise) -> None:
        """Float .tflite -> int8 .tflite, everything in it once."""
        with self.step("quantise"):
            quantised = [path.with_suffix(".int8.tflite") for path in self.floats]
            for source, target in zip(self.floats, quantised, strict=True):
                quantise.quantise(stage, source, target)
            compact.compact(quantised, self.model)
        if stage.linear != "int8":
            with self.step("four bits") as advance:
                ids = reference.vocabulary(self.checkpoint)
                self.mixture = four_bits.apply(
                    stage, self.whisper, ids, quantised, self.model, lambda: self._draft().stat().st_size, advance
                )

    def _draft(self) -> Path:
        """A bundle with the model as it is now."""
        draft = self.work / "draft.tflite"
        bundle.write(draft, self.model, self.manifest(), tokens.deflatable(self.checkpoint.tokenizer_json))
        return draft

    def check(self, stage: Export) -> None:
        """Compare every signature, then the text of the golden clips."""
        probe = parity.Probe(self.whisper, self.dims, stage, self.prompt())
        with self.step("compare", stage.n_signatures) as advance:
            self.folding_max_abs = parity.folding_error(self.checkpoint.model, probe)
            self.parity = parity.compare_signatures(probe, self.floats, self.model, advance, self.mixture.packed)
        with self.step("listen"):
            draft = self._draft()
            names, clips = zip(*parity.golden_clips(), strict=True)
            expected = evaluate.reference_texts(self.checkpoint, clips, self._language())
            heard = evaluate.bundle_texts(draft, clips, self._language())
            self.texts = [TextParity(*texts) for texts in zip(names, expected, heard, strict=True)]

    def manifest(self) -> Manifest:
        """What the bundle will say of itself."""
        stage, _, package = self.stages
        return msgspec.structs.replace(
            reference.manifest(self.checkpoint, self.recipe.name, self.dims),
            encode_frames=list(stage.encode_frames),
            cross_frames=list(stage.cross_frames),
            decode_tokens=list(stage.decode_tokens),
            streams=graphs.streams(stage),
            silence_frames=package.silence_frames,
            graphs=self.graphs,
            source_sha256=self.source_sha256,
            recipe=recipes.as_dict(self.recipe) | self._done(),
            tools={name: version(name) for name in TOOLS},
            litert_only="matrices of four bits" if self.mixture.packed else "",
        )

    def _done(self) -> dict[str, Any]:
        """What the stages of the model did, without what another run would do otherwise."""
        reports = [{"stage": report.stage, **report.details} for report in self.chain.reports]
        return {"reports": reports} if reports else {}

    def run_package(self, _stage: Package, target: Path) -> Report:
        """Everything -> one file, whole or not at all."""
        with self.step("package"):
            manifest = msgspec.structs.replace(
                self.manifest(),
                parity=[msgspec.to_builtins(row) for row in self.parity],
                scores={"golden_texts": [msgspec.to_builtins(text) for text in self.texts]},
            )
            bundle.write(target, self.model, manifest, tokens.deflatable(self.checkpoint.tokenizer_json))
        return Report(
            recipe=recipes.as_dict(self.recipe),
            adapter=self.adapter,
            bundle=target.name,
            bundle_bytes=target.stat().st_size,
            bundle_sha256=bundle.open_bundle(target).sha256,
            seconds=self.seconds,
            peak_rss_mb=round(max(peak_rss_mb(), self.loaded_mb + self.exporting_mb), 1),
            folding_max_abs=self.folding_max_abs,
            parity=self.parity,
            texts=self.texts,
            stages=self.chain.reports,
            losses=self.chain.losses,
            precision=self.mixture.precision,
        )

    def prompt(self) -> list[int]:
        """The prompt of a transcript."""
        ids = reference.vocabulary(self.checkpoint)
        head = [ids.sot] if ids.transcribe is None else [ids.sot, ids.languages[self._language()], ids.transcribe]
        return [*head, ids.no_timestamps]

    def _language(self) -> str:
        """English, or the first language of a model that has lost it."""
        languages = self.checkpoint.generation.lang_ids
        return "en" if "en" in languages or not languages else next(iter(languages))


@contextlib.contextmanager
def started(recipe: Recipe, out: Path, console: Console, what: str) -> Iterator[Build]:
    """A run of a checked recipe, in a folder below `out` that goes with it. `what` it is, should the disk be full."""
    chain.check(recipe)
    out.mkdir(parents=True, exist_ok=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with (
        disk.explained(out, what),
        disk.workplace(out) as work,
        Progress(*columns, console=console) as progress,
    ):
        yield Build(recipe, work, progress)


def build(recipe: Recipe, out: Path, console: Console) -> Report:
    """Run a recipe; leaves `<name>.tflite` and `<name>.json` in `out`, or neither."""
    with started(recipe, out, console, "the build") as job:
        stage, quantising, packaging = job.stages
        job.load()
        job.run_export(stage)
        job.run_quantise(quantising)
        job.check(stage)
        report = job.run_package(packaging, out / f"{recipe.name}.tflite")
    (out / f"{recipe.name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1))
    if report.precision:
        four_bits.record(report.precision, out, recipe.name)
    return report


@contextlib.contextmanager
def _tools_write_to(log: Path) -> Iterator[None]:
    """Exporter, quantiser and runtime write what they do on descriptors 1 and 2; it goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = os.dup(1), os.dup(2)
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, original in zip((1, 2), saved, strict=True):
            os.dup2(original, descriptor)
            os.close(original)


def own_console() -> Console:
    """A console on a copy of the terminal's descriptor, which the redirection of the tools does not touch."""
    return Console(file=os.fdopen(os.dup(2), "w"), stderr=False)

"""One HTML page about what lies in a folder: builds, evaluations, sensitivities. Nothing in it comes from a network."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from whisperlet.errors import ConfigError, WhisperletError

from . import charts, comparison, disk, inspection, worst
from .charts import Point
from .comparison import Comparison
from .evaluation import Evaluation
from .heatmap import heat_map
from .inspection import Contents
from .metrics import LABELS, number, span_text
from .results import BuildReport, Results, gather

LATENCIES = ("first_word_ms", "finalise_ms", "end_to_final_ms")
SECTIONS = {  # id: title, and what would fill it; in the page's order
    "accuracy": ("Accuracy", "what `evaluate --json` writes"),
    "differences": ("Differences", "evaluations of two models on the same clips"),
    "pareto": ("Size against error", "evaluations of two bundles on the same set"),
    "sizes": ("Size by part", "a bundle, .tflite"),
    "stages": ("Stages", "the .json that `build` writes beside a bundle"),
    "sensitivity": ("Sensitivity", "a sensitivity.json of a search"),
    "latency": ("Latency", "what `evaluate --pace --json` writes"),
    "worst": ("Worst utterances", "an evaluation with faults"),
}


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """An evaluation as a row of the page."""

    name: str
    found: Evaluation
    rate: str  # "wer", or "cer" where there are no words

    @property
    def error(self) -> float | None:
        """Percent."""
        value: float | None = getattr(self.found, self.rate)
        return value

    @property
    def point(self) -> Point:
        """In the pictures; the size is 0 for an original, which is left out of those of sizes."""
        size, error = self.found.bundle_bytes or 0, self.error
        return Point(self.name, size / 1e6, error or 0.0, self.found.intervals.get(self.rate))


class Set(msgspec.Struct, frozen=True, kw_only=True):
    """Every run over the same clips."""

    name: str
    n: int
    minutes: float
    runs: list[Run]

    @property
    def scored(self) -> list[Run]:
        """Those with an error rate."""
        return [run for run in self.runs if run.error is not None]


def write(folder: Path, out: Path, n_worst: int) -> list[str]:
    """Write the page, whole or not at all; return what could not be told. Raises ConfigError."""
    results = gather(folder)
    context = content(results, folder.resolve().name, n_worst)
    page = _template().render(context)
    try:
        with disk.replacing(out) as partial:
            partial.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{out}: cannot be written: {error.strerror}") from None
    return [*(f"{SECTIONS[key][0]}: needs {SECTIONS[key][1]}" for key in context["missing"]), *context["unreadable"]]


def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("convert"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True
    )
    environment.filters |= {"number": number, "span": span_text, "plain": plain}
    return environment.get_template("report.html")


def content(results: Results, title: str, n_worst: int) -> dict[str, Any]:
    """What the template shows, a part for each section."""
    sets, unreadable = _sets(results), list(results.unreadable)
    parts: dict[str, list[Any]] = {
        "stages": [(path.stem, report, _times(report)) for path, report in results.builds],
        "sizes": list(_sizes(results.bundles, unreadable)),
        "accuracy": [(each, _forest(each)) for each in sets],
        "differences": list(_differences(sets)),
        "pareto": [(each, picture) for each in sets if (picture := _pareto(each))],
        "sensitivity": [
            (path.parent.name, table, heat_map(table)) for path, table in results.sensitivities if table.rows
        ],
        "latency": [(each, run, chart) for each in sets for run in each.runs if (chart := _latency(run.found))],
        "worst": [(each, run, found) for each in sets for run, found in _worst(each, n_worst)],
    }
    return {
        "title": title,
        "sections": SECTIONS,
        "parts": parts,
        "missing": [key for key, found in parts.items() if not found],
        "unreadable": unreadable,
        "machines": sorted({found.machine for _, found in results.evaluations}),
        "labels": LABELS,
    }


def _sets(results: Results) -> list[Set]:
    """Evaluations by the clips that they are of; of two that are the same in all but their figures, the newer."""
    groups: dict[tuple[str, tuple[str, ...]], dict[str, Run]] = defaultdict(dict)
    for _, found in results.evaluations:
        manifest = Path(found.manifest)
        name = manifest.parent.name if manifest.suffix == ".jsonl" else manifest.name
        run = Run(name=_run_name(found), found=found, rate="cer" if found.wer is None else "wer")
        groups[name, tuple(sorted(clip.id for clip in found.utterances))][run.name] = run
    return [
        Set(name=name, n=len(ids), minutes=next(iter(runs.values())).found.audio_s / 60, runs=_by_size(runs.values()))
        for (name, ids), runs in groups.items()
    ]


def _run_name(found: Evaluation) -> str:
    modes = {"pace": "in real time", "segment": "cut by the gate", "detect_language": "language detected"}
    on = [text for key, text in modes.items() if found.options.get(key)]
    name = found.model.removesuffix(".tflite")
    return f"{name} ({', '.join(on)})" if on else name


def _by_size(runs: Any) -> list[Run]:
    """Originals first, then bundles, the largest first."""
    return sorted(runs, key=lambda run: (-(run.found.bundle_bytes or float("inf")), run.name))


def _times(report: BuildReport) -> str:
    seconds = dict(report.seconds)
    for stage in report.stages:
        seconds.setdefault(str(stage.get("stage")), float(stage.get("seconds", 0)))
    return charts.bars(seconds, "seconds") if seconds else ""


def _sizes(bundles: Sequence[Path], unreadable: list[str]) -> Iterator[tuple[Contents, str]]:
    for path in bundles:
        try:
            found = inspection.contents(path)
        except WhisperletError as error:
            unreadable.append(str(error))
            continue
        yield found, charts.bars({part: n_bytes / 1e6 for part, n_bytes in found.parts.items()}, "MB")


def _forest(each: Set) -> str:
    rows = each.scored
    return charts.forest([run.point for run in rows], LABELS[rows[0].rate][0]) if rows else ""


def _differences(sets: Sequence[Set]) -> Iterator[tuple[Set, Comparison]]:
    """Every run against the first of its set: the original, else the largest bundle."""
    for each in sets:
        for run in each.runs[1:]:
            try:
                yield each, comparison.compare(_named(run), _named(each.runs[0]))
            except ConfigError:
                continue  # other terms, or other texts: there is no common ground


def _named(run: Run) -> Evaluation:
    return msgspec.structs.replace(run.found, model=run.name)


def _pareto(each: Set) -> str:
    """One point a bundle: of its runs in several modes the one with the fewest, which comes first."""
    runs = {run.found.model: run for run in reversed(each.scored)}
    points = [run.point for run in runs.values() if run.found.bundle_bytes]
    return charts.pareto(points, LABELS[each.scored[0].rate][0]) if len(points) > 1 else ""


def _latency(found: Evaluation) -> str:
    series = {
        LABELS[key][0].removesuffix(", median"): [
            value for clip in found.utterances if (value := getattr(clip, key)) is not None
        ]
        for key in LATENCIES
    }
    series = {label: values for label, values in series.items() if values}
    return charts.histogram(series) if series else ""


def _worst(each: Set, n: int) -> Iterator[tuple[Run, list[worst.Utterance]]]:
    """Of the smallest bundle alone, which is what is shipped; the audio of all would make the page heavy."""
    run = each.runs[-1]
    if found := worst.worst(run.found, n):
        yield run, found


def plain(value: Any) -> str:
    """A detail of a stage as text."""
    if isinstance(value, float):
        return f"{value:,.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()

"""Evaluations and comparisons as the terminal shows them, with a bar while they go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from . import comparison
from .comparison import Comparison, Difference
from .evaluation import Evaluation, Percentiles
from .metrics import LABELS, number, span_text
from .trials import Trial

N_CHANGES = 5  # that are shown


def run(trials: Sequence[Trial], n_clips: int, json: Path | None, console: Console, bars: Console) -> None:
    """Evaluate one model, or two and compare them; show the figures, write them."""
    found = []
    for trial in trials:
        with _bar(n_clips, bars) as advance:
            found.append(trial(advance))
    if len(found) == 1:
        show_evaluation(found[0], console)
    else:
        compared = comparison.compare(*found)
        show_comparison(compared, console)
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(compared if len(found) > 1 else found[0]), indent=1))


@contextmanager
def _bar(total: int, bars: Console) -> Iterator[Callable[[], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=bars) as progress:
        task = progress.add_task("clips", total=total)
        yield lambda: progress.advance(task)


def show_evaluation(result: Evaluation, console: Console) -> None:
    """One row a figure."""
    table = Table("figure", "value", "95 % interval", title=f"{result.model} on {result.manifest}")
    for name, value, span in _facts(result):
        table.add_row(name, value, span)
    console.print(table)
    if result.entities and result.entities.missed + result.entities.invented:
        _show_entities(result, console)


def _facts(result: Evaluation) -> Iterator[tuple[str, str, str]]:
    def rate(key: str, value: float | None) -> tuple[str, str, str]:
        return LABELS[key][0], number(value, key), span_text(result.intervals.get(key), key)

    yield "clips, audio", f"{result.n}, {result.audio_s / 60:.1f} min", ""
    if result.n_without_text:
        yield "clips without text", str(result.n_without_text), ""
    yield rate("wer", result.wer)
    yield rate("cer", result.cer)
    if result.entities:
        yield rate("entity_precision", result.entities.precision)
        yield rate("entity_recall", result.entities.recall)
        yield rate("entity_f1", result.entities.f1)
    if result.speechless_s:
        yield rate("invented_words_per_hour", result.invented_words_per_hour)
        yield (
            "audio without speech, clips with words",
            f"{result.speechless_s / 60:.1f} min, {result.n_hallucinated}",
            "",
        )
    for key in ("first_word_ms", "finalise_ms", "end_to_final_ms"):
        if latency := getattr(result, key):
            yield LABELS[key][0].replace("median", "p50 / p95"), _latency(latency), ""
    for name, value in _costs(result).items():
        yield name, value, ""
    yield "machine, threads", f"{result.machine}, {result.threads}", ""


def _costs(result: Evaluation) -> dict[str, str]:
    """What recognition took, a text each."""
    size, core_s, joules = result.bundle_bytes, result.core_s_per_audio_s, result.joules_per_audio_s
    return {
        "size, bytes": "-" if size is None else f"{size:,}",
        "core-seconds per second of audio": "-" if core_s is None else f"{core_s:.3f}",
        "engine process, peak resident": "-" if result.rss_mb is None else f"{result.rss_mb:.0f} MB",
        "joules per second of audio": "-" if joules is None else f"{joules:.3f}",
        "energy by": result.meter or "-",
    }


def _show_entities(result: Evaluation, console: Console) -> None:
    assert result.entities
    table = Table("entity", "heard", "missed", "invented", title="Entities that failed most often")
    for entity in result.entities.each[:10]:
        if entity.missed + entity.invented:
            table.add_row(entity.text, str(entity.heard), str(entity.missed), str(entity.invented))
    console.print(table)


def show_comparison(result: Comparison, console: Console) -> None:
    """Both columns, the difference with its interval, and the clips in which the first one lost most."""
    a, b = result.a, result.b
    table = Table("figure", f"A: {a.model}", f"B: {b.model}", "A less B", "95 % interval", title=f"On {a.manifest}")
    table.add_row("clips, audio", f"{a.n}, {a.audio_s / 60:.1f} min", f"{b.n}, {b.audio_s / 60:.1f} min", "", "")
    for row in result.differences:
        table.add_row(*_row(row))
    costs_b = _costs(b)
    for name, value in _costs(a).items():
        table.add_row(name, value, costs_b[name], _relative(name, a, b), "")
    table.add_row("other words heard in", f"{result.n_changed} clips", "", "", "")
    console.print(table)
    if result.other_options:
        console.print(f"The two ran with different options: {', '.join(result.other_options)}", highlight=False)
    _show_changes(result, console)


def _row(row: Difference) -> tuple[str, ...]:
    label = LABELS[row.figure][0]
    less = "-" if row.difference is None else number(row.difference, row.figure, sign="+")
    verdict = "" if row.interval is None else "  *" if row.interval.excludes_zero else ""
    span = span_text(row.interval, row.figure, sign="+")
    return label, number(row.a, row.figure), number(row.b, row.figure), less, f"{span}{verdict}"


def _relative(name: str, a: Evaluation, b: Evaluation) -> str:
    """How much less or more of a cost; there is one run of each, so there is no interval."""
    field = {
        "size, bytes": "bundle_bytes",
        "core-seconds per second of audio": "core_s_per_audio_s",
        "engine process, peak resident": "rss_mb",
        "joules per second of audio": "joules_per_audio_s",
    }.get(name)
    one, other = (getattr(each, field) if field else None for each in (a, b))
    return "" if one is None or not other else f"{100 * (one / other - 1):+.1f} %"


def _show_changes(result: Comparison, console: Console) -> None:
    lost = [change for change in result.changes if change.faults_a > change.faults_b]
    for change in lost[:N_CHANGES]:
        console.print(f"{change.id}: A {change.faults_a} wrong, B {change.faults_b}", style="bold", highlight=False)
        for name, text in (("said", change.ref), ("A", change.a), ("B", change.b)):
            if text is not None:
                console.print(f"  {name:4} {text}", highlight=False, markup=False, soft_wrap=True)
    if len(lost) > N_CHANGES:
        console.print(f"... and {len(lost) - N_CHANGES} more in which A is worse; --json lists them all")


def _latency(value: Percentiles) -> str:
    return f"{value.p50:.0f} / {value.p95:.0f} ms"

"""What the commands show in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # PyTorch takes seconds to load, which `inspect` has no use for
    from .distil import Record
    from .inspection import Contents
    from .mixed import Precision
    from .onnx_export import OnnxParity
    from .pipeline import Report
    from .stages import StageReport

CONSOLE = Console()
BARS = Console(stderr=True)


def show_report(report: Report, console: Console) -> None:
    """Parity of every signature, the golden texts, and what came out."""
    table = Table("signature", "float max abs", "int8 max abs", "int8 cosine", title="Against PyTorch float32")
    for row in report.parity:
        table.add_row(row.signature, f"{row.float_max_abs:.1e}", f"{row.int8_max_abs:.2f}", f"{row.int8_cosine:.5f}")
    console.print(table)
    for text in report.texts:
        verdict = "same text" if text.reference == text.bundle else f"differs: PyTorch heard {text.reference!r}"
        console.print(f"{text.clip}: {text.bundle!r} ({verdict})", soft_wrap=True, highlight=False)
    if report.precision:
        show_precision(report.precision, console)
    if report.adapter:
        console.print(f"encoder adapted by {report.adapter}", highlight=False)
    seconds = sum(report.seconds.values())
    console.print(
        f"{report.bundle}: {report.bundle_bytes:,} bytes, built in {seconds:.0f} s, peak memory {report.peak_rss_mb:.0f} MB"
    )


def show_precision(precision: Precision, console: Console) -> None:
    """How many bits each part's matrices have, and what that costs."""
    table = Table("part", "matrices", "of four bits", "worst output error", title="Bits by matrix")
    for part in sorted({matrix.part for matrix in precision.matrices}):
        its = [matrix for matrix in precision.matrices if matrix.part == part]
        four = [matrix for matrix in its if matrix.bits == 4]
        worst = max((m.int4_error or 0.0) if m.bits == 4 else m.int8_error for m in its)
        table.add_row(part, str(len(its)), str(len(four)), f"{100 * worst:.2f} %")
    console.print(table)
    console.print(
        f"with four bits {precision.divergence:.4f} nats a token from the checkpoint, on calibration recordings",
        highlight=False,
    )


def show_onnx(rows: Sequence[OnnxParity], console: Console) -> None:
    """How far each runtime is from PyTorch."""
    table = Table(
        "graph",
        "runtime",
        "largest difference",
        "of output, or why not",
        title="Against PyTorch float32, relative to the largest",
    )
    for row in rows:
        table.add_row(row.graph, row.runtime, "-" if row.error is None else f"{row.error:.1e}", row.note)
    console.print(table)


def show_contents(contents: Contents, console: Console) -> None:
    """Signatures with their shapes, bytes by part, then the recipe."""
    table = Table("signature", "takes", "gives", title=contents.name)
    for name, inputs, outputs in contents.signatures:
        table.add_row(name, inputs, outputs)
    console.print(table)
    sizes = Table("part", "bytes", "share", title=f"{contents.total_bytes:,} bytes")
    for part, n_bytes in contents.parts.items():
        sizes.add_row(part, f"{n_bytes:,}", f"{100 * n_bytes / contents.total_bytes:.1f} %")
    console.print(sizes)
    facts = Table("what", "value", show_header=False)
    for what, value in contents.facts.items():
        facts.add_row(what, value)
    console.print(facts)


def show_training(record: Record, console: Console) -> None:
    """What an adapter was trained on and how far it closed the gap to the teacher."""
    table = Table("what", "value", title=record.file)
    table.add_row("checkpoint", record.source)
    for source in record.data:
        table.add_row(source["name"], f"{source['clips']} recordings, {source['seconds'] / 60:.1f} min")
    table.add_row("steps, time", f"{record.settings.steps}, {record.seconds / 60:.1f} min")
    first, last = record.curve[0], record.curve[-1]
    table.add_row("gap when streaming, before and after", f"{first.streamed:.4f}, {last.streamed:.4f}")
    table.add_row("gap with little silence, before and after", f"{first.short:.4f}, {last.short:.4f}")
    if first.tokens is not None and last.tokens is not None:
        table.add_row("divergence of the next token, before and after", f"{first.tokens:.4f}, {last.tokens:.4f} nats")
    table.add_row("machine", record.machine)
    console.print(table)


def show_finetuning(report: StageReport, console: Console) -> None:
    """Error rates before and after, and how training went."""
    details = report.details
    table = Table("set", "before", "after", title=f"{details['mode']}, {details['parameters']:,} parameters trained")
    for kind, sets in details["before"].items():
        for name, rate in sets.items():
            table.add_row(f"{kind}: {name}", _percent(rate), _percent(details["after"][kind][name]))
    for point in details["curve"]:
        loss = "-" if point["loss"] is None else f"{point['loss']:.3f}"
        table.add_row(f"dev after {point['step']} steps, loss {loss}", "", _percent(point["error_rate"]))
    console.print(table)
    console.print(f"{report.seconds / 60:.0f} min on {details['machine']}, {details['precision']}", highlight=False)


def _percent(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2f} %"

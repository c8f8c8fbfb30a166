"""Writes what a benchmark found: NAME.json for programs, NAME.md for people, NAME.png to look at."""

from __future__ import annotations

from pathlib import Path

import msgspec
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .base import Context, Provenance, Result, Table, provenance


def write(name: str, result: Result, context: Context) -> list[Path]:
    """Write all three; returns where."""
    source = provenance(name, context)
    context.out.mkdir(parents=True, exist_ok=True)
    paths = [context.out / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_bytes(as_json(name, result, source) + b"\n")
    paths[1].write_text(as_markdown(name, result, source), encoding="utf-8")
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    result.draw(figure)
    figure.savefig(paths[2], metadata={"Software": None})
    return paths


def as_json(name: str, result: Result, source: Provenance) -> bytes:
    """Everything but the picture."""
    record = {
        "benchmark": name,
        "provenance": source,
        "data": list(result.data),
        "method": result.method,
        "figures": result.figures,
        "details": result.details,
    }
    return msgspec.json.format(msgspec.json.encode(record), indent=1)


def as_markdown(name: str, result: Result, source: Provenance) -> str:
    """Tables, then where the figures come from."""
    parts = [f"# {result.title}", result.method, *map(_table, result.tables), f"![{result.title}]({name}.png)"]
    origin = [
        f"- Machine: {source.machine}; {source.threads} threads; {source.date}",
        f"- Commit: {source.commit}; bundle: `{source.bundle}`, sha256 {source.bundle_sha256}...",
        f"- Command: `{source.command}`",
        f"- Data: {', '.join(result.data)}",
    ]
    parts.append("\n".join(origin))
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    rows = [table.header, ["---"] * len(table.header), *table.rows]
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join([f"## {table.title}", "", *lines])

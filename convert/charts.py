"""Pictures for the report: SVG whose colours are the page's, so that they follow its light and its dark."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .intervals import Interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Stand-ins that are exchanged for variables of the page's style; no two of them are drawn in any other sense.
COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--faint)",
    "#030303": "var(--c1)",
    "#040404": "var(--c2)",
    "#050505": "var(--c3)",
    "#060606": "var(--c4)",
}
INK, FAINT, *SERIES = COLOURS
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "whisperlet",
    "text.parse_math": False,  # names of models are no formulas
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


class Point(NamedTuple):
    """A run in the picture of size against error."""

    label: str
    megabytes: float
    error: float  # percent
    interval: Interval | None


def pareto(points: Sequence[Point], error_name: str) -> str:
    """Size against error, with intervals; the line joins the runs that no other beats in both."""
    best = frontier(points)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.step([p.megabytes for p in best], [p.error for p in best], where="post", color=SERIES[0], lw=1.5)
        for point in points:
            is_best = point in best
            colour = SERIES[0] if is_best else INK
            axes.errorbar(
                point.megabytes, point.error, _whiskers(point), fmt="o" if is_best else "s", color=colour, capsize=3,
                ms=7, mfc=colour if is_best else "none",
            )  # fmt: skip
            where = (point.megabytes, point.error)
            axes.annotate(point.label, where, xytext=(9, 5), textcoords="offset points", fontsize=9)
        axes.margins(x=0.25, y=0.15)
        axes.grid(visible=True)
        axes.set(xlabel="size of the bundle (MB)", ylabel=f"{error_name} (%)")

    return _svg(draw, (7.2, 3.8), f"{error_name} against size of {len(points)} bundles")


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in one figure without losing in the other, smallest first."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.megabytes, p.error)):
        if not best or point.error < best[-1].error:
            best.append(point)
    return best


def forest(rows: Sequence[Point], error_name: str) -> str:
    """A point a run, with its interval."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for i, row in enumerate(rows):
            axes.errorbar(row.error, i, xerr=_whiskers(row), fmt="o", color=SERIES[0], capsize=4, ms=6)
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=True, axis="x")
        axes.set_xlabel(f"{error_name} (%), with 95 % intervals")

    return _svg(draw, (7.2, 0.9 + 0.34 * len(rows)), f"{error_name} of {len(rows)} runs with intervals")


def histogram(series: Mapping[str, Sequence[float]]) -> str:
    """Latencies, each over an axis of its own; lines at the median and at 95 %."""

    def draw(figure: Figure) -> None:
        stacked = figure.subplots(len(series), squeeze=False)[:, 0]
        for axes, colour, (label, values) in zip(stacked, SERIES, series.items(), strict=False):
            axes.hist(values, min(40, max(8, len(values) // 3)), color=colour, rwidth=0.9)
            p50, p95 = np.percentile(values, [50, 95])
            axes.axvline(p50, color=INK, lw=1.2)
            axes.axvline(p95, color=INK, lw=1.2, ls="--")
            title = f"{label}: median {p50:.0f} ms (line), 95 % {p95:.0f} ms (dashes), {len(values)} clips"
            axes.set_title(title, loc="left", fontsize=9.5)
            axes.yaxis.get_major_locator().set_params(integer=True)
            axes.set(xlabel="ms", ylabel="clips")

    return _svg(draw, (7.2, 0.3 + 1.7 * len(series)), "histograms of latencies")


def bars(parts: Mapping[str, float], unit: str) -> str:
    """A bar a part, the largest on top, each with its figure."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        drawn = axes.barh(list(parts), list(parts.values()), color=SERIES[0], height=0.7)
        axes.bar_label(drawn, [f"{value:,.1f}" for value in parts.values()], padding=4, fontsize=9)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel(unit)
        axes.tick_params(axis="y", length=0)

    return _svg(draw, (7.2, 0.7 + 0.28 * len(parts)), f"{len(parts)} parts in {unit}")


def _whiskers(point: Point) -> list[list[float]] | None:
    """Lengths below and above, shape = (2, 1)."""
    if point.interval is None:
        return None
    return [[max(0.0, point.error - point.interval.low)], [max(0.0, point.interval.high - point.error)]]


def _svg(draw: Any, inches: tuple[float, float], description: str) -> str:
    """Inline SVG, without what only a file of its own needs."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(STYLE):
        figure = Figure(figsize=inches, layout="constrained", facecolor="none")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # names of groups, the same in every picture
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return re.sub(
        r"<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{description}">', svg, count=1
    )

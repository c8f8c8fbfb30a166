"""The few kinds of picture that the benchmarks draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes


def plain(axes: Axes, x: str, y: str) -> None:
    """Label the axes; no frame, a faint grid."""
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def shares(axes: Axes, series: Mapping[str, Sequence[float]], x: str, *, most: float | None = None) -> None:
    """Share of values up to x, in percent, a line a series."""
    for label, values in series.items():
        if len(values):
            axes.step(np.sort(values), 100 * np.arange(1, len(values) + 1) / len(values), where="post", label=label)
    axes.set_ylim(0, 100)
    if most is not None:
        axes.set_xlim(min(0.0, *(float(np.percentile(v, 1)) for v in series.values() if len(v)), 0.0), most)
    axes.legend(frameon=False, fontsize="small")
    plain(axes, x, "share (%)")


def lines(axes: Axes, x: Sequence[float], series: Mapping[str, Sequence[float]], labels: tuple[str, str]) -> None:
    """A line a series over common x; labels are those of the axes."""
    for label, values in series.items():
        axes.plot(x, values, label=label, linewidth=1.2)
    axes.set_ylim(bottom=0)
    if len(series) > 1:
        axes.legend(frameon=False, fontsize="small")
    plain(axes, *labels)


def bars(axes: Axes, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], y: str) -> None:
    """Bars side by side, a group of them for each of `groups`; None leaves a gap."""
    width = 0.8 / len(series)
    for i, (label, values) in enumerate(series.items()):
        places = np.arange(len(groups)) + (i - (len(series) - 1) / 2) * width
        drawn = axes.bar(places, [value or 0.0 for value in values], width * 0.9, label=label)
        axes.bar_label(drawn, [_short(value) for value in values], fontsize=7)
    axes.set_ylim(0, 1.15 * max((value for values in series.values() for value in values if value), default=1.0))
    axes.set_xticks(range(len(groups)), groups, fontsize="small")
    if len(series) > 1:
        axes.legend(frameon=False, fontsize="small")
    plain(axes, "", y)
    axes.grid(axis="x", visible=False)


def _short(value: float | None) -> str:
    """Three digits, or all before the point."""
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"

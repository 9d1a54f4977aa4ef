"""Pictures of a report: a PNG, and one for the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from anamorph.canary.report import MEASURES, TITLES, OverheadReport, median, values
from anamorph.errors import SetupError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_SIDES = (("plaintext", "#7f8c8d"), ("encrypted", "#2c7fb8"))


def save_plot(report: OverheadReport, path: Path) -> None:
    """Write a PNG: each side's TTFT and TPOT, and the ratios with their intervals.

    Raises:
        SetupError: matplotlib is not installed.
    """
    try:
        # Figure alone, without pyplot: no window system, no state between calls.
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SetupError("the plot needs matplotlib: pip install 'anamorph[demo]'") from error
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=[1, 1, 1.3])
    for axis, measure in zip(axes, ("ttft", "tpot"), strict=False):
        data = [[value * 1000 for value in values(getattr(report, side), measure)] for side, _ in _SIDES]
        boxes = axis.boxplot(data, tick_labels=[side for side, _ in _SIDES], patch_artist=True, widths=0.5)
        for box, (_, colour) in zip(boxes["boxes"], _SIDES, strict=True):
            box.set_facecolor(colour)
        axis.set_title(TITLES[measure])
        axis.set_ylim(0, 1.08 * max(max(side) for side in data))
    _draw_ratios(report, axes[2])
    figure.savefig(path, dpi=120, format="png")


def _draw_ratios(report: OverheadReport, axis: Axes) -> None:
    found = [report.ratios[measure] for measure in MEASURES]
    errors = (
        [ratio.median - ratio.low for ratio in found],
        [ratio.high - ratio.median for ratio in found],
    )
    places = range(len(found))
    axis.axvline(1, color="#7f8c8d", linestyle="--", linewidth=1)
    axis.errorbar([ratio.median for ratio in found], places, xerr=errors, fmt="o", color="#2c7fb8", capsize=4)
    axis.set_yticks(places, [TITLES[measure].split(" (")[0] for measure in MEASURES])
    axis.invert_yaxis()
    axis.margins(x=0.1, y=0.15)
    axis.set_title("encrypted / plaintext (95 % interval)")


def terminal_plot(report: OverheadReport, *, width: int = 72) -> str:
    """Bars of the median TTFT and TPOT of both sides, as plain text of ``width`` columns.

    Raises:
        SetupError: plotext is not installed.
    """
    try:
        import plotext
    except ImportError as error:
        raise SetupError("the plot needs plotext: pip install 'anamorph[demo]'") from error
    bars = [(measure, side) for measure in ("ttft", "tpot") for side, _ in _SIDES]
    names = [f"{TITLES[measure]} {side}" for measure, side in bars]
    heights = [median(getattr(report, side), measure) for measure, side in bars]
    figure = plotext.figure
    figure.clear()
    # Bars grow upwards from the axis: reversed, the first one stands on top.
    drawn = figure.bar(names[::-1], heights[::-1], orientation="h", width=0.6, marker=["█", "░"])
    figure.draw(drawn)
    figure.title(f"{report.model}: medians of {len(report.encrypted)} pairs")
    figure.plot_size(width, 3 * len(bars))
    return str(figure.build().string(colorless=True)).rstrip("\n")

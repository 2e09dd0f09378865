"""Curves as a PNG, one panel below the other, on one axis of steps."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# Colours that people who are colour-blind can tell apart (Okabe and Ito, 2008).
BLUE, ORANGE, GREEN, VERMILION, GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#777777"


@dataclass(frozen=True)
class Line:
    """``dashed`` lines are drawn on top, so that one that lies on another is seen."""

    name: str
    colour: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    title: str
    y_label: str
    lines: Sequence[Line]
    logarithmic: bool = False
    mark: tuple[float, str] | None = None
    """A horizontal line and its text."""
    share: float = 1.0
    """The panel's share of the height, relative to the other panels."""


def save_figure(path: Path, panels: Sequence[Panel], x_label: str = "step") -> bool:
    """Draws the panels, or says on standard error that matplotlib is missing; returns whether it drew."""
    try:
        import matplotlib as mpl
    except ModuleNotFoundError:
        print(f"{path} was not drawn: matplotlib is not installed", file=sys.stderr)
        return False
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    shares = [panel.share for panel in panels]
    figure, axes = plt.subplots(
        len(panels),
        sharex=True,
        figsize=(11, 0.6 + 3.6 * sum(shares)),
        height_ratios=shares,
        layout="constrained",
        squeeze=False,
    )
    for axis, panel in zip(axes[:, 0], panels, strict=True):
        for line in panel.lines:
            xs, ys = zip(*line.points, strict=True)
            style = "--" if line.dashed else "-"
            axis.plot(xs, ys, style, color=line.colour, label=line.name, linewidth=1.8, zorder=3 if line.dashed else 2)
        if panel.mark is not None:
            height, text = panel.mark
            axis.axhline(height, color=GREY, linestyle=":", linewidth=1.5, label=text)
        if panel.logarithmic:
            axis.set_yscale("log")
        axis.set_title(panel.title, loc="left", fontsize=11)
        axis.set_ylabel(panel.y_label)
        axis.grid(alpha=0.3)
        # Beside the panel: inside, it would sooner or later lie on a curve.
        axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes[-1, 0].set_xlabel(x_label)
    axes[-1, 0].xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return True

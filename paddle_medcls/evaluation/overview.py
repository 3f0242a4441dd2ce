"""Pictures of a run: its curves, for notebooks, and the overview, which puts predictions and heat maps beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paddle_medcls.core.files import atomic_write
from paddle_medcls.data.contact_sheet import shown_by_notebooks, small_png
from paddle_medcls.evaluation.plots import COLORS

GREY = "#606060"
SPLITS = (("train", "training", COLORS[5]), ("val", "validation", COLORS[1]))
BARS = 4  # classes whose probabilities are drawn


class Explained(NamedTuple):
    """An image of the overview.

    Attributes:
        image: uint8 RGB (H, W, 3).
        overlay: the same under its heat map.
        bars: (class, probability), the most probable first.
    """

    image: np.ndarray
    overlay: np.ndarray
    bars: Sequence[tuple[str, float]]


def history_figure(history: Sequence[dict], title: str = "") -> Figure:
    """Loss and accuracy by epoch, of training and validation, as a figure that notebooks display.

    Args:
        history: rows of history.csv.
    """
    figure = Figure(figsize=(9, 3.2), layout="tight")
    _draw_history(figure.subplots(1, 2), history)
    figure.suptitle(title, fontsize=11)
    return shown_by_notebooks(figure)


def write_overview(
    path: Path, history: Sequence[dict], items: Sequence[Explained], title: str, maps: str, note: str
) -> None:
    """Writes one picture of a run: curves on the left, on the right images above their heat maps and probabilities.

    Args:
        history: rows of history.csv; empty: no curves.
        items: one to five images.
        maps: what the heat maps are.
        note: a line below the title, such as that the images are synthetic.
    """
    side = 3.3 if history else 0.3  # inches that the curves take
    figure = Figure(figsize=(side + 1.85 * len(items), 5.85))
    height, width = figure.get_figheight(), figure.get_figwidth()
    top, bottom = 1 - 0.85 / height, 0.5 / height
    figure.text(0.15 / width, 1 - 0.18 / height, title, fontsize=13, fontweight="bold", va="top", parse_math=False)
    figure.text(0.15 / width, 1 - 0.47 / height, note, fontsize=9, color=GREY, va="top")
    if history:
        left, right = 0.6 / width, (side - 0.35) / width
        grid = figure.add_gridspec(2, 1, left=left, right=right, top=top - 0.02, bottom=bottom, hspace=0.3)
        _draw_history([figure.add_subplot(grid[row]) for row in range(2)], history)
    share = {"left": (side + 0.05) / width, "right": 1 - 0.15 / width, "top": top - 0.02, "bottom": bottom}
    grid = figure.add_gridspec(3, len(items), height_ratios=(1, 1, 0.45), hspace=0.05, wspace=0.06, **share)
    for column, item in enumerate(items):
        for row, picture in enumerate((item.image, item.overlay)):
            axis = figure.add_subplot(grid[row, column])
            axis.imshow(picture, interpolation="antialiased")
            axis.set_axis_off()
            if column == 0:
                axis.text(
                    -0.04,
                    0.5,
                    ("image", maps)[row],
                    transform=axis.transAxes,
                    rotation=90,
                    ha="right",
                    va="center",
                    fontsize=9,
                    color=GREY,
                )
        _draw_bars(figure.add_subplot(grid[2, column]), item.bars[:BARS])
    atomic_write(path, small_png(figure, dpi=125))


def _draw_history(axes: Sequence[Axes], history: Sequence[dict]) -> None:
    """Loss and accuracy into two axes."""
    epochs = [row["epoch"] for row in history]
    for axis, name in zip(axes, ("loss", "accuracy")):
        for split, label, color in SPLITS:
            values = [row[f"{split}_{name}"] for row in history]
            axis.plot(epochs, values, "o-", color=color, markersize=3.5, linewidth=1.6, label=label)
        axis.set_title(name, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8, colors=GREY)
        axis.grid(alpha=0.25)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes[0].legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("epoch", fontsize=9, color=GREY)


def _draw_bars(axis: Axes, bars: Sequence[tuple[str, float]]) -> None:
    """Probabilities of classes: the name above each bar, so that a long one has room."""
    for row, (name, value) in enumerate(bars):
        color = COLORS[0] if row == 0 else "#B8C4CE"
        axis.barh(row, 1, height=0.28, color="#EEF1F4")
        axis.barh(row, value, height=0.28, color=color)
        weight = "bold" if row == 0 else "normal"
        axis.text(0, row - 0.24, name, fontsize=8.5, fontweight=weight, va="bottom", parse_math=False)
        axis.text(1, row - 0.24, f"{value:.3f}", fontsize=8.5, fontweight=weight, va="bottom", ha="right")
    axis.set(xlim=(0, 1), ylim=(len(bars) - 0.5, -0.75))
    axis.set_axis_off()

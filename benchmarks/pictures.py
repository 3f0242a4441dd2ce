"""Pictures of the results: bars of ratios, and curves of cost against size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from paddle_medcls.core.files import atomic_write
from paddle_medcls.evaluation.plots import COLORS


def ratios(
    path: Path, rows: Sequence[tuple[str, Sequence[tuple[str, float, str, int]]]], title: str, note: str = ""
) -> None:
    """Bars of ratios, one panel per row; a bar is (name, ratio, text, index of its colour)."""
    lines = [len(items) for _, items in rows]
    figure = Figure(figsize=(9, 0.3 * sum(lines) + 0.8 * len(rows) + 0.8), layout="constrained")
    for axis, (row, items) in zip(figure.subplots(len(rows), 1, squeeze=False, height_ratios=lines)[:, 0], rows):
        most = max(ratio for _, ratio, _, _ in items)
        axis.barh([item[0] for item in items], [item[1] for item in items], color=[COLORS[item[3]] for item in items])
        for line, (_, ratio, text, _) in enumerate(items):
            axis.text(ratio + 0.01 * most, line, text, va="center", fontsize=8)
        axis.set(title=row, xlim=(0, 1.3 * most))
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
    _save(figure, path, title, note)


def _apart(values: Sequence[float]) -> list[float]:
    """Those of the values whose labels do not overlap on a logarithmic axis."""
    ordered = sorted(values)
    least = (ordered[-1] / ordered[0]) ** 0.05
    kept = ordered[:1]
    for value in ordered[1:]:
        if value > kept[-1] * least:
            kept.append(value)
    return kept


def growth(
    path: Path, panels: Sequence[tuple[str, str, Sequence[float], Sequence[float], str]], title: str, note: str = ""
) -> None:
    """Cost against size on logarithmic axes; a panel is (name of the size, unit of the cost, sizes, costs, title)."""
    figure = Figure(figsize=(3.4 * len(panels), 3.8), layout="constrained")
    for axis, (name, cost, sizes, costs, text) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        axis.loglog(sizes, costs, "o-", color=COLORS[0])
        axis.set_xticks(sizes, [f"{size:g}" for size in sizes], rotation=45, fontsize=8)
        ticks = _apart(costs)
        axis.set_yticks(ticks, [f"{value:.3g}" for value in ticks], fontsize=8)
        axis.minorticks_off()
        axis.set(xlabel=name, ylabel=cost, title=text)
        axis.grid(alpha=0.3)
    _save(figure, path, title, note)


def _save(figure: Figure, path: Path, title: str, note: str) -> None:
    figure.suptitle(title)
    figure.supxlabel(note, fontsize=8, color="#B00000")
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110))

"""Plots: curves, confusion matrix, ROC, sheets of images, heat maps, image sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paddle_medcls.core.files import atomic_write
from paddle_medcls.data.contact_sheet import contact_sheet
from paddle_medcls.evaluation import metrics

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's palette, told apart by the colour-blind."""
HEAT_COLORS = colormaps["viridis"]


def _save(figure: Figure, path: Path, note: str, title: str = "") -> None:
    """Writes a figure; note and title have a height in inches, as a share of a long sheet would be too much."""
    inch = 1 / figure.get_figheight()
    if note:
        figure.text(0.5, 0.04 * inch, note, ha="center", va="bottom", fontsize=8, color="#B00000")
    above = 0.0
    if title:
        figure.suptitle(title, y=1 - 0.08 * inch, va="top")
        above = (0.1 + 0.2 * (1 + title.count("\n"))) * inch
    figure.set_layout_engine("tight", rect=(0, 0.2 * inch if note else 0, 1, 1 - above))
    atomic_write(path, lambda temporary: figure.savefig(temporary, dpi=110))


def curves(path: Path, steps: np.ndarray, history: Sequence[dict], note: str = "") -> None:
    """Four curves, as in the COVID-19 radiography tutorial: loss and accuracy, training by step, validation by epoch.

    Args:
        steps: (n, 4) columns step, learning rate, loss, accuracy of each training batch.
        history: rows of history.csv.
    """
    figure = Figure(figsize=(11, 7.5))
    axes = figure.subplots(2, 2)
    width = max(1, len(steps) // 50)
    for axis, column, name in ((axes[0, 0], 2, "train loss"), (axes[0, 1], 3, "train accuracy")):
        axis.plot(steps[:, 0], steps[:, column], color=COLORS[5], linewidth=0.6, label="batch")
        if width > 1:
            smooth = np.convolve(steps[:, column], np.ones(width) / width, mode="valid")
            axis.plot(steps[width - 1 :, 0], smooth, color=COLORS[0], linewidth=1.6, label=f"mean of {width} batches")
        axis.set(title=name, xlabel="step", ylabel=name.split()[1])
        axis.legend(frameon=False)
    epochs = [row["epoch"] for row in history]
    for axis, name in ((axes[1, 0], "loss"), (axes[1, 1], "accuracy")):
        values = [row[f"val_{name}"] for row in history]
        axis.plot(epochs, values, "o-", color=COLORS[1], markersize=3)
        if name == "loss" and max(values) > 20 * np.median(values):  # else one large loss flattens the curve
            axis.set_yscale("log")
        axis.set(title=f"validation {name}", xlabel="epoch", ylabel=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axis in axes.flat:
        axis.grid(alpha=0.3)
    _save(figure, path, note)


def fold_curves(path: Path, histories: Sequence[Sequence[dict]], note: str = "") -> None:
    """Loss and accuracy by epoch of the folds of a cross-validation: training and validation.

    Args:
        histories: rows of history.csv, of each fold.
    """
    figure = Figure(figsize=(11, 7.5))
    axes = figure.subplots(2, 2)
    for axis, name in zip(axes.flat, ("train_loss", "train_accuracy", "val_loss", "val_accuracy")):
        split, metric = name.split("_")
        for number, history in enumerate(histories):
            style = ("-", "--", ":")[number // len(COLORS) % 3]
            x, y = [row["epoch"] for row in history], [row[name] for row in history]
            axis.plot(x, y, style, color=COLORS[number % len(COLORS)], linewidth=1.2, label=f"fold {number + 1}")
        title = f"{'training' if split == 'train' else 'validation'} {metric}"
        axis.set(title=title, xlabel="epoch", ylabel=metric)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.grid(alpha=0.3)
    if len(histories) <= 10:
        axes[0, 0].legend(frameon=False)
    _save(figure, path, note)


def confusion(path: Path, table: Sequence[Sequence[int]], classes: Sequence[str], title: str, note: str = "") -> None:
    """Confusion matrix: counts, coloured by the share of each true class."""
    counts = np.asarray(table)
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 3.2 + 0.75 * len(classes)
    figure = Figure(figsize=(side + 1, side))
    axis = figure.subplots()
    image = axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    ticks = range(len(classes))
    axis.set_xticks(ticks, classes, rotation=30, ha="right")
    axis.set_yticks(ticks, classes)
    axis.set(xlabel="predicted", ylabel="true", title=title)
    for row in ticks:
        for column in ticks:
            color = "white" if share[row, column] > 0.5 else "black"
            text = f"{counts[row, column]}\n{share[row, column]:.1%}"
            axis.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
    figure.colorbar(image, ax=axis, label="share of the true class", shrink=0.8)
    _save(figure, path, note)


def roc(path: Path, probs: np.ndarray, labels: np.ndarray, classes: Sequence[str], task: str, note: str = "") -> None:
    """ROC curves, one against the rest; for a binary task the one of class 1."""
    figure = Figure(figsize=(6, 6))
    axis = figure.subplots()
    shown = [1] if task == "binary" else range(len(classes))
    for number, k in enumerate(shown):
        truth = labels[:, k] if labels.ndim == 2 else (labels == k).astype(int)
        if 0 < truth.sum() < len(truth):
            false_rate, true_rate = _roc_points(truth, probs[:, k])
            area = float(metrics.roc_auc(truth, probs[:, k]))
            style = ("-", "--")[number // len(COLORS) % 2]  # ChestMNIST has more labels than there are colours
            label = f"{classes[k]}: AUC {area:.4f}"
            axis.plot(false_rate, true_rate, style, color=COLORS[number % len(COLORS)], label=label)
    axis.plot([0, 1], [0, 1], ":", color="gray", linewidth=1)
    axis.set(xlabel="1 - specificity", ylabel="sensitivity", title="ROC", xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", frameon=False)
    _save(figure, path, note)


def _roc_points(truth: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(-scores, kind="stable")
    hits = np.cumsum(truth[order])
    last = np.r_[np.flatnonzero(np.diff(scores[order])), len(truth) - 1]  # one point for each score
    true_rate = np.r_[0, hits[last]] / truth.sum()
    false_rate = np.r_[0, last + 1 - hits[last]] / (len(truth) - truth.sum())
    return false_rate, true_rate


def risk_coverage(path: Path, curve: np.ndarray, area: float, title: str, note: str = "") -> None:
    """Accuracy of the most certain answers against their share; `curve` of `selective.risk_coverage`."""
    figure = Figure(figsize=(6, 4.5))
    axis = figure.subplots()
    shares = np.arange(1, len(curve) + 1) / len(curve)
    axis.plot(shares, 1 - curve, color=COLORS[0])
    axis.axhline(1 - curve[-1], linestyle=":", color="gray", linewidth=1)
    lowest = float((1 - curve).min())
    axis.set(xlabel="share of answers kept, the most certain first", ylabel="accuracy of these", xlim=(0, 1))
    axis.set(title=f"{title}\narea above the curve (AURC) {area:.4f}", ylim=(max(0.0, lowest - 0.02), 1.005))
    axis.grid(alpha=0.3)
    _save(figure, path, note)


def robustness(path: Path, report: dict, title: str, note: str = "") -> None:
    """Accuracy on corrupted images by severity, and the share of them that is like the training images."""
    names = [name for name in ("accuracy", "passed") if report["clean"][name] is not None]
    figure = Figure(figsize=(5.5 * len(names), 4.6))
    for axis, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names):
        for number, (kind, rows) in enumerate(report["corruptions"].items()):
            values = [report["clean"][name], *(row[name] for row in rows)]
            style = ("-", "--")[number // len(COLORS) % 2]
            axis.plot(range(len(values)), values, style, color=COLORS[number % len(COLORS)], label=kind)
        label = {"accuracy": "accuracy", "passed": "share like the training images"}[name]
        axis.set(xlabel="severity", ylabel=label, ylim=(-0.02, 1.02))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8, ncol=2)
    _save(figure, path, note, title)


def reliability(path: Path, diagrams: Sequence[tuple[str, list[dict], float]], title: str, note: str = "") -> None:
    """Reliability diagrams: accuracy against confidence; (name, bins of `calibration.reliability`, error) each."""
    figure = Figure(figsize=(4.6 * len(diagrams), 4.8))
    for axis, (name, rows, error) in zip(figure.subplots(1, len(diagrams), squeeze=False)[0], diagrams):
        edges = [row["low"] for row in rows]
        widths = [row["high"] - row["low"] for row in rows]
        axis.bar(edges, [row["accuracy"] for row in rows], widths, align="edge", color=COLORS[0], edgecolor="white")
        axis.plot([0, 1], [0, 1], ":", color="gray")
        axis.plot([row["confidence"] for row in rows], [row["accuracy"] for row in rows], ".", color=COLORS[1])
        axis.set(xlabel="confidence", ylabel="accuracy", title=f"{name}\ncalibration error {error:.4f}")
        axis.set(xlim=(0, 1), ylim=(0, 1))
    _save(figure, path, note, title)


def prediction(path: Path, image: np.ndarray, bars: Sequence[tuple[str, float]], title: str, note: str = "") -> None:
    """An image (uint8, RGB or one channel) beside its probabilities, as in the OCT transfer-learning tutorial."""
    figure = Figure(figsize=(9, 4.2))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1))
    left.imshow(image.squeeze(), cmap="gray" if image.shape[2] == 1 else None)
    left.set_axis_off()
    left.set_title(title)
    names = [name for name, _ in bars][::-1]
    values = [value for _, value in bars][::-1]
    right.barh(names, values, color=COLORS[0])
    for row, value in enumerate(values):
        right.text(min(value + 0.01, 0.86), row, f"{value:.4f}", va="center")
    right.set(xlim=(0, 1), xlabel="probability")
    _save(figure, path, note)


def sheet(path: Path, rows: Sequence[tuple[str, Sequence[np.ndarray]]], title: str, note: str = "") -> None:
    """Writes a `contact_sheet`."""
    _save(contact_sheet(rows), path, note, title)


def overlay(image: np.ndarray, heat: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """A heat map over its image: viridis, which the colour-blind can read; the cold parts stay clear.

    Args:
        image: uint8 RGB (H, W, 3).
        heat: (H, W) in [0, 1].
        opacity: of the hottest parts; it fades towards the cold ones.

    Returns:
        uint8 RGB (H, W, 3).
    """
    colors = HEAT_COLORS((heat * 255).round().astype(np.uint8))[:, :, :3].astype(np.float32) * 255
    alpha = np.float32(opacity) * heat[:, :, None]
    return np.clip(image * (1 - alpha) + colors * alpha, 0, 255).round().astype(np.uint8)


def heat_sheet(path: Path, items: Sequence[tuple[np.ndarray, np.ndarray, str]], title: str, note: str = "") -> None:
    """Images (uint8, RGB), each above its heat map, four a row; (image, overlay, caption) each."""
    columns = min(4, len(items))
    rows = -(-len(items) // columns)
    figure = Figure(figsize=(2.6 * columns + 1.2, 5.7 * rows + 0.5))
    grid = figure.add_gridspec(2 * rows, columns + 1, width_ratios=[1] * columns + [0.06])
    for k, (image, heat, caption) in enumerate(items):
        for line, picture in enumerate((image, heat)):
            axis = figure.add_subplot(grid[2 * (k // columns) + line, k % columns])
            axis.imshow(picture)
            axis.set_axis_off()
            if line == 0:
                axis.set_title(caption, fontsize=9)
    bar = figure.colorbar(ScalarMappable(cmap=HEAT_COLORS), cax=figure.add_subplot(grid[1, columns]))
    bar.set_ticks([0, 1], labels=["none", "most"])
    _save(figure, path, note, title)


def sizes(path: Path, widths_heights: Sequence[tuple[int, int, int]], title: str, note: str = "") -> None:
    """Distributions of widths and heights: counts as bars, and their density where they vary.

    Args:
        widths_heights: (width, height, images) each.
    """
    figure = Figure(figsize=(8, 3.6))
    table = np.asarray(widths_heights)
    for axis, column, name in zip(figure.subplots(1, 2), (0, 1), ("width", "height")):
        values, where = np.unique(table[:, column], return_inverse=True)
        counts = np.bincount(where.ravel(), table[:, 2])
        mean = np.average(values, weights=counts)
        spread = float(np.sqrt(np.average((values - mean) ** 2, weights=counts)))
        axis.set(xlabel=f"{name} (pixels)", ylabel="images")
        if not spread:
            axis.bar([str(values[0])], counts, width=0.3, color=COLORS[0])
            axis.set_xlim(-1, 1)
            continue
        bandwidth = 1.06 * spread * counts.sum() ** -0.2  # Silverman's rule
        axis.bar(values, counts, width=max(1.0, np.ptp(values) / 60), color=COLORS[0])
        x = np.linspace(values[0] - 3 * bandwidth, values[-1] + 3 * bandwidth, 300)
        density = (counts * np.exp(-0.5 * ((x[:, None] - values) / bandwidth) ** 2)).sum(axis=1)
        density_axis = axis.twinx()
        density_axis.plot(x, density / (counts.sum() * bandwidth * np.sqrt(2 * np.pi)), color=COLORS[1])
        density_axis.set(ylabel="density", ylim=(0, None))
    _save(figure, path, note, title)

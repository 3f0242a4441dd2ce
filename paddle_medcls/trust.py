"""Faithfulness of heat maps: deletion, insertion, sanity checks.

A heat map convinces whether or not it shows what the network used. Three questions:

- Deletion and insertion (Petsiuk et al. 2018): hide the map's hottest pixels first, or show them
  first in a blurred image; how fast does the probability of the class fall, or rise? The area below
  the curve is small for a good deletion and large for a good insertion. Random maps of the same
  coarseness are measured beside it.
- Random weights (Adebayo et al. 2018): a map that looks the same for a network that has learned
  nothing shows the image, not the network.
- Masks: where the organ's outline is known, which share of the map lies inside it, beside the share
  of the image that the outline covers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from prettytable import PrettyTable

from paddle_medcls.evaluate import predict_logits
from paddle_medcls.gradcam import METHODS, default_layer, gradcam, layer_shapes
from paddle_medcls.images import preprocess, read_image, to_channels, unfit
from paddle_medcls.metrics import wilson
from paddle_medcls.runtime import paddle
from paddle_medcls.sidecar import Sidecar

STEPS = 10
RANDOM_MAPS = 2
UNTRAINED = 3
"""Networks with random weights; one alone often has nothing but negative evidence for a class, an empty map."""
MEASURES = (  # (name, text, is the better map's figure lower?); None: there is no random map to compare with
    ("deletion", "deletion area (better: lower)", True),
    ("insertion", "insertion area (better: higher)", False),
    ("random_weights", "rank correlation with random weights (better: near 0)", None),
    ("inside", "share inside the mask (better: above the mask's area)", False),
)


class Measurement:
    """Measures the maps of one network, image by image.

    Args:
        model: the network.
        card: its sidecar.
        layer: name of a layer, see `gradcam.gradcam`; None: the default one.
        seed: of the random maps and the networks with random weights.
        method: one of `gradcam.METHODS`.

    Attributes:
        rows: one dict an image: `image`, `class`, then each measure and `<measure>_chance` as far as there are.
    """

    def __init__(self, model, card: Sidecar, layer: str | None = None, seed: int = 0, method: str = "gradcam") -> None:
        self.model = model
        self.card = card
        self.method = method
        spec = card.preprocessing
        zeros = np.zeros((1, spec.num_channels, spec.size_px, spec.size_px), np.float32)
        self.layer = layer or default_layer(model, zeros)
        self.grid = layer_shapes(model, zeros).get(self.layer, (0, 1, 1))[1:]
        self.rng = np.random.default_rng(seed)
        state = paddle.get_rng_state()
        paddle.seed(seed)
        self.untrained = [card.network.build() for _ in range(UNTRAINED)]
        paddle.set_rng_state(state)
        self.rows: list[dict] = []

    def add(self, path: Path, image: np.ndarray, class_index: int) -> None:
        """Measures the map of one image, as `Predictor.decode` gives it."""
        spec = self.card.preprocessing
        x = preprocess(to_channels(image, spec.channels), spec)
        row: dict = {"image": str(path), "class": self.card.classes[class_index]}
        self.rows.append(row)
        heat = gradcam(self.model, x[None], self.layer, class_index, self.method)[0]
        if not heat.any():  # no positive evidence for the class: nothing to measure
            return
        order, *chance = random_maps(1 + RANDOM_MAPS, self.grid, spec.size_px, self.rng)
        maps = [heat + 1e-9 * order.astype(np.float64), *chance]  # where the map says nothing, it is a random one
        for name, curves in deletion_insertion(self._score(class_index), x, maps).items():
            areas = areas_below(curves)
            row |= {name: float(areas[0]), f"{name}_chance": float(areas[1:].mean())}
        others = [gradcam(model, x[None], self.layer, class_index, self.method)[0] for model in self.untrained]
        known = [rank_correlation(heat, other) for other in others if other.any()]
        row["random_weights"] = float(np.mean(known)) if known else float("nan")
        mask_file = mask_of(path)
        if mask_file is not None:
            mask = read_image(mask_file, "gray")
            mask = cv2.resize(mask, image.shape[1::-1], interpolation=cv2.INTER_NEAREST) > 127
            full = unfit(heat, image.shape[:2], spec)
            row |= {"inside": energy_inside(full, mask), "inside_chance": float(mask.mean())}

    def _score(self, class_index: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: self.card.head.probabilities(predict_logits(self.model, x))[:, class_index]

    def columns(self) -> tuple[list[str], list[list]]:
        """Header and rows of measures.csv; empty where there is nothing to measure."""
        figures = [column for name, _, _ in MEASURES for column in (name, f"{name}_chance")]
        header = ["image", "class", *(name for name in figures if name != "random_weights_chance")]
        return header, [[row.get(name, "") for name in header] for row in self.rows]

    def table(self) -> str:
        """Means over the images, and in how many the map beats its chance figure, with a 95% interval.

        By class too: hiding parts of an image is no test of a class that means "nothing found".
        """
        table = PrettyTable(
            ["measure", "class", METHODS[self.method], "chance", "images", "better than chance in"], align="l"
        )
        classes = sorted({row["class"] for row in self.rows})
        for name, text, lower in MEASURES:
            for shown in [*classes, "all"] if len(classes) > 1 else classes:
                rows = [row for row in self.rows if name in row and shown in ("all", row["class"])]
                if rows:  # else no masks, or only empty maps
                    table.add_row([text, shown, *_figures(name, lower, rows)])
        return str(table)


def _figures(name: str, lower: bool | None, rows: list[dict]) -> list[object]:
    """Mean, mean by chance, images, and in how many the map is better, for the table."""
    values = np.array([row[name] for row in rows])
    known = np.isfinite(values)
    count = int(known.sum())
    mean = f"{values[known].mean():.3f}" if count else "–"
    if lower is None or not count:
        return [mean, "–", count, "–"]
    chances = np.array([row[f"{name}_chance"] for row in rows])
    wins = int(((values < chances) if lower else (values > chances))[known].sum())
    low, high = wilson(wins, count)
    return [mean, f"{chances[known].mean():.3f}", count, f"{wins}  (95% {low:.0%} to {high:.0%})"]


def deletion_insertion(
    score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, maps: Sequence[np.ndarray], steps: int = STEPS
) -> dict[str, np.ndarray]:
    """Curves of the class's probability while pixels are hidden or shown, the hottest first.

    Args:
        score: batch (N, C, H, W) -> probabilities (N,).
        x: one preprocessed image (C, H, W).
        maps: M maps (H, W), of which the order of the values counts; equal ones in the order of the image.
        steps: equal steps from no pixel to all.

    Returns:
        `deletion` (from the image to its mean colour) and `insertion` (from the blurred image to the
        image), each (M, steps + 1).
    """
    channels, height, width = x.shape
    empty = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
    blurred = np.stack([cv2.GaussianBlur(channel, (0, 0), max(height, width) / 16) for channel in x])
    counts = np.linspace(0, height * width, steps + 1).round().astype(int)
    ends = score(np.stack([x, empty, blurred]))
    curves = {"deletion": np.empty((len(maps), steps + 1)), "insertion": np.empty((len(maps), steps + 1))}
    for number, heat in enumerate(maps):
        rank = np.empty(height * width, int)
        rank[np.argsort(-heat.ravel(), kind="stable")] = np.arange(height * width)
        first = rank.reshape(height, width) < counts[1:-1, None, None]  # (steps - 1, H, W)
        batch = [np.where(hot, empty, x) for hot in first] + [np.where(hot, x, blurred) for hot in first]
        values = score(np.stack(batch).astype(np.float32))
        curves["deletion"][number] = [ends[0], *values[: steps - 1], ends[1]]
        curves["insertion"][number] = [ends[2], *values[steps - 1 :], ends[0]]
    return curves


def areas_below(curves: np.ndarray) -> np.ndarray:
    """(M, steps + 1) -> (M,) areas by trapezoids; the steps together are 1 wide."""
    return ((curves[:, 1:] + curves[:, :-1]) / 2).mean(axis=1)


def random_maps(count: int, grid: tuple[int, int], size_px: int, rng: np.random.Generator) -> np.ndarray:
    """Maps that know nothing, as coarse as a layer's: (count, size_px, size_px) in [0, 1]."""
    cells = rng.random((count, *grid), np.float32)
    return np.stack([cv2.resize(one, (size_px, size_px), interpolation=cv2.INTER_LINEAR) for one in cells])


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation of two maps, equal values sharing their rank; nan if one of them is flat."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, where, counts = np.unique(values.ravel(), return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts + 1) / 2)[where.ravel()]

    a, b = ranks(one), ranks(other)
    if a.std() == 0 or b.std() == 0:
        return float("nan")
    return float(np.corrcoef(a, b)[0, 1])


def energy_inside(heat: np.ndarray, mask: np.ndarray) -> float:
    """Share of a map's sum that lies inside a mask of its size; nan for an empty map."""
    total = float(heat.sum(dtype=np.float64))
    return float(heat[mask].sum(dtype=np.float64)) / total if total else float("nan")


def mask_of(image: Path) -> Path | None:
    """The mask of an image, where there is one: `<class>/masks/<name>` beside `<class>[/images]/<name>`."""
    folder = image.parent.parent if image.parent.name == "images" else image.parent
    found = folder / "masks" / image.name
    return found if found.is_file() else None

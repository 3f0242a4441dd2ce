"""Faithfulness of heat maps: deletion, insertion, sanity checks.

A heat map looks convincing whether or not it shows what the network used. Three measures:

- Deletion and insertion (Petsiuk et al. 2018): hide the map's hottest pixels first, or show them
  first in a blurred image, and record the probability of the class. A faithful map has a small area below
  the deletion curve and a large one below the insertion curve. Random maps of the same resolution are
  measured for comparison.
- Random weights (Adebayo et al. 2018): a map that looks the same for a network with random weights
  shows the image, not what the network has learned.
- Masks: where a mask of the organ is known, the share of the map inside it, compared with the mask's share
  of the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import cv2
import numpy as np
from prettytable import PrettyTable

from paddle_medcls.core.paddle_setup import paddle
from paddle_medcls.data.decode import read_image, to_channels
from paddle_medcls.evaluation.evaluate import predict_logits
from paddle_medcls.evaluation.metrics import wilson
from paddle_medcls.explanation.gradcam import METHODS, default_layer, gradcam, layer_shapes
from paddle_medcls.models.sidecar import Sidecar
from paddle_medcls.preprocessing.transforms import preprocess, unfit

STEPS = 10
RANDOM_MAPS = 2
UNTRAINED = 3
"""Networks with random weights; a single one often has only negative evidence for a class, which gives an empty map."""
MEASURES = (  # (name, text, is lower better?); None: there is no random map to compare with
    ("deletion", "deletion area (better: lower)", True),
    ("insertion", "insertion area (better: higher)", False),
    ("random_weights", "rank correlation with random weights (better: near 0)", None),
    ("inside", "share inside the mask (better: above the mask's area)", False),
)


class Measurement:
    """Measures the maps of one network, image by image.

    Args:
        layer: name of a layer, see `gradcam.gradcam`; None: the default one.
        seed: of the random maps and the networks with random weights.
        method: one of `gradcam.METHODS`.

    Attributes:
        rows: one dict an image: `image`, `class`, then each measure and `<measure>_chance`, where they exist.
    """

    def __init__(
        self, model, sidecar: Sidecar, layer: str | None = None, seed: int = 0, method: str = "gradcam"
    ) -> None:
        self.model = model
        self.sidecar = sidecar
        self.method = method
        spec = sidecar.preprocessing
        zeros = np.zeros((1, spec.num_channels, spec.size_px, spec.size_px), np.float32)
        self.layer = layer or default_layer(model, zeros)
        self.grid = layer_shapes(model, zeros).get(self.layer, (0, 1, 1))[1:]
        self.rng = np.random.default_rng(seed)
        state = paddle.get_rng_state()
        paddle.seed(seed)
        self.untrained = [sidecar.network.build() for _ in range(UNTRAINED)]
        paddle.set_rng_state(state)
        self.rows: list[dict] = []

    def add(self, path: Path, image: np.ndarray, class_index: int) -> None:
        """Measures the map of one image and appends the row to `rows`.

        Args:
            path: of the image; a mask is looked for beside it, see `mask_of`.
            image: its pixels, see `Predictor.decode`.
            class_index: of the explained class.
        """
        spec = self.sidecar.preprocessing
        x = preprocess(to_channels(image, spec.channels), spec)
        row: dict = {"image": str(path), "class": self.sidecar.classes[class_index]}
        self.rows.append(row)
        heat = gradcam(self.model, x[None], self.layer, class_index, self.method)[0]
        if not heat.any():  # no positive evidence for the class: nothing to measure
            return
        order, *random = random_maps(1 + RANDOM_MAPS, self.grid, spec.size_px, self.rng)
        maps = [heat + 1e-9 * order.astype(np.float64), *random]  # pixels of equal heat in random order
        for name, curves in deletion_insertion(self._score(class_index), x, maps).items():
            areas = areas_below(curves)
            row |= {name: float(areas[0]), f"{name}_chance": float(areas[1:].mean())}
        untrained_maps = [gradcam(model, x[None], self.layer, class_index, self.method)[0] for model in self.untrained]
        correlations = [rank_correlation(heat, other) for other in untrained_maps if other.any()]
        row["random_weights"] = float(np.mean(correlations)) if correlations else float("nan")
        row |= inside_mask(unfit(heat, image.shape[:2], spec), read_mask(path, image.shape[:2]))

    def add_mask(self, path: Path, heat: np.ndarray, class_index: int) -> None:
        """Measures only the share of a map (H, W), of the size of its image, inside the mask beside the image."""
        row = {"image": str(path), "class": self.sidecar.classes[class_index]}
        self.rows.append(row | inside_mask(heat, read_mask(path, heat.shape)))

    def _score(self, class_index: int) -> Callable[[np.ndarray], np.ndarray]:
        return lambda x: self.sidecar.head.probabilities(predict_logits(self.model, x))[:, class_index]

    def columns(self) -> tuple[list[str], list[list]]:
        """Header and rows of measures.csv; cells without a measure are empty."""
        names = [column for name, _, _ in MEASURES for column in (name, f"{name}_chance")]
        header = ["image", "class", *(name for name in names if name != "random_weights_chance")]
        return header, [[row.get(name, "") for name in header] for row in self.rows]

    def table(self) -> str:
        """Means over the images, and the share of images whose map is better than chance, with a 95% interval.

        Also by class: deletion is no test of a class like "normal", which has no place in the image.
        """
        table = PrettyTable(
            ["measure", "class", METHODS[self.method], "chance", "images", "better than chance in"], align="l"
        )
        classes = sorted({row["class"] for row in self.rows})
        for name, text, lower in MEASURES:
            for class_name in [*classes, "all"] if len(classes) > 1 else classes:
                rows = [row for row in self.rows if name in row and class_name in ("all", row["class"])]
                if rows:  # else no masks, or only empty maps
                    table.add_row([text, class_name, *_cells(name, lower, rows)])
        return str(table)


def _cells(name: str, lower: bool | None, rows: list[dict]) -> list[object]:
    """Cells of the table: mean, mean of the random maps, images, and in how many the map is better."""
    values = np.array([row[name] for row in rows])
    finite = np.isfinite(values)
    count = int(finite.sum())
    mean = f"{values[finite].mean():.3f}" if count else "–"
    if lower is None or not count:
        return [mean, "–", count, "–"]
    chances = np.array([row[f"{name}_chance"] for row in rows])
    wins = int(((values < chances) if lower else (values > chances))[finite].sum())
    low, high = wilson(wins, count)
    return [mean, f"{chances[finite].mean():.3f}", count, f"{wins}  (95% {low:.0%} to {high:.0%})"]


def deletion_insertion(
    score: Callable[[np.ndarray], np.ndarray], x: np.ndarray, maps: Sequence[np.ndarray]
) -> dict[str, np.ndarray]:
    """Probability of the class while pixels are hidden or shown, the hottest first.

    Args:
        score: batch (N, C, H, W) -> probabilities (N,).
        x: one preprocessed image (C, H, W).
        maps: M maps (H, W), of which only the order of the values is used; equal values in the order of the pixels.

    Returns:
        `deletion` (from the image to its mean colour) and `insertion` (from the blurred image to the
        image), each (M, STEPS + 1): equal steps from no pixel to all.
    """
    channels, height, width = x.shape
    empty = np.broadcast_to(x.mean(axis=(1, 2), keepdims=True), x.shape)
    blurred = np.stack([cv2.GaussianBlur(channel, (0, 0), max(height, width) / 16) for channel in x])
    counts = np.linspace(0, height * width, STEPS + 1).round().astype(int)
    ends = score(np.stack([x, empty, blurred]))
    curves = {"deletion": np.empty((len(maps), STEPS + 1)), "insertion": np.empty((len(maps), STEPS + 1))}
    for number, heat in enumerate(maps):
        rank = np.empty(height * width, int)
        rank[np.argsort(-heat.ravel(), kind="stable")] = np.arange(height * width)
        hottest = rank.reshape(height, width) < counts[1:-1, None, None]  # (STEPS - 1, H, W)
        batch = [np.where(hot, empty, x) for hot in hottest] + [np.where(hot, x, blurred) for hot in hottest]
        values = score(np.stack(batch).astype(np.float32))
        curves["deletion"][number] = [ends[0], *values[: STEPS - 1], ends[1]]
        curves["insertion"][number] = [ends[2], *values[STEPS - 1 :], ends[0]]
    return curves


def areas_below(curves: np.ndarray) -> np.ndarray:
    """(M, STEPS + 1) -> (M,) areas by trapezoids; the steps together are 1 wide."""
    return ((curves[:, 1:] + curves[:, :-1]) / 2).mean(axis=1)


def random_maps(count: int, grid: tuple[int, int], size_px: int, rng: np.random.Generator) -> np.ndarray:
    """Random maps of the resolution of a layer: (count, size_px, size_px) in [0, 1].

    Args:
        grid: height and width of the layer's maps.
    """
    cells = rng.random((count, *grid), np.float32)
    return np.stack([cv2.resize(one, (size_px, size_px), interpolation=cv2.INTER_LINEAR) for one in cells])


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's rank correlation of two maps (H, W); equal values share a rank; nan if one map is constant."""

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


def inside_mask(heat: np.ndarray, mask: np.ndarray | None) -> dict[str, float]:
    """`inside` and `inside_chance`: the share of a map inside a mask, and that of the image; {} without one of them."""
    if mask is None or not heat.any():
        return {}
    return {"inside": energy_inside(heat, mask), "inside_chance": float(mask.mean())}


def read_mask(image: Path, shape: Sequence[int]) -> np.ndarray | None:
    """The mask of an image, scaled to (H, W), bool; None without one. Values above 127 are inside.

    Raises:
        DataError: it cannot be read.
    """
    found = mask_of(image)
    if found is None:
        return None
    size = (shape[1], shape[0])
    return cv2.resize(read_image(found, "gray")[:, :, 0], size, interpolation=cv2.INTER_NEAREST) > 127


def mask_of(image: Path) -> Path | None:
    """The mask of an image, where there is one: `<class>/masks/<name>` beside `<class>[/images]/<name>`."""
    folder = image.parent.parent if image.parent.name == "images" else image.parent
    mask = folder / "masks" / image.name
    return mask if mask.is_file() else None

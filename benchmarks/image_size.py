"""Whether a model uses the size that its images are stored in, where the classes have different sizes.

    python -m benchmarks.image_size --weights COVID.pdparams --data-root DIR --sides 224 299

The last split is evaluated as it is stored, and once more for each side with all images first scaled to side × side
pixels. A model that uses the size answers differently.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.data.datasets import dataset_module, load_index
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation.metrics import evaluate_logits


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--weights", type=Path, required=True)
    p.add_argument("--data-root", type=Path, required=True)
    p.add_argument("--sides", nargs="+", type=int, default=[224, 299], metavar="PX")
    args = p.parse_args()
    predictor = Predictor.from_weights(args.weights, engine="auto")
    sidecar = predictor.sidecar
    split = dataset_module(sidecar.dataset).SPLITS[-1]
    index = load_index(sidecar.dataset, args.data_root, split, sidecar.labels)
    stored: Counter = Counter()
    logits: dict[int, list] = {side: [] for side in (0, *args.sides)}
    for row in range(len(index)):
        pixels = index.read(row, sidecar.preprocessing.channels)
        height, width = size = pixels.shape[:2]
        stored[f"{width} × {height}", index.classes[int(index.labels[row])]] += 1
        images = [pixels if not side or size == (side, side) else scaled(pixels, side) for side in logits]
        for side, found in zip(logits, predictor.backend.logits(predictor.input_of(images))):
            logits[side].append(found)
    sizes = sorted({size for size, _ in stored})
    print(f"| stored as | {' | '.join(index.classes)} |\n|---|{'---|' * len(index.classes)}")
    for size in sizes:
        print(f"| {size} | {' | '.join(str(stored[size, name]) for name in index.classes)} |")
    print(f"\n| {split}: {len(index)} images | accuracy (95%) | AUC | recall of each class | other answers |")
    print("|---|---|---|---|---|")
    usual = None
    for side, rows in logits.items():
        result = evaluate_logits(np.stack(rows), index.labels, predictor.head, groups=index.groups)
        guesses = predictor.head.decide(predictor.head.probabilities(np.stack(rows)))
        usual = guesses if usual is None else usual
        low, high = result["intervals"]["accuracy"]
        recalls = ", ".join(f"{row['class']} {row['recall']:.3f}" for row in result["per_class"])
        name = f"all {side} × {side}" if side else "as stored"
        changed = int((guesses != usual).sum())
        cells = [name, f"{result['accuracy']:.4f} ({low:.4f} to {high:.4f})", f"{result['auc']:.4f}", recalls, changed]
        print(f"| {' | '.join(map(str, cells))} |")


def scaled(pixels: np.ndarray, side: int) -> np.ndarray:
    """An image (H, W, C) uint8 at another size: averaged over areas if smaller, cubic if larger."""
    how = cv2.INTER_AREA if side < pixels.shape[0] else cv2.INTER_CUBIC
    return cv2.resize(pixels, (side, side), interpolation=how).reshape(side, side, -1)


if __name__ == "__main__":
    main()

"""Scores that tell images unlike the training images, beside each other: AUROC, and the share of strangers that pass.

    python -m benchmarks.novelty --weights PALM.pdparams --data-root DIR --strangers oct=DIR noise= text=

Each score's limit lets 95% of the validation images pass. A stranger is a name and a folder of images; the name of a
MedMNIST set takes the folder of its file, `noise` and `text` need no folder. Images of the last split, at most --count
of each, are the usual ones.

Sources: Hendrycks and Gimpel 2017 (maximal probability); Liu et al. 2020 (energy); Sun et al. 2022 (k nearest
neighbours, normalised features); Lee et al. 2018 (Mahalanobis distance to the nearest class).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.data.datasets import dataset_module, load_index
from paddle_medcls.data.datasets.medmnist import NAMES
from paddle_medcls.data.image_files import expand
from paddle_medcls.deployment.graph import logits_graph, stage_channels
from paddle_medcls.deployment.inference_engines import compile_graph
from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation.metrics import roc_auc
from paddle_medcls.models.novelty import Novelty
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import read_weights

Score = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Features (N, channels) and logits (N, outputs) -> novelty (N,)."""


def scores(features: np.ndarray, labels: np.ndarray, channels: list[int]) -> dict[str, Score]:
    """The scores, fitted on training images."""
    last = sum(channels[:-1])
    whole, one = Novelty.fit(features, channels), Novelty.fit(features[:, last:], channels[-1:])
    unit = _unit(features[:, last:])
    nearest_class = _mahalanobis(features[:, last:], labels)
    ends = np.cumsum([0, *channels])
    stages = [(low, high, _mahalanobis(features[:, low:high], labels)) for low, high in zip(ends, ends[1:])]
    return {
        "maximal probability": lambda f, z: -np.abs(z).max(1) if z.shape[1] == 1 else -_softmax(z).max(1),
        "energy": lambda f, z: -np.log(np.exp(z if z.shape[1] > 1 else np.hstack([z, -z])).sum(axis=1)),
        "10 nearest neighbours, last stage": lambda f, z: np.sort(_distances(_unit(f[:, last:]), unit), 1)[:, 9],
        "Mahalanobis, last stage": lambda f, z: nearest_class(f[:, last:]),
        "Mahalanobis, last stage, 32 axes": lambda f, z: one.scores(f[:, last:]),
        "Mahalanobis, all stages": lambda f, z: np.mean([s(f[:, a:b]) for a, b, s in stages], axis=0),
        "Mahalanobis, all stages, 32 axes (ours)": lambda f, z: whole.scores(f),
    }


def _mahalanobis(x: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Distance to the nearest class, all classes with the same covariance."""
    means = np.stack([x[labels == k].mean(0) for k in np.unique(labels)])
    rest = x - means[np.unique(labels, return_inverse=True)[1]]
    covariance = np.cov(rest.T)
    values, axes = np.linalg.eigh(covariance)  # an inverse would not stay positive with fewer images than channels
    whiten = axes / np.sqrt(np.maximum(values, 0) + 1e-6 * np.trace(covariance) / len(covariance))
    return lambda f: np.min([(((f - mean) @ whiten) ** 2).mean(1) for mean in means], axis=0) ** 0.5


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def _distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(2 - 2 * a @ b.T, 0))


def stranger_images(name: str, folder: str, count: int) -> list:
    """Images of a folder, or made here."""
    rng = np.random.default_rng(0)
    if name in NAMES:
        index = load_index(name, Path(folder), "test")
        return [index[int(row)][0] for row in rng.permutation(len(index))[:count]]
    if folder:
        files = expand([folder])
        return [files[k] for k in rng.permutation(len(files))[:count]]
    if name == "noise":
        return list(rng.integers(0, 256, (count, 128, 128, 3), np.uint8))
    pages = []
    for _ in range(count):
        page = np.full((256, 256, 3), rng.integers(200, 256), np.uint8)
        for y in range(20, 250, int(rng.integers(14, 30))):
            letters = "".join(map(chr, rng.integers(97, 123, 30)))
            cv2.putText(page, letters, (5, y), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1)
        pages.append(page)
    return pages


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--weights", type=Path, required=True)
    p.add_argument("--data-root", type=Path, required=True)
    p.add_argument("--strangers", nargs="+", default=["noise=", "text="], metavar="NAME=DIR")
    p.add_argument("--count", type=int, default=1000)
    args = p.parse_args()
    sidecar = Sidecar.read(sidecar_of(args.weights))
    graph = logits_graph(sidecar, read_weights(args.weights), args.weights, features=True)
    backend = compile_graph(graph, "openvino", "f32", sidecar.network.num_outputs)
    predictor = Predictor(sidecar, backend)

    def outputs(images: list) -> tuple[np.ndarray, np.ndarray]:
        found = [backend.outputs(predictor.input_of(images[k : k + 16])) for k in range(0, len(images), 16)]
        return tuple(np.concatenate([one[name] for one in found]) for name in ("features", "logits"))  # type: ignore[return-value]

    def split(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        index = load_index(sidecar.dataset, args.data_root, name, sidecar.labels)
        rows = np.random.default_rng(0).permutation(len(index))[: args.count]
        return (*outputs([index[int(row)][0] for row in rows]), index.labels[rows])

    train, val = split("train"), split("val")
    last = dataset_module(sidecar.dataset).SPLITS[-1]
    usual = val if last == "val" else split(last)
    groups = {}
    for text in args.strangers:
        name, _, folder = text.partition("=")
        groups[name] = outputs(stranger_images(name, folder, min(args.count, 150)))
    print(f"| score | {' | '.join([*groups, 'worst'])} |\n|{'---|' * (len(groups) + 2)}")
    for name, score in scores(train[0], train[2], stage_channels(sidecar.network)).items():
        limit = np.quantile(score(*val[:2]), 0.95)
        found = []
        for strange in groups.values():
            both = np.concatenate([score(*usual[:2]), score(*strange)])
            truth = np.r_[np.zeros(len(usual[0]), int), np.ones(len(strange[0]), int)]
            found.append((float(roc_auc(truth, both)), float((score(*strange) <= limit).mean())))
        found.append((min(area for area, _ in found), max(passed for _, passed in found)))
        print(f"| {name} | {' | '.join(f'{area:.3f}, {passed:.0%}' for area, passed in found)} |")


if __name__ == "__main__":
    main()

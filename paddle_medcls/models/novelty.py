"""Novelty: how unlike its training images an image is, from the features of the network itself.

The maps that each stage of the network ends with are averaged over the image. For each stage a normal distribution is
fitted to these averages over the training images: exact along its DIMENSIONS widest axes, and the same in all other
directions. The novelty of an image is the root of its mean squared Mahalanobis distance, over the stages: about 1 for
training images. An image is in distribution if its novelty is at most the limit that 95% of the validation images stay
below.

Sources: Lee et al. 2018, arXiv:1807.03888 (Mahalanobis distance of features); Tipping and Bishop 1999 (a normal
distribution of few axes); Anthony and Kamnitsas 2023, arXiv:2309.01488 (chest X-rays: the best layer depends on what is
unusual about the image, so all stages count). `benchmarks/novelty.py` compares it with other scores.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from paddle_medcls.core.errors import WeightsError
from paddle_medcls.core.files import atomic_write, read_bounded
from paddle_medcls.models.sidecar import Sidecar, sidecar_of
from paddle_medcls.models.weights import parse_weights

SUFFIX = ".novelty.safetensors"
DIMENSIONS = 32
PASSING = 0.95
"""Share of the validation images that are in distribution."""
MAX_IMAGES = 5000
"""Training images that the distribution is fitted to, at most."""
MAX_BYTES = 64 << 20
_MAX_STAGES, _MAX_CHANNELS = 16, 65536


@dataclass(frozen=True)
class Novelty:
    """Normal distributions of the features of each stage.

    Attributes:
        means: (C,) of each stage.
        axes: (d, C) of each stage, orthonormal rows, the widest first.
        scales: (d,) standard deviations along them, above 0.
        rests: (1,) root of the variance in all other directions together, above 0.
    """

    means: list[np.ndarray]
    axes: list[np.ndarray]
    scales: list[np.ndarray]
    rests: list[np.ndarray]

    @staticmethod
    def fit(features: np.ndarray, channels: list[int]) -> Novelty:
        """The distributions of training images.

        Args:
            features: (N, sum of channels) float32, one stage after the other; N at least 2.
            channels: of each stage.
        """
        parts: list[list[np.ndarray]] = [[], [], [], []]
        for x in np.split(features.astype(np.float64), np.cumsum(channels)[:-1], axis=1):
            mean = x.mean(axis=0)
            _, wide, axes = np.linalg.svd(x - mean, full_matrices=False)
            scales = wide / np.sqrt(len(x) - 1)
            least = 1e-3 * max(float(scales[0]), 1e-6)  # a direction without variance would divide by 0
            count = min(DIMENSIONS, len(scales))
            rest = np.sqrt((scales[count:] ** 2).sum(keepdims=True))
            found = mean, axes[:count], np.maximum(scales[:count], least), np.maximum(rest, least)
            for part, array in zip(parts, found):
                part.append(array.astype(np.float32))
        return Novelty(*parts)

    @property
    def channels(self) -> list[int]:
        """Of each stage."""
        return [len(mean) for mean in self.means]

    def scores(self, features: np.ndarray) -> np.ndarray:
        """Features (N, sum of channels) -> novelty (N,) float64."""
        if features.ndim != 2 or features.shape[1] != sum(self.channels):
            raise WeightsError(
                f"the network gives features of shape {features.shape}",
                expected=f"(images, {sum(self.channels)}), as the {SUFFIX} file has them",
                fix="copy all files of the model from one place",
            )
        total = np.zeros(len(features))
        stages = np.split(features.astype(np.float64), np.cumsum(self.channels)[:-1], axis=1)
        for x, mean, axes, scales, rest in zip(stages, self.means, self.axes, self.scales, self.rests):
            centred = x - mean
            along = centred @ axes.T
            beside = np.maximum((centred**2).sum(axis=1) - (along**2).sum(axis=1), 0)
            total += ((along / scales) ** 2).mean(axis=1) + beside / float(rest[0]) ** 2
        return np.sqrt(total / (2 * len(self.means)))

    def write(self, path: Path) -> None:
        """Writes the file beside the weights."""
        import safetensors.numpy

        arrays: dict[str, np.ndarray] = {}
        for name in _NAMES:
            arrays |= {f"{name}.{k}": np.ascontiguousarray(one) for k, one in enumerate(getattr(self, name))}
        atomic_write(path, safetensors.numpy.save(arrays))


_NAMES = ("means", "axes", "scales", "rests")


def novelty_path(weights: Path) -> Path:
    """The file beside a weight file."""
    return sidecar_of(weights).with_suffix(SUFFIX)


def novelty_of(weights: Path, sidecar: Sidecar) -> Novelty | None:
    """Reads the file that belongs to a weight file; None if it is missing.

    Raises:
        WeightsError: not the file that the sidecar describes, or faulty arrays.
    """
    path = novelty_path(weights)
    return read_novelty(path, sidecar.novelty["sha256"]) if path.is_file() else None


def read_novelty(path: Path, sha256: str = "") -> Novelty:
    """Reads a file once and checks every array of it.

    Args:
        sha256: of the file, as its sidecar has it; "": not checked.

    Raises:
        WeightsError: another file, no safetensors file, larger than 64 MiB, or arrays that are missing, unexpected or
            faulty.
    """
    try:
        data = read_bounded(path, MAX_BYTES)
    except OSError as error:
        raise WeightsError(f"{path}: {error.strerror or error}", fix=_FIX) from None
    if sha256 and hashlib.sha256(data).hexdigest() != sha256:
        raise WeightsError(
            f"{path} is not the file that {path.name[: -len(SUFFIX)]}.json describes (sha256 differs)",
            fix="copy all files again from one place",
        )
    state = parse_weights(data, path)
    stages = len(state) // len(_NAMES)
    expected = {f"{name}.{k}" for name in _NAMES for k in range(stages)}
    faults = [f"unexpected {name[:100]}" for name in state.keys() - expected]
    faults += [f"missing    {name}" for name in expected - state.keys()]
    if not 1 <= stages <= _MAX_STAGES or faults:
        raise WeightsError(f"{path}: not the features of training images", items=sorted(faults), fix=_FIX)
    novelty = Novelty(*([state[f"{name}.{k}"] for k in range(stages)] for name in _NAMES))
    for k in range(stages):
        mean, axes, scales, rest = (getattr(novelty, name)[k] for name in _NAMES)
        shaped = mean.ndim == scales.ndim == 1 and axes.shape == (len(scales), len(mean)) and rest.shape == (1,)
        shaped = shaped and 0 < len(scales) <= DIMENSIONS and 0 < len(mean) <= _MAX_CHANNELS
        arrays = (mean, axes, scales, rest)
        finite = shaped and all(a.dtype == np.float32 and bool(np.isfinite(a).all()) for a in arrays)
        if not finite or scales.min() <= 0 or rest.min() <= 0:
            raise WeightsError(
                f"{path}: the arrays of stage {k} cannot be used",
                expected="float32, finite, of fitting shapes, with scales above 0",
                fix=_FIX,
            )
    return novelty


_FIX = "copy the file again from the run that made the weights, or remove it: the model then works without it"

"""The overview of a trained model, for `heat_maps`: reads its run's history and explains a few images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paddle_medcls.deployment.predictor import Predictor
from paddle_medcls.evaluation.overview import Explained, write_overview
from paddle_medcls.evaluation.plots import overlay
from paddle_medcls.evaluation.tables import NOTICE, SYNTHETIC_NOTICE

IMAGES = 4


def draw_overview(
    path: Path,
    predictor: Predictor,
    images: Sequence[Path],
    label: str | None = None,
    layer: str | None = None,
    method: str = "gradcam",
) -> None:
    """Writes the picture: the curves of the run that the weights lie in, and heat maps of the first images.

    Args:
        label, layer, method: as of `Predictor.gradcam`.

    Raises:
        DataError: an image that cannot be read.
        RunError: a damaged history.csv beside the weights.
    """
    from paddle_medcls.explanation.gradcam import METHODS
    from paddle_medcls.training.run_directory import read_history  # both import Paddle

    run_dir = predictor.path.parent if predictor.path else Path()
    history = read_history(run_dir) if predictor.path and (run_dir / "history.csv").is_file() else []
    sidecar = predictor.sidecar
    items = []
    for image in images[:IMAGES]:
        result, heat = predictor.predict(image), predictor.gradcam(image, label, layer, method)
        bars = sorted(result.probabilities.items(), key=lambda bar: -bar[1])
        items.append(Explained(heat.image, overlay(heat.image, heat.values), bars))
    size = sidecar.preprocessing.size_px
    title = f"{sidecar.recipe}: {sidecar.network.model}, {size} × {size} pixels"
    maps = METHODS[method] + (f", {label}" if label else "")
    write_overview(path, history, items, title, maps, SYNTHETIC_NOTICE if sidecar.drawn else NOTICE)

"""`heat_maps`: makes, writes and measures Grad-CAM heat maps of image files, as the command `gradcam` does."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import numpy as np

from paddle_medcls.core.errors import DataError, did_you_mean
from paddle_medcls.core.files import picture_names, write_csv
from paddle_medcls.core.progress import progress
from paddle_medcls.data.decode import to_channels, write_png
from paddle_medcls.deployment.overview import draw_overview
from paddle_medcls.deployment.predictor import Predictor, load_predictor
from paddle_medcls.evaluation.plots import heat_sheet, overlay
from paddle_medcls.evaluation.tables import SYNTHETIC_NOTICE
from paddle_medcls.explanation.faithfulness import Measurement, energy_inside, read_mask
from paddle_medcls.explanation.gradcam import METHODS

SHEET = 8  # images on the contact sheet


@dataclass(frozen=True)
class HeatMapOptions:
    """How heat maps are made.

    Attributes:
        output: folder of the pictures and measures.csv; None: nothing is written.
        layer: see `gradcam.gradcam`; None: the default one.
        method: one of `gradcam.METHODS`.
        class_name: explain this class; None: the predicted one of each image.
        measure: also measure how faithful the maps are, see `trust`.
        masks: measure the share of the map inside the masks beside the images, and nothing else.
        overview: with `output`: also overview.png, four images with maps and probabilities beside the run's curves.
        batch_size: images at a time.
        workers: threads that read images.
    """

    output: str | Path | None = None
    layer: str | None = None
    method: str = "gradcam"
    class_name: str | None = None
    measure: bool = False
    masks: bool = False
    overview: bool = False
    batch_size: int = 8
    workers: int = 2


@dataclass
class HeatMaps:
    """The result of `heat_maps`.

    Attributes:
        layer: name of the layer that the maps show.
        made: files with a map.
        empty: those of them whose map is 0 everywhere: no positive evidence for the class.
        failed: files that could not be read, with their errors.
        measurement: the measures; None if they were not asked for.
    """

    layer: str
    made: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, DataError]] = field(default_factory=list)
    measurement: Measurement | None = None


def heat_maps(
    weights: str | Path | Predictor,
    images: Sequence[str | Path],
    options: HeatMapOptions = HeatMapOptions(),  # noqa: B008  it is frozen
) -> HeatMaps:
    """Makes, writes and measures the heat maps of files; a file that cannot be read is reported and left out.

    With `output` it writes `<folders>/<name>_gradcam.png`, each image under its map at its own size,
    `contact_sheet.png`, eight images above their maps, and with `measure` or `masks` also `measures.csv`
    and the outlines of masks.

    Args:
        weights: a weight file, a folder that holds one, or an opened Predictor.

    Raises:
        DataError: an unknown class.
        RecipeError: no such layer, or one that gives no map.
        WeightsError: see `load_predictor`; an export, which has no layers to look into.
    """
    predictor = weights if isinstance(weights, Predictor) else load_predictor(weights)
    paths = [Path(image) for image in images]
    output = None if options.output is None else Path(options.output)
    sidecar = predictor.sidecar
    class_index = _class_index(options.class_name, sidecar.classes) if options.class_name else None
    result = HeatMaps(options.layer or predictor.default_layer())
    if options.measure or options.masks:
        result.measurement = Measurement(predictor.model, sidecar, result.layer, method=options.method)
    names = picture_names(paths, "gradcam")
    sheet_paths = {paths[k * len(paths) // SHEET] for k in range(SHEET)} if len(paths) > SHEET else set(paths)
    sheet = []
    with progress(None, "heat maps", len(paths), "image") as bar:
        for group in predictor.read_files(paths, options.batch_size, options.workers):
            readable = []
            for path, image in group:
                if isinstance(image, DataError):
                    bar.write(f"{type(image).__name__}: {image}", file=sys.stderr)
                    result.failed.append((path, image))
                    bar.update()
                else:
                    readable.append((path, image))
            for path, image, heat, k, probability in _maps(
                predictor, readable, class_index, options.layer, options.method
            ):
                result.made.append(path)
                if not heat.any():
                    result.empty.append(path)
                if result.measurement and options.measure:
                    result.measurement.add(path, image, k)
                elif result.measurement:
                    result.measurement.add_mask(path, heat, k)
                if output:
                    rgb = to_channels(image, "rgb")
                    picture, text = overlay(rgb, heat), f"{path.name}\n{sidecar.classes[k]} {probability:.3f}"
                    mask = read_mask(path, heat.shape) if result.measurement else None
                    if mask is not None:
                        text += f"\n{energy_inside(heat, mask):.2f} inside; mask {mask.mean():.2f}"
                        _outline(picture, mask)
                    write_png(output / names[path], picture)
                    if path in sheet_paths:
                        sheet.append((_small(rgb), _small(picture), text))
                bar.update()
    if output and sheet:
        title = f"{METHODS[options.method]} of {sidecar.recipe}\n{sidecar.network.model}, {result.layer}"
        heat_sheet(output / "contact_sheet.png", sheet, title, SYNTHETIC_NOTICE if sidecar.drawn else "")
    if output and options.overview and result.made:
        explained = options.class_name, options.layer, options.method
        draw_overview(output / "overview.png", predictor, result.made, *explained)
    if output and result.measurement and result.measurement.rows:
        write_csv(output / "measures.csv", *result.measurement.columns())
    return result


def _maps(predictor: Predictor, readable: list, class_index: int | None, layer: str | None, method: str) -> list[tuple]:
    """(path, image, map, class, its probability) of each image of a group."""
    if not readable:
        return []
    paths, images = zip(*readable)
    probs = predictor.head.probabilities(predictor.logits(images, paths))
    classes = predictor.head.explained(probs).tolist() if class_index is None else [class_index] * len(images)
    maps = predictor.heatmaps(images, classes, layer, method)
    return list(zip(paths, images, maps, classes, probs[np.arange(len(images)), classes]))


def _class_index(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise DataError(f"unknown class {name!r}{did_you_mean(name, classes)}", expected=", ".join(classes))
    return classes.index(name)


def _outline(picture: np.ndarray, mask: np.ndarray) -> None:
    """Draws the outline of a mask (H, W) into an RGB picture of its size."""
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(picture, outlines, -1, (255, 255, 255), max(1, picture.shape[1] // 300))


def _small(image: np.ndarray) -> np.ndarray:
    """At most about 500 pixels wide and high, for the sheet."""
    step = max(1, max(image.shape[:2]) // 500)
    return image[::step, ::step].copy()

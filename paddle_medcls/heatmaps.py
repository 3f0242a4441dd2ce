"""Grad-CAM heat maps of image files: all that `gradcam` writes, as one function."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from paddle_medcls.errors import DataError, did_you_mean
from paddle_medcls.files import write_csv
from paddle_medcls.gradcam import METHODS, default_layer
from paddle_medcls.images import to_channels, write_png
from paddle_medcls.inputs import picture_names
from paddle_medcls.plots import heat_sheet, overlay
from paddle_medcls.predict import Predictor
from paddle_medcls.progress import progress
from paddle_medcls.report import DRAWN_NOTICE
from paddle_medcls.trust import Measurement

SHEET = 8  # images on the contact sheet


@dataclass(frozen=True)
class HeatMapOptions:
    """Which heat maps are made, and what is written.

    Attributes:
        output: folder of the pictures and measures.csv; None: nothing is written.
        layer, method: see `gradcam.gradcam`.
        class_name: explain this class; None: the predicted one of each image.
        measure: also measure the maps, see `trust`.
        batch_size, workers: images at a time, and threads that read them.
    """

    output: Path | None = None
    layer: str | None = None
    method: str = "gradcam"
    class_name: str | None = None
    measure: bool = False
    batch_size: int = 8
    workers: int = 2


@dataclass
class HeatMaps:
    """What came of it.

    Attributes:
        layer: that the maps show.
        made: files with a map; empty: those of them whose map has no positive evidence anywhere.
        failed: files that could not be read, with their errors.
        measurement: the measures, where they were asked for.
    """

    layer: str
    made: list[Path] = field(default_factory=list)
    empty: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, DataError]] = field(default_factory=list)
    measurement: Measurement | None = None


def heat_maps(predictor: Predictor, paths: Sequence[Path], options: HeatMapOptions) -> HeatMaps:
    """Makes, writes and measures the heat maps of files; a file that cannot be read is reported and left out.

    Writes `<folders>/<name>_gradcam.png`, each image under its map at its own size, `contact_sheet.png`, eight
    images above their maps, and with `measure` also `measures.csv`.

    Raises:
        DataError: an unknown class.
        RecipeError: no such layer, or one that gives no map.
        WeightsError: the predictor is an export, which has no layers to look into.
    """
    card, model = predictor.card, predictor.model
    chosen = _class_index(options.class_name, card.classes) if options.class_name else None
    found = HeatMaps(options.layer or default_layer(model, predictor.input_zeros()))
    if options.measure:
        found.measurement = Measurement(model, card, found.layer, method=options.method)
    names = picture_names(paths, "gradcam")
    shown = {paths[k * len(paths) // SHEET] for k in range(SHEET)} if len(paths) > SHEET else set(paths)
    sheet = []
    with progress(None, "heat maps", len(paths), "image") as bar:
        for group in predictor.read_files(paths, options.batch_size, options.workers):
            good = []
            for path, image in group:
                if isinstance(image, DataError):
                    bar.write(f"{type(image).__name__}: {image}", file=sys.stderr)
                    found.failed.append((path, image))
                    bar.update()
                else:
                    good.append((path, image))
            for path, image, heat, k, probability in _maps(predictor, good, chosen, found.layer, options.method):
                found.made.append(path)
                if not heat.any():
                    found.empty.append(path)
                if options.output:
                    rgb = to_channels(image, "rgb")
                    picture = overlay(rgb, heat)
                    write_png(options.output / names[path], picture)
                    if path in shown:
                        text = f"{path.name}\n{card.classes[k]} {probability:.3f}"
                        sheet.append((_small(rgb), _small(picture), text))
                if found.measurement:
                    found.measurement.add(path, image, k)
                bar.update()
    if options.output and sheet:
        title = f"{METHODS[options.method]} of {card.recipe}\n{card.network.model}, {found.layer}"
        heat_sheet(options.output / "contact_sheet.png", sheet, title, DRAWN_NOTICE if card.drawn else "")
    if options.output and found.measurement and found.measurement.rows:
        write_csv(options.output / "measures.csv", *found.measurement.columns())
    return found


def _maps(predictor: Predictor, good: list, chosen: int | None, layer: str, method: str) -> list[tuple]:
    """(path, image, map, class, its probability) of each image of a group."""
    if not good:
        return []
    paths, images = zip(*good)
    probs = predictor.head.probabilities(predictor.logits(images, paths))
    classes = predictor.head.explained(probs).tolist() if chosen is None else [chosen] * len(images)
    maps = predictor.heatmaps(images, classes, layer, method)
    return list(zip(paths, images, maps, classes, probs[np.arange(len(images)), classes]))


def _class_index(name: str, classes: Sequence[str]) -> int:
    if name not in classes:
        raise DataError(f"unknown class {name!r}{did_you_mean(name, classes)}", expected=", ".join(classes))
    return classes.index(name)


def _small(image: np.ndarray, side: int = 500) -> np.ndarray:
    """At most about `side` pixels wide and high, for the sheet."""
    step = max(1, max(image.shape[:2]) // side)
    return image[::step, ::step].copy()

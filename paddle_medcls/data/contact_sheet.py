"""Contact sheets: images in rows, drawn by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import partial

import numpy as np
from matplotlib.figure import Figure
from PIL import Image


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> Figure:
    """A figure of images, one row a class.

    Args:
        rows: name of each class, and its images: uint8 RGB (H, W, 3) or grey (H, W, 1).
    """
    columns = max(len(images) for _, images in rows)
    tallest = max(image.shape[0] / image.shape[1] for _, images in rows for image in images)
    row_height = 1.9 * min(tallest, 2) + 0.2  # inches
    figure = Figure(figsize=(1.9 * columns + 0.6, row_height * len(rows) + 0.5), layout="tight")
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for line, (name, images) in zip(axes, rows):
        for axis in line:
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
        for axis, image in zip(line, images):
            axis.imshow(image.squeeze(), cmap="gray" if image.shape[2] == 1 else None)
        line[0].set_ylabel(name, fontsize=11)
    return shown_by_notebooks(figure)


def shown_by_notebooks(figure: Figure) -> Figure:
    """The figure, which notebooks display from now on; of themselves they know figures of pyplot only."""
    vars(figure)["_repr_png_"] = partial(small_png, figure)
    return figure


def small_png(figure: Figure, dpi: int = 72) -> bytes:
    """A figure as a PNG file of 256 colours: a third of the size, and images of noise do not show the difference."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=dpi)
    picture = Image.open(full).convert("RGB").quantize(256, kmeans=3, dither=Image.Dither.NONE)
    picture.save(small, format="png", optimize=True)
    return small.getvalue()

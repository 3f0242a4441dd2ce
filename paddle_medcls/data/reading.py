"""Reads all images of a data set with several threads, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

from paddle_medcls.core.errors import DataError
from paddle_medcls.core.progress import progress
from paddle_medcls.data.index import Index

CHUNK = 512  # images in progress at a time; all at once would fill the memory with their results


def map_images(
    places: Sequence[tuple[Index, int]], function: Callable[[Index, int], object], workers: int, title: str
) -> Iterator:
    """Calls `function(index, row)` for each image; yields the results in order.

    An image that cannot be read gives the first line of its error instead, a str.
    """

    def apply(place: tuple[Index, int]) -> object:
        try:
            return function(*place)
        except DataError as error:
            return str(error).splitlines()[0]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        chunks = (places[start : start + CHUNK] for start in range(0, len(places), CHUNK))
        results = (result for chunk in chunks for result in pool.map(apply, chunk))
        yield from progress(results, title, len(places), "image")


def refuse_unreadable(index: Index, faults: Sequence[str]) -> None:
    """Raises a DataError that lists the images that cannot be read, if there are any."""
    if faults:
        raise DataError(
            f"{index.dataset}: {len(faults)} of {len(index)} {index.split} image(s) cannot be read",
            items=faults,
            fix="copy or download these files again; no image is skipped",
        )

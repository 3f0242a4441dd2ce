"""Reads images with several threads, in order."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, TypeVar

from paddle_medcls.core.errors import DataError
from paddle_medcls.core.progress import progress
from paddle_medcls.data.index import Index

Group = TypeVar("Group", bound=Iterable)
CHUNK = 512  # images in progress at a time; all at once would fill the memory with their results


def read_ahead(
    read: Callable[[Any], Any], groups: Iterable[Group], workers: int, ahead: int = 2
) -> Generator[tuple[Group, list], None, None]:
    """Yields each group of items with its results `read(item)`, in order; the first error ends it.

    Args:
        workers: threads; 0: each group is read when it is needed.
        ahead: groups that are read while the caller works on one.
    """
    if workers == 0:
        yield from ((group, [read(item) for item in group]) for group in groups)
        return
    remaining = iter(groups)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="reader")
    try:
        pending: deque = deque()
        while True:
            for group in itertools.islice(remaining, ahead + 1 - len(pending)):
                pending.append((group, [pool.submit(read, item) for item in group]))
            if not pending:
                return
            group, futures = pending.popleft()
            yield group, [future.result() for future in futures]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


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

    chunks = (places[start : start + CHUNK] for start in range(0, len(places), CHUNK))
    results = (result for _, chunk in read_ahead(apply, chunks, max(1, workers), 0) for result in chunk)
    yield from progress(results, title, len(places), "image")


def refuse_unreadable(index: Index, faults: Sequence[str]) -> None:
    """Raises a DataError that lists the images that cannot be read, if there are any."""
    if faults:
        raise DataError(
            f"{index.dataset}: {len(faults)} of {len(index)} {index.split} image(s) cannot be read",
            items=faults,
            fix="copy or download these files again; no image is skipped",
        )

"""Progress bars: on standard error, in a terminal only, so that logs and pipes stay clean."""

from __future__ import annotations

from collections.abc import Iterable

from tqdm import tqdm


def progress(iterable: Iterable | None, what: str, total: int, unit: str, show: bool = True) -> tqdm:
    """A bar with rate and remaining time, gone when done."""
    return tqdm(iterable, what, total, unit=unit, leave=False, disable=None if show else True, dynamic_ncols=True)

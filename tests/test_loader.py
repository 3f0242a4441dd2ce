"""Batches: their order, the same bits with any number of threads, and errors that reach the caller."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import recipe, within

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.index import Index
from paddle_medcls.preprocessing.augmentation import Augmentation
from paddle_medcls.preprocessing.loader import Batch, ImageDataset, cut, epoch_order, load_batches
from paddle_medcls.preprocessing.transforms import Preprocessing

SPEC = Preprocessing(size_px=8)
CROP = Preprocessing(size_px=8, resize_px=8, fit="crop")  # the same pixels, but read one image at a time


def numbered(count: int) -> ImageDataset:
    """Images whose pixels and labels are their row."""
    images = np.arange(count, dtype=np.uint8)[:, None, None] * np.ones((1, 8, 8), np.uint8)
    index = Index(
        "toy", "train", tuple(map(str, range(count))), images, np.arange(count), ("a",) * count, "multi-class"
    )
    return ImageDataset(index, SPEC)


def test_cut_and_the_last_batch() -> None:
    assert [list(rows) for rows in cut(range(7), 3)] == [[0, 1, 2], [3, 4, 5], [6]]
    assert [list(rows) for rows in cut(range(6), 3)] == [[0, 1, 2], [3, 4, 5]]


def test_epoch_order_is_a_permutation_by_seed_and_epoch() -> None:
    orders = [tuple(epoch_order(50, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)]
    assert len(set(orders)) == 4
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert tuple(epoch_order(50, 1, 1)) == orders[3]


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
def test_batches_hold_their_rows_in_order(workers: int) -> None:
    order = epoch_order(23, 0, 0)
    batches = list(within(30, lambda: list(load_batches(numbered(23), cut(order, 4), workers))))
    assert [len(batch.labels) for batch in batches] == [4, 4, 4, 4, 4, 3]
    assert np.concatenate([batch.rows for batch in batches]).tolist() == order.tolist()
    for batch in batches:
        assert batch.x.dtype == np.float32 and batch.x.shape[1:] == (3, 8, 8)
        np.testing.assert_array_equal(batch.labels, batch.rows)
        np.testing.assert_allclose(batch.x[:, 0, 0, 0] * 127.5 + 127.5, batch.rows, atol=1e-4)


def test_the_same_bits_with_any_number_of_threads(palm_root: Path) -> None:
    toy = recipe(flip=0.5, rotate_degrees=30.0, brightness=0.2)
    dataset = ImageDataset(load_index("palm", palm_root, "train"), toy.preprocessing, toy.augmentation, 3, 4)
    found = [[batch.x.tobytes() for batch in load_batches(dataset, cut(range(12), 5), n)] for n in (0, 1, 2)]
    assert found[0] == found[1] == found[2] and len(found[0]) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("faulty", [0, 6, 11])  # first, middle, last: Paddle's own loader hangs on each
def test_errors_reach_the_caller(palm_root: Path, workers: int, faulty: int) -> None:
    index = load_index("palm", palm_root, "train")
    index.images[faulty].write_bytes(b"<html>")
    seen: list[int] = []

    def read() -> None:
        for batch in load_batches(ImageDataset(index, SPEC), cut(range(12), 4), workers):
            seen.append(len(batch.rows))

    with pytest.raises(DataError, match=index.images[faulty].name):
        within(20, read)
    assert seen == [4] * (faulty // 4)  # the batches before the faulty image
    assert no_readers_left()


@pytest.mark.parametrize("workers", [0, 2])
def test_any_exception_reaches_the_caller(workers: int) -> None:
    class Broken(ImageDataset):
        def __getitem__(self, row: int) -> tuple:
            raise ZeroDivisionError(f"row {row}")

        def batch(self, rows: Sequence[int]) -> Batch:
            raise ZeroDivisionError(f"row {rows[0]}")

    for spec in (SPEC, CROP):  # whole batches, and image by image
        dataset = Broken(numbered(4).index, spec)
        with pytest.raises(ZeroDivisionError, match="row 0"):
            within(20, lambda dataset=dataset: list(load_batches(dataset, cut(range(4), 2), workers)))


def no_readers_left() -> bool:
    return not [thread for thread in threading.enumerate() if thread.name.startswith("reader")]


def test_closing_early_leaves_no_threads() -> None:
    loaded = load_batches(numbered(40), cut(range(40), 4), 3)
    next(loaded)
    assert not no_readers_left()
    within(10, loaded.close)
    assert no_readers_left()


def test_only_a_few_batches_are_read_ahead() -> None:
    """Memory is bounded: of 100 batches no more than three are read before the first is used up."""
    read: list[int] = []

    class Counting(ImageDataset):
        def __getitem__(self, row: int) -> tuple:
            read.append(row)
            return super().__getitem__(row)

    loaded = load_batches(Counting(numbered(200).index, CROP), cut(range(200), 2), 2)
    next(loaded)
    time.sleep(0.1)
    assert 2 < len(read) <= 6
    loaded.close()


@pytest.mark.parametrize("size", [1, 3, 7, 23])
def test_augmentation_does_not_depend_on_the_batch(size: int) -> None:
    """Also of images in memory, which are augmented a batch at a time: so pieces of a batch add up to the batch."""
    every = Augmentation(0, 0.5, 0.5, 30.0, 0.2, 0.1, 0.2, 0.2, 0.2)
    images = np.random.default_rng(0).integers(0, 256, (23, 8, 8, 3), np.uint8)
    index = replace(numbered(23).index, images=images)
    dataset = ImageDataset(index, SPEC, every, seed=5, epoch=2)
    assert dataset.whole_batches
    full = dataset.batch(range(23)).x
    order = epoch_order(23, 0, 0)
    for batch in load_batches(dataset, cut(order, size), 0):
        assert np.array_equal(batch.x, full[batch.rows])
    assert not np.array_equal(full, ImageDataset(index, SPEC, every, seed=5, epoch=3).batch(range(23)).x)
    assert (
        len(
            {
                x.tobytes()
                for x in ImageDataset(replace(index, images=images[:1].repeat(23, 0)), SPEC, every).batch(range(23)).x
            }
        )
        == 23
    )


def test_no_batches() -> None:
    assert list(load_batches(numbered(3), [], 2)) == []

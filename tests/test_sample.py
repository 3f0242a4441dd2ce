"""Synthetic samples: deterministic, in the real layout, marked; other files are never replaced."""

import hashlib

import numpy as np
import pytest

from paddle_medcls.core.errors import DataError
from paddle_medcls.data import synthetic
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.index import SYNTHETIC_MARK
from paddle_medcls.data.sample import draw


def digest(root):
    hasher = hashlib.sha256()
    for path in sorted(root.rglob("*")):
        if path.is_file():
            hasher.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()


@pytest.mark.parametrize("dataset, counts", [("palm", [60, 60]), ("covid", [42, 42, 42, 42])])
def test_same_seed_same_files_read_by_the_real_reader(tmp_path, monkeypatch, dataset, counts):
    monkeypatch.setattr(synthetic, "SIDE", 64)  # 540 images of 160 pixels take 7 seconds
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        draw(dataset, tmp_path / name, seed)
    assert digest(tmp_path / "a") == digest(tmp_path / "b") != digest(tmp_path / "c")
    index = load_index(dataset, tmp_path / "a", "train")
    assert index.synthetic
    assert list(index.counts().values()) == counts


def test_classes_differ_in_more_than_noise(tmp_path):
    """A nearest-mean rule on 16 x 16 thumbnails beats chance on images that it has not seen."""
    import cv2

    draw("covid", tmp_path, 0)

    def table(split):
        index = load_index("covid", tmp_path, split)
        small = [cv2.resize(index.read(row, "gray"), (16, 16)).ravel() for row in range(len(index))]
        return np.array(small, float), index.labels

    x, labels = table("train")
    means = np.stack([x[labels == k].mean(axis=0) for k in range(4)])
    x, labels = table("val")
    guesses = ((x[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (guesses == labels).mean() > 0.5  # chance is 0.25


def test_never_over_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(DataError, match="not empty"):
        draw("palm", tmp_path, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_unknown_data_set(tmp_path):
    with pytest.raises(DataError, match="no synthetic sample for retina"):
        draw("retina", tmp_path, 0)


@pytest.mark.parametrize(
    "dataset, own", [("breastmnist", "breastmnist.npz"), ("covid", "train.txt"), ("palm", "labels.csv")]
)
def test_never_over_a_file_of_the_users_beside_the_mark(tmp_path, dataset, own):
    (tmp_path / SYNTHETIC_MARK).write_text("")  # as users mark files that they generate themselves
    (tmp_path / own).write_bytes(b"mine")
    with pytest.raises(DataError, match="would replace a file with another content") as caught:
        draw(dataset, tmp_path, 0)
    assert own in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {SYNTHETIC_MARK: b"", own: b"mine"}


def test_again_beside_other_files(tmp_path):
    draw("breastmnist", tmp_path, 0)
    (tmp_path / "notes.txt").write_text("mine")
    before = (tmp_path / "breastmnist.npz").stat()
    draw("breastmnist", tmp_path, 0)
    draw("retinamnist", tmp_path, 0)
    after = (tmp_path / "breastmnist.npz").stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert (tmp_path / "notes.txt").read_text() == "mine" and (tmp_path / "retinamnist.npz").is_file()
    with pytest.raises(DataError, match="another seed"):
        draw("breastmnist", tmp_path, 1)

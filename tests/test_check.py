"""The check for duplicates and leaks, on synthetic and on real images."""

import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from fakes import covid_tree

from paddle_medcls.cli import prepare
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.duplicates import _correlations, check_images
from paddle_medcls.data.index import Index

REAL = os.environ.get("MEDCLS_TEST_DATA")


def texture(seed, side=120):
    noise = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
    return cv2.resize(noise, (side, side), interpolation=cv2.INTER_CUBIC)


def make(tmp_path, split, images, labels):
    paths = []
    for name, image in images.items():
        path = tmp_path / split / name
        path.parent.mkdir(exist_ok=True)
        if isinstance(image, bytes):
            path.write_bytes(image)
        else:
            path.write_bytes(cv2.imencode(path.suffix, image)[1].tobytes())
        paths.append(path)
    ids = tuple(path.relative_to(tmp_path).as_posix() for path in paths)
    return Index("made", split, ids, paths, np.array(labels), ("a", "b"), "binary")


def test_finds_exact_near_and_cross_class_pairs_and_nothing_else(tmp_path):
    one, two, three, four = (texture(seed) for seed in range(4))
    train = make(tmp_path, "train", {"1.png": one, "2.png": two, "3.png": three, "1copy.bmp": one}, [0, 0, 1, 1])
    smaller = cv2.resize(two, (90, 90), interpolation=cv2.INTER_AREA)
    val = make(tmp_path, "val", {"2small.jpg": smaller, "4.png": four}, [0, 1])
    found = check_images([train, val], 2)
    pairs = {(pair.a[1], pair.b[1]): pair for pair in found.pairs}
    assert set(pairs) == {("train/1.png", "train/1copy.bmp"), ("train/2.png", "val/2small.jpg")}
    assert pairs["train/1.png", "train/1copy.bmp"].exact and not pairs["train/1.png", "train/1copy.bmp"].same_label
    near = pairs["train/2.png", "val/2small.jpg"]
    assert not near.exact and 0.96 <= near.correlation < 1 and near.leak
    assert found.leaked("val") == {"val/2small.jpg"} and found.leaked("test") == set()


def test_lists_unreadable_constant_and_odd_sized_images(tmp_path):
    images = {f"{k}.png": texture(k) for k in range(20)}
    images |= {"flat.png": np.full((120, 120, 3), 7, np.uint8), "odd.png": texture(99, 80), "broken.png": b"\x89PNG"}
    found = check_images([make(tmp_path, "train", images, [0] * 23)], 2)
    assert len(found.unreadable) == 1 and "broken.png" in found.unreadable[0]
    assert sorted(found.suspicious) == [
        "train/flat.png: all pixels are the same",
        "train/odd.png: 80x80, nearly all others 120x120",
    ]
    assert found.pairs == []


def test_lists_images_of_another_mode_and_names_that_disagree_with_their_label(tmp_path):
    images = {f"a-{k}.png": texture(k) for k in range(20)}
    images |= {"b-7.png": texture(50), "grey.png": texture(51)[:, :, 0]}
    found = check_images([make(tmp_path, "train", images, [0] * 22)], 2)
    assert found.suspicious == [
        "train/grey.png: stored as L, nearly all others RGB",
        "train/b-7.png: the name says b, the label a",
    ]


def test_two_images_in_all(tmp_path):
    one = texture(1)
    train = make(tmp_path, "train", {"1.png": one}, [0])
    val = make(tmp_path, "val", {"copy.jpg": cv2.resize(one, (90, 90), interpolation=cv2.INTER_AREA)}, [0])
    (pair,) = check_images([train, val], 1).pairs
    assert pair.correlation > 0.96 and not pair.exact
    other = make(tmp_path, "test", {"2.png": texture(2)}, [0])
    assert check_images([train, other], 1).pairs == []


def test_a_pair_is_judged_by_the_training_split_whatever_else_is_compared(tmp_path):
    """Thumbnails with much in common, as of fundus photographs; all other splits leave a pair as it is."""
    common = texture(0).astype(int)

    def photograph(seed):
        return np.clip((3 * common + texture(seed)) // 4, 0, 255).astype(np.uint8)

    train = make(tmp_path, "train", {f"{k}.png": photograph(k) for k in range(1, 9)}, [0] * 8)
    test = make(tmp_path, "test", {"t.jpg": photograph(3), "u.png": photograph(30)}, [0, 0])
    val = make(tmp_path, "val", {f"v{k}.png": texture(k) for k in range(40, 60)}, [0] * 20)
    alone, together = check_images([train, test], 1).pairs, check_images([train, val, test], 1).pairs
    assert [(pair.a[1], pair.b[1]) for pair in alone] == [("train/3.png", "test/t.jpg")]
    assert [(pair.a, pair.b) for pair in together] == [(pair.a, pair.b) for pair in alone]
    np.testing.assert_allclose(together[0].correlation, alone[0].correlation, atol=1e-5)


def test_correlations_against_one_pair_at_a_time():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(9, 30)) + 2 * rng.normal(size=30)).astype(np.float32)
    x -= x.mean(axis=1, keepdims=True)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for training in ([], [0], [0, 1], [0, 1, 2, 5]):
        inside = np.isin(np.arange(9), training)
        mean = x[inside].sum(axis=0) / max(1, len(training))
        found = _correlations(x, slice(0, 9), inside, mean)
        for i in range(9):
            for j in set(range(9)) - {i}:
                rest = [k for k in training if k not in (i, j)]
                a, b = (x[k] - (x[rest].mean(axis=0) if rest else 0) for k in (i, j))
                np.testing.assert_allclose(found[i, j], a @ b / np.sqrt((a @ a) * (b @ b)), atol=1e-4)


def test_images_of_one_colour_are_copies_only_if_they_are_equal(tmp_path):
    images = {f"{k}.png": np.full((40, 40, 3), level, np.uint8) for k, level in enumerate((7, 7, 90))}
    (pair,) = check_images([make(tmp_path, "train", images, [0, 0, 0])], 1).pairs
    assert (pair.a[1], pair.b[1]) == ("train/0.png", "train/1.png") and pair.exact


def test_nothing_readable(tmp_path):
    found = check_images([make(tmp_path, "train", {"1.png": b"x"}, [0])], 1)
    assert len(found.unreadable) == 1 and found.pairs == []


def check_all(root):
    return check_images([load_index("covid", root, split) for split in ("train", "val", "test")], 1)


def test_without_output_the_command_only_prints(tmp_path, capsys):
    root = covid_tree(tmp_path / "covid")
    before = sorted(root.rglob("*"))
    words = ["--dataset", "covid", "--data-root", str(root), "--check", "--audit", "--workers", "1"]
    assert prepare.main(words) == 0
    shown = capsys.readouterr().out
    assert "no file written: --output DIR writes check.json" in shown and sorted(root.rglob("*")) == before
    assert prepare.main([*words, "--output", str(tmp_path / "out")]) == 0
    record = json.loads((tmp_path / "out" / "check.json").read_text())
    assert record["images"] == 16 and record["pairs"] == check_all(root).record()["pairs"]


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="MEDCLS_TEST_DATA is not set")
def test_palm_has_the_five_known_pairs():
    root = Path(REAL or "") / "palm"
    found = check_images([load_index("palm", root, split) for split in ("train", "val")], 2)
    names = {(Path(pair.a[1]).stem, Path(pair.b[1]).stem) for pair in found.pairs}
    assert names == {
        ("P0014", "P0072"),
        ("P0056", "V0163"),
        ("P0057", "V0252"),
        ("V0107", "V0160"),
        ("V0268", "V0320"),
    }
    assert all(pair.exact for pair in found.pairs)
    assert {Path(name).stem for name in found.leaked("val")} == {"V0163", "V0252"}


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="MEDCLS_TEST_DATA is not set")
def test_covid_has_fifteen_pairs(tmp_path):
    """One exact and fourteen near ones, each looked at; their file numbers."""
    from paddle_medcls.data.datasets.covid import find_images, make_split_files

    root = Path(REAL or "") / "covid19_radiography"
    assert sum(map(len, find_images(root).values())) == 1592
    for name in root.iterdir():
        (tmp_path / name.name).symlink_to(name)
    for split, text in make_split_files(tmp_path, 0).items():
        (tmp_path / f"{split}.txt").write_text(text)
    found = check_images([load_index("covid", tmp_path, split) for split in ("train", "val", "test")], 2)
    numbers = {tuple(sorted(int(Path(end[1]).stem.split("-")[1]) for end in (pair.a, pair.b))) for pair in found.pairs}
    near = {(48, 599), (114, 766), (214, 517), (136, 782), (109, 525), (111, 633), (460, 609), (322, 1002)}
    near |= {(306, 993), (652, 658), (309, 996), (32, 428), (533, 609), (460, 533)}
    assert numbers == near | {(1052, 1053)}
    assert [pair.exact for pair in found.pairs].count(True) == 1

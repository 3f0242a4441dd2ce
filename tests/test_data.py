"""The readers of PALM and COVID, the Index, the splits and the statistics."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pandas
import pytest
from fakes import ROOT, covid_images, palm_tree, pixels, within, write_image
from hypothesis import given, settings
from hypothesis import strategies as st

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.datasets import covid, dataset_classes, dataset_names, load_index, palm
from paddle_medcls.data.index import SYNTHETIC_MARK, Index, subfolders
from paddle_medcls.data.splits import CUTS, holdout, split_by_class
from paddle_medcls.preprocessing.statistics import cached_scan, file_key, image_statistics, read_cache

# --- any data set ----------------------------------------------------------------------------------


def test_names_and_splits() -> None:
    assert {"palm", "covid"} <= set(dataset_names())
    assert dataset_classes("palm") == (("non-pathologic", "pathologic"), "binary")
    assert dataset_classes("palm", "three") == (("normal", "high myopia", "pathologic"), "multi-class")
    assert dataset_classes("covid") == (("COVID", "LungOpacity", "Normal", "ViralPneumonia"), "multi-class")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pallm", "train"), "unknown data set 'pallm'; did you mean 'palm'"),
        (("palm", "test"), "palm has no split 'test'"),
        (("palm", "train", "two"), "palm has no labels 'two'"),
        (("covid", "train", "three"), "covid has no labels 'three'"),
    ],
)
def test_unknown_names(tmp_path: Path, arguments: tuple, message: str) -> None:
    name, split, *labels = arguments
    with pytest.raises(DataError, match=message):
        load_index(name, tmp_path, split, *labels)


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="data root does not exist") as caught:
        load_index("palm", tmp_path / "nowhere", "train")
    assert str(tmp_path / "nowhere") in str(caught.value)


@pytest.mark.parametrize("name", ["palm", "covid"])
def test_splits_are_disjoint_and_ids_unique(name: str, palm_root: Path, covid_root: Path) -> None:
    root = palm_root if name == "palm" else covid_root
    seen: list[str] = []
    for split in ("train", "val", "test")[: 2 if name == "palm" else 3]:
        index = load_index(name, root, split)
        assert index.labels.dtype == np.int64 and index.labels.min() >= 0
        assert index.labels.max() < len(index.classes)
        assert [path.relative_to(root).as_posix() for path in index.images] == list(index.ids)
        seen += index.ids
    assert len(set(seen)) == len(seen)


def test_synthetic_images_are_marked(palm_root: Path) -> None:
    assert not load_index("palm", palm_root, "train").synthetic
    (palm_root / SYNTHETIC_MARK).write_text("")
    assert load_index("palm", palm_root, "train").synthetic


# --- PALM ------------------------------------------------------------------------------------------


def test_palm_training_labels_are_the_first_letters(palm_root: Path) -> None:
    index = load_index("palm", palm_root, "train")
    assert index.counts() == {"non-pathologic": 6, "pathologic": 6}
    for name, label in zip(index.ids, index.labels):
        assert label == (Path(name).name[0] == "P")
    assert list(index.ids) == sorted(index.ids)


def test_palm_validation_labels_are_the_tables(palm_root: Path) -> None:
    index = load_index("palm", palm_root, "val")
    assert [Path(name).name for name in index.ids] == [f"V{number:04}.jpg" for number in range(1, 8)]
    assert index.labels.tolist() == [1, 0, 1, 0, 1, 0, 1]


def test_palm_labels_follow_the_names_not_the_order(palm_root: Path) -> None:
    lines = (palm_root / "labels.csv").read_text().splitlines()
    (palm_root / "labels.csv").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    index = load_index("palm", palm_root, "val")
    by_name = {Path(name).name: label for name, label in zip(index.ids, index.labels)}
    assert by_name == {f"V{number:04}.jpg": number % 2 for number in range(1, 8)}


def test_palm_labels_from_the_original_workbook(palm_root: Path) -> None:
    before = load_index("palm", palm_root, "val")
    table = pandas.read_csv(palm_root / "labels.csv")
    (palm_root / "labels.csv").unlink()
    (palm_root / "PALM-Validation-GT").mkdir()
    table.to_excel(palm_root / "PALM-Validation-GT" / "PM_Label_and_Fovea_Location.xlsx", index=False)
    after = load_index("palm", palm_root, "val")
    assert after.ids == before.ids
    np.testing.assert_array_equal(after.labels, before.labels)


@pytest.mark.parametrize("layout", ["doubled", "one deeper", "other names", "beside rubbish"])
def test_palm_layouts(tmp_path: Path, layout: str) -> None:
    root = palm_tree(tmp_path / "palm")
    plain = {split: [Path(name).name for name in load_index("palm", root, split).ids] for split in ("train", "val")}
    for folder in ("PALM-Training400", "PALM-Validation400"):
        if layout == "doubled":  # as the archives unpack into folders of their own name
            (root / folder).rename(root / "moving")
            (root / folder).mkdir()
            (root / "moving").rename(root / folder / folder)
        elif layout == "one deeper":
            (root / "data").mkdir(exist_ok=True)
            (root / folder).rename(root / "data" / folder)
        elif layout == "other names":
            (root / folder).rename(root / {"PALM-Training400": "training", "PALM-Validation400": "validation"}[folder])
        else:
            (root / "__MACOSX" / folder).mkdir(parents=True)
            (root / "__MACOSX" / folder / "._P0001.jpg").write_bytes(b"rubbish")
            (root / folder / "Thumbs.db").write_bytes(b"rubbish")
            (root / "a_letter.txt").write_text("")
    for split in ("train", "val"):
        assert [Path(name).name for name in load_index("palm", root, split).ids] == plain[split]


def test_palm_strange_first_letter_stops(palm_root: Path) -> None:
    for name in ("X0001.jpg", "copy of P0001.jpg"):
        write_image(palm_root / "PALM-Training400" / name, pixels(0))
    with pytest.raises(DataError, match="2 training file.s. with an unknown first letter") as caught:
        load_index("palm", palm_root, "train")
    assert "X0001.jpg" in str(caught.value) and "copy of P0001.jpg" in str(caught.value)


def test_palm_missing_and_extra_images_are_all_listed(palm_root: Path) -> None:
    (palm_root / "PALM-Validation400" / "V0002.jpg").unlink()
    (palm_root / "PALM-Validation400" / "V0005.jpg").unlink()
    write_image(palm_root / "PALM-Validation400" / "V0099.jpg", pixels(0))
    with pytest.raises(DataError, match="2 missing, 1 without a label") as caught:
        load_index("palm", palm_root, "val")
    for text in ("row 3 names 'V0002.jpg'", "row 6 names 'V0005.jpg'", "no label for V0099.jpg", "expected   7 images"):
        assert text in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("1,V0001.jpg,2,0,0", "row 2: imgName 'V0001.jpg', Label '2'"),
        ("1,V0001.jpg,,0,0", "row 2: imgName 'V0001.jpg'"),
        ("1,,1,0,0", "row 2"),
        ("1,V0001.jpg,yes,0,0", "Label 'yes'"),
        ("1,../V0001.jpg,1,0,0", "row 2: imgName '../V0001.jpg'"),
        ("1,V0001.jpg,1,0,0\n2,V0001.jpg,0,0,0", "lists images twice"),
        ('1,"V0001.jpg,1,0,0', "cannot be read|faulty row|lacks a column"),
    ],
)
def test_palm_faulty_rows(palm_root: Path, rows: str, message: str) -> None:
    (palm_root / "labels.csv").write_text(f"ID,imgName,Label,Fovea_X,Fovea_Y\n{rows}\n")
    with pytest.raises(DataError, match=message):
        load_index("palm", palm_root, "val")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"ID,name,class\n1,V0001.jpg,1\n", "lacks a column"),
        (b"\xff\xfe\x00\x01", "cannot be read|lacks a column"),
        (b"ID,imgName,Label\n", "missing|disagree"),
    ],
)
def test_palm_faulty_label_file(palm_root: Path, content: bytes, message: str) -> None:
    (palm_root / "labels.csv").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_index("palm", palm_root, "val")


def test_palm_label_file_with_byte_order_mark(palm_root: Path) -> None:
    path = palm_root / "labels.csv"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as spreadsheets save it
    assert len(load_index("palm", palm_root, "val")) == 7


def test_palm_broken_workbook(palm_root: Path) -> None:
    (palm_root / "labels.csv").unlink()
    (palm_root / "PM_Label_and_Fovea_Location.xlsx").write_bytes(b"PK\x03\x04 cut short")
    with pytest.raises(DataError, match="PM_Label_and_Fovea_Location.xlsx cannot be read"):
        load_index("palm", palm_root, "val")


@pytest.mark.parametrize("gone", ["PALM-Training400", "PALM-Validation400", "labels.csv"])
def test_palm_missing_parts(palm_root: Path, gone: str) -> None:
    path = palm_root / gone
    path.rename(palm_root.parent / "elsewhere")
    with pytest.raises(DataError, match="no folder|no validation labels"):
        load_index("palm", palm_root, "train" if "Train" in gone else "val")


def test_palm_in_three_classes(tmp_path: Path) -> None:
    """A fifth of each class is held out: of 10, 10 and 5 files 2, 2 and 1."""
    root = palm_tree(tmp_path / "palm", pathologic=10, normal=10, myopic=5)
    train, val = (load_index("palm", root, split, "three") for split in ("train", "val"))
    assert train.counts() == {"normal": 8, "high myopia": 4, "pathologic": 8}
    assert val.counts() == {"normal": 2, "high myopia": 1, "pathologic": 2}
    assert not set(train.ids) & set(val.ids)
    for index in (train, val):
        assert [index.classes[label][0] for label in index.labels] == [
            {"N": "n", "H": "h", "P": "p"}[Path(name).name[0]] for name in index.ids
        ]
    assert load_index("palm", root, "val", "three").ids == val.ids


@pytest.mark.data
def test_palm_real(real_data: Path) -> None:
    """Counts of palm/SOURCE.md."""
    train = load_index("palm", real_data / "palm", "train")
    val = load_index("palm", real_data / "palm", "val")
    assert train.counts() == {"non-pathologic": 187, "pathologic": 213}
    assert val.counts() == {"non-pathologic": 189, "pathologic": 211}
    three = [load_index("palm", real_data / "palm", split, "three").counts() for split in ("train", "val")]
    assert Counter(three[0]) + Counter(three[1]) == {"normal": 161, "high myopia": 26, "pathologic": 213}
    for index in (train, val):
        assert image_statistics(index, 2)["sizes"] == [[224, 224, 400]]


# --- COVID -----------------------------------------------------------------------------------------


def test_the_tutorials_counts_of_the_full_set() -> None:
    """3616, 6012, 10192 and 1345 images at the cut points 0.7 and 0.9: 14,814 / 4,232 / 2,119."""
    counts = (3616, 6012, 10192, 1345)
    parts = [split_by_class(count, CUTS, (0, label)) for label, count in enumerate(counts)]
    assert [sum(len(part[split]) for part in parts) for split in range(3)] == [14814, 4232, 2119]
    for count, part in zip(counts, parts):
        assert sorted(row for rows in part for row in rows) == list(range(count))


def test_split_is_shuffled_seeded_and_sorted() -> None:
    first = split_by_class(50, CUTS, (0, 1))
    assert first == split_by_class(50, CUTS, (0, 1))
    assert first != split_by_class(50, CUTS, (1, 1)) and first != split_by_class(50, CUTS, (0, 2))
    assert first[0] != list(range(35)) and all(rows == sorted(rows) for rows in first)


def test_holdout_takes_the_share_of_each_class() -> None:
    labels = np.array([0] * 20 + [1] * 10 + [2] * 5)
    train, held = holdout(labels, 0.2)
    assert np.bincount(labels[held]).tolist() == [4, 2, 1]
    assert sorted(train + held) == list(range(35))


@pytest.mark.parametrize("layout", ["tutorial", "kaggle"])
@pytest.mark.parametrize("nested", [False, True])
def test_covid_layouts(tmp_path: Path, layout: str, nested: bool) -> None:
    covid_images(tmp_path / "COVID-19_Radiography_Dataset" if nested else tmp_path, layout, count=10)
    found = covid.find_images(tmp_path)
    assert list(found) == ["COVID", "LungOpacity", "Normal", "ViralPneumonia"]
    assert [len(names) for names in found.values()] == [10] * 4
    assert not any("masks" in name for names in found.values() for name in names)
    for split, text in covid.make_split_files(tmp_path, 0).items():
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    for split, count in (("train", 7), ("val", 2), ("test", 1)):  # 7:2:1 of 10 in each class
        index = load_index("covid", tmp_path, split)
        assert list(index.counts().values()) == [count] * 4
        for name, label in zip(index.ids, index.labels):
            assert index.classes[label] == Path(name).parts[1 if nested else 0].replace("_", "").replace(" ", "")
        assert all(path.is_file() for path in index.images)


def test_covid_split_files_are_deterministic_and_depend_on_the_seed(tmp_path: Path) -> None:
    covid_images(tmp_path, count=10)
    assert covid.make_split_files(tmp_path, 0) == covid.make_split_files(tmp_path, 0)
    assert covid.make_split_files(tmp_path, 0) != covid.make_split_files(tmp_path, 1)


def test_covid_split_files_do_not_depend_on_the_order_of_the_disk(tmp_path: Path) -> None:
    covid_images(tmp_path / "a", count=10)
    names = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    for name in reversed(names):
        (tmp_path / "b" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "b" / name).write_bytes(b"not read")
    assert covid.make_split_files(tmp_path / "a", 0) == covid.make_split_files(tmp_path / "b", 0)


@pytest.mark.parametrize("above", ["covid", "COVID", "normal/archive/COVID-19_Radiography_Dataset"])
def test_covid_below_a_folder_that_is_called_like_a_class(tmp_path: Path, above: str) -> None:
    covid_images(tmp_path / above, count=10)
    for split, text in covid.make_split_files(tmp_path, 0).items():
        (tmp_path / f"{split}.txt").write_text(text, encoding="utf-8")
    assert list(load_index("covid", tmp_path, "train").counts().values()) == [7] * 4


BAD_NAMES = ["line\nend.png", "next\u2028line.png", " blank.png", "blank.png ", b"\xff\xfe.png", "escape\x1b[2J.png"]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("dataset", ["covid", "palm"])
def test_names_that_no_split_file_can_hold_are_refused_at_once(tmp_path: Path, name: str | bytes, dataset: str) -> None:
    folder = (covid_images(tmp_path) / "Normal") if dataset == "covid" else palm_tree(tmp_path) / "PALM-Training400"
    Path(os.fsdecode(os.path.join(os.fsencode(folder), os.fsencode(name)))).write_bytes(b"x")
    with pytest.raises(DataError, match="1 of .* cannot be used[\\s\\S]*a control character, a blank at an end"):
        covid.make_split_files(tmp_path, 0) if dataset == "covid" else load_index("palm", tmp_path, "train")


@pytest.mark.parametrize("folder", ["new\nline", "next\u2028line", "tab\x85"])
def test_a_split_file_that_loading_would_refuse_is_never_written(tmp_path: Path, folder: str) -> None:
    covid_images(tmp_path / folder, count=10)
    with pytest.raises(DataError, match="cannot be written to a split file"):
        covid.make_split_files(tmp_path, 0)


@pytest.mark.parametrize("kind", ["folder", "pipe", "broken link"])
@pytest.mark.parametrize("dataset", ["covid", "palm"])
def test_no_files_among_the_images(tmp_path: Path, kind: str, dataset: str) -> None:
    folder = (covid_images(tmp_path) / "Normal") if dataset == "covid" else palm_tree(tmp_path) / "PALM-Training400"
    odd = folder / "P0099.png"
    {"folder": odd.mkdir, "pipe": lambda: os.mkfifo(odd), "broken link": lambda: odd.symlink_to("nowhere")}[kind]()
    read = (
        (lambda: covid.make_split_files(tmp_path, 0))
        if dataset == "covid"
        else lambda: load_index("palm", tmp_path, "train")
    )
    with pytest.raises(DataError, match="1 of .* cannot be used[\\s\\S]*'P0099.png': not a file"):
        within(20, read)


def test_covid_a_pipe_in_a_list(covid_root: Path) -> None:
    (covid_root / "COVID" / "COVID-1.png").unlink()
    os.mkfifo(covid_root / "COVID" / "COVID-1.png")
    with pytest.raises(DataError, match="'COVID/COVID-1.png' does not exist, or is no file"):
        within(20, lambda: load_index("covid", covid_root, "train"))


@pytest.mark.parametrize("other", ["./COVID/COVID-1.png", "COVID//COVID-1.png", "COVID/./COVID-1.png"])
def test_covid_one_path_in_two_spellings_is_listed_twice(covid_root: Path, other: str) -> None:
    path = covid_root / "train.txt"
    path.write_text(f"{path.read_text()}{other} 0\n")
    with pytest.raises(DataError, match="is listed twice"):
        load_index("covid", covid_root, "train")
    path.write_text(f"{other} 0\n")
    assert covid.read_split_file(path) == (["COVID/COVID-1.png"], [0])


def test_hidden_files_are_no_images(tmp_path: Path) -> None:
    covid_images(tmp_path)
    (tmp_path / "Normal" / "._Normal-1.png").write_bytes(b"kept by macOS")
    assert len(covid.find_images(tmp_path)["Normal"]) == 4


def test_a_home_directory_is_not_searched(tmp_path: Path) -> None:
    for number in range(2001):
        (tmp_path / str(number)).mkdir()
    with pytest.raises(DataError, match="more than 2000 folders"):
        covid.find_images(tmp_path)


def test_a_link_to_a_folder_above_is_not_followed_for_ever(tmp_path: Path) -> None:
    covid_images(tmp_path, count=10)
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(subfolders(tmp_path)) == 5 and len(covid.find_images(tmp_path)) == 4


def test_covid_missing_and_doubled_classes(tmp_path: Path) -> None:
    covid_images(tmp_path)
    (tmp_path / "Normal").rename(tmp_path / "somewhere")
    with pytest.raises(DataError, match="no images of Normal"):
        covid.find_images(tmp_path)
    (tmp_path / "somewhere").rename(tmp_path / "Normal")
    write_image(tmp_path / "Lung_Opacity" / "images" / "a.png", pixels(0))
    with pytest.raises(DataError, match="two folders hold the class LungOpacity"):
        covid.find_images(tmp_path)


def test_covid_without_split_files_names_the_command(tmp_path: Path) -> None:
    covid_images(tmp_path)
    with pytest.raises(DataError, match="no split file val.txt") as caught:
        load_index("covid", tmp_path, "val")
    assert "--split" in str(caught.value)


FAULTY_LINES = [
    "no-label.png",
    "COVID/COVID-1.png 4",
    "COVID/COVID-1.png -1",
    "COVID/COVID-1.png one",
    "COVID/COVID-1.png " + "9" * 5000,  # more digits than int() takes
    "COVID/COVID-1.png ٣",  # a decimal digit, but not an ASCII one
    " 1",
    "",
    "/COVID/COVID-1.png 0",
    "../covid/COVID/COVID-1.png 0",
    "COVID/../COVID/COVID-1.png 0",
    "COVID/COVID-3.png 2",
    "COVID/none.png 0",
    "COVID/" + "x" * 5000 + ".png 0",  # longer than a file name can be
    "COVID/COVID-\0.png 0",
    "COVID/COVID-2.png 0",
]


def test_covid_every_faulty_line_is_reported(covid_root: Path) -> None:
    good = "COVID/COVID-2.png 0"
    path = covid_root / "train.txt"
    path.write_text("\n".join([good, *FAULTY_LINES]) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"{len(FAULTY_LINES)} faulty line") as caught:
        covid.read_split_file(path)
    text = str(caught.value)
    for number in (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 17):
        assert f"line {number}:" in text, number
    assert "leaves the data root" in text and "is listed twice" in text
    assert "has label 2, its folder says 0" in text and "'COVID/none.png' does not exist" in text


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe\x00", b"\xef\xbb\xbfCOVID/COVID-1.png 0\n"])
def test_covid_faulty_split_files(covid_root: Path, content: bytes) -> None:
    (covid_root / "val.txt").write_bytes(content)
    with pytest.raises(DataError, match="val.txt"):
        load_index("covid", covid_root, "val")


def test_covid_link_out_of_the_root_is_the_users_own_and_read(covid_root: Path, tmp_path: Path) -> None:
    """People link large folders; only paths in the split file itself are restricted."""
    (covid_root / "Normal").rename(tmp_path / "other disk")
    (covid_root / "Normal").symlink_to(tmp_path / "other disk")
    assert len(load_index("covid", covid_root, "train")) == 8


def test_covid_windows_line_ends(covid_root: Path) -> None:
    path = covid_root / "train.txt"
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(load_index("covid", covid_root, "train")) == 8


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=200), st.text(max_size=200).map(lambda text: f"COVID/{text} 0".encode("utf-8", "replace"))
    )
)
def test_fuzzed_split_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.txt"
    path.write_bytes(content)
    with pytest.raises(DataError):
        covid.read_split_file(path)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda t: f"ID,imgName,Label\n1,{t}".encode("utf-8", "replace")),
    )
)
def test_fuzzed_label_files(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    root = tmp_path_factory.getbasetemp() / "fuzzed_palm"
    if not root.exists():
        palm_tree(root)
    (root / "labels.csv").write_bytes(content)
    with pytest.raises(DataError):
        palm.load("palm", root, "val")


@pytest.mark.data
def test_covid_real(real_data: Path) -> None:
    """Counts and sizes of covid19_radiography/SOURCE.md; int(0.7 * 398) = 278, int(0.9 * 398) = 358."""
    root = real_data / "covid19_radiography"
    found = covid.find_images(root)
    assert [len(names) for names in found.values()] == [398] * 4
    lists = covid.make_split_files(root, 0)
    assert [len(lists[split].splitlines()) for split in ("train", "val", "test")] == [4 * 278, 4 * 80, 4 * 40]
    listed = [line.rpartition(" ")[0] for text in lists.values() for line in text.splitlines()]
    assert sorted(listed) == sorted(name for names in found.values() for name in names)


# --- Index -----------------------------------------------------------------------------------------


def array_index(labels: np.ndarray, images: np.ndarray | None = None, **changes: object) -> Index:
    count = len(labels)
    images = np.zeros((count, 4, 4), np.uint8) if images is None else images
    fields = {"dataset": "toy", "split": "train", "classes": ("a", "b", "c"), "task": "multi-class"}
    return Index(ids=tuple(f"i{k}" for k in range(count)), images=images, labels=labels, **{**fields, **changes})


def test_counts_include_empty_classes_and_count_labels() -> None:
    assert array_index(np.array([0, 0, 2])).counts() == {"a": 2, "b": 0, "c": 1}
    many = array_index(np.array([[1, 0, 1], [0, 0, 1]]), task="multi-label")
    assert many.counts() == {"a": 1, "b": 0, "c": 2}


@pytest.mark.parametrize("kind", ["files", "arrays"])
def test_subset_keeps_rows_together(kind: str, palm_root: Path) -> None:
    if kind == "files":
        index = load_index("palm", palm_root, "train")
    else:
        images = np.arange(5, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
        index = array_index(np.array([0, 1, 2, 0, 1]), images)
    part = index.subset([3, 0])
    assert part.ids == (index.ids[3], index.ids[0]) and part.labels.tolist() == index.labels[[3, 0]].tolist()
    for new, old in ((0, 3), (1, 0)):
        np.testing.assert_array_equal(part.read(new, "rgb"), index.read(old, "rgb"))


def test_an_empty_split_is_an_error(palm_root: Path) -> None:
    with pytest.raises(DataError, match="the train split is empty"):
        load_index("palm", palm_root, "train").subset([])


def test_fingerprint_is_sha256_of_names_and_labels() -> None:
    index = array_index(np.array([0, 1, 2]))
    expected = hashlib.sha256(b"i0\ni1\ni2" + np.array([0, 1, 2], "<i8").tobytes()).hexdigest()
    assert index.fingerprint() == expected
    others = [array_index(np.array([0, 1, 1])), index.subset([0, 2, 1]), index.subset([0, 1])]
    assert len({expected, *(other.fingerprint() for other in others)}) == 4


def test_channels_of_arrays() -> None:
    rgb = np.zeros((1, 4, 4, 3), np.uint8)
    rgb[..., 0] = 255
    index = array_index(np.array([0]), rgb)
    assert index.read(0, "rgb")[0, 0].tolist() == [255, 0, 0]
    assert index.read(0, "bgr")[0, 0].tolist() == [0, 0, 255]
    with pytest.raises(DataError, match="3 channels"):
        index.read(0, "gray")
    grey = array_index(np.array([0]), np.full((1, 4, 4), 7, np.uint8))
    assert grey.read(0, "gray").shape == (4, 4, 1) and grey.read(0, "rgb").shape == (4, 4, 3)


# --- statistics ------------------------------------------------------------------------------------


def odd_sizes(root: Path) -> Index:
    """Images of different sizes, so that the two definitions of mean and std differ."""
    palm_tree(root)
    for number, size in ((1, 48), (2, 72), (3, 16)):
        write_image(root / "PALM-Training400" / f"P{number:04}.jpg", pixels(number, 50 * number, size))
    return load_index("palm", root, "train")


@pytest.mark.parametrize("channels", ["rgb", "bgr", "gray"])
def test_scan_against_numpy(tmp_path: Path, channels: str) -> None:
    index = odd_sizes(tmp_path)
    images = [index.read(row, channels).astype(np.float64) for row in range(len(index))]
    found = image_statistics(index, 2, channels)
    means = [[image[:, :, c].mean() for c in range(image.shape[2])] for image in images]
    stds = [[image[:, :, c].std() for c in range(image.shape[2])] for image in images]
    np.testing.assert_allclose(found["per_image"]["mean"], np.mean(means, axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["per_image"]["std"], np.mean(stds, axis=0), rtol=1e-9)
    pixels_of_all = np.concatenate([image.reshape(-1, image.shape[2]) for image in images])
    np.testing.assert_allclose(found["per_pixel"]["mean"], pixels_of_all.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found["per_pixel"]["std"], pixels_of_all.std(axis=0), rtol=1e-9)
    assert found["count"] == 12 and found["classes"] == {"non-pathologic": 6, "pathologic": 6}
    assert sorted(found["sizes"]) == [[16, 16, 1], [32, 32, 9], [48, 48, 1], [72, 72, 1]]
    assert found["sizes"][0] == [32, 32, 9]
    json.dumps(found)  # plain numbers, ready for a file


def test_scan_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    index = odd_sizes(tmp_path)
    assert image_statistics(index, 1) == image_statistics(index, 4)


def test_scan_lists_every_unreadable_image(palm_root: Path) -> None:
    train = palm_root / "PALM-Training400"
    (train / "P0001.jpg").write_bytes(b"")
    (train / "N0002.jpg").write_bytes(b"<html>")
    (train / "H0001.jpg").write_bytes((train / "H0001.jpg").read_bytes()[:-40])
    index = load_index("palm", palm_root, "train")
    with pytest.raises(DataError, match="3 of 12 train image") as caught:
        within(30, lambda: image_statistics(index, 2))
    for text in ("P0001.jpg: the file is empty", "N0002.jpg: not an image", "H0001.jpg: the image is truncated"):
        assert text in str(caught.value)


def test_cached_statistics_are_used_for_the_same_files_only(palm_root: Path, tmp_path: Path) -> None:
    index = load_index("palm", palm_root, "train")
    cache = tmp_path / "statistics.json"
    first = cached_scan(index, 1, cache)
    cache.write_text(json.dumps({"train": {**first, "count": "from the cache"}}))
    assert cached_scan(index, 1, cache)["count"] == "from the cache"
    assert cached_scan(index.subset(range(11)), 1, cache)["count"] == 11
    path = palm_root / "PALM-Training400" / "P0001.jpg"
    os.utime(path, ns=(0, 0))
    assert cached_scan(index, 1, cache)["count"] == 12


def test_every_change_changes_the_key(palm_root: Path) -> None:
    index = load_index("palm", palm_root, "train")
    path = palm_root / "PALM-Training400" / "P0001.jpg"
    keys = [file_key(index), file_key(index.subset(range(11)))]
    relabelled = index.labels.copy()
    relabelled[0] = 1 - relabelled[0]
    keys.append(file_key(Index(**{**vars(index), "labels": relabelled})))
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes() + b"\0")
    os.utime(path, ns=times)
    keys.append(file_key(index))  # another size, the same time
    os.utime(path, ns=(0, 0))
    keys.append(file_key(index))
    assert len(set(keys)) == 5
    assert file_key(index) == keys[-1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"train": 3}', "\0"])
def test_a_broken_cache_counts_as_none(palm_root: Path, tmp_path: Path, content: str) -> None:
    cache = tmp_path / "statistics.json"
    cache.write_text(content)
    assert isinstance(read_cache(cache), dict)
    assert cached_scan(load_index("palm", palm_root, "train"), 1, cache)["count"] == 12


def test_examples_are_spread_over_each_class() -> None:
    index = array_index(np.array([0] * 12 + [1] * 3))
    assert index.examples(3) == {"a": [0, 4, 8], "b": [12, 13, 14], "c": []}
    many = array_index(np.array([[1, 0, 1], [0, 0, 1]]), task="multi-label")
    assert many.examples() == {"a": [0], "b": [], "c": [0, 1]}


# --- what is known about the data, without the checkout ----------------------------------------------


@pytest.mark.parametrize("name", ["palm", "covid", "oct", "medmnist"])
def test_the_package_knows_what_the_card_says(name: str) -> None:
    head, _, rest = (ROOT / "datasets" / name / "README.md").read_text(encoding="utf-8").partition("\n## ")
    rows = [line.strip("| ").split(" | ", 1) for line in head.splitlines() if line.startswith("| ")]
    module = importlib.import_module(f"paddle_medcls.data.datasets.{name}")
    assert module.ABOUT == {"title": head.partition("\n")[0].lstrip("# "), **{row[0]: row[1] for row in rows[1:]}}
    section = rest.partition("\n## Known faults\n")[2].partition("\n## ")[0].strip()
    assert list(module.KNOWN_FAULTS) == [" ".join(item.split()) for item in f"\n{section}".split("\n- ")[1:]]


def test_the_installed_package_alone_knows_licence_and_faults(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "paddle_medcls", tmp_path / "site" / "paddle_medcls")
    (tmp_path / "elsewhere").mkdir()
    code = """
from paddle_medcls.data.datasets import dataset_names, load_index
from paddle_medcls.evaluation.model_facts import dataset_card
for name in dataset_names():
    assert dataset_card(name)[0]["licence"], name
assert any("P0056 = V0163" in fault for fault in dataset_card("palm")[1])
load_index("palm", "nowhere", "train")
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=env, capture_output=True, text=True
    )
    last = done.stderr.splitlines()[-1]
    assert "IEEE DataPort" in last and "medcls prepare --dataset palm --archives DIR" in last, done.stderr

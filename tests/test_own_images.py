"""Own images: folders, tables, splits, the image list of a run, and the commands on them."""

from __future__ import annotations

import csv
import json
import os
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from fakes import pixels, within, write_image

import paddle_medcls as medcls
from paddle_medcls.cli import eval, prepare, train
from paddle_medcls.core.errors import DataError, WeightsError
from paddle_medcls.data.image_list import ImageList, Remark, read_image_list
from paddle_medcls.data.own_images import compared, own_images
from paddle_medcls.data.splits import stratified_parts
from paddle_medcls.deployment.trained_models import newest_weights
from paddle_medcls.recipes import get_recipe, own

TINY = ["--model", "toy", "--set", "size_px=16", "--epochs", "1", "--device", "cpu"]


def class_folders(root: Path, counts: dict[str, int], inside: str = "") -> Path:
    """One sub-folder a class; each file is its own image, of a patient with two: `A/p0_0.png`, `A/p0_1.png`."""
    for k, (name, count) in enumerate(counts.items()):
        for number in range(count):
            file = f"p{k}{number // 2}_{number % 2}.png"
            write_image(root / inside / name / file, pixels(1000 * k + number, 60 + 60 * k, 16))
    return root


def table_of(root: Path, text: str | bytes, name: str = "labels.csv") -> Path:
    """A table beside four images `scans/a.png` to `scans/d.png`."""
    for k, letter in enumerate("abcd"):
        write_image(root / "scans" / f"{letter}.png", pixels(k, 60 + 30 * k, 16))
    path = root / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def labels_of(images: ImageList) -> list[str]:
    return [images.label_text(row) for row in range(len(images))]


def whats(images: ImageList) -> str:
    return "\n".join(remark.what for remark in images.remarks)


# --- splits ------------------------------------------------------------------------------------------


def test_stratified_parts_without_patients_have_the_share_of_each_class() -> None:
    labels = np.repeat([0, 1, 2], [100, 40, 3])
    parts = stratified_parts(labels, [f"i{row}" for row in range(143)], (0.7, 0.1, 0.2), seed=3)
    counts = [np.bincount(parts[labels == label], minlength=3).tolist() for label in range(3)]
    assert counts == [[70, 10, 20], [28, 4, 8], [1, 1, 1]]  # of three images each part gets one
    assert parts.tolist() != stratified_parts(labels, [f"i{row}" for row in range(143)], (0.7, 0.1, 0.2), 4).tolist()


def test_stratified_parts_keep_patients_together() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.random((600, 4)) < [0.5, 0.3, 0.05, 0.02]).astype(int)  # several labels an image, some with none
    groups = [f"p{k}" for k in rng.integers(0, 150, 600)]
    for shares in ((0.2,) * 5, (0.7, 0.1, 0.2)):
        parts = stratified_parts(labels, groups, shares)
        assert all(len({part for part, one in zip(parts, groups) if one == name}) == 1 for name in set(groups))
        for label in range(4):
            found = np.bincount(parts[labels[:, label] == 1], minlength=len(shares))
            assert (abs(found - np.array(shares) * labels[:, label].sum()) <= 4).all()
        assert (abs(np.bincount(parts) - np.array(shares) * 600) <= 12).all()


def test_splits_that_are_made(tmp_path: Path) -> None:
    root = class_folders(tmp_path, {"b": 20, "a10": 20, "a2": 10})
    images = own_images(root, patient_pattern=r"/(p\d+)_")
    assert images.classes == ("a2", "a10", "b") and images.task == "multi-class"
    assert [images.index(split).counts() for split in images.names] == [
        {"a2": 6, "a10": 14, "b": 14},  # five patients of a2 with two images each: each split has one of them
        {"a2": 2, "a10": 2, "b": 2},
        {"a2": 2, "a10": 4, "b": 4},
    ]
    splits: dict[str, set[str]] = {}
    for patient, split in zip(images.patients, images.splits):
        splits.setdefault(patient, set()).add(split)
    assert len(splits) == 25 and all(len(found) == 1 for found in splits.values())
    assert own_images(root, patient_pattern=r"/(p\d+)_").splits == images.splits
    assert own_images(root, patient_pattern=r"/(p\d+)_", seed=1).splits != images.splits
    assert set(images.for_folds().splits) == {"train"} and images.made == ("train", "val", "test")
    assert not images.remarks and "patients are not known" in whats(own_images(root))


def test_a_given_training_split_gives_its_validation(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 16, "b": 16}, "Training")
    class_folders(tmp_path, {"a": 3, "b": 3}, "test")
    write_image(tmp_path / "notes" / "x.png", pixels(1))
    images = own_images(tmp_path)
    assert [len(images.index(split)) for split in images.names] == [28, 4, 6]
    assert {path.split("/")[0] for path in images.index("val").ids} == {"Training"} and images.made == ("val",)
    folds = images.for_folds()
    assert [len(folds.index(split)) for split in folds.names] == [32, 6]
    assert "1 folder(s) beside the splits were not used" in whats(images)


def test_given_splits_are_used_and_their_patients_checked(tmp_path: Path) -> None:
    for split, names in {"train": "ab", "valid": "cd"}.items():
        for name in names:
            for kind in "xy":
                write_image(tmp_path / split / kind / f"{name}.png", pixels(ord(name) + ord(kind)))
    shutil.move(tmp_path / "valid" / "y" / "d.png", tmp_path / "valid" / "y" / "b.png")
    images = own_images(tmp_path, patient_pattern=r"(\w)\.png")
    assert images.names == ("train", "val") and images.origin["splits"] == "as given"
    assert [str(remark) for remark in images.remarks] == [
        "warning: 1 patient(s) are in two splits; results may be too high\n  b"
    ]
    shutil.rmtree(tmp_path / "train")
    with pytest.raises(DataError, match="of the splits only val is given, and no train"):
        own_images(tmp_path)


def test_classes_that_a_split_lacks(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 4, "b": 4}, "train")
    class_folders(tmp_path, {"a": 2}, "val")
    assert "the val split lacks 1 class(es)" in whats(own_images(tmp_path))
    class_folders(tmp_path, {"c": 2}, "val")
    with pytest.raises(DataError, match="the train split lacks 1 class") as error:
        own_images(tmp_path)
    assert "  c\n" in str(error.value)


# --- folders -----------------------------------------------------------------------------------------


def test_the_lists_of_paddleclas(tmp_path: Path) -> None:
    for k in range(8):
        write_image(tmp_path / "im ages" / f"{k}.png", pixels(k))
    (tmp_path / "labels.txt").write_text("zebra\nno such\nant\n")
    (tmp_path / "train_list.txt").write_text("".join(f"./im ages/{k}.png {2 * (k % 2)}\n" for k in range(4)))
    (tmp_path / "val_list.txt").write_text("".join(f"im ages/{k}.png\t{2 * (k % 2)}\n" for k in range(4, 8)))
    images = own_images(tmp_path)
    assert images.classes == ("zebra", "ant") and images.names == ("train", "val")
    assert labels_of(images) == ["zebra", "ant"] * 4 and "1 class(es) of labels.txt have no images" in whats(images)
    (tmp_path / "labels.txt").unlink()
    assert own_images(tmp_path).classes == ("0", "2")
    (tmp_path / "val_list.txt").write_text("../x.png 0\nim ages/4.png zebra\n")
    with pytest.raises(DataError, match="2 faulty line") as error:
        own_images(tmp_path)
    assert "val_list.txt, line 2: 'im ages/4.png zebra'" in str(error.value)


@pytest.mark.parametrize(
    "counts, message",
    [
        ({"a": 3, "b": 1}, "'b' has one image"),
        ({"a": 3}, "1 classes, where at least two"),
        ({"Normal": 2, "normal": 2}, "'Normal' (2), 'normal' (2)"),
        ({"lung opacity": 2, "lungopacity": 2}, "the same but for case or blanks"),
        ({"a;b": 2, "c": 2}, "'a;b' is no class name"),
        ({"=1+1": 2, "c": 2}, "would be one in a spreadsheet"),
        ({}, "no sub-folders with images"),
    ],
)
def test_folders_that_are_refused(tmp_path: Path, counts: dict[str, int], message: str) -> None:
    class_folders(tmp_path, counts)
    with pytest.raises(DataError) as error:
        own_images(tmp_path)
    assert message in str(error.value)


def test_nothing_in_a_folder_is_left_out_silently(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "größe 中": 3})
    write_image(tmp_path / "beside.png", pixels(1))
    (tmp_path / "empty").mkdir()
    (tmp_path / "a" / "scan.heic").write_bytes(b"x")
    (tmp_path / "a" / ".DS_Store").write_bytes(b"x")
    images = own_images(tmp_path)
    assert Remark("1 file(s) of other kinds were not used", ("a/scan.heic",)) in images.remarks
    assert images.classes == ("a", "größe 中") and images.task == "binary"
    assert Remark("1 folder(s) in " + tmp_path.name + " hold no images", ("empty",)) in images.remarks
    assert "1 image(s) beside the class folders have no class and were not used" in whats(images)
    write_image(tmp_path / "a" / "masks" / "p0_0.png", pixels(1))
    with pytest.raises(DataError, match="1 folder.s. hold masks"):
        own_images(tmp_path)


def test_one_file_under_two_names_is_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 3, "b": 3})
    os.symlink(tmp_path / "a" / "p00_0.png", tmp_path / "b" / "link.png")
    with pytest.raises(DataError, match="1 image.s. .* are there twice") as error:
        own_images(tmp_path)
    assert "b/link.png, which is also a/p00_0.png" in str(error.value)


def test_copies_are_found_before_the_training(tmp_path: Path) -> None:
    class_folders(tmp_path, {"a": 8, "b": 8}, "train")
    class_folders(tmp_path, {"a": 2, "b": 2}, "val")  # the first images of the training split again
    images = compared(own_images(tmp_path), 1)
    assert "4 pair(s) of the same or nearly the same image are in two splits" in whats(images) and images.compared
    folds = images.for_folds()  # other splits: compared again
    assert not folds.compared and "same image" not in whats(folds)
    again = whats(compared(folds, 1))
    assert "nearly the same image are in one split" in again and "nearly the same image are in two" not in again
    shutil.copy(tmp_path / "train" / "a" / "p00_0.png", tmp_path / "train" / "b" / "other.png")
    with pytest.raises(DataError, match="pair.s. of the same image have two labels"):
        compared(own_images(tmp_path), 1)
    (tmp_path / "train" / "b" / "other.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="1 of 21 image.s. cannot be read"):
        compared(own_images(tmp_path), 1)


# --- tables ------------------------------------------------------------------------------------------

ROWS = "scans/a.png,ill,1\nscans/b.png,well,2\nscans/c.png,ill,3\nscans/d.png,well,4\n"
GERMAN = "Datei;Label\nscans/a.png;größer\nscans/b.png;kleiner\nscans/c.png;größer\nscans/d.png;kleiner\n"


@pytest.mark.parametrize(
    "content, expected",
    [
        ("path,label,patient_id\n" + ROWS, ["ill", "well", "ill", "well"]),
        ("\ufeffImage Path, Diagnosis ,case\n" + ROWS.replace(",", " , "), ["ill", "well", "ill", "well"]),
        ("file\tclass\tx\n" + ROWS.replace(",", "\t"), ["ill", "well", "ill", "well"]),
        ("file,class,x\r\n" + ROWS.replace("\n", "\r\n") + "\r\n,,\r\n", ["ill", "well", "ill", "well"]),
        (("image,class,x\n" + ROWS).encode("utf-16"), ["ill", "well", "ill", "well"]),
        ("image,label,x\n" + ROWS.replace("scans/", "").replace(".png", ""), ["ill", "well", "ill", "well"]),
        ("image,label,x\n" + ROWS.replace("scans/", "scans\\"), ["ill", "well", "ill", "well"]),
        ("image,label\na,1\nb,2.0\nc,1.0\nd,2\n", ["1", "2", "1", "2"]),
        ("image,label\na,1\nb,2.5\nc,1\nd,2.5\n", ["1", "2.5", "1", "2.5"]),
        ('image,findings\na,x;y\nb, y ;x;y\nc,\nd,"x; "\n', ["x;y", "x;y", "", "x"]),
        ("image;findings\na;'x'\nb;'y'\nc;'x'\nd;'y'\n", ["'x'", "'y'", "'x'", "'y'"]),
    ],
)
def test_tables_as_spreadsheets_write_them(tmp_path: Path, content: str | bytes, expected: list[str]) -> None:
    path = table_of(tmp_path, content)
    images = own_images(tmp_path, path)
    assert labels_of(images) == expected and images.paths == tuple(f"scans/{letter}.png" for letter in "abcd")
    assert images.task == ("multi-label" if "" in expected else "binary")
    assert own_images(tmp_path / "scans", path).folder == (
        tmp_path / "scans" if "scans" not in str(content) and isinstance(content, str) else tmp_path
    )


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "gb2312"])
def test_tables_in_other_encodings(tmp_path: Path, encoding: str) -> None:
    text = GERMAN if encoding != "gb2312" else GERMAN.replace("größer", "患病").replace("kleiner", "正常")
    images = own_images(tmp_path, table_of(tmp_path, text.encode(encoding)), {"path": "Datei"})
    assert labels_of(images)[0] == ("größer" if encoding != "gb2312" else "患病")
    assert (f"was read as {encoding}" in whats(images)) == (encoding != "utf-8")


def test_images_that_no_row_names(tmp_path: Path) -> None:
    images = own_images(tmp_path, table_of(tmp_path, "path,label\na,x\nb,y\nc,x\nscans/d.png,y\n"))
    assert "not used" not in whats(images)
    write_image(tmp_path / "scans" / "e.png", pixels(9))
    images = own_images(tmp_path, tmp_path / "labels.csv")
    assert Remark("1 image(s) beside the listed ones were not used", ("scans/e.png",)) in images.remarks


def test_columns_patients_splits_and_grades(tmp_path: Path) -> None:
    text = "path,label,scan,severity,person,fold set\n" + "".join(
        f"x,y,{letter},{grade},{person},{split}\n"
        for letter, grade, person, split in zip("abcd", ["mild", "severe"] * 2, [" 7", "7.0", "8", ""], ["TRAIN"] * 4)
    )
    path = table_of(tmp_path, text)
    columns = {"path": "scan", "label": "severity", "patient": "person", "split": "fold set"}
    with pytest.raises(DataError, match="'moderate' of --ordinal has no image"):
        own_images(tmp_path, path, columns, ("mild", "moderate", "severe"))
    images = own_images(tmp_path, path, columns, ("severe", "mild"))
    assert images.task == "ordinal" and images.classes == ("severe", "mild") and images.labels.tolist() == [1, 0, 1, 0]
    assert images.patients == ("7", "7", "8", "") and "1 image(s) have no patient" in whats(images)
    assert images.splits[0] == images.splits[1] and images.made == ("val",)


@pytest.mark.parametrize(
    "content, columns, message",
    [
        ("path,label\nscans/a.png,x\nscans/none.png,y\ngone.png,x\n", {}, "2 of 3 image(s) cannot be found"),
        ("path,label\nscans/a.png,x\n../a.png,y\n", {}, "'../a.png' is no path in the folder of the images"),
        ("path,label\nscans/a.png,x\n/etc/hostname,y\n", {}, "'/etc/hostname' is no path in the folder"),
        ("path,label\na,x\nscans/a.png,y\nb,x\nc,y\n", {}, "scans/a.png, listed twice"),
        ("path,label\na,x\nb,\nc,x\nd,y\n", {}, "row 3: no label"),
        ("path,label,split\na,x,train\nb,y,train\nc,x,\nd,y,outer\n", {}, "row 5: 'outer' is no split"),
        ("path,label\na,=A1\nb,y\n", {}, "row 2, column label: '=A1' is a formula"),
        ("path,label\na,x\x07\nb,y\n", {}, "has control characters"),
        ("path,label\na,x,1\nb,y\n", {}, "row 2: 3 cells, not 2"),
        ("path,label,path\na,x,1\n", {}, "column 'path' occurs twice"),
        ("scan,label\na,x\n", {}, "no column for path, which is usually called path, file"),
        ("scan,label\na,x\n", {"path": "scans"}, "path=scans"),
        ("path,label,class\na,x,y\n", {}, "label: label or class?"),
        ("path,label\n" + 300 * "a" + ",x\nb,y\n", {}, "does not exist"),
        ("path,label\n", {}, "holds no rows"),
        ("", {}, "holds no rows"),
        (b"\x00\x01\xff\xfe\x9d", {}, "its text is in no known encoding"),
        ('path,label\n"a,x\n', {}, "cannot be read: unexpected end of data"),
        ("path,label\na,x\nb,X \nc,x\nd,y\n", {}, "the same but for case or blanks: 'X' (1), 'x' (2)"),
    ],
)
def test_tables_that_are_refused(tmp_path: Path, content: str | bytes, columns: dict, message: str) -> None:
    with pytest.raises(DataError) as error:
        own_images(tmp_path, table_of(tmp_path, content), columns)
    assert message in str(error.value)


def test_excel(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    table_of(tmp_path, "")
    book = openpyxl.Workbook()
    for row in (
        ["file", "grade", "patient", None],
        *([f"{k}.png", n, 7.0, None] for k, n in zip("abcd", [1, 2.0] * 2)),
    ):
        book.active.append(row)
    book.active["Z40"] = " "
    book.save(tmp_path / "t.xlsx")
    images = own_images(tmp_path, tmp_path / "t.xlsx")
    assert labels_of(images) == ["1", "2", "1", "2"] and set(images.patients) == {"7"}
    book.create_sheet("more")
    book.save(tmp_path / "t.xlsx")
    assert "only its first sheet 'Sheet' was read, not 'more'" in whats(own_images(tmp_path, tmp_path / "t.xlsx"))
    book.active["B2"] = "=1+1"
    book.save(tmp_path / "t.xlsx")
    with pytest.raises(DataError, match="row 2, column grade: '=1.1' is a formula"):
        own_images(tmp_path, tmp_path / "t.xlsx")
    (tmp_path / "t.xlsx").write_bytes(b"PK\x03\x04 no archive")
    with pytest.raises(DataError, match="t.xlsx cannot be read: File is not a zip file"):
        own_images(tmp_path, tmp_path / "t.xlsx")


def test_names_from_a_mac_are_the_same_names(tmp_path: Path) -> None:
    write_image(tmp_path / unicodedata.normalize("NFD", "é.png"), pixels(0))
    path = table_of(tmp_path, "path,label\né.png,x\na,y\nb,x\nc,y\n")
    assert own_images(tmp_path, path).paths[0] == unicodedata.normalize("NFD", "é.png")


@pytest.mark.parametrize(
    "pattern, message",
    [("p(", "is no regular expression"), ("p", "has no group"), (r"a/p(\d+)", "finds no patient in 4 path")],
)
def test_faulty_patterns(tmp_path: Path, pattern: str, message: str) -> None:
    class_folders(tmp_path, {"a": 4, "b": 4})
    with pytest.raises(DataError, match=message):
        own_images(tmp_path, patient_pattern=pattern)


# --- the image list ----------------------------------------------------------------------------------


def listed(folder: Path) -> Path:
    """The list of six images, written."""
    return own_images(class_folders(folder / "images", {"a": 3, "b": 3})).write(folder / "run")


def test_a_list_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = table_of(tmp_path, "path,findings,patient\na,x;y,1\nb,y,1\nc,,2\nd,x,3\n")
    images = own_images(tmp_path, path)
    found = read_image_list(images.write(tmp_path / "run"))
    assert labels_of(found) == labels_of(images) and (found.labels == images.labels).all()
    for name in ("folder", "paths", "patients", "splits", "classes", "task", "origin", "remarks", "compared"):
        assert getattr(found, name) == getattr(images, name), name
    text = (tmp_path / "run" / "images.csv").read_text()
    (tmp_path / "run" / "images.csv").write_bytes(text.replace(",", ";").replace("x;y", '"x;y"').encode("utf-8-sig"))
    assert labels_of(read_image_list(tmp_path / "run" / "images.csv")) == labels_of(images)  # saved by a spreadsheet
    shutil.move(tmp_path / "scans", tmp_path / "moved" / "scans")
    with pytest.raises(DataError, match="4 of 4 image.s. in images.csv are missing"):
        read_image_list(tmp_path / "run" / "images.csv")
    assert len(read_image_list(tmp_path / "run" / "images.csv", tmp_path / "moved")) == 4


HOSTILE_LISTS: dict[str, tuple[str, str]] = {  # title -> what is replaced in images.csv, and by what
    "a path that leaves the folder": ("a/p00_0.png", "../images/a/p00_0.png"),
    "an absolute path": ("a/p00_0.png", "/etc/hostname"),
    "a path with a dot": ("a/p00_0.png", "./a/p00_0.png"),
    "an image twice": ("a/p00_0.png", "a/p00_1.png"),
    "an image that is missing": ("a/p00_0.png", "a/none.png"),
    "a folder in place of an image": ("a/p00_0.png", "a"),
    "an unknown class": ("png,a,", "png,c,"),
    "an unknown split": ("train", "outer"),
    "a formula": ("png,a,", "png,=a,"),
    "another column": ("patient", "person"),
    "a cell more": ("png,a,", "png,a,,"),
    "an escape sequence": ("png,a,", "png,\x1b[2J,"),
}
HOSTILE_FACTS: dict[str, object] = {  # title -> field of images.json and its value
    "no kind": {"kind": None},
    "a relative folder": {"folder": "images"},
    "an unknown task": {"task": "regression"},
    "one class": {"classes": ["a"]},
    "a class twice": {"classes": ["a", "a"]},
    "a class that is a number": {"classes": ["a", 1]},
    "three classes of a binary task": {"classes": ["a", "b", "c"]},
    "a class with an escape sequence": {"classes": ["a", "\x1b[2J"]},
    "an unknown field": {"run": "x"},
    "remarks that are no list": {"remarks": "x"},
    "a remark without a text": {"remarks": [{"what": 1, "items": []}]},
    "a remark with another field": {"remarks": [{"what": "x", "items": [], "more": 1}]},
    "an origin that is a number": {"origin": {"labels": 1}},
}

CUT_FACTS = {"images.json is cut": "{", "images.json is a list": "[]"}


def hostile_list(folder: Path, title: str) -> Path:
    """A faulty image list; its title is one of those above, or that of a damaged `images.json`."""
    path = listed(folder)
    facts = path.with_name("images.json")
    if title in HOSTILE_LISTS:
        path.write_text(path.read_text().replace(*HOSTILE_LISTS[title], 1))
    elif title in HOSTILE_FACTS:
        facts.write_text(json.dumps({**json.loads(facts.read_text()), **HOSTILE_FACTS[title]}))
    else:
        facts.write_text(CUT_FACTS[title])
    return path


@pytest.mark.parametrize("title", [*HOSTILE_LISTS, *HOSTILE_FACTS, *CUT_FACTS])
def test_hostile_lists_are_refused(tmp_path: Path, title: str) -> None:
    path = hostile_list(tmp_path, title)
    with pytest.raises(DataError) as error:
        within(10, lambda: read_image_list(path))
    assert "\x1b" not in str(error.value)


def test_the_unchanged_list_is_not_refused(tmp_path: Path) -> None:
    assert len(read_image_list(listed(tmp_path))) == 6  # so each of the faults above is what is refused


# --- the recipe --------------------------------------------------------------------------------------


def index_of(counts: Sequence[int], task: str = "multi-class"):
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.eye(len(counts), dtype=np.int64)[labels] if task == "multi-label" else labels
    names = tuple(f"i{k}" for k in range(len(labels)))
    folder = Path("none")
    images = ImageList(
        folder, names, labels, ("",) * len(names), ("train",) * len(names), tuple("abcd"[: len(counts)]), task, {}
    )
    return images.index("train")


def test_the_recipe_follows_the_images() -> None:
    few, many = (own.for_images(own.OWN, index_of([count, count])) for count in (100, 5000))
    assert few.batch_size < many.batch_size and few.epochs > many.epochs and few.loss == "softmax"
    assert own.for_images(own.OWN, index_of([100, 10])).class_weights == "balanced" and few.class_weights == "none"
    several = own.for_images(own.OWN, index_of([100, 10], "multi-label"))
    assert (several.loss, several.class_weights) == ("sigmoid", "none")
    assert few.monitor == "loss"  # on few images the AUC is 1 at once, and stays
    assert own.OWN.augmentation.flip == own.OWN.augmentation.flip_vertical == 0  # left and right mean something
    palm = get_recipe("palm", "table")
    assert (palm.dataset, palm.targets, palm.size_px if hasattr(palm, "size_px") else 128) == ("table", (), 128)


# --- the commands ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on own images in `images`, by the command."""
    folder = tmp_path_factory.mktemp("own")
    root = class_folders(folder / "images", {"a": 12, "b": 12})
    arguments = [
        "--dataset",
        "folder",
        "--data-root",
        root,
        "--patient-pattern",
        r"/(p\d+)_",
        "--output",
        folder / "run",
    ]
    assert train.main([*map(str, arguments), *TINY]) == 0
    return folder / "run"


def test_a_run_keeps_its_images_and_splits(trained: Path, tmp_path: Path, capsys) -> None:
    images = read_image_list(trained / "images.csv")
    assert images.compared and [len(images.index(split)) for split in images.names] == [16, 4, 4]
    sidecar = json.loads((trained / "MODEL.json").read_text())
    assert (sidecar["dataset"], sidecar["classes"], sidecar["task"]) == ("folder", ["a", "b"], "binary")
    assert json.loads((trained / "data.json").read_text())["data_root"] == str(trained / "images.csv")
    card = (trained / "README.md").read_text()
    assert "found in the paths by" in card and "ask the owner of the images" in card and "Changed from" in card
    assert train.main(["--resume", str(trained)]) == 0
    arguments = ["--dataset", "folder", "--data-root", trained / "images.csv", "--output", tmp_path / "second"]
    assert train.main([*map(str, arguments), *TINY, "--seed", "1"]) == 0
    assert (tmp_path / "second" / "images.csv").read_text() == (trained / "images.csv").read_text()
    shown = capsys.readouterr().err  # the warnings of the list are said by each new run, and kept
    assert ("same image" in shown) == any("same image" in remark.what for remark in images.remarks)


def test_evaluation_uses_the_run_s_splits_wherever_its_images_are(trained: Path, tmp_path: Path, capsys) -> None:
    run = shutil.copytree(trained, tmp_path / "run")
    assert eval.main(["--weights", str(run), "--output", str(tmp_path / "here")]) == 0
    shutil.copytree(trained.parent / "images", tmp_path / "images")
    assert (
        eval.main(["--weights", str(run), "--data-root", str(tmp_path / "images"), "--output", str(tmp_path / "b")])
        == 0
    )
    rows = [(tmp_path / name / "predictions_test.csv").read_text() for name in ("here", "b")]
    assert rows[0] == rows[1] and len(rows[0].splitlines()) == 5 and "over 2 patients" in capsys.readouterr().out
    (run / "images.csv").unlink()
    assert eval.main(["--weights", str(run), "--data-root", str(tmp_path / "images")]) == 1
    assert "images.csv of its run is not beside it" in capsys.readouterr().err


def test_evaluation_on_images_of_another_origin(trained: Path, tmp_path: Path, capsys) -> None:
    path = table_of(tmp_path, "image;diagnosis\na;b\nb;b\nc;b\nd;b\n")
    arguments = ["--weights", trained, "--dataset", "table", "--data-root", tmp_path, "--labels", path]
    assert eval.main([*map(str, arguments), "--output", str(tmp_path / "out")]) == 0
    with open(tmp_path / "out" / "predictions_test.csv") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["1"] * 4
    path.write_text("image;diagnosis\na;c\nb;b\n")
    assert eval.main([*map(str, arguments)]) == 1
    assert "the model does not know 1 class(es)\n  c\n" in capsys.readouterr().err


def test_classes_are_matched_by_name() -> None:
    index = index_of([2, 1])
    images = ImageList(Path(), index.ids, index.labels, ("",) * 3, ("test",) * 3, ("a", "b"), "binary", {})
    assert images.matched(("b", "c", "a"), "multi-class").labels.tolist() == [2, 2, 0]
    assert images.matched(("b", "a"), "multi-label").labels.tolist() == [[0, 1], [0, 1], [1, 0]]
    several = ImageList(Path(), ("x",), np.array([[1, 1]]), ("",), ("test",), ("a", "b"), "multi-label", {})
    assert several.matched(("b", "c", "a"), "multi-label").labels.tolist() == [[1, 0, 1]]
    with pytest.raises(DataError, match="several labels"):
        several.matched(("a", "b"), "binary")


def test_prepare_writes_a_list_that_train_takes(tmp_path: Path, capsys) -> None:
    root = class_folders(tmp_path / "images", {"a": 6, "b": 6, "c": 6})
    arguments = ["--dataset", "folder", "--data-root", str(root), "--workers", "1"]
    assert prepare.main([*arguments, "--split", "--stats", "--check", "--seed", "3"]) == 0
    shown = capsys.readouterr().out
    assert "images.csv and images.json written" in shown and "18 images" in shown and "patients are not known" in shown
    assert read_image_list(root / "images.csv").splits == own_images(root, seed=3).splits
    assert train.main(["--dataset", "folder", "--data-root", str(root)]) == 1  # which splits?
    assert "the folder holds a list of its images" in capsys.readouterr().err
    assert prepare.main([*arguments, "--split"]) == 0  # made again
    assert read_image_list(root / "images.csv").splits == own_images(root).splits


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--dataset", "folder"], "pass --data-root with the folder of your images"),
        (["--dataset", "folder", "--data-root", "gone"], "the folder of the images does not exist"),
        (["--dataset", "table", "--data-root", "IMAGES"], "--dataset table takes --labels FILE"),
        (["--dataset", "folder", "--data-root", "IMAGES", "--labels", "x.csv"], "--dataset folder takes the names"),
        (["--dataset", "palm", "--labels", "x.csv"], "--labels: for a folder of own images"),
        (["--dataset", "palm", "--split-seed", "1"], "--split-seed: for a folder of own images"),
        (["--dataset", "folder", "--data-root", "IMAGES", "--download"], "are for published data sets"),
        (["--dataset", "folder", "--data-root", "IMAGES", "--recipe", "palm"], "fix        --set loss=softmax"),
        (["--recipe", "own", "--data-root", "gone"], "the folder of the images does not exist"),
    ],
)
def test_options_that_do_not_fit(arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    class_folders(tmp_path / "IMAGES", {"a": 4, "b": 4, "c": 4})
    assert train.main(arguments) == 1
    assert message in capsys.readouterr().err


def test_a_notebook_does_what_the_commands_do(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "images", {"a": 6, "b": 6})
    images = medcls.own_images(root)
    assert medcls.load_dataset("folder", "val", root).ids == images.index("val").ids
    recipe = medcls.get_recipe("own", images).with_epochs(1).replace(model="toy", size_px=16)
    run = medcls.train(recipe, images, tmp_path / "run", medcls.Options(device="cpu", workers=1))
    assert medcls.evaluate(run.weights).index.ids == images.index("test").ids
    other = medcls.own_images(root, seed=None)
    assert medcls.evaluate(run.weights, data_root=other).metrics["n"] == 12


def test_two_sets_of_own_images_are_not_taken_for_one(trained: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shutil.copytree(trained, tmp_path / name)
    assert newest_weights(tmp_path).name == "MODEL.pdparams"
    sidecar = tmp_path / "two" / "MODEL.json"
    sidecar.write_text(sidecar.read_text().replace('"b"', '"c"'))
    with pytest.raises(WeightsError, match="trained models of 2 data sets"):
        newest_weights(tmp_path)


@pytest.mark.slow
def test_two_processes_share_one_list(trained: Path, tmp_path: Path) -> None:
    """The list is written once, and each process reads it."""
    arguments = ["--dataset", "folder", "--data-root", trained.parent / "images", "--output", tmp_path / "run"]
    assert train.main([*map(str, arguments), *TINY, "--model", "resnet18", "--processes", "2"]) == 0
    assert len(read_image_list(tmp_path / "run" / "images.csv")) == 24

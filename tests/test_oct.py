"""OCT2017: folders, patients, and a validation split with complete patients."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from paddle_medcls.core.errors import DataError
from paddle_medcls.data.datasets import load_index
from paddle_medcls.data.datasets.oct import CLASSES, patient_of
from paddle_medcls.data.duplicates import check_images
from paddle_medcls.data.splits import split_groups

REAL = os.environ.get("MEDCLS_TEST_DATA")


def make(root, split, patients, scans=3):
    image = cv2.imencode(".jpeg", np.zeros((8, 12, 3), np.uint8))[1].tobytes()
    for number, name in enumerate(CLASSES):
        for patient in range(patients):
            for scan in range(scans):
                path = root / "OCT2017" / split / name / f"{name}-{1000 * number + patient}-{scan}.jpeg"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(image)


def test_validation_takes_whole_patients_of_every_class(tmp_path):
    make(tmp_path, "train", 20)
    train, val = (load_index("oct", tmp_path, split) for split in ("train", "val"))
    assert len(train) + len(val) == 4 * 20 * 3
    assert not set(train.groups) & set(val.groups)
    assert val.counts() == dict.fromkeys(CLASSES, 6)  # a tenth of 20 patients, 3 scans each
    assert load_index("oct", tmp_path, "val").ids == val.ids


def test_a_patient_with_two_classes_stays_together():
    labels = np.array([0, 0, 1, 1, 0, 1])
    groups = ("a", "a", "a", "b", "c", "d")
    train, held = split_groups(labels, groups, 0.2)
    assert not {groups[row] for row in train} & {groups[row] for row in held}
    assert sorted(train + held) == list(range(6))


def test_shipped_split_is_the_folder(tmp_path):
    make(tmp_path, "train", 4)
    make(tmp_path, "val", 1)
    val = load_index("oct", tmp_path, "val", "shipped")
    assert len(val) == 12 and all("/val/" in name for name in val.ids)
    assert len(load_index("oct", tmp_path, "train", "shipped")) == 48


def test_names_without_a_patient(tmp_path):
    assert patient_of("CNV-1016042-1.jpeg") == "1016042"
    with pytest.raises(DataError, match="'scan.jpeg' contains no patient"):
        patient_of("scan.jpeg")


def test_check_lists_patients_in_two_splits(tmp_path):
    make(tmp_path, "train", 6)
    make(tmp_path, "test", 2)  # the same patients' numbers again
    found = check_images([load_index("oct", tmp_path, split) for split in ("train", "test")], 1)
    assert set(found.patients) <= {f"patient {1000 * k + n}: train, test" for k in range(4) for n in range(2)}
    assert len(found.patients) >= 4
    assert check_images([load_index("oct", tmp_path, split) for split in ("train", "val")], 1).patients == []


def test_missing_class_and_missing_folder(tmp_path):
    with pytest.raises(DataError, match="no folder test"):
        load_index("oct", tmp_path, "test")
    make(tmp_path, "test", 1)
    for path in (tmp_path / "OCT2017/test/DME").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="no scans of DME"):
        load_index("oct", tmp_path, "test")


@pytest.mark.data
@pytest.mark.skipif(not REAL, reason="MEDCLS_TEST_DATA is not set")
def test_real_scans():
    index = load_index("oct", Path(REAL or "") / "oct2017", "val", "shipped")
    assert index.counts() == dict.fromkeys(CLASSES, 8)
    assert len(set(index.groups)) < 32  # NORMAL-5246808-1 and -2 are one patient's

"""Archives as each source serves them, with a few small images: names, top folders, trailing blanks, rubbish beside."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas
from fakes import COVID_FOLDERS, pixels

from paddle_medcls.data.datasets.oct import CLASSES


def encoded(suffix: str, seed: int, level: int = 128) -> bytes:
    return cv2.imencode(suffix, np.ascontiguousarray(pixels(seed, level)))[1].tobytes()


def zipped(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return data.getvalue()


def tarred(members: dict[str, bytes], mode: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return data.getvalue()


def workbook(columns: dict) -> bytes:
    """An Excel file of one sheet."""
    data = io.BytesIO()
    pandas.DataFrame(columns).to_excel(data, index=False)
    return data.getvalue()


def covid_kaggle(count: int = 10) -> dict[str, bytes]:
    """archive.zip of tawsifurrahman/covid19-radiography-database."""
    top = "COVID-19_Radiography_Dataset"
    members = {f"{top}/README.md.txt": b"citation"}
    for label, folder in enumerate(COVID_FOLDERS["kaggle"]):
        names = [f"{folder}-{number}" for number in range(1, count + 1)]
        url = "https://www.kaggle.com/c/rsna-pneumonia-detection-challenge/data"
        table = {"FILE NAME": names, "FORMAT": "PNG", "SIZE": "256*256", "URL": url}
        members[f"{top}/{folder}.metadata.xlsx"] = workbook(table)
        for number in range(1, count + 1):
            image = encoded(".png", 100 * label + number, 40 + 55 * label)
            members[f"{top}/{folder}/images/{folder}-{number}.png"] = image
            members[f"{top}/{folder}/masks/{folder}-{number}.png"] = image
    return {"archive.zip": zipped(members)}


def _oct(top: str, splits: dict[str, int]) -> dict[str, bytes]:
    members = {}
    for split, patients in splits.items():
        for label, name in enumerate(CLASSES):
            for patient in range(patients):
                file = f"{name}-{1000 * (label + 1) + patient}-1.jpeg"
                members[f"{top}/{split}/{name}/{file}"] = encoded(".jpeg", 50 * label + patient, 40 + 55 * label)
    return members


OCT_SPLITS = {"train": 10, "val": 1, "test": 2}


def oct_kaggle() -> dict[str, bytes]:
    """archive.zip of paultimothymooney/kermany2018: a blank at the end of the folder, and the whole set twice."""
    members = _oct("OCT2017 ", OCT_SPLITS) | _oct("oct2017/OCT2017 ", OCT_SPLITS)
    members["__MACOSX/OCT2017 /train/CNV/._CNV-1000-1.jpeg"] = b"resource fork"
    members["OCT2017 /.DS_Store"] = b"rubbish"
    return {"archive.zip": zipped(members)}


def oct_mendeley(name: str = "OCT2017.tar.gz", mode: str = "w:gz") -> dict[str, bytes]:
    """OCT2017.tar.gz of the second version at Mendeley; macOS's tar keeps files of its own beside the images."""
    members = _oct("OCT2017", OCT_SPLITS)
    members["OCT2017/train/CNV/._CNV-1000-1.jpeg"] = b"resource fork"
    return {name: tarred(members, mode)}


def oct_zhang_lab() -> dict[str, bytes]:
    """ZhangLabData.zip of the third version: no val, and chest films beside, which have a class NORMAL too."""
    members = _oct("CellData/OCT", {"train": 10, "test": 2})
    for split in ("train", "test"):
        members[f"CellData/chest_xray/{split}/NORMAL/NORMAL-1-0001.jpeg"] = encoded(".jpeg", 1)
        members[f"CellData/chest_xray/{split}/PNEUMONIA/BACTERIA-1-0001.jpeg"] = encoded(".jpeg", 2)
    return {"ZhangLabData.zip": zipped(members)}


def palm_ai_studio() -> dict[str, bytes]:
    """training.zip, validation.zip and valid_gt.zip; the training images are in an archive inside the first."""
    letters = {"P": (6, 190), "N": (4, 60), "H": (2, 80)}
    train = {
        f"PALM-Training400/{letter}{number:04}.jpg": encoded(".jpg", 100 * ord(letter) + number, level)
        for letter, (count, level) in letters.items()
        for number in range(1, count + 1)
    }
    annotations = zipped({"PALM-Training400-Annotation-Lession/Atrophy/P0001.bmp": encoded(".bmp", 3)})
    inside = {
        "PALM-Training400/PALM-Training400.zip": zipped(train),
        "PALM-Training400/PALM-Training400-Annotation-Lession.zip": annotations,
        "PALM-Training400/Fovea_Location.xlsx": b"PK",
    }
    names = [f"V{number:04}.jpg" for number in range(1, 8)]
    val = {f"PALM-Validation400/{name}": encoded(".jpg", k, 190 if k % 2 else 60) for k, name in enumerate(names)}
    table = {"ID": range(1, 8), "imgName": names, "Label": [k % 2 for k in range(7)]}
    truth = {"PALM-Validation-GT/PM_Label_and_Fovea_Location.xlsx": workbook(table)}
    return {"training.zip": zipped(inside), "validation.zip": zipped(val), "valid_gt.zip": zipped(truth)}


def palm_flat() -> dict[str, bytes]:
    """Three archives that hold the folders directly, as copies do."""
    nested = palm_ai_studio()
    with zipfile.ZipFile(io.BytesIO(nested["training.zip"])) as outer:
        inner = outer.read("PALM-Training400/PALM-Training400.zip")
    return {
        "PALM-Training400.zip": inner,
        "PALM-Validation400.zip": nested["validation.zip"],
        "PALM-Validation-GT.zip": nested["valid_gt.zip"],
    }


def write(archives: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in archives.items():
        (folder / name).write_bytes(data)
    return folder

"""The source of each COVID-19 image: the collection or hospital that it comes from.

Kaggle's archive has a table for each class, `<class>.metadata.xlsx`, whose column URL names the source. Without the
tables the names of the files tell it, except for the class COVID, whose sources are mixed (`datasets/covid/README.md`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

from paddle_medcls.core.errors import DataError
from paddle_medcls.core.files import NAME
from paddle_medcls.data.label_table import read_table

TABLE = ".metadata.xlsx"
COLUMNS = ("FILE NAME", "URL")
FIX = "copy it from the archive again, or remove it: the sources then follow from the names of the files"
COLLECTIONS = (
    ("rsna-pneumonia-detection-challenge", "RSNA"),
    ("paultimothymooney/chest-xray-pneumonia", "Kermany"),
    ("bimcv", "BIMCV"),
    ("ml-workgroup/covid-19-image-repository", "Hannover"),
    ("sirm.org", "SIRM"),
    ("eurorad.org", "Eurorad"),
    ("ieee8023/covid-chestxray-dataset", "Cohen"),
    ("figshare.com", "figshare"),
    ("armiro/covid-cxnet", "COVID-CXNet"),
)
"""Part of a URL -> name; another URL is named by its host."""
UNKNOWN = "unknown"
SEVERAL = "several"
KERMANY = range(63, 1404)
"""Numbers of Normal that are children, by eye, as many as the archive's README counts from Kermany's set: 1,341."""


def plain(name: str) -> str:
    """Name of a class, folder or file without case, blanks and signs: "Lung_Opacity-1" -> "lungopacity1"."""
    return re.sub(r"[-_ ]", "", name).lower()


def sources_of(root: Path, ids: Sequence[str]) -> tuple[str, ...]:
    """The source of each image; empty if none is known.

    Args:
        root: the data root.
        ids: paths relative to it.

    Raises:
        DataError: a table that cannot be read.
    """
    tables: dict[PurePosixPath, dict[str, str] | None] = {}
    found = []
    for name in map(PurePosixPath, ids):
        folder = name.parent.parent if name.parent.name == "images" else name.parent
        if folder not in tables:
            tables[folder] = _table(root / folder)
        table, file = tables[folder], plain(name.stem)
        found.append(_by_number(file) if table is None else table.get(file, UNKNOWN))
    return tuple(found) if set(found) - {UNKNOWN} else ()


def _by_number(file: str) -> str:
    """The source by the plain name of a file, as Kaggle names them."""
    match = re.fullmatch(r"(covid|lungopacity|normal|viralpneumonia)\(?(\d{1,5})\)?", file)
    if match is None:
        return UNKNOWN
    if match[1] == "normal":
        return "Kermany" if int(match[2]) in KERMANY else "RSNA"
    return {"covid": SEVERAL, "lungopacity": "RSNA", "viralpneumonia": "Kermany"}[match[1]]


def _table(folder: Path) -> dict[str, str] | None:
    """Plain file name -> source, from the table beside the folder of a class; None without one."""
    for path in sorted(folder.parent.glob(f"*{TABLE}")):
        if plain(path.name[: -len(TABLE)]) == plain(folder.name):
            status = path.stat()
            return _read(path, status.st_mtime_ns, status.st_size)
    return None


@lru_cache(maxsize=8)  # each split of a run reads the same tables, which take a second
def _read(path: Path, mtime_ns: int, size: int) -> dict[str, str]:
    """Plain file name -> source, from one of Kaggle's tables; time and size tell whether the file has changed.

    Raises:
        DataError: not such a table; every faulty row is listed.
    """
    rows = read_table(path)
    if not set(COLUMNS) <= set(rows.columns):
        expected = f"{' and '.join(COLUMNS)}, found {', '.join(rows.columns)}"
        raise DataError(f"covid: {path.name} lacks a column", path=path, expected=expected, fix=FIX)
    table: dict[str, str] = {}
    faults = []
    for number, cells in rows.rows.items():
        name, url = (cells[rows.columns.index(column)] for column in COLUMNS)
        key, source = plain(name[: -len(".png")] if name.lower().endswith(".png") else name), _named(url)
        if not key or not source or table.setdefault(key, source) != source:
            faults.append(f"row {number}: FILE NAME {name!r}, URL {url!r}")
    if faults:
        raise DataError(
            f"covid: {len(faults)} faulty row(s) in {path.name}",
            items=faults,
            path=path,
            expected="a name, once, and a web address in each row",
            fix=FIX,
        )
    return table


def _named(url: str) -> str:
    """The name of the source at a URL; "" if it is no web address."""
    for part, name in COLLECTIONS:
        if part in url.lower():
            return name
    try:
        host = urlparse(url.strip()).hostname or ""
    except ValueError:
        return ""
    return host if NAME.fullmatch(host) else ""

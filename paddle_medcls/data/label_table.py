"""Reads a table of labels: CSV as any spreadsheet writes it, or Excel. All cells become text."""

from __future__ import annotations

import codecs
import csv
import io
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from paddle_medcls.core.errors import DataError, printable
from paddle_medcls.core.files import read_bounded

MAX_BYTES = 256 << 20
"""Of a CSV file, and of all that an Excel file unpacks to."""


@dataclass(frozen=True)
class Table:
    """The cells of a table, without blanks around them.

    Attributes:
        path: the file.
        columns: names in the first row.
        rows: the others, by their number in the file (the first row is 1); empty ones are left out.
        remarks: what was assumed when the file was read.
    """

    path: Path
    columns: tuple[str, ...]
    rows: dict[int, tuple[str, ...]]
    remarks: tuple[str, ...] = ()


def read_table(path: Path) -> Table:
    """Reads a CSV file (commas, semicolons or tabs; UTF-8 with or without a mark, UTF-16, GB2312, cp1252) or .xlsx.

    Raises:
        DataError: unreadable, without rows or column names, rows of another length, formulas, or control characters.
    """
    try:
        lines, remarks = _excel(path) if path.suffix.lower() == ".xlsx" else _csv(path)
    except (OSError, ValueError, csv.Error, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path.name} cannot be read: {error}",
            path=path,
            expected="a table with column names in its first row, as .csv or .xlsx",
            fix="open it in a spreadsheet program and save it as CSV UTF-8",
        ) from None
    lines = {number: [cell.strip() for cell in cells] for number, cells in lines.items() if any(map(str.strip, cells))}
    if len(lines) < 2:
        raise DataError(f"{path.name} holds no rows", path=path, expected="column names, and a row for each image")
    first, *rest = lines
    columns = lines[first]
    faults = [
        f"column {name!r} occurs twice"
        for name in sorted({name for name in columns if name and columns.count(name) > 1})
    ]
    for number, cells in lines.items():
        if len(cells) != len(columns):
            faults.append(f"row {number}: {len(cells)} cells, not {len(columns)}")
        for name, cell in zip(columns, cells):
            if fault := cell_fault(cell):
                faults.append(f"row {number}, column {name}: {cell[:60]!r} {fault}")
    if faults:
        raise DataError(
            f"{path.name}: {len(faults)} faulty row(s) or cell(s)",
            items=faults,
            path=path,
            expected="plain values, the same number in each row",
            fix="in the spreadsheet program replace formulas by their values (copy, paste as values); correct the rows",
        )
    return Table(path, tuple(columns), {number: tuple(lines[number]) for number in rest}, tuple(remarks))


def cell_fault(text: str) -> str:
    """Why a text cannot stand in a table that people open in a spreadsheet program; "" if it can."""
    if text.startswith(("=", "@")):
        return "is a formula, or would be one in a spreadsheet"
    return "has control characters" if text != printable(text) else ""


def _csv(path: Path) -> tuple[dict[int, list[str]], list[str]]:
    text, encoding = _decoded(read_bounded(path, MAX_BYTES))
    remarks = (
        [] if encoding == "utf-8" else [f"{path.name} is not in UTF-8; it was read as {encoding}: check the names"]
    )
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=header.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    return dict(enumerate(reader, start=1)), remarks


def _decoded(data: bytes) -> tuple[str, str]:
    """The text of a CSV file, and its encoding."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # Excel's "Unicode text"
        return data.decode("utf-16"), "utf-8"
    for encoding in ("utf-8-sig", "gb2312", "cp1252"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue  # a single accent of a western language is no GB2312, two are a Chinese character inside a word
        if encoding != "gb2312" or not re.search(r"[A-Za-z][^\x00-\x7f][A-Za-z]", text):
            return text, encoding.replace("utf-8-sig", "utf-8")
    raise ValueError("its text is in no known encoding")


def _excel(path: Path) -> tuple[dict[int, list[str]], list[str]]:
    try:
        import openpyxl
    except ImportError as error:
        raise DataError(f"{path.name} needs openpyxl: {error}", fix="pip install openpyxl, or save it as CSV") from None
    data = io.BytesIO(read_bounded(path, MAX_BYTES))
    with zipfile.ZipFile(data) as parts:
        if sum(part.file_size for part in parts.infolist()) > MAX_BYTES:
            raise ValueError(f"it unpacks to more than {MAX_BYTES:,} bytes")
    try:
        book = openpyxl.load_workbook(data, read_only=True)
        sheet, *others = book.worksheets
        rows = {number: [_text(cell) for cell in row] for number, row in enumerate(sheet.iter_rows(), start=1)}
    except Exception as error:  # openpyxl raises many types for broken files
        raise ValueError(f"{type(error).__name__}: {error}") from None
    used = (k for row in rows.values() for k, cell in enumerate(row, start=1) if cell.strip())
    width = max(used, default=0)  # without formatted but empty columns
    rows = {number: (row + [""] * width)[:width] for number, row in rows.items()}
    names = ", ".join(repr(other.title) for other in others)
    return rows, [f"{path.name}: only its first sheet {sheet.title!r} was read, not {names}"] if others else []


def _text(cell) -> str:
    """An Excel cell as text; whole numbers without a decimal point, a formula as such."""
    value = cell.value
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "" if value is None else str(value)

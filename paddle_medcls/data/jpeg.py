"""Detection of truncated and damaged JPEG files.

libjpeg fills missing data with grey and only prints a warning, which neither OpenCV nor Pillow reports. The checks:

1. Markers: the end marker must follow the last scan, and restart markers must be in order.
2. Signs of damage, at the cost of a few comparisons: the last decoded block is exactly mid-grey, as libjpeg leaves
   it without data, or a scan holds a run of zeros.
3. Only if there is such a sign, or if there can be none (several scans, CMYK), the file is decoded again with random
   bytes before each marker: a complete image stays the same, an incomplete one uses them as its data. Then with its
   last bytes replaced: a complete image changes, one with surplus data does not.

Measured: of 834 intact fundus photographs and OCT scans none shows a sign and none is refused. Of 75 cut in half,
and of 75 that lack the last hundredth, all are found; of 75 with a tenth zeroed in the middle 72 (progressive: 53).
Other bytes in place of the zeros are rarely found, as libjpeg decodes about as many blocks as it should. Steps 1 and
2 take about a sixth of the decoding time, step 3 three to five times the decoding time.
"""

from __future__ import annotations

import io
import random
import re
from typing import NamedTuple

import numpy as np

_MARKER = re.compile(rb"\xff[^\x00\xff]")
_RESTART = re.compile(rb"\xff[\xd0-\xd7]")
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
_RANDOM = [bytes(random.Random(seed).choices(range(255), k=64)) for seed in range(4)]  # no 0xFF: it begins a marker
_ZEROS = bytes(64)


class Markers(NamedTuple):
    """Start and end of the compressed data of each scan, in bytes, and the number of components."""

    scans: list[tuple[int, int]]
    components: int


def read_markers(data: bytes) -> Markers | None:
    """The scans of a JPEG; None if it is truncated or restart markers are missing.

    Segments are skipped by their lengths, and with them the markers of an embedded thumbnail.
    """
    scans: list[tuple[int, int]] = []
    at, components = 2, 0
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xD9:
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        segment_end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if marker in (0xC0, 0xC1, 0xC2):  # start of frame: baseline, extended, progressive
            components = data[at + 9] if at + 9 < len(data) else 0
        if marker == 0xDA:
            end = _SCAN_END.search(data, segment_end)
            scans.append((segment_end, end.start() if end else len(data)))
            segment_end = scans[-1][1]
            restarts = _RESTART.findall(data, *scans[-1])
            if any(restart[1] != 0xD0 + number % 8 for number, restart in enumerate(restarts)):
                return None
        at = segment_end
    return Markers(scans, components) if scans and data[at : at + 2] == b"\xff\xd9" else None


def lacks_data(data: bytes, markers: Markers, image: np.ndarray) -> bool:
    """Whether a JPEG has too little or too much data for its image.

    Args:
        image: the decoded image, uint8 (H, W) or (H, W, C), at any scale and in any orientation.
    """
    signs = any(data.find(_ZEROS, *scan) >= 0 for scan in markers.scans) or _ends_in_grey(image)
    return (signs or len(markers.scans) > 1 or markers.components == 4) and not _complete(data, markers.scans)


def _ends_in_grey(image: np.ndarray) -> bool:
    """Whether a corner pixel is mid-grey; the last block is in one of the corners, depending on the orientation."""
    corners = image[[0, 0, -1, -1], [0, -1, 0, -1]].reshape(4, -1).astype(int)
    return bool((abs(corners - 128) <= 1).all(axis=1).any())


def _complete(data: bytes, scans: list[tuple[int, int]]) -> bool:
    """Whether the compressed data are exactly as long as the image needs; step 3 of the module's docstring."""
    try:
        image = _decode(data)
        parts, at = [], 0
        for start, end in scans:
            parts += [data[at:start], _MARKER.sub(_padded, data[start : end + 2])]
            at = end + 2
        if not np.array_equal(_decode(b"".join([*parts, data[at:]])), image):
            return False
        start, end = scans[-1]
        if end - start < 64 or np.ptp(image[-16:, -16:]) == 0:
            return True  # a uniform end: libjpeg's grey, or blocks that any bits decode to
        damaged = (data[: end - 4] + replacement[:4] + data[end:] for replacement in _RANDOM)
        return any(not np.array_equal(_decode(variant), image) for variant in damaged)
    except OSError:  # Pillow: "broken data stream"
        return False


def _padded(marker: re.Match) -> bytes:
    """Inserts random data before a marker; a fill byte (0xFF) before the marker becomes data by an added 0."""
    filled = marker.string[marker.start() - 1 : marker.start()] == b"\xff"
    return (b"\0" if filled else b"") + _RANDOM[0] + marker[0]


def _decode(data: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image)

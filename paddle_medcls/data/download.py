"""Downloads files over https: resumed after an interruption, and verified before they get their final name.

A file with its final name is complete and has the right checksum; until then its name is `<name>.part`.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from paddle_medcls.core import files
from paddle_medcls.core.errors import DataError
from paddle_medcls.core.progress import progress

SCHEMES = ("https",)
TIMEOUT_SECONDS = 60
MAX_BYTES = 64 * 2**30  # the limit where the size is unknown
BLOCK = 1 << 18


def download(url: str, target: Path, size: int = 0, md5: str = "") -> Path:
    """Downloads one file; resumes a partial download.

    Args:
        url: https, also after redirections.
        target: path of the file; an existing file is verified, and never replaced.
        size: expected bytes, 0 if unknown.
        md5: expected checksum.

    Returns:
        `target`.

    Raises:
        DataError: no network, another size or checksum; the message holds the steps to do it by hand.
    """
    assert md5, "a download needs a checksum"
    by_hand = f"download {url} by other means, save it as {target}; {checksum_text(md5)}"
    if target.exists():
        _verify(target, size, md5, f"keep it, or move it away and download again; {checksum_text(md5)}")
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, size)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        partial = f"; {part.stat().st_size:,} bytes are kept in {part.name}" if part.exists() else ""
        raise DataError(
            f"{target.name} cannot be downloaded: {reason}{partial}",
            path=url,
            expected="a connection to the internet",
            fix=f"run it again to resume, or {by_hand}",
        ) from None
    except OSError as error:
        raise DataError(
            f"{part} cannot be written: {error.strerror or error}", fix="free some space and run it again"
        ) from None
    try:
        _verify(part, size, md5, f"run it again (it starts from zero), or {by_hand}")
    except DataError:
        part.unlink()
        raise
    os.replace(part, target)
    return target


def checksum_text(md5: str) -> str:
    """The end of a message that tells how to get a file by hand."""
    return f"its md5 is {md5}"


def _verify(path: Path, size: int, md5: str, fix: str) -> None:
    length = path.stat().st_size
    if size and length != size:
        text = f"{size:,} bytes, found {length:,}"
        raise DataError(f"{path.name} has another size", path=path, expected=text, fix=fix)
    if (digest := files.md5(path)) != md5:
        raise DataError(f"{path.name} has another md5", path=path, expected=f"{md5}, found {digest}", fix=fix)


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https addresses only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        try:
            _check_scheme(newurl)
        except ValueError:
            fp.close()
            raise
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_scheme(url: str) -> None:
    if urlsplit(url).scheme not in SCHEMES:
        raise ValueError(f"{url} is not {' or '.join(SCHEMES)}")


def _fetch(url: str, part: Path, size: int) -> None:
    """Appends the missing bytes of `url` to `part`."""
    _check_scheme(url)
    start = part.stat().st_size if part.exists() else 0
    if size and start >= size:
        return  # complete, or too long: the verification decides
    headers = {"User-Agent": "paddle_medcls", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    opener = urllib.request.build_opener(_SameSchemes)
    try:
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not start:
            raise
        return  # the server has no further bytes: the verification decides
    with response:
        if start and not _is_resumed(response, start):
            start = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        if size and total != size:
            raise ValueError(f"the server's file has {total:,} bytes, expected {size:,}")
        with open(part, "ab" if start else "wb") as file:
            _copy(response, file, start, total, part.stem)


def _is_resumed(response, start: int) -> bool:
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _copy(response, file, start: int, total: int, name: str) -> None:
    limit = total or MAX_BYTES
    with progress(None, name, total, "B") as bar:
        bar.unit_scale = True
        bar.update(start)
        received = start
        while block := response.read(BLOCK):
            received += len(block)
            if received > limit:
                raise ValueError(f"the server sends more than {limit:,} bytes")
            file.write(block)
            bar.update(len(block))
    if total and received < total:
        raise ConnectionError(f"the connection ended after {received:,} of {total:,} bytes")

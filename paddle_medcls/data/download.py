"""Downloads that can be interrupted: https alone, resumed where they stopped, checked before they count.

A file under its final name is complete and has the right checksum; until then it is `<name>.part`.
"""

from __future__ import annotations

import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from paddle_medcls import files
from paddle_medcls.errors import DataError
from paddle_medcls.progress import progress

SCHEMES = ("https",)
TIMEOUT_SECONDS = 60
MAX_BYTES = 64 * 2**30  # where neither we nor the server know the size
BLOCK = 1 << 18


def download(url: str, target: Path, size: int = 0, md5: str = "", sha256: str = "") -> Path:
    """Fetches one file; a partly fetched one is gone on with.

    Args:
        url: https, also after redirections.
        target: where the file goes; one that is there already is checked, and never replaced.
        size: its bytes, 0 where not known.
        md5, sha256: its checksums, "" where not known; at least one is needed.

    Returns:
        `target`.

    Raises:
        DataError: no network, another size or checksum; the message holds the steps to do it by hand.
    """
    assert md5 or sha256, "a download without a checksum proves nothing"
    by_hand = f"fetch {url} by other means, save it as {target}; {checksum_text(md5, sha256)}"
    if target.exists():
        _check(target, size, md5, sha256, f"keep it, or move it away and download again; {checksum_text(md5, sha256)}")
        return target
    part = target.with_name(target.name + ".part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, size)
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError, ValueError) as error:
        reason = getattr(error, "reason", None) or error
        kept = f"; {part.stat().st_size:,} bytes are kept in {part.name}" if part.exists() else ""
        raise DataError(
            f"{target.name} cannot be downloaded: {reason}{kept}",
            where=url,
            expected="a connection to the internet",
            do=f"run it again to go on, or {by_hand}",
        ) from None
    except OSError as error:
        raise DataError(
            f"{part} cannot be written: {error.strerror or error}", do="make room and run it again"
        ) from None
    try:
        _check(part, size, md5, sha256, f"run it again (it starts afresh), or {by_hand}")
    except DataError:
        part.unlink()
        raise
    os.replace(part, target)
    return target


def checksum_text(md5: str, sha256: str = "") -> str:
    return f"its md5 is {md5}" if md5 else f"its sha256 is {sha256}"


def _check(path: Path, size: int, md5: str, sha256: str, do: str) -> None:
    found = path.stat().st_size
    if size and found != size:
        raise DataError(f"{path.name} has another size", where=path, expected=f"{size:,} bytes, found {found:,}", do=do)
    for name, expected, digest in (("md5", md5, files.md5), ("sha256", sha256, files.sha256)):
        if expected and (actual := digest(path)) != expected:
            text = f"{expected}, found {actual}"
            raise DataError(f"{path.name} has another {name}", where=path, expected=text, do=do)


class _SameSchemes(urllib.request.HTTPRedirectHandler):
    """Follows redirections, but never out of https."""

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
    """Writes the body of `url` to `part`, from where an earlier attempt stopped."""
    _check_scheme(url)
    start = part.stat().st_size if part.exists() else 0
    if size and start >= size:
        return  # complete, or too long: the check decides
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
        return  # nothing after what we have: the check decides
    with response:
        if start and not _goes_on(response, start):
            start = 0  # the server sends the whole file
        length = response.headers.get("Content-Length")
        total = start + int(length) if length else size
        if size and total != size:
            raise ValueError(f"the server's file has {total:,} bytes, expected {size:,}")
        with open(part, "ab" if start else "wb") as file:
            _copy(response, file, start, total, part.stem)


def _goes_on(response, start: int) -> bool:
    return response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {start}-")


def _copy(response, file, start: int, total: int, name: str) -> None:
    limit = total or MAX_BYTES
    with progress(None, name, total, "B") as bar:
        bar.unit_scale = True
        bar.update(start)
        done = start
        while block := response.read(BLOCK):
            done += len(block)
            if done > limit:
                raise ValueError(f"the server sends more than {limit:,} bytes")
            file.write(block)
            bar.update(len(block))
    if total and done < total:
        raise ConnectionError(f"the connection ended after {done:,} of {total:,} bytes")

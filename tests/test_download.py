"""Downloads, from a server on this machine: resumed, checked, refused."""

import hashlib
import http.server
import re
import threading

import pytest

from paddle_medcls.cli import prepare
from paddle_medcls.core.errors import DataError
from paddle_medcls.data import download as module
from paddle_medcls.data.datasets import fetch
from paddle_medcls.data.datasets.medmnist_cards import CARDS
from paddle_medcls.data.download import download

BODY = bytes(range(256)) * 4000
MD5 = hashlib.md5(BODY).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves BODY; /cut ends early, /plain knows no ranges, /away redirects to ftp, /gone answers 404."""

    seen: list = []

    def do_GET(self):
        self.seen.append((self.path, self.headers.get("Range")))
        if self.path == "/gone":
            self.send_error(404)
            return
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "ftp://127.0.0.1/file")
            self.end_headers()
            return
        start = re.match(r"bytes=(\d+)-", self.headers.get("Range") or "")
        start = int(start[1]) if start and self.path != "/plain" else 0
        if start >= len(BODY):
            self.send_error(416)
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        self.send_header("Content-Length", str(len(BODY) - start))
        self.end_headers()
        self.wfile.write(BODY[start : len(BODY) // 2] if self.path == "/cut" and not start else BODY[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "SCHEMES", ("https", "http"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    Handler.seen = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.handle_error = lambda request, address: None  # a client that has heard enough hangs up
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_file_is_fetched_and_checked(server, tmp_path):
    target = tmp_path / "below" / "file.npz"
    assert download(f"{server}/file", target, len(BODY), MD5) == target
    assert target.read_bytes() == BODY
    assert not list(target.parent.glob("*.part"))
    download(f"{server}/file", target, len(BODY), MD5)
    assert len(Handler.seen) == 1  # it was there already


def test_an_unknown_size(server, tmp_path):
    assert download(f"{server}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY


@pytest.mark.parametrize("path", ["file", "plain"])
def test_a_partial_download_is_resumed(server, tmp_path, path):
    (tmp_path / "file.part").write_bytes(BODY[:1000])
    assert download(f"{server}/{path}", tmp_path / "file", md5=MD5).read_bytes() == BODY
    assert Handler.seen == [(f"/{path}", "bytes=1000-")]


def test_a_complete_part_needs_no_more_bytes(server, tmp_path):
    (tmp_path / "file.part").write_bytes(BODY)
    assert download(f"{server}/file", tmp_path / "file", md5=MD5).read_bytes() == BODY


def test_a_broken_connection_keeps_what_came(server, tmp_path):
    with pytest.raises(DataError, match="512,000 of 1,024,000 bytes; 512,000 bytes are kept in file.part") as caught:
        download(f"{server}/cut", tmp_path / "file", len(BODY), MD5)
    for words in (f"{server}/cut", str(tmp_path / "file"), MD5, "run it again"):
        assert words in str(caught.value)
    assert download(f"{server}/cut", tmp_path / "file", len(BODY), MD5).read_bytes() == BODY
    assert Handler.seen[1] == ("/cut", "bytes=512000-")


def test_wrong_bytes_never_get_the_name(server, tmp_path):
    with pytest.raises(DataError, match="another md5"):
        download(f"{server}/file", tmp_path / "file", md5="0" * 32)
    (tmp_path / "file.part").write_bytes(b"x" * 1000)  # of another file
    with pytest.raises(DataError, match="another md5"):
        download(f"{server}/file", tmp_path / "file", md5=MD5)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="the server's file has 1,024,000 bytes, expected 10"):
        download(f"{server}/file", tmp_path / "file", size=10, md5=MD5)


def test_a_file_that_is_there_is_never_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(DataError, match="another md5"):
        download("https://127.0.0.1/file", tmp_path / "file", md5=MD5)
    assert (tmp_path / "file").read_bytes() == b"mine"


@pytest.mark.parametrize("path", ["away", "gone"])
def test_errors_of_the_server(server, tmp_path, path):
    with pytest.raises(DataError, match="file cannot be downloaded"):
        download(f"{server}/{path}", tmp_path / "file", md5=MD5)


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "file:///etc/hostname", "ftp://127.0.0.1/x"])
def test_only_https(tmp_path, url):
    with pytest.raises(DataError, match="is not https"):
        download(url, tmp_path / "file", md5=MD5)


def test_fetching_a_set(monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(
        module, "download", lambda url, target, size, md5: (asked.append((url, size, md5)), target.touch())
    )
    words = ["--dataset", "breastmnist", "--download", "--data-root", str(tmp_path)]
    assert prepare.main(words) == 0
    card = CARDS["breastmnist"]
    assert asked == [("https://zenodo.org/records/10519652/files/breastmnist.npz?download=1", 559580, card.md5[28])]
    assert "CC BY 4.0" in capsys.readouterr().out
    assert "differs from the official file" in fetch("breastmnist", tmp_path)  # kept, and reported
    assert len(asked) == 1


def test_a_set_that_no_program_may_fetch(tmp_path):
    with pytest.raises(DataError, match="palm cannot be downloaded by a program"):
        fetch("palm", tmp_path)

"""Fetching weight files from a local server and from file: addresses."""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from gradengine.weights import download
from gradengine.weights.download import fetch
from gradengine.weights.error import WeightFileError

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Count the requests; close without waiting for a client."""

    requests: ClassVar[list[str]] = []
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        Server.requests.append(self.path)
        if self.path == "/moved/weights.pth":
            self.answer(302, b"", Location="/weights.pth")
        elif self.path == "/away/weights.pth":
            self.answer(302, b"", Location="http://example.org/weights.pth")
        elif self.path == "/truncated/weights.pth":
            self.answer(200, CONTENT[:-1], length=len(CONTENT))
        elif self.path == "/unmeasured/weights.pth":
            self.answer(200, CONTENT, length=None)
        elif self.path == "/missing/weights.pth":
            self.answer(404, b"")
        elif self.path == "/broken/weights.pth":
            self.wfile.write(b"not http at all\r\n\r\n")
        else:
            self.answer(200, CONTENT)

    def answer(self, code: int, body: bytes, length: int | None = -1, **headers: str) -> None:
        self.send_response(code)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Keep stderr clean."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with Server(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}"
        running.shutdown()
        thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """Give every test its own cache folder, and no proxy to go through."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH_HOME", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    Server.requests.clear()
    return tmp_path / "cache"


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", ["", "/moved", "/unmeasured"])
def test_downloads_once_into_the_cache(server, cache, place):
    path = fetch(f"{server}{place}/weights.pth?version=2#part", sha256=SHA256, progress=False)
    assert path == cache / "gradengine/weights/weights.pth"
    assert path.read_bytes() == CONTENT
    assert files_in(cache) == ["weights.pth"]
    Server.requests.clear()
    assert fetch(f"{server}{place}/weights.pth", sha256=SHA256, progress=False) == path
    assert Server.requests == []


def test_downloads_into_a_folder(server, cache, tmp_path):
    path = fetch(f"{server}/my%20weights.pth", sha256=SHA256, folder=tmp_path / "own", size=512_000)
    assert path == tmp_path / "own/my weights.pth"
    assert path.read_bytes() == CONTENT
    assert not cache.exists()


def test_copies_from_a_file_address(cache, tmp_path):
    source = tmp_path / "weights.pth"
    source.write_bytes(CONTENT)
    path = fetch(source.as_uri(), sha256=SHA256, progress=False)
    assert path == cache / "gradengine/weights/weights.pth"
    assert path.read_bytes() == CONTENT
    with pytest.raises(ConnectionError, match=r"none\.pth could not be read; URLError"):
        fetch((tmp_path / "none.pth").as_uri(), sha256=SHA256)


def test_home_cache_is_the_default(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = fetch(f"{server}/weights.pth", sha256=SHA256, progress=False)
    assert path == tmp_path / "home/.cache/gradengine/weights/weights.pth"


@pytest.mark.parametrize("variable", ["XDG_CACHE_HOME", "TORCH_HOME"])
def test_pytorch_cache_is_read(server, cache, tmp_path, monkeypatch, variable):
    folder = cache / "torch"
    if variable == "TORCH_HOME":
        folder = tmp_path / "torch_home"
        monkeypatch.setenv("TORCH_HOME", str(folder))
    cached = folder / "hub/checkpoints/weights.pth"
    cached.parent.mkdir(parents=True)
    cached.write_bytes(CONTENT)
    assert fetch(f"{server}/weights.pth", sha256=SHA256) == cached
    assert Server.requests == []
    cached.write_bytes(CONTENT[:-1])
    message = "delete it to download it again; got url=.*, expected sha256=.*, actual sha256="
    with pytest.raises(WeightFileError, match=message) as caught:
        fetch(f"{server}/weights.pth", sha256=SHA256)
    assert str(caught.value).startswith(str(cached))
    assert cached.read_bytes() == CONTENT[:-1]
    own = fetch(f"{server}/weights.pth", sha256=SHA256, folder=tmp_path / "own", progress=False)
    assert own.parent == tmp_path / "own"


def test_a_tampered_file_is_downloaded_again(server, capsys):
    path = fetch(f"{server}/weights.pth", sha256=SHA256, progress=False)
    path.write_bytes(b"x" + CONTENT[1:])
    assert fetch(f"{server}/weights.pth", sha256=SHA256, progress=False) == path
    assert path.read_bytes() == CONTENT
    assert len(Server.requests) == 2
    assert capsys.readouterr().err == (
        f"{path}: not the expected file (sha256); downloading it again\n"
    )


@pytest.mark.parametrize(
    ("place", "size", "message"),
    [
        ("truncated", None, "must have 512000 bytes; got 511999 bytes"),
        ("unmeasured", 512_001, "must have 512001 bytes; got 512000 bytes"),
        ("whole", 511_999, "must have 511999 bytes; got more than that"),
        ("missing", None, "could not be read; HTTPError: HTTP Error 404"),
        ("broken", None, "could not be read; BadStatusLine"),
    ],
)
def test_failed_downloads_leave_nothing(server, cache, place, size, message):
    url = f"{server}/{place}/weights.pth"
    with pytest.raises(ConnectionError, match=message) as caught:
        fetch(url, sha256=SHA256, size=size, progress=False)
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files_in(cache) == []


def test_redirections_to_other_addresses_are_refused(server, cache):
    with pytest.raises(ValueError, match=r"http: on localhost; got url=http://example\.org/"):
        fetch(f"{server}/away/weights.pth", sha256=SHA256, progress=False)
    assert files_in(cache) == []


def test_nobody_listens(cache):
    with pytest.raises(
        ConnectionError, match=r"http://127\.0\.0\.1:9/weights\.pth could not be read"
    ):
        fetch("http://127.0.0.1:9/weights.pth", sha256=SHA256)
    assert files_in(cache) == []


def test_a_wrong_hash_leaves_the_old_file(server, cache):
    wrong = "0" * 64
    path = cache / "gradengine/weights/weights.pth"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"old")
    message = f"got url=.*, expected sha256={wrong}, actual sha256={SHA256}"
    with pytest.raises(WeightFileError, match=message):
        fetch(f"{server}/weights.pth", sha256=wrong, progress=False)
    assert path.read_bytes() == b"old"
    assert files_in(cache) == ["weights.pth"]


def test_an_interrupted_download_leaves_nothing(server, cache, monkeypatch):
    class Interrupted:
        def __init__(self, *_args: object, **_options: object) -> None: ...
        def __enter__(self):
            return self

        def __exit__(self, *_error: object) -> None: ...
        def update(self, _count: int) -> None:
            assert [name.partition(".pth.")[2][-8:] for name in files_in(cache)] == [".partial"]
            raise KeyboardInterrupt

    monkeypatch.setattr(pytest.importorskip("tqdm"), "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        fetch(f"{server}/weights.pth", sha256=SHA256)
    assert files_in(cache) == []


def test_progress_goes_to_stderr(server, capsys):
    pytest.importorskip("tqdm")
    fetch(f"{server}/weights.pth", sha256=SHA256)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "weights.pth: 100%" in captured.err


@pytest.mark.parametrize("progress", [True, False])
def test_silent_without_progress_or_tqdm(server, capsys, monkeypatch, progress):
    if progress:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    fetch(f"{server}/weights.pth", sha256=SHA256, progress=progress)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org/weights.pth",
        "http://localhost.example.org/weights.pth",
        "http://127.0.0.1@example.org/weights.pth",
        "ftp://example.org/weights.pth",
        "data:text/plain,weights.pth",
        "/weights.pth",
    ],
)
def test_other_addresses_are_refused(url):
    with pytest.raises(
        ValueError, match="url must be https:, file:, or http: on localhost; got url="
    ):
        fetch(url, sha256=SHA256)


@pytest.mark.parametrize("end", ["", "a/", "..", "%2e%2e", "a%5cb", "a%00b", "a%3ab"])
def test_addresses_must_end_with_a_file_name(end):
    with pytest.raises(ValueError, match="url must end with a file name; got url="):
        fetch(f"https://example.org/{end}", sha256=SHA256)


def test_encoded_slashes_do_not_leave_the_folder(server, cache):
    path = fetch(f"{server}/a%2f..%2f..%2fweights.pth", sha256=SHA256, progress=False)
    assert path == cache / "gradengine/weights/weights.pth"


@pytest.mark.parametrize("sha256", ["", "0" * 63, "g" * 64, SHA256.upper(), SHA256 + "\n"])
def test_hashes_must_be_whole(sha256):
    with pytest.raises(ValueError, match="sha256 must be 64 hexadecimal digits; got sha256="):
        fetch("https://example.org/weights.pth", sha256=sha256)


def test_every_download_has_a_limit_on_silence():
    assert 0 < download._TIMEOUT <= 60

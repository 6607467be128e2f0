"""Fetch weight files, and never hand one out whose SHA-256 is not the expected one."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from gradengine.weights.error import WeightFileError
from gradengine.weights.replacing import replacing

if TYPE_CHECKING:
    from urllib.request import OpenerDirector

_CHUNK = 128 << 10  # bytes
_TIMEOUT = 30  # seconds without an answer


def fetch(
    url: str,
    *,
    sha256: str,
    size: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Path:
    """Return the path of a local copy of `url` whose SHA-256 is `sha256`, checked at every call.

    Looks in `folder` (default: gradengine/weights in the user's cache); without `folder` also in
    PyTorch's cache, which is only read. Else downloads into `folder`, with a bar on stderr where
    tqdm is installed. `url` is https:, file:, or http: on this machine; `size` is in bytes.

    Raises:
        WeightFileError: the download, or a file in PyTorch's cache, is not the expected one.
        ConnectionError: the download failed or ended early.
        ValueError: `url` or `sha256` is malformed.
    """
    name = _checked_name(url)
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise ValueError(f"fetch: sha256 must be 64 hexadecimal digits; got sha256={sha256!r}")
    target = Path(folder if folder is not None else weights_folder()) / name
    fallback = _torch_folder() / name
    if target.is_file():
        if _digest(target) == sha256:
            return target
        print(f"{target}: not the expected file (sha256); downloading it again", file=sys.stderr)
    elif folder is None and fallback.is_file():
        actual = _digest(fallback)
        if actual == sha256:
            return fallback
        raise WeightFileError(
            f"{fallback}: the cached file is not the expected one, delete it to download it again; "
            f"got url={url}, expected sha256={sha256}, actual sha256={actual}"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        actual = _download(url, partial, size, progress)
        if actual != sha256:
            raise WeightFileError(
                f"{target}: the download is not the expected file and was removed; "
                f"got url={url}, expected sha256={sha256}, actual sha256={actual}"
            )
    return target


def _checked_name(url: str) -> str:
    """Return the file name at the end of `url`; ValueError if the address is not allowed."""
    parts = urlsplit(url)
    _check_address(url)
    name = unquote(parts.path).rpartition("/")[2]
    if name in ("", ".", "..") or re.search(r'[\x00-\x1f\\:*?"<>|]', name):
        raise ValueError(f"fetch: url must end with a file name; got url={url}")
    return name


def _check_address(url: str) -> None:
    parts = urlsplit(url)
    local = parts.hostname in ("localhost", "127.0.0.1", "::1")
    if parts.scheme not in ("https", "file") and not (parts.scheme == "http" and local):
        raise ValueError(f"fetch: url must be https:, file:, or http: on localhost; got url={url}")


def _cache_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def weights_folder() -> Path:
    """Return the folder in which downloaded weights are kept."""
    return _cache_root() / "gradengine" / "weights"


def _torch_folder() -> Path:
    return Path(os.environ.get("TORCH_HOME") or _cache_root() / "torch") / "hub/checkpoints"


def _digest(path: Path) -> str:
    import hashlib  # starts OpenSSL, which is slow

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, partial: Path, size: int | None, progress: bool) -> str:
    """Write the bytes at `url` to `partial` and return their SHA-256."""
    import hashlib

    digest, received = hashlib.sha256(), 0
    with _network_errors(url):
        response = _opener(url).open(url, timeout=_TIMEOUT)
    length = response.headers.get("Content-Length", "")
    announced = int(length) if length.isdecimal() else None
    expected = announced if size is None else size
    with (
        response,
        open(partial, "xb") as file,
        _bar(_checked_name(url), expected, progress) as advance,
    ):
        while True:
            with _network_errors(url):
                chunk = response.read(_CHUNK)
            received += len(chunk)
            if not chunk or (expected is not None and received > expected):
                break
            file.write(chunk)
            digest.update(chunk)
            advance(len(chunk))
    if expected is not None and received != expected:
        amount = "more than that" if received > expected else f"{received} bytes"
        raise ConnectionError(f"fetch: {url} must have {expected} bytes; got {amount}")
    return digest.hexdigest()


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    """Turn what urllib raises into one ConnectionError that names the address."""
    from http.client import HTTPException
    from urllib.error import HTTPError

    try:
        yield
    except (OSError, HTTPException) as error:
        if isinstance(error, HTTPError):
            error.close()  # it is an open response as well
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConnectionError(f"fetch: {url} could not be read; {reason}") from error


def _opener(url: str) -> OpenerDirector:
    from urllib.request import HTTPRedirectHandler, ProxyHandler, build_opener

    class CheckedRedirect(HTTPRedirectHandler):
        def redirect_request(
            self, req: Any, fp: Any, code: Any, msg: Any, headers: Any, newurl: str
        ) -> Any:
            try:
                _check_address(newurl)
            except ValueError:
                fp.close()
                raise
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    # A proxy cannot reach this machine's own servers.
    direct = [ProxyHandler({})] if urlsplit(url).scheme == "http" else []
    return build_opener(CheckedRedirect, *direct)


@contextmanager
def _bar(name: str, total: int | None, wanted: bool) -> Iterator[Any]:
    """Yield a function that is told the number of bytes received, and draws the progress bar."""
    try:
        if not wanted:
            raise ImportError
        from tqdm import tqdm
    except ImportError:
        yield lambda count: None
        return
    with tqdm(total=total, unit="B", unit_scale=True, desc=name, file=sys.stderr) as bar:
        yield bar.update

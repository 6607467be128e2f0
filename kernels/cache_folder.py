"""The folder of the compiled kernels.

Importing this module imports neither Numba nor CuPy.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path


def cache_folder(compiler: str = "NUMBA") -> Path:
    """Return the folder in which kernels compiled by "NUMBA" or "CUPY" are kept; it need not exist.

    That is gradengine in NUMBA_CACHE_DIR or CUPY_CACHE_DIR, which name where these packages keep
    their own, else gradengine/kernels in XDG_CACHE_HOME or ~/.cache.

    Raises:
        RuntimeError: the user has no home.
    """
    chosen = os.environ.get(f"{compiler}_CACHE_DIR")
    if chosen:
        return Path(chosen) / "gradengine"
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "gradengine" / "kernels"


def private_cache_folder(compiler: str = "NUMBA") -> Path:
    """Return the folder, made if need be, when nobody else can have put code there.

    Raises:
        OSError: there is none: it is another user's, others may write to it, or it cannot be made.
    """
    try:
        folder = cache_folder(compiler)
    except RuntimeError as error:
        raise OSError(str(error)) from error
    if not folder.is_dir():
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state = folder.stat()
    if hasattr(os, "getuid") and state.st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    if os.name == "posix" and state.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(f"{folder} can be written by other users")
    return folder

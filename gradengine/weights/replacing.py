"""Write a file so that a failure at any moment leaves the old one as it was."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new path beside `path` to write to; move it into place when the block succeeds.

    The new file reaches the disk before the move. When the block fails or is interrupted, the new
    file is removed and `path` stays untouched. A link is followed: the file it points to changes.
    """
    target = Path(os.path.realpath(path))
    partial = target.with_name(f"{target.name}.{os.urandom(8).hex()}.partial")
    try:
        yield partial
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:  # Ctrl-C too
        partial.unlink(missing_ok=True)
        raise

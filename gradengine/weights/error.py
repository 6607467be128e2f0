"""The one exception that every reader of weight files raises."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

_LONGEST_REASON = 300


class WeightFileError(ValueError):
    """Say, in one line, which weight file was refused and why."""


@contextmanager
def refusals_name(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn whatever goes wrong while the file at `path` is parsed into one WeightFileError."""
    try:
        yield
    except WeightFileError:
        raise
    # The readers state their own rules as ValueError. zipfile, struct, safetensors and NumPy answer
    # damaged bytes with a dozen more types, which differ between versions.
    except Exception as error:
        reason = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
        # The reason may quote the file: keep it one short line whatever the file holds.
        reason = " ".join(reason.split())[:_LONGEST_REASON]
        raise WeightFileError(f"{os.fspath(path)}: cannot be read as weights; {reason}") from error

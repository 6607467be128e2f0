"""Special functions, from CuPy's counterpart of SciPy."""

from __future__ import annotations

from cupyx.scipy.special import erf  # pyright: ignore[reportMissingImports]

__all__ = ["erf"]

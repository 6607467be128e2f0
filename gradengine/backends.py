"""Choices about the kernels of a device: `gradengine.backends.cuda.conv_tf32 = False`."""

from __future__ import annotations

from gradengine.kernels.settings import cpu, cuda

__all__ = ["cpu", "cuda", "get_float32_matmul_precision", "set_float32_matmul_precision"]

_PRECISIONS = ("highest", "high", "medium")


def get_float32_matmul_precision() -> str:
    """Return how exactly matrices of float32 are multiplied on CUDA: "highest" unless it was set."""
    return cuda.float32_matmul_precision


def set_float32_matmul_precision(precision: str) -> None:
    """Choose how exactly matrices of float32 are multiplied on CUDA.

    "highest" is float32 as it is. "high" and "medium" round the factors to 11 significant bits
    (tf32) for tensor cores, several times as fast; sums are float32 always. Convolutions follow
    `gradengine.backends.cuda.conv_tf32`. Raises ValueError for anything else.
    """
    if precision not in _PRECISIONS:
        raise ValueError(
            "set_float32_matmul_precision: precision must be 'highest', 'high' or 'medium'; "
            f"got precision={precision!r}"
        )
    cuda.float32_matmul_precision = precision

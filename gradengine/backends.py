"""Choices about the kernels of a device: `gradengine.backends.cuda.conv_tf32 = False`."""

from __future__ import annotations

from gradengine.kernels.settings import cpu, cuda, general

__all__ = [
    "are_deterministic_algorithms_enabled",
    "cpu",
    "cuda",
    "get_float32_matmul_precision",
    "set_float32_matmul_precision",
    "use_deterministic",
    "use_deterministic_algorithms",
]

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


def use_deterministic_algorithms(mode: bool = True) -> None:
    """Let each operation give the same bits in every run on the same machine, or raise RuntimeError.

    Almost all do so anyway, on the CPU for any `set_num_threads` too. These do only with this mode:
    on a GPU what adds up elements named twice (`scatter_add`, `index_add`, gradients of `gather`,
    `take`, `index_select` and of indexing by integers) or writes them (`setitem`, `scatter`), which
    then sort, and raise in a captured step; products, for which these kernels then take cuBLAS's
    place; convolutions with `backends.cuda.benchmark`, which is ignored. On the CPU long products of
    vectors, whose sums NumPy's BLAS splits among its threads. What users' own kernels do is theirs.
    """
    general.deterministic = bool(mode)


use_deterministic = use_deterministic_algorithms


def are_deterministic_algorithms_enabled() -> bool:
    """Return what `use_deterministic_algorithms` chose; False unless it was called."""
    return general.deterministic

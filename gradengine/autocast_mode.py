"""Mixed precision: in which dtype matrix products and convolutions compute, for each thread.

Under `autocast` an operation brings its inputs to the dtype that suits it, as PyTorch's list says:
products and convolutions compute in 16 bits; what needs range or sums many numbers in float32, such
as exponentials, softmax, norms and losses; all others in the widest dtype of their inputs.
Parameters stay float32, and so do their gradients, since the conversions are recorded.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from weakref import ref

import numpy as np

from gradengine.dtypes import as_dtype, float16, is_bfloat16

F = TypeVar("F", bound=Callable[..., Any])


class _AutocastMode(threading.local):
    dtype: np.dtype[Any] | None = None  # what products compute in; None: as their inputs are
    caching = True

    def __init__(self) -> None:
        self.outer: list[tuple[Any, bool]] = []  # what holds again outside each open region
        self.leaves: dict[Any, Any] = {}  # leaves that were converted: see `operation.lowered`
        # The leaves that regions converted, by the id of the first, which is one of them.
        self.together: dict[int, list[ref[Any]]] = {}

    def close(self) -> None:
        """Let go of what an outermost region converted, and note which leaves that were."""
        if self.leaves:
            leaves = [converted[0] for converted in self.leaves.values()]
            key = id(leaves[0])
            first = ref(leaves[0], lambda _: self.together.pop(key, None))
            self.together[key] = [first, *map(ref, leaves[1:])]
            self.leaves.clear()

    def converted_with(self, leaf: Any) -> list[Any]:
        """Return the leaves that the last region that began with this one converted, it among them."""
        leaves = [reference() for reference in self.together.get(id(leaf), ())]
        return (
            [one for one in leaves if one is not None] if leaves and leaves[0] is leaf else [leaf]
        )


autocast_mode = _AutocastMode()


def is_autocast_enabled() -> bool:
    """Return whether this thread runs under an `autocast` that is enabled."""
    return autocast_mode.dtype is not None


class autocast:
    """Let operations on CUDA tensors choose their precision: a context manager and a decorator.

    `dtype`, float16 unless given or bfloat16, is what matrix products and convolutions compute in.
    Regions nest; `enabled=False` switches off what is outside. A parameter is converted once in the
    outermost region, and again if it is written meanwhile, unless `cache_enabled=False`; with the
    first all that the last such region converted, in one launch. Backward
    is best called outside: its operations have the dtypes of forward's either way.
    Raises ValueError for another device type than "cuda" or another dtype.
    """

    def __init__(
        self,
        device_type: str,
        dtype: Any = None,
        enabled: bool = True,
        cache_enabled: bool = True,
    ) -> None:
        if device_type != "cuda":
            raise ValueError(
                "autocast: mixed precision is for CUDA tensors (device_type == 'cuda'); "
                f"got device_type={device_type!r}"
            )
        found = float16 if dtype is None else as_dtype(dtype)
        if found != float16 and not is_bfloat16(found):
            raise ValueError(f"autocast: dtype must be float16 or bfloat16; got dtype={found}")
        self._dtype = found if enabled else None
        self._caching = cache_enabled

    def __enter__(self) -> autocast:
        mode = autocast_mode
        mode.outer.append((mode.dtype, mode.caching))
        mode.dtype, mode.caching = self._dtype, self._caching
        return self

    def __exit__(self, *_: object) -> None:
        mode = autocast_mode
        mode.dtype, mode.caching = mode.outer.pop()
        if not mode.outer:
            mode.close()

    def __call__(self, function: F) -> F:
        """Return `function` running under this autocast."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        return call  # type: ignore[return-value]

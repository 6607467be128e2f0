"""Choosing among ways to compute the same by timing them, where the user lets that happen."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from gradengine.kernels.cuda import capture, launch

Choice = TypeVar("Choice", bound=Hashable)

KERNELS = {"tuning.cu": ("hold",)}

RUNS = 5

_fastest: dict[tuple[int, Hashable], Hashable] = {}
_imposed: list[Hashable] = []


@contextmanager
def imposed(choice: Hashable) -> Iterator[None]:
    """Let `fastest` return this choice where it is one, untimed: for whoever times choices alone."""
    _imposed.append(choice)
    try:
        yield
    finally:
        _imposed.pop()


def fastest(
    key: Hashable, choices: Sequence[Choice], run: Callable[[Choice], None]
) -> Choice | None:
    """Return the choice whose run took the least time on the current device, timed once for a key.

    `run` must be without effect but for what every choice gives alike. Each is run once before, and
    the least of RUNS times counts. It waits for the device; while a step is captured, where nothing
    may, only what was timed before is known, and None is returned for the rest.
    """
    if _imposed and _imposed[-1] in choices:
        return choices[choices.index(_imposed[-1])]  # pyright: ignore[reportArgumentType]
    known = _fastest.get((launch.runtime.device(), key))
    if known is None and capture.current() is None:
        known = min(choices, key=lambda choice: _seconds(run, choice))
        _fastest[launch.runtime.device(), key] = known
    return known  # pyright: ignore[reportReturnType] - what was kept for this key is one of its choices


def _seconds(run: Callable[[Choice], None], choice: Choice) -> float:
    run(choice)  # compiles and loads
    return min(launch.runtime.seconds(lambda: run(choice)) for _ in range(RUNS))

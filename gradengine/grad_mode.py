"""Whether operations are recorded: one flag per thread, and the switches that set it."""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])


class _GradMode(threading.local):
    enabled = True
    recomputing = False  # a checkpoint's function runs once more: what it counts, it has counted


grad_mode = _GradMode()


def is_grad_enabled() -> bool:
    """Return whether operations are recorded in this thread."""
    return grad_mode.enabled


class _ModeSwitch:
    """Sets the grad mode for a `with` block, a function, or the running part of a generator."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._previous: list[bool] = []

    def __enter__(self) -> None:
        self._previous.append(grad_mode.enabled)
        grad_mode.enabled = self._enabled

    def __exit__(self, *_: object) -> None:
        grad_mode.enabled = self._previous.pop()

    def __call__(self, function: F) -> F:
        """Return `function` running under this mode; a generator runs under it between yields."""
        enabled = self._enabled

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with _ModeSwitch(enabled):
                return function(*args, **kwargs)

        @functools.wraps(function)
        def generate(*args: Any, **kwargs: Any) -> Any:
            generator = function(*args, **kwargs)
            step: Callable[[], Any] = functools.partial(next, generator)
            while True:
                try:
                    with _ModeSwitch(enabled):
                        item = step()
                except StopIteration as stop:
                    return stop.value
                try:
                    step = functools.partial(generator.send, (yield item))
                except GeneratorExit:
                    generator.close()
                    raise
                except BaseException as error:
                    step = functools.partial(generator.throw, error)

        return generate if inspect.isgeneratorfunction(function) else call  # type: ignore[return-value]


class no_grad(_ModeSwitch):
    """Record nothing inside: a context manager, and a decorator with or without parentheses."""

    _mode = False

    def __new__(cls, function: Callable[..., Any] | None = None) -> Any:
        switch = super().__new__(cls)
        if function is None:
            return switch
        switch.__init__()
        return switch(function)

    def __init__(self) -> None:
        super().__init__(self._mode)


class enable_grad(no_grad):
    """Record inside, even within `no_grad`: a context manager, a decorator with or without parentheses."""

    _mode = True


class set_grad_enabled(_ModeSwitch):
    """Switch recording on or off: at once when called, and back again at the end of a `with` block."""

    def __init__(self, mode: bool) -> None:
        super().__init__(mode)
        self._previous.append(grad_mode.enabled)
        grad_mode.enabled = mode

    def __enter__(self) -> None:
        grad_mode.enabled = self._enabled

    def __call__(self, function: F) -> F:
        grad_mode.enabled = (
            self._previous.pop()
        )  # as a decorator it acts when the function runs, not now
        return super().__call__(function)

"""What makes a result a view: it has its source's memory, and a write to either is seen by both."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gradengine.grad_mode import grad_mode
from gradengine.tape import View

_SEVERAL_VIEWS = (
    "this view is the output of a function that returns multiple views (unbind, split, chunk, iteration); "
    "such functions do not allow the output views to be modified inplace: take the view by its index, or "
    "use an operation that is not in place"
)
_UNRECORDED_VIEW = (
    "a view was created in no_grad mode and is being modified inplace, or its base is, with grad mode "
    "enabled, which is ambiguous: do both inside the no_grad block, or both outside"
)


def share_memory(
    kind: bool | str,
    source: Any,
    result: Any,
    apply: Callable[..., Any],
    attributes: dict[str, Any],
) -> None:
    """Make a result of `apply` on its source a view, if it has the source's memory.

    `kind` is the operation's `view`: True, or "one of several".
    """
    if _owner(result.array) is not _owner(source.array):
        return
    result._counter = version = source.version()
    known = source._view if source._base is not None else None
    restriction = "" if kind is True else _SEVERAL_VIEWS
    if not grad_mode.enabled:
        restriction = _UNRECORDED_VIEW
    if known is None:
        result._view = View(source, (None, apply, attributes), restriction)
    else:
        steps = (known.steps, apply, attributes)
        result._view = View(known.base, steps, known.restriction or restriction)
    version.log.add_view(result)


def _owner(array: Any) -> Any:
    """Return the array, or what it was made of, that holds the memory."""
    while (base := getattr(array, "base", None)) is not None:
        array = base
    return array

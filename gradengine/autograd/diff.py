"""The first operation at which two traced runs part."""

from __future__ import annotations

import math
from itertools import zip_longest
from typing import NamedTuple

from gradengine.autograd.trace import Checksum, Operation, Trace, Value


class Difference(NamedTuple):
    """Where two runs part: which operation, what it was in each, what differs, in a sentence."""

    position: int
    first: Operation | None  # None: this run had ended
    second: Operation | None
    what: str  # "operation", "shape", "dtype", "input" or "result"
    text: str

    def __str__(self) -> str:
        return self.text


def diff(a: Trace, b: Trace, tolerance: float = 0.0) -> Difference | None:
    """Return the first difference between two traces, or None if there is none.

    Operations, shapes, dtypes and values are compared in order: to the bit, or with `tolerance` up to
    that difference relative to a value's norm, as its checksum shows it. A difference of "input"
    came from outside, as a parameter or data; of "result", from the operation itself.
    """
    for index, (first, second) in enumerate(zip_longest(a.operations, b.operations)):
        found = _difference(first, second, tolerance)
        if found is not None:
            what, text = found
            return Difference(index, first, second, what, _sentence(index, first, second, text))
    return None


def _difference(
    first: Operation | None, second: Operation | None, tolerance: float
) -> tuple[str, str] | None:
    if first is None or second is None:
        ended = "the first" if first is None else "the second"
        return "operation", f"{ended} run has ended"
    if (first.phase, first.name) != (second.phase, second.name):
        return "operation", f"the second run has {second.name} ({second.phase})"
    for what in ("inputs", "outputs"):
        # In backward there is no telling: what forward saved counts as well
        equal = "for equal inputs " if what == "outputs" and first.phase == "forward" else ""
        ours, theirs = getattr(first, what), getattr(second, what)
        one = "input" if what == "inputs" else "result"
        if len(ours) != len(theirs):
            return "operation", f"{len(ours)} {what} against {len(theirs)}"
        for place, (x, y) in enumerate(zip(ours, theirs, strict=True)):
            found = _between(x, y, one, place, tolerance)
            if found is not None:
                return found[0], equal + found[1]
    return None


def _between(x: Value, y: Value, one: str, place: int, tolerance: float) -> tuple[str, str] | None:
    named = f"its {one} {place}" + (f" ({x.name})" if x.name else "")
    for what in ("shape", "dtype"):
        if getattr(x, what) != getattr(y, what):
            return what, f"{named} has {what} {getattr(x, what)} against {getattr(y, what)}"
    if x.checksum is None or y.checksum is None or x.checksum.bits == y.checksum.bits:
        return None
    distance = relative_difference(x.checksum, y.checksum, math.prod(x.shape))
    if distance <= tolerance and tolerance:
        return None
    size = f"a relative difference of about {distance:.1e}" if distance else "other bits"
    return one, f"{named} has other values, with {size}, {x.dtype}{list(x.shape)}"


def relative_difference(x: Checksum, y: Checksum, size: int) -> float:
    """Return about how far two arrays of a size are apart, relative to the larger norm.

    It is the norm of their difference where that has random signs, or one sign; inf for nan in one alone.
    """
    if x.not_finite != y.not_finite:
        return math.inf
    scale = max(x.norm, y.norm)
    if scale == 0:
        return 0.0
    shift = abs(x.sum - y.sum) / math.sqrt(size)
    return max(abs(x.norm - y.norm), abs(x.projection - y.projection), shift) / scale


def _sentence(index: int, first: Operation | None, second: Operation | None, text: str) -> str:
    each = first or second
    assert each is not None
    place = f" at {each.line}" if each.line else ""
    module = f" in {each.module}" if each.module else ""
    elsewhere = ""
    if first is not None and second is not None and first.line != second.line:
        elsewhere = f"; the second run is at {second.line}"
    return (
        f"the runs part at operation {index}, {each.phase} {each.name}{place}{module}: "
        f"{text}{elsewhere}"
    )

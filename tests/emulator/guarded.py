"""Memory that answers every access past its ends."""

from __future__ import annotations

import ctypes
import mmap
from types import TracebackType
from typing import Any

import numpy as np
from numpy.lib.array_utils import byte_bounds

POISON = 0xFF  # read as float16, float32 or float64 it is NaN
WIDEST = 16  # bytes of an access
_PAGE = mmap.PAGESIZE
_GUARD = 1 << 20  # bytes on either side that nobody may touch; they cost addresses, no memory
_KEPT = 1 << 20  # bytes up to which pages are kept for the next launch
_PROTECT_NONE = 0
_libc = ctypes.CDLL(None, use_errno=True)
_spare: dict[int, list[_Pages]] = {}


class _Pages:
    """Some pages between others that nobody may touch."""

    def __init__(self, count: int) -> None:
        self.count = count
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        self.memory = mmap.mmap(-1, count * _PAGE + 2 * _GUARD, flags)
        self.begin = ctypes.addressof(ctypes.c_char.from_buffer(self.memory)) + _GUARD
        self.end = self.begin + count * _PAGE
        for guard in (self.begin - _GUARD, self.end):
            if _libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(_GUARD), _PROTECT_NONE):
                raise OSError(ctypes.get_errno(), "mprotect")


class _Region:
    """A stretch of memory that arguments lie in, and its copy as close to the page after as can be."""

    def __init__(self, begin: int, end: int, offset: int, writable: bool) -> None:
        self.begin = begin
        self.end = end
        self.offset = offset  # of begin from the start of its memory, which the device aligns
        self.writable = writable

    def fill(self, alignment: int) -> None:
        count = -(-(self.end - self.begin + alignment) // _PAGE)
        spare = _spare.setdefault(count, [])
        self.pages = spare.pop() if spare else _Pages(count)
        latest = self.pages.end - (self.end - self.begin)
        self.copy = latest - (latest - self.offset) % alignment
        ctypes.memset(self.pages.begin, POISON, count * _PAGE)
        ctypes.memmove(self.copy, self.begin, self.end - self.begin)

    def damage(self) -> str | None:
        length = self.end - self.begin
        before = ctypes.string_at(self.pages.begin, self.copy - self.pages.begin)
        after = ctypes.string_at(self.copy + length, self.pages.end - self.copy - length)
        for side, content in (("before", before), ("past", after)):
            if content.count(POISON) != len(content):
                return f"wrote {side} the {'start' if side == 'before' else 'end'} of an array"
        return None


class GuardedCopies:
    """Copies of a launch's arrays; arrays that share memory share it in their copies too.

    Memory that an array has for itself begins at a multiple of `alignment`: small, so that little
    is left between its end and the page that nobody may touch.
    """

    def __init__(self, alignment: int = WIDEST) -> None:
        self.alignment = alignment
        self.regions: list[_Region] = []
        self.filled: list[_Region] = []

    def __enter__(self) -> GuardedCopies:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for pages in (region.pages for region in self.filled):
            if pages.count * _PAGE <= _KEPT:
                _spare[pages.count].append(pages)

    def add(self, array: np.ndarray, writable: bool) -> None:
        begin, end = byte_bounds(array) if array.size else (array.ctypes.data,) * 2
        region = _Region(begin, end, begin - _allocation(array), writable)
        for other in [other for other in self.regions if begin < other.end and other.begin < end]:
            self.regions.remove(other)
            first = min(region, other, key=lambda candidate: candidate.begin)
            region = _Region(
                *(first.begin, max(region.end, other.end), first.offset),
                region.writable or other.writable,
            )
        self.regions.append(region)

    def fill(self) -> None:
        for region in self.regions:
            region.fill(self.alignment)
            self.filled.append(region)

    def address(self, array: np.ndarray) -> int:
        """Return where the copy of an array's first element lies."""
        data = array.ctypes.data
        region = next(
            region
            for region in self.regions
            if region.begin <= data < region.end or region.begin == data == region.end
        )
        return region.copy + data - region.begin

    def damage(self) -> str | None:
        """Return what was written where no array is, or None."""
        return next(filter(None, (region.damage() for region in self.regions)), None)

    def copy_back(self) -> None:
        for region in self.regions:
            if region.writable:
                ctypes.memmove(region.begin, region.copy, region.end - region.begin)


def _allocation(array: np.ndarray) -> int:
    """Return the start of the memory that a view is of: on a device it would be aligned."""
    base: Any = array
    while isinstance(base.base, np.ndarray):
        base = base.base
    return base.ctypes.data

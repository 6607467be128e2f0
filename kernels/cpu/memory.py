"""How the C library keeps the memory of arrays."""

from __future__ import annotations

import ctypes
import os

# From <malloc.h> of the GNU C library.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4


def keep_freed_memory() -> None:
    """Let freed memory stay with the process, for the next array of its size.

    By itself, malloc asks the system for each array of more than 32 MB and gives it back, and gives
    back what is free at the heap's end. The system clears memory that it hands out, page by page:
    for an array of 51 MB that takes 12 ms where a pass over it takes 4. The peak is the same; what
    was reached once is kept, as by other libraries' caching allocators. A user's own MALLOC_...
    settings stand. Other C libraries are left alone.
    """
    if os.environ.get("MALLOC_MMAP_MAX_") or os.environ.get("MALLOC_TRIM_THRESHOLD_"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None and _is_gnu():
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _is_gnu() -> bool:
    try:
        return (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc")
    except (AttributeError, ValueError, OSError):
        return False

"""Emulated kernels under watch: ``python -m tests.emulator.watch tests/kernels -k pooling``.

Runs the tests that pytest's arguments select, with every access of the emulated kernels watched: a
race fails its test. Then prints, for each load and store of the kernels' sources, into how many
pieces the memory system cuts it: sectors of 32 bytes of global memory, passes through the banks of
shared memory. `ideal` is the share of the pieces that
would do if the lanes of a warp accessed neighbours; it says nothing of caches.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from tests.emulator.emulator import Access, Emulator


def table(accesses: Sequence[Access]) -> str:
    """Return a row for each load and store of a source; those of several instantiations are added."""
    added: dict[tuple[str, str, str, int], list[int]] = {}
    for access in accesses:
        key = (access.line or access.kernel, access.memory, access.kind, access.bytes)
        counts = added.setdefault(key, [0, 0, 0])
        for at, count in enumerate((access.requests, access.pieces, access.least)):
            counts[at] += count
    lines = [f"{'':32}{'bytes':>6}{'requests':>12}{'pieces each':>13}{'ideal':>7}"]
    for (line, memory, kind, size), (requests, pieces, least) in added.items():
        name = f"{line}: {memory} {kind}"
        lines.append(
            f"{name:<32}{size:>6}{requests:>12}{pieces / requests:>13.2f}{least / pieces:>7.0%}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    Emulator.watched = True
    chosen = list(sys.argv[1:] if arguments is None else arguments) or ["tests/kernels"]
    emulator = Emulator()
    emulator.accesses()
    status = pytest.main([*chosen, "-p", "no:cacheprovider"])
    print(table(emulator.accesses()))
    return int(status)


if __name__ == "__main__":
    sys.exit(main())

"""Kernels whose accesses are watched: races are found in any order, and accesses are counted."""

import re

import numpy as np
import pytest

from gradengine.kernels.cuda.launch import kernel
from tests.emulator.emulator import EmulatorError
from tests.emulator.fixtures import every_schedule

THREADS = 64


@pytest.fixture(autouse=True)
def _watched(emulated_cuda):
    emulated_cuda.watched = True
    emulated_cuda.accesses()


def launch(name, *arguments, grid=1, block=THREADS, shared_bytes=4 * THREADS):
    kernel("faults.cu", name)((grid,), (block,), arguments, shared_bytes)


def arrays(name):
    """Return the arguments of a kernel of faults.cu and its launch's sizes."""
    x, y = np.arange(6 * 4 * THREADS, dtype=np.float32), np.zeros(6 * 4 * THREADS, np.float32)
    return {
        "rotate_in_place": ((x,), {}),
        "chain": ((x,), {"grid": 3}),
        "copy_by_ring": ((x, y), {"shared_bytes": 3 * 16 * THREADS}),
        "sum_blocks": ((x, y), {"grid": 3}),
        "sum_by_last_block": ((x, y, np.zeros(1, np.uint32), np.zeros(1, np.float32)), {"grid": 3}),
    }.get(name, ((x, y), {}))


LINE = r"faults.cu line \d+"


@every_schedule
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rotate", "race in shared memory: a (read|write) meets the (read|write) by"),
        ("rotate_in_place", "race in shared memory: a (read|write) meets the (read|write) by"),
        ("swap_neighbours", "race in shared memory: a (read|write) meets the (read|write) by"),
        (
            "chain",
            "race in global memory: a (read|write) meets the .* by thread 0 of another block",
        ),
        (
            "sum_blocks",
            "race in global memory: a read meets the write by thread 0 of another block",
        ),
        (
            "sum_by_last_block",
            "race in global memory: a read meets the write by thread 0 of another",
        ),
    ],
)
def test_faults_are_found_in_every_order(name, message, emulated_cuda):
    arguments, sizes = arrays(name)
    launch(f"{name}<NONE>", *arguments, **sizes)
    if name == "sum_by_last_block" and emulated_cuda.schedule.order != "forward":
        message = f"{message}|race in global memory: a write meets the read"
    with pytest.raises(EmulatorError, match=rf"^faults.cu: .*, {LINE}: ({message})"):
        launch(f"{name}<PLANTED>", *arguments, **sizes)


@every_schedule
def test_copies_that_are_late_or_overwritten(emulated_cuda):
    arguments, sizes = arrays("copy_by_ring")
    launch("copy_by_ring<SOUND>", *arguments, **sizes)
    with pytest.raises(
        EmulatorError, match="a read meets the copy that may still be on its way by"
    ):
        launch("copy_by_ring<LATE>", *arguments, **sizes)
    with pytest.raises(EmulatorError, match="a (copy meets the read|read meets the copy that may)"):
        launch("copy_by_ring<OVERWRITTEN>", *arguments, **sizes)


def test_a_race_names_both_lines():
    arguments, sizes = arrays("rotate_in_place")
    with pytest.raises(EmulatorError) as caught:
        launch("rotate_in_place<PLANTED>", *arguments, **sizes)
    lines = re.findall(r"faults.cu line (\d+)", str(caught.value))
    assert len(lines) == 2
    assert lines[0] != lines[1]


@pytest.mark.parametrize("name", ["load_tile<true>", "load_tile<false>"])
def test_matrices_are_watched(name, emulated_cuda):
    x, y = np.arange(256, dtype=np.uint32), np.zeros(128, np.uint32)
    launch(name, x, y, block=32, shared_bytes=1024)
    (load,) = [
        row for row in emulated_cuda.accesses() if (row.memory, row.kind) == ("shared", "read")
    ]
    assert (load.bytes, load.requests, load.least) == (16, 1, 4)
    assert load.pieces == (4 if "true" in name else 32)


@pytest.mark.parametrize(
    ("value", "step", "sectors", "passes"),
    [
        ("float", 1, 4, 1),
        ("float", 2, 8, 2),
        ("float", 8, 32, 8),
        ("float4", 1, 16, 4),
        ("float4", 2, 32, 8),
        ("float2", 1, 8, 2),
    ],
)
def test_requests_are_cut_into_pieces(value, step, sectors, passes, emulated_cuda):
    x, y = np.zeros(32 * 4 * 8, np.float32), np.zeros(32 * 4, np.float32)
    launch(f"gather<{value}, {step}>", x, y, block=32, shared_bytes=x.nbytes)
    size = {"float": 4, "float2": 8, "float4": 16}[value]
    rows = {(row.memory, row.kind): row for row in emulated_cuda.accesses()}
    assert {row.bytes for row in rows.values()} == {size}
    assert {row.requests for row in rows.values()} == {1}
    assert rows["global", "read"].pieces == sectors
    assert rows["global", "read"].least == rows["global", "write"].pieces == size
    assert rows["shared", "write"].pieces == rows["shared", "read"].pieces == passes
    assert rows["shared", "write"].least == max(size // 4, 1)
    assert all(row.kernel == "faults" and re.match(LINE, row.line) for row in rows.values())

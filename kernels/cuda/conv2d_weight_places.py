"""The gradient of 2-D convolution by the weight on places: pixels in one long row with gaps.

`conv2d_weight_places.cu` says what places are; here are their numbers. On sm_90a, for more than one
tap and more than 8 channels.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda import slices
from gradengine.kernels.cuda.launch import (
    DIVISOR,
    Limits,
    by_value,
    c_name,
    device_limits,
    divisor,
    kernel,
)
from gradengine.kernels.cuda.tiles import CHUNK_BYTES, SLAB_BYTES, WARPGROUP_ARCHITECTURE
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry

SOURCE = "conv2d_weight_places.cu"

# As in the source
MOST_PHASES, MOST_GROUPS, GROUP_TAPS = 4, 18, 3
ROWS = CHANNELS = 64  # of a tile
COLUMN = 8  # channels
WARPGROUPS = 3
THREADS = 128 * WARPGROUPS
STAGES = 4  # of grad in shared memory, and of x beside what is copied ahead
FOUR = 4  # places of float32 that lie in one chunk
PHASES = {2: (4,), 4: (1, 4)}  # that kernels for elements of so many bytes have at most

LEAST_STAGES = 8  # of a slice: its first stages wait for memory
MAXIMUM_PLACES = 1 << 30  # numbers of 32 bits, also of what is copied past the end

_PLACES = np.dtype(
    [
        *((name, np.int32) for name in ("batch", "height", "width", "channels")),
        *((name, np.int32) for name in ("out_height", "out_width", "out_channels", "taps")),
        *((name, np.int32) for name in ("stride_y", "stride_x", "padding_y", "padding_x")),
        *((name, DIVISOR) for name in ("lines", "pitch")),
        *((name, np.int32) for name in ("places", "slice_places", "ring_places", "ahead_places")),
        *((name, np.int32) for name in ("phase_places", "column_bytes")),
        *((name, np.int32) for name in ("phases", "groups")),
        *((name, np.int32, MOST_PHASES) for name in ("phase_rows", "phase_columns")),
        ("backs", np.int32, MOST_GROUPS),
        *(
            (name, np.int32, MOST_GROUPS * GROUP_TAPS)
            for name in ("tap_numbers", "tap_rings", "tap_shifts")
        ),
    ]
)

KERNELS = {
    SOURCE: tuple(
        f"places_grad_weight<{element}, {phases}>"
        for element, itemsize in (("float16", 2), ("bfloat16", 2), ("float", 4))
        for phases in PHASES[itemsize]
    )
}


def partial_sums(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    """Give the gradient's sums of each slice, (slices, K, R * S, C); arrays are channels-last."""
    plan = plan_of(geometry, x.dtype.itemsize, device_limits())
    assert plan is not None
    partials = array_module(x).empty(plan.partials_shape, np.float32)
    run = kernel(SOURCE, f"places_grad_weight<{c_name(x.dtype)}, {plan.phases}>")
    grid = (plan.blocks, plan.partials_shape[0])
    run(grid, (THREADS,), (grad, x, partials, plan.record), plan.shared_bytes)
    return partials


class Plan(NamedTuple):
    """How a geometry is launched."""

    phases: int  # of the kernel
    blocks: int  # of a slice
    partials_shape: tuple[int, ...]
    shared_bytes: int
    record: np.ndarray  # the struct Places, by value


@lru_cache(CACHED_GEOMETRIES)
def plan_of(geometry: Conv2dGeometry, itemsize: int, limits: Limits) -> Plan | None:
    """Plan the kernel's launch, or give None where it does not suit."""
    taps = geometry.kernel_height * geometry.kernel_width
    if (
        limits.architecture != WARPGROUP_ARCHITECTURE
        or geometry.groups > 1
        or geometry.in_channels <= COLUMN
        or taps == 1
    ):
        return None
    row = _Row(geometry, itemsize)
    if (
        len(row.phases) > MOST_PHASES
        or len(row.groups) > MOST_GROUPS
        or row.shared_bytes > limits.shared_bytes
        or row.places + row.ring >= MAXIMUM_PLACES
    ):
        return None
    outputs, channels = geometry.out_channels, geometry.in_channels
    across = -(-channels // CHANNELS) * -(-len(row.groups) // WARPGROUPS)
    blocks = -(-outputs // ROWS) * across
    least = LEAST_STAGES * row.stage
    share = slices.plan(row.places, row.stage, least, blocks, 1, outputs * taps * channels)
    shape = (share.slices, outputs, taps, channels)
    return Plan(row.kernel_phases, blocks, shape, row.shared_bytes, row.record(share.depth))


class _Axis(NamedTuple):
    """Rows, or columns, of a convolution."""

    size: int  # of x
    out: int
    taps: int
    stride: int
    padding: int  # before
    dilation: int

    @property
    def reads(self) -> list[tuple[int, int]]:
        """Return the shift of each tap, and the phase that it reads."""
        return [divmod(tap * self.dilation, self.stride) for tap in range(self.taps)]

    @property
    def spacing(self) -> int:
        """Return the least step from one image, or line, to the next.

        Of each phase, positions `first` to `end` - 1 are x's. What taps read before and behind must
        not be x's of the previous image or of the next.
        """
        least = self.out
        furthest = {phase: shift for shift, phase in self.reads}  # the last tap's
        for phase, shift in furthest.items():
            read = self.out + shift
            first = max(0, -(-(self.padding - phase) // self.stride))
            end = -(-(self.padding + self.size - phase) // self.stride)
            least = max(least, min(end, read), read - first)
        return least


class _Tap(NamedTuple):
    """A tap reads places of a phase that lie `shift` further on than grad's, which are `back` back."""

    number: int
    phase: int
    shift: int
    back: int


class _Row:
    """The row of places of a geometry, and its part in shared memory: fields of struct Places."""

    def __init__(self, geometry: Conv2dGeometry, itemsize: int) -> None:
        self.geometry = geometry
        self.is_float32 = itemsize == np.dtype(np.float32).itemsize
        self.stage = SLAB_BYTES // itemsize
        first = FOUR if self.is_float32 else 1  # x is read from each first place on
        down, across = _axes(geometry)
        self.lines, self.pitch = down.spacing, _rounded(across.spacing, first)
        pairs = [(y, x, r, s) for (r, y), (s, x) in product(down.reads, across.reads)]
        self.phases = sorted({(y, x) for y, x, _, _ in pairs})
        taps = [
            _Tap(number, self.phases.index((y, x)), r * self.pitch + s - s % first, s % first)
            for number, (y, x, r, s) in enumerate(pairs)
        ]
        self.groups = _grouped(taps)
        last_line = (geometry.batch - 1) * self.lines + geometry.out_height - 1
        # what is taken back has come to the last pixel then
        self.places = last_line * self.pitch + geometry.out_width + first - 1
        self.ahead = _rounded(max(tap.shift for tap in taps), self.stage)
        # more than any kernel has are refused
        self.kernel_phases = next((n for n in PHASES[itemsize] if n >= len(self.phases)), 0)
        self._lay_out_memory(itemsize)

    def _lay_out_memory(self, itemsize: int) -> None:
        """Lay out shared memory: stages of grad, two tables, and the rings of x."""
        product_places = 2 * CHUNK_BYTES // itemsize  # of a ring, so many are there twice
        self.ring = self.ahead + STAGES * self.stage
        self.phase_places = self.ring + product_places
        rings = len(self.phases) * self.phase_places * CHANNELS * itemsize
        entries, grad_pitch = self.stage, ROWS * itemsize
        if self.is_float32:
            entries += FOUR
            grad_pitch += 2 * CHUNK_BYTES
        grads = STAGES * entries * grad_pitch
        self.column_bytes = 0
        if not self.is_float32:
            # columns are 16 bytes more than a multiple of 128 apart: one pixel's share no banks
            self.column_bytes = (len(self.phases) * self.phase_places + 1) * CHUNK_BYTES
            rings = CHANNELS // COLUMN * self.column_bytes
        entries += self.kernel_phases * self.stage
        self.shared_bytes = grads + 2 * entries * np.dtype(np.int32).itemsize + rings

    def record(self, slice_places: int) -> np.ndarray:
        """Return the struct Places."""
        geometry, groups = self.geometry, self.groups
        record = np.zeros((), _PLACES)
        for name in ("batch", "height", "width", "out_height", "out_width", "out_channels"):
            record[name] = getattr(geometry, name)
        record["channels"] = geometry.in_channels
        record["taps"] = geometry.kernel_height * geometry.kernel_width
        record["stride_y"], record["stride_x"] = geometry.stride
        record["padding_y"], record["padding_x"] = (before for before, _ in geometry.padding)
        record["lines"], record["pitch"] = divisor(self.lines), divisor(self.pitch)
        for name in ("places", "phase_places", "column_bytes"):
            record[name] = getattr(self, name)
        record["ring_places"], record["ahead_places"] = self.ring, self.ahead
        record["slice_places"] = slice_places
        record["phases"], record["groups"] = len(self.phases), len(groups)
        for number, (y, x) in enumerate(self.phases):
            record["phase_rows"][number], record["phase_columns"][number] = y, x
        for number, group in enumerate(groups):
            record["backs"][number] = group[0].back
            for i in range(GROUP_TAPS):
                tap = group[i] if i < len(group) else group[0]._replace(number=-1)
                at = number * GROUP_TAPS + i
                record["tap_numbers"][at] = tap.number
                record["tap_rings"][at] = tap.phase * self.phase_places
                record["tap_shifts"][at] = tap.shift
        return by_value(record)


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


def _axes(geometry: Conv2dGeometry) -> tuple[_Axis, _Axis]:
    (top, _), (left, _) = geometry.padding
    (step_y, step_x), (spread_y, spread_x) = geometry.stride, geometry.dilation
    rows, columns = geometry.kernel_height, geometry.kernel_width
    return (
        _Axis(geometry.height, geometry.out_height, rows, step_y, top, spread_y),
        _Axis(geometry.width, geometry.out_width, columns, step_x, left, spread_x),
    )


def _grouped(taps: list[_Tap]) -> list[list[_Tap]]:
    """Share taps into groups that have `back` in common."""
    groups: list[list[_Tap]] = []
    for back in sorted({tap.back for tap in taps}):
        alike = [tap for tap in taps if tap.back == back]
        groups += [alike[i : i + GROUP_TAPS] for i in range(0, len(alike), GROUP_TAPS)]
    return groups

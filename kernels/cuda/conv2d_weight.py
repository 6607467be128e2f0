"""The gradient of 2-D convolution by the weight, on tensor cores.

Output pixels are the depth of this product, much larger than its result. Blocks share them in
slices, of which there are as many as keep the device busy, and `slices` adds up what they found.
What tensor cores do not suit is left to `conv2d_plain`. Where the user lets ways be timed, that of
`conv2d_weight_places` is one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d_plain, conv2d_weight_places, slices, tuning
from gradengine.kernels.cuda.launch import (
    Limits,
    address,
    by_value,
    c_name,
    device_limits,
    kernel,
)
from gradengine.kernels.cuda.layout import channels_last
from gradengine.kernels.cuda.tiles import (
    CHUNK_BYTES,
    WARPGROUP_ARCHITECTURE,
    TensorTile,
    covering,
)
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry

SOURCE = "conv2d_weight.cu"

GATHER_TILES = (TensorTile(128, 128, 64, 32, 3), TensorTile(64, 64, 32, 32, 4))

TENSOR_CORE_ARCHITECTURE = 80
MAXIMUM_IMAGE = 1 << 28  # elements: offsets within a patch are 32 bits wide
MAXIMUM_CHUNKS = (
    1 << 30
)  # of 16 bytes, of an array: numbers of 32 bits, which padding may take below 0
MAXIMUM_PIXELS = 1 << 31
MAXIMUM_SPOT = 1 << 9  # rows, columns or images of a patch: numbers of 10 bits, images of 9

# What one multiprocessor of an H100 does in a nanosecond: it decides between ways to compute.
OPERATIONS = {2: 4500.0, 4: 2250.0}  # by the elements' bytes
BYTES = 40.0  # from its level-2 cache
PATCH_NANOSECONDS = 300.0  # of waiting, unless another block works meanwhile
# By warpgroups; what single warps do was measured to take this many times what the figures above say.
WARPGROUP_OPERATIONS = 5500.0
SINGLE_WARPS = 2.5
# Estimates of what warpgroups do not hide: their first operands and last products of a patch; and of
# copying and multiplying, which share the shared memory, a part of the shorter one.
WARPGROUP_NANOSECONDS = 60.0
NOT_HIDDEN = 0.1

TABLE_BYTES = 12  # struct PatchPixel
RESERVED_BYTES = 1 << 10  # of shared memory, for each block


class _Layout(NamedTuple):
    """Where shared memory has the pixels of a patch: fields of struct Window."""

    padded_pixels: int
    stage_bytes: int
    phase_pitch: int
    row_phase_pitch: int
    line_pitch: int
    image_pitch: int
    image_pixels: int = 0
    column_bytes: int = 0
    row_runs: int = 0
    tap_step: int = 0
    step_copies: int = 0


class _Patch(NamedTuple):
    """The pixels of a patch: images x rows x columns of the output, and those of x that they read."""

    images: int
    rows: int
    columns: int
    source_rows: int  # of one image
    source_columns: int

    @property
    def source_pixels(self) -> int:
        return self.images * self.source_rows * self.source_columns


class WindowTile(NamedTuple):
    """Sizes of a block's tile in window_grad_weight, as its template has them."""

    channels: int
    groups: int  # of 8 columns, of each warp

    ROWS = 64
    WARPS = 8

    @property
    def name(self) -> str:
        """Return the kernel's name, {} for the element type."""
        return f"window_grad_weight<{{}}, {self.channels}, {self.groups}>"

    @property
    def threads(self) -> int:
        return 32 * self.WARPS

    @property
    def taps(self) -> int:
        """Return how many taps a block computes at most."""
        return self.WARPS * self.groups * 8 // self.channels

    def pitches(self, itemsize: int) -> tuple[int, int]:
        """Return the bytes from one pixel of grad to the next in shared memory, and of x."""
        pad = 16 if itemsize == 2 else 32
        return self.ROWS * itemsize + pad, self.channels * itemsize + (
            pad if self.channels > 8 else 0
        )

    @property
    def beside(self) -> int:
        """Return how many blocks share a multiprocessor if its memory suffices."""
        return 2 if self.groups <= 4 else 1

    def tap_blocks(self, geometry: Conv2dGeometry) -> int:
        """Return how many blocks share the taps."""
        return -(-geometry.kernel_height * geometry.kernel_width // self.taps)

    def time(self, pixels: int, geometry: Conv2dGeometry, itemsize: int) -> float:
        """Return what a multiprocessor takes to multiply: nanoseconds of the figures above."""
        return 2 * self.ROWS * self.taps * self.channels * pixels / OPERATIONS[itemsize]

    def lay_out(self, patch: _Patch, geometry: Conv2dGeometry, itemsize: int) -> _Layout:
        step_y, step_x = geometry.stride
        images, rows, columns, source_rows, source_columns = patch
        phase_pitch = -(-source_columns // step_x)
        # eight output pixels one after the other shall not meet in a bank, nor where a row ends
        row_pitch = _spaced(phase_pitch * step_x, columns, step_y)
        image_pitch = _spaced(source_rows * row_pitch, rows * columns, 1)
        depth = CHUNK_BYTES * 2 // itemsize
        padded = -(-images * rows * columns // depth) * depth
        grad_pitch, x_pitch = self.pitches(itemsize)
        stage = padded * grad_pitch + images * image_pitch * x_pitch
        return _Layout(padded, stage, phase_pitch, row_pitch, step_y * row_pitch, image_pitch)


class WarpgroupTile(NamedTuple):
    """Sizes of a block's tile in warpgroup_grad_weight: of 16-bit elements, on sm_90a."""

    channels: int
    run_taps: int  # that one product computes
    runs: int  # of a block
    threads: int
    beside: int

    ROWS = 64
    DEPTH = 16  # pixels that one instruction multiplies

    @property
    def name(self) -> str:
        """As WindowTile.name."""
        return f"warpgroup_grad_weight<{{}}, {self.channels}>"

    def row_runs(self, geometry: Conv2dGeometry) -> tuple[int, int]:
        """Return how many runs of taps a row of the kernel has, and the step from tap to tap in them.

        Pixels of x that lie a stride apart are neighbours in shared memory. The taps of a run shall
        be equally far apart there: a multiple of the stride.
        """
        if self.run_taps == 1:
            return geometry.kernel_width, 1
        stride, spread = geometry.stride[1], geometry.dilation[1]
        step = min(stride // gcd(stride, spread), geometry.kernel_width)
        return step * -(-geometry.kernel_width // (step * self.run_taps)), step

    def tap_blocks(self, geometry: Conv2dGeometry) -> int:
        """As WindowTile.tap_blocks."""
        return -(-geometry.kernel_height * self.row_runs(geometry)[0] // self.runs)

    def time(self, pixels: int, geometry: Conv2dGeometry, itemsize: int) -> float:
        """As WindowTile.time; the average of the blocks that share the taps."""
        runs = geometry.kernel_height * self.row_runs(geometry)[0] / self.tap_blocks(geometry)
        operations = 2 * self.ROWS * runs * self.run_taps * self.channels * pixels
        return operations / WARPGROUP_OPERATIONS

    def lay_out(self, patch: _Patch, geometry: Conv2dGeometry, itemsize: int) -> _Layout:
        """Lay rows of grad out as far apart as those of x: see WarpgroupWindow in the source."""
        step_y, step_x = geometry.stride
        lines, pitch = -(-patch.source_rows // step_y), -(-patch.source_columns // step_x)
        phase = lines * pitch
        image_pitch = step_y * step_x * phase
        image_pixels = _rounded((patch.rows - 1) * pitch + patch.columns, self.DEPTH)
        padded = patch.images * image_pixels
        row_runs, tap_step = self.row_runs(geometry)
        spread_y, spread_x = geometry.dilation
        between_taps = tap_step * spread_x // step_x
        # the last run of an image's last pixel, with what rounds pixels up, and with taps that do not exist
        places = (
            y % step_y * step_x * phase + y // step_y * pitch + x % step_x * phase + x // step_x
            for y in range(0, geometry.kernel_height * spread_y, spread_y)
            for run in range(row_runs)
            for x in (spread_x * (run % tap_step + run // tap_step * self.run_taps * tap_step),)
        )
        last = max(places) + (self.run_taps - 1) * between_taps + image_pixels
        pixels = (patch.images - 1) * image_pitch + max(image_pitch, last)
        # columns are 16 bytes more than a multiple of 128 apart: one pixel's share no banks
        column_pixels = _rounded(pixels - 1, 8) + 1
        stage = (padded * self.ROWS + column_pixels * self.channels) * itemsize
        column_bytes = (column_pixels if self.run_taps == 1 else between_taps) * CHUNK_BYTES
        return _Layout(
            *(padded, stage, phase, step_x * phase, pitch, image_pitch, image_pixels),
            *(column_bytes, row_runs, tap_step, self._step_copies(patch, padded, itemsize)),
        )

    def _step_copies(self, patch: _Patch, padded: int, itemsize: int) -> int:
        """Return how many copies a thread issues for each product, the first of a patch.

        All are on their way by the middle of a patch: they take about as long as the rest.
        """
        targets, sources = (
            self.threads * CHUNK_BYTES // (lines * itemsize) for lines in (self.ROWS, self.channels)
        )  # pixels of grad and of x at once
        pixels = patch.images * patch.rows * patch.columns
        copies = -(-pixels // targets) + -(-patch.source_pixels // sources)
        return -(-copies // max(1, padded // self.DEPTH // 2))


def _rounded(number: int, unit: int) -> int:
    return -(-number // unit) * unit


WINDOW_TILES = (WindowTile(64, 9), WindowTile(8, 4))
WARPGROUP_TILES = (WarpgroupTile(64, 1, 9, 384, 1), WarpgroupTile(8, 4, 8, 256, 2))

_WINDOW_FIELDS = (
    *("batch", "height", "width", "channels", "out_height", "out_width", "out_channels"),
    *("kernel_width", "taps", "stride_y", "stride_x", "padding_y", "padding_x"),
    *("dilation_y", "dilation_x", "images", "rows", "columns"),
    *("row_blocks", "column_blocks", "patches", "source_rows", "source_columns"),
    *("padded_pixels", "source_pixels", "stage_bytes"),
    *("phase_pitch", "row_phase_pitch", "line_pitch", "image_pitch"),
    *("image_pixels", "column_bytes", "row_runs", "tap_step", "step_copies", "slice_patches"),
)
_GATHER_FIELDS = (
    *("height", "width", "channels", "out_height", "out_width", "out_channels"),
    *("kernel_width", "taps", "groups", "stride_y", "stride_x", "padding_y", "padding_x"),
    *("dilation_y", "dilation_x", "pixels", "slice_pixels"),
)

_ELEMENTS = ("float16", "bfloat16", "float")
KERNELS = {
    SOURCE: (
        *(tile.name.format(e) for e in _ELEMENTS for tile in WINDOW_TILES),
        *(tile.name.format(e) for e in _ELEMENTS if e != "float" for tile in WARPGROUP_TILES),
        *(
            f"gather_grad_weight<{e}, {', '.join(map(str, t))}>"
            for e in _ELEMENTS
            for t in GATHER_TILES
        ),
    )
}


def grad_weight(
    grad: Array, x: Array, geometry: Conv2dGeometry, out_dtype: Any | None = None
) -> Array:
    """Give the gradient by weight, (K, C / groups, R, S), for grad (N, K, out_height, out_width).

    Its dtype is x's, or out_dtype: float32 is possible for float16 and bfloat16 as well.
    """
    if not _suits(geometry, x.dtype):
        return conv2d_plain.grad_weight(grad, x, geometry, out_dtype)
    filled = _filled(geometry, x.dtype.itemsize)
    grad, x = _aligned(to_nhwc(grad)), _aligned(channels_last(x, filled.channels))
    outputs, channels, height, width = geometry.weight_shape
    out = array_module(x).empty(
        (outputs, height, width, channels), x.dtype if out_dtype is None else out_dtype
    )
    launch = partial(_launch, grad, x, out, filled)
    launch(_timed_way(geometry, x.dtype, out.dtype, launch))
    return from_nhwc(out)


def _launch(grad: Array, x: Array, out: Array, filled: _Filled, way: Way | None) -> None:
    """Write the gradient to out (K, R, S, C / groups), in a way or in that which the rule chooses."""
    outputs, height, width, channels = out.shape
    if way == PLACES:
        partials = conv2d_weight_places.partial_sums(grad, x, filled.geometry)
    else:
        plan = _plan(filled.geometry, x.dtype.itemsize, device_limits(), way)
        partials = array_module(x).empty((plan.slices, *filled.geometry.weight_shape), np.float32)
        run = kernel(SOURCE, plan.name.format(c_name(x.dtype)))
        grid = (plan.blocks, plan.slices)
        run(grid, (plan.threads,), (grad, x, partials, plan.record), plan.shared_bytes)
    lines = partials.reshape(len(partials), outputs * height, filled.taps, -1)
    slices.add_slices(lines, out.reshape(-1, width, channels), filled.first_tap)


def _aligned(array: Array) -> Array:
    """Give a contiguous array at a multiple of 16 bytes: nearly always itself."""
    return array.copy() if address(array) % CHUNK_BYTES else array


def _suits(geometry: Conv2dGeometry, dtype: Any) -> bool:
    if dtype == np.float64 or (dtype == np.float32 and not settings.cuda.conv_tf32):
        return False
    image = max(
        max(geometry.in_channels, 8) * geometry.height * geometry.width,  # few are filled up
        geometry.out_channels * geometry.out_height * geometry.out_width,
    )
    chunk = CHUNK_BYTES // dtype.itemsize
    fills_chunks = geometry.groups == 1 or geometry.in_channels // geometry.groups % chunk == 0
    return (
        fills_chunks
        and geometry.out_channels // geometry.groups % chunk == 0
        and image < MAXIMUM_IMAGE
        and geometry.batch * image < MAXIMUM_CHUNKS * chunk
        and 0 < geometry.batch * geometry.out_height * geometry.out_width < MAXIMUM_PIXELS
        and device_limits().architecture >= TENSOR_CORE_ARCHITECTURE
    )


class _Filled(NamedTuple):
    """A convolution whose channels fill chunks of 16 bytes, equal to one whose channels do not."""

    geometry: Conv2dGeometry
    channels: int  # of x, the new ones zero
    taps: int  # of a row of the kernel, its own from first_tap on
    first_tap: int


@lru_cache(CACHED_GEOMETRIES)
def _filled(geometry: Conv2dGeometry, itemsize: int) -> _Filled:
    """Fill up channels with zeros; up to four, if windows start at even pixels, by pairs of pixels.

    Two neighbouring pixels of 4 channels are one of 8. Windows then start at a pair if stride and
    padding are even; an odd padding is made even by a tap of zeros before the others.
    """
    chunk = CHUNK_BYTES // itemsize
    channels, width, taps = geometry.in_channels, geometry.width, geometry.kernel_width
    (vertical, horizontal), (rows, (left, right)) = geometry.stride, geometry.padding
    is_few = geometry.groups == 1 and channels <= 4
    if is_few and horizontal % 2 == 0 and width % 2 == 0 and geometry.dilation[1] == 1:
        first_tap = left % 2
        taps += first_tap
        taps += taps % 2
        by_pairs = geometry._replace(
            in_channels=8,
            width=width // 2,
            kernel_width=taps // 2,
            stride=(vertical, horizontal // 2),
            padding=(rows, ((left + first_tap) // 2, right)),
        )
        return _Filled(by_pairs, 4, taps, first_tap)
    if geometry.groups == 1 and channels % chunk:
        channels = max(8, -(-channels // chunk) * chunk)
        geometry = geometry._replace(in_channels=channels)
    return _Filled(geometry, channels, taps, 0)


# ---- ways ---------------------------------------------------------------------------------------

PLACES = "places"
Way = TensorTile | WindowTile | WarpgroupTile | str  # gathered, windows of two kinds, or PLACES


def _timed_way(
    geometry: Conv2dGeometry, dtype: Any, out_dtype: Any, run: Callable[[Way], None]
) -> Way | None:
    """Return the way that took least, where the user lets them be timed, else None."""
    if not settings.cuda.benchmark or settings.general.deterministic:
        return None
    ways = possible_ways(geometry, dtype.itemsize, device_limits())
    return tuning.fastest(("weight", geometry, dtype.name, out_dtype.name), ways, run)


@lru_cache(CACHED_GEOMETRIES)
def possible_ways(geometry: Conv2dGeometry, itemsize: int, limits: Limits) -> tuple[Way, ...]:
    """Return the ways to compute what suits tensor cores."""
    geometry = _filled(geometry, itemsize).geometry
    ways: list[Way] = [tile for tile in GATHER_TILES if tile.shared_bytes <= limits.shared_bytes]
    if _has_windows(geometry):
        tiles = _window_tiles(geometry, itemsize, limits)
        ways += [tile for tile in tiles if any(_windows(tile, geometry, itemsize, limits))]
    if conv2d_weight_places.plan_of(geometry, itemsize, limits) is not None:
        ways.append(PLACES)
    return tuple(ways)


# ---- plans --------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How a geometry is launched."""

    name: str  # of the kernel, {} for the element type
    threads: int
    blocks: int  # of a slice
    slices: int
    shared_bytes: int
    record: np.ndarray  # the struct that the kernel takes, by value


@lru_cache(CACHED_GEOMETRIES)
def _plan(geometry: Conv2dGeometry, itemsize: int, limits: Limits, way: Way | None = None) -> _Plan:
    """Plan a way; None is what takes a multiprocessor least time, if it had to do everything."""
    if isinstance(way, TensorTile):
        return _gather_plan(way, geometry)
    if isinstance(way, WindowTile | WarpgroupTile):
        windows = _windows(way, geometry, itemsize, limits)
        return _window_plan(min(windows, key=lambda window: window.time), geometry)
    tile = min(
        (tile for tile in GATHER_TILES if tile.shared_bytes <= limits.shared_bytes),
        key=lambda tile: _gather_time(tile, geometry, itemsize),
    )
    window = _window(geometry, itemsize, limits)
    if window is None or _gather_time(tile, geometry, itemsize) < window.time:
        return _gather_plan(tile, geometry)
    return _window_plan(window, geometry)


def _gather_time(tile: TensorTile, geometry: Conv2dGeometry, itemsize: int) -> float:
    outputs, channels, height, width = geometry.weight_shape
    blocks = geometry.groups * covering(tile, outputs // geometry.groups, height * width * channels)
    operations = 2 * tile.rows * tile.columns / OPERATIONS[itemsize]
    loads = (tile.rows + tile.columns) * itemsize / BYTES
    return blocks * _pixels(geometry) * max(operations, loads)


def _gather_plan(tile: TensorTile, geometry: Conv2dGeometry) -> _Plan:
    outputs, channels, height, width = geometry.weight_shape
    columns = height * width * channels
    blocks = geometry.groups * covering(tile, outputs // geometry.groups, columns)
    # slabs hold at most 64 pixels, and the first of a slice wait for memory
    share = slices.plan(_pixels(geometry), 64, 512, blocks, 2, outputs * columns)
    record = _record(_GATHER_FIELDS, geometry, pixels=_pixels(geometry), slice_pixels=share.depth)
    name = f"gather_grad_weight<{{}}, {', '.join(map(str, tile))}>"
    return _Plan(name, tile.threads, blocks, share.slices, tile.shared_bytes, record)


class _Window(NamedTuple):
    """Patches, and what they take."""

    tile: WindowTile | WarpgroupTile
    patch: _Patch
    layout: _Layout
    shared_bytes: int
    beside: int  # blocks that one multiprocessor runs at a time
    time: float  # of a multiprocessor, for everything


def _window(geometry: Conv2dGeometry, itemsize: int, limits: Limits) -> _Window | None:
    """Choose patches, or none where the kernels do not suit."""
    if not _has_windows(geometry):
        return None
    windows = (
        window
        for tile in _window_tiles(geometry, itemsize, limits)
        for window in _windows(tile, geometry, itemsize, limits)
    )
    return min(windows, key=lambda window: window.time, default=None)


def _has_windows(geometry: Conv2dGeometry) -> bool:
    return geometry.groups == 1 and geometry.kernel_height * geometry.kernel_width > 1


def _window_tiles(
    geometry: Conv2dGeometry, itemsize: int, limits: Limits
) -> tuple[WindowTile | WarpgroupTile, ...]:
    is_few = geometry.in_channels <= 8
    if itemsize == 2 and limits.architecture == WARPGROUP_ARCHITECTURE:
        return WINDOW_TILES[is_few], WARPGROUP_TILES[is_few]
    return (WINDOW_TILES[is_few],)


def _windows(
    tile: WindowTile | WarpgroupTile, geometry: Conv2dGeometry, itemsize: int, limits: Limits
) -> Iterator[_Window]:
    """Give all sensible patches that fit into shared memory."""
    height, width = geometry.out_height, geometry.out_width
    for strips in range(1, -(-width // 8) + 1):
        columns = -(-width // strips)
        for rows in range(1, height + 1):
            window = _patch(tile, geometry, itemsize, limits, (1, rows, columns))
            if window is None:
                break
            yield window
            if (rows, columns) != (height, width):
                continue
            for images in range(2, geometry.batch + 1):
                window = _patch(tile, geometry, itemsize, limits, (images, rows, columns))
                if window is None:
                    break
                yield window


def _patch(
    tile: WindowTile | WarpgroupTile,
    geometry: Conv2dGeometry,
    itemsize: int,
    limits: Limits,
    size: tuple[int, int, int],
) -> _Window | None:
    """Lay a patch out in shared memory, and estimate what it takes; None if it does not fit."""
    images, rows, columns = size
    (step_y, step_x), (spread_y, spread_x) = geometry.stride, geometry.dilation
    source_rows = (rows - 1) * step_y + (geometry.kernel_height - 1) * spread_y + 1
    source_columns = (columns - 1) * step_x + (geometry.kernel_width - 1) * spread_x + 1
    patch = _Patch(images, rows, columns, source_rows, source_columns)
    layout = tile.lay_out(patch, geometry, itemsize)
    padded, sources = layout.padded_pixels, patch.source_pixels
    shared_bytes = 2 * layout.stage_bytes + TABLE_BYTES * (padded + sources)
    if (
        max(images, source_rows, source_columns) >= MAXIMUM_SPOT
        or shared_bytes > limits.shared_bytes
    ):
        return None
    needed = tile.beside * (shared_bytes + RESERVED_BYTES)
    beside = tile.beside if needed <= limits.shared_bytes + RESERVED_BYTES else 1
    loads = (images * rows * columns * tile.ROWS + sources * tile.channels) * itemsize / BYTES
    patches = _count_patches(patch, geometry) * _window_blocks(tile, geometry)
    waiting = PATCH_NANOSECONDS * (beside == 1)
    products = tile.time(padded, geometry, itemsize)
    time = max(products, loads) + waiting
    if isinstance(tile, WarpgroupTile):
        time += NOT_HIDDEN * min(products, loads) + WARPGROUP_NANOSECONDS
        time /= SINGLE_WARPS
    return _Window(tile, patch, layout, shared_bytes, beside, patches * time)


def _count_patches(patch: _Patch, geometry: Conv2dGeometry) -> int:
    down, across = -(-geometry.out_height // patch.rows), -(-geometry.out_width // patch.columns)
    return -(-geometry.batch // patch.images) * down * across


def _spaced(least: int, pixels: int, steps: int) -> int:
    """Return a pitch from `least` on whose `steps`-fold is `pixels` beyond a multiple of 8."""
    return next((p for p in range(least, least + 8) if (steps * p - pixels) % 8 == 0), least)


def _window_blocks(tile: WindowTile | WarpgroupTile, geometry: Conv2dGeometry) -> int:
    across = -(-geometry.in_channels // tile.channels) * tile.tap_blocks(geometry)
    return -(-geometry.out_channels // tile.ROWS) * across


def _window_plan(window: _Window, geometry: Conv2dGeometry) -> _Plan:
    tile, patch = window.tile, window.patch
    patches = _count_patches(patch, geometry)
    blocks = _window_blocks(tile, geometry)
    outputs, channels, height, width = geometry.weight_shape
    size = outputs * height * width * channels
    share = slices.plan(patches, 1, 2, blocks, window.beside, size)
    record = _record(
        _WINDOW_FIELDS,
        geometry,
        **patch._asdict(),
        **window.layout._asdict(),
        source_pixels=patch.source_pixels,
        row_blocks=-(-geometry.out_height // patch.rows),
        column_blocks=-(-geometry.out_width // patch.columns),
        patches=patches,
        slice_patches=share.depth,
    )
    return _Plan(tile.name, tile.threads, blocks, share.slices, window.shared_bytes, record)


def _record(fields: tuple[str, ...], geometry: Conv2dGeometry, **others: int) -> np.ndarray:
    """Return a struct of ints: sizes of the geometry under its names, and others."""
    values = {
        **geometry._asdict(),
        "channels": geometry.in_channels,
        "taps": geometry.kernel_height * geometry.kernel_width,
        **others,
    }
    pads = tuple(before for before, _ in geometry.padding)
    pairs = {"stride": geometry.stride, "padding": pads, "dilation": geometry.dilation}
    for name, (vertical, horizontal) in pairs.items():
        values[f"{name}_y"], values[f"{name}_x"] = vertical, horizontal
    numbers = tuple(values[name] for name in fields)
    return by_value(np.array(numbers, [(name, np.int32) for name in fields]))


def _pixels(geometry: Conv2dGeometry) -> int:
    return geometry.batch * geometry.out_height * geometry.out_width

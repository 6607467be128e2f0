"""Direct convolution: the microkernel on the pixels themselves, with no columns written anywhere.

Pixels are (N, H, W, C): the C channels of S neighbouring pixels are one run of memory, so a row of
a kernel is one product of depth S * C. A worker copies the rows that it needs, with their padding,
into scratch (or takes x itself where nothing is padded), and every place is then a plain distance.

In comments: N images, C channels in, K out, H x W pixels in, P x Q out, R x S taps; `own` channels
are those of one group. Sizes travel as one tuple, `sizes`: see `taps_and_steps`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.kernels.cpu import epilogue, microkernel
from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.microkernel import columns_of
from gradengine.kernels.cpu.simd import (
    clear_run,
    copy_run,
    lanes,
    pointer,
    shifted,
    transpose,
)
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.workspace import workspace

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array

BLOCK_BYTES = 512 << 10  # of rows read and written: they stay in L2 beside a panel of weights
TASKS = 4  # for each thread, so that they balance


def taps_and_steps(geometry: Conv2dGeometry) -> tuple[int, ...]:
    """Return taps, strides, dilations, padding before, and groups: (R, S, 2, 2, 2, 1 numbers)."""
    (top, _), (left, _) = geometry.padding
    return (
        geometry.kernel_height, geometry.kernel_width, *geometry.stride, *geometry.dilation,
        top, left, geometry.groups,
    )  # fmt: skip


# ---- weights -------------------------------------------------------------------------------------


def pack(weight: Array, geometry: Conv2dGeometry) -> Array:
    """Lay weight (K, R, S, C / groups) out as (panels of K, R * S * C / groups, columns).

    Each group has panels of its own; missing columns are zero.
    """
    outputs, height, width, channels = weight.shape
    groups, columns = geometry.groups, microkernel.width(weight.dtype)
    panels = groups * -(-(outputs // groups) // columns)
    packed = np.empty((panels, height * width * channels, columns), weight.dtype)
    rows = weight.reshape(groups, outputs // groups, packed.shape[1])
    _pack(min(get_num_threads(), panels), rows, packed)
    return packed


@parallel_kernel
def _pack(worker, workers, weight, packed):
    for panel in range(worker, len(packed), workers):
        pack_panel(weight, panel, pointer(packed[panel], 0))


@kernel_part
def pack_panel(weight, panel, target):
    """Transpose one panel's rows of weight (groups, own K, depth) to (depth, columns)."""
    outputs, depth = weight.shape[1], weight.shape[2]
    columns, count = columns_of(weight), lanes(weight)
    panels = (outputs + columns - 1) // columns
    group, first = panel // panels, panel % panels * columns
    wide = depth // count * count
    for block in range(0, columns, count):
        full = first + block + count <= outputs
        if full:
            source = pointer(weight, (group * outputs + first + block) * depth)
            for at in range(0, wide, count):
                transpose(
                    shifted(source, at), depth, shifted(target, at * columns + block), columns
                )
        for k in range(block, block + count):
            row = weight[group, min(first + k, outputs - 1)]
            for at in range(wide if full else 0, depth):
                place = shifted(target, at * columns + k)
                place[0] = row[at] if first + k < outputs else 0


# ---- padded rows ---------------------------------------------------------------------------------


@kernel_part
def _copy_rows(x, image, top, left, rows, columns, scratch):
    """Copy rows x columns pixels of x (N, H, W, C), from (top, left) on; those outside are zero."""
    height, width, channels = x.shape[1], x.shape[2], x.shape[3]
    before = min(max(-left, 0), columns)
    stop = max(min(columns, width - left), before)
    for i in range(rows):
        target = pointer(scratch, i * columns * channels)
        inside = 0 <= top + i < height
        start, end = (before * channels, stop * channels) if inside else (0, 0)
        clear_run(target, start)
        if inside:
            source = ((image * height + top + i) * width + left) * channels
            copy_run(pointer(x, source + start), shifted(target, start), end - start)
        clear_run(shifted(target, end), columns * channels - end)


# ---- forward -------------------------------------------------------------------------------------


def convolve(
    x: Array,
    weight: Array,
    packed: Any,
    out: Array,
    geometry: Conv2dGeometry,
    finish: epilogue.Finish,
) -> None:
    """Convolve x (N, H, W, C) with weight, or what `pack` made of it, into out (N, P, Q, K)."""
    if packed is None:
        packed = pack(weight, geometry)
    panels = packed.shape[0]
    threads = get_num_threads()
    rows = _block_rows(geometry, x.itemsize)
    blocks = block_count(geometry, x.itemsize)
    even = blocks >= TASKS * threads or blocks % threads == 0
    groups = 1 if even else min(threads, panels)
    workers = min(threads, blocks * groups)
    size = _padded_rows(geometry, rows) * _padded_columns(geometry) * geometry.in_channels
    padded = any(before or after for before, after in geometry.padding)
    with workspace(workers, size if padded else 0, dtype=x.dtype) as scratch:
        sizes = taps_and_steps(geometry)
        _convolve(workers, x, packed, out, sizes, rows, groups, scratch, *finish)


def block_count(geometry: Conv2dGeometry, itemsize: int) -> int:
    """Return in how many blocks of rows the output is made."""
    return geometry.batch * -(-geometry.out_height // _block_rows(geometry, itemsize))


def _block_rows(geometry: Conv2dGeometry, itemsize: int) -> int:
    """Return how many output rows of an image one block makes: they and what they read fit L2."""
    read = _padded_columns(geometry) * geometry.in_channels * itemsize
    made = geometry.out_width * geometry.out_channels * itemsize
    rows = geometry.out_height
    while rows > 1 and _padded_rows(geometry, rows) * read + rows * made > BLOCK_BYTES:
        rows = (rows + 1) // 2
    return rows


def _padded_rows(geometry: Conv2dGeometry, rows: int) -> int:
    """Return how many input rows `rows` output rows read."""
    taps = (geometry.kernel_height - 1) * geometry.dilation[0]
    return (rows - 1) * geometry.stride[0] + taps + 1


def _padded_columns(geometry: Conv2dGeometry) -> int:
    taps = (geometry.kernel_width - 1) * geometry.dilation[1]
    return (geometry.out_width - 1) * geometry.stride[1] + taps + 1


@parallel_kernel
def _convolve(
    worker, workers, x, packed, out, sizes, rows, groups, scratch, bias, residual, relu, moments
):
    """Each task makes `rows` output rows of one image, for one of `groups` ranges of panels."""
    height, width = out.shape[1], out.shape[2]
    down = (height + rows - 1) // rows
    part = (len(packed) + groups - 1) // groups
    for task in range(worker, len(x) * down * groups, workers):
        block, panel = task // groups, task % groups * part
        stop_panel = min(panel + part, len(packed))
        if panel >= stop_panel:
            continue
        image, first = block // down, block % down * rows
        stop = min(first + rows, height)
        _convolve_rows(
            x, packed, out, sizes, image, first, stop, panel, stop_panel, scratch[worker]
        )
        start, end = (image * height + first) * width, (image * height + stop) * width
        channel = _panel_channels(panel, len(packed), out, sizes)[0]
        last, count = _panel_channels(stop_panel - 1, len(packed), out, sizes)
        epilogue.finish_pixels(
            out, start, end, channel, last + count, bias, residual, relu,
            moments[block],
        )  # fmt: skip


@kernel_part
def _panel_channels(panel, panels, target, sizes):
    """Return the first channel of target (..., channels) that a panel makes, and their count."""
    own = target.shape[3] // sizes[8]
    each = panels // sizes[8]
    first = panel % each * columns_of(target)
    return panel // each * own + first, min(columns_of(target), own - first)


@kernel_part
def _convolve_rows(x, packed, out, sizes, image, first, stop, panel, stop_panel, scratch):
    """Make the output rows first to stop of an image, for the panels `panel` to `stop_panel`."""
    height, width, down, along, spread_r, spread_s, top, left, groups = sizes
    columns, channels = out.shape[2], x.shape[3]
    own = channels // groups
    panels = len(packed) // groups
    across = (columns - 1) * along + (width - 1) * spread_s + 1
    start = first * down - top
    if scratch.size:
        rows = (stop - first - 1) * down + (height - 1) * spread_r + 1
        _copy_rows(x, image, start, -left, rows, across, scratch)
        source = pointer(scratch, 0)
    else:
        across = x.shape[2]
        source = pointer(x, (image * x.shape[1] + start) * x.shape[2] * channels)
    line = across * channels
    step = columns_of(x)
    joined = groups == 1 and spread_s == 1
    for number in range(panel, stop_panel):
        channel, count = _panel_channels(number, len(packed), out, sizes)
        group = number // panels * own
        weights = pointer(packed[number], 0)
        for row in range(first, stop):
            target = pointer(out, ((image * out.shape[1] + row) * columns) * out.shape[3] + channel)
            base = shifted(source, (row - first) * down * line + group)
            if joined:  # a row of the kernel is one run of memory
                microkernel.multiply(
                    columns, base, along * channels, 1, spread_r * line,
                    weights, step, width * own * step,
                    target, out.shape[3], count, width * own, height, False,
                )  # fmt: skip
                continue
            for r in range(height):
                microkernel.multiply(
                    columns, shifted(base, r * spread_r * line), along * channels, 1,
                    spread_s * channels, shifted(weights, r * width * own * step), step, own * step,
                    target, out.shape[3], count, own, width, r > 0,
                )  # fmt: skip


# ---- gradient by x -------------------------------------------------------------------------------


def grad_input(
    grad: Array, weight: Array, onto: Array, out: Array, geometry: Conv2dGeometry
) -> None:
    """Write the gradient by x, (N, H, W, C), for grad (N, P, Q, K) and weight (K, R, S, own C).

    With a stride, input pixels fall into classes that different taps reach: each class is a
    product of its own, and no multiplication by a zero between pixels is made. onto, shaped like
    out or empty, is added.
    """
    packed = pack_taps(weight, geometry.groups)
    threads = get_num_threads()
    rows = _grad_block_rows(geometry, grad.itemsize)
    blocks = geometry.batch * -(-geometry.height // rows)
    even = blocks >= TASKS * threads or blocks % threads == 0
    groups = 1 if even else min(threads, len(packed))
    workers = min(threads, blocks * groups)
    size = _grad_rows(geometry, rows) * _grad_columns(geometry) * geometry.out_channels
    with workspace(workers, size, dtype=grad.dtype) as scratch:
        sizes = taps_and_steps(geometry)
        _grad_input(workers, grad, packed, onto, out, sizes, rows, groups, scratch)


def pack_taps(weight: Array, groups: int) -> Array:
    """Lay weight (K, R, S, own C) out as (panels of C, taps, own K, columns).

    Where it lies, what a tap reads is many pages apart. Missing columns are zero.
    """
    outputs, height, width, own = weight.shape
    columns = microkernel.width(weight.dtype)
    panels = groups * -(-own // columns)
    packed = np.empty((panels, height * width, outputs // groups, columns), weight.dtype)
    rows = weight.reshape(outputs, height * width, own)
    _pack_taps(min(get_num_threads(), outputs), rows, packed)
    return packed


@parallel_kernel
def _pack_taps(worker, workers, weight, packed):
    _, taps, depth, columns = packed.shape
    channels = weight.shape[2]
    each = (channels + columns - 1) // columns
    for k in own_range(worker, workers, len(weight)):
        for tap in range(taps):
            for number in range(each):
                panel = k // depth * each + number
                target = pointer(packed, ((panel * taps + tap) * depth + k % depth) * columns)
                source = (k * taps + tap) * channels + number * columns
                count = min(columns, channels - number * columns)
                copy_run(pointer(weight, source), target, count)
                clear_run(shifted(target, count), columns - count)


def _grad_block_rows(geometry: Conv2dGeometry, itemsize: int) -> int:
    read = _grad_columns(geometry) * geometry.out_channels * itemsize
    made = geometry.width * geometry.in_channels * itemsize
    rows = geometry.height
    while rows > 1 and _grad_rows(geometry, rows) * read + rows * made > BLOCK_BYTES:
        rows = (rows + 1) // 2
    return rows


def _grad_rows(geometry: Conv2dGeometry, rows: int) -> int:
    """Return how many rows of grad `rows` input rows may be read by."""
    taps = (geometry.kernel_height - 1) * geometry.dilation[0]
    return (rows - 1 + taps) // geometry.stride[0] + 2


def _grad_columns(geometry: Conv2dGeometry) -> int:
    taps = (geometry.kernel_width - 1) * geometry.dilation[1]
    return (geometry.width - 1 + taps) // geometry.stride[1] + 2


@parallel_kernel
def _grad_input(worker, workers, grad, packed, onto, out, sizes, rows, groups, scratch):
    """Each task makes `rows` input rows of one image, for one of `groups` ranges of panels."""
    height = out.shape[1]
    down = (height + rows - 1) // rows
    part = (len(packed) + groups - 1) // groups
    for task in range(worker, len(out) * down * groups, workers):
        block, panel = task // groups, task % groups * part
        first = block % down * rows
        _grad_input_rows(
            grad, packed, onto, out, sizes, block // down, first, min(first + rows, height), panel,
            min(panel + part, len(packed)), scratch[worker],
        )  # fmt: skip


@kernel_part
def _grad_input_rows(
    grad, packed, onto, out, sizes, image, first, stop, panel, stop_panel, scratch
):
    """Make the input rows first to stop of an image, for the panels `panel` to `stop_panel`."""
    height, width, down, along, spread_r, spread_s, top, left, groups = sizes
    start = (first + top - (height - 1) * spread_r) // down  # rounds down
    start_column = (left - (width - 1) * spread_s) // along
    rows = (stop - 1 + top) // down - start + 1
    across = (out.shape[2] - 1 + left) // along - start_column + 1
    _copy_rows(grad, image, start, start_column, rows, across, scratch)
    for number in range(panel, stop_panel):
        channel, count = _panel_channels(number, len(packed), out, sizes)
        for row in range(first, stop):
            for phase in range(min(along, out.shape[2])):
                at = ((image * out.shape[1] + row) * out.shape[2] + phase) * out.shape[3] + channel
                pixels = (out.shape[2] - phase + along - 1) // along
                reached = onto.size > 0
                if reached:
                    _copy_channels(onto, out, at, pixels, along * out.shape[3], count)
                for r in range(height):
                    if (row + top - r * spread_r) % down:
                        continue
                    line = (row + top - r * spread_r) // down - start
                    for s in range(width):
                        if (phase + left - s * spread_s) % along:
                            continue
                        column = (phase + left - s * spread_s) // along - start_column
                        _add_tap(
                            scratch, line * across + column, packed, r * width + s, number,
                            groups, out, at, along, pixels, count, reached,
                        )  # fmt: skip
                        reached = True
                if not reached:
                    _clear(out, at, pixels, along * out.shape[3], count)


@kernel_part
def _add_tap(grad, pixel, packed, tap, panel, groups, out, at, along, pixels, count, adds):
    """Add one tap's products to every `along`-th pixel of out from `at` on, for one panel."""
    panels, taps, depth, columns = packed.shape
    outputs = groups * depth
    group = panel // (panels // groups)
    microkernel.multiply(
        pixels, pointer(grad, pixel * outputs + group * depth), outputs, 1, 0,
        pointer(packed, (panel * taps + tap) * depth * columns), columns, 0,
        pointer(out, at), along * out.shape[3], count, depth, 1, adds,
    )  # fmt: skip


@kernel_part
def _copy_channels(source, target, at, pixels, distance, count):
    for pixel in range(pixels):
        place = at + pixel * distance
        copy_run(pointer(source, place), pointer(target, place), count)


@kernel_part
def _clear(out, at, pixels, distance, count):
    for pixel in range(pixels):
        clear_run(pointer(out, at + pixel * distance), count)


# ---- gradient by the weight ----------------------------------------------------------------------

PARTS = 4  # of the batch, each with sums of its own; fixed: any number of threads gives equal bits
SMALL_BYTES = 1 << 20
PANEL_BYTES = 24 << 10  # of one panel of some rows, copied side by side: it stays in L1


def grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    """Give the gradient (K, R, S, own C) by the weight, for grad (N, P, Q, K) and x (N, H, W, C).

    Where a row of the kernel would leave much of the microkernel's columns empty, as for three
    channels, x and grad change roles and the gradient is made transposed.
    """
    outputs, own, height, width = geometry.weight_shape
    columns = microkernel.width(x.dtype)
    joined = geometry.groups == 1 and geometry.dilation[1] == 1
    swapped = joined and width * own % columns > 0 and width * own < 2 * columns
    shape = (height, width, own, outputs) if swapped else (outputs, height, width, own)
    small = outputs * height * width * own * x.itemsize <= SMALL_BYTES
    parts = min(geometry.batch, PARTS if small else 2)
    threads = get_num_threads()
    ranges = 1 if swapped else min(-(-threads // parts), outputs // geometry.groups)
    out = np.empty((parts, *shape), x.dtype)
    size = _padded_rows(geometry, geometry.out_height) * _padded_columns(geometry)
    size = size * geometry.in_channels if any(map(any, geometry.padding)) else 0
    rows = max(PANEL_BYTES // (geometry.out_width * microkernel.WIDTH_BYTES), 1)
    panel = rows * geometry.out_width * columns
    workers = min(threads, parts * ranges)
    with workspace(workers, panel + size, dtype=x.dtype) as scratch:
        sizes = taps_and_steps(geometry)
        _grad_weight(workers, grad, x, out, sizes, ranges, rows, swapped, panel, scratch)
    total = out[0] if parts == 1 else out.sum(axis=0)
    return np.ascontiguousarray(total.transpose(3, 0, 1, 2)) if swapped else total


@parallel_kernel
def _grad_weight(worker, workers, grad, x, out, sizes, ranges, rows, swapped, panel, scratch):
    """Each task sums some images' gradients, for one of `ranges` ranges of each group's outputs."""
    height, width, down, along, spread_r, spread_s, top, left, groups = sizes
    own = grad.shape[3] // groups
    length = (own + ranges - 1) // ranges
    for task in range(worker, len(out) * ranges, workers):
        part, begin = task // ranges, task % ranges * length
        start, stop = part * len(x) // len(out), (part + 1) * len(x) // len(out)
        for image in range(start, stop):
            across = x.shape[2]
            pixels = pointer(x, image * x.shape[1] * across * x.shape[3])
            if scratch.shape[1] > panel:
                across = (grad.shape[2] - 1) * along + (width - 1) * spread_s + 1
                lines = (grad.shape[1] - 1) * down + (height - 1) * spread_r + 1
                _copy_rows(x, image, -top, -left, lines, across, scratch[worker, panel:])
                pixels = pointer(scratch[worker], panel)
            for first in range(0, grad.shape[1], rows):
                count = min(rows, grad.shape[1] - first)
                adds = image > start or first > 0
                source = shifted(pixels, first * down * across * x.shape[3])
                at = (image * grad.shape[1] + first) * grad.shape[2] * grad.shape[3]
                if swapped:
                    _add_rows_swapped(
                        grad, at, count, source, across * x.shape[3], x, out[part], sizes, adds,
                        scratch[worker],
                    )  # fmt: skip
                    continue
                for group in range(groups):
                    _add_rows(
                        grad, at, count, source, across * x.shape[3], x, out[part], sizes, group,
                        group * own + begin, min(length, own - begin), adds, scratch[worker],
                    )  # fmt: skip


@kernel_part
def _add_rows(grad, at, rows, source, line, x, out, sizes, group, first, count, adds, panel):
    """Add some rows' products to the gradient (K, R, S, own C) of `count` outputs of a group."""
    height, width, down, along, spread_r, spread_s, _, _, groups = sizes
    channels, own = x.shape[3], out.shape[3]
    joined = groups == 1 and spread_s == 1
    run, step = width * own if joined else own, columns_of(out)
    for r in range(height):
        for s in range(1 if joined else width):
            pixels = shifted(source, r * spread_r * line + s * spread_s * channels + group * own)
            target = ((first * height + r) * width + s) * own
            for column in range(0, run, step):
                _copy_panel(
                    shifted(pixels, column), along * channels, down * line, rows, grad.shape[2],
                    min(step, run - column), panel,
                )  # fmt: skip
                microkernel.multiply(
                    count, pointer(grad, at + first), 1, grad.shape[3], 0,
                    pointer(panel, 0), step, 0,
                    pointer(out, target + column), height * width * own, min(step, run - column),
                    rows * grad.shape[2], 1, adds,
                )  # fmt: skip


@kernel_part
def _add_rows_swapped(grad, at, rows, source, line, x, out, sizes, adds, panel):
    """Add some rows' products to the transposed gradient (R, S, C, K)."""
    height, width, down, along, spread_r = sizes[:5]
    channels, outputs, step = x.shape[3], out.shape[3], columns_of(out)
    run = width * channels
    for column in range(0, outputs, step):
        count = min(step, outputs - column)
        _copy_panel(pointer(grad, at + column), outputs, 0, 1, rows * grad.shape[2], count, panel)
        for r in range(height):
            microkernel.multiply(
                run, shifted(source, r * spread_r * line), 1, along * channels, down * line,
                pointer(panel, 0), step, grad.shape[2] * step,
                pointer(out, r * run * outputs + column), outputs, count, grad.shape[2], rows,
                adds,
            )  # fmt: skip


@kernel_part
def _copy_panel(source, distance, line, rows, columns, count, panel):
    """Copy `count` channels, at most as many as the tile is wide, of rows x columns pixels.

    Read where they lie, pixels a power of two apart would share a few sets of L1.
    """
    step = columns_of(panel)
    for row in range(rows):
        for column in range(columns):
            target = pointer(panel, (row * columns + column) * step)
            if count == step:
                microkernel.copy_columns(shifted(source, row * line + column * distance), target)
            else:
                copy_run(shifted(source, row * line + column * distance), target, count)

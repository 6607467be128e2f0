"""Convolution of small planes: the pixels that each output pixel reads, in one row of a matrix.

Where an image has few pixels, tiles of the microkernel would be mostly empty and each image would
read all weights again. Rows of many images together fill them. Groups are not served here.

In comments: N images, C channels in, K out, P x Q pixels out, R x S taps; a column is R * S * C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.kernels.cpu import epilogue, microkernel
from gradengine.kernels.cpu.direct import pack, pack_panel, pack_taps, taps_and_steps
from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.microkernel import columns_of
from gradengine.kernels.cpu.simd import clear_run, copy_run, pointer
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.workspace import workspace

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array

BLOCK = 64  # output pixels whose columns a worker copies at a time
PAD = 16  # elements between columns, which must not lie 4096 bytes apart
DEPTH = 128  # pixels that are multiplied at a time: what they have of a panel stays in L1
CHUNK_BYTES = 8 << 20  # of columns, written by one loop and read by the next, from L3


SHORT_ROW = 14


def is_suitable(geometry: Conv2dGeometry) -> bool:
    """Whether an output row is too short for the direct kernels."""
    return geometry.groups == 1 and geometry.out_width < SHORT_ROW


def _column(geometry: Conv2dGeometry) -> int:
    return geometry.kernel_height * geometry.kernel_width * geometry.in_channels


@kernel_part
def _copy_columns(x, out, first, stop, sizes, scratch, row):
    """Copy what the output pixels first to stop read, to rows of scratch; padding becomes zero."""
    height, width, down, along, spread_r, spread_s, top, left, _ = sizes
    channels = x.shape[3]
    for pixel in range(first, stop):
        image, place = pixel // (out.shape[1] * out.shape[2]), pixel % (out.shape[1] * out.shape[2])
        for tap in range(height * width):
            y = place // out.shape[2] * down + tap // width * spread_r - top
            z = place % out.shape[2] * along + tap % width * spread_s - left
            target = pointer(scratch, (pixel - first) * row + tap * channels)
            if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                source = pointer(x, ((image * x.shape[1] + y) * x.shape[2] + z) * channels)
                copy_run(source, target, channels)
            else:
                clear_run(target, channels)


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
    threads = get_num_threads()
    blocks = block_count(geometry, x.itemsize)
    if packed is None:  # a weight that is used once is transposed where it is used
        packed = epilogue.absent(3, x.dtype) if blocks == 1 else pack(weight, geometry)
    depth, width = _column(geometry), microkernel.width(x.dtype)
    groups = 1 if blocks % threads == 0 else min(threads, -(-out.shape[3] // width))
    workers = min(threads, blocks * groups)
    size = BLOCK * (depth + PAD) + (0 if packed.size else depth * width)
    weight = weight.reshape(1, len(weight), -1) if weight.size else epilogue.absent(3, x.dtype)
    with workspace(workers, size, dtype=x.dtype) as scratch:
        sizes = taps_and_steps(geometry)
        _convolve(workers, x, weight, packed, out, sizes, groups, scratch, *finish)


def block_count(geometry: Conv2dGeometry, itemsize: int) -> int:
    """Return in how many blocks of pixels the output is made."""
    return -(-geometry.batch * geometry.out_height * geometry.out_width // BLOCK)


@parallel_kernel
def _convolve(
    worker, workers, x, weight, packed, out, sizes, groups, scratch, bias, residual, relu, moments
):
    """Each task makes BLOCK pixels for one of `groups` groups of panels.

    weight (1, K, column) or packed (panels, column, columns of the microkernel).
    """
    own = scratch[worker]
    outputs, width = out.shape[3], columns_of(out)
    pixels, panels = out.size // outputs, (outputs + width - 1) // width
    depth, part = sizes[0] * sizes[1] * x.shape[3], (panels + groups - 1) // groups
    row = depth + PAD
    for task in range(worker, (pixels + BLOCK - 1) // BLOCK * groups, workers):
        block, panel = task // groups, task % groups * part
        first, stop = block * BLOCK, min((block + 1) * BLOCK, pixels)
        stop_panel = min(panel + part, panels)
        _copy_columns(x, out, first, stop, sizes, own, row)
        for number in range(panel, stop_panel):
            weights = pointer(own, BLOCK * row)
            if packed.size:
                weights = pointer(packed[number], 0)
            else:
                pack_panel(weight, number, weights)
            microkernel.multiply(
                stop - first, pointer(own, 0), row, 1, 0, weights, width, 0,
                pointer(out, first * outputs + number * width), outputs,
                min(width, outputs - number * width), depth, 1, False,
            )  # fmt: skip
        if panel < stop_panel:
            epilogue.finish_pixels(
                out, first, stop, panel * width, min(stop_panel * width, outputs), bias, residual,
                relu, moments[block],
            )  # fmt: skip


# ---- gradient by x -------------------------------------------------------------------------------

FEW_PIXELS = 128  # for fewer, copying the weight costs more than the products
RUNS = 16  # rows of the weight that are read at a time where it lies


def grad_input(
    grad: Array, weight: Array, onto: Array, out: Array, geometry: Conv2dGeometry
) -> None:
    """Write the gradient by x, (N, H, W, C), for grad (N, P, Q, K) and weight (K, R, S, C).

    onto, shaped like out or empty, is added.
    """
    outputs, width = grad.shape[3], microkernel.width(grad.dtype)
    taps, panels = geometry.kernel_height * geometry.kernel_width, -(-out.shape[3] // width)
    threads = get_num_threads()
    if grad.size < FEW_PIXELS * outputs:  # all panels together: they read rows from end to end
        weight, together, depth = whole_columns(weight), -(-panels // threads), RUNS
        ways = width, weight.shape[3], taps * weight.shape[3]
    else:
        weight, together, depth = pack_taps(weight, 1), 1, outputs
        ways = taps * outputs * width, outputs * width, width
    with workspace(threads, together * taps * BLOCK * width, dtype=grad.dtype) as scratch:
        sizes = taps_and_steps(geometry)
        _grad_input(
            threads, grad, weight.reshape(-1), ways, onto, out, sizes, together, depth, scratch
        )


def whole_columns(weight: Array) -> Array:
    """Give weight (K, R, S, C) with channels of zeros up to a multiple of the tile's columns."""
    missing = -weight.shape[3] % microkernel.width(weight.dtype)
    return np.pad(weight, ((0, 0), (0, 0), (0, 0), (0, missing))) if missing else weight


@parallel_kernel
def _grad_input(worker, workers, grad, weight, ways, onto, out, sizes, together, depth, scratch):
    """Each task makes some panels of channels of all pixels: no two tasks add to one place.

    ways: how far panels, taps and outputs of weight, flat, lie apart.
    """
    width, outputs, channels = columns_of(out), grad.shape[3], out.shape[3]
    panels, own = (channels + width - 1) // width, scratch[worker]
    for panel in range(worker * together, panels, workers * together):
        stop_panel = min(panel + together, panels)
        channel, stop_channel = panel * width, min(stop_panel * width, channels)
        for pixel in range(out.size // channels):
            begin = pixel * channels + channel
            if onto.size:
                copy_run(pointer(onto, begin), pointer(out, begin), stop_channel - channel)
            else:
                clear_run(pointer(out, begin), stop_channel - channel)
        for first in range(0, grad.size // outputs, BLOCK):
            stop = min(first + BLOCK, grad.size // outputs)
            for begin in range(0, outputs, depth):
                _multiply_taps(
                    grad, first, stop, weight, ways, begin, min(depth, outputs - begin),
                    sizes[0] * sizes[1], panel, stop_panel, own,
                )  # fmt: skip
            for number in range(panel, stop_panel):
                _add_to_pixels(own, number - panel, grad, first, stop, sizes, out, number * width)


@kernel_part
def _multiply_taps(
    grad, first, stop, weight, ways, begin, depth, taps, panel, stop_panel, products
):  # fmt: skip
    """Add what `depth` outputs contribute to products (panels, taps, BLOCK pixels, columns)."""
    outputs, width = grad.shape[3], columns_of(grad)
    for tap in range(taps):
        for number in range(panel, stop_panel):
            place = ((number - panel) * taps + tap) * BLOCK * width
            microkernel.multiply(
                stop - first, pointer(grad, first * outputs + begin), outputs, 1, 0,
                pointer(weight, number * ways[0] + tap * ways[1] + begin * ways[2]), ways[2], 0,
                pointer(products, place), width, width, depth, 1, begin > 0,
            )  # fmt: skip


@kernel_part
def _add_to_pixels(products, number, grad, first, stop, sizes, out, channel):
    """Add the products of a panel, the `number`-th, to the input pixels that each tap reads."""
    height, width, down, along, spread_r, spread_s, top, left, _ = sizes
    columns, count = columns_of(out), min(columns_of(out), out.shape[3] - channel)
    numbers = out.reshape(out.size)
    for tap in range(height * width):
        for pixel in range(first, stop):
            line, across = grad.shape[1], grad.shape[2]
            image, place = pixel // (line * across), pixel % (line * across)
            y = place // across * down + tap // width * spread_r - top
            z = place % across * along + tap % width * spread_s - left
            if 0 <= y < out.shape[1] and 0 <= z < out.shape[2]:
                at = ((image * out.shape[1] + y) * out.shape[2] + z) * out.shape[3] + channel
                begin = ((number * height * width + tap) * BLOCK + pixel - first) * columns
                target, source = numbers[at : at + count], products[begin : begin + count]
                for c in range(count):
                    target[c] += source[c]


# ---- gradient by the weight ----------------------------------------------------------------------


def grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    """Give the gradient (K, R, S, C) by the weight, for grad (N, P, Q, K) and x (N, H, W, C)."""
    outputs, channels, height, width = geometry.weight_shape
    out = np.empty((outputs, height, width, channels), x.dtype)
    pixels, row = grad.size // outputs, _column(geometry) + PAD
    chunk = min(max(CHUNK_BYTES // (row * x.itemsize), BLOCK), pixels)
    # What is read beyond the last column is multiplied, and never stored.
    with workspace(chunk * row + microkernel.width(x.dtype), dtype=x.dtype) as columns:
        sizes, workers = taps_and_steps(geometry), get_num_threads()
        for first in range(0, pixels, chunk):
            stop = min(first + chunk, pixels)
            _copy_chunk(workers, x, grad, first, stop, sizes, row, columns)
            _add_products(workers, grad, first, stop, columns, out)
    return out


@parallel_kernel
def _copy_chunk(worker, workers, x, grad, first, stop, sizes, row, columns):
    """Copy the columns of the pixels first to stop of grad, in rows of `row`."""
    begin = first + (stop - first) * worker // workers
    end = first + (stop - first) * (worker + 1) // workers
    _copy_columns(x, grad, begin, end, sizes, columns[(begin - first) * row :], row)


@parallel_kernel
def _add_products(worker, workers, grad, first, stop, columns, out):
    """Each task adds to one panel of the columns, for all outputs.

    Products of few pixels are soon made: then all panels of some outputs, which lie together.
    """
    outputs, width = len(out), columns_of(out)
    depth = out.size // outputs
    rows = outputs if stop - first >= FEW_PIXELS else 4 * microkernel.ROWS
    for row in range(0, outputs, rows):
        for panel in own_range(worker, workers, (depth + width - 1) // width):
            for begin in range(0, stop - first, DEPTH):
                microkernel.multiply(
                    min(rows, outputs - row),
                    pointer(grad, (first + begin) * outputs + row), 1, outputs, 0,
                    pointer(columns, begin * (depth + PAD) + panel * width), depth + PAD, 0,
                    pointer(out, row * depth + panel * width), depth,
                    min(width, depth - panel * width), min(DEPTH, stop - first - begin), 1,
                    first + begin > 0,
                )  # fmt: skip

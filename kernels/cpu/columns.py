"""Convolution of small planes: the pixels that each output pixel reads, in one row of a matrix.

Where an image has few pixels, tiles of the microkernel would be mostly empty and each image would
read all weights again. Rows of many images together fill them. Groups are not served here.

In comments: N images, C channels in, K out, P x Q pixels out, R x S taps; a column is R * S * C.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.kernels.cpu import epilogue, microkernel
from gradengine.kernels.cpu.direct import pack, pack_panel, taps_and_steps, whole_columns
from gradengine.kernels.cpu.launch import kernel_part, parallel_kernel
from gradengine.kernels.cpu.microkernel import columns_of
from gradengine.kernels.cpu.simd import pointer
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.workspace import workspace

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array

BLOCK = 64  # output pixels whose columns a worker copies at a time
PAD = 16  # elements between columns, which must not lie 4096 bytes apart
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
    numbers = x.reshape(x.size)
    for pixel in range(first, stop):
        image, place = pixel // (out.shape[1] * out.shape[2]), pixel % (out.shape[1] * out.shape[2])
        for tap in range(height * width):
            y = place // out.shape[2] * down + tap // width * spread_r - top
            z = place % out.shape[2] * along + tap % width * spread_s - left
            begin = (pixel - first) * row + tap * channels
            target = scratch[begin : begin + channels]
            if 0 <= y < x.shape[1] and 0 <= z < x.shape[2]:
                at = ((image * x.shape[1] + y) * x.shape[2] + z) * channels
                source = numbers[at : at + channels]
                for c in range(channels):
                    target[c] = source[c]
            else:
                for c in range(channels):
                    target[c] = 0


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


def grad_input(grad: Array, weight: Array, out: Array, geometry: Conv2dGeometry) -> None:
    """Write the gradient by x, (N, H, W, C), for grad (N, P, Q, K) and weight (K, R, S, C)."""
    weight = whole_columns(weight)
    panels = weight.shape[3] // microkernel.width(grad.dtype)
    workers = min(get_num_threads(), panels)
    size = BLOCK * microkernel.width(grad.dtype)
    with workspace(workers, size, dtype=grad.dtype) as scratch:
        _grad_input(workers, grad, weight, out, taps_and_steps(geometry), scratch)


@parallel_kernel
def _grad_input(worker, workers, grad, weight, out, sizes, scratch):
    """Each task makes one panel of channels of all pixels: no two tasks add to one place."""
    width = columns_of(out)
    outputs, taps = grad.shape[3], weight.shape[1] * weight.shape[2]
    pixels, own = grad.size // outputs, scratch[worker]
    for panel in range(worker, weight.shape[3] // width, workers):
        channel = panel * width
        count = min(width, out.shape[3] - channel)
        for pixel in range(out.size // out.shape[3]):
            _clear(out, pixel * out.shape[3] + channel, count)
        for first in range(0, pixels, BLOCK):
            stop = min(first + BLOCK, pixels)
            for tap in range(taps):
                microkernel.multiply(
                    stop - first, pointer(grad, first * outputs), outputs, 1, 0,
                    pointer(weight, tap * weight.shape[3] + channel), taps * weight.shape[3], 0,
                    pointer(own, 0), width, width, outputs, 1, False,
                )  # fmt: skip
                _add_to_pixels(own, grad, first, stop, tap, sizes, out, channel, count)


@kernel_part
def _clear(out, at, count):
    target = out.reshape(out.size)[at : at + count]
    for c in range(count):
        target[c] = 0


@kernel_part
def _add_to_pixels(products, grad, first, stop, tap, sizes, out, channel, count):
    """Add a tap's products (pixels, columns) to the input pixels that the tap reads."""
    _, width, down, along, spread_r, spread_s, top, left, _ = sizes
    numbers = out.reshape(out.size)
    for pixel in range(first, stop):
        image, place = (
            pixel // (grad.shape[1] * grad.shape[2]),
            pixel % (grad.shape[1] * grad.shape[2]),
        )
        y = place // grad.shape[2] * down + tap // width * spread_r - top
        z = place % grad.shape[2] * along + tap % width * spread_s - left
        if 0 <= y < out.shape[1] and 0 <= z < out.shape[2]:
            at = ((image * out.shape[1] + y) * out.shape[2] + z) * out.shape[3] + channel
            begin = (pixel - first) * columns_of(out)
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
    """Each task adds to one panel of the columns, for all outputs."""
    outputs, width = len(out), columns_of(out)
    depth = out.size // outputs
    for panel in range(worker, (depth + width - 1) // width, workers):
        microkernel.multiply(
            outputs, pointer(grad, first * outputs), 1, outputs, 0,
            pointer(columns, panel * width), depth + PAD, 0,
            pointer(out, panel * width), depth, min(width, depth - panel * width),
            stop - first, 1, first > 0,
        )  # fmt: skip

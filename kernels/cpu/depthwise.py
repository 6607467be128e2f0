"""Convolution of each channel by itself, as many groups as channels: no product of matrices is in it.

Channels are neighbours in memory, so vectors of them are multiplied by vectors of weights, tap after
tap, a row of pixels at a time: what a row makes stays in L1.

In comments: N images, C channels in and out, H x W pixels in, P x Q out, R x S taps; a line is a row
of pixels of one image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from gradengine.kernels.cpu import epilogue
from gradengine.kernels.cpu.direct import taps_and_steps
from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.simd import clear_run, copy_run, pointer, shifted
from gradengine.kernels.cpu.threads import get_num_threads

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array

BLOCK = 1 << 13  # elements of the lines that are made and finished together
PARTS = 32  # of all lines, each with sums of its own; fixed: any number of threads gives equal bits


def is_suitable(geometry: Conv2dGeometry) -> bool:
    return geometry.groups == geometry.in_channels == geometry.out_channels > 1


def pack(weight: Array, geometry: Conv2dGeometry) -> Array:
    """Lay weight (C, R, S, 1) out as (R * S, C)."""
    return np.ascontiguousarray(weight.reshape(len(weight), -1).T)


def convolve(
    x: Array,
    weight: Array,
    packed: Array | None,
    out: Array,
    geometry: Conv2dGeometry,
    finish: epilogue.Finish,
) -> None:
    """Convolve x (N, H, W, C) with weight, or what `pack` made of it, into out (N, P, Q, C)."""
    if packed is None:
        packed = pack(weight, geometry)
    lines = _block_lines(geometry)
    _convolve(get_num_threads(), x, packed, out, taps_and_steps(geometry), lines, *finish)


def block_count(geometry: Conv2dGeometry, itemsize: int) -> int:
    """Return in how many blocks of lines the output is made."""
    return -(-geometry.batch * geometry.out_height // _block_lines(geometry))


def _block_lines(geometry: Conv2dGeometry) -> int:
    return max(BLOCK // (geometry.out_width * geometry.out_channels), 1)


@parallel_kernel
def _convolve(
    worker, workers, x, packed, out, sizes, lines, bias, residual, relu, moments
):  # fmt: skip
    """Each block has `lines` lines of out; packed (R * S, C)."""
    height, down, spread_r, top = sizes[0], sizes[2], sizes[4], sizes[6]
    total, row = out.shape[0] * out.shape[1], out.shape[2] * out.shape[3]
    for block in own_range(worker, workers, (total + lines - 1) // lines):
        first, stop = block * lines, min((block + 1) * lines, total)
        clear_run(pointer(out, first * row), (stop - first) * row)
        for line in range(first, stop):
            image = line // out.shape[1]
            for r in range(height):
                y = line % out.shape[1] * down + r * spread_r - top
                if 0 <= y < x.shape[1]:
                    _add_taps(out, line, x, image * x.shape[1] + y, packed, r, sizes, False)
        epilogue.finish_pixels(
            out, first * out.shape[2], stop * out.shape[2], 0, out.shape[3], bias, residual, relu,
            moments[block],
        )  # fmt: skip


@kernel_part
def _reach(s, columns, width, sizes):
    """Return the output columns whose tap `s` is a pixel, first and stop, and the first one's pixel."""
    along, spread, left = sizes[3], sizes[5], sizes[7]
    shift = s * spread - left
    first = max((along - 1 - shift) // along, 0)
    stop = min((width - 1 - shift) // along + 1, columns)
    return first, stop, first * along + shift


@kernel_part
def _add_taps(out, line, x, x_line, packed, r, sizes, sends):
    """Add to a line of out what a row of the kernel reads of a line of x; or, if it `sends`, to x."""
    columns, channels, width, along = out.shape[2], out.shape[3], x.shape[2], sizes[3]
    for s in range(sizes[1]):
        first, stop, z = _reach(s, columns, width, sizes)
        weights = pointer(packed, (r * sizes[1] + s) * channels)
        made = pointer(out, (line * columns + first) * channels)
        read = pointer(x, (x_line * width + z) * channels)
        if sends:
            _add_scaled(read, along * channels, made, channels, weights, stop - first, channels)
        else:
            _add_scaled(made, channels, read, along * channels, weights, stop - first, channels)


@kernel_part
def _add_scaled(target, step, source, source_step, weights, pixels, channels):
    """Add pixels of source, times weights, to those of target."""
    for pixel in range(pixels):
        sums, values = shifted(target, pixel * step), shifted(source, pixel * source_step)
        for c in range(channels):
            sums[c] += values[c] * weights[c]


# ---- gradients -----------------------------------------------------------------------------------


def grad_input(
    grad: Array, weight: Array, onto: Array, out: Array, geometry: Conv2dGeometry
) -> None:
    """Write the gradient by x, (N, H, W, C), for grad (N, P, Q, C) and weight (C, R, S, 1).

    onto, shaped like out or empty, is added.
    """
    packed = pack(weight, geometry)
    _grad_input(get_num_threads(), grad, packed, onto, out, taps_and_steps(geometry))


@parallel_kernel
def _grad_input(worker, workers, grad, packed, onto, out, sizes):
    height, down, spread_r, top = sizes[0], sizes[2], sizes[4], sizes[6]
    row = out.shape[2] * out.shape[3]
    for line in own_range(worker, workers, out.shape[0] * out.shape[1]):
        if onto.size:
            copy_run(pointer(onto, line * row), pointer(out, line * row), row)
        else:
            clear_run(pointer(out, line * row), row)
        image, y = line // out.shape[1], line % out.shape[1]
        for r in range(height):
            place = y + top - r * spread_r
            if place >= 0 and place % down == 0 and place // down < grad.shape[1]:
                grad_line = image * grad.shape[1] + place // down
                _add_taps(grad, grad_line, out, line, packed, r, sizes, True)


def grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    """Give the gradient (C, R, S, 1) by the weight, for grad (N, P, Q, C) and x (N, H, W, C)."""
    channels, _, height, width = geometry.weight_shape
    parts = min(PARTS, geometry.batch * geometry.out_height)
    sums = np.zeros((parts, height * width, channels))
    _grad_weight(min(get_num_threads(), parts), grad, x, sums, taps_and_steps(geometry))
    total = sums.sum(axis=0).T.reshape(channels, height, width, 1)
    return np.ascontiguousarray(total, x.dtype)


@parallel_kernel
def _grad_weight(worker, workers, grad, x, sums, sizes):
    """Add up parts of all lines: of each line in the arrays' type, of lines in sums, float64."""
    height, width, down, _, spread_r, _, top = sizes[:7]
    lines, channels = grad.shape[0] * grad.shape[1], grad.shape[3]
    own = np.empty(channels, x.dtype)
    for part in own_range(worker, workers, len(sums)):
        for line in range(lines * part // len(sums), lines * (part + 1) // len(sums)):
            image = line // grad.shape[1]
            for r in range(height):
                y = line % grad.shape[1] * down + r * spread_r - top
                if not 0 <= y < x.shape[1]:
                    continue
                for s in range(width):
                    clear_run(pointer(own, 0), channels)
                    _sum_line(grad, line, x, image * x.shape[1] + y, s, own, sizes)
                    total = sums[part, r * width + s]
                    for c in range(channels):
                        total[c] += own[c]


@kernel_part
def _sum_line(grad, line, x, x_line, s, own, sizes):
    """Add to own (C,) the products of a line of grad with the pixels that tap `s` reads."""
    columns, channels, width = grad.shape[2], grad.shape[3], x.shape[2]
    first, stop, z = _reach(s, columns, width, sizes)
    for column in range(first, stop):
        grads = pointer(grad, (line * columns + column) * channels)
        source = pointer(x, (x_line * width + z) * channels)
        for c in range(channels):
            own[c] += grads[c] * source[c]
        z += sizes[3]

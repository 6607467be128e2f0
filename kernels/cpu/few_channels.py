"""Gradient by x where x has few channels, as images have: a row of the kernel is one run of columns.

A tile of the microkernel for each tap would be mostly empty. Here one product gives, for each pixel
of grad, what all taps send back: R rows of S * C neighbouring numbers, which are added where they
belong. Groups and horizontal dilation are not served here.

In comments: N images, C channels in, K out, H x W pixels in, P x Q out, R x S taps.
"""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import numpy as np

from gradengine.kernels.cpu import microkernel
from gradengine.kernels.cpu.direct import pack_taps, taps_and_steps
from gradengine.kernels.cpu.launch import kernel_part, parallel_kernel
from gradengine.kernels.cpu.simd import clear_run, copy_run, pointer
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.workspace import workspace

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array


def is_suitable(geometry: Conv2dGeometry, dtype: np.dtype) -> bool:
    """Whether channels would fill no more than half of a tile's columns, for each tap anew."""
    return geometry.groups == geometry.dilation[
        1
    ] == 1 and 2 * geometry.in_channels <= microkernel.width(dtype)


def grad_input(
    grad: Array, weight: Array, onto: Array, out: Array, geometry: Conv2dGeometry
) -> None:
    """Write the gradient by x, (N, H, W, C), for grad (N, P, Q, K) and weight (K, R, S, C).

    onto, shaped like out or empty, is added.
    """
    packed = pack_taps(weight.reshape(len(weight), 1, 1, -1), 1)[:, 0]
    threads = get_num_threads()
    parts = threads // gcd(threads, geometry.batch)  # of each image's rows: as many for each thread
    parts = min(parts, geometry.height)
    workers = min(threads, geometry.batch * parts)
    columns = len(packed) * packed.shape[2]
    with workspace(workers, geometry.out_width * columns, dtype=grad.dtype) as scratch:
        sizes = taps_and_steps(geometry)
        _grad_input(workers, grad, packed, onto, out, sizes, parts, scratch)


@parallel_kernel
def _grad_input(worker, workers, grad, packed, onto, out, sizes, parts, scratch):
    """Each task makes one of `parts` parts of an image's rows; packed (panels, K, columns)."""
    height, down, spread_r, top = sizes[0], sizes[2], sizes[4], sizes[6]
    row = out.shape[2] * out.shape[3]
    for task in range(worker, len(out) * parts, workers):
        image, part = task // parts, task % parts
        first, stop = out.shape[1] * part // parts, out.shape[1] * (part + 1) // parts
        place = (image * out.shape[1] + first) * row
        if onto.size:
            copy_run(pointer(onto, place), pointer(out, place), (stop - first) * row)
        else:
            clear_run(pointer(out, place), (stop - first) * row)
        for line in range(grad.shape[1]):
            y = line * down - top
            if y < stop and y + (height - 1) * spread_r >= first:
                _multiply_row(grad, image, line, packed, scratch[worker])
                for pixel in range(grad.shape[2]):
                    _add_pixel(scratch[worker], pixel, packed, out, image, y, sizes, first, stop)


@kernel_part
def _multiply_row(grad, image, line, packed, products):
    """Write what all taps send back of a row of grad: products (Q, columns of all panels)."""
    panels, outputs, width = packed.shape
    for panel in range(panels):
        microkernel.multiply(
            grad.shape[2], pointer(grad, (image * grad.shape[1] + line) * grad.shape[2] * outputs),
            outputs, 1, 0, pointer(packed[panel], 0), width, 0,
            pointer(products, panel * width), panels * width, width, outputs, 1, False,
        )  # fmt: skip


@kernel_part
def _add_pixel(products, pixel, packed, out, image, y, sizes, first, stop):
    """Add a pixel's products to the rows first to stop of an image; those beside it are dropped."""
    height, width, _, along, spread_r, _, _, left, _ = sizes
    channels, z = out.shape[3], pixel * along - left
    begin, end = max(-z, 0) * channels, min(width, out.shape[2] - z) * channels
    source = pixel * packed.shape[0] * packed.shape[2]
    for r in range(height):
        row = y + r * spread_r
        if first <= row < stop:
            place = ((image * out.shape[1] + row) * out.shape[2] + z) * channels
            target = pointer(out, place)
            run = pointer(products, source + r * width * channels)
            for i in range(begin, end):
                target[i] += run[i]

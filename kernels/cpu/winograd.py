"""Winograd's convolution F(4x4, 3x3): 36 products for 16 pixels of a 3x3 kernel instead of 144.

out = A' [(G w G') * (B' x B)] A for each 6x6 patch of x and its 4x4 tile of out, where ' transposes
and * multiplies element by element; summed over channels, * becomes 36 matrix products. See Lavin
and Gray, arXiv:1509.09308. The gradient by x is the same convolution of the flipped weight; the
gradient by the weight is the adjoint, G' [sum over tiles of (A grad A') * (B' x B)] G.

Float32 results are within about 2e-5 of the exact ones, relative to the largest: ten times the
error of direct sums, and well within the noise of training.

In comments: N images, C channels in, K out, T tiles, e one of the 36 products.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.kernels.cpu import epilogue, microkernel, simd
from gradengine.kernels.cpu.launch import kernel_part, parallel_kernel
from gradengine.kernels.cpu.microkernel import columns_of
from gradengine.kernels.cpu.simd import (
    clear_run,
    copy_run,
    lanes,
    pointer,
    shifted,
    square_transform,
    transpose,
)
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.workspace import workspace

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry
    from gradengine.kernels.layout import Array

PATCH = 6
TILE = 4
PRODUCTS = PATCH * PATCH


# ---- the transforms of six, four or three values -------------------------------------------------


def transform_input(d: list[Any]) -> list[Any]:
    """B' d."""
    even, odd = d[4] - 4 * d[2], d[3] - 4 * d[1]
    near, far = d[4] - d[2], 2 * (d[3] - d[1])
    return [
        4 * d[0] - 5 * d[2] + d[4],
        even + odd,
        even - odd,
        near + far,
        near - far,
        4 * d[1] - 5 * d[3] + d[5],
    ]


def transform_output(m: list[Any]) -> list[Any]:
    """A' m."""
    plus, minus = m[1] + m[2], m[1] - m[2]
    wide_plus, wide_minus = m[3] + m[4], m[3] - m[4]
    return [
        m[0] + plus + wide_plus,
        minus + 2 * wide_minus,
        plus + 4 * wide_plus,
        minus + 8 * wide_minus + m[5],
    ]


def spread_output(y: list[Any]) -> list[Any]:
    """A y, the adjoint of `transform_output`."""
    even, odd = y[0] + y[2], y[1] + y[3]
    wide_even, wide_odd = y[0] + 4 * y[2], 2 * y[1] + 8 * y[3]
    return [y[0], even + odd, even - odd, wide_even + wide_odd, wide_even - wide_odd, y[3]]


def transform_weight(g: list[Any]) -> list[Any]:
    """G g."""
    ends, middle = (g[0] + g[2]) * (-1 / 6), g[1] * (1 / 6)
    wide_ends, wide_middle = g[0] * (1 / 24) + g[2] * (1 / 6), g[1] * (1 / 12)
    return [
        g[0] * (1 / 4),
        ends - middle,
        ends + middle,
        wide_ends + wide_middle,
        wide_ends - wide_middle,
        g[2],
    ]


def gather_weight(u: list[Any]) -> list[Any]:
    """G' u, the adjoint of `transform_weight`."""
    plus, minus = u[1] + u[2], u[2] - u[1]
    wide_plus, wide_minus = u[3] + u[4], u[3] - u[4]
    return [
        u[0] * (1 / 4) - plus * (1 / 6) + wide_plus * (1 / 24),
        minus * (1 / 6) + wide_minus * (1 / 12),
        (wide_plus - plus) * (1 / 6) + u[5],
    ]


_input = square_transform(transform_input, PATCH)
_output = square_transform(transform_output, PATCH)
_spread = square_transform(spread_output, TILE)
_weight = square_transform(transform_weight, 3)
_gather = square_transform(gather_weight, PATCH)


# ---- the choice ----------------------------------------------------------------------------------


def is_suitable(geometry: Conv2dGeometry, dtype: np.dtype) -> bool:
    """Whether the convolution has Winograd's form and enough pixels to be faster in it."""
    multiple = simd.VECTOR_BYTES // dtype.itemsize
    tiles = -(-geometry.out_height // TILE) * -(-geometry.out_width // TILE)
    return (
        dtype == np.float32
        and (geometry.kernel_height, geometry.kernel_width) == (3, 3)
        and geometry.stride == geometry.dilation == (1, 1)
        and geometry.groups == 1
        and geometry.in_channels % multiple == geometry.out_channels % multiple == 0
        and 9 * geometry.out_height * geometry.out_width >= 2 * PRODUCTS * tiles
        and geometry.batch * tiles >= 8
    )


# ---- sizes of scratch ----------------------------------------------------------------------------

# Arrays whose rows lie a multiple of 4096 bytes apart share one set of the L1 cache: distances
# between the 36 products are odd numbers of cache lines.
LINE = 16  # float32 numbers


@kernel_part
def _tiles(out):
    """Return how many tiles cover out (N, P, Q, K): down, across."""
    return (out.shape[1] + TILE - 1) // TILE, (out.shape[2] + TILE - 1) // TILE


@kernel_part
def _odd_lines(count):
    return ((count + LINE - 1) // LINE | 1) * LINE


# ---- weights -------------------------------------------------------------------------------------


def pack(weight: Array, geometry: Conv2dGeometry) -> Array:
    """Transform weight (K, 3, 3, C) once for many convolutions."""
    return _pack_weight(weight, flipped=False)


def _pack_weight(weight: Array, flipped: bool) -> Array:
    """Transform weight (K, 3, 3, C) to (panels of K, 36, C, columns); flipped, K and C swap roles."""
    outputs, inputs = weight.shape[0], weight.shape[3]
    if flipped:
        outputs, inputs = inputs, outputs
    width = microkernel.width(weight.dtype)
    packed = np.empty((-(-outputs // width), PRODUCTS * _odd_lines(inputs * width)), weight.dtype)
    workers = min(get_num_threads(), len(packed))
    with workspace(workers, _taps_size(weight), dtype=weight.dtype) as taps:
        _pack(workers, weight, flipped, packed, taps)
    return packed


@parallel_kernel
def _pack(worker, workers, weight, flipped, packed, taps):
    for panel in range(worker, len(packed), workers):
        _pack_panel(weight, flipped, panel, pointer(packed[panel], 0), taps[worker], 0)


@kernel_part
def _taps_size(weight):
    """Return how much scratch `_pack_panel` needs."""
    return 9 * lanes(weight) * columns_of(weight)


@kernel_part
def _pack_panel(weight, flipped, panel, target, taps, taps_at):
    """Write one panel's G w G': (36, C, columns)."""
    channels = weight.shape[3]
    width = columns_of(weight)
    first = panel * width
    if flipped:
        distance = _odd_lines(len(weight) * width)
        for k in range(len(weight)):
            _weight(
                pointer(weight, (k * 9 + 8) * channels + first), -3 * channels, -channels,
                shifted(target, k * width), PATCH * distance, distance,
                min(width, channels - first) // lanes(weight),
            )  # fmt: skip
        return
    distance = _odd_lines(channels * width)
    tap = lanes(weight) * width
    for block in range(0, channels, lanes(weight)):
        _transpose_taps(weight, first, block, taps, taps_at)
        for c in range(lanes(weight)):
            _weight(
                pointer(taps, taps_at + c * width), 3 * tap, tap,
                shifted(target, (block + c) * width), PATCH * distance, distance,
                min(width, len(weight) - first) // lanes(weight),
            )  # fmt: skip


@kernel_part
def _transpose_taps(weight, first, block, taps, at):
    """Bring a panel's outputs side by side, for a vector's count of channels: (9, C, columns)."""
    width, count = columns_of(weight), lanes(weight)
    row = 9 * weight.shape[3]
    for tap in range(9):
        for k in range(0, min(width, len(weight) - first), count):
            source = pointer(weight, (first + k) * row + tap * weight.shape[3] + block)
            transpose(source, row, pointer(taps, at + tap * count * width + k), width)


# ---- forward, and the gradient by x --------------------------------------------------------------

# Enough for a panel of weights to be worth its way through the cache; few enough for L2 to hold them.
BLOCK_TILES = 64
BATCH = 4  # panels that share one pass over the transformed tiles, which come from L3
TASKS = 4  # for each thread, so that they balance


def convolve(
    x: Array,
    weight: Array,
    packed: Array | None,
    out: Array,
    geometry: Conv2dGeometry,
    finish: epilogue.Finish,
) -> None:
    """Convolve x (N, H, W, C) with weight (K, 3, 3, C), or what `pack` made of it, into out."""
    (top, _), (left, _) = geometry.padding
    _run(x, weight, False, packed, out, (top, left), finish)


def grad_input(
    grad: Array, weight: Array, onto: Array, out: Array, geometry: Conv2dGeometry
) -> None:
    """Write the gradient by x, (N, H, W, C), plus onto: grad's convolution with the flipped weight."""
    (top, _), (left, _) = geometry.padding
    moments = epilogue.empty_moments(_block_count(out), 0, out.dtype)
    finish = epilogue.Finish(epilogue.absent(1, out.dtype), onto, False, moments)
    _run(grad, weight, True, None, out, (2 - top, 2 - left), finish)


def _run(
    x: Array,
    weight: Array,
    flipped: bool,
    packed: Array | None,
    out: Array,
    padding: tuple[int, int],
    finish: epilogue.Finish,
) -> None:
    threads = get_num_threads()
    blocks = _block_count(out)
    rows = -(-len(out) * -(-out.shape[1] // TILE) // blocks)  # all about equally many
    panels = -(-out.shape[3] // microkernel.width(x.dtype))
    even = blocks % threads == 0 or blocks >= TASKS * threads
    groups = 1 if even else min(threads, panels)
    if packed is None:  # a weight that is used once is transformed where it is used
        packed = epilogue.absent(2, x.dtype) if blocks == 1 else _pack_weight(weight, flipped)
    workers = min(threads, blocks * groups)
    size = sum(_scratch_sizes(x, out, rows * -(-out.shape[2] // TILE)))
    with workspace(workers, size, dtype=x.dtype) as scratch:
        _convolve(
            workers, x, weight, flipped, packed, out, *padding, rows, groups, scratch, *finish
        )


def block_count(geometry: Conv2dGeometry, itemsize: int) -> int:
    """Return in how many blocks of tiles the output is made."""
    return _blocks(geometry.batch, geometry.out_height, geometry.out_width)


def _block_count(out: Array) -> int:
    return _blocks(*out.shape[:3])


def _blocks(batch: int, height: int, width: int) -> int:
    rows = batch * -(-height // TILE)
    return -(-rows // max(BLOCK_TILES // -(-width // TILE), 1))


@kernel_part
def _scratch_sizes(x, out, tiles):
    """Return how much a worker needs for transformed tiles, products, panels, taps, a patch."""
    channels, width = x.shape[3], columns_of(x)
    return (
        PRODUCTS * _odd_lines(tiles * (channels + LINE)),
        PRODUCTS * _odd_lines(tiles * width * BATCH),
        PRODUCTS * _odd_lines(channels * width) * BATCH,
        _taps_size(x),
        max(PRODUCTS * channels, TILE * TILE * width * BATCH),
    )


@parallel_kernel
def _convolve(
    worker, workers, x, weight, flipped, packed, out, top, left, rows, groups, scratch, bias,
    residual, relu, moments,
):  # fmt: skip
    """Each task makes `rows` rows of tiles for one of `groups` groups of panels."""
    tile_rows = out.shape[0] * _tiles(out)[0]
    width = columns_of(x)
    panels = (out.shape[3] + width - 1) // width
    group = (panels + groups - 1) // groups
    for task in range(worker, (tile_rows + rows - 1) // rows * groups, workers):
        block, panel = task // groups, task % groups * group
        first, stop = block * rows, min((block + 1) * rows, tile_rows)
        stop_panel = min(panel + group, panels)
        _convolve_block(
            x, weight, flipped, packed, out, top, left, first, stop, panel, stop_panel,
            scratch[worker],
        )  # fmt: skip
        _finish_block(
            out, first, stop, panel * width, min(stop_panel * width, out.shape[3]), bias, residual,
            relu, moments[block],
        )  # fmt: skip


@kernel_part
def _convolve_block(
    x, weight, flipped, packed, out, top, left, first, stop, panel, stop_panel, scratch
):
    """Make the rows first to stop of tiles, for the panels `panel` to `stop_panel` of channels."""
    channels, width = x.shape[3], columns_of(x)
    across = _tiles(out)[1]
    tiles = (stop - first) * across
    sizes = _scratch_sizes(x, out, tiles)
    at_products, at_panel = sizes[0], sizes[0] + sizes[1]
    at_taps = at_panel + sizes[2]
    spare = at_taps + sizes[3]
    row = channels + LINE
    product_in, product_out = sizes[0] // PRODUCTS, sizes[1] // PRODUCTS
    for tile_row in range(first, stop):
        at = (tile_row - first) * across * row
        _transform_patches(
            x, top, left, out, tile_row, scratch, at, row, product_in, scratch, spare
        )
    step = width * BATCH  # from one tile's products to the next one's
    for number in range(panel, stop_panel, BATCH):
        count = min(BATCH, stop_panel - number)
        weights, distance = pointer(scratch, at_panel), sizes[2] // BATCH
        if packed.size:
            weights, distance = pointer(packed[number], 0), packed.shape[1]
        else:
            for own in range(count):
                place = shifted(weights, own * distance)
                _pack_panel(weight, flipped, number + own, place, scratch, at_taps)
        for e in range(PRODUCTS):
            for own in range(count):
                columns = min(width, out.shape[3] - (number + own) * width)
                microkernel.multiply(
                    tiles, pointer(scratch, e * product_in), row, 1, 0,
                    shifted(weights, own * distance + e * (distance // PRODUCTS)), width, 0,
                    pointer(scratch, at_products + e * product_out + own * width), step, columns,
                    channels, 1, False,
                )  # fmt: skip
        _transform_products(
            scratch, at_products, product_out, spare, out, first, stop, number * width,
            min(count * width, out.shape[3] - number * width),
        )  # fmt: skip


@kernel_part
def _finish_block(out, first, stop, channel, stop_channel, bias, residual, relu, moments):
    down = _tiles(out)[0]
    height, columns = out.shape[1], out.shape[2]
    for tile_row in range(first, stop):
        top = tile_row // down * height + tile_row % down * TILE
        bottom = min(top + TILE, (tile_row // down + 1) * height)
        epilogue.finish_pixels(
            out,
            top * columns,
            bottom * columns,
            channel,
            stop_channel,
            bias,
            residual,
            relu,
            moments,
        )


def _row_transform(transform: Any, size: int) -> Any:
    """Compile the transform of all patches, `size` pixels wide, of one row of tiles."""

    @kernel_part
    def transform_row(x, top, left, out, tile_row, target, at, row, product, spare, patch):
        """Write x's patches for out's tiles, transformed: (36 products, tiles, C), in rows of `row`.

        They start at target[at]; spare[patch] on takes a patch that reaches over x's border.
        """
        height, columns, channels = x.shape[1], x.shape[2], x.shape[3]
        down, across = _tiles(out)
        image, y = tile_row // down, tile_row % down * TILE - top
        for tile in range(across):
            z = tile * TILE - left
            if y >= 0 and z >= 0 and y + size <= height and z + size <= columns:
                source = pointer(x, ((image * height + y) * columns + z) * channels)
                distance = columns * channels
            else:
                _copy_patch(x, image, y, z, size, spare, patch)
                source = pointer(spare, patch)
                distance = size * channels
            transform(
                source, distance, channels, pointer(target, at + tile * row), PATCH * product,
                product, channels // lanes(x),
            )  # fmt: skip

    return transform_row


@kernel_part
def _copy_patch(x, image, y, z, size, scratch, at):
    """Copy a square of pixels of x (N, H, W, C); those outside are zero."""
    height, columns, channels = x.shape[1], x.shape[2], x.shape[3]
    for i in range(size):
        for j in range(size):
            target = pointer(scratch, at + (i * size + j) * channels)
            if 0 <= y + i < height and 0 <= z + j < columns:
                place = ((image * height + y + i) * columns + z + j) * channels
                copy_run(pointer(x, place), target, channels)
            else:
                clear_run(target, channels)


_transform_patches = _row_transform(_input, PATCH)
_spread_tiles = _row_transform(_spread, TILE)


@kernel_part
def _transform_products(
    scratch, at, product, spare, out, first, stop, channel, count
):  # fmt: skip
    """Write A' m A of each tile's products m into `count` channels of out."""
    height, columns, outputs = out.shape[1], out.shape[2], out.shape[3]
    down, across = _tiles(out)
    width = columns_of(out) * BATCH
    for tile_row in range(first, stop):
        image, y = tile_row // down, tile_row % down * TILE
        for tile_column in range(across):
            z = tile_column * TILE
            source = pointer(scratch, at + ((tile_row - first) * across + tile_column) * width)
            if y + TILE <= height and z + TILE <= columns:
                target = pointer(out, ((image * height + y) * columns + z) * outputs + channel)
                _output(
                    source, PATCH * product, product, target, columns * outputs, outputs,
                    count // lanes(out),
                )  # fmt: skip
                continue
            _output(
                source, PATCH * product, product, pointer(scratch, spare), TILE * width, width,
                count // lanes(out),
            )  # fmt: skip
            for i in range(min(TILE, height - y)):
                for j in range(min(TILE, columns - z)):
                    place = ((image * height + y + i) * columns + z + j) * outputs + channel
                    made = pointer(scratch, spare + (i * TILE + j) * width)
                    copy_run(made, pointer(out, place), count)


# ---- gradient by the weight ----------------------------------------------------------------------

CHUNK_BYTES = 10 << 20  # of transformed tiles: written by one loop and read by the next, from L3
CHUNK_TILES = 64  # a block of their columns stays in L1 and L2
LEAST = 16  # outputs of a block
BLOCK = 64  # outputs, and channels, of the block of sums that a task adds to


def grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry) -> Array:
    """Give the gradient (K, 3, 3, C) by the weight, for grad (N, P, Q, K) and x (N, H, W, C)."""
    outputs, channels = grad.shape[3], x.shape[3]
    (top, _), (left, _) = geometry.padding
    out = np.empty((outputs, 3, 3, channels), x.dtype)
    across, tile_rows = -(-grad.shape[2] // TILE), grad.shape[0] * -(-grad.shape[1] // TILE)
    tile_bytes = PRODUCTS * (channels + outputs + 2 * LINE) * x.itemsize
    chunks = -(-tile_rows * across // max(min(CHUNK_BYTES // tile_bytes, CHUNK_TILES), 1))
    rows = -(-tile_rows // min(chunks, tile_rows))
    threads = get_num_threads()
    height = BLOCK
    while height > LEAST and -(-outputs // height) * -(-channels // BLOCK) % threads:
        height //= 2
    tasks = -(-outputs // height) * -(-channels // BLOCK)
    sizes = [PRODUCTS * _odd_lines(rows * across * (count + LINE)) for count in (channels, outputs)]
    with (
        workspace(sizes[0], dtype=x.dtype) as tiles_x,
        workspace(sizes[1], dtype=x.dtype) as tiles_grad,
        workspace(threads, PRODUCTS * max(channels, outputs), dtype=x.dtype) as patches,
        workspace(
            threads if rows >= tile_rows else tasks, PRODUCTS * height * BLOCK, dtype=x.dtype
        ) as sums,
    ):
        for first in range(0, tile_rows, rows):
            stop = min(first + rows, tile_rows)
            _transform_chunk(
                threads, grad, x, top, left, first, stop, rows, tiles_x, tiles_grad, patches
            )
            _add_chunk(
                threads, first, stop, rows, tile_rows, height, grad, tiles_x, tiles_grad, sums, out
            )
    return out


@parallel_kernel
def _transform_chunk(
    worker, workers, grad, x, top, left, first, stop, rows, tiles_x, tiles_grad, patches
):
    """Transform x and grad for the rows first to stop of tiles, of a chunk of `rows` rows."""
    across = _tiles(grad)[1]
    row_x, row_grad = x.shape[3] + LINE, grad.shape[3] + LINE
    for tile_row in range(first + worker, stop, workers):
        at = (tile_row - first) * across
        _transform_patches(
            x, top, left, grad, tile_row,
            tiles_x, at * row_x, row_x, _odd_lines(rows * across * row_x), patches[worker], 0,
        )  # fmt: skip
        _spread_tiles(
            grad, 0, 0, grad, tile_row,
            tiles_grad, at * row_grad, row_grad, _odd_lines(rows * across * row_grad),
            patches[worker], 0,
        )  # fmt: skip


@parallel_kernel
def _add_chunk(
    worker, workers, first, stop, rows, tile_rows, height, grad, tiles_x, tiles_grad, sums, out
):
    """Add the chunk to the 36 products; after the last one, transform the sums."""
    outputs, channels = out.shape[0], out.shape[3]
    across = _tiles(grad)[1]
    row_x, row_grad = channels + LINE, outputs + LINE
    columns = (channels + BLOCK - 1) // BLOCK
    for task in range(worker, (outputs + height - 1) // height * columns, workers):
        own = sums[worker if rows >= tile_rows else task]
        k, c = task // columns * height, task % columns * BLOCK
        _add_products(
            tiles_grad, k, min(height, outputs - k), row_grad,
            _odd_lines(rows * across * row_grad),
            tiles_x, c, min(BLOCK, channels - c), row_x, _odd_lines(rows * across * row_x),
            (stop - first) * across, own, height * BLOCK, first > 0,
        )  # fmt: skip
        if stop == tile_rows:
            _gather_weights(own, out, k, min(height, outputs - k), c, height * BLOCK)


@kernel_part
def _add_products(
    tiles_grad, k, outputs, row_grad, product_grad, tiles_x, c, channels, row_x, product_x, tiles,
    sums, product, adds,
):  # fmt: skip
    """Add to sums (36, outputs, BLOCK) the products of all tiles of a chunk."""
    width = columns_of(tiles_x)
    for e in range(PRODUCTS):
        for column in range(0, channels, width):
            microkernel.multiply(
                outputs, pointer(tiles_grad, e * product_grad + k), 1, row_grad, 0,
                pointer(tiles_x, e * product_x + c + column), row_x, 0,
                pointer(sums, e * product + column), BLOCK, width, tiles, 1, adds,
            )  # fmt: skip


@kernel_part
def _gather_weights(sums, out, first, count, c, product):
    channels = out.shape[3]
    for k in range(count):
        _gather(
            pointer(sums, k * BLOCK), PATCH * product, product,
            pointer(out, (first + k) * 9 * channels + c), 3 * channels, channels,
            min(BLOCK, channels - c) // lanes(out),
        )  # fmt: skip

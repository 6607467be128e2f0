"""2-D convolution by ordinary multiply-adds: every case, exact in float32, on every device.

Arrays are NCHW in shape and returned channels-last in memory, as everywhere in the kernels. Dtypes
are float16, bfloat16, float32 or float64, sums are taken in float32, float64's in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda import slices
from gradengine.kernels.cuda.launch import by_value, c_name, kernel
from gradengine.kernels.cuda.tiles import (
    PLAIN_DEPTH,
    PLAIN_ELEMENTS,
    SMALL_TILE,
    SQUARE_TILE,
    TALL_TILE,
    WIDE_TILE,
    PlainTile,
    access_width,
    choose_plain_tile,
    covering,
    sum_dtype,
)
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Conv2dGeometry

SOURCE = "conv2d_plain.cu"

# The struct Convolution of the source.
_CONVOLUTION = np.dtype(
    [
        *((name, np.int32) for name in ("batch", "height", "width", "in_channels")),
        *((name, np.int32) for name in ("out_height", "out_width", "out_channels")),
        *((name, np.int32) for name in ("kernel_height", "kernel_width")),
        *((name, np.int32, 2) for name in ("stride", "padding", "dilation")),
        ("groups", np.int32),
    ]
)

# Groups of at most so many channels, of input and output, leave most of a tile empty: each thread
# makes one element of the result instead.
NARROW_GROUP = 8

# The least depth worth a slice.
SLICE_PIXELS = 128


def _instances() -> Iterator[str]:
    tiles = {
        "forward": (SQUARE_TILE, TALL_TILE, SMALL_TILE),
        "grad_input": (SQUARE_TILE, TALL_TILE, SMALL_TILE),
        "grad_weight": (SQUARE_TILE, TALL_TILE, WIDE_TILE),
    }
    for element, dtype in PLAIN_ELEMENTS.items():
        for name, own in tiles.items():
            for tile in own if element != "double" else (SMALL_TILE,):
                for width in tile.widths(dtype):
                    yield _instance(name, element, width, tile)
            yield f"direct_{name}<{element}>"


def _instance(name: str, element: str, width: int, tile: PlainTile) -> str:
    return f"{name}<{element}, {width}, {', '.join(map(str, tile))}>"


# All that may be compiled: source and names of kernels.
KERNELS = {SOURCE: tuple(_instances())}


def forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    geometry: Conv2dGeometry,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    """Cross-correlate x (N, C, H, W) with weight (K, C / groups, R, S), as kernels.conv2d does."""
    xp = array_module(x)
    x, weight = to_nhwc(x), to_nhwc(weight)
    bias = None if bias is None else xp.ascontiguousarray(bias)
    residual = None if residual is None else to_nhwc(residual)
    out = xp.empty(_nhwc(geometry.output_shape), x.dtype)
    arguments = (x, weight, bias, residual, out, convolution(geometry), int(relu))
    if not out.size:
        return from_nhwc(out)
    inputs, outputs = _group_channels(geometry)
    if _is_narrow(geometry):
        _launch_direct("forward", out, arguments)
    else:
        shape = (out.size // geometry.out_channels, outputs, geometry.groups)
        _launch_tiles("forward", shape, (inputs,), arguments)
    return from_nhwc(out)


def grad_input(grad: Array, weight: Array, geometry: Conv2dGeometry) -> Array:
    """Give the gradient by x, (N, C, H, W), for grad (N, K, out_height, out_width)."""
    grad, weight = to_nhwc(grad), to_nhwc(weight)
    out = array_module(grad).empty(_nhwc(geometry.input_shape), grad.dtype)
    arguments = (grad, weight, out, convolution(geometry))
    if not out.size:
        return from_nhwc(out)
    inputs, outputs = _group_channels(geometry)
    if _is_narrow(geometry):
        _launch_direct("grad_input", out, arguments)
    else:
        vertical, horizontal = geometry.stride
        rows, columns = -(-geometry.height // vertical), -(-geometry.width // horizontal)
        products = geometry.groups * vertical * horizontal
        shape = (geometry.batch * rows * columns, inputs, products)
        _launch_tiles("grad_input", shape, (inputs, outputs), arguments)
    return from_nhwc(out)


def grad_weight(
    grad: Array, x: Array, geometry: Conv2dGeometry, out_dtype: Any | None = None
) -> Array:
    """Give the gradient by weight, (K, C / groups, R, S), for grad (N, K, out_height, out_width).

    Its dtype is x's, or out_dtype: float32 is possible for float16 and bfloat16 as well. Output
    pixels are shared among blocks in slices, whose sums are added in a fixed order.
    """
    xp = array_module(x)
    grad, x = to_nhwc(grad), to_nhwc(x)
    out = xp.empty(_nhwc(geometry.weight_shape), x.dtype if out_dtype is None else out_dtype)
    pixels = geometry.batch * geometry.out_height * geometry.out_width
    if not pixels:
        out.fill(0)
        return from_nhwc(out)
    inputs, outputs = _group_channels(geometry)
    columns = out.size // geometry.out_channels
    narrow = _is_narrow(geometry)
    tile = choose_plain_tile(x.dtype, outputs, columns, None)
    if narrow:
        blocks = -(-geometry.out_channels // 32) * columns
    else:
        blocks = covering(tile, outputs, columns) * geometry.groups
    share = slices.plan(pixels, PLAIN_DEPTH, SLICE_PIXELS, blocks, 2, out.size)
    partials = xp.empty((share.slices, out.shape[0], columns // inputs, inputs), sum_dtype(x.dtype))
    arguments = (grad, x, partials, convolution(geometry), share.depth)
    if narrow:
        run = kernel(SOURCE, f"direct_grad_weight<{c_name(x.dtype)}>")
        run((blocks, share.slices), (256,), arguments, 256 * partials.dtype.itemsize)
    else:
        width = access_width(tile, (grad, x), (inputs, outputs))
        name = _instance("grad_weight", c_name(x.dtype), width, tile)
        grid, shared = (blocks * share.slices,), tile.shared_bytes(x.dtype)
        kernel(SOURCE, name)(grid, (tile.threads,), arguments, shared)
    slices.add_slices(partials, out.reshape(partials.shape[1:]))
    return from_nhwc(out)


@lru_cache(CACHED_GEOMETRIES)
def convolution(geometry: Conv2dGeometry) -> np.ndarray:
    """Return a geometry as the struct Convolution."""
    (top, _), (left, _) = geometry.padding
    pairs = (geometry.stride, (top, left), geometry.dilation)
    sizes = (
        *(geometry.batch, geometry.height, geometry.width, geometry.in_channels),
        *(geometry.out_height, geometry.out_width, geometry.out_channels),
        *(geometry.kernel_height, geometry.kernel_width),
    )
    return by_value(np.array((*sizes, *pairs, geometry.groups), _CONVOLUTION))


def _launch_tiles(
    name: str, shape: tuple[int, int, int], lengths: tuple[int, ...], arguments: tuple[Any, ...]
) -> None:
    """Launch one block for each tile of a shape's (rows, columns, products).

    The first two arguments are the operands; lengths are what offsets in them are sums of.
    """
    rows, columns, products = shape
    dtype = arguments[0].dtype
    tile = choose_plain_tile(dtype, rows, columns, products)
    width = access_width(tile, arguments[:2], lengths)
    run = kernel(SOURCE, _instance(name, c_name(dtype), width, tile))
    grid = (covering(tile, rows, columns) * products,)
    run(grid, (tile.threads,), arguments, tile.shared_bytes(dtype))


def _launch_direct(name: str, out: Array, arguments: tuple[Any, ...]) -> None:
    run = kernel(SOURCE, f"direct_{name}<{c_name(out.dtype)}>")
    run((-(-out.size // 256),), (256,), arguments)


def _is_narrow(geometry: Conv2dGeometry) -> bool:
    return geometry.groups > 1 and max(_group_channels(geometry)) <= NARROW_GROUP


def _group_channels(geometry: Conv2dGeometry) -> tuple[int, int]:
    """Return a group's channels of input and output."""
    return geometry.in_channels // geometry.groups, geometry.out_channels // geometry.groups


def _nhwc(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], shape[2], shape[3], shape[1]

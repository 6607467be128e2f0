"""2-D convolution on tensor cores: the choice of kernels and tiles, and the records that they read.

All arrays of a kernel are channels-last: pixels (N, H, W, C), weights (K, R, S, C / groups). What
tensor cores do not suit (float64, float32 with `settings.cuda.conv_tf32` off, channels that fill no
chunks of 16 bytes, old devices) goes to `conv2d_plain`, gradients by weight to `conv2d_weight`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, lru_cache, partial
from math import gcd, prod
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d_plain, conv2d_weight, tuning
from gradengine.kernels.cuda.launch import (
    DIVISOR,
    Limits,
    address,
    by_value,
    c_name,
    device_limits,
    divisor,
    kernel,
)
from gradengine.kernels.cuda.layout import channels_last
from gradengine.kernels.cuda.tiles import (
    CHUNK_BYTES,
    SLAB_BYTES,
    WARPGROUP_ARCHITECTURE,
    TensorTile,
    covering,
)
from gradengine.kernels.cuda.windows import Axis, Window
from gradengine.kernels.geometry import CACHED_GEOMETRIES, Conv2dGeometry
from gradengine.kernels.layout import Array, from_nhwc, to_nhwc

if TYPE_CHECKING:
    from gradengine.kernels.geometry import Pair

SOURCE = "conv2d.cu"

ROW_BYTES = 12  # of a RowTable
MAXIMUM_TAPS = 15  # of conv2d.cu, as MAXIMUM_PARTS
MAXIMUM_PARTS = 16
MAXIMUM_ELEMENTS = 1 << 31  # of an array: offsets in it are of 32 bits
MERGE_BLOCK = (32, 16)
RELAY_BLOCK = (32, 8)
ONE_MERGE = 512  # blocks whose moments one pass merges; beyond, a slice merges at least
MERGED_BLOCKS = 64  # so many, and there are at most
MAXIMUM_SLICES = 64
TENSOR_CORE_ARCHITECTURE = 80

_PART = np.dtype(
    [
        *((name, np.int32) for name in ("first_block", "pixels")),
        *((name, DIVISOR) for name in ("plane", "line")),
        *((name, np.int32) for name in ("taps_y", "taps_x", "origin_y", "origin_x")),
        *((name, np.int32) for name in ("advance_y", "advance_x", "advance_channels")),
        ("advance_panel", np.int32),
        *((name, np.int32) for name in ("slabs", "first_tap", "first_target")),
    ]
)
_PROBLEM = np.dtype(
    [
        *((name, np.int32) for name in ("height", "width", "pixel", "channels")),
        *((name, np.int32) for name in ("padded_channels", "scale_y", "scale_x")),
        *((name, np.int32) for name in ("step_y", "step_x", "target_plane", "target_line")),
        *((name, np.int32) for name in ("target_pixel", "target_channels", "columns")),
        ("column_blocks", DIVISOR),
        *((name, np.int32) for name in ("weight_depth", "weight_line")),
        *((name, np.int32) for name in ("weight_group", "weight_step_y", "weight_step_x")),
    ]
)
_FORWARD = np.dtype([("problem", _PROBLEM), ("part", _PART)])
_GRADIENT = np.dtype(
    [("problem", _PROBLEM), ("parts", np.int32), ("part", _PART, (MAXIMUM_PARTS,))]
)
_WINDOW = np.dtype(
    [
        ("problem", _PROBLEM),
        ("part", _PART),
        ("window", [(name, np.int32) for name in Window.FIELDS]),
    ]
)


# Each with its share of the tensor cores' peak: smaller tiles load more for each product. Warps whose
# part is wider than tall multiply as warpgroups.
TILES = {
    TensorTile(128, 128, 16, 128, 3): 1.3,
    TensorTile(256, 128, 16, 128, 4): 1.25,
    TensorTile(64, 128, 16, 128, 4): 1.1,
    TensorTile(256, 64, 32, 64, 2): 1.15,
    TensorTile(128, 64, 16, 64, 3): 1.05,
    TensorTile(128, 128, 64, 64, 3): 1.0,
    TensorTile(256, 64, 64, 64, 2): 0.9,
    TensorTile(128, 64, 64, 32, 3): 0.75,
    TensorTile(64, 64, 32, 32, 4): 0.6,
}
# The same with windows of the source (window.cuh), for convolutions whose stride is 1. None is in both.
WINDOW_TILES = {
    TensorTile(256, 64, 32, 64, 4): 1.5,
    TensorTile(128, 128, 16, 128, 4): 1.25,
}


def shared_bytes(tile: TensorTile, window: Window | None = None) -> int:
    """Return the size of a tile's stages and its table of rows."""
    if tile in WINDOW_TILES:
        assert window is not None
        return window.shared_bytes(tile)
    return tile.shared_bytes + tile.rows * ROW_BYTES


def by_warpgroups(tile: TensorTile) -> bool:
    return tile.warp_rows < tile.warp_columns


def _relays(tile: TensorTile, itemsize: int) -> bool:
    """Return whether gradients by the input read float32 weights relaid: warpgroups need them so."""
    return by_warpgroups(tile) and itemsize == 4


def _instances() -> Iterator[str]:
    for element in ("float", "float16", "bfloat16"):
        for tile in (*TILES, *WINDOW_TILES):
            for moments in ("false", "true"):
                yield _forward_name(element, tile, moments)
            yield _gradient_name(element, tile)


def _forward_name(element: str, tile: TensorTile, moments: str) -> str:
    return f"conv2d_forward{_kind(tile)}<{_parameters(element, tile)}, {moments}>"


def _gradient_name(element: str, tile: TensorTile) -> str:
    return f"conv2d_grad_input{_kind(tile)}<{_parameters(element, tile)}>"


def _kind(tile: TensorTile) -> str:
    return "_window" if tile in WINDOW_TILES else ""


@cache
def _parameters(element: str, tile: TensorTile) -> str:
    return ", ".join((element, *map(str, tile)))


# All that may be compiled: source and names of kernels.
_OTHERS = ("merge_moments", "sum_moments", "merge_slices", "round_weight", "relay_weight")
KERNELS = {SOURCE: (*_instances(), *_OTHERS)}


class PreparedWeight(NamedTuple):
    """A weight as the forward kernels read it.

    tensor_cores says which kernels. Warpgroups need float32 weights that are rounded to tf32; to
    the others it is the same, since they round themselves.
    """

    data: Array
    tensor_cores: bool
    is_rounded: bool = False


# ---- the seam's functions -----------------------------------------------------------------------


def conv2d(
    x: Array,
    weight: Any,
    bias: Array | None,
    geometry: Conv2dGeometry,
    *,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    prepared = _prepared(weight, geometry)
    if not prepared.tensor_cores:
        return conv2d_plain.forward(x, prepared.data, bias, geometry, residual, relu)
    return from_nhwc(_forward(x, prepared, bias, geometry, residual, relu))


def conv2d_moments(
    x: Array, weight: Any, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array, Array]:
    prepared = _prepared(weight, geometry)
    several = geometry.batch != next(_image_slices(geometry), slice(0, 0)).stop
    if not prepared.tensor_cores or several:
        return _moments_of(conv2d(x, weight, bias, geometry))
    out, moments = _forward_with_moments(x, prepared, bias, geometry)
    return from_nhwc(out), moments[0], moments[1]


def pack_conv2d(weight: Array, geometry: Conv2dGeometry) -> PreparedWeight:
    prepared = _prepared(weight, geometry)
    if prepared.tensor_cores and weight.dtype == np.float32:
        return PreparedWeight(_rounded(prepared.data), tensor_cores=True, is_rounded=True)
    return prepared._replace(data=prepared.data.copy())


def conv2d_grad_input(
    grad: Array, weight: Array, geometry: Conv2dGeometry, onto: Array | None = None
) -> Array:
    if not _suits_grad_input(geometry, grad.dtype):
        out = conv2d_plain.grad_input(grad, weight, geometry)
        if onto is not None:
            out += onto
        return out
    grad, weight = _aligned(to_nhwc(grad)), _aligned(to_nhwc(weight))
    onto = None if onto is None else _aligned(to_nhwc(onto))
    batch, channels, height, width = geometry.input_shape
    out = array_module(grad).empty((batch, height, width, channels), grad.dtype)
    arrays = _Arrays(grad, None, onto, out)
    for images in _image_slices(geometry):
        part = geometry._replace(batch=images.stop - images.start)
        own = arrays.of(images)
        tile = _timed_tile("gradient", part, own, partial(_launch_gradient, weight, part, own))
        _launch_gradient(weight, part, own, tile)
    return from_nhwc(out)


def _launch_gradient(
    weight: Array, geometry: Conv2dGeometry, arrays: _Arrays, tile: TensorTile | None
) -> None:
    grad, _, onto, out = arrays
    plan = _grad_input_plan(geometry, grad.dtype.itemsize, device_limits(), tile)
    name = _gradient_name(c_name(grad.dtype), plan.tile)
    read = _relaid(weight, geometry) if _relays(plan.tile, grad.dtype.itemsize) else weight
    arguments = (grad, read, onto, out, plan.record)
    kernel(SOURCE, name)(plan.grid, (plan.tile.threads,), arguments, plan.shared_bytes)


def conv2d_grad_weight(grad: Array, x: Array, geometry: Conv2dGeometry, dtype: Any = None) -> Array:
    return conv2d_weight.grad_weight(grad, x, geometry, dtype)


# ---- forward ------------------------------------------------------------------------------------


def _prepared(weight: Any, geometry: Conv2dGeometry) -> PreparedWeight:
    """Give a weight (K, C / groups, R, S), packed or not, as the kernels of the device read it."""
    if isinstance(weight, tuple):
        return weight[0]  # the seam's PackedConv2d
    if not _suits_forward(geometry, weight.dtype):
        return PreparedWeight(weight, tensor_cores=False)
    filled = _filled(geometry, weight.dtype.itemsize)
    if filled.geometry == geometry:
        return PreparedWeight(_aligned(to_nhwc(weight)), tensor_cores=True)
    outputs, channels, height, width = geometry.weight_shape
    shape = (outputs, height, filled.kernel_width, filled.channels)
    padded = array_module(weight).zeros(shape, weight.dtype)
    first = filled.first_tap
    padded[:, :, first : first + width, :channels] = weight.transpose(0, 2, 3, 1)
    return PreparedWeight(padded, tensor_cores=True)


def _forward(
    x: Array,
    weight: PreparedWeight,
    bias: Array | None,
    geometry: Conv2dGeometry,
    residual: Array | None,
    relu: bool,
) -> Array:
    """Give the result (N, P, Q, K)."""
    arrays = _forward_arrays(x, bias, geometry, residual)
    for images in _image_slices(geometry):
        part = geometry._replace(batch=images.stop - images.start)
        own = arrays.of(images)
        launch = partial(_launch_forward, weight, part, own, relu, None)
        launch(_timed_tile("forward", part, own, launch))
    return arrays.out


def _forward_with_moments(
    x: Array, weight: PreparedWeight, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array]:
    """Give the result (N, P, Q, K), and mean and variance (2, K) of its channels in float64."""
    arrays = _forward_arrays(x, bias, geometry, None)
    launch = partial(_launch_forward, weight, geometry, arrays, False)
    tile = _timed_tile("forward", geometry, arrays, partial(launch, None))
    plan = _forward_plan(geometry, x.dtype.itemsize, device_limits(), tile)
    partials = array_module(x).empty((plan.row_blocks, 3, geometry.out_channels), np.float32)
    launch(partials, tile)
    moments = _merged(partials, arrays.out)
    if bias is not None:  # partials are without it: float32 means of a small spread around it
        moments[0] += bias.astype(np.float64)
    return arrays.out, moments


class _Arrays(NamedTuple):
    """What a kernel reads and writes beside the weight, channels-last; x may be the gradient."""

    x: Array
    bias: Array | None
    residual: Array | None
    out: Array

    def of(self, images: slice) -> _Arrays:
        if images == slice(0, len(self.x)):  # nearly always
            return self
        residual = None if self.residual is None else self.residual[images]
        return _Arrays(self.x[images], self.bias, residual, self.out[images])


def _forward_arrays(
    x: Array, bias: Array | None, geometry: Conv2dGeometry, residual: Array | None
) -> _Arrays:
    xp = array_module(x)
    batch, outputs, height, width = geometry.output_shape
    return _Arrays(
        _aligned(channels_last(x, _filled(geometry, x.dtype.itemsize).channels)),
        None if bias is None else xp.ascontiguousarray(bias),
        None if residual is None else _aligned(to_nhwc(residual)),
        xp.empty((batch, height, width, outputs), x.dtype),
    )


def _launch_forward(
    weight: PreparedWeight,
    geometry: Conv2dGeometry,
    arrays: _Arrays,
    relu: bool,
    partials: Array | None,
    tile: TensorTile | None,
) -> None:
    x, bias, residual, out = arrays
    plan = _forward_plan(geometry, x.dtype.itemsize, device_limits(), tile)
    rounds = by_warpgroups(plan.tile) and x.dtype == np.float32 and not weight.is_rounded
    data = _rounded(weight.data) if rounds else weight.data
    moments = "false" if partials is None else "true"
    name = _forward_name(c_name(x.dtype), plan.tile, moments)
    bias_is_float = bias is not None and bias.dtype == np.float32
    arguments = (x, data, bias, int(bias_is_float), residual, int(relu), out, partials)
    block = (plan.tile.threads,)
    kernel(SOURCE, name)(plan.grid, block, (*arguments, plan.record), plan.shared_bytes)


def _aligned(array: Array) -> Array:
    """Give a contiguous array at a multiple of 16 bytes: nearly always itself."""
    return array.copy() if address(array) % CHUNK_BYTES else array


def _rounded(weight: Array) -> Array:
    """Round a contiguous weight of float32 to tf32, in new memory."""
    out = array_module(weight).empty(weight.shape, weight.dtype)
    arguments = (weight, out, weight.size)
    kernel(SOURCE, "round_weight")((-(-weight.size // 256),), (256,), arguments)
    return out


def _relaid(weight: Array, geometry: Conv2dGeometry) -> Array:
    """Lay (K, R, S, C / groups) out as (groups, C / groups, R, S, K / groups), rounded to tf32."""
    out = array_module(weight).empty(weight.shape, weight.dtype)
    outputs, channels, height, width = geometry.weight_shape
    outputs //= geometry.groups
    tile, lines = RELAY_BLOCK
    grid = (-(-channels // tile), -(-outputs // tile), geometry.groups * height * width)
    arguments = (weight, out, height * width, outputs, channels)
    kernel(SOURCE, "relay_weight")(grid, (tile, lines), arguments)
    return out


def _merged(partials: Array, out: Array) -> Array:
    """Merge the moments of blocks of out (N, P, Q, K), with counts of their pixels, to (2, K)."""
    xp = array_module(out)
    blocks, _, channels = partials.shape
    pixels = out.size // channels
    across = -(-channels // MERGE_BLOCK[0])
    moments = xp.empty((2, channels), np.float64)
    if blocks <= ONE_MERGE:
        arguments = (partials, moments, channels, blocks, pixels)
        kernel(SOURCE, "merge_moments")((across,), MERGE_BLOCK, arguments)
        return moments
    of_a_slice = max(MERGED_BLOCKS, -(-blocks // MAXIMUM_SLICES))
    slices = -(-blocks // of_a_slice)
    sums = xp.empty((slices, 2, channels), np.float64)
    arguments = (partials, sums, channels, blocks, of_a_slice)
    kernel(SOURCE, "sum_moments")((across, slices), MERGE_BLOCK, arguments)
    arguments = (sums, moments, channels, slices, pixels)
    kernel(SOURCE, "merge_slices")((across,), MERGE_BLOCK, arguments)
    return moments


def _moments_of(out: Array) -> tuple[Array, Array, Array]:
    """Give out (N, K, P, Q) and its moments by a pass over it."""
    if not out.size:
        zeros = array_module(out).zeros(out.shape[1])
        return out, zeros, zeros.copy()
    values = out.astype(np.float64)
    return out, values.mean(axis=(0, 2, 3)), values.var(axis=(0, 2, 3))


# ---- what suits tensor cores --------------------------------------------------------------------


class _Filled(NamedTuple):
    """A convolution whose channels fill chunks of 16 bytes, equal to one whose channels do not."""

    geometry: Conv2dGeometry
    channels: int  # of x, the new ones zero
    kernel_width: int  # of the weight, whose own taps start at first_tap
    first_tap: int


@lru_cache(CACHED_GEOMETRIES)
def _filled(geometry: Conv2dGeometry, itemsize: int) -> _Filled:
    """Fill up channels with zeros; few channels and an even stride also by pairs of pixels.

    Two neighbouring pixels of 4 channels are one of 8. Windows then start at a pair if stride and
    padding are even; an odd padding is made even by a tap of zeros before the others.
    """
    chunk = CHUNK_BYTES // itemsize
    channels, width, taps = geometry.in_channels, geometry.width, geometry.kernel_width
    if geometry.groups > 1 or channels % chunk == 0:
        return _Filled(geometry, channels, taps, 0)
    (vertical, horizontal), (rows, (left, right)) = geometry.stride, geometry.padding
    in_pairs = horizontal % 2 == 0 and width % 2 == 0 and geometry.dilation[1] == 1
    if channels > chunk // 2 or not in_pairs:
        channels = -(-channels // chunk) * chunk
        return _Filled(geometry._replace(in_channels=channels), channels, taps, 0)
    first_tap = left % 2
    taps += first_tap
    taps += taps % 2
    by_pairs = geometry._replace(
        in_channels=chunk,
        width=width // 2,
        kernel_width=taps // 2,
        stride=(vertical, horizontal // 2),
        padding=(rows, ((left + first_tap) // 2, right)),
    )
    return _Filled(by_pairs, chunk // 2, taps, first_tap)


def _suits_tensor_cores(geometry: Conv2dGeometry, dtype: Any) -> bool:
    if dtype == np.float64 or (dtype == np.float32 and not settings.cuda.conv_tf32):
        return False
    image = max(
        geometry.in_channels * geometry.height * geometry.width,
        geometry.out_channels * geometry.out_height * geometry.out_width,
    )
    return (
        max(geometry.kernel_height, geometry.kernel_width) <= MAXIMUM_TAPS
        and image < MAXIMUM_ELEMENTS // 8
        and prod(geometry.weight_shape) < MAXIMUM_ELEMENTS
        and geometry.out_channels // geometry.groups % (CHUNK_BYTES // dtype.itemsize) == 0
        and geometry.batch > 0
        and device_limits().architecture >= TENSOR_CORE_ARCHITECTURE
    )


def _suits_forward(geometry: Conv2dGeometry, dtype: Any) -> bool:
    chunk = CHUNK_BYTES // dtype.itemsize
    fills_chunks = geometry.groups == 1 or geometry.in_channels // geometry.groups % chunk == 0
    return fills_chunks and _suits_tensor_cores(geometry, dtype)


def _suits_grad_input(geometry: Conv2dGeometry, dtype: Any) -> bool:
    chunk = CHUNK_BYTES // dtype.itemsize
    return (
        geometry.in_channels // geometry.groups % chunk == 0
        and geometry.stride[0] * geometry.stride[1] <= MAXIMUM_PARTS
        and _suits_tensor_cores(geometry, dtype)
    )


def _image_slices(geometry: Conv2dGeometry) -> Iterator[slice]:
    """Split the batch so that no array has elements beyond the kernels' offsets."""
    image = max(
        # twice: channels that do not fill chunks are filled up
        2 * max(geometry.in_channels, CHUNK_BYTES) * geometry.height * geometry.width,
        geometry.out_channels * geometry.out_height * geometry.out_width,
    )
    step = max(MAXIMUM_ELEMENTS // image, 1)
    for first in range(0, geometry.batch, step):
        yield slice(first, min(first + step, geometry.batch))


# ---- plans --------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """How a geometry is launched."""

    tile: TensorTile
    grid: tuple[int, int]
    row_blocks: int
    shared_bytes: int
    record: np.ndarray  # the struct that the kernel takes, by value


def _timed_tile(
    name: str,
    geometry: Conv2dGeometry,
    arrays: _Arrays,
    run: Callable[[TensorTile], None],
) -> TensorTile | None:
    """Return the tile that took least, where the user lets tiles be timed, else None."""
    if not settings.cuda.benchmark or settings.general.deterministic:
        return None
    window = window_of(name, geometry, arrays.x.dtype.itemsize)
    tiles = possible_tiles(device_limits(), window)
    return tuning.fastest((name, geometry, arrays.x.dtype.name), tiles, run)


def _choose_tile(
    rows: int, columns: int, groups: int, limits: Limits, window: Window | None = None
) -> TensorTile:
    """Choose the tile whose blocks, shared by the multiprocessors, take the least time."""

    def time(tile: TensorTile) -> float:
        positions = rows
        if window is not None and tile in WINDOW_TILES:
            positions = rows // (window.down.target * window.across.target) * window.image
        blocks = covering(tile, positions, columns) * groups
        share = (TILES | WINDOW_TILES)[tile]
        return -(-blocks // limits.multiprocessors) * tile.rows * tile.columns / share

    return min(possible_tiles(limits, window), key=time)


def possible_tiles(limits: Limits, window: Window | None = None) -> list[TensorTile]:
    """Return the tiles that a device can compute; some need a window."""
    has_warpgroups = limits.architecture == WARPGROUP_ARCHITECTURE
    tiles = [
        tile
        for tile in TILES
        if shared_bytes(tile) <= limits.shared_bytes and (has_warpgroups or not by_warpgroups(tile))
    ]
    if window is not None and has_warpgroups:  # of which a multiprocessor must hold two blocks
        most = (limits.shared_bytes - 1024) // 2
        tiles += [tile for tile in WINDOW_TILES if window.shared_bytes(tile) <= most]
    return tiles


def window_of(which: str, geometry: Conv2dGeometry, itemsize: int) -> Window | None:
    """Return the windows of pass "forward" or "gradient", None where tiles cannot have them."""
    if geometry.stride != (1, 1):
        return None
    sizes = (geometry.height, geometry.width), (geometry.out_height, geometry.out_width)
    taps, dilation = (geometry.kernel_height, geometry.kernel_width), geometry.dilation
    padding = (geometry.padding[0][0], geometry.padding[1][0])
    if which == "forward":
        if _filled(geometry, itemsize).geometry != geometry:
            return None
        axes = zip(*sizes, taps, (-p for p in padding), dilation, strict=True)
    else:
        axes = zip(*sizes[::-1], taps, padding, (-step for step in dilation), strict=True)
    window = Window(*(Axis(*axis) for axis in axes))
    return window if window.is_possible else None


@lru_cache(CACHED_GEOMETRIES)
def _forward_plan(
    geometry: Conv2dGeometry, itemsize: int, limits: Limits, tile: TensorTile | None = None
) -> _Plan:
    window = window_of("forward", geometry, itemsize)
    given, geometry = geometry, _filled(geometry, itemsize).geometry
    batch, outputs, height, width = geometry.output_shape
    columns = outputs // geometry.groups
    pixels = batch * height * width
    tile = tile or _choose_tile(pixels, columns, geometry.groups, limits, window)
    record = np.zeros((), _FORWARD)
    problem, part = record["problem"], record["part"]
    _fill_forward_problem(problem, geometry)
    _fill_part(part, (batch, height, width))
    _fill(part, origin=(-geometry.padding[0][0], -geometry.padding[1][0]))
    taps = geometry.kernel_height, geometry.kernel_width
    _fill_taps(part, taps, int(problem["channels"]), itemsize)
    column_blocks = -(-columns // tile.columns)
    problem["column_blocks"] = divisor(column_blocks)
    if tile in WINDOW_TILES:
        record = _windowed(problem, part, window, tile, itemsize)
    row_blocks = -(-int(record["part"]["pixels"]) // tile.rows)
    grid = (row_blocks * column_blocks, given.groups)
    return _Plan(tile, grid, row_blocks, shared_bytes(tile, window), by_value(record))


def _fill_forward_problem(problem: Any, geometry: Conv2dGeometry) -> None:
    """Set all but the blocks of columns."""
    _, outputs, height, width = geometry.output_shape
    channels, columns = geometry.in_channels // geometry.groups, outputs // geometry.groups
    depth = geometry.kernel_height * geometry.kernel_width * channels
    _fill(
        problem,
        height=geometry.height,
        width=geometry.width,
        pixel=geometry.in_channels,
        channels=channels,
        padded_channels=channels,
        scale=geometry.stride,
        step=geometry.dilation,
        target_plane=height * width * outputs,
        target_line=width * outputs,
        target_pixel=outputs,
        target_channels=outputs,
        columns=columns,
        weight_depth=depth,
        weight_line=depth,
        weight_group=columns * depth,
        weight_step=(geometry.kernel_width * channels, channels),
    )


def _windowed(
    problem: Any, part: Any, window: Window | None, tile: TensorTile, itemsize: int
) -> np.ndarray:
    """Give the record of a tile that has windows: rows are pixels with gaps between."""
    assert window is not None
    record = np.zeros((), _WINDOW)
    record["problem"], record["part"] = problem, part
    batch = int(part["pixels"]) // (window.down.target * window.across.target)
    _fill_part(record["part"], (batch, window.down.pitch, window.across.pitch))
    channel_blocks = -(-int(problem["channels"]) * itemsize // SLAB_BYTES)
    _fill(record["window"], **window.fields(tile, channel_blocks))
    return record


class _Residue(NamedTuple):
    """Along one axis: positions of x that the same taps read."""

    first: int  # position, the others follow by stride
    positions: int
    first_tap: int
    taps: int
    origin: int  # the output position whose first tap reads the first position


def _residues(
    size: int, kernel: int, stride: int, padding: int, dilation: int
) -> tuple[list[_Residue], int, int]:
    """Split an axis of x; give also the steps from tap to tap, in taps and in output positions.

    Position h is read by tap r of output p where p * stride = h + padding - r * dilation.
    """
    common = gcd(stride, dilation)
    residues = []
    for first in range(min(stride, size)):
        taps = [r for r in range(kernel) if (first + padding - r * dilation) % stride == 0]
        origin = (first + padding - taps[0] * dilation) // stride if taps else 0
        positions = -(-(size - first) // stride)
        residues.append(_Residue(first, positions, taps[0] if taps else 0, len(taps), origin))
    return residues, stride // common, -(dilation // common)


@lru_cache(CACHED_GEOMETRIES)
def _grad_input_plan(
    geometry: Conv2dGeometry, itemsize: int, limits: Limits, tile: TensorTile | None = None
) -> _Plan:
    batch, channels, height, width = geometry.input_shape
    columns = channels // geometry.groups
    pixels = batch * height * width
    window = window_of("gradient", geometry, itemsize)
    tile = tile or _choose_tile(pixels, columns, geometry.groups, limits, window)
    record = np.zeros((), _GRADIENT)
    problem = record["problem"]
    # elements from one tap of the weight to the next, as it lies or relaid
    tap = geometry.out_channels // geometry.groups if _relays(tile, itemsize) else columns
    down, across = _fill_gradient_problem(problem, geometry, itemsize, tap)
    column_blocks = -(-columns // tile.columns)
    problem["column_blocks"] = divisor(column_blocks)
    # the deepest first: shallow ones fill the gaps at the end
    parts = sorted(((y, x) for y in down for x in across), key=lambda p: -p[0].taps * p[1].taps)
    row_blocks = 0
    for number, (y, x) in enumerate(parts):
        part = record["part"][number]
        _fill_part(part, (batch, y.positions, x.positions))
        _fill_taps(part, (y.taps, x.taps), int(problem["padded_channels"]), itemsize)
        _fill(
            part,
            first_block=row_blocks,
            origin=(y.origin, x.origin),
            first_tap=(y.first_tap * geometry.kernel_width + x.first_tap) * tap,
            first_target=(y.first * width + x.first) * channels,
        )
        row_blocks += -(-int(part["pixels"]) // tile.rows)
    record["parts"] = len(parts)
    if tile in WINDOW_TILES:  # of a stride of 1, which has one part
        record = _windowed(problem, record["part"][0], window, tile, itemsize)
        row_blocks = -(-int(record["part"]["pixels"]) // tile.rows)
    grid = (row_blocks * column_blocks, geometry.groups)
    return _Plan(tile, grid, row_blocks, shared_bytes(tile, window), by_value(record))


def _fill_gradient_problem(
    problem: Any, geometry: Conv2dGeometry, itemsize: int, tap: int
) -> tuple[list[_Residue], list[_Residue]]:
    """Set all but the blocks of columns; give the residues of rows and of columns of x."""
    _, channels, height, width = geometry.input_shape
    columns, sources = channels // geometry.groups, geometry.out_channels // geometry.groups
    depth = SLAB_BYTES // itemsize
    kernel_width = geometry.kernel_width
    (step_down, step_across), (dilation_down, dilation_across) = geometry.stride, geometry.dilation
    (top, _), (left, _) = geometry.padding
    down, tap_y, step_y = _residues(height, geometry.kernel_height, step_down, top, dilation_down)
    across, tap_x, step_x = _residues(width, kernel_width, step_across, left, dilation_across)
    _fill(
        problem,
        height=geometry.out_height,
        width=geometry.out_width,
        pixel=geometry.out_channels,
        channels=sources,
        padded_channels=-(-sources // depth) * depth,
        scale=(1, 1),
        step=(step_y, step_x),
        target_plane=height * width * channels,
        target_line=step_down * width * channels,
        target_pixel=step_across * channels,
        target_channels=channels,
        columns=columns,
        weight_line=geometry.kernel_height * kernel_width * tap,
        weight_group=geometry.kernel_height * kernel_width * columns * sources,
        weight_step_y=tap_y * kernel_width * tap,
        weight_step_x=tap_x * tap,
    )
    return down, across


def _fill(record: Any, **fields: int | Pair) -> None:
    """Set fields of a record; a pair "name" is name_y and name_x."""
    for name, value in fields.items():
        if isinstance(value, tuple):
            record[f"{name}_y"], record[f"{name}_x"] = value
        else:
            record[name] = value


def _fill_part(part: Any, shape: tuple[int, int, int]) -> None:
    """Set what a part's pixels, of this batch, height and width, are counted by."""
    batch, height, width = shape
    _fill(part, pixels=batch * height * width)
    part["plane"], part["line"] = divisor(height * width), divisor(width)


def _fill_taps(part: Any, taps: Pair, channels: int, itemsize: int) -> None:
    """Set taps, and how far a slab moves on: to the next tap, if slabs have channels of one tap each."""
    depth = SLAB_BYTES // itemsize
    lines, of_a_line = taps
    by_panels = channels % depth == 0
    moved, moved_channels = (1, 0) if by_panels else divmod(depth, channels)
    moved_lines, moved_taps = divmod(moved, max(of_a_line, 1))
    _fill(
        part,
        taps=taps,
        advance=(moved_lines, moved_taps),
        advance_channels=moved_channels,
        advance_panel=depth if by_panels else 0,
        slabs=-(-lines * of_a_line * channels // depth),
    )

"""Sizes of convolutions and pools: the one place of their formulas and their checks of shapes."""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    PairLike = int | Sequence[int]

Pair = tuple[int, int]
Shape = tuple[int, ...]

# A training run meets a few dozen; inputs of ever new sizes must not grow memory for ever.
CACHED_GEOMETRIES = 1024


class Conv2dGeometry(NamedTuple):
    """All sizes of one 2-D convolution; `conv2d_geometry` makes and checks it.

    `padding` is ((top, bottom), (left, right)); `stride` and `dilation` are (vertical, horizontal).
    """

    batch: int
    in_channels: int
    height: int
    width: int
    out_channels: int
    kernel_height: int
    kernel_width: int
    out_height: int
    out_width: int
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    groups: int

    @property
    def input_shape(self) -> Shape:
        return self.batch, self.in_channels, self.height, self.width

    @property
    def weight_shape(self) -> Shape:
        channels = self.in_channels // self.groups
        return self.out_channels, channels, self.kernel_height, self.kernel_width

    @property
    def output_shape(self) -> Shape:
        return self.batch, self.out_channels, self.out_height, self.out_width


class Pool2dGeometry(NamedTuple):
    """All sizes of one 2-D pool; `pool2d_geometry` makes and checks it.

    The fields shared with `Conv2dGeometry` mean the same. `count_include_pad` and
    `divisor_override` decide the divisor of an average.
    """

    batch: int
    channels: int
    height: int
    width: int
    kernel_height: int
    kernel_width: int
    out_height: int
    out_width: int
    stride: Pair
    padding: tuple[Pair, Pair]
    dilation: Pair
    count_include_pad: bool
    divisor_override: int | None

    @property
    def input_shape(self) -> Shape:
        return self.batch, self.channels, self.height, self.width

    @property
    def output_shape(self) -> Shape:
        return self.batch, self.channels, self.out_height, self.out_width


Geometry = Conv2dGeometry | Pool2dGeometry


def conv2d_geometry(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    stride: PairLike = 1,
    padding: PairLike | str = 0,
    dilation: PairLike = 1,
    groups: int = 1,
) -> Conv2dGeometry:
    """Check a convolution of x (N, C, H, W) with weight (K, C / groups, R, S) and give its sizes.

    stride, padding and dilation are ints or (vertical, horizontal) pairs. padding may also be
    "valid" (none) or "same" (output as large as x; stride 1 only; an odd rest goes to the far
    side). out = (size + padding before and after - dilation * (kernel - 1) - 1) // stride + 1.

    Raises:
        ValueError: the shapes do not fit together, or a value is out of range.
    """
    # Made canonical before the cache sees them: it takes 1, 1.0 and True for one key, and no lists.
    return _conv2d_geometry(
        tuple(x_shape),
        tuple(weight_shape),
        _pair("conv2d", "stride", stride),
        padding if isinstance(padding, str) else _pair("conv2d", "padding", padding),
        _pair("conv2d", "dilation", dilation),
        _integer("conv2d", "groups", groups),
    )


@lru_cache(CACHED_GEOMETRIES)
def _conv2d_geometry(
    x_shape: Shape,
    weight_shape: Shape,
    stride: Pair,
    padding: Pair | str,
    dilation: Pair,
    groups: int,
) -> Conv2dGeometry:
    _check_conv2d_values(stride, padding, dilation, groups)
    _check_conv2d_shapes(x_shape, weight_shape, groups)
    kernel = (weight_shape[2], weight_shape[3])
    pads = _padding_pairs(padding, kernel, dilation)
    extents = tuple(_extent(k, d) for k, d in zip(kernel, dilation, strict=True))
    padded = tuple(size + sum(pad) for size, pad in zip(x_shape[2:], pads, strict=True))
    _require(
        all(extent <= size for extent, size in zip(extents, padded, strict=True)),
        "conv2d: the kernel must fit into the padded input "
        "(dilation * (kernel - 1) + 1 <= size + padding)",
        {"x.shape": x_shape, "weight.shape": weight_shape, "padding": pads, "dilation": dilation},
    )
    out_height, out_width = (
        (size - extent) // step + 1
        for size, extent, step in zip(padded, extents, stride, strict=True)
    )
    # fmt: off
    return Conv2dGeometry(
        x_shape[0], x_shape[1], x_shape[2], x_shape[3], weight_shape[0], kernel[0], kernel[1],
        out_height, out_width, stride, pads, dilation, groups,
    )
    # fmt: on


def pool2d_geometry(
    name: str,
    x_shape: Sequence[int],
    kernel_size: PairLike,
    stride: PairLike | None = None,
    padding: PairLike = 0,
    dilation: PairLike = 1,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Pool2dGeometry:
    """Check a pool of x (N, C, H, W) and give its sizes; name is the operation in messages.

    Numbers are ints or (vertical, horizontal) pairs; stride defaults to kernel_size. With
    ceil_mode the division in conv2d's size formula rounds up, but the last window must start
    inside the input or its padding before.

    Raises:
        ValueError: the shapes do not fit together, or a value is out of range.
    """
    kernel = _pair(name, "kernel_size", kernel_size)
    return _pool2d_geometry(
        name,
        tuple(x_shape),
        kernel,
        kernel if stride is None else _pair(name, "stride", stride),
        _pair(name, "padding", padding),
        _pair(name, "dilation", dilation),
        bool(ceil_mode),
        bool(count_include_pad),
        None if divisor_override is None else _integer(name, "divisor_override", divisor_override),
    )


@lru_cache(CACHED_GEOMETRIES)
def _pool2d_geometry(
    name: str,
    x_shape: Shape,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Pool2dGeometry:
    _check_pool2d_values(name, kernel, stride, padding, dilation, divisor_override)
    _check_four_dimensions(name, "x", x_shape)
    _check_no_empty_plane(name, x_shape)
    out_height, out_width = (
        _pooled_size(size, _extent(taps, spread), step, pad, ceil_mode)
        for size, taps, spread, step, pad in zip(
            x_shape[2:], kernel, dilation, stride, padding, strict=True
        )
    )
    got = {"x.shape": x_shape, "kernel_size": kernel, "padding": padding, "dilation": dilation}
    _require(
        out_height >= 1 and out_width >= 1,
        f"{name}: the window must fit into the padded input "
        "(dilation * (kernel_size - 1) + 1 <= size + 2 * padding)",
        got,
    )
    # fmt: off
    geometry = Pool2dGeometry(
        x_shape[0], x_shape[1], x_shape[2], x_shape[3], kernel[0], kernel[1], out_height, out_width,
        stride, _padding_pairs(padding, kernel, dilation), dilation,
        count_include_pad, divisor_override,
    )
    # fmt: on
    rows, columns = tap_positions(geometry)
    _require(
        bool((rows.max(axis=1) >= 0).all() and (columns.max(axis=1) >= 0).all()),
        f"{name}: every window must hold a pixel of the input (taps of a dilated window may all "
        "fall on padding)",
        got,
    )
    return geometry


@lru_cache(CACHED_GEOMETRIES)
def tap_positions(geometry: Geometry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the input row of each (output row, tap), and the same for columns.

    A tap that falls on padding has -1. Shapes (out_height, kernel_height) and
    (out_width, kernel_width); the arrays are shared and read-only.
    """

    def table(out_size: int, size: int, axis: int) -> NDArray[np.int64]:
        starts = np.arange(out_size)[:, None] * geometry.stride[axis]
        positions = starts - geometry.padding[axis][0] + _tap_offsets(geometry, axis)
        return _read_only(np.where((positions >= 0) & (positions < size), positions, -1))

    return (
        table(geometry.out_height, geometry.height, 0),
        table(geometry.out_width, geometry.width, 1),
    )


@lru_cache(CACHED_GEOMETRIES)
def covering_windows(geometry: Geometry) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give the output rows whose windows read each input row, and the same for columns.

    The inverse of `tap_positions`, in the order of the taps: shapes (height, n) and (width, n), n
    the most of any row or column, -1 after the last one. The arrays are shared and read-only.
    """

    def table(out_size: int, size: int, axis: int) -> NDArray[np.int64]:
        padded = np.arange(size)[:, None] + geometry.padding[axis][0]
        windows, rest = np.divmod(padded - _tap_offsets(geometry, axis), geometry.stride[axis])
        covered = (rest == 0) & (windows >= 0) & (windows < out_size)
        covered_first = np.argsort(~covered, axis=1, kind="stable")
        windows = np.take_along_axis(np.where(covered, windows, -1), covered_first, axis=1)
        return _read_only(windows[:, : covered.sum(axis=1).max()].copy())

    return (
        table(geometry.out_height, geometry.height, 0),
        table(geometry.out_width, geometry.width, 1),
    )


@lru_cache(CACHED_GEOMETRIES)
def window_divisors(geometry: Pool2dGeometry) -> NDArray[np.float64]:
    """Give what each window's sum is divided by in an average, shape (out_height, out_width).

    Padding counts with count_include_pad, but not what ceil_mode adds beyond it.
    """
    if geometry.divisor_override is not None:
        shape = (geometry.out_height, geometry.out_width)
        return _read_only(np.full(shape, float(geometry.divisor_override)))

    def counts(out_size: int, size: int, kernel: int, axis: int) -> NDArray[Any]:
        if not geometry.count_include_pad:
            return (tap_positions(geometry)[axis] >= 0).sum(axis=1)
        starts = np.arange(out_size) * geometry.stride[axis]
        return np.minimum(starts + kernel, size + sum(geometry.padding[axis])) - starts

    rows = counts(geometry.out_height, geometry.height, geometry.kernel_height, 0)
    columns = counts(geometry.out_width, geometry.width, geometry.kernel_width, 1)
    divisors = rows[:, None] * columns
    return _read_only(divisors.astype(np.float64))


def _tap_offsets(geometry: Geometry, axis: int) -> NDArray[np.int64]:
    kernel = (geometry.kernel_height, geometry.kernel_width)[axis]
    return np.arange(kernel, dtype=np.int64) * geometry.dilation[axis]


def _read_only(table: NDArray[Any]) -> NDArray[Any]:
    table.flags.writeable = False
    return table


def _extent(kernel: int, dilation: int) -> int:
    return dilation * (kernel - 1) + 1


def _pooled_size(size: int, extent: int, stride: int, padding: int, ceil_mode: bool) -> int:
    free = size + 2 * padding - extent
    out = (free + (stride - 1 if ceil_mode else 0)) // stride + 1
    if ceil_mode and (out - 1) * stride >= size + padding:
        out -= 1
    return out


def _padding_pairs(padding: Pair | str, kernel: Pair, dilation: Pair) -> tuple[Pair, Pair]:
    if isinstance(padding, tuple):
        return (padding[0], padding[0]), (padding[1], padding[1])
    if padding == "valid":
        return (0, 0), (0, 0)
    vertical, horizontal = (_extent(k, d) - 1 for k, d in zip(kernel, dilation, strict=True))
    return (
        (vertical // 2, vertical - vertical // 2),
        (horizontal // 2, horizontal - horizontal // 2),
    )


def _check_conv2d_values(stride: Pair, padding: Pair | str, dilation: Pair, groups: int) -> None:
    _check_positive("conv2d", stride=stride, dilation=dilation, groups=(groups,))
    if isinstance(padding, tuple):
        _check_not_negative("conv2d", padding)
        return
    _require(
        padding in ("same", "valid"),
        "conv2d: padding must be an int, a pair, 'same' or 'valid'",
        {"padding": repr(padding)},
    )
    _require(
        padding == "valid" or stride == (1, 1),
        "conv2d: padding='same' needs stride 1 (stride == (1, 1))",
        {"stride": stride},
    )


def _check_conv2d_shapes(x_shape: Shape, weight_shape: Shape, groups: int) -> None:
    _check_four_dimensions("conv2d", "x", x_shape)
    _check_four_dimensions("conv2d", "weight", weight_shape)
    _check_no_empty_plane("conv2d", x_shape)
    got: dict[str, Any] = {"x.shape": x_shape, "weight.shape": weight_shape}
    _require(
        min(weight_shape) >= 1,
        "conv2d: weight must not be empty (min(weight.shape) >= 1)",
        {"weight.shape": weight_shape},
    )
    if groups != 1:
        got["groups"] = groups
    _require(
        x_shape[1] == weight_shape[1] * groups,
        "conv2d: x and weight must agree on input channels "
        "(x.shape[1] == weight.shape[1] * groups)",
        got,
    )
    _require(
        weight_shape[0] % groups == 0,
        "conv2d: groups must divide the output channels (weight.shape[0] % groups == 0)",
        got,
    )


def _check_pool2d_values(
    name: str,
    kernel: Pair,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    divisor_override: int | None,
) -> None:
    _check_positive(name, kernel_size=kernel, stride=stride, dilation=dilation)
    _check_not_negative(name, padding)
    _require(
        all(2 * pad <= size for pad, size in zip(padding, kernel, strict=True)),
        f"{name}: padding must be at most half of kernel_size (2 * padding <= kernel_size)",
        {"padding": padding, "kernel_size": kernel},
    )
    _require(
        divisor_override != 0,
        f"{name}: divisor_override must not be zero (divisor_override != 0)",
        {"divisor_override": divisor_override},
    )


def _check_positive(name: str, **values: tuple[int, ...]) -> None:
    for argument, value in values.items():
        shown = value[0] if len(value) == 1 else value
        rule = f"{name}: {argument} must be positive ({argument} >= 1)"
        _require(min(value) >= 1, rule, {argument: shown})


def _check_not_negative(name: str, padding: Pair) -> None:
    rule = f"{name}: padding must not be negative (padding >= 0)"
    _require(min(padding) >= 0, rule, {"padding": padding})


def _check_four_dimensions(name: str, argument: str, shape: Shape) -> None:
    rule = f"{name}: {argument} must have four dimensions ({argument}.ndim == 4)"
    _require(len(shape) == 4, rule, {f"{argument}.shape": shape})


def _check_no_empty_plane(name: str, x_shape: Shape) -> None:
    rule = f"{name}: only the batch of x may be empty (min(x.shape[1:]) >= 1)"
    _require(min(x_shape[1:]) >= 1, rule, {"x.shape": x_shape})


def _pair(name: str, argument: str, value: PairLike) -> Pair:
    try:
        if isinstance(value, (tuple, list)):
            vertical, horizontal = value
            return operator.index(vertical), operator.index(horizontal)
        single = operator.index(value)  # pyright: ignore[reportArgumentType]
    except (TypeError, ValueError):
        rule = f"{name}: {argument} must be an int or a pair of ints"
        raise ValueError(f"{rule}; got {argument}={value!r}") from None
    return single, single


def _integer(name: str, argument: str, value: int) -> int:
    try:
        return operator.index(value)
    except TypeError:
        message = f"{name}: {argument} must be an int; got {argument}={value!r}"
        raise ValueError(message) from None


def _require(holds: bool, rule: str, got: Mapping[str, Any]) -> None:
    if not holds:
        raise ValueError(f"{rule}; got {', '.join(f'{key}={value}' for key, value in got.items())}")

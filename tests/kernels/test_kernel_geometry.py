"""Sizes by brute force, and every refusal."""

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from gradengine.kernels.geometry import (
    conv2d_geometry,
    covering_windows,
    pool2d_geometry,
    tap_positions,
    window_divisors,
)
from tests.kernels import references as reference

sizes = st.integers(1, 9)
small = st.integers(1, 4)


def pairs(values):
    return st.tuples(values, values)


@given(pairs(sizes), pairs(small), pairs(small), pairs(st.integers(0, 3)), pairs(small))
def test_conv2d_windows_are_those_that_fit(size, kernel, stride, padding, dilation):
    axes = [
        reference.windows(size[a], kernel[a], stride[a], padding[a], dilation[a]) for a in (0, 1)
    ]
    arguments = ((2, 6, *size), (4, 3, *kernel), stride, padding, dilation, 2)
    if not (axes[0] and axes[1]):
        with pytest.raises(ValueError, match="conv2d: the kernel must fit into the padded input"):
            conv2d_geometry(*arguments)
        return
    geometry = conv2d_geometry(*arguments)
    assert geometry.input_shape == arguments[0]
    assert geometry.weight_shape == arguments[1]
    assert geometry.output_shape == (2, 4, len(axes[0]), len(axes[1]))
    assert_tables(geometry, axes, size)


@given(pairs(sizes), pairs(small), pairs(small))
def test_same_padding_keeps_the_size(size, kernel, dilation):
    geometry = conv2d_geometry((1, 1, *size), (1, 1, *kernel), 1, "same", dilation)
    assert geometry.output_shape == (1, 1, *size)
    for before, after in geometry.padding:
        assert after - before in (0, 1)


@given(
    pairs(sizes), pairs(small), pairs(small), pairs(st.integers(0, 2)), pairs(small), st.booleans()
)
@example((5, 5), (2, 2), (3, 3), (1, 1), (1, 1), True)
def test_pool2d_windows_are_those_that_fit(size, kernel, stride, padding, dilation, ceil_mode):
    assume(all(2 * padding[a] <= kernel[a] for a in (0, 1)))
    axes = [
        reference.windows(size[a], kernel[a], stride[a], padding[a], dilation[a], ceil_mode)
        for a in (0, 1)
    ]
    arguments = ("pool", (2, 3, *size), kernel, stride, padding, dilation, ceil_mode)
    seen = [all(any(0 <= h < size[a] for h in window) for window in axes[a]) for a in (0, 1)]
    if not (axes[0] and axes[1]):
        with pytest.raises(ValueError, match="pool: the window must fit into the padded input"):
            pool2d_geometry(*arguments)
    elif not all(seen):
        with pytest.raises(ValueError, match="pool: every window must hold a pixel of the input"):
            pool2d_geometry(*arguments)
    else:
        geometry = pool2d_geometry(*arguments)
        assert geometry.input_shape == (2, 3, *size)
        assert geometry.output_shape == (2, 3, len(axes[0]), len(axes[1]))
        assert_tables(geometry, axes, size)


def assert_tables(geometry, axes, size):
    for axis, positions, windows in zip(
        (0, 1), tap_positions(geometry), covering_windows(geometry), strict=True
    ):
        inside = [[h if 0 <= h < size[axis] else -1 for h in window] for window in axes[axis]]
        np.testing.assert_array_equal(positions, inside)
        by_tap = np.transpose(inside)
        covering = [
            [w for taps in by_tap for w in np.flatnonzero(taps == h)] for h in range(size[axis])
        ]
        most = max(map(len, covering))
        expected = [found + [-1] * (most - len(found)) for found in covering]
        np.testing.assert_array_equal(windows, expected)


@given(
    pairs(sizes),
    pairs(small),
    pairs(small),
    pairs(st.integers(0, 2)),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, 3]),
)
def test_divisors_count_the_pixels(
    size, kernel, stride, padding, ceil_mode, count_include_pad, divisor_override
):
    assume(all(2 * padding[a] <= kernel[a] for a in (0, 1)))
    axes = [
        reference.windows(size[a], kernel[a], stride[a], padding[a], 1, ceil_mode) for a in (0, 1)
    ]
    assume(axes[0] and axes[1])
    geometry = pool2d_geometry(
        "pool",
        (1, 1, *size),
        kernel,
        stride,
        padding,
        1,
        ceil_mode,
        count_include_pad,
        divisor_override,
    )
    expected = [
        [
            reference.avg_pool_divisor(
                rows, columns, size, padding, count_include_pad, divisor_override
            )
            for columns in axes[1]
        ]
        for rows in axes[0]
    ]
    np.testing.assert_array_equal(window_divisors(geometry), expected)


def test_numbers_and_pairs_name_one_geometry():
    shapes = ((1, 2, 8, 8), (3, 2, 3, 3))
    geometry = conv2d_geometry(*shapes, 2, 1, 1)
    one: Any = np.int64(1)
    assert geometry is conv2d_geometry(list(shapes[0]), shapes[1], [2, 2], (1, one), (1, 1))
    pool = pool2d_geometry("pool", shapes[0], 2)
    assert pool is pool2d_geometry("pool", shapes[0], (2, 2), [2, 2], 0)
    assert pool.stride == (2, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"x_shape": (8, 3, 32, 32), "weight_shape": (64, 4, 7, 7)},
            "conv2d: x and weight must agree on input channels (x.shape[1] == weight.shape[1] * "
            "groups); got x.shape=(8, 3, 32, 32), weight.shape=(64, 4, 7, 7)",
        ),
        (
            {"groups": 2},
            "conv2d: x and weight must agree on input channels (x.shape[1] == weight.shape[1] * "
            "groups); got x.shape=(2, 4, 8, 8), weight.shape=(6, 4, 3, 3), groups=2",
        ),
        (
            {"weight_shape": (6, 1, 3, 3), "groups": 4},
            "conv2d: groups must divide the output channels (weight.shape[0] % groups == 0); "
            "got x.shape=(2, 4, 8, 8), weight.shape=(6, 1, 3, 3), groups=4",
        ),
        (
            {"x_shape": (4, 8, 8)},
            "conv2d: x must have four dimensions (x.ndim == 4); got x.shape=(4, 8, 8)",
        ),
        (
            {"weight_shape": (6, 4)},
            "conv2d: weight must have four dimensions (weight.ndim == 4); got weight.shape=(6, 4)",
        ),
        (
            {"x_shape": (2, 4, 0, 8)},
            "conv2d: only the batch of x may be empty (min(x.shape[1:]) >= 1); "
            "got x.shape=(2, 4, 0, 8)",
        ),
        (
            {"weight_shape": (6, 4, 0, 3)},
            "conv2d: weight must not be empty (min(weight.shape) >= 1); "
            "got weight.shape=(6, 4, 0, 3)",
        ),
        (
            {"weight_shape": (6, 4, 3, 10), "dilation": (4, 1)},
            "conv2d: the kernel must fit into the padded input (dilation * (kernel - 1) + 1 <= "
            "size + padding); got x.shape=(2, 4, 8, 8), weight.shape=(6, 4, 3, 10), "
            "padding=((0, 0), (0, 0)), dilation=(4, 1)",
        ),
        ({"stride": (1, 0)}, "conv2d: stride must be positive (stride >= 1); got stride=(1, 0)"),
        (
            {"dilation": -1},
            "conv2d: dilation must be positive (dilation >= 1); got dilation=(-1, -1)",
        ),
        ({"groups": 0}, "conv2d: groups must be positive (groups >= 1); got groups=0"),
        ({"groups": 1.0}, "conv2d: groups must be an int; got groups=1.0"),
        (
            {"padding": (0, -1)},
            "conv2d: padding must not be negative (padding >= 0); got padding=(0, -1)",
        ),
        (
            {"padding": "full"},
            "conv2d: padding must be an int, a pair, 'same' or 'valid'; got padding='full'",
        ),
        (
            {"padding": "same", "stride": 2},
            "conv2d: padding='same' needs stride 1 (stride == (1, 1)); got stride=(2, 2)",
        ),
        (
            {"stride": (1, 2, 3)},
            "conv2d: stride must be an int or a pair of ints; got stride=(1, 2, 3)",
        ),
        ({"stride": 1.0}, "conv2d: stride must be an int or a pair of ints; got stride=1.0"),
        ({"padding": None}, "conv2d: padding must be an int or a pair of ints; got padding=None"),
    ],
)
def test_conv2d_refusals(changes, message):
    arguments: dict[str, Any] = {"x_shape": (2, 4, 8, 8), "weight_shape": (6, 4, 3, 3)}
    conv2d_geometry(**arguments)  # a cached good geometry hides no refusal
    with pytest.raises(ValueError, match=r"^conv2d: ") as refusal:
        conv2d_geometry(**{**arguments, **changes})
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"padding": (2, 1)},
            "pool: padding must be at most half of kernel_size (2 * padding <= kernel_size); "
            "got padding=(2, 1), kernel_size=(3, 3)",
        ),
        (
            {"x_shape": (1, 2, 2, 8)},
            "pool: the window must fit into the padded input (dilation * (kernel_size - 1) + 1 <= "
            "size + 2 * padding); got x.shape=(1, 2, 2, 8), kernel_size=(3, 3), padding=(0, 0), "
            "dilation=(1, 1)",
        ),
        (
            {"x_shape": (1, 2, 2, 8), "kernel_size": (2, 1), "dilation": 3, "padding": (1, 0)},
            "pool: every window must hold a pixel of the input (taps of a dilated window may all "
            "fall on padding); got x.shape=(1, 2, 2, 8), kernel_size=(2, 1), padding=(1, 0), "
            "dilation=(3, 3)",
        ),
        (
            {"x_shape": (2, 8, 8)},
            "pool: x must have four dimensions (x.ndim == 4); got x.shape=(2, 8, 8)",
        ),
        (
            {"x_shape": (1, 0, 8, 8)},
            "pool: only the batch of x may be empty (min(x.shape[1:]) >= 1); "
            "got x.shape=(1, 0, 8, 8)",
        ),
        (
            {"kernel_size": 0},
            "pool: kernel_size must be positive (kernel_size >= 1); got kernel_size=(0, 0)",
        ),
        ({"stride": (0, 1)}, "pool: stride must be positive (stride >= 1); got stride=(0, 1)"),
        (
            {"dilation": 0},
            "pool: dilation must be positive (dilation >= 1); got dilation=(0, 0)",
        ),
        (
            {"padding": -1},
            "pool: padding must not be negative (padding >= 0); got padding=(-1, -1)",
        ),
        (
            {"divisor_override": 0},
            "pool: divisor_override must not be zero (divisor_override != 0); "
            "got divisor_override=0",
        ),
        (
            {"divisor_override": 2.5},
            "pool: divisor_override must be an int; got divisor_override=2.5",
        ),
        (
            {"kernel_size": "3"},
            "pool: kernel_size must be an int or a pair of ints; got kernel_size='3'",
        ),
    ],
)
def test_pool2d_refusals(changes, message):
    arguments: dict[str, Any] = {"x_shape": (1, 2, 8, 8), "kernel_size": 3}
    with pytest.raises(ValueError, match=r"^pool: ") as refusal:
        pool2d_geometry("pool", **{**arguments, **changes})
    assert str(refusal.value) == message


@given(sizes, small, small, st.integers(0, 2), st.integers(1, 2), st.booleans())
def test_pool2d_sizes_match_pytorch(size, kernel, stride, padding, dilation, ceil_mode):
    torch = pytest.importorskip("torch")
    attributes = (kernel, stride, padding, dilation, ceil_mode)
    x = torch.zeros(1, 1, size, size)
    try:
        expected = tuple(torch.nn.functional.max_pool2d(x, *attributes).shape)
    except RuntimeError:
        expected = None
    try:
        got = pool2d_geometry("pool", x.shape, *attributes).output_shape
    except ValueError as error:
        assume("every window must hold" not in str(error))  # PyTorch gives -inf there
        got = None
    assert got == expected

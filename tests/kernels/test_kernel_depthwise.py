"""Convolutions of each channel by itself."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu import columns, conv2d, depthwise, direct
from gradengine.kernels.geometry import conv2d_geometry
from tests.kernels.memory import TOLERANCES, assert_close, guarded
from tests.kernels.tap_sums import convolution_passes
from tests.kernels.test_kernel_convolution_choice import (
    DOUBLE,
    SINGLE,
    assert_passes,
    drawn,
    three_passes,
)

# batch, channels, height, width; kernel, stride, padding, dilation
CASES = {
    "odd_sizes": ((2, 35, 7, 9), (3, 3), 1, 1, 1),
    "strided": ((2, 8, 12, 9), (5, 5), 2, 2, 1),
    "pairs": ((1, 3, 9, 8), (3, 2), (1, 2), (2, 0), (2, 3)),
    "stride_skips_pixels": ((2, 16, 11, 10), (2, 2), 3, 0, 1),
    "reads_only_padding": ((2, 4, 1, 1), (2, 2), 9, 3, 1),
    "stride_wider_than_x": ((2, 4, 3, 2), (2, 1), 5, 0, 1),
    "padding_beyond_the_kernel": ((1, 6, 5, 6), (3, 3), 1, 5, 1),
    "several_blocks": ((3, 64, 20, 18), (3, 3), 1, 1, 1),
    "two_channels": ((2, 2, 6, 7), (1, 4), 1, (0, 2), 1),
}


def made(case, rng, dtype):
    x_shape, kernel, *attributes = CASES[case]
    channels = x_shape[1]
    stride, padding, dilation = attributes
    shapes = x_shape, (channels, 1, *kernel)
    geometry = conv2d_geometry(*shapes, stride, padding, dilation, channels)
    assert conv2d._algorithm(geometry, dtype) is depthwise
    return drawn(geometry, rng, dtype)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("case", CASES)
def test_three_passes(case, dtype, rng):
    geometry, x, weight, grad = made(case, rng, dtype)
    expected = convolution_passes(x, weight, grad, geometry)
    found = three_passes(geometry, x, weight, grad)
    assert_passes(found, expected, dtype)
    for got, given in zip(
        three_passes(geometry, *(guarded(array) for array in (x, weight, grad))), found, strict=True
    ):
        np.testing.assert_array_equal(got, given)
    packed = kernels.pack_conv2d(weight, geometry)
    np.testing.assert_array_equal(kernels.conv2d(x, packed, None, geometry), found[0])


@pytest.mark.parametrize("case", ["odd_sizes", "strided"])
def test_the_gradient_by_the_input_is_added(case, rng):
    geometry, x, weight, grad = made(case, rng, SINGLE)
    onto = rng.standard_normal(x.shape).astype(SINGLE)
    before = onto.copy()
    expected = convolution_passes(x, weight, grad, geometry)[1] + onto
    assert_close(kernels.conv2d_grad_input(grad, weight, geometry, onto), expected, SINGLE)
    np.testing.assert_array_equal(onto, before)


@pytest.mark.parametrize("block", [1, 1000, depthwise.BLOCK])
def test_what_is_done_to_the_result(block, rng, monkeypatch):
    monkeypatch.setattr(depthwise, "BLOCK", block)
    geometry, x, weight, _ = made("several_blocks", rng, DOUBLE)
    bias, residual = rng.standard_normal(64), rng.standard_normal(geometry.output_shape)
    plain = kernels.conv2d(x, weight, None, geometry)
    found = kernels.conv2d(x, weight, bias, geometry, residual=residual, relu=True)
    np.testing.assert_array_equal(found, np.maximum(plain + bias[:, None, None] + residual, 0))
    out, mean, var = kernels.conv2d_moments(x, weight, bias, geometry)
    np.testing.assert_array_equal(out, plain + bias[:, None, None])
    np.testing.assert_allclose(mean, out.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(var, out.var(axis=(0, 2, 3)), rtol=1e-12)


def test_shared_among_threads_in_any_way_gives_equal_bits(rng, monkeypatch):
    geometry, x, weight, grad = made("several_blocks", rng, SINGLE)
    bits = set()
    for count in (1, 2, 3, 64):
        monkeypatch.setattr(depthwise, "get_num_threads", lambda count=count: count)
        found = three_passes(geometry, x, weight, grad)
        bits.add(b"".join(array.tobytes() for array in found))
    assert len(bits) == 1


def test_long_sums_keep_their_digits(rng):
    geometry = conv2d_geometry((8, 4, 128, 128), (4, 1, 3, 3), 1, 1, 1, 4)
    _, x, _, grad = drawn(geometry, rng, DOUBLE)
    x, grad = x + 10, grad + 10  # 131,072 terms of one sign
    weight = np.zeros(geometry.weight_shape)
    _, _, expected = convolution_passes(x, weight, grad, geometry)
    found = kernels.conv2d_grad_weight(grad.astype(SINGLE), x.astype(SINGLE), geometry)
    assert np.abs(found - expected).max() < 0.1 * TOLERANCES[SINGLE] * np.abs(expected).max()


@pytest.mark.parametrize(
    ("weight", "groups", "expected"),
    [((8, 1, 3, 3), 8, depthwise), ((16, 1, 3, 3), 8, direct), ((8, 2, 3, 3), 4, direct)],
)
def test_it_is_for_as_many_groups_as_channels(weight, groups, expected):
    geometry = conv2d_geometry((1, 8, 30, 30), weight, 1, 1, 1, groups)
    assert conv2d._algorithm(geometry, SINGLE) is expected
    single = conv2d_geometry((1, 1, 6, 6), (1, 1, 3, 3), 1, 1)
    assert conv2d._algorithm(single, SINGLE) is columns

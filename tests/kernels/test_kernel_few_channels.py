"""The gradient by x of convolutions that read few channels."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu import conv2d, few_channels, microkernel
from gradengine.kernels.geometry import conv2d_geometry
from tests.kernels.memory import TOLERANCES, assert_close, guarded, laid_out
from tests.kernels.tap_sums import convolution_passes
from tests.kernels.test_kernel_convolution_choice import CASES, DOUBLE, SINGLE, made

SERVED = sorted(CASES.keys() - {"pairs", "dilation"})  # the others dilate kernels horizontally


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    monkeypatch.setattr(few_channels, "is_suitable", lambda geometry, dtype: True)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("case", SERVED)
def test_it_is_the_gradient_plus_what_it_is_added_to(case, dtype, rng):
    geometry, x, weight, grad = made(case, rng, dtype)
    _, expected, _ = convolution_passes(x, weight, grad, geometry)
    found = kernels.conv2d_grad_input(grad, weight, geometry)
    assert found.dtype == dtype
    assert_close(found, expected, dtype)
    onto = laid_out(rng.standard_normal(x.shape).astype(dtype), "nhwc")
    before = onto.copy()
    assert_close(kernels.conv2d_grad_input(grad, weight, geometry, onto), expected + onto, dtype)
    np.testing.assert_array_equal(onto, before)


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("case", SERVED)
def test_nothing_is_read_beyond_an_array(case, dtype, rng):
    geometry, _, weight, grad = made(case, rng, dtype)
    expected = kernels.conv2d_grad_input(grad, weight, geometry)
    found = kernels.conv2d_grad_input(guarded(grad), guarded(weight), geometry)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_shared_among_threads_in_any_way_gives_equal_bits(batch, rng, monkeypatch):
    geometry = conv2d_geometry((batch, 3, 11, 8), (20, 3, 5, 5), 2, 2)
    grad, weight = (
        rng.standard_normal(shape).astype(SINGLE)
        for shape in (geometry.output_shape, geometry.weight_shape)
    )
    bits = set()
    for count in (1, 2, 3, 5, 64):
        monkeypatch.setattr(few_channels, "get_num_threads", lambda count=count: count)
        bits.add(kernels.conv2d_grad_input(grad, weight, geometry).tobytes())
    assert len(bits) == 1


@pytest.mark.parametrize(
    ("channels", "dilation", "groups", "is_few"),
    [(3, 1, 1, True), (3, (2, 1), 1, True), (3, (1, 2), 1, False), (4, 1, 2, False)],
)
def test_it_is_for_images_under_plain_kernels(channels, dilation, groups, is_few, monkeypatch):
    monkeypatch.undo()
    weight = 8, channels // groups, 3, 3
    geometry = conv2d_geometry((2, channels, 20, 20), weight, 1, 1, dilation, groups)
    assert few_channels.is_suitable(geometry, SINGLE) == is_few
    half = microkernel.width(SINGLE) // 2
    for count in (half, half + 1):
        wide = conv2d_geometry((2, count, 20, 20), (8, count, 3, 3), 1, 1)
        assert few_channels.is_suitable(wide, SINGLE) == (count == half)


def test_it_is_chosen_for_the_gradient_alone(rng, monkeypatch):
    monkeypatch.undo()
    geometry, _, weight, grad = made("stem", rng, SINGLE)
    made_by = []
    for module in (few_channels, conv2d._algorithm(geometry, SINGLE)):
        monkeypatch.setattr(module, "grad_input", lambda *_, module=module: made_by.append(module))
    kernels.conv2d_grad_input(grad, weight, geometry)
    assert made_by == [few_channels]


def test_as_exact_as_direct_sums(rng):
    geometry = conv2d_geometry((2, 3, 64, 64), (64, 3, 7, 7), 2, 3)
    x, weight, grad = (
        rng.standard_normal(shape)
        for shape in (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    )
    _, expected, _ = convolution_passes(x, weight, grad, geometry)
    found = kernels.conv2d_grad_input(grad.astype(SINGLE), weight.astype(SINGLE), geometry)
    assert np.abs(found - expected).max() < 0.1 * TOLERANCES[SINGLE] * np.abs(expected).max()

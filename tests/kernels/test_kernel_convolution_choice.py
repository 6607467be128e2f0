"""The three algorithms of convolution, each made to do what all can do, and which one is chosen."""

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels
from gradengine.kernels.cpu import (
    columns,
    conv2d,
    direct,
    epilogue,
    few_channels,
    microkernel,
    threads,
    winograd,
    workspace,
)
from gradengine.kernels.geometry import conv2d_geometry
from tests.kernels import references as reference
from tests.kernels.memory import TOLERANCES, assert_close, guarded
from tests.kernels.tap_sums import convolution_passes

ALGORITHMS = {"columns": columns, "direct": direct, "winograd": winograd}

# x shape, weight shape, stride, padding, dilation, groups
CASES = {
    "odd_sizes": ((2, 5, 13, 17), (7, 5, 3, 3), 1, 1, 1, 1),
    "no_padding": ((2, 3, 9, 8), (40, 3, 3, 3), 1, 0, 1, 1),
    "stem": ((1, 3, 21, 19), (33, 3, 7, 7), 2, 3, 1, 1),
    "pairs": ((2, 6, 14, 17), (35, 6, 3, 2), (2, 1), (0, 2), (1, 3), 1),
    "stride_skips_pixels": ((2, 4, 11, 10), (5, 4, 2, 2), 3, 0, 1, 1),
    "reads_only_padding": ((2, 4, 1, 1), (5, 4, 2, 2), 9, 3, 1, 1),
    "stride_wider_than_x": ((2, 4, 3, 2), (5, 4, 2, 1), 5, 0, 1, 1),
    "same_even_kernel": ((2, 3, 10, 15), (6, 3, 4, 2), 1, "same", 1, 1),
    "pointwise": ((3, 37, 5, 9), (65, 37, 1, 1), 1, 0, 1, 1),
    "pointwise_stride": ((2, 20, 9, 16), (34, 20, 1, 1), 2, 0, 1, 1),
    "padding_beyond_the_kernel": ((1, 2, 5, 6), (3, 2, 3, 3), 1, 5, 1, 1),
    "dilation": ((2, 4, 16, 15), (6, 4, 3, 3), 1, 3, 3, 1),
    "64_pixels": ((4, 3, 4, 4), (5, 3, 3, 3), 1, 1, 1, 1),
    "65_pixels": ((5, 3, 1, 13), (5, 3, 1, 3), 1, (0, 1), 1, 1),
    "many_pixels": ((9, 8, 9, 9), (20, 8, 3, 3), 1, 1, 1, 1),
}
GROUPS = {
    "groups": ((3, 12, 9, 8), (21, 4, 3, 3), 1, 1, 1, 3),
    "wide_groups": ((2, 70, 6, 5), (74, 35, 3, 3), 2, 1, 1, 2),
    "groups_dilated": ((2, 10, 9, 12), (6, 5, 2, 3), 1, 2, (1, 2), 2),
    "depthwise": ((2, 35, 7, 9), (35, 1, 3, 3), 1, 1, 1, 35),
    "pointwise_groups": ((2, 36, 5, 6), (6, 12, 1, 1), 1, 0, 1, 3),
}
SQUARES = {  # Winograd's form: whole vectors of channels, tiles that reach over every border
    "whole_tiles": ((2, 16, 8, 12), (32, 16, 3, 3), 1, 1, 1, 1),
    "odd_tiles": ((3, 48, 11, 18), (16, 48, 3, 3), 1, 1, 1, 1),
    "no_padding": ((2, 32, 13, 7), (80, 32, 3, 3), 1, 0, 1, 1),
    "wide_padding": ((2, 16, 5, 6), (48, 16, 3, 3), 1, 4, 1, 1),
    "uneven_padding": ((2, 16, 9, 10), (16, 16, 3, 3), 1, (0, 2), 1, 1),
    "one_pixel": ((3, 16, 1, 1), (16, 16, 3, 3), 1, 1, 1, 1),
    "one_row": ((2, 16, 1, 29), (16, 16, 3, 3), 1, 1, 1, 1),
    "many_outputs": ((2, 64, 7, 6), (144, 64, 3, 3), 1, 1, 1, 1),
}
DOUBLE, SINGLE = np.dtype(np.float64), np.dtype(np.float32)
SUITES = [
    *(("columns", case, dtype) for case in CASES for dtype in (SINGLE, DOUBLE)),
    *(("direct", case, dtype) for case in CASES | GROUPS for dtype in (SINGLE, DOUBLE)),
    *((algorithm, case, SINGLE) for algorithm in ALGORITHMS for case in SQUARES),
]
# One case of each that has several blocks, ends in the middle of one, and pads.
SAMPLES = {"columns": "many_pixels", "direct": "odd_sizes", "winograd": "odd_tiles"}


def made(case, rng, dtype):
    x_shape, weight_shape, *attributes = (CASES | GROUPS | SQUARES)[case]
    return drawn(conv2d_geometry(x_shape, weight_shape, *attributes), rng, dtype)


def drawn(geometry, rng, dtype):
    """Give a geometry with values for x, weight and the gradient of the result."""
    shapes = geometry.input_shape, geometry.weight_shape, geometry.output_shape
    return geometry, *(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def three_passes(geometry, x, weight, grad):
    return (
        kernels.conv2d(x, weight, None, geometry),
        kernels.conv2d_grad_input(grad, weight, geometry),
        kernels.conv2d_grad_weight(grad, x, geometry),
    )


def assert_passes(found, expected, dtype):
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == dtype
        assert_close(got, wanted, dtype)


@pytest.fixture
def use(monkeypatch):
    """Give a function that makes all convolutions use the algorithm named."""

    def force(name):
        monkeypatch.setattr(conv2d, "_algorithm", lambda geometry, dtype: ALGORITHMS[name])
        monkeypatch.setattr(few_channels, "is_suitable", lambda geometry, dtype: False)

    return force


@pytest.fixture(params=ALGORITHMS)
def algorithm(request, use):
    use(request.param)
    return request.param


@pytest.fixture
def think_of_threads(monkeypatch):
    """Give a function that makes kernels share work among so many threads, whatever runs it."""

    def share(count):
        for module in ALGORITHMS.values():
            monkeypatch.setattr(module, "get_num_threads", lambda: count)

    return share


# ---- three passes --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["odd_sizes", "pairs", "groups_dilated", "same_even_kernel"])
def test_the_sums_by_tap_are_the_plain_loops(case, rng):
    geometry, x, weight, grad = made(case, rng, DOUBLE)
    attributes = geometry.stride, geometry.padding, geometry.dilation, geometry.groups
    loops = (
        reference.conv2d(x, weight, None, *attributes),
        *reference.conv2d_gradients(grad, x, weight, *attributes),
    )
    assert_passes(convolution_passes(x, weight, grad, geometry), loops, DOUBLE)


@pytest.mark.parametrize(("name", "case", "dtype"), SUITES)
def test_three_passes(name, case, dtype, use, rng):
    use(name)
    geometry, x, weight, grad = made(case, rng, dtype)
    expected = convolution_passes(x, weight, grad, geometry)
    assert_passes(three_passes(geometry, x, weight, grad), expected, dtype)


@pytest.mark.parametrize(("name", "case", "dtype"), SUITES)
def test_nothing_is_read_beyond_an_array(name, case, dtype, use, rng):
    use(name)
    geometry, *arrays = made(case, rng, dtype)
    expected = three_passes(geometry, *arrays)
    found = three_passes(geometry, *(guarded(array) for array in arrays))
    for got, wanted in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize(("name", "case", "dtype"), SUITES)
def test_the_gradient_by_the_input_is_added(name, case, dtype, use, rng):
    use(name)
    geometry, x, weight, grad = made(case, rng, dtype)
    onto = rng.standard_normal(x.shape).astype(dtype)
    expected = convolution_passes(x, weight, grad, geometry)[1] + onto
    before = onto.copy()
    found = kernels.conv2d_grad_input(grad, weight, geometry, onto)
    assert_close(found, expected, dtype)
    np.testing.assert_array_equal(onto, before)


@pytest.mark.parametrize(("name", "case", "dtype"), SUITES[::3])
def test_a_packed_weight_gives_equal_bits(name, case, dtype, use, rng):
    use(name)
    geometry, x, weight, _ = made(case, rng, dtype)
    bias = rng.standard_normal(geometry.out_channels).astype(dtype)
    expected = kernels.conv2d(x, weight, bias, geometry)
    packed = kernels.pack_conv2d(weight, geometry)
    weight[...] = np.nan  # what was packed is a copy
    for _ in range(2):
        np.testing.assert_array_equal(kernels.conv2d(x, packed, bias, geometry), expected)


@pytest.mark.parametrize("case", ["odd_sizes", "no_padding", "wide_groups", "pointwise"])
def test_packed_panels_are_filled_up_with_zeros(case, rng):
    geometry, _, weight, _ = made(case, rng, SINGLE)
    outputs, own, height, width = geometry.weight_shape
    own_outputs, wide = outputs // geometry.groups, microkernel.width(SINGLE)
    packed = direct.pack(np.ascontiguousarray(weight.transpose(0, 2, 3, 1)), geometry)
    panels = packed.reshape(geometry.groups, -1, height, width, own, wide)
    filled = panels.transpose(0, 1, 5, 4, 2, 3).reshape(geometry.groups, -1, own, height, width)
    expected = weight.reshape(geometry.groups, own_outputs, own, height, width)
    np.testing.assert_array_equal(filled[:, :own_outputs], expected)
    assert not filled[:, own_outputs:].any()


SMALLER = {
    "columns": {
        "CHUNK_BYTES": (1, 70 * 88 * 4),
        "FEW_PIXELS": (0, 10_000),
        "RUNS": (1, 7),
    },
    "direct": {
        "BLOCK_BYTES": (1, 5000),
        "PANEL_BYTES": (1, 2000),
        "PARTS": (1, 3),
        "SMALL_BYTES": (0,),
    },
    "winograd": {
        "BLOCK_TILES": (1, 7, 13),
        "CHUNK_BYTES": (1, 200_000),
        "CHUNK_TILES": (1, 10),
        "TASKS": (1, 100),
    },
}


@pytest.mark.parametrize(
    ("name", "constant", "value"),
    [
        (name, constant, value)
        for name, constants in SMALLER.items()
        for constant, values in constants.items()
        for value in values
    ],
)
def test_blocks_of_other_sizes(name, constant, value, use, rng, monkeypatch):
    use(name)
    monkeypatch.setattr(ALGORITHMS[name], constant, value)
    geometry, x, weight, grad = made(SAMPLES[name], rng, SINGLE)
    expected = convolution_passes(x, weight, grad, geometry)
    assert_passes(three_passes(geometry, x, weight, grad), expected, SINGLE)
    packed = kernels.pack_conv2d(weight, geometry)
    assert_close(kernels.conv2d(x, packed, None, geometry), expected[0], SINGLE)


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_shared_among_threads_in_any_way_gives_equal_bits(
    batch, algorithm, think_of_threads, rng, monkeypatch
):
    monkeypatch.setattr(winograd, "BLOCK_TILES", 8)
    geometry, x, weight, grad = drawn(
        conv2d_geometry((batch, 16, 9, 10), (80, 16, 3, 3), 1, 1), rng, SINGLE
    )
    bits = set()
    for count in (1, 2, 3, 5, 16):
        think_of_threads(count)
        found = three_passes(geometry, x, weight, grad)
        *moments, mean, var = kernels.conv2d_moments(x, weight, None, geometry)
        bits.add(b"".join(array.tobytes() for array in (*found, *moments, mean, var)))
    assert len(bits) == 1


def test_any_number_of_threads_and_any_run_give_equal_bits(algorithm, rng):
    most = ge.get_num_threads()
    geometry, x, weight, grad = made("odd_tiles", rng, SINGLE)
    bits = set()
    try:
        for count in {1, min(2, most), most}:
            ge.set_num_threads(count)
            for _ in range(2):
                found = three_passes(geometry, x, weight, grad)
                bits.add(b"".join(array.tobytes() for array in found))
    finally:
        ge.set_num_threads(most)
        threads._chosen = None
    assert len(bits) == 1


# ---- what is done to a result while it is in cache -----------------------------------------------


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_bias_residual_and_relu(with_bias, with_residual, relu, algorithm, rng):
    geometry, x, weight, _ = made("odd_tiles", rng, SINGLE)
    bias = rng.standard_normal(geometry.out_channels).astype(SINGLE) if with_bias else None
    residual = rng.standard_normal(geometry.output_shape).astype(SINGLE) if with_residual else None
    expected = kernels.conv2d(x, weight, None, geometry)
    if bias is not None:
        expected = expected + bias[:, None, None]
    if residual is not None:
        expected = expected + residual
    if relu:
        expected = np.maximum(expected, 0)
    for given in (weight, kernels.pack_conv2d(weight, geometry)):
        found = kernels.conv2d(x, given, bias, geometry, residual=residual, relu=relu)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("case", GROUPS)
def test_bias_residual_relu_and_moments_with_groups(case, use, rng):
    use("direct")
    geometry, x, weight, _ = made(case, rng, DOUBLE)
    bias = rng.standard_normal(geometry.out_channels)
    residual = rng.standard_normal(geometry.output_shape)
    plain = kernels.conv2d(x, weight, None, geometry)
    found = kernels.conv2d(x, weight, bias, geometry, residual=residual, relu=True)
    expected = np.maximum(plain + bias[:, None, None] + residual, 0)
    np.testing.assert_array_equal(found, expected)
    out, mean, var = kernels.conv2d_moments(x, weight, bias, geometry)
    np.testing.assert_array_equal(out, plain + bias[:, None, None])
    np.testing.assert_allclose(mean, out.mean(axis=(0, 2, 3)), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(var, out.var(axis=(0, 2, 3)), rtol=1e-12)


def test_relu_keeps_nan_and_knows_no_negative_zero(algorithm, rng):
    geometry, x, weight, _ = made("odd_tiles", rng, SINGLE)
    weight[...] = 0
    residual = np.full(geometry.output_shape, -0.0, np.float32)
    residual[0, :, 1, 3], residual[1, :, 10, 17] = np.nan, -np.inf
    residual[2, :, 5] = 2.5
    found = kernels.conv2d(x, weight, None, geometry, residual=residual, relu=True)
    np.testing.assert_array_equal(found, np.maximum(residual, 0))
    assert not np.signbit(found[0, :, 0]).any()


@pytest.mark.parametrize("dtype", [SINGLE, DOUBLE])
@pytest.mark.parametrize("case", ["many_pixels", "odd_sizes", "odd_tiles"])
def test_moments_of_a_mean_far_from_zero(case, dtype, rng):
    """Squares of values near 10000 would keep nothing of a variance near 1."""
    geometry, x, weight, _ = made(case, rng, dtype)
    weight *= 0.1
    bias = np.linspace(-1e4, 1e4, geometry.out_channels).astype(dtype)
    out, mean, var = kernels.conv2d_moments(x, weight, bias, geometry)
    np.testing.assert_array_equal(out, kernels.conv2d(x, weight, bias, geometry))
    exact = out.astype(np.float64)
    tolerance = 1e-3 if dtype == SINGLE else 1e-10
    assert mean.dtype == var.dtype == np.float64
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 2, 3)), rtol=tolerance * 1e-3, atol=1e-6)
    np.testing.assert_allclose(var, exact.var(axis=(0, 2, 3)), rtol=tolerance)


@pytest.mark.parametrize("value", [1e4, 0.1])
def test_a_constant_has_no_variance(value, algorithm):
    geometry = conv2d_geometry((3, 16, 9, 10), (16, 16, 3, 3), 1, 1)
    x, weight = np.zeros(geometry.input_shape, SINGLE), np.ones(geometry.weight_shape, SINGLE)
    _, mean, var = kernels.conv2d_moments(x, weight, np.full(16, value, SINGLE), geometry)
    np.testing.assert_allclose(mean, value, rtol=1e-7)
    assert (var == 0).all()


def test_moments_of_no_image(algorithm):
    geometry = conv2d_geometry((0, 16, 8, 8), (16, 16, 3, 3), 1, 1)
    weight = np.ones(geometry.weight_shape, SINGLE)
    out, mean, var = kernels.conv2d_moments(np.ones((0, 16, 8, 8), SINGLE), weight, None, geometry)
    assert out.shape == (0, 16, 8, 8)
    assert mean.tolist() == var.tolist() == [0] * 16


def test_blocks_of_different_sizes_count_by_their_pixels(rng):
    values = rng.standard_normal((10, 3)) + 50
    blocks = epilogue.empty_moments(2, 3, DOUBLE)
    for block, part in zip(blocks, (values[:7], values[7:]), strict=True):
        block[0], block[1] = part[0], len(part)
        block[2], block[3] = (part - part[0]).sum(axis=0), np.square(part - part[0]).sum(axis=0)
    mean, var = epilogue.combine_moments(blocks)
    np.testing.assert_allclose(mean, values.mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(var, values.var(axis=0), rtol=1e-11)


# ---- ResNet-18 -----------------------------------------------------------------------------------

RESNET18 = {  # channels in, size, channels out, kernel, stride
    "stem": (3, 224, 64, 7, 2),
    "layer1": (64, 56, 64, 3, 1),
    "layer2_first": (64, 56, 128, 3, 2),
    "layer2_shortcut": (64, 56, 128, 1, 2),
    "layer2": (128, 28, 128, 3, 1),
    "layer3_first": (128, 28, 256, 3, 2),
    "layer3": (256, 14, 256, 3, 1),
    "layer4_first": (256, 14, 512, 3, 2),
    "layer4_shortcut": (256, 14, 512, 1, 2),
    "layer4": (512, 7, 512, 3, 1),
}
DIRECT_ERROR = 3e-6  # of direct sums, as `backends.cpu.winograd` promises it
WINOGRAD_ERROR = 3e-5


def resnet_layer(name, batch, rng):
    channels, size, outputs, kernel, stride = RESNET18[name]
    shapes = (batch, channels, size, size), (outputs, channels, kernel, kernel)
    return drawn(conv2d_geometry(*shapes, stride, kernel // 2), rng, SINGLE)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize("layer", RESNET18)
def test_errors_on_the_shapes_of_resnet18(layer, allowed, rng, monkeypatch):
    monkeypatch.setattr(ge.backends.cpu, "winograd", allowed)
    arrays = resnet_layer(layer, 2, rng)
    chosen = conv2d._algorithm(arrays[0], SINGLE)
    assert (chosen is winograd) == (allowed and RESNET18[layer][3:] == (3, 1))
    bound = WINOGRAD_ERROR if chosen is winograd else DIRECT_ERROR
    expected = convolution_passes(arrays[1], arrays[2], arrays[3], arrays[0])
    for found, exact in zip(three_passes(*arrays), expected, strict=True):
        assert abs(found - exact).max() <= bound * abs(exact).max()


@pytest.mark.parametrize("allowed", [True, False])
def test_errors_of_sums_over_many_large_images(allowed, rng, monkeypatch):
    monkeypatch.setattr(ge.backends.cpu, "winograd", allowed)
    geometry, x, weight, grad = resnet_layer("layer1", 16, rng)
    exact = convolution_passes(x, weight, grad, geometry)[2]
    found = kernels.conv2d_grad_weight(grad, x, geometry)
    assert abs(found - exact).max() <= WINOGRAD_ERROR * abs(exact).max()


# ---- the choice ----------------------------------------------------------------------------------


def chosen(x_shape, weight_shape, *attributes, dtype=SINGLE):
    return conv2d._algorithm(conv2d_geometry(x_shape, weight_shape, *attributes), dtype)


@pytest.mark.parametrize(
    ("geometry", "dtype"),
    [
        (((2, 64, 56, 56), (64, 64, 3, 3), 2, 1), SINGLE),
        (((2, 64, 56, 56), (64, 64, 3, 3), 1, 2, 2), SINGLE),
        (((2, 64, 56, 56), (64, 32, 3, 3), 1, 1, 1, 2), SINGLE),
        (((2, 64, 56, 56), (64, 64, 3, 1), 1, 1), SINGLE),
        (((2, 64, 56, 56), (64, 64, 5, 5), 1, 2), SINGLE),
        (((2, 63, 56, 56), (64, 63, 3, 3), 1, 1), SINGLE),
        (((2, 64, 56, 56), (63, 64, 3, 3), 1, 1), SINGLE),
        (((2, 64, 56, 56), (64, 64, 3, 3), 1, 1), DOUBLE),
    ],
)
def test_winograd_is_for_whole_vectors_of_float32_under_3x3(geometry, dtype):
    assert chosen(*geometry, dtype=dtype) is direct
    assert chosen((2, 64, 56, 56), (64, 64, 3, 3), 1, 1) is winograd


def test_columns_are_for_small_planes_without_groups():
    assert chosen((2, 64, 7, 7), (64, 64, 1, 1)) is columns
    assert chosen((2, 64, 7, 7), (64, 32, 1, 1), 1, 0, 1, 2) is direct
    assert chosen((2, 64, 28, 28), (64, 64, 1, 1)) is direct


def test_winograd_may_be_switched_off(rng, monkeypatch):
    arrays = made("odd_tiles", rng, SINGLE)
    expected = convolution_passes(arrays[1], arrays[2], arrays[3], arrays[0])
    found = {}
    for allowed in (True, False):
        monkeypatch.setattr(ge.backends.cpu, "winograd", allowed)
        found[allowed] = three_passes(*arrays)
        assert_passes(found[allowed], expected, SINGLE)
    for ours, theirs in zip(*found.values(), strict=True):
        assert (ours != theirs).mean() > 0.1  # other sums, other roundings


def test_a_packed_weight_stays_what_it_was_packed_for(rng, monkeypatch):
    geometry, x, weight, _ = made("odd_tiles", rng, SINGLE)
    packed = {}
    for allowed in (True, False):
        monkeypatch.setattr(ge.backends.cpu, "winograd", allowed)
        packed[allowed] = kernels.pack_conv2d(weight, geometry)
    expected = reference.conv2d(x[:1, :, :, :9], weight[:2], None, padding=geometry.padding)
    for allowed in (True, False):
        found = kernels.conv2d(x, packed[allowed], None, geometry)
        assert abs(found[:1, :2, :, :8] - expected[:, :, :, :8]).max() < TOLERANCES[SINGLE] * 100
    assert (kernels.conv2d(x, packed[True], None, geometry) != found).any()


def test_a_task_writes_its_own_panels_alone(rng):
    # 64 channels are two panels; one block of tiles makes each a task of its own
    geometry = conv2d_geometry((1, 64, 14, 14), (64, 64, 3, 3), 1, 1)
    arrays = drawn(geometry, rng, SINGLE)
    exact = convolution_passes(arrays[1], arrays[2], arrays[3], geometry)
    assert winograd.block_count(geometry, SINGLE.itemsize) == 1
    for _ in range(20):
        with workspace.workspace(1 << 20, dtype=SINGLE) as left_over:
            left_over[...] = np.nan
        for found, expected in zip(three_passes(*arrays), exact, strict=True):
            assert abs(found - expected).max() <= WINOGRAD_ERROR * abs(expected).max()

"""Convolution on tensor cores: forward and gradient by the input, against sums in float64."""

from typing import Any

import numpy as np
import pytest

from gradengine.kernels import pack_conv2d, settings
from gradengine.kernels.cuda import conv2d, launch
from gradengine.kernels.cuda.conv2d import TILES, WINDOW_TILES
from gradengine.kernels.geometry import conv2d_geometry
from tests.emulator.fixtures import SCHEDULES
from tests.kernels.conftest import Place
from tests.kernels.memory import laid_out
from tests.kernels.tap_sums import convolution_passes

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
DTYPES = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)

# Rounding of the result, relative to its norm; sums are float32.
TOLERANCES = {np.dtype(np.float32): 2e-6, np.dtype(np.float16): 5e-4, BFLOAT16: 4e-3}
# Real tensor cores cut off bits where they align products and sums to add them, always toward zero;
# the emulator rounds each sum to nearest. 2.8e-6 was seen on an H200 for float32 of depth 1296.
GPU_SUMS = 1e-5
EXACT_SUMS = 3e-6  # of moments, which are not rounded to 16 bits

# x shape, weight shape, stride, padding, dilation, groups
CASES = {
    "square": ((2, 64, 7, 6), (72, 64, 3, 3), 1, 1, 1, 1),
    "pointwise": ((2, 40, 5, 4), (16, 40, 1, 1), 1, 0, 1, 1),
    "pointwise_stride": ((2, 64, 7, 8), (128, 64, 1, 1), 2, 0, 1, 1),
    "stride": ((2, 32, 9, 8), (136, 32, 3, 3), 2, 1, 1, 1),
    "stride_skips_pixels": ((1, 8, 8, 7), (8, 8, 2, 1), 3, 0, 1, 1),
    "stride_larger_than_input": ((2, 8, 2, 3), (8, 8, 1, 2), 4, 1, 1, 1),
    "stride_and_dilation": ((1, 16, 14, 13), (8, 16, 3, 2), (4, 3), (2, 1), (6, 2), 1),
    "dilation": ((2, 16, 9, 9), (24, 16, 3, 3), 1, 2, 2, 1),
    "one_sided_padding": ((2, 8, 6, 5), (16, 8, 4, 2), 1, "same", 1, 1),
    "groups": ((2, 64, 5, 4), (48, 32, 3, 3), 1, 1, 1, 2),
    "wide_kernel": ((1, 8, 3, 16), (8, 8, 2, 15), 1, (1, 14), 1, 1),
    "only_padding": ((1, 8, 1, 1), (8, 8, 2, 2), 3, 4, 1, 1),
}

# Of a stride of 1: tiles may have windows of the source.
WINDOW_CASES = {
    "several_tiles": ((5, 72, 9, 8), (136, 72, 3, 3), 1, 1, 1, 1),
    "no_padding": ((2, 64, 7, 9), (24, 64, 3, 2), 1, 0, 1, 1),
    "much_padding": ((2, 16, 3, 4), (16, 16, 3, 3), 1, (2, 2), 1, 1),
    "lines_only": ((3, 8, 10, 5), (8, 8, 5, 1), 1, (2, 0), 1, 1),
} | {name: CASES[name] for name in ("dilation", "one_sided_padding", "groups", "wide_kernel")}

# Channels of x that fill no chunks: filled up with zeros, by pairs of pixels where that is possible.
FILLED_CASES = {
    "stem": ((2, 3, 18, 20), (64, 3, 7, 7), 2, 3, 1, 1),
    "stem_even_padding": ((1, 3, 9, 12), (8, 3, 4, 4), 2, 2, 1, 1),
    "stem_odd_width": ((1, 3, 12, 13), (8, 3, 7, 7), 2, 3, 1, 1),
    "stem_stride_1": ((1, 3, 6, 8), (16, 3, 3, 3), 1, 1, 1, 1),
    "gray": ((1, 1, 8, 12), (8, 1, 5, 5), 4, 2, 1, 1),
    "ragged_channels": ((2, 21, 5, 4), (16, 21, 3, 3), 1, 1, 1, 1),
}


def representable(array):
    """Round float32 to what tensor cores multiply, TensorFloat-32."""
    if array.dtype != np.float32:
        return array
    return ((array.view(np.uint32) + 0x1000) & np.uint32(0xFFFFE000)).view(np.float32)


def drawn(case, rng, dtype: Any = DTYPES[0]):
    """Give a case's geometry, x, weight and grad."""
    x_shape, weight_shape, *attributes = case
    geometry = conv2d_geometry(x_shape, weight_shape, *attributes)
    shapes = (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    x, weight, grad = (representable(rng.standard_normal(shape).astype(dtype)) for shape in shapes)
    return geometry, x, weight, grad


def check(got, expected, dtype, place=None):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert got.transpose(0, 2, 3, 1).flags.c_contiguous
    error = np.linalg.norm(got.astype(np.float64) - expected)
    tolerance = max(TOLERANCES[dtype], GPU_SUMS) if is_gpu(place) else TOLERANCES[dtype]
    assert error <= tolerance * np.linalg.norm(expected)  # false for NaN


def is_gpu(place):
    return place is not None and place.name == "cupy"


def run(place, function, *arguments, **options) -> Any:
    """Call a function of conv2d with arrays of the place; give its results as NumPy's."""
    options = {key: place.give(value) for key, value in options.items()}
    results = function(*map(place.give, arguments), **options)
    return tuple(map(place.take, results)) if isinstance(results, tuple) else place.take(results)


def check_forward(place, geometry, x, weight, bias=None):
    """Check a convolution with moments; give it back with its exact value."""
    expected = convolution_passes(x, weight, np.zeros(geometry.output_shape), geometry)[0]
    if bias is not None:
        expected += bias[:, None, None].astype(np.float64)
    out, mean, variance = run(place, conv2d.conv2d_moments, x, weight, bias, geometry)
    check(out, expected, x.dtype, place)
    assert mean.dtype == variance.dtype == np.float64
    deviation = expected.std(axis=(0, 2, 3))
    center = expected.mean(axis=(0, 2, 3))
    tolerance = GPU_SUMS if is_gpu(place) else EXACT_SUMS
    assert (abs(mean - center) <= tolerance * (1 + deviation) + 1e-7 * abs(center)).all()
    assert (abs(variance - deviation**2) <= tolerance * deviation**2).all()
    return out, expected


def check_grad_input(place, geometry, x, weight, grad):
    _, expected, _ = convolution_passes(x, weight, grad, geometry)
    got = run(place, conv2d.conv2d_grad_input, grad, weight, geometry)
    check(got, expected, x.dtype, place)


def used_kernels():
    """Give the names of the convolution's kernels that were launched."""
    return {name for _, source, name in launch._kernels if source == conv2d.SOURCE}


def kinds():
    return {name.partition("<")[0] for name in used_kernels()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *FILLED_CASES])
def test_forward_and_moments(case, dtype, cuda_place, rng):
    geometry, x, weight, _ = drawn((CASES | FILLED_CASES)[case], rng, dtype)
    out, _ = check_forward(cuda_place, geometry, x, weight)
    assert kinds() >= {"conv2d_forward", "merge_moments"}
    plain = run(cuda_place, conv2d.conv2d, x, weight, None, geometry)
    np.testing.assert_array_equal(plain, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_gradient_by_input(case, dtype, cuda_place, rng):
    check_grad_input(cuda_place, *drawn(CASES[case], rng, dtype))
    assert "conv2d_grad_input" in kinds()


def tile_name(tile):
    kind = "_window" if tile in WINDOW_TILES else "_by_warpgroups"
    return f"{tile.rows}x{tile.columns}" + (kind if conv2d.by_warpgroups(tile) else "")


def set_tile(monkeypatch, tile):
    for plan in (conv2d._forward_plan, conv2d._grad_input_plan):
        monkeypatch.setattr(conv2d, plan.__name__, plan.__wrapped__)  # not from the cache
    monkeypatch.setattr(conv2d, "_choose_tile", lambda *_: tile)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", TILES, ids=tile_name)
def test_each_tile(tile, dtype, cuda_place, rng, monkeypatch):
    set_tile(monkeypatch, tile)
    # more rows and columns than a tile, and ends within one
    geometry, x, weight, grad = drawn(((3, 24, 8, 9), (144, 24, 3, 3), 1, 1, 1, 1), rng, dtype)
    check_forward(cuda_place, geometry, x, weight)
    check_grad_input(cuda_place, geometry, x, weight, grad)
    for case in (
        ((2, 144, 5, 5), (16, 144, 3, 3), 2, 1, 1, 1),
        ((1, 48, 5, 4), (32, 24, 3, 2), (2, 1), 1, (1, 2), 2),
    ):
        geometry, x, weight, grad = drawn(case, rng, dtype)
        check_forward(cuda_place, geometry, x, weight)
        check_grad_input(cuda_place, geometry, x, weight, grad)
    assert sum(f"{tile.rows}, {tile.columns}" in name for name in used_kernels()) >= 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", WINDOW_TILES, ids=tile_name)
@pytest.mark.parametrize("case", WINDOW_CASES)
def test_windows(case, tile, dtype, cuda_place, rng, monkeypatch):
    set_tile(monkeypatch, tile)
    geometry, x, weight, grad = drawn(WINDOW_CASES[case], rng, dtype)
    check_forward(cuda_place, geometry, x, weight)
    check_grad_input(cuda_place, geometry, x, weight, grad)
    assert kinds() >= {"conv2d_forward_window", "conv2d_grad_input_window"}


@pytest.mark.parametrize("case", [*CASES, *FILLED_CASES])
def test_windows_are_for_a_stride_of_1(case):
    x_shape, weight_shape, *attributes = (CASES | FILLED_CASES)[case]
    geometry = conv2d_geometry(x_shape, weight_shape, *attributes)
    for which in ("forward", "gradient"):
        window = conv2d.window_of(which, geometry, 4)
        fits = attributes[0] == 1 and geometry.kernel_height * geometry.kernel_width > 1
        fills_chunks = which == "gradient" or geometry.in_channels % 4 == 0
        assert (window is not None) == (fits and fills_chunks)
    limits = launch.Limits(architecture=90, multiprocessors=132, shared_bytes=227 << 10)
    tiles = conv2d.possible_tiles(limits, window)
    assert bool(WINDOW_TILES.keys() & tiles) == (window is not None)
    assert not WINDOW_TILES.keys() & TILES.keys()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [*TILES, *WINDOW_TILES], ids=tile_name)
def test_shared_memory_has_no_conflicts(tile, dtype, emulated_cuda, rng, monkeypatch):
    set_tile(monkeypatch, tile)
    geometry, x, weight, grad = drawn(CASES["square"], rng, dtype)
    emulated_cuda.statistics()
    conv2d.conv2d(x, weight, None, geometry)
    conv2d.conv2d_grad_input(grad, weight, geometry)
    counts = emulated_cuda.statistics()
    assert counts["products"] > 0
    assert counts["bank_conflicts"] == 0


@pytest.mark.parametrize("dtype", [DTYPES[0], BFLOAT16], ids=str)
@pytest.mark.parametrize("case", ["square", "stride"])
@pytest.mark.parametrize("tile", [*TILES, *WINDOW_TILES], ids=tile_name)
def test_every_schedule_gives_the_same_bits(case, dtype, tile, emulated_cuda, rng, monkeypatch):
    if tile in WINDOW_TILES and case == "stride":
        pytest.skip("windows are for a stride of 1")
    set_tile(monkeypatch, tile)
    geometry, x, weight, grad = drawn(CASES[case], rng, dtype)
    results = []
    for schedule in SCHEDULES:
        with emulated_cuda.scheduled(schedule):
            by_x = conv2d.conv2d_grad_input(grad, weight, geometry)
            results.append((*conv2d.conv2d_moments(x, weight, None, geometry), by_x))
    for result in results[1:]:
        for got, first in zip(result, results[0], strict=True):
            np.testing.assert_array_equal(got, first)


@pytest.mark.parametrize("memory", ["nchw", "nhwc", "strided", "read_only", "unaligned"])
@pytest.mark.parametrize("case", ["square", "ragged_channels"])
def test_any_memory(case, memory, emulated_cuda, rng):
    geometry, *arrays = drawn((CASES | FILLED_CASES)[case], rng)
    expected = convolution_passes(arrays[0], arrays[1], arrays[2], geometry)
    x, weight, grad = (
        unaligned(a) if memory == "unaligned" else laid_out(a, memory) for a in arrays
    )
    check(conv2d.conv2d(x, weight, None, geometry), expected[0], x.dtype)
    check(conv2d.conv2d_grad_input(grad, weight, geometry), expected[1], x.dtype)


def unaligned(array):
    n, c, h, w = array.shape
    moved = np.empty(array.size + 1, array.dtype)[1:].reshape(n, h, w, c).transpose(0, 3, 1, 2)
    moved[...] = array
    return moved


@pytest.mark.parametrize("dtype", [DTYPES[0], BFLOAT16], ids=str)
@pytest.mark.parametrize("case", ["square", "groups"])
@pytest.mark.parametrize(
    ("bias_dtype", "has_residual", "relu"),
    [(None, True, False), (np.float32, False, True), ("same", True, True)],
)
def test_epilogue(case, dtype, bias_dtype, has_residual, relu, cuda_place, rng):
    geometry, x, weight, _ = drawn(CASES[case], rng, dtype)
    _, expected = check_forward(cuda_place, geometry, x, weight)
    bias, residual = None, None
    if bias_dtype is not None:
        room = rng.standard_normal(2 * geometry.out_channels)
        bias = room.astype(dtype if bias_dtype == "same" else bias_dtype)[::-2]
        check_forward(cuda_place, geometry, x, weight, bias)
        expected += bias[:, None, None].astype(np.float64)
    if has_residual:
        residual = rng.standard_normal(geometry.output_shape).astype(dtype)
        expected += residual
    expected = np.maximum(expected, 0) if relu else expected
    arguments = (x, weight, bias, geometry)
    out = run(cuda_place, conv2d.conv2d, *arguments, residual=residual, relu=relu)
    check(out, expected, dtype, cuda_place)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["stride", "groups", "ragged_outputs"])
def test_gradient_added_to_another(case, dtype, cuda_place, rng):
    ragged = ((2, 8, 5, 4), (10, 8, 3, 3), 1, 1, 1, 1)  # goes to the plain kernels
    geometry, x, weight, grad = drawn((CASES | {"ragged_outputs": ragged})[case], rng, dtype)
    _, expected, _ = convolution_passes(x, weight, grad, geometry)
    onto = rng.standard_normal(geometry.input_shape).astype(dtype)
    before = onto.copy()
    got = run(cuda_place, conv2d.conv2d_grad_input, grad, weight, geometry, onto)
    check(got, expected + before, dtype, cuda_place)
    np.testing.assert_array_equal(onto, before)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_not_a_number_and_infinity_pass(dtype, value, cuda_place, rng):
    geometry, x, weight, grad = drawn(CASES["square"], rng, dtype)
    x[0, 0, 0, 0] = grad[0, 0, 0, 0] = value
    weight = abs(weight)
    out = run(cuda_place, conv2d.conv2d, x, weight, None, geometry, relu=True)
    by_x = run(cuda_place, conv2d.conv2d_grad_input, grad, weight, geometry)
    assert_equal = np.testing.assert_array_equal
    assert_equal(out[0, :, :2, :2].astype(np.float64), value)
    assert_equal(by_x[0, :, :2, :2].astype(np.float64), value)
    assert np.isfinite(out[1].astype(np.float64)).all()
    assert (out[1] >= 0).all()


def test_every_not_a_number_passes(cuda_place, rng):
    geometry, x, weight, _ = drawn(CASES["pointwise"], rng)
    # the one that the GPU's own arithmetic makes is all ones: rounding it up would overflow
    x[0, 0] = np.uint32(0x7FFFFFFF).view(np.float32)
    x[1, 0] = np.uint32(0xFFFFFFFF).view(np.float32)
    assert np.isnan(run(cuda_place, conv2d.conv2d, x, weight, None, geometry)).all()


@pytest.mark.parametrize("merged", [4, 512])
def test_moments_of_many_blocks(merged, cuda_place, rng, monkeypatch):
    monkeypatch.setattr(conv2d, "ONE_MERGE", merged)
    monkeypatch.setattr(conv2d, "MERGED_BLOCKS", 5)
    geometry, x, weight, _ = drawn(((1, 4, 40, 70), (40, 4, 1, 1), 1, 0, 1, 1), rng)
    # far from 0 for its deviation: sums of squares would cancel
    bias = np.full(40, 3000, np.float32)
    check_forward(cuda_place, geometry, x, weight, bias)
    assert merged == 512 or "sum_moments" in kinds()


def test_variance_does_not_cancel(cuda_place, rng):
    geometry, x, weight, _ = drawn(((2, 4, 9, 8), (8, 4, 1, 1), 1, 0, 1, 1), rng)
    x = representable(x * np.float32(0.01) + 8)
    weight = abs(weight)
    exact, *_ = convolution_passes(x, weight, np.zeros(geometry.output_shape), geometry)
    _, mean, variance = run(cuda_place, conv2d.conv2d_moments, x, weight, None, geometry)
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(variance, exact.var(axis=(0, 2, 3)), rtol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", list(TILES)[::2], ids=tile_name)
@pytest.mark.parametrize("case", ["square", "stem"])
def test_packed_weights(case, tile, dtype, emulated_cuda, rng, monkeypatch):
    set_tile(monkeypatch, tile)
    geometry, x, weight, _ = drawn((CASES | FILLED_CASES)[case], rng, dtype)
    packed = pack_conv2d(weight, geometry)
    expected = conv2d.conv2d(x, weight, None, geometry)
    weight[...] = 0  # the packed one is a copy
    np.testing.assert_array_equal(conv2d.conv2d(x, packed, None, geometry), expected)
    single = geometry._replace(batch=1)
    np.testing.assert_array_equal(conv2d.conv2d(x[:1], packed, None, single), expected[:1])


def test_slices_of_a_huge_batch(emulated_cuda, rng, monkeypatch):
    geometry, x, weight, grad = drawn(((5, 8, 6, 5), (16, 8, 3, 3), 1, 1, 1, 1), rng)
    residual = rng.standard_normal(geometry.output_shape).astype(np.float32)
    whole = (
        conv2d.conv2d(x, weight, None, geometry, residual=residual),
        conv2d.conv2d_grad_input(grad, weight, geometry, x),
    )
    monkeypatch.setattr(conv2d, "MAXIMUM_ELEMENTS", 2100)  # two images
    assert [part.stop for part in conv2d._image_slices(geometry)] == [2, 4, 5]
    monkeypatch.setattr(conv2d, "_suits_tensor_cores", lambda *_: True)
    out = conv2d.conv2d(x, weight, None, geometry, residual=residual)
    np.testing.assert_array_equal(out, whole[0])
    by_x = conv2d.conv2d_grad_input(grad, weight, geometry, x)
    np.testing.assert_array_equal(by_x, whole[1])
    _, mean, _ = conv2d.conv2d_moments(x, weight, None, geometry)
    np.testing.assert_allclose(mean, (whole[0] - residual).mean(axis=(0, 2, 3)), atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype, emulated_cuda):
    geometry = conv2d_geometry((0, 8, 5, 5), (16, 8, 3, 3))
    x, grad = (np.ones(shape, dtype) for shape in (geometry.input_shape, geometry.output_shape))
    weight = np.ones(geometry.weight_shape, dtype)
    out, mean, variance = conv2d.conv2d_moments(x, weight, None, geometry)
    assert out.shape == geometry.output_shape
    np.testing.assert_array_equal([mean, variance], np.zeros((2, 16)))
    assert conv2d.conv2d_grad_input(grad, weight, geometry).shape == geometry.input_shape
    assert not launch._kernels


@pytest.mark.parametrize("why", ["float64", "exact", "old", "ragged_outputs", "depthwise", "taps"])
def test_what_tensor_cores_do_not_suit(why, emulated_cuda, rng, monkeypatch):
    dtype = np.dtype(np.float64 if why == "float64" else np.float32)
    groups = 8 if why == "depthwise" else 1
    outputs, width = (10 if why == "ragged_outputs" else 16), (16 if why == "taps" else 3)
    shape = ((2, 8, 5, 18), (outputs, 8 // groups, 3, width), 2, 1, 1, groups)
    geometry, x, weight, grad = drawn(shape, rng, dtype)
    if why == "exact":
        monkeypatch.setattr(settings.cuda, "conv_tf32", False)
    if why == "old":
        limits = launch.device_limits()._replace(architecture=75)
        monkeypatch.setattr(emulated_cuda, "device_limits", limits)
    monkeypatch.setitem(TOLERANCES, dtype, 2e-6)
    place = Place("emulated")
    check_forward(place, geometry, x, weight)
    check_grad_input(place, geometry, x, weight, grad)
    assert not used_kernels()


def test_old_gpus_with_less_shared_memory_get_smaller_tiles():
    limits = launch.Limits(architecture=86, multiprocessors=84, shared_bytes=99 << 10)
    tile = conv2d._choose_tile(1 << 20, 512, 1, limits)
    assert conv2d.shared_bytes(tile) <= limits.shared_bytes
    assert conv2d._choose_tile(1 << 20, 64, 1, limits).columns == 64
    assert not any(map(conv2d.by_warpgroups, conv2d.possible_tiles(limits)))


@pytest.mark.parametrize(("architecture", "has"), [(89, False), (90, True), (100, False)])
def test_warpgroups_are_of_one_architecture(architecture, has):
    limits = launch.Limits(architecture, multiprocessors=132, shared_bytes=227 << 10)
    assert conv2d.by_warpgroups(conv2d._choose_tile(1 << 20, 512, 1, limits)) == has
    narrow = conv2d._choose_tile(1 << 20, 64, 1, limits)
    assert conv2d.by_warpgroups(narrow) == has
    assert narrow.columns == 64


def test_weights_rounded_to_tf32_by_warpgroups_are_nearly_the_nearest(cuda_place, rng, monkeypatch):
    set_tile(monkeypatch, next(iter(TILES)))
    x_shape, weight_shape, *attributes = CASES["square"]
    geometry = conv2d_geometry(x_shape, weight_shape, *attributes)
    x, weight, grad = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    )
    expected, by_x, _ = convolution_passes(x, weight, grad, geometry)
    for got, wanted in (
        (run(cuda_place, conv2d.conv2d, x, weight, None, geometry), expected),
        (run(cuda_place, conv2d.conv2d_grad_input, grad, weight, geometry), by_x),
    ):
        assert np.linalg.norm(got - wanted) <= 4e-4 * np.linalg.norm(wanted)


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 12321, 2**20 + 1, 2**31 - 1])
def test_division_by_multiplication(divisor):
    _, multiplier, shift = launch.divisor(divisor)
    assert multiplier < 2**32
    for quotient in {1, (2**31 - 1) // divisor // 2, (2**31 - 1) // divisor} - {0}:
        for n in (quotient * divisor - 1, quotient * divisor):
            assert n * multiplier >> shift == n // divisor

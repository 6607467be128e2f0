"""Convolution by ordinary multiply-adds on the emulated device: three passes against float64 sums."""

import numpy as np
import numpy.typing as npt
import pytest

from gradengine.kernels.cuda import conv2d_plain, launch, slices, tiles
from gradengine.kernels.geometry import conv2d_geometry
from tests.emulator.fixtures import assert_schedule_free
from tests.kernels.conftest import Place
from tests.kernels.memory import laid_out
from tests.kernels.tap_sums import convolution_passes

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOAT32 = np.dtype(np.float32)

# Rounding of the result, and of sums in float32, relative to the sum of absolute products.
TOLERANCES = {
    np.dtype(np.float16): 1e-3,
    BFLOAT16: 8e-3,
    FLOAT32: 3e-6,
    np.dtype(np.float64): 1e-14,
}
# Results below 2 ** -14 are rounded to multiples of the smallest float16, however small they are.
SUBNORMAL_ROUNDING = {np.dtype(np.float16): 2.0**-25}

# x shape, weight shape, stride, padding, dilation, groups
CASES = {
    "pointwise": ((2, 8, 5, 4), (12, 8, 1, 1), 1, 0, 1, 1),
    "pointwise_stride": ((2, 4, 5, 6), (8, 4, 1, 1), 2, 0, 1, 1),
    "square": ((2, 12, 6, 7), (16, 12, 3, 3), 1, 1, 1, 1),
    "several_tiles": ((3, 68, 5, 9), (132, 68, 3, 3), 1, 1, 1, 1),
    "stem": ((1, 3, 13, 11), (8, 3, 7, 7), 2, 3, 1, 1),
    "ragged_channels": ((2, 5, 6, 5), (7, 5, 3, 3), 1, 1, 1, 1),
    "stride": ((2, 8, 9, 8), (4, 8, 3, 3), 2, 1, 1, 1),
    "stride_skips_pixels": ((1, 2, 8, 7), (3, 2, 2, 1), 3, 0, 1, 1),
    "stride_larger_than_input": ((2, 4, 2, 3), (4, 4, 1, 2), 5, 1, 1, 1),
    "dilation": ((2, 4, 9, 9), (4, 4, 3, 3), 1, 2, 2, 1),
    "stride_and_dilation": ((1, 3, 14, 13), (5, 3, 3, 2), (4, 3), (2, 1), (6, 2), 1),
    "pairs": ((2, 2, 9, 8), (3, 2, 3, 2), (2, 1), (0, 2), (1, 3), 1),
    "one_sided_padding": ((2, 3, 6, 5), (4, 3, 4, 2), 1, "same", 1, 1),
    "wide_groups": ((2, 24, 5, 4), (36, 12, 3, 3), 1, 1, 1, 2),
    "narrow_groups": ((2, 6, 5, 7), (9, 2, 3, 3), 2, 1, 1, 3),
    "depthwise": ((2, 37, 6, 5), (37, 1, 3, 3), 1, 1, 1, 37),
    "depthwise_multiplier": ((1, 3, 7, 8), (6, 1, 3, 3), 2, 2, 2, 3),
    "only_padding": ((1, 2, 1, 1), (2, 2, 2, 2), 3, 4, 1, 1),
    "one_of_each": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, 1),
}


def drawn(case, rng, dtype: npt.DTypeLike = FLOAT32):
    """Give a case's geometry, x, weight and grad."""
    x_shape, weight_shape, *attributes = case if isinstance(case, tuple) else CASES[case]
    geometry = conv2d_geometry(x_shape, weight_shape, *attributes)
    shapes = (geometry.input_shape, geometry.weight_shape, geometry.output_shape)
    return geometry, *(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def three_passes(geometry, x, weight, grad, place=None):
    place = place or Place("emulated")
    x, weight, grad = map(place.give, (x, weight, grad))
    results = (
        conv2d_plain.forward(x, weight, None, geometry),
        conv2d_plain.grad_input(grad, weight, geometry),
        conv2d_plain.grad_weight(grad, x, geometry),
    )
    return [np.asarray(place.take(result)) for result in results]


def loaded():
    """Give (source, name) of the kernels that the test has launched."""
    return {key[1:] for key in launch._kernels}


def check(got, expected, scale, dtype):
    assert got.dtype == dtype
    assert got.shape == expected.shape
    assert got.transpose(0, 2, 3, 1).flags.c_contiguous
    error = np.abs(got.astype(np.float64) - expected)
    allowed = TOLERANCES[dtype] * scale + SUBNORMAL_ROUNDING.get(dtype, 0)
    assert (error <= allowed).all()  # false for NaN


def check_three_passes(geometry, x, weight, grad, given=None, place=None):
    """Compare with sums in float64, each within its share of its own sum of absolute products."""
    expected = convolution_passes(x, weight, grad, geometry)
    scales = convolution_passes(abs(x), abs(weight), abs(grad), geometry)
    found = three_passes(geometry, *(given or (x, weight, grad)), place=place)
    for got, wanted, scale in zip(found, expected, scales, strict=True):
        check(got, wanted, scale, x.dtype)
    return found


@pytest.mark.parametrize("case", CASES)
def test_three_passes(case, emulated_cuda, rng):
    check_three_passes(*drawn(case, rng))


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16, np.float64], ids=str)
@pytest.mark.parametrize("case", ["square", "ragged_channels", "narrow_groups"])
def test_other_dtypes(case, dtype, emulated_cuda, rng):
    check_three_passes(*drawn(case, rng, dtype))


@pytest.mark.parametrize("case", ["square", "depthwise"])
def test_small_results_in_float16(case, emulated_cuda, rng):
    geometry, *arrays = drawn(case, rng, np.float16)
    found = check_three_passes(geometry, *(array * np.float16(2**-9) for array in arrays))
    assert all((abs(result[result != 0]) < 2**-14).any() for result in found)


@pytest.mark.parametrize("case", ["several_tiles", "stride_and_dilation"])
def test_large_tiles(case, emulated_cuda, rng, monkeypatch):
    for tile in (tiles.SQUARE_TILE, tiles.TALL_TILE):
        monkeypatch.setattr(conv2d_plain, "choose_plain_tile", lambda *_, tile=tile: tile)
        check_three_passes(*drawn(case, rng))
    assert len([name for source, name in loaded() if source == conv2d_plain.SOURCE]) == 6


def test_tiles_fit_the_product(emulated_cuda):
    def chosen(*arguments):
        return tiles.choose_plain_tile(FLOAT32, *arguments)

    multiprocessors = launch.device_limits().multiprocessors
    assert chosen(128 * multiprocessors, 128, 1) == tiles.SQUARE_TILE
    assert chosen(128 * multiprocessors, 64, 1) == tiles.TALL_TILE
    assert chosen(128 * multiprocessors - 128, 128, 1) == tiles.SMALL_TILE
    assert chosen(128, 128, multiprocessors) == tiles.SQUARE_TILE
    assert chosen(64, 1 << 20, 1) == tiles.SMALL_TILE
    assert chosen(64, 128, None) == tiles.WIDE_TILE
    assert chosen(65, 128, None) == tiles.SQUARE_TILE
    assert tiles.choose_plain_tile(np.float64, 1 << 20, 1 << 20, 1) == tiles.SMALL_TILE


@pytest.mark.parametrize("memory", ["nchw", "nhwc", "strided", "read_only"])
def test_any_memory(memory, emulated_cuda, rng):
    geometry, *arrays = drawn("square", rng)
    given = tuple(laid_out(array, memory) for array in arrays)
    check_three_passes(geometry, *arrays, given=given)


def test_memory_that_is_not_aligned(emulated_cuda, rng):
    geometry, *arrays = drawn("square", rng)
    given = []
    for array in arrays:
        n, c, h, w = array.shape
        shifted = np.empty(array.size + 1, FLOAT32)[1:].reshape(n, h, w, c).transpose(0, 3, 1, 2)
        shifted[...] = array
        given.append(shifted)
    check_three_passes(geometry, *arrays, given=tuple(given))
    names = [name for source, name in loaded() if source == conv2d_plain.SOURCE]
    assert all("<float, 1," in name for name in names)


@pytest.mark.parametrize("groups", [1, 4])
def test_empty_batch(groups, emulated_cuda):
    geometry = conv2d_geometry((0, 4, 5, 5), (8, 4 // groups, 3, 3), groups=groups)
    x, grad = (np.ones(shape, FLOAT32) for shape in (geometry.input_shape, geometry.output_shape))
    out, by_x, by_weight = three_passes(geometry, x, np.ones(geometry.weight_shape, FLOAT32), grad)
    assert out.shape == geometry.output_shape
    assert by_x.shape == geometry.input_shape
    np.testing.assert_array_equal(by_weight, np.zeros(geometry.weight_shape))
    assert not loaded()


@pytest.mark.parametrize("case", ["square", "narrow_groups"])
@pytest.mark.parametrize(
    ("has_bias", "has_residual", "relu"),
    [(True, False, False), (False, True, True), (True, True, True)],
)
def test_epilogue(case, has_bias, has_residual, relu, emulated_cuda, rng):
    geometry, x, weight, _ = drawn(case, rng)
    room = rng.standard_normal(2 * geometry.out_channels).astype(FLOAT32)
    bias = room[::-2] if has_bias else None
    residual = rng.standard_normal(geometry.output_shape).astype(FLOAT32) if has_residual else None
    expected, *_ = convolution_passes(x, weight, np.zeros(geometry.output_shape), geometry)
    scale, *_ = convolution_passes(abs(x), abs(weight), np.zeros(geometry.output_shape), geometry)
    if bias is not None:
        expected += bias[:, None, None].astype(np.float64)
    if residual is not None:
        expected += residual
    expected = np.maximum(expected, 0) if relu else expected
    got = conv2d_plain.forward(x, weight, bias, geometry, residual, relu)
    check(got, expected, scale + 8, x.dtype)


@pytest.mark.parametrize("case", ["square", "narrow_groups"])
def test_not_a_number_passes_relu(case, emulated_cuda, rng):
    geometry, x, weight, _ = drawn(case, rng)
    x[0, 0, 0, 0] = np.nan
    out = conv2d_plain.forward(x, weight, None, geometry, None, True)
    assert np.isnan(out[0, 0, 0, 0])
    assert (out[1] >= 0).all()


@pytest.mark.parametrize("dtype", [np.float16, BFLOAT16], ids=str)
def test_gradient_by_weight_in_float32(dtype, emulated_cuda, rng):
    geometry, x, weight, grad = drawn("square", rng, dtype)
    *_, expected = convolution_passes(x, weight, grad, geometry)
    *_, scale = convolution_passes(abs(x), abs(weight), abs(grad), geometry)
    check(conv2d_plain.grad_weight(grad, x, geometry, FLOAT32), expected, scale, FLOAT32)


SLICED = {
    "tiles": ((3, 4, 17, 19), (4, 4, 1, 2), 1, 0, 1, 1),
    "groups": ((3, 24, 17, 19), (24, 12, 1, 1), 1, 0, 1, 2),
    "direct": ((3, 8, 17, 19), (8, 1, 1, 1), 1, 0, 1, 8),
}


@pytest.mark.parametrize("case", SLICED)
def test_slices_of_a_deep_product(case, emulated_cuda, rng, monkeypatch):
    plans = []
    plan = slices.plan
    monkeypatch.setattr(slices, "plan", lambda *sizes: plans.append(plan(*sizes)) or plans[-1])
    check_three_passes(*drawn(SLICED[case], rng))
    assert plans[0].slices > 3


@pytest.mark.parametrize("case", ["several_tiles", "depthwise", SLICED["tiles"]])
def test_every_schedule_gives_equal_bits(case, emulated_cuda, rng):
    arguments = drawn(case, rng)

    def results():
        return np.concatenate([np.ravel(result) for result in three_passes(*arguments)])

    assert_schedule_free(emulated_cuda, results)


@pytest.mark.parametrize("case", ["square", "ragged_channels", "depthwise"])
def test_reads_share_no_banks_and_race_nowhere(case, emulated_cuda, rng):
    emulated_cuda.watched = True
    emulated_cuda.accesses()  # counts anew
    check_three_passes(*drawn(case, rng))
    found = [a for a in emulated_cuda.accesses() if a.kernel == "conv2d_plain"]
    reads = [a for a in found if (a.memory, a.kind) == ("shared", "read")]
    assert reads
    assert all(a.pieces == a.least for a in reads)


# ---- on a GPU --------------------------------------------------------------------------------------

LARGE = {
    "layer1": ((4, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1, 1),
    "layer2": ((4, 64, 56, 56), (128, 64, 3, 3), 2, 1, 1, 1),
    "layer3": ((4, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1, 1),
    "large_stem": ((2, 3, 112, 112), (64, 3, 7, 7), 2, 3, 1, 1),
    "large_depthwise": ((4, 96, 28, 28), (96, 1, 3, 3), 2, 1, 1, 96),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", CASES | LARGE)
def test_three_passes_on_a_gpu(case, dtype, rng):
    arguments = drawn(LARGE.get(case, case), rng, dtype)
    found = check_three_passes(*arguments, place=Place("cupy"))
    again = three_passes(*arguments, place=Place("cupy"))
    for got, once_more in zip(found, again, strict=True):
        np.testing.assert_array_equal(got, once_more)

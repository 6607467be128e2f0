"""The gradient of convolution by the weight on emulated tensor cores, against sums in float64."""

import numpy as np
import pytest

from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d_weight, conv2d_weight_places, launch, slices, tuning
from gradengine.kernels.cuda.tiles import WARPGROUP_ARCHITECTURE
from gradengine.kernels.geometry import conv2d_geometry
from tests.emulator.fixtures import assert_schedule_free
from tests.kernels.conftest import Place
from tests.kernels.memory import laid_out
from tests.kernels.tap_sums import convolution_passes

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
FLOAT16, FLOAT32, FLOAT64 = map(np.dtype, ("float16", "float32", "float64"))

# Of the result's rounding; of both factors' to tf32; of sums in float32: relative to the sum of
# absolute products.
TOLERANCES = {FLOAT16: 1e-3, BFLOAT16: 8e-3, FLOAT32: 2.0**-10, FLOAT64: 1e-14}
SUM_TOLERANCE = 3e-6

# x shape, weight shape, stride, padding, dilation, groups
CASES = {
    "square": ((2, 64, 7, 9), (64, 64, 3, 3), 1, 1, 1, 1),
    "several_blocks": ((1, 72, 5, 6), (72, 72, 3, 3), 1, 1, 1, 1),
    "stride": ((2, 64, 9, 8), (16, 64, 3, 3), 2, 1, 1, 1),
    "stride_skips_pixels": ((1, 16, 9, 11), (8, 16, 2, 2), 3, 0, 1, 1),
    "dilation": ((1, 64, 9, 8), (8, 64, 3, 3), (1, 2), 2, (2, 3), 1),
    "one_sided_padding": ((1, 24, 6, 5), (8, 24, 4, 2), 1, "same", 1, 1),
    "more_taps_than_a_block": ((1, 64, 6, 7), (8, 64, 5, 5), 1, 2, 1, 1),
    "stem": ((2, 3, 14, 20), (64, 3, 7, 7), 2, 3, 1, 1),
    "pairs_of_one_channel": ((1, 1, 8, 12), (8, 1, 3, 4), (1, 2), (1, 2), (2, 1), 1),
    "few_channels": ((2, 3, 9, 7), (16, 3, 3, 3), 1, 1, 1, 1),
    "eight_channels": ((1, 8, 5, 7), (24, 8, 7, 5), 1, 2, 1, 1),
    "filled_channels": ((2, 11, 6, 7), (8, 11, 3, 3), (2, 1), (0, 2), (1, 2), 1),
    "large_stride": ((1, 8, 9, 9), (8, 8, 2, 2), 4, 1, 1, 1),
    "runs_skip_taps": ((2, 8, 7, 13), (72, 8, 2, 9), 2, (1, 4), 1, 1),
    "runs_of_spread_taps": ((1, 5, 10, 15), (16, 5, 3, 5), (1, 4), 2, (2, 2), 1),
    "runs_of_wide_rows": ((1, 8, 3, 19), (8, 8, 3, 11), 1, (1, 5), (1, 2), 1),
}
# no windows: one tap, or groups
GATHERED = {
    "pointwise": ((2, 64, 5, 7), (72, 64, 1, 1), 1, 0, 1, 1),
    "pointwise_stride": ((2, 16, 9, 10), (16, 16, 1, 1), 2, 0, 1, 1),
    "groups": ((2, 48, 5, 6), (32, 24, 3, 3), 1, 1, 1, 2),
}
DTYPES = [FLOAT16, BFLOAT16, FLOAT32]
PLAIN = {
    "few_outputs": ((1, 8, 5, 5), (3, 8, 3, 3), 1, 1, 1, 1),
    "ragged_groups": ((1, 12, 5, 5), (24, 3, 3, 3), 1, 1, 1, 4),
}


@pytest.fixture(autouse=True)
def _plans_are_made_anew():
    made = conv2d_weight._plan, conv2d_weight.possible_ways, conv2d_weight_places.plan_of
    for cached in made:
        cached.cache_clear()
    yield
    for cached in made:
        cached.cache_clear()


# Kernels, and the dtypes that they take.
WAYS = {"window": DTYPES, "warpgroup": [FLOAT16, BFLOAT16], "gather": DTYPES, "places": DTYPES}


def each_way(*dtypes, ways=("window", "warpgroup", "gather")):
    """Parametrize by way and dtype."""
    pairs = [(way, dtype) for way in ways for dtype in dtypes if dtype in WAYS[way]]
    return pytest.mark.parametrize(
        ("way", "dtype"), pairs, ids=[f"{way}-{dtype}" for way, dtype in pairs], indirect=["way"]
    )


@pytest.fixture
def way(request, monkeypatch):
    """Compute by one of the kernels."""
    if request.param != "places":
        yield chosen(request.param, monkeypatch)
        return
    monkeypatch.setattr(settings.cuda, "benchmark", True)
    with tuning.imposed(conv2d_weight.PLACES):
        yield request.param


def chosen(way, monkeypatch):
    monkeypatch.setattr(conv2d_weight, "_gather_time", lambda *_: 0 if way == "gather" else np.inf)
    give_tiles = conv2d_weight._window_tiles

    def window_tiles(geometry, itemsize, limits):
        if way == "warpgroup":
            return (conv2d_weight.WARPGROUP_TILES[geometry.in_channels <= 8],)
        return give_tiles(geometry, itemsize, limits)[:1]

    monkeypatch.setattr(conv2d_weight, "_window_tiles", window_tiles)
    return way


def drawn(case, rng, dtype=FLOAT32):
    """Give a case's geometry, grad and x."""
    cases = CASES | GATHERED | PLAIN
    x_shape, weight_shape, *attributes = cases[case] if isinstance(case, str) else case
    geometry = conv2d_geometry(x_shape, weight_shape, *attributes)
    shapes = (geometry.output_shape, geometry.input_shape)
    return geometry, *(rng.standard_normal(shape).astype(dtype) for shape in shapes)


def loaded():
    """Give (source, name) of the kernels that the test has launched."""
    return {key[1:] for key in launch._kernels}


def check(geometry, grad, x, *, given=None, out_dtype=None, place=None):
    """Compare with sums in float64, each within a share of the sum of its absolute products."""
    weight = np.zeros(geometry.weight_shape)
    *_, expected = convolution_passes(x, weight, grad, geometry)
    *_, scale = convolution_passes(abs(x), weight, abs(grad), geometry)
    given_grad, given_x = given or (grad, x)
    place = place or Place("emulated")
    got = place.take(
        conv2d_weight.grad_weight(place.give(given_grad), place.give(given_x), geometry, out_dtype)
    )
    assert got is not None
    assert got.dtype == (out_dtype or x.dtype)
    assert got.shape == expected.shape
    assert got.transpose(0, 2, 3, 1).flags.c_contiguous
    tolerance = SUM_TOLERANCE if out_dtype else TOLERANCES[x.dtype]
    error = np.abs(got.astype(np.float64) - expected)
    assert (error <= tolerance * scale).all()  # false for NaN
    return got


def kinds():
    return {name.split("_")[0] for source, name in loaded() if "weight" in source}


@each_way(*DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_sums(case, dtype, way, emulated_cuda, rng):
    check(*drawn(case, rng, dtype))
    assert kinds() == {way}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATHERED)
def test_what_has_no_windows_is_gathered(case, dtype, emulated_cuda, rng):
    check(*drawn(case, rng, dtype))
    assert kinds() == {"gather"}


@pytest.mark.parametrize("case", PLAIN)
def test_other_channels_take_no_tensor_cores(case, emulated_cuda, rng):
    check(*drawn(case, rng))
    assert not kinds()


def test_float64_takes_no_tensor_cores(emulated_cuda, rng):
    check(*drawn("square", rng, FLOAT64))
    assert not kinds()


def test_exact_float32_takes_no_tensor_cores(emulated_cuda, rng, monkeypatch):
    monkeypatch.setattr(settings.cuda, "conv_tf32", False)
    check(*drawn("few_channels", rng), out_dtype=FLOAT32)
    assert not kinds()


def test_old_devices_take_no_tensor_cores(emulated_cuda, rng):
    emulated_cuda.device_limits = launch.device_limits()._replace(architecture=75)
    launch.forget_kernels()
    check(*drawn("few_channels", rng, FLOAT16))
    assert not kinds()


@pytest.mark.parametrize("dtype", [FLOAT16, BFLOAT16], ids=str)
@pytest.mark.parametrize("case", ["square", "pointwise", "stem", "few_outputs"])
def test_result_in_float32(case, dtype, emulated_cuda, rng):
    """16-bit factors are exact in products: only the sums round."""
    check(*drawn(case, rng, dtype), out_dtype=FLOAT32)


@pytest.mark.parametrize("case", ["square", "stem"])
@pytest.mark.parametrize("memory", ["nchw", "strided", "read_only"])
def test_any_memory(memory, case, emulated_cuda, rng):
    geometry, grad, x = drawn(case, rng)
    check(geometry, grad, x, given=(laid_out(grad, memory), laid_out(x, memory)))


@each_way(FLOAT16, FLOAT32)
def test_memory_that_is_not_aligned(dtype, way, emulated_cuda, rng):
    geometry, *arrays = drawn("square", rng, dtype)
    given = []
    for array in arrays:
        n, c, h, w = array.shape
        shifted = np.empty(array.size + 1, dtype)[1:].reshape(n, h, w, c).transpose(0, 3, 1, 2)
        shifted[...] = array
        given.append(shifted)
    check(geometry, *arrays, given=tuple(given))


@pytest.mark.parametrize("dtype", [FLOAT16, FLOAT32], ids=str)
def test_empty_batch(dtype, emulated_cuda):
    geometry = conv2d_geometry((0, 8, 5, 5), (16, 8, 3, 3))
    shapes = (geometry.output_shape, geometry.input_shape)
    grad, x = (np.ones(shape, dtype) for shape in shapes)
    got = conv2d_weight.grad_weight(grad, x, geometry)
    np.testing.assert_array_equal(got, np.zeros(geometry.weight_shape))


# ---- patches and slices ----------------------------------------------------------------------------

PATCHED = {
    "rows": ((1, 64, 9, 6), (8, 64, 3, 3), 1, 1, 1, 1),
    "columns": ((1, 8, 3, 40), (16, 8, 3, 3), 1, 1, 1, 1),
    "images": ((5, 64, 3, 3), (8, 64, 2, 2), 1, 1, 1, 1),
    "images_of_few_channels": ((5, 8, 3, 4), (8, 8, 3, 2), (1, 2), 1, 1, 1),
    "stem": ((2, 3, 14, 20), (24, 3, 7, 7), 2, 3, 1, 1),
}


@each_way(BFLOAT16, FLOAT32, ways=("window", "warpgroup"))
@pytest.mark.parametrize("patch", [(1, 1, 9), (1, 2, 4), (1, 4, 100), (2, 100, 100), (3, 100, 100)])
@pytest.mark.parametrize("case", PATCHED)
def test_patches(case, patch, dtype, way, emulated_cuda, rng, monkeypatch):
    """Of any size, so that some stick out of the output, in every direction."""
    geometry, grad, x = drawn(PATCHED[case], rng, dtype)

    def windows(tile, geometry, itemsize, limits):
        sizes = map(min, patch, (geometry.batch, geometry.out_height, geometry.out_width))
        yield conv2d_weight._patch(tile, geometry, itemsize, limits, tuple(sizes))

    monkeypatch.setattr(conv2d_weight, "_windows", windows)
    check(geometry, grad, x)
    assert kinds() == {way}


@each_way(FLOAT16, FLOAT32, ways=("window", "warpgroup"))
@pytest.mark.parametrize("x_shape", [(1, 8, 2, 1100), (600, 8, 2, 2)], ids=["columns", "images"])
def test_more_than_a_patch_can_number(x_shape, dtype, way, emulated_cuda, rng):
    check(*drawn((x_shape, (8, 8, 2, 2), 1, 0, 1, 1), rng, dtype))
    assert kinds() == {way}


@pytest.mark.parametrize("case", ["square", "stem", "dilation", "runs_skip_taps"])
@each_way(*DTYPES)
def test_every_schedule_gives_equal_bits(case, dtype, way, emulated_cuda, rng):
    arguments = drawn(case, rng, dtype)
    assert_schedule_free(emulated_cuda, lambda: check(*arguments))


@each_way(FLOAT16, FLOAT32)
def test_slices(dtype, way, emulated_cuda, rng, monkeypatch):
    """One pixel more than whole slabs, and slices of which the last is short."""
    geometry, grad, x = drawn(((1, 8, 14, 23), (8, 8, 2, 2), 1, 0, 1, 1), rng, dtype)
    plans = []

    def plan(depth, unit, *_):
        plans.append(slices.Plan(-(-depth // (2 * unit)), 2 * unit))
        return plans[-1]

    monkeypatch.setattr(slices, "plan", plan)

    def windows(tile, geometry, itemsize, limits):
        yield conv2d_weight._patch(tile, geometry, itemsize, limits, (1, 3, 22))

    monkeypatch.setattr(conv2d_weight, "_windows", windows)
    check(geometry, grad, x)
    assert plans[0].slices > 2


@each_way(FLOAT16, BFLOAT16)
def test_matrices_share_no_banks(dtype, way, emulated_cuda, rng):
    emulated_cuda.statistics()  # counts anew
    for case in ("square", "stem", "stride"):
        check(*drawn(case, rng, dtype))
    assert emulated_cuda.statistics()["bank_conflicts"] == 0


@each_way(FLOAT16, FLOAT32, ways=("window", "warpgroup"))
@pytest.mark.parametrize("case", ["square", "stem"])
def test_windows_share_no_banks_and_race_nowhere(case, dtype, way, emulated_cuda, rng):
    emulated_cuda.watched = True
    emulated_cuda.accesses()  # counts anew
    check(*drawn(case, rng, dtype))
    found = [a for a in emulated_cuda.accesses() if a.kernel == "conv2d_weight"]
    reads = [a for a in found if (a.memory, a.kind) == ("shared", "read")]
    assert reads
    assert all(a.pieces == a.least for a in reads)


# ---- places ----------------------------------------------------------------------------------------

PLACED = {
    "square": CASES["square"],
    "several_blocks": CASES["several_blocks"],
    "stride": CASES["stride"],
    "stride_of_rows": ((2, 24, 9, 8), (8, 24, 3, 3), (2, 1), 1, 1, 1),
    "stride_skips_pixels": ((1, 16, 9, 11), (8, 16, 2, 2), (1, 3), 0, 1, 1),
    "dilation": CASES["dilation"],
    "even_dilation_and_stride": ((2, 16, 11, 10), (8, 16, 3, 3), 2, 2, 2, 1),
    "one_sided_padding": CASES["one_sided_padding"],
    "much_padding": ((2, 16, 4, 3), (8, 16, 3, 3), 1, 4, 1, 1),
    "much_padding_and_stride": ((2, 16, 4, 3), (8, 16, 3, 3), 2, 5, 1, 1),
    "no_padding": ((3, 16, 6, 7), (8, 16, 2, 3), 1, 0, 1, 1),
    "more_taps_than_a_block": CASES["more_taps_than_a_block"],
    "wide_rows": ((1, 12, 4, 9), (16, 12, 1, 9), 1, (0, 4), 1, 1),
    "filled_channels": CASES["filled_channels"],
    "ragged_columns": ((2, 68, 5, 6), (136, 68, 3, 3), 1, 1, 1, 1),
    "small_images": ((9, 32, 7, 7), (32, 32, 3, 3), 1, 1, 1, 1),
    "ring_wraps": ((2, 16, 60, 30), (16, 16, 3, 3), 1, 1, 1, 1),
    "rings_wrap": ((2, 16, 61, 58), (16, 16, 3, 3), 2, 1, 1, 1),
}
by_places = each_way(*DTYPES, ways=("places",))


def is_only_places():
    return kinds() == {"places"}


@by_places
@pytest.mark.parametrize("case", PLACED)
def test_sums_by_places(case, dtype, way, emulated_cuda, rng):
    check(*drawn(PLACED[case], rng, dtype))
    assert is_only_places()


@by_places
@pytest.mark.parametrize("case", ["square", "small_images", "rings_wrap"])
def test_places_in_slices(case, dtype, way, emulated_cuda, rng, monkeypatch):
    """Of two stages each, so that pixels are copied ahead of each."""
    plans = []

    def plan(depth, unit, *_):
        plans.append(slices.Plan(-(-depth // unit), unit))
        return plans[-1]

    monkeypatch.setattr(slices, "plan", plan)
    check(*drawn(PLACED[case], rng, dtype))
    assert plans[0].slices > 1
    assert is_only_places()


@by_places
@pytest.mark.parametrize("case", ["square", "stride", "small_images", "rings_wrap", "dilation"])
def test_every_schedule_gives_equal_bits_by_places(case, dtype, way, emulated_cuda, rng):
    arguments = drawn(PLACED[case], rng, dtype)
    assert_schedule_free(emulated_cuda, lambda: check(*arguments))


@by_places
@pytest.mark.parametrize("case", ["square", "stride"])
def test_places_share_no_banks_and_race_nowhere(case, dtype, way, emulated_cuda, rng):
    emulated_cuda.watched = True
    emulated_cuda.statistics()
    emulated_cuda.accesses()  # both count anew
    check(*drawn(PLACED[case], rng, dtype))
    found = [a for a in emulated_cuda.accesses() if a.kernel == "conv2d_weight_places"]
    shared = [a for a in found if a.memory == "shared"]
    assert {a.kind for a in shared} == {"read", "write", "copy"}
    assert all(a.pieces == a.least for a in shared)
    assert emulated_cuda.statistics()["bank_conflicts"] == 0


@pytest.mark.parametrize("case", ["few_channels", "pointwise", "groups", "large_stride"])
def test_what_has_no_places(case, emulated_cuda, rng):
    geometry, *_ = drawn(case, rng)
    ways = conv2d_weight.possible_ways(geometry, 4, launch.device_limits())
    assert conv2d_weight.PLACES not in ways


def test_the_fastest_way_serves(emulated_cuda, rng, monkeypatch):
    """All ways of a shape are timed, with the same result; where nothing is timed, a rule chooses."""
    timed = []
    monkeypatch.setattr(tuning, "_fastest", {})
    monkeypatch.setattr(
        tuning, "_seconds", lambda run, way: (run(way), timed.append(way), -len(timed))[2]
    )
    arguments = drawn("square", rng, BFLOAT16)
    check(*arguments)
    assert not timed
    monkeypatch.setattr(settings.cuda, "benchmark", True)
    check(*arguments)
    tiles = conv2d_weight.WINDOW_TILES[0], conv2d_weight.WARPGROUP_TILES[0]
    assert timed == [*conv2d_weight.GATHER_TILES, *tiles, conv2d_weight.PLACES]
    launch.forget_kernels()
    check(*arguments)
    assert is_only_places()
    launch.forget_kernels()
    monkeypatch.setattr(settings.general, "deterministic", True)
    check(*arguments)
    assert kinds() == {"warpgroup"}


RESNET18 = {
    "stem": (3, 64, 224, 7, 2, 3),
    "layer1": (64, 64, 56, 3, 1, 1),
    "layer2": (64, 128, 56, 3, 2, 1),
    "layer4": (512, 512, 7, 3, 1, 1),
    "pointwise": (128, 256, 28, 1, 2, 0),
}


@pytest.mark.parametrize("architecture", [80, 90, 100])
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("name", RESNET18)
def test_plans_of_a_network_fill_the_device(name, itemsize, architecture, emulated_cuda):
    inputs, outputs, size, kernel, stride, padding = RESNET18[name]
    emulated_cuda.device_limits = launch.Limits(architecture, 132, 227 << 10)
    geometry = conv2d_geometry(
        (256, inputs, size, size), (outputs, inputs, kernel, kernel), stride, padding
    )
    filled = conv2d_weight._filled(geometry, itemsize).geometry
    plan = conv2d_weight._plan(filled, itemsize, launch.device_limits())
    by_warpgroups = itemsize == 2 and architecture == 90
    way = "warpgroup" if by_warpgroups else "window"
    if name == "pointwise":
        way = "gather"
    assert plan.name.startswith(f"{way}_grad_weight")
    assert plan.shared_bytes <= 227 << 10
    assert 0.7 * 132 <= plan.blocks * plan.slices <= 2 * 132


# ---- on a GPU --------------------------------------------------------------------------------------

LARGE = {
    "stem": ((8, 3, 224, 224), (64, 3, 7, 7), 2, 3, 1, 1),
    "layer1": ((8, 64, 56, 56), (64, 64, 3, 3), 1, 1, 1, 1),
    "layer2": ((8, 64, 56, 56), (128, 64, 3, 3), 2, 1, 1, 1),
    "layer3": ((9, 256, 14, 14), (256, 256, 3, 3), 1, 1, 1, 1),
    "layer4": ((16, 512, 7, 7), (512, 512, 3, 3), 1, 1, 1, 1),
    "pointwise": ((8, 128, 28, 28), (256, 128, 1, 1), 2, 0, 1, 1),
    "groups": ((4, 128, 28, 28), (128, 32, 3, 3), 1, 1, 1, 4),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES | GATHERED | LARGE)
def test_sums_on_a_gpu(case, dtype, rng):
    arguments = drawn(LARGE.get(case, case), rng, dtype)
    got = check(*arguments, place=Place("cupy"))
    np.testing.assert_array_equal(check(*arguments, place=Place("cupy")), got)


@pytest.mark.gpu
@each_way(*DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_each_way_on_a_gpu(case, dtype, way, rng):
    if way == "warpgroup" and launch.device_limits().architecture != WARPGROUP_ARCHITECTURE:
        pytest.skip("only on sm_90a")
    check(*drawn(case, rng, dtype), place=Place("cupy"))


@pytest.mark.gpu
@by_places
@pytest.mark.parametrize("case", [*PLACED, "layer1", "layer2", "layer3", "layer4"])
def test_places_on_a_gpu(case, dtype, way, rng):
    if launch.device_limits().architecture != WARPGROUP_ARCHITECTURE:
        pytest.skip("only on sm_90a")
    arguments = drawn(PLACED.get(case) or LARGE[case], rng, dtype)
    got = check(*arguments, place=Place("cupy"))
    assert "places" in kinds()
    np.testing.assert_array_equal(check(*arguments, place=Place("cupy")), got)

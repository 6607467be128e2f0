"""Convolution: all three passes against plain loops, PyTorch, and one another."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels import settings
from gradengine.kernels.geometry import conv2d_geometry
from tests.kernels import references as reference
from tests.kernels.memory import MEMORIES, assert_close, laid_out

# x shape, weight shape, stride, padding, dilation, groups
CASES = {
    "odd_sizes": ((2, 3, 7, 5), (4, 3, 3, 3), 1, 0, 1, 1),
    "padding": ((2, 3, 5, 6), (5, 3, 3, 3), 1, 1, 1, 1),
    "stride_2": ((2, 3, 9, 8), (4, 3, 3, 3), 2, 1, 1, 1),
    "stride_skips_pixels": ((1, 2, 8, 7), (3, 2, 2, 1), 3, 0, 1, 1),
    "stem": ((1, 3, 13, 11), (4, 3, 7, 7), 2, 3, 1, 1),
    "pairs": ((2, 2, 9, 8), (3, 2, 3, 2), (2, 1), (0, 2), (1, 3), 1),
    "same_even_kernel": ((2, 3, 6, 5), (4, 3, 4, 2), 1, "same", 1, 1),
    "same_dilated": ((1, 2, 7, 6), (3, 2, 2, 3), 1, "same", (3, 2), 1),
    "valid": ((1, 2, 5, 5), (3, 2, 3, 3), 2, "valid", 1, 1),
    "pointwise": ((3, 6, 4, 5), (4, 6, 1, 1), 1, 0, 1, 1),
    "pointwise_groups": ((2, 6, 4, 3), (4, 3, 1, 1), 1, 0, 1, 2),
    "pointwise_stride": ((2, 4, 5, 6), (3, 4, 1, 1), 2, 0, 1, 1),
    "pointwise_padding": ((1, 2, 3, 3), (3, 2, 1, 1), 1, 1, 1, 1),
    "dilation": ((2, 2, 9, 9), (3, 2, 3, 3), 1, 2, 2, 1),
    "groups": ((2, 6, 5, 7), (9, 2, 3, 3), 2, 1, 1, 3),
    "small_groups": ((2, 24, 6, 5), (36, 2, 3, 3), 2, 1, 1, 12),
    "one_union": ((2, 6, 5, 6), (4, 3, 3, 3), 1, 1, 1, 2),
    "depthwise": ((2, 5, 6, 5), (5, 1, 3, 3), 1, 1, 1, 5),
    "depthwise_multiplier": ((1, 3, 5, 5), (6, 1, 3, 3), 2, 1, 1, 3),
    "kernel_is_input": ((2, 3, 4, 3), (2, 3, 4, 3), 1, 0, 1, 1),
    "one_of_each": ((1, 1, 1, 1), (1, 1, 1, 1), 1, 0, 1, 1),
    "empty_batch": ((0, 3, 5, 5), (4, 3, 3, 3), 1, 1, 1, 1),
    "empty_batch_pointwise": ((0, 3, 5, 5), (4, 3, 1, 1), 1, 0, 1, 1),
}


@pytest.fixture(autouse=True)
def exact_products(monkeypatch):
    """Let CUDA multiply float32 exactly, as the CPU does."""
    monkeypatch.setattr(settings.cuda, "conv_tf32", False)


def make(case, rng, dtype=np.float64):
    x_shape, weight_shape, *attributes = CASES[case]
    geometry = conv2d_geometry(x_shape, weight_shape, *attributes)
    x = rng.standard_normal(x_shape).astype(dtype)
    weight = rng.standard_normal(weight_shape).astype(dtype)
    grad = rng.standard_normal(geometry.output_shape).astype(dtype)
    return geometry, x, weight, grad


def attributes_of(geometry):
    return geometry.stride, geometry.padding, geometry.dilation, geometry.groups


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", CASES)
def test_three_passes_match_plain_loops(case, dtype, place, rng):
    geometry, x, weight, grad = make(case, rng, dtype)
    bias = rng.standard_normal(geometry.out_channels).astype(dtype)
    attributes = attributes_of(geometry)
    out = place("conv2d", x, weight, bias, geometry)
    assert_close(out, reference.conv2d(x, weight, bias, *attributes), dtype)
    by_x, by_weight = reference.conv2d_gradients(grad, x, weight, *attributes)
    assert_close(place("conv2d_grad_input", grad, weight, geometry), by_x, dtype)
    assert_close(place("conv2d_grad_weight", grad, x, geometry), by_weight, dtype)


@pytest.mark.parametrize("memory", MEMORIES)
@pytest.mark.parametrize("case", ["stride_2", "pointwise", "groups"])
def test_any_strides(case, memory, place, rng):
    geometry, x, weight, grad = make(case, rng)
    expected = (
        place("conv2d", x, weight, None, geometry),
        place("conv2d_grad_input", grad, weight, geometry),
        place("conv2d_grad_weight", grad, x, geometry),
    )
    x, weight, grad = (laid_out(array, memory) for array in (x, weight, grad))
    assert_close(place("conv2d", x, weight, None, geometry), expected[0], np.float64)
    assert_close(place("conv2d_grad_input", grad, weight, geometry), expected[1], np.float64)
    assert_close(place("conv2d_grad_weight", grad, x, geometry), expected[2], np.float64)


@pytest.mark.parametrize("case", CASES)
def test_the_passes_are_adjoint(case, place, rng):
    geometry, x, weight, grad = make(case, rng)
    forward = np.vdot(place("conv2d", x, weight, None, geometry), grad)
    by_x = np.vdot(x, place("conv2d_grad_input", grad, weight, geometry))
    by_weight = np.vdot(weight, place("conv2d_grad_weight", grad, x, geometry))
    np.testing.assert_allclose([by_x, by_weight], forward, rtol=1e-10, atol=1e-10)


def test_padding_is_zero_beside_infinite_pixels(place):
    x = np.full((1, 1, 3, 3), np.inf)
    geometry = conv2d_geometry(x.shape, (1, 1, 3, 3), padding=1)
    assert np.isposinf(place("conv2d", x, np.ones((1, 1, 3, 3)), None, geometry)).all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_groups_do_not_see_what_is_not_finite_in_others(value, place, rng):
    geometry, x, weight, grad = make("small_groups", rng)
    found = {}
    for name in ("finite", "not"):
        packed = kernels.pack_conv2d(place.give(weight), geometry)
        found[name] = [
            place("conv2d", x, weight, None, geometry),
            place("conv2d", x, packed, None, geometry),
            place("conv2d_grad_input", grad, weight, geometry),
            place("conv2d_grad_weight", grad, x, geometry),
        ]
        x[0, 5, 2, 2] = grad[0, 8, 1, 1] = value  # of the third group
    ours = [slice(6, 9), slice(6, 9), slice(4, 6), slice(6, 9)]
    for finite, other, own in zip(found["finite"], found["not"], ours, strict=True):
        axis = 0 if finite.shape == weight.shape else 1
        assert not np.isfinite(np.moveaxis(other, axis, 0)[own]).all()
        rest = [np.delete(np.moveaxis(part, axis, 0), own, axis=0) for part in (finite, other)]
        assert_close(rest[1], rest[0], np.float64)


def test_inputs_are_left_alone(place, rng):
    geometry, x, weight, grad = make("padding", rng)
    x, weight, grad = (laid_out(array, "read_only") for array in (x, weight, grad))
    copies = [array.copy() for array in (x, weight, grad)]
    out = place("conv2d", x, weight, None, geometry)
    out[...] = 0  # the result is the caller's, whatever the inputs were
    place("conv2d_grad_input", grad, weight, geometry)
    place("conv2d_grad_weight", grad, x, geometry)
    for array, copied in zip((x, weight, grad), copies, strict=True):
        np.testing.assert_array_equal(array, copied)


@pytest.mark.parametrize("wrong", ["x", "weight", "bias", "grad"])
def test_arrays_that_do_not_fit_the_geometry_are_refused(wrong):
    geometry = conv2d_geometry((2, 3, 5, 5), (4, 3, 3, 3))
    arrays = {
        "x": np.zeros(geometry.input_shape),
        "weight": np.zeros(geometry.weight_shape),
        "bias": np.zeros(4),
        "grad": np.zeros(geometry.output_shape),
    }
    arrays[wrong] = arrays[wrong][1:]
    x, weight, bias, grad = arrays.values()
    match = (
        rf": {wrong} must have the shape that fits \({wrong}\.shape == .*\); got {wrong}\.shape="
    )
    if wrong != "grad":
        with pytest.raises(ValueError, match="conv2d" + match):
            kernels.conv2d(x, weight, bias, geometry)
    if wrong in ("grad", "weight"):
        with pytest.raises(ValueError, match="conv2d_grad_input" + match):
            kernels.conv2d_grad_input(grad, weight, geometry)
    if wrong in ("grad", "x"):
        with pytest.raises(ValueError, match="conv2d_grad_weight" + match):
            kernels.conv2d_grad_weight(grad, x, geometry)


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [(np.float32, np.float64), (np.float16, np.float16), (np.int64, np.int64), (">f4", ">f4")],
)
def test_other_dtypes_are_refused(x_dtype, weight_dtype):
    geometry = conv2d_geometry((1, 1, 3, 3), (1, 1, 1, 1))
    x, weight = np.zeros((1, 1, 3, 3), x_dtype), np.zeros((1, 1, 1, 1), weight_dtype)
    match = r"conv2d: arrays must be of one dtype \(float32 or float64 on cpu\); got x.dtype="
    with pytest.raises(TypeError, match=match):
        kernels.conv2d(x, weight, None, geometry)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_three_passes_match_pytorch(case, place, rng):
    torch = pytest.importorskip("torch")
    geometry, x, weight, grad = make(case, rng)
    torch_x = torch.tensor(x, requires_grad=True)
    torch_weight = torch.tensor(weight, requires_grad=True)
    _, _, stride, padding, dilation, groups = CASES[case]
    out = torch.nn.functional.conv2d(torch_x, torch_weight, None, stride, padding, dilation, groups)
    out.backward(torch.tensor(grad))
    assert_close(place("conv2d", x, weight, None, geometry), out.detach().numpy(), np.float64)
    by_x = place("conv2d_grad_input", grad, weight, geometry)
    assert_close(by_x, torch_x.grad.numpy(), np.float64)
    by_weight = place("conv2d_grad_weight", grad, x, geometry)
    assert_close(by_weight, torch_weight.grad.numpy(), np.float64)

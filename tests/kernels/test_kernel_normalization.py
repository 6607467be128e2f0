"""Batch normalization against plain loops, finite differences and PyTorch."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu import normalization, normalized_pool
from gradengine.kernels.geometry import pool2d_geometry
from tests.kernels import references as reference
from tests.kernels.memory import MEMORIES, assert_close, laid_out

SHAPES = [(3, 5, 4, 7), (2, 1, 3, 3), (1, 4, 5, 2), (70, 3, 2, 3), (2, 3, 1, 1)]
EPS = 1e-5


def make(shape, rng, dtype=np.float64):
    means, weight, bias = rng.standard_normal((3, shape[1]))
    x = rng.standard_normal(shape) * 2 + means[:, None, None]
    return x.astype(dtype), weight.astype(dtype), bias.astype(dtype)


def normalize(place, x, weight, bias):
    """Give batch norm alone: (out, mean, inv_std)."""
    return place("batch_norm_act", x, weight, bias, None, False, EPS)[:3]


def expected_results(x, weight, bias):
    out, mean, variance = reference.batch_norm(x, weight, bias, EPS)
    return out, mean, 1 / np.sqrt(variance + EPS)


def variance_of(inv_std):
    return 1 / np.square(inv_std, dtype=np.float64) - EPS


def normalize_grad(place, grad, x, weight, mean, inv_std):
    """Give its gradients by x, weight and bias."""
    arguments = (grad, x, None, None, weight, mean, inv_std, False, False)
    return place("batch_norm_act_grad", *arguments)[:3]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_matches_plain_loops(shape, dtype, affine, place, rng):
    x, weight, bias = make(shape, rng, dtype)
    if not affine:
        weight = bias = None
    results = normalize(place, x, weight, bias)
    for result, expected in zip(results, expected_results(x, weight, bias), strict=True):
        assert_close(result, expected, dtype)


def test_weight_and_bias_come_alone_as_well(place, rng):
    x, weight, bias = make(SHAPES[0], rng)
    for pair in ((weight, None), (None, bias)):
        out, _, _ = normalize(place, x, *pair)
        assert_close(out, reference.batch_norm(x, *pair, EPS)[0], np.float64)


@pytest.mark.parametrize("mean", [1e3, -1e5])
def test_variance_survives_a_mean_far_from_zero(mean, place, rng):
    x = (rng.standard_normal((4, 3, 16, 16)) + mean).astype(np.float32)
    out, got_mean, got_inv_std = normalize(place, x, None, None)
    expected, expected_mean, expected_variance = reference.batch_norm(x, None, None, EPS)
    np.testing.assert_allclose(got_mean, expected_mean, rtol=1e-7)
    np.testing.assert_allclose(variance_of(got_inv_std), expected_variance, rtol=1e-4)
    # the returned mean's own rounding moves out by half a unit of mean's last place
    np.testing.assert_allclose(out, expected, atol=1e-4 + 6e-8 * abs(mean))


def test_a_far_first_pixel_does_not_spoil_the_variance(place, rng):
    x = rng.standard_normal((4, 2, 8, 8))
    x[0, :, 0, 0] = 1e8
    _, _, inv_std = normalize(place, x, None, None)
    np.testing.assert_allclose(inv_std, expected_results(x, None, None)[2], rtol=1e-10)


def test_constant_channels_have_no_variance(place):
    x = np.full((2, 3, 4, 4), 0.1, np.float32)
    out, _, inv_std = normalize(place, x, None, None)
    np.testing.assert_allclose(inv_std, 1 / np.sqrt(EPS), rtol=1e-6)
    np.testing.assert_array_equal(out, 0)


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2]])
def test_gradients_match_finite_differences(shape, place, rng):
    x, weight, bias = make(shape, rng)
    grad = rng.standard_normal(shape)
    _, mean, inv_std = expected_results(x, weight, bias)
    gradients = normalize_grad(place, grad, x, weight, mean, inv_std)
    arguments = [x, weight, bias]
    for position, gradient in enumerate(gradients):
        direction = rng.standard_normal(gradient.shape)
        sides = []
        for step in (1e-5, -1e-5):
            moved = list(arguments)
            moved[position] = moved[position] + step * direction
            out, _, _ = reference.batch_norm(moved[0], moved[1], moved[2], EPS)
            sides.append(np.vdot(out, grad))
        slope = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(np.vdot(gradient, direction), slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("memory", MEMORIES)
def test_any_strides(memory, place, rng):
    x, weight, bias = make(SHAPES[0], rng)
    grad = rng.standard_normal(x.shape)
    vectors = [weight, bias]
    expected = normalize(place, x, *vectors)
    expected_gradients = normalize_grad(place, grad, x, weight, *expected[1:])
    expected_scaled = place("scale_shift", x, *vectors, None, False)
    moved, moved_grad = laid_out(x, memory), laid_out(grad, memory)
    strided = [np.repeat(vector, 2)[::2] for vector in vectors]
    results = [
        (normalize(place, moved, *strided), expected),
        (
            normalize_grad(place, moved_grad, moved, strided[0], *expected[1:]),
            expected_gradients,
        ),
        ((place("scale_shift", moved, *strided, None, False),), (expected_scaled,)),
    ]
    for got, wanted in results:
        for one, other in zip(got, wanted, strict=True):
            assert_close(one, other, np.float64)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale_shift(dtype, place, rng):
    x, scale, shift = make(SHAPES[0], rng, dtype)
    expected = x.astype(np.float64) * scale[:, None, None] + shift[:, None, None]
    assert_close(place("scale_shift", x, scale, shift, None, False), expected, dtype)


def test_empty_batch(place):
    x, vector = np.zeros((0, 3, 2, 2)), np.ones(3)
    out, mean, inv_std = normalize(place, x, vector, vector)
    assert out.shape == x.shape
    np.testing.assert_array_equal(mean, 0)
    np.testing.assert_allclose(inv_std, 1 / np.sqrt(EPS))
    by_x, by_weight, by_bias = normalize_grad(place, x, x, vector, mean, vector)
    assert by_x.shape == x.shape
    np.testing.assert_array_equal([by_weight, by_bias], 0)
    assert place("scale_shift", x, vector, vector, None, False).shape == x.shape


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_special_values_stay_in_their_channel(value):
    x = np.arange(24.0).reshape(2, 3, 2, 2)
    x[1, 1, 0, 0] = value
    out, _, inv_std, _ = kernels.batch_norm_act(x, None, None, None, False, EPS)
    assert np.isnan(inv_std[1])
    assert np.isnan(out[:, 1]).any()
    assert np.isfinite(out[:, [0, 2]]).all()


def test_arrays_that_do_not_fit_are_refused():
    x, vector, long = np.zeros((2, 3, 2, 2)), np.ones(3), np.ones(4)
    with pytest.raises(ValueError, match=r"batch_norm_act: x must have .*; got x\.shape=\(3,\)"):
        kernels.batch_norm_act(vector, None, None, None, False, EPS)
    with pytest.raises(ValueError, match=r"batch_norm_act: bias must .*; got bias\.shape=\(4,\)"):
        kernels.batch_norm_act(x, vector, long, None, False, EPS)
    with pytest.raises(
        ValueError, match=r"batch_norm_act_grad: grad must .* got grad\.shape=\(2, 3, 2\)"
    ):
        kernels.batch_norm_act_grad(
            x[..., 0], x, None, None, *(vector, vector, vector), False, False
        )
    with pytest.raises(
        ValueError, match=r"batch_norm_act_grad: mean must .*; got mean\.shape=\(4,\)"
    ):
        kernels.batch_norm_act_grad(x, x, None, None, vector, long, vector, False, False)
    with pytest.raises(ValueError, match=r"scale_shift: shift must .*; got shift\.shape=\(4,\)"):
        kernels.scale_shift(x, vector, long)
    with pytest.raises(
        TypeError, match=r"batch_norm_act: .*; got x.dtype=float64, weight.dtype=float32"
    ):
        kernels.batch_norm_act(x, vector.astype(np.float32), None, None, False, EPS)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_both_passes_match_pytorch(shape, affine, place, rng):
    torch = pytest.importorskip("torch")
    x, weight, bias = make(shape, rng)
    if not affine:
        weight = bias = None
    grad = rng.standard_normal(shape)
    tensors = [
        None if array is None else torch.tensor(array, requires_grad=True)
        for array in (x, weight, bias)
    ]
    expected = torch.nn.functional.batch_norm(
        tensors[0], None, None, *tensors[1:], training=True, eps=EPS
    )
    expected.backward(torch.tensor(grad))
    out, mean, inv_std = normalize(place, x, weight, bias)
    assert_close(out, expected.detach().numpy(), np.float64)
    gradients = normalize_grad(place, grad, x, weight, mean, inv_std)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        if tensor is not None:
            np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-9, atol=1e-9)


def fused_reference(x, weight, bias, residual, relu):
    out, mean, variance = reference.batch_norm(x, weight, bias, EPS)
    out = out if residual is None else out + residual
    return np.maximum(out, 0) if relu else out, mean, 1 / np.sqrt(variance + EPS), variance


# Channels around and beside the vector widths, more pixels than one block of a sum has, and few.
FUSED_SHAPES = [(2, 1, 3, 5), (2, 3, 40, 41), (3, 17, 9, 2), (1, 64, 12, 12), (2, 260, 3, 1)]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", FUSED_SHAPES)
def test_residual_and_relu_join_the_pass(shape, dtype, added, relu, place, rng):
    x, weight, bias = make(shape, rng, dtype)
    residual = rng.standard_normal(shape).astype(dtype) if added else None
    *expected, variance = fused_reference(x, weight, bias, residual, relu)
    for moments in (None, (expected[1], variance)):
        results = place("batch_norm_act", x, weight, bias, residual, relu, EPS, moments)[:3]
        for result, wanted in zip(results, expected, strict=True):
            assert_close(result, wanted, dtype)
    scaled = x * weight[:, None, None].astype(np.float64) + bias[:, None, None]
    scaled = scaled if residual is None else scaled + residual
    out = place("scale_shift", x, weight, bias, residual, relu)
    assert_close(out, np.maximum(scaled, 0) if relu else scaled, dtype)


@pytest.mark.parametrize("wants_residual", [True, False])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", FUSED_SHAPES)
def test_fused_gradients_are_those_of_batch_norm_behind_relu(
    shape, dtype, relu, wants_residual, place, rng
):
    x, weight, bias = make(shape, rng, dtype)
    grad, residual = rng.standard_normal((2, *shape)).astype(dtype)
    out, mean, inv_std, _ = fused_reference(x, weight, bias, residual, relu)
    behind_relu = np.where(out == 0, 0, grad)
    normal = (x - mean[:, None, None]) * inv_std[:, None, None]
    axes = (0, 2, 3)
    along = (behind_relu * normal).mean(axes, keepdims=True)
    by_x = (behind_relu - behind_relu.mean(axes, keepdims=True) - normal * along) * (
        weight * inv_std
    ).reshape(-1, 1, 1)
    results = place("batch_norm_act", x, weight, bias, residual, relu, EPS)
    kept = (results[0], results[3], weight, *results[1:3])
    gradients = place("batch_norm_act_grad", grad, x, *kept, relu, wants_residual)
    wanted = (by_x, (behind_relu * normal).sum(axes), behind_relu.sum(axes))
    for gradient, expected in zip(gradients[:3], wanted, strict=True):
        assert_close(gradient, expected, dtype)
    if wants_residual:
        np.testing.assert_array_equal(gradients[3], behind_relu)
    else:
        assert gradients[3] is None


def test_sums_of_many_pixels_keep_float32s_digits(rng):
    x = (rng.standard_normal((4, 2, 300, 300)) + 30).astype(np.float32)
    _, mean, inv_std, _ = kernels.batch_norm_act(x, None, None, None, False, EPS)
    exact = x.astype(np.float64)
    np.testing.assert_allclose(mean, exact.mean(axis=(0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(variance_of(inv_std), exact.var(axis=(0, 2, 3)), rtol=1e-6)
    ones = np.ones(2, np.float32)
    grad = np.full_like(x, 0.1)
    arguments = (grad, x, None, None, ones, mean, ones, False, False)
    _, _, total, _ = kernels.batch_norm_act_grad(*arguments)
    np.testing.assert_allclose(total, np.float64(np.float32(0.1)) * 360000, rtol=1e-6)


def test_nan_passes_the_fused_relu():
    x = np.zeros((2, 3, 2, 2), np.float32)
    x[1, 1, 0, 0] = np.nan
    ones = np.ones(3, np.float32)
    out = kernels.scale_shift(x, ones, ones, None, True)
    np.testing.assert_array_equal(out, x + 1)
    residual = np.where(np.isnan(x), 0, -np.inf).astype(np.float32)
    out = kernels.scale_shift(x, ones, ones, residual, True)
    np.testing.assert_array_equal(out, np.where(np.isnan(x), x, 0))


def test_a_residual_that_does_not_fit_is_refused():
    x, ones = np.zeros((2, 3, 2, 2)), np.ones(3)
    with pytest.raises(ValueError, match=r"batch_norm_act: residual must .* got residual\.shape"):
        kernels.batch_norm_act(x, ones, ones, x[:1], False, EPS)
    with pytest.raises(ValueError, match=r"scale_shift: residual must .* got residual\.shape"):
        kernels.scale_shift(x, ones, ones, x[:1])
    with pytest.raises(TypeError, match=r"scale_shift: .*residual\.dtype=float32"):
        kernels.scale_shift(x, ones, ones, x.astype(np.float32))
    with pytest.raises(ValueError, match=r"batch_norm_act_grad: out must .* got out\.shape"):
        kernels.batch_norm_act_grad(x, x, x[:1], None, ones, ones, ones, True, False)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("known", [True, False])
def test_running_statistics_move_in_place(known, dtype, place, rng):
    x, weight, bias = make(SHAPES[0], rng, dtype)
    mean, variance = reference.batch_norm(x, None, None, EPS)[1:]
    moments = (mean, variance) if known else None
    running = [place.give(np.full(5, value, dtype)) for value in (0.5, 2)]
    place("batch_norm_act", x, weight, bias, None, False, EPS, moments, *running, 0.3)
    assert_close(place.take(running[0]), 0.7 * 0.5 + 0.3 * mean, dtype)
    assert_close(place.take(running[1]), 0.7 * 2 + 0.3 * variance * (84 / 83), dtype)


def test_an_empty_batch_leaves_running_statistics_alone(place):
    x, ones = np.zeros((0, 3, 2, 2)), np.ones(3)
    for moments in (None, (np.zeros(3), np.zeros(3))):
        running = [place.give(np.full(3, value)) for value in (0.5, 2.0)]
        place("batch_norm_act", x, ones, ones, None, True, EPS, moments, *running, 0.3)
        np.testing.assert_array_equal(place.take(running[0]), 0.5)
        np.testing.assert_array_equal(place.take(running[1]), 2)


@pytest.mark.parametrize("shape", [(3, 5, 7, 6), (2, 64, 17, 16)])
def test_shared_among_workers_in_any_way_gives_equal_bits(shape, rng, monkeypatch):
    x, grad = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    weight, bias, mean, var = rng.random((4, shape[1])).astype(np.float32)
    pool = pool2d_geometry("pool", shape, 3, 2, 1)
    bits = set()
    for count in (1, 2, 7):  # some one after the other, whatever threads there are
        for module in (normalization, normalized_pool):
            monkeypatch.setattr(module, "get_num_threads", lambda count=count: count)
        running = mean.copy(), var.copy()
        found = kernels.batch_norm_act(x, weight, bias, None, True, 1e-5, None, *running, 0.1)
        out, center, inv_std, _ = found
        grads = kernels.batch_norm_act_grad(
            grad, x, out, None, weight, center, inv_std, relu=True, wants_residual=True
        )
        made = kernels.batch_norm_relu_max_pool(x, weight, bias, 1e-5, pool)
        pooled, center, inv_std, winners, _ = made
        pool_grads = kernels.batch_norm_relu_max_pool_grad(
            pooled, x, pooled, winners, None, weight, bias, center, inv_std, pool
        )
        results = (*found[:3], *running, *grads, pooled, *pool_grads)
        bits.add(b"".join(result.tobytes() for result in results))
    assert len(bits) == 1

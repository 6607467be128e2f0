"""Normalization beside the table: running statistics, what is kept, labels, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.ops.normalization import batch_norm, layer_norm


def tensor(*shape: int, requires_grad: bool = False, dtype: Any = np.float32) -> Any:
    array = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return ge.tensor(array, device="cpu", requires_grad=requires_grad)


def kept_values(node):
    """Return the distinct arrays and tensors that the node's edges keep."""
    values = [value for edge in node.edges if edge is not None for value in edge[2]]
    return list({id(value): value for value in values if hasattr(value, "shape")}.values())


def test_running_statistics_move_in_place():
    x = tensor(5, 3, 2, 2, dtype=np.float64)
    mean, var = ge.tensor(np.zeros(3), device="cpu"), ge.tensor(np.ones(3), device="cpu")
    arrays = mean.array, var.array
    batch_norm(x, mean, var, training=True, momentum=0.3)
    pixels = x.numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    np.testing.assert_allclose(mean.numpy(), 0.3 * pixels.mean(1))
    np.testing.assert_allclose(var.numpy(), 0.7 + 0.3 * pixels.var(1, ddof=1))
    assert (mean.array, var.array) == arrays or all(
        new is old for new, old in zip((mean.array, var.array), arrays, strict=True)
    )


def test_moving_statistics_is_noticed_by_who_saved_them():
    mean, var = tensor(3), ge.tensor(np.ones(3, np.float32), device="cpu")
    x = tensor(3, requires_grad=True)
    product = (x * mean).sum()
    batch_norm(tensor(4, 3), mean, var, training=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_statistics_move_without_gradients_too():
    mean, var = tensor(3), ge.tensor(np.ones(3, np.float32), device="cpu")
    before = mean.numpy().copy()
    with ge.no_grad():
        batch_norm(tensor(4, 3), mean, var, training=True)
    assert (mean.numpy() != before).all()


def test_evaluation_leaves_statistics_alone_and_survives_their_move():
    mean, var = tensor(3), ge.tensor(np.ones(3, np.float32), device="cpu")
    weight = tensor(3, requires_grad=True)
    x = tensor(4, 3)
    expected = ((x.numpy() - mean.numpy()) / np.sqrt(1 + 1e-5)).sum(0)
    out = batch_norm(x, mean, var, weight)
    batch_norm(tensor(4, 3), mean, var, training=True)
    out.sum().backward()
    np.testing.assert_allclose(weight.grad.numpy(), expected, rtol=1e-5)


def test_training_keeps_the_input_and_two_vectors():
    x, weight, bias = (tensor(*s, requires_grad=True) for s in ((2, 3, 4, 4), (3,), (3,)))
    node = batch_norm(x, None, None, weight, bias, training=True).grad_fn
    assert node.name() == "NativeBatchNormBackward0"
    assert sorted(value.shape for value in kept_values(node)) == [(2, 3, 4, 4), (3,), (3,), (3,)]


def test_frozen_parameters_keep_nothing_in_evaluation():
    x, weight, bias = tensor(2, 3, 4, 4, requires_grad=True), tensor(3), tensor(3)
    statistics = tensor(3), ge.tensor(np.ones(3, np.float32), device="cpu")
    node = batch_norm(x, *statistics, weight, bias).grad_fn
    assert node.name() == "NativeBatchNormBackward0"
    assert not any(value is x for value in kept_values(node))
    x.requires_grad_(False)
    assert batch_norm(x, *statistics, weight, bias).grad_fn is None
    assert batch_norm(x, None, None, weight, bias, training=True).grad_fn is None


def test_one_value_per_channel_is_refused_in_training():
    message = r"batch_norm: Expected more than 1 value per channel .* got input size \(1, 3, 1, 1\)"
    with pytest.raises(ValueError, match=message):
        batch_norm(tensor(1, 3, 1, 1), None, None, training=True)


def test_empty_batch_leaves_statistics_alone():
    mean, var = tensor(3), tensor(3)
    before = mean.numpy().copy()
    assert batch_norm(tensor(0, 3, 2, 2), mean, var, training=True).shape == (0, 3, 2, 2)
    np.testing.assert_array_equal(mean.numpy(), before)


def test_batch_norm_checks_its_arguments():
    ones = np.ones(3, np.float32)
    with pytest.raises(ValueError, match=r"batch_norm: x must have channels .*got x\.shape=\(3,\)"):
        batch_norm(ones, ones, ones)
    with pytest.raises(ValueError, match="batch_norm: running_mean must be given unless training"):
        batch_norm(np.ones((2, 3), np.float32), None, ones)
    with pytest.raises(
        ValueError, match=r"batch_norm: running_var must .*running_var\.shape=\(1,\)"
    ):
        batch_norm(np.ones((2, 3), np.float32), ones, ones[:1])
    with pytest.raises(ValueError, match=r"weight\.shape=\(2,\)"):
        batch_norm(np.ones((2, 3), np.float32), ones, ones, ones[:2], training=True)
    with pytest.raises(TypeError, match="running_mean must have x.s dtype"):
        batch_norm(np.ones((2, 3)), ones, ones)


def test_results_are_channels_last():
    x = tensor(2, 3, 4, 5, requires_grad=True)
    out = batch_norm(x, None, None, training=True)
    out.backward(tensor(2, 3, 4, 5))
    assert out.array.transpose(0, 2, 3, 1).flags.c_contiguous
    assert x.grad.array.transpose(0, 2, 3, 1).flags.c_contiguous


def test_a_large_mean_costs_no_precision():
    values = np.random.default_rng(0).standard_normal((64, 1, 8, 8))
    out = batch_norm((values + 1000).astype(np.float32), None, None, training=True)
    exact = (values + 1000).astype(np.float32).astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-3)


def test_layer_norm_keeps_the_input_and_small_vectors():
    x = tensor(4, 5, requires_grad=True)
    node = layer_norm(x, 5).grad_fn
    assert node.name() == "NativeLayerNormBackward0"
    assert sorted(value.shape for value in kept_values(node)) == [(4, 1), (4, 1), (4, 5)]


@pytest.mark.parametrize(
    ("shape", "normalized", "weight"),
    [((2, 3), (2,), None), ((2, 3), (), None), ((2, 3), (3,), (2,)), ((2, 3), (3,), (1, 3))],
)
def test_layer_norm_checks_shapes(shape, normalized, weight):
    with pytest.raises(ValueError, match=r"layer_norm: x must end with normalized_shape.*got x"):
        layer_norm(tensor(*shape), normalized, weight and tensor(*weight))


def test_layer_norm_checks_dtypes():
    with pytest.raises(TypeError, match=r"layer_norm: .*weight\.dtype=float64"):
        layer_norm(np.ones((2, 3), np.float32), 3, np.ones(3))
    with pytest.raises(TypeError, match=r"layer_norm: .*x\.dtype=int64"):
        layer_norm(np.ones((2, 3), np.int64), 3)


@pytest.mark.gpu
def test_running_statistics_must_be_on_the_inputs_device():
    with pytest.raises(TypeError, match=r"batch_norm: .*one device"):
        batch_norm(tensor(4, 3).cuda(), tensor(3), tensor(3), training=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
def test_each_vector_must_fit_the_input(name: str, training: bool):
    names = ("running_mean", "running_var", "weight", "bias")
    vectors: dict[str, Any] = {vector: ge.ones(3) for vector in names}
    wrong: dict[str, Any] = vectors | {name: ge.ones(2)}
    other: dict[str, Any] = vectors | {name: ge.ones(3, dtype=ge.float64)}
    x = ge.randn(4, 3)
    with pytest.raises(ValueError, match=f"{name} must have one element for each channel"):
        batch_norm(x, training=training, **wrong)
    with pytest.raises(TypeError, match=f"{name} must have x's dtype"):
        batch_norm(x, training=training, **other)

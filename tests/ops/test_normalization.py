"""Normalization beside the table: running statistics, what is kept, labels, messages."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels
from gradengine.kernels.geometry import pool2d_geometry
from gradengine.ops.normalization import batch_norm, batch_norm_act, layer_norm
from gradengine.tape import SavedOutput


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


@pytest.mark.parametrize("vectors", ["both", "weight", "bias", "neither"])
@pytest.mark.parametrize("shape", [(4,), (3, 4)])
def test_layer_norm_of_few_and_of_many_rows_agree(shape, vectors, monkeypatch):
    x = tensor(5, 2, 3, 4, requires_grad=True, dtype=np.float64)
    weight = tensor(*shape, requires_grad=True, dtype=np.float64)
    bias = tensor(*shape, requires_grad=True, dtype=np.float64)
    given = {"both": (weight, bias), "weight": (weight, None), "bias": (None, bias)}
    inputs = given.get(vectors, (None, None))
    leaves = [x, *(vector for vector in inputs if vector is not None)]
    grad = tensor(*x.shape, dtype=np.float64) ** 3

    def results():
        out = layer_norm(x, shape, *inputs)
        plain = ge.autograd.grad(out, leaves, grad, retain_graph=True)
        recorded = ge.autograd.grad(out, leaves, grad, create_graph=True)
        second = ge.autograd.grad(sum((each**2).sum() for each in recorded), x)
        return [array.detach().numpy() for array in (out, *plain, *recorded, *second)]

    expected = results()
    monkeypatch.setattr(kernels, "ROW_SIZE", 1)
    for got, same in zip(results(), expected, strict=True):
        np.testing.assert_allclose(got, same, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_layer_norm_of_many_rows_with_a_frozen_input(frozen, monkeypatch):
    monkeypatch.setattr(kernels, "ROW_SIZE", 1)
    names = {"x": (6, 5), "weight": (5,), "bias": (5,)}
    full = {name: tensor(*shape, requires_grad=True) for name, shape in names.items()}
    some = {name: tensor(*shape, requires_grad=name != frozen) for name, shape in names.items()}
    for leaves in (full, some):
        out = layer_norm(leaves["x"], 5, leaves["weight"], leaves["bias"])
        out.backward(tensor(6, 5))
    for name, leaf in some.items():
        if name == frozen:
            assert leaf.grad is None
        else:
            np.testing.assert_array_equal(leaf.grad.numpy(), full[name].grad.numpy())


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


def in_three_steps(x, mean, var, weight, bias, residual, relu, **options):
    out = batch_norm(x, mean, var, weight, bias, **options)
    out = out if residual is None else out + residual
    return ge.relu(out) if relu else out


def fused_inputs(added: bool, shape: tuple[int, ...] = (4, 3, 5, 2)) -> list[Any]:
    rng = np.random.default_rng(3)
    arrays = [rng.standard_normal(s) for s in (shape, (3,), (3,), shape)]
    tensors = [ge.tensor(array, device="cpu", requires_grad=True) for array in arrays]
    return tensors if added else [*tensors[:3], None]


def first_and_second_derivatives(out, inputs):
    inputs = [x for x in inputs if x is not None]
    seed = ge.tensor(np.random.default_rng(1).standard_normal(out.shape), requires_grad=True)
    (plain, recorded) = (
        ge.autograd.grad(out, inputs, seed, retain_graph=True, create_graph=create_graph)
        for create_graph in (False, True)
    )
    total = ge.sum(ge.stack([(g * g * g).sum() for g in recorded]))
    second = ge.autograd.grad(total, [*inputs, seed], allow_unused=True, materialize_grads=True)
    return [tensor.numpy() for tensor in (*plain, *(g.detach() for g in recorded), *second)]


@pytest.mark.parametrize("shape", [(4, 3, 5, 2), (6, 3)])
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("added", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_one_pass_gives_what_three_steps_give(training, added, relu, shape):
    x, weight, bias, residual = fused_inputs(added, shape)
    found, statistics = [], []
    for function in (in_three_steps, batch_norm_act):
        mean, var = (ge.tensor(np.full(3, value), device="cpu") for value in (0.2, 1.5))
        out = function(x, mean, var, weight, bias, residual, relu, training=training, momentum=0.3)
        found.append(
            [out.detach().numpy(), *first_and_second_derivatives(out, (x, weight, bias, residual))]
        )
        statistics.append([mean.numpy(), var.numpy()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(*statistics, rtol=1e-12)


def test_moments_that_are_given_are_not_computed():
    x, weight, bias, residual = fused_inputs(True)
    array = x.detach().numpy()
    moments = array.mean(axis=(0, 2, 3)), array.var(axis=(0, 2, 3))
    options: dict[str, Any] = {"training": True, "relu": True}
    expected = batch_norm_act(x, None, None, weight, bias, residual, **options)
    out = batch_norm_act(x, None, None, weight, bias, residual, moments=moments, **options)
    np.testing.assert_allclose(out.detach().numpy(), expected.detach().numpy(), atol=1e-12)
    grads, wanted = (first_and_second_derivatives(o, (x, weight)) for o in (out, expected))
    for one, other in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)
    moved = batch_norm_act(x, None, None, training=True, moments=(moments[0] + 1, moments[1]))
    scale = 1 / np.sqrt(moments[1] + 1e-5)
    shift = batch_norm(x, None, None, training=True) - moved
    np.testing.assert_allclose(shift.detach().numpy()[0, :, 0, 0], scale)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_the_result_is_kept_only_for_relu(relu, training):
    x, weight, bias, residual = fused_inputs(True)
    running = ge.zeros(3, dtype=ge.float64), ge.ones(3, dtype=ge.float64)
    out = batch_norm_act(x, *running, weight, bias, residual, relu=relu, training=training)
    kept = [value for edge in out.grad_fn.edges for value in edge[2]]
    assert any(value is x for value in kept)
    assert not any(value is residual for value in kept)
    assert any(isinstance(value, SavedOutput) for value in kept) == relu
    names = {True: "BatchNormReluBackward0", False: "NativeBatchNormBackward0"}
    assert out.grad_fn.name() == names[relu]


def test_a_frozen_layer_in_evaluation_keeps_the_result_alone():
    x, _, _, residual = fused_inputs(True)
    running = ge.zeros(3, dtype=ge.float64), ge.ones(3, dtype=ge.float64)
    out = batch_norm_act(x, *running, residual=residual, relu=True)
    assert not any(value is x for value in kept_values(out.grad_fn))


def test_writing_to_a_result_that_relu_kept_is_noticed():
    x, weight, bias, residual = fused_inputs(True)
    out = batch_norm_act(x, None, None, weight, bias, residual, relu=True, training=True)
    loss = out.sum()
    with ge.no_grad():
        out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_residual_must_be_like_the_input():
    x = tensor(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"batch_norm_act: residual must have .*shape=\(2, 3, 4\)"):
        batch_norm_act(x, None, None, residual=tensor(2, 3, 4), training=True)
    with pytest.raises(ValueError, match=r"residual must have .*residual\.dtype=float64"):
        batch_norm_act(x, None, None, residual=tensor(2, 3, 4, 4, dtype=np.float64), training=True)


# ---- 16-bit images and float32 vectors, on CUDA --------------------------------------------------

STEM_POOL = pool2d_geometry("max_pool2d", (3, 8, 6, 5), 3, 2, 1)


def mixed_gradients(dtype, vector_dtype, create_graph, residual=None, **options):
    """Return result, gradients by x, weight, bias and residual, and statistics, of one call."""
    rng = np.random.default_rng(3)
    arrays = [(rng.standard_normal(s) + 0.5).astype("float16") for s in ((3, 8, 6, 5), (8,), (8,))]
    kinds = (dtype, vector_dtype, vector_dtype)
    pairs = zip(arrays, kinds, strict=True)
    x, weight, bias = (ge.tensor(a, dtype=kind).requires_grad_() for a, kind in pairs)
    added = x.detach().requires_grad_() if residual else None
    mean, var = (ge.tensor(np.full(8, value), dtype=vector_dtype) for value in (0.25, 1.5))
    inputs = [x, weight, bias] + ([added] if residual else [])
    out = batch_norm_act(x, mean, var, weight, bias, added, **options)
    seed = ge.tensor(np.cos(np.arange(out.numel())).reshape(out.shape), dtype=out.dtype)
    grads = ge.autograd.grad(out, inputs, seed, create_graph=create_graph)
    for grad, given in zip(grads, inputs, strict=True):
        assert grad.dtype == given.dtype
    found = (out, *grads, mean, var)
    return [np.asarray(tensor.detach().array, np.float64) for tensor in found]


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"training": True},
        {"training": True, "relu": True, "residual": True},
        {"training": True, "relu": True, "pool": STEM_POOL},
        {"training": False},
        {"training": False, "relu": True, "residual": True},
    ],
    ids=["batch", "relu", "pool", "running", "running_relu"],
)
@pytest.mark.parametrize(
    ("dtype", "vector_dtype"),
    [("float16", "float32"), ("bfloat16", "float32"), ("float16", "float16")],
)
def test_16_bits_beside_float32(dtype, vector_dtype, options, create_graph, emulated_cuda):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    found = mixed_gradients(dtype, vector_dtype, create_graph, **options)
    expected = mixed_gradients("float64", "float64", create_graph, **options)
    for one, other in zip(found, expected, strict=True):
        error = np.linalg.norm(one - other) / np.linalg.norm(other)
        assert error < (0.02 if dtype == "bfloat16" else 0.004)


def test_vectors_beside_16_bits_are_of_their_dtype_or_float32(emulated_cuda):
    x = np.ones((2, 3, 2, 2), np.float16)
    ones = np.ones(3)
    with pytest.raises(TypeError, match="weight must have x's dtype"):
        batch_norm(x, None, None, ones, training=True)

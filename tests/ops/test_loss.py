"""Losses beside the table: graphs, ignored targets, messages."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gradengine as ge
from gradengine.ops.activation import log_softmax
from gradengine.ops.loss import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    smooth_l1_loss,
)


def scores(requires_grad=False):
    array = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    return ge.tensor(array, device="cpu", requires_grad=requires_grad)


def classes(*numbers):
    return ge.tensor(np.array(numbers), device="cpu")


def test_cross_entropy_of_class_numbers_is_one_node_that_keeps_little():
    x = scores(requires_grad=True)
    node = cross_entropy(x, classes(0, 1, 2)).grad_fn
    assert node.name() == "NllLossBackward0"
    assert node.next_functions == ((x.node, 0),)
    (edge,) = node.edges
    shapes = [value.shape for value in edge[2] if hasattr(value, "shape") and value is not x]
    assert shapes == [(3, 2), (3,), (3,), ()]


def test_smoothed_cross_entropy_is_made_of_log_softmax():
    x = scores(requires_grad=True)
    losses = cross_entropy(x, classes(0, 1, 2), reduction="none", label_smoothing=0.5)
    sum_node = losses.grad_fn.next_functions[0][0]
    node = sum_node.next_functions[0][0]
    parent = node.next_functions[0][0]
    assert [node.name(), parent.name()] == ["NllLossBackward0", "LogSoftmaxBackward0"]
    assert parent.next_functions == ((x.node, 0),)


def test_all_ignored_is_nan_with_no_gradient():
    x = scores(requires_grad=True)
    loss = cross_entropy(x, classes(-100, -100, -100))
    assert math.isnan(loss.item())
    loss.backward()
    assert not x.grad.numpy().any()


def test_an_empty_batch_is_nan():
    assert math.isnan(cross_entropy(np.zeros((0, 4), np.float32), np.zeros(0, np.int64)))
    assert cross_entropy(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), reduction="sum") == 0


def test_ignored_scores_may_be_infinite():
    x = np.array([[0.0, 0.0], [-math.inf, 0.0]])
    assert nll_loss(x, np.array([1, 0]), ignore_index=0) == 0


@pytest.mark.parametrize("target", [5, -1, 4])
def test_targets_out_of_range_are_refused(target):
    with pytest.raises(IndexError, match=f"Target {target} is out of bounds"):
        cross_entropy(scores(), classes(0, target, 2))


def test_any_integer_target_will_do():
    for dtype in (np.uint8, np.int32):
        expected = cross_entropy(scores(), classes(0, 1, 2)).item()
        assert cross_entropy(scores(), np.array([0, 1, 2], dtype)).item() == expected


def test_target_probabilities_get_a_gradient():
    x, target = (
        scores(requires_grad=True),
        ge.tensor(np.full((3, 4), 0.25, np.float32), device="cpu"),
    )
    target.requires_grad_()
    cross_entropy(x, target).backward()
    np.testing.assert_allclose(
        target.grad.numpy(), -ge.log_softmax(x, 1).detach().numpy() / 3, rtol=1e-6
    )


@pytest.mark.parametrize(
    "loss",
    [mse_loss, l1_loss, smooth_l1_loss, huber_loss, binary_cross_entropy_with_logits],
    ids=lambda loss: loss.__name__,
)
def test_reduction_is_checked(loss):
    message = f"{loss.__name__}: reduction must be 'mean', 'sum' or 'none'; got reduction='avg'"
    with pytest.raises(ValueError, match=message):
        loss(scores(), scores(), reduction="avg")


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss], ids=lambda loss: loss.__name__)
def test_class_losses_check_their_arguments(loss):
    name = loss.__name__
    with pytest.raises(ValueError, match=f"{name}: reduction must be .*got reduction='avg'"):
        loss(scores(), classes(0, 1, 2), reduction="avg")
    with pytest.raises(
        ValueError, match=rf"{name}: target must have input's shape .*\(3, 4\).*\(2,\)"
    ):
        loss(scores(), classes(0, 1))
    with pytest.raises(ValueError, match=rf"{name}: weight must .*weight\.shape=\(3,\)"):
        loss(scores(), classes(0, 1, 2), weight=np.ones(3, np.float32))
    with pytest.raises(TypeError, match=r"must be floating point.*dtype=int64"):
        loss(classes(0, 1, 2), classes(0))
    with pytest.raises(TypeError, match=rf"{name}: weight must have input's dtype .*float64"):
        loss(scores(), classes(0, 1, 2), weight=np.ones(4))
    with pytest.raises(TypeError, match=rf"{name}: .*target\.dtype=bool"):
        loss(scores(), np.ones(3, bool))


def test_nll_loss_takes_no_probabilities():
    with pytest.raises(TypeError, match=r"nll_loss: .*target\.dtype=float32"):
        nll_loss(scores(), scores())


def test_cross_entropy_checks_probabilities_and_smoothing():
    with pytest.raises(ValueError, match=r"cross_entropy: target probabilities .*\(3, 4\).*\(3,\)"):
        cross_entropy(scores(), np.ones(3, np.float32))
    for smoothing in (-0.1, 1.1):
        with pytest.raises(ValueError, match=rf"cross_entropy: label_smoothing .*={smoothing}"):
            cross_entropy(scores(), classes(0, 1, 2), label_smoothing=smoothing)


@pytest.mark.parametrize(
    "loss", [mse_loss, l1_loss, smooth_l1_loss, huber_loss], ids=lambda loss: loss.__name__
)
def test_broadcasting_warns(loss):
    with pytest.warns(UserWarning, match=rf"{loss.__name__}: Using a target size \(3,\)"):
        loss(scores()[:, :1], scores()[:, 0])


def test_bounds_are_checked():
    with pytest.raises(ValueError, match=r"smooth_l1_loss: .*beta >= 0.*got beta=-1"):
        smooth_l1_loss(scores(), scores(), beta=-1)
    with pytest.raises(ValueError, match=r"huber_loss: .*delta > 0.*got delta=0"):
        huber_loss(scores(), scores(), delta=0)
    with pytest.raises(ValueError, match="Target size must be the same as input size"):
        binary_cross_entropy_with_logits(scores(), scores()[0])


def test_losses_at_no_distance_have_no_gradient():
    for loss in (mse_loss, l1_loss, smooth_l1_loss, huber_loss):
        x = scores(requires_grad=True)
        loss(x, scores()).backward()
        assert not x.grad.numpy().any()


@pytest.mark.gpu
def test_cuda_targets_must_be_on_the_scores_device_and_wrong_ones_give_nan():
    with pytest.raises(TypeError, match=r"cross_entropy: .*one device"):
        cross_entropy(scores().cuda(), classes(0, 1, 2))
    loss = cross_entropy(scores().cuda(), classes(0, 5, 2).cuda(), reduction="none")
    np.testing.assert_array_equal(np.isnan(loss.cpu().numpy()), [False, True, False])


def test_class_weights_may_be_written_before_backward():
    gradients = []
    for written in (False, True):
        x, weight = ge.ones(1, 3, requires_grad=True), ge.tensor([1.0, 2.0, 3.0])
        loss = ge.cross_entropy(x, ge.tensor([1]), weight, label_smoothing=0.5)
        if written:
            weight.zero_()
        loss.backward()
        gradients.append(x.grad.tolist())
    assert gradients[0] == gradients[1]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(7, 5), (3, 300), (2, 9, 4, 3), (6,), (20, 1)])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_one_kernel_gives_what_softmax_and_nll_loss_give(reduction, shape, dtype):
    rng = np.random.default_rng(2)
    count = shape[min(1, len(shape) - 1)]
    rows_last = np.moveaxis(np.empty(shape), min(1, len(shape) - 1), -1).shape
    array = (rng.standard_normal(rows_last) * 10 + 100).astype(dtype)
    array = np.moveaxis(array, -1, min(1, len(shape) - 1))  # pixels' scores together in memory
    x = ge.asarray(array, device="cpu").requires_grad_()
    target = rng.integers(0, count, shape[:1] * (len(shape) > 1) + shape[2:])
    target = np.where(rng.random(target.shape) < 0.2, -100, target) if target.ndim else target
    weight = ge.tensor(rng.uniform(0.5, 2, count).astype(dtype), device="cpu")
    options = {"weight": weight, "reduction": reduction}
    label = ge.tensor(target, device="cpu")
    losses = (
        cross_entropy(x, label, **options),
        nll_loss(log_softmax(x, min(1, len(shape) - 1)), label, **options),
    )
    found = []
    for loss in losses:
        seed = ge.ones_like(loss).requires_grad_()
        (plain,) = ge.autograd.grad(loss, [x], seed, retain_graph=True)
        (recorded,) = ge.autograd.grad(loss, [x], seed, create_graph=True)
        second = ge.autograd.grad((recorded * recorded * recorded).sum(), [x, seed])
        tensors = (loss.detach(), plain, recorded.detach(), *second)
        found.append([tensor.numpy() for tensor in tensors])
    assert losses[0].grad_fn.next_functions == ((x.node, 0),)
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-5 if dtype == np.float32 else 1e-12)


def test_strange_scores_give_what_they_did():
    rows = np.array([[np.inf, 0], [-np.inf, -np.inf], [np.nan, 1], [0, -np.inf], [1e30, -1e30]])
    target = ge.tensor(np.array([0, 0, 1, 0, 0]), device="cpu")
    for dtype in (np.float32, np.float64):
        x = ge.tensor(rows.astype(dtype), device="cpu", requires_grad=True)
        losses = cross_entropy(x, target, reduction="none")
        np.testing.assert_array_equal(losses.detach().numpy(), [np.nan] * 3 + [0, 0])
        losses.sum().backward()
        expected = [[np.nan] * 2] * 3 + [[0, 0]] * 2
        np.testing.assert_array_equal(x.grad.numpy(), expected)


@pytest.mark.parametrize("loss", [cross_entropy, nll_loss])
def test_class_weights_must_not_require_grad(loss):
    weight = ge.ones(4, device="cpu", requires_grad=True)
    with pytest.raises(RuntimeError, match=f"{loss.__name__}: weight has no derivative.*detach"):
        loss(scores(), classes(0, 1, 2), weight)


@pytest.mark.parametrize("loss", [huber_loss, smooth_l1_loss])
def test_an_infinite_distance_has_a_finite_gradient(loss):
    x = ge.tensor([math.inf, -math.inf, 1e30], device="cpu", requires_grad=True)
    loss(x, ge.zeros(3, device="cpu"), reduction="sum").backward()
    assert x.grad.tolist() == [1, -1, 1]

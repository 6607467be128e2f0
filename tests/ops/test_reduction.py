"""Reductions beside the table: messages, labels, dtypes, ties, nan, infinities, empty dims."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import gradcheck, gradgradcheck
from gradengine.ops import reduction as ops


def tensor(values: Any, dtype: Any = np.float64, requires_grad: bool = False) -> Any:
    return ge.tensor(np.asarray(values, dtype), device="cpu", requires_grad=requires_grad)


X = tensor([[1, 2, 3], [4, 5, 6]])
EMPTY = tensor(np.zeros((0, 3)))


def gradient(function: Any, values: Any) -> np.ndarray:
    x = tensor(values, requires_grad=True)
    function(x).sum().backward()
    return x.grad.numpy()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.sum(X, 2), IndexError, "sum: dim must be in [-2, 1]"),
        (lambda: ops.sum(X, (0, -2)), ValueError, "sum: a dim must not appear twice"),
        (lambda: ops.cumsum(X, -3), IndexError, "cumsum: dim"),
        (lambda: ops.mean(X.long()), TypeError, "mean: x must have a floating point dtype"),
        (lambda: ops.var(X.long()), TypeError, "var: x must have a floating point dtype"),
        (lambda: ops.std(X.long()), TypeError, "got x.dtype=int64, convert it with x.float()"),
        (lambda: ops.norm(X.long()), TypeError, "norm: x must have a floating point dtype"),
        (lambda: ops.norm(X, "nuc"), ValueError, "norm: p must be a number"),
        (lambda: ops.max(EMPTY), ValueError, "max: the reduced dims must have non-zero size"),
        (lambda: ops.min(EMPTY, 0), ValueError, "got dim=(0,), x.shape=(0, 3)"),
        (lambda: ops.amax(EMPTY), ValueError, "amax: the reduced dims"),
        (lambda: ops.amin(EMPTY, (0, 1)), ValueError, "amin: the reduced dims"),
        (lambda: ops.argmax(EMPTY, 0), ValueError, "argmax: the reduced dims"),
        (lambda: ops.argmin(EMPTY), ValueError, "argmin: the reduced dims"),
        (lambda: ops.max(X, 5), IndexError, "max: dim must be in"),
        (lambda: ops.argmax(X, 2), IndexError, "argmax: dim must be in"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "label"),
    [
        (lambda x: x.sum(), "SumBackward0"),
        (lambda x: x.sum(0), "SumBackward1"),
        (lambda x: x.mean(), "MeanBackward0"),
        (lambda x: x.mean((0, 1)), "MeanBackward1"),
        (lambda x: x.max(), "MaxBackward1"),
        (lambda x: x.max(0).values, "MaxBackward0"),
        (lambda x: x.min(), "MinBackward1"),
        (lambda x: x.min(0)[0], "MinBackward0"),
        (lambda x: x.amax(), "AmaxBackward0"),
        (lambda x: x.amin(0), "AminBackward0"),
        (lambda x: x.prod(), "ProdBackward0"),
        (lambda x: x.prod(0), "ProdBackward1"),
        (lambda x: x.var(), "VarBackward0"),
        (lambda x: x.std(0), "StdBackward0"),
        (lambda x: x.cumsum(0), "CumsumBackward0"),
        (lambda x: x.logsumexp(0), "LogsumexpBackward0"),
        (lambda x: x.norm(), "LinalgVectorNormBackward0"),
    ],
)
def test_labels(call: Any, label: str) -> None:
    assert call(tensor(X.numpy(), requires_grad=True)).grad_fn.name() == label


def test_dtypes_follow_pytorch() -> None:
    for dtype in (np.bool_, np.uint8, np.int32):
        x = tensor([1, 0, 1], dtype)
        assert ops.sum(x).dtype == ops.prod(x).dtype == ops.cumsum(x, 0).dtype == np.int64
        assert ops.max(x).dtype == x.dtype
        assert ops.argmax(x).dtype == ops.count_nonzero(x).dtype == np.int64
        assert ops.any(x).dtype == ops.all(x, 0).dtype == np.bool_
        assert ops.logsumexp(x, 0).dtype == np.float32
    assert ops.sum(X, dtype=ge.int32).dtype == np.int32
    assert ops.cumsum(X.long(), 0, dtype=ge.float32).dtype == np.float32
    assert ops.prod(X.long(), dtype=ge.float32).dtype == np.float32
    assert ops.mean(X.long(), dtype=ge.float64).item() == 3.5


@pytest.mark.parametrize("name", ["sum", "mean", "var", "std", "prod", "norm", "amax"])
def test_float16_is_kept(name: str) -> None:
    x = tensor([1, 2, 3], np.float16, requires_grad=True)
    out = getattr(ops, name)(x)
    out.backward()
    assert out.dtype == x.grad.dtype == np.float16


def test_float16_is_summed_as_float32() -> None:
    ones = tensor(np.ones(4096), np.float16)
    assert ops.cumsum(ones, 0)[-1].item() == ops.sum(ones).item() == 4096
    assert ops.mean(ones).item() == 1
    assert ops.norm(ones).item() == 64


@pytest.mark.parametrize("name", ["max", "min", "amax", "amin"])
def test_ties_share_the_gradient(name: str) -> None:
    np.testing.assert_array_equal(gradient(getattr(ops, name), [2, 2, 2]), [1 / 3] * 3)
    sign = 1 if "max" in name else -1
    values = sign * np.array([[1.0, 3, 3], [4, 0, 0]])
    if name in ("amax", "amin"):
        found = gradient(lambda x: getattr(ops, name)(x, 1), values)
        np.testing.assert_array_equal(found, [[0, 0.5, 0.5], [1, 0, 0]])
    else:
        found = gradient(lambda x: getattr(ops, name)(x, 1).values, values)
        np.testing.assert_array_equal(found, [[0, 1, 0], [1, 0, 0]])


@pytest.mark.parametrize("name", ["max", "min", "amax", "amin"])
def test_nan_wins_and_gets_the_gradient(name: str) -> None:
    values = [1, math.nan, 3, math.nan]
    assert math.isnan(getattr(ops, name)(tensor(values)).item())
    np.testing.assert_array_equal(gradient(getattr(ops, name), values), [0, 0.5, 0, 0.5])


def test_max_along_a_dim_returns_a_named_pair() -> None:
    pair = ops.max(X, 1)
    values, indices = pair
    assert pair.values is values
    assert pair.indices is indices
    np.testing.assert_array_equal(indices.numpy(), [2, 2])
    assert indices.dtype == np.int64
    assert not ops.max(tensor([1.0], requires_grad=True), 0).indices.requires_grad
    kept = ops.min(X, 0, keepdim=True)
    assert kept.values.shape == kept.indices.shape == (1, 3)


def test_max_of_a_scalar_along_its_dim() -> None:
    values, indices = ops.max(tensor(3.0), 0)
    assert (values.item(), indices.item(), values.shape) == (3.0, 0, ())


def test_empty_dims() -> None:
    assert ops.sum(EMPTY).item() == 0
    assert ops.prod(EMPTY).item() == 1
    assert math.isnan(ops.mean(EMPTY).item())
    assert np.isnan(ops.mean(EMPTY, 0).numpy()).all()
    assert (ops.logsumexp(EMPTY, 0).numpy() == -math.inf).all()
    assert ops.norm(EMPTY).item() == 0
    assert ops.cumsum(EMPTY, 0).shape == (0, 3)
    assert not ops.any(EMPTY).item()
    assert ops.all(EMPTY).item()
    assert ops.amax(EMPTY, 1).shape == (0,)
    assert ops.max(EMPTY, 1).values.shape == (0,)
    for name in ("sum", "mean", "prod"):
        assert gradient(getattr(ops, name), np.zeros((0, 3))).shape == (0, 3)


def test_no_dims_means_all() -> None:
    assert ops.sum(X, ()).item() == 21
    assert ops.amax(X, ()).item() == 6
    assert ops.sum(tensor(3.0), 0).item() == ops.sum(tensor(3.0), -1, keepdim=True).item() == 3


@pytest.mark.parametrize("name", ["var", "std"])
def test_too_few_elements_warn_and_give_nan_or_inf(name: str) -> None:
    with pytest.warns(UserWarning, match=r"degrees of freedom is <= 0.*correction=1, count=1"):
        assert math.isnan(getattr(ops, name)(tensor([1.0])).item())
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert getattr(ops, name)(tensor([1.0, 2.0]), correction=3).item() == math.inf
    with pytest.warns(UserWarning, match="degrees of freedom"):
        assert np.isnan(gradient(getattr(ops, name), [1.0])).all()


def test_the_gradient_of_no_deviation_is_zero() -> None:
    np.testing.assert_array_equal(gradient(ops.std, [3, 3, 3]), [0, 0, 0])


@pytest.mark.parametrize("p", [1, 1.5, 2, 3])
def test_the_gradient_of_a_norm_at_zero_is_zero(p: float) -> None:
    np.testing.assert_array_equal(gradient(lambda x: ops.norm(x, p), [0, 0]), [0, 0])
    assert np.isfinite(gradient(lambda x: ops.norm(x, p, 1), [[0, 0], [0, 2]])).all()


def test_a_norm_of_order_below_one_passes_over_zeros() -> None:
    found = gradient(lambda x: ops.norm(x, 0.5), [0, 1, 2])
    np.testing.assert_allclose(found, [0, 1 + math.sqrt(2), 1 + math.sqrt(0.5)])
    assert ops.norm(tensor([0.0, -1.0]), -1).item() == 0
    assert ops.norm(tensor([0.0, -1.0, 2.0]), 0).item() == 2


def test_logsumexp_of_infinities() -> None:
    inf = math.inf
    x = tensor([[-inf, -inf], [inf, 1], [-inf, 0]])
    np.testing.assert_array_equal(ops.logsumexp(x, 1).numpy(), [-inf, inf, 0])
    found = gradient(lambda x: ops.logsumexp(x, 1), [[-inf, -inf], [-inf, 0]])
    np.testing.assert_array_equal(found, [[0, 0], [0, 1]])
    assert math.isnan(ops.logsumexp(tensor([math.nan, 1]), 0).item())


def test_logsumexp_does_not_overflow() -> None:
    assert ops.logsumexp(tensor([1e4, 1e4], np.float32), 0).item() == pytest.approx(
        1e4 + math.log(2)
    )


@pytest.mark.parametrize("count", range(1, 10))
def test_the_gradient_of_a_product_holds_for_any_count(count: int) -> None:
    values = np.linspace(-2, 3, count)
    values[count // 2] = 0
    expected = [np.prod(np.delete(values, place)) for place in range(count)]
    np.testing.assert_allclose(gradient(ops.prod, values), expected)


def test_the_third_derivative_of_a_product_with_three_zeros() -> None:
    x = tensor([0, 2, 0, 0], requires_grad=True)
    out = ops.prod(x)
    for place in (0, 2, 3):
        (whole,) = ge.autograd.grad(out, x, create_graph=True)
        out = whole[place]
    assert out.item() == 2


def test_derivatives_of_strided_inputs() -> None:
    x = tensor(np.random.default_rng(0).normal(size=(3, 4, 2)), requires_grad=True)
    for function in (ops.sum, ops.mean, ops.var, ops.std, ops.norm, ops.prod):
        assert gradcheck(lambda x, f=function: f(x.permute(2, 0, 1)[:, ::2], dim=(0, 2)), [x])
        assert gradgradcheck(lambda x, f=function: f(x.transpose(0, 2), dim=1), [x])


def test_scalars_reduce_to_scalars() -> None:
    for name in ("sum", "mean", "max", "amax", "prod", "norm"):
        assert getattr(ops, name)(tensor(-3.0)).shape == ()
        assert abs(gradient(getattr(ops, name), -3.0)) == 1


def test_arrays_in_arrays_out() -> None:
    assert type(ops.sum(np.ones((2, 3)), 0)) is np.ndarray
    assert type(ops.max(np.ones((2, 3)), 0).values) is np.ndarray


def test_a_bool_in_place_of_dim_is_unbiased() -> None:
    x = tensor([[1.0, 2.0], [4.0, 8.0]])
    assert ge.var(x, False).item() == ge.var(x, unbiased=False).item()
    assert ge.std(x, True).item() == ge.std(x).item()


def test_the_count_of_nonzeros_as_a_norm_has_a_gradient_of_zero() -> None:
    assert gradient(lambda x: ge.norm(x, 0), [1.0, 0.0, 3.0]).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="norm: the reduced dims must have non-zero size"):
        ge.norm(tensor([]), -1)

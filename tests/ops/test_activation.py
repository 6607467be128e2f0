"""Activations beside the table: special values, messages, dropout's statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels
from gradengine.autograd import gradgradcheck
from gradengine.ops.activation import (
    dropout,
    gelu,
    hardtanh,
    leaky_relu,
    log_softmax,
    relu,
    relu6,
    softmax,
)


def gradient(function, values, seed=None):
    x = ge.tensor(np.array(values), device="cpu", requires_grad=True)
    out = function(x)
    out.backward(ge.tensor(np.ones(out.shape) if seed is None else np.array(seed), device="cpu"))
    return x.grad.numpy()


def test_relu_leaves_no_negative_zero():
    out = relu(np.array([-0.0] * 9 + [-1.0, -math.inf], np.float32))
    assert not np.signbit(out).any()


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_relu_gradient_is_masked_exactly(dtype):
    x = ge.tensor(np.array([-1.0, 0.0, 2.0, math.nan], dtype), device="cpu", requires_grad=True)
    seed = np.array([math.inf, math.nan, -math.inf, 3.0], dtype)
    relu(x).backward(ge.tensor(seed, device="cpu"))
    np.testing.assert_array_equal(x.grad.numpy(), np.array([0, 0, -math.inf, 3.0], dtype))


def test_relu_keeps_its_output_and_its_layout():
    x = ge.tensor(np.ones((2, 4, 5, 3), np.float32), device="cpu").permute(0, 3, 1, 2)
    x.requires_grad_()
    out = relu(x)
    ((_, _, kept),) = out.grad_fn.edges
    assert [value.array is out.array for value in kept] == [True]
    out.sum().backward()
    assert out.array.transpose(0, 2, 3, 1).flags.c_contiguous
    assert x.grad.array.transpose(0, 2, 3, 1).flags.c_contiguous


def test_derivatives_at_kinks():
    np.testing.assert_array_equal(gradient(relu6, [0.0, 6.0, 3.0]), [0, 0, 1])
    np.testing.assert_array_equal(gradient(hardtanh, [-1.0, 1.0, 0.0]), [0, 0, 1])
    np.testing.assert_allclose(gradient(leaky_relu, [0.0, 1.0]), [0.01, 1])
    assert math.isnan(gradient(relu6, [math.nan], [math.nan])[0])


def test_bad_options_are_refused():
    x = np.ones(3, np.float32)
    with pytest.raises(
        ValueError, match=r"gelu: approximate must be 'none' or 'tanh'; got .*'erf'"
    ):
        gelu(x, approximate="erf")
    with pytest.raises(ValueError, match=r"hardtanh: .*min_val <= max_val.*got min_val=1"):
        hardtanh(x, 1, 0.5)
    with pytest.raises(TypeError, match="hardtanh: not defined for bools"):
        hardtanh(x > 0)


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_softmax_checks_its_arguments(function):
    name = function.__name__
    with pytest.raises(TypeError, match=rf"{name}: x must be floating point .*got x\.dtype=int64"):
        function(np.arange(3), 0)
    with pytest.raises(IndexError, match=f"{name}: dim must be in .*got dim=2"):
        function(np.ones((2, 3), np.float32), 2)


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_softmax_keeps_only_its_output(function):
    x = ge.tensor(np.ones((2, 3)), device="cpu", requires_grad=True)
    out = function(x, 1)
    assert (
        out.grad_fn.name()
        == {"softmax": "Softmax", "log_softmax": "LogSoftmax"}[function.__name__] + "Backward0"
    )
    kept = [value for value in out.grad_fn.edges[0][2] if not isinstance(value, int)]
    assert [value.array is out.array for value in kept] == [True]


def test_softmax_is_normalized_in_float32():
    x = np.random.default_rng(0).normal(0, 30, (50, 1000)).astype(np.float32)
    np.testing.assert_allclose(softmax(x, 1).sum(1), 1, rtol=1e-6)


LAYOUTS = {
    "last": (3, lambda x: x),
    "channels last": (1, lambda x: x.transpose(0, 2, 3, 1).copy().transpose(0, 3, 1, 2)),
    "apart": (1, lambda x: x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_softmax_of_few_and_of_many_rows_agree(function, layout, monkeypatch):
    rng = np.random.default_rng(4)
    dim, laid_out = LAYOUTS[layout]
    x = ge.tensor(laid_out(rng.standard_normal((2, 3, 4, 5))), device="cpu", requires_grad=True)
    grad = ge.tensor(rng.standard_normal(x.shape), device="cpu")

    def results():
        out = function(x, dim)
        (by_x,) = ge.autograd.grad(out, x, grad, retain_graph=True)
        (recorded,) = ge.autograd.grad(out, x, grad, create_graph=True)
        (second,) = ge.autograd.grad((recorded**2).sum(), x)
        return [array.detach().numpy() for array in (out, by_x, recorded, second)]

    expected = results()
    monkeypatch.setattr(kernels, "ROW_SIZE", 1)
    found = results()
    assert found[0].strides == x.detach().numpy().strides
    for got, same in zip(found, expected, strict=True):
        np.testing.assert_allclose(got, same, rtol=1e-12, atol=1e-13)
    assert gradgradcheck(lambda x: function(x, dim), x)


# ---- dropout -------------------------------------------------------------------------------------


def test_dropout_zeroes_the_share_it_says_and_scales_the_rest():
    ge.manual_seed(3)
    out = dropout(np.full(20_000, 3.0, np.float32), 0.25)
    assert set(np.unique(out)) == {np.float32(0), np.float32(4)}
    assert abs((out == 0).mean() - 0.25) < 0.02


def test_dropout_gradient_has_the_same_mask():
    ge.manual_seed(3)
    x = ge.tensor(np.full(1000, 2.0), device="cpu", requires_grad=True)
    out = dropout(x, 0.5)
    assert out.grad_fn.name() == "MulBackward0"
    out.sum().backward()
    np.testing.assert_array_equal(x.grad.numpy() * 2, out.detach().numpy())


def test_dropout_is_reproducible():
    x = np.ones(100, np.float32)
    ge.manual_seed(1)
    first = dropout(x)
    assert (dropout(x) != first).any()
    ge.manual_seed(1)
    np.testing.assert_array_equal(dropout(x), first)


def test_dropout_returns_its_input_when_there_is_nothing_to_do():
    x = ge.tensor(np.ones(3), device="cpu")
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


def test_dropout_checks_its_arguments():
    for p in (-0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=rf"dropout: .*0 <= p <= 1.*got p={p}"):
            dropout(np.ones(3, np.float32), p)
    with pytest.raises(TypeError, match=r"dropout: x must be floating point .*got x.dtype=int64"):
        dropout(np.ones(3, np.int64))


def test_softmax_of_a_number_and_of_no_rows():
    x = ge.tensor(3.0, requires_grad=True)
    (ge.softmax(x, 0) + ge.log_softmax(x, -1)).backward()
    assert (ge.softmax(x, 0).item(), ge.log_softmax(x, 0).item(), x.grad.item()) == (1, 0, 0)
    assert ge.log_softmax(ge.zeros(0, 3), 0).shape == (0, 3)  # and no warning
    with pytest.raises(IndexError, match="softmax: dim must be in"):
        ge.softmax(x, 1)


def test_functional_takes_inplace_and_leaves_its_input():
    x = ge.tensor([-1.0, 2.0])
    for name in ("relu", "relu6", "silu", "leaky_relu", "elu", "hardtanh", "dropout"):
        result = getattr(ge.nn.functional, name)(x, inplace=True)
        assert result.shape == x.shape
    assert ge.nn.functional.relu(x, True).tolist() == [0, 2]
    assert x.tolist() == [-1, 2]

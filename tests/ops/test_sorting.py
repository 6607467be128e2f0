"""Sorting beside the table: messages, labels, ties, nan, scalars, empty dims."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.ops import sorting as ops


def tensor(values: Any, requires_grad: bool = False) -> Any:
    return ge.tensor(np.asarray(values, np.float64), device="cpu", requires_grad=requires_grad)


X = tensor([[3, 1, 2], [4, 6, 5]])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.sort(X, 2), IndexError, "sort: dim must be in [-2, 1]"),
        (lambda: ops.argsort(X, -3), IndexError, "argsort: dim must be in"),
        (lambda: ops.topk(X, 4), ValueError, "topk: k must be in range"),
        (lambda: ops.topk(X, -1), ValueError, "got k=-1, x.shape[1]=3"),
        (lambda: ops.topk(X, 1, 2), IndexError, "topk: dim must be in"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        call()


def test_labels() -> None:
    x = tensor([2, 1], requires_grad=True)
    assert x.sort().values.grad_fn.name() == "SortBackward0"
    assert x.topk(1).values.grad_fn.name() == "TopkBackward0"


def test_indices_are_int64_and_need_no_gradient() -> None:
    for pair in (ops.sort(X), ops.topk(X, 2)):
        assert pair.indices.dtype == np.int64
    assert not ops.sort(tensor([1.0], requires_grad=True)).indices.requires_grad


@pytest.mark.parametrize("descending", [False, True])
def test_equal_elements_keep_their_order(descending: bool) -> None:
    x = np.random.default_rng(0).integers(0, 4, (5, 200)).astype(float)
    order = ops.argsort(x, 1, descending)
    expected = np.argsort(-x if descending else x, axis=1, kind="stable")
    np.testing.assert_array_equal(order, expected)


def test_nan_is_the_largest() -> None:
    x = tensor([1, math.nan, 3, 2, 0])
    assert ops.argsort(x).tolist() == [4, 0, 3, 2, 1]
    assert ops.argsort(x, descending=True).tolist() == [1, 2, 3, 0, 4]
    assert ops.topk(x, 2).indices.tolist() == [1, 2]
    assert ops.topk(x, 2, largest=False).indices.tolist() == [4, 0]


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("k", [0, 1, 3, 9, 10])
def test_topk_is_the_head_of_sort(k: int, largest: bool, dim: int) -> None:
    x = tensor(np.random.default_rng(k).permutation(1000).reshape(10, 10, 10))
    whole, top = ops.sort(x, dim, descending=largest), ops.topk(x, k, dim, largest)
    np.testing.assert_array_equal(top.values.numpy(), whole.values.narrow(dim, 0, k).numpy())
    np.testing.assert_array_equal(top.indices.numpy(), whole.indices.narrow(dim, 0, k).numpy())


def test_topk_gives_the_gradient_to_the_elements_it_picked() -> None:
    x = tensor([[1, 5, 3, 0, 2, 4, -1], [7, 7, 7, 7, 7, 7, 7]], requires_grad=True)
    top = x.topk(2)
    (top.values * tensor([2, 3])).sum().backward()
    expected = np.zeros((2, 7))
    np.put_along_axis(expected, top.indices.numpy(), np.array([[2.0, 3.0]] * 2), 1)
    np.testing.assert_array_equal(x.grad.numpy(), expected)


def test_scalars_and_empty_dims() -> None:
    x = tensor(2.0, requires_grad=True)
    values, indices = ops.sort(x)
    values.backward()
    assert (values.shape, indices.item(), x.grad.item()) == ((), 0, 1)
    assert ops.argsort(x).shape == ()
    assert ops.sort(tensor(np.zeros((0, 3))), 0).values.shape == (0, 3)
    assert ops.topk(tensor(np.zeros((2, 0))), 0).indices.shape == (2, 0)


def test_arrays_in_arrays_out() -> None:
    assert type(ops.sort(np.ones(3)).values) is np.ndarray
    assert type(ops.argsort(np.ones(3))) is np.ndarray

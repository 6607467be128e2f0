"""Products beside the table: messages, labels, views."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.ops.matmul import einsum, linear, matmul


def ones(*shape: int, dtype: Any = np.float32) -> Any:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("name", "shapes", "rule"),
    [
        ("matmul", ((2, 3), (4, 5)), "x.shape[-1] == y.shape[-2]"),
        ("matmul", ((3,), (4,)), "x.shape[-1] == y.shape[0]"),
        ("matmul", ((2, 3), (4,)), "x.shape[-1] == y.shape[0]"),
        ("matmul", ((), (3,)), "x.ndim >= 1"),
        ("matmul", ((2, 3, 4), (3, 4, 5)), "leading axes must broadcast"),
        ("mm", ((2, 3, 4), (4, 5)), "x.ndim == 2 and y.ndim == 2"),
        ("bmm", ((3, 4), (4, 5)), "x.ndim == 3 and y.ndim == 3"),
        ("bmm", ((2, 3, 4), (1, 4, 5)), "x.shape[0] == y.shape[0]"),
        ("mv", ((3, 4), (4, 5)), "x.ndim == 2 and y.ndim == 1"),
        ("dot", ((3, 4), (4,)), "x.ndim == 1 and y.ndim == 1"),
        ("outer", ((3, 4), (4,)), "x.ndim == 1 and y.ndim == 1"),
    ],
)
def test_shape_errors_name_both_shapes(name, shapes, rule):
    x, y = (ones(*shape) for shape in shapes)
    message = re.escape(rule) + ".*" + re.escape(f"got x.shape={shapes[0]}, y.shape={shapes[1]}")
    with pytest.raises(ValueError, match=f"^{name}: .*{message}"):
        getattr(ge, name)(ge.tensor(x), ge.tensor(y))


def test_dtypes_must_agree():
    with pytest.raises(TypeError, match=r"matmul: .*x\.dtype=float32, y\.dtype=int64"):
        matmul(ones(2, 2), ones(2, 2, dtype=np.int64))


@pytest.mark.parametrize(
    ("shapes", "rule"),
    [
        (((2, 3), (4, 5)), r"x\.shape\[-1\] == weight\.shape\[1\]"),
        (((2, 3), (3,)), "2-D weight"),
        (((), (4, 3)), r"x\.shape\[-1\] == weight\.shape\[1\]"),
        (((2, 3), (4, 3), (3,)), r"bias\.shape == weight\.shape\[:1\]"),
        (((2, 3), (4, 3), ()), r"bias\.shape == weight\.shape\[:1\]"),
    ],
)
def test_linear_checks_shapes(shapes, rule):
    with pytest.raises(ValueError, match=f"linear: .*{rule}.*got x.shape="):
        linear(*[ones(*shape) for shape in shapes])


def test_linear_checks_dtypes():
    with pytest.raises(TypeError, match=r"linear: .*bias\.dtype=float64"):
        linear(ones(2, 3), ones(4, 3), ones(4, dtype=np.float64))


def test_labels_are_pytorchs():
    def label(function, *shapes):
        return function(*[ge.tensor(ones(*shape), requires_grad=True) for shape in shapes]).grad_fn

    assert label(matmul, (2, 3), (3, 4)).name() == "MmBackward0"
    assert label(matmul, (2, 3), (3,)).name() == "MvBackward0"
    assert label(matmul, (3,), (3,)).name() == "DotBackward0"
    assert label(matmul, (2, 2, 3), (2, 3, 4)).name() == "BmmBackward0"
    assert label(linear, (2, 3), (4, 3), (4,)).name() == "AddmmBackward0"
    assert label(linear, (2, 3), (4, 3)).name() == "MmBackward0"


def test_linear_is_one_operation():
    x, weight, bias = (
        ge.tensor(ones(*shape), requires_grad=True) for shape in ((2, 3), (4, 3), (4,))
    )
    node = linear(x, weight, bias).grad_fn
    assert [parent for parent, _ in node.next_functions] == [x.node, weight.node, bias.node]


def test_linear_with_frozen_inputs_keeps_only_what_is_wanted():
    x, weight = ge.tensor(ones(2, 3)), ge.tensor(ones(4, 3))
    bias = ge.tensor(ones(4), requires_grad=True)
    (edge,) = [edge for edge in linear(x, weight, bias).grad_fn.edges if edge is not None]
    assert not any(isinstance(value, ge.Tensor) for value in edge[2])
    weight.requires_grad_()
    bias.requires_grad_(False)
    (edge,) = [edge for edge in linear(x, weight, bias).grad_fn.edges if edge is not None]
    assert [value for value in edge[2] if isinstance(value, ge.Tensor)] == [x] or edge[2][0] is x


def test_arrays_in_arrays_out():
    assert isinstance(matmul(ones(2, 3), ones(3, 4)), np.ndarray)
    assert isinstance(einsum("ij,jk", ones(2, 3), ones(3, 4)), np.ndarray)


def test_einsum_result_shares_no_memory():
    x = ge.tensor(np.arange(9.0).reshape(3, 3))
    for equation in ("ij->ji", "ii->i", "ij->ij"):
        assert not np.shares_memory(einsum(equation, x).array, x.array)


def test_einsum_takes_a_list():
    x = np.arange(6.0).reshape(2, 3)
    np.testing.assert_array_equal(einsum("ij,kj->ik", [x, x]), x @ x.T)


@pytest.mark.parametrize(
    ("equation", "shapes", "rule"),
    [
        ("ij,jk", ((2, 3),), "must name every operand"),
        ("ij", ((2, 3, 4),), "must name every axis"),
        ("...ij", ((2,),), "must name every axis"),
        ("ij,jk", ((2, 3), (4, 5)), "must give 'j' one size"),
        ("ii", ((2, 3),), "must give 'i' one size"),
        ("ii", ((1, 3),), "must give 'i' one size"),
        ("ij->ik", ((2, 3),), "must have output letters that differ and that an operand has"),
        ("ij->ii", ((2, 3),), "must have output letters that differ and that an operand has"),
        ("i1", ((2, 3),), "must be made of letters"),
    ],
)
def test_einsum_refuses_malformed_equations(equation, shapes, rule):
    with pytest.raises(ValueError, match=f"einsum: the equation {rule}.*; got equation="):
        einsum(equation, *[ones(*shape) for shape in shapes])


def test_einsum_refuses_mixed_dtypes():
    with pytest.raises(TypeError, match="einsum: operands must have one dtype; got dtypes float32"):
        einsum("i,i", ones(2), ones(2, dtype=np.int64))

"""Every row of the table of operations: value, dtype, derivatives, frozen subsets, PyTorch."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional
from gradengine.autograd import gradcheck, gradgradcheck
from tests.cases import Case, all_cases

CASES = all_cases()
# Public names that are another's alias, or that return no tensor and are tested with their family.
NO_ROW = {"absolute", "clip", "concat", "concatenate", "divide", "multiply", "negative", "subtract"}
NO_ROW |= {"swapaxes", "true_divide", "allclose", "equal"}
METHODS = {"contiguous", "getitem", "setitem"}  # rows for what only a Tensor has
DIFFERENTIABLE = [case for case in CASES if case.differentiable]


def _identifier(case: Case) -> str:
    return f"{case.name}-{case.note}" if case.note else case.name


each_case = pytest.mark.parametrize("case", CASES, ids=_identifier)
each_differentiable_case = pytest.mark.parametrize("case", DIFFERENTIABLE, ids=_identifier)


def tensors(case: Case, wanted: Any = None, dtype: Any = np.float64) -> list[ge.Tensor]:
    """Return the row's inputs as leaves; floats at positions in `wanted` (default: all) require grad."""
    made = []
    for position, array in enumerate(case.inputs):
        is_float = array.dtype.kind == "f"
        leaf = ge.tensor(array, dtype=dtype if is_float else None, device="cpu")
        made.append(leaf.requires_grad_(is_float and (wanted is None or position in wanted)))
    return made


def float_positions(case: Case) -> list[int]:
    return [position for position, array in enumerate(case.inputs) if array.dtype.kind == "f"]


def weighted(output: ge.Tensor) -> np.ndarray:
    """Return fixed, uneven weights for the elements of an output."""
    return np.cos(np.arange(output.numel())).reshape(output.shape)


def test_every_public_operation_has_a_row():
    public = {name for name, value in vars(functional).items() if callable(value)} - NO_ROW
    covered = {case.name for case in CASES}
    assert sorted(public - covered) == []
    assert sorted(covered - public - NO_ROW - METHODS) == []


@each_case
def test_value(case):
    if case.reference is None:
        pytest.skip("PyTorch is this row's only reference")
    got = case.run(ge, *tensors(case))
    expected = np.asarray(case.reference(*[array.copy() for array in case.inputs]))
    assert got.shape == expected.shape
    assert got.dtype.kind == expected.dtype.kind
    np.testing.assert_allclose(got.detach().numpy(), expected, rtol=1e-10, atol=1e-12)


@each_case
def test_float32_is_kept(case):
    low, high = case.run(ge, *tensors(case, (), np.float32)), case.run(ge, *tensors(case, ()))
    if high.dtype.kind == "f" and float_positions(case):
        assert low.dtype == np.float32
        np.testing.assert_allclose(low.numpy(), high.numpy(), rtol=2e-4, atol=2e-5)
    else:
        assert low.dtype == high.dtype


@each_case
def test_inputs_are_left_alone(case):
    inputs = tensors(case, ())
    case.run(ge, *inputs)
    for tensor, array in zip(inputs, case.inputs, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)


@each_differentiable_case
def test_first_derivative(case):
    assert gradcheck(lambda *x: case.run(ge, *x), tensors(case))


@each_differentiable_case
def test_second_derivative(case):
    assert gradgradcheck(lambda *x: case.run(ge, *x), tensors(case), atol=1e-4)


def gradients(case: Case, wanted: Any) -> dict[int, np.ndarray]:
    inputs = tensors(case, wanted)
    output = case.run(ge, *inputs)
    output.backward(ge.tensor(weighted(output), device="cpu"))
    return {position: inputs[position].grad.numpy() for position in wanted}


@each_differentiable_case
def test_freezing_some_inputs_leaves_the_other_gradients(case):
    positions = float_positions(case)
    everything = gradients(case, positions)
    for count in range(1, len(positions)):
        for wanted in itertools.combinations(positions, count):
            for position, gradient in gradients(case, wanted).items():
                np.testing.assert_array_equal(gradient, everything[position])


@each_differentiable_case
def test_recorded_backward_agrees_with_the_plain_one(case):
    positions = float_positions(case)
    plain = gradients(case, positions)
    inputs = tensors(case)
    output = case.run(ge, *inputs)
    seed = ge.tensor(weighted(output), device="cpu")
    wanted = [inputs[position] for position in positions]
    found = ge.autograd.grad(output, wanted, seed, create_graph=True)
    for position, gradient in zip(positions, found, strict=True):
        np.testing.assert_allclose(
            gradient.detach().numpy(), plain[position], rtol=1e-9, atol=1e-11
        )


@each_case
def test_frozen_inputs_record_nothing(case):
    output = case.run(ge, *tensors(case, ()))
    assert not output.requires_grad


@pytest.mark.pytorch
@each_case
def test_agrees_with_pytorch(case):
    torch = pytest.importorskip("torch")
    if not case.in_torch:
        pytest.skip("PyTorch has no such call")
    theirs = [
        torch.tensor(array, requires_grad=array.dtype.kind == "f" and case.differentiable)
        for array in case.inputs
    ]
    ours = tensors(case)
    expected = (case.torch or case.run)(torch, *theirs)
    got = case.run(ge, *ours)
    assert got.shape == tuple(expected.shape)
    assert str(got.dtype) == str(expected.dtype).removeprefix("torch.")
    np.testing.assert_allclose(
        got.detach().numpy(), expected.detach().numpy(), rtol=1e-9, atol=1e-11
    )
    if not case.differentiable:
        return
    seed = weighted(got)
    wanted = [position for position in float_positions(case) if theirs[position].requires_grad]
    first = torch.autograd.grad(expected, [theirs[i] for i in wanted], torch.tensor(seed))
    found = ge.autograd.grad(got, [ours[i] for i in wanted], ge.tensor(seed, device="cpu"))
    for ours_gradient, gradient in zip(found, first, strict=True):
        np.testing.assert_allclose(ours_gradient.numpy(), gradient.numpy(), rtol=1e-8, atol=1e-10)

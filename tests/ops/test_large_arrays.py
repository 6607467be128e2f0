"""The table of operations once more, computed as large arrays are: in kernels, on all cores."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional, kernels
from gradengine.autograd import gradcheck, gradgradcheck
from gradengine.kernels.cpu import elementwise
from tests.cases import activation, loss, reduction
from tests.cases import elementwise as arithmetic
from tests.test_operations import gradients, tensors

CASES = [
    case
    for family in (arithmetic, activation, loss, reduction)
    for case in family.CASES
    if case.reference is not None
]
IDS = [f"{case.name}-{case.note}" if case.note else case.name for case in CASES]
each_case = pytest.mark.parametrize("case", CASES, ids=IDS)


@pytest.fixture
def by_kernels(monkeypatch):
    """Let kernels compute arrays of any size; say which formulas they were asked for and gave."""
    asked = set()
    monkeypatch.setattr(kernels, "PARALLEL_SIZE", 1)
    monkeypatch.setattr(kernels, "ROW_SIZE", 1)
    monkeypatch.setattr(elementwise, "SHORTEST", 1)
    every_size = {name: (kernel, 1) for name, (kernel, _) in elementwise._KERNELS.items()}
    monkeypatch.setattr(elementwise, "_KERNELS", every_size)
    compute = kernels.elementwise

    def watched(name, *operands):
        out = compute(name, *operands)
        if out is not None:
            asked.add(name)
        return out

    monkeypatch.setattr(kernels, "elementwise", watched)
    return asked


@each_case
def test_value(case, by_kernels):
    found = case.run(ge, *tensors(case, ())).numpy()
    expected = np.asarray(case.reference(*[array.copy() for array in case.inputs]))
    assert found.shape == expected.shape
    rounding = 1e-10 if found.dtype == np.float64 else 1e-6  # integers become float32
    np.testing.assert_allclose(found, expected, rtol=rounding, atol=1e-12)


@each_case
def test_float32(case, by_kernels):
    low, high = case.run(ge, *tensors(case, (), np.float32)), case.run(ge, *tensors(case, ()))
    np.testing.assert_allclose(low.numpy(), high.numpy(), rtol=2e-4, atol=2e-5)


@each_case
def test_derivatives(case, by_kernels):
    if not case.differentiable:
        pytest.skip("the row has no derivative")
    assert gradcheck(lambda *x: case.run(ge, *x), tensors(case))
    assert gradgradcheck(lambda *x: case.run(ge, *x), tensors(case), atol=1e-4)
    positions = [place for place, array in enumerate(case.inputs) if array.dtype.kind == "f"]
    plain = gradients(case, positions)
    inputs = tensors(case)
    out = case.run(ge, *inputs)
    seed = ge.tensor(np.cos(np.arange(out.numel())).reshape(out.shape), device="cpu")
    found = ge.autograd.grad(out, [inputs[place] for place in positions], seed, create_graph=True)
    for place, gradient in zip(positions, found, strict=True):
        np.testing.assert_allclose(gradient.detach().numpy(), plain[place], rtol=1e-9, atol=1e-11)


def test_every_formula_serves_an_operation(by_kernels):
    x = ge.linspace(-3, 3, 64, dtype=ge.float64).requires_grad_()
    outs = [x + 1, x - 1, 1 - x, x * x, 1 / x, x / 2, ge.square(x), ge.relu(x), ge.exp(x)]
    outs += [ge.sigmoid(x), ge.tanh(x), ge.silu(x), ge.gelu(x), ge.gelu(x, approximate="tanh")]
    sum(outs).sum().backward()
    assert by_kernels == elementwise._KERNELS.keys()


@pytest.mark.parametrize("dtype", [ge.float16, ge.bfloat16, ge.float32, ge.float64])
@pytest.mark.parametrize("name", ["sigmoid", "gelu", "exp", "relu", "sum", "mean"])
def test_long_arrays_give_what_short_ones_give(name, dtype):
    values = np.random.default_rng(0).standard_normal((kernels.PARALLEL_SIZE // 50, 100)) * 2
    call = getattr(functional, name)
    call = call if name not in ("sum", "mean") else lambda x: getattr(functional, name)(x, 1)
    results = []
    for count in (len(values), 20):
        x = ge.from_numpy(values[:count]).to(dtype=dtype).requires_grad_()
        out = call(x)
        out.backward(ge.ones_like(out))
        assert out.dtype == x.grad.dtype == dtype
        results.append([y.detach().numpy()[:20].astype(np.float64) for y in (out, x.grad)])
    rounding = {ge.float16: 2e-3, ge.bfloat16: 1e-2}.get(dtype, 3e-6)
    for large, small in zip(*results, strict=True):
        np.testing.assert_allclose(large, small, rtol=rounding, atol=rounding)

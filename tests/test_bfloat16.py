"""bfloat16 as a dtype of tensors: promotion, rounding, sums, derivatives, and every operation."""

from __future__ import annotations

import itertools
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.optim import SGD, Adam
from tests import numpy_gpu
from tests.cases import Case, all_cases

BF16 = ge.bfloat16
EPSILON = 2.0**-8  # the largest relative error of rounding to 8 significant bits
DTYPES = ["float64", "float32", "bfloat16", "float16", "int64", "int32", "uint8", "int8", "bool"]

# On the CPU their kernels are for float32 and float64.
WITHOUT_KERNEL = {"conv1d", "conv2d", "batch_norm", "max_pool2d", "avg_pool2d"}
FLOATING = [case for case in all_cases() if any(array.dtype.kind == "f" for array in case.inputs)]
CASES = [
    case
    for case in FLOATING
    if case.name not in WITHOUT_KERNEL
    and case.note != "special"  # comparing nan of this dtype warns, unlike nan of float32
]
# The stand-in for CuPy leaves comparisons of nan to NumPy, and its views do not know their base.
ON_STAND_IN = [case for case in FLOATING if case.note != "special" and case.name != "view"]


def _identifier(case: Case) -> str:
    return f"{case.name}-{case.note}" if case.note else case.name


def bfloat16(values: Any, **options: Any) -> ge.Tensor:
    return ge.tensor(values, dtype=BF16, device="cpu", **options)


def wide(tensor: ge.Tensor) -> np.ndarray:
    return tensor.detach().cpu().numpy().astype(np.float64)


# ---- the dtype -----------------------------------------------------------------------------------


def test_the_dtype_is_imported_when_it_is_first_asked_for():
    code = (
        "import sys, gradengine as ge; ge.ones(3, device='cpu') + 1.5; assert 'ml_dtypes' not in sys.modules;"
        "x = ge.ones(3, dtype='bfloat16', device='cpu'); assert x.dtype == ge.bfloat16"
    )
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, timeout=60)


def test_factories_conversions_and_values():
    values = [1.0, -2.5, 3.140625]
    x = bfloat16(values)
    assert (x.dtype, x.itemsize, x.is_floating_point()) == (BF16, 2, True)
    assert x.tolist() == values
    assert x[1].item() == -2.5
    assert float(x[0]) == 1.0
    assert bfloat16(3.14159)[()].item() == 3.140625  # rounded to 8 significant bits
    for made in (
        ge.zeros(3, dtype=BF16, device="cpu"),
        ge.full((3,), 2, dtype="bfloat16", device="cpu"),
        ge.arange(3, dtype=BF16, device="cpu"),
        ge.linspace(0, 1, 3, dtype=BF16, device="cpu"),
        ge.randn(3, dtype=BF16, device="cpu"),
        ge.ones_like(x),
        ge.empty_like(ge.ones(3, device="cpu"), dtype=BF16),
        x.new_full((3,), 1.5),
        ge.ones(3, device="cpu").to(BF16),
        ge.ones(3, device="cpu").bfloat16(),
        ge.ones(3, device="cpu").half().type_as(x),
        ge.from_numpy(np.ones(3, BF16)),
        pickle.loads(pickle.dumps(x)),
    ):
        assert made.dtype == BF16
        assert made.shape == (3,)
    assert (x.float().dtype, x.half().dtype, x.long().tolist()) == (
        *(ge.float32, ge.float16),
        [1, -2, 3],
    )


@pytest.mark.pytorch
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_it_is_saved_as_it_is_and_loaded_as_float32(tmp_path, suffix):
    torch = pytest.importorskip("torch")
    x = bfloat16(np.random.default_rng(0).standard_normal((3, 4)))
    path = tmp_path / f"weights{suffix}"
    ge.save({"x": x, "transposed": x.T, "y": x.float()}, path)
    if suffix == ".pth":
        loaded = torch.load(path, weights_only=True)
    else:
        loaded = pytest.importorskip("safetensors.torch").load_file(path)
    assert (loaded["x"].dtype, loaded["y"].dtype) == (torch.bfloat16, torch.float32)
    assert loaded["x"].tolist() == loaded["transposed"].T.tolist() == x.tolist()
    ours = ge.load(path)
    assert ours["x"].dtype == ours["transposed"].dtype == ge.float32
    assert ours["x"].bfloat16().tolist() == ours["transposed"].T.tolist() == x.tolist()


def test_a_module_converts():
    layer = ge.nn.Linear(3, 2, device="cpu").bfloat16()
    assert {parameter.dtype for parameter in layer.parameters()} == {BF16}
    out = layer(ge.ones(4, 3, dtype=BF16, device="cpu"))
    out.sum().backward()
    assert out.dtype == layer.weight.grad.dtype == BF16
    assert {p.dtype for p in layer.float().parameters()} == {ge.float32}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_random_numbers_stay_below_one(dtype):
    ge.manual_seed(0)
    x = wide(ge.rand(20_000, dtype=dtype, device="cpu"))
    assert 0 <= x.min() < 0.01
    assert 0.99 < x.max() < 1
    assert abs(x.mean() - 0.5) < 0.02


@pytest.mark.pytorch
def test_it_prints_as_in_pytorch():
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal((3, 4))
    for scale in (1, 100, 1e-6):
        # "dtype=torch.bfloat16" is longer, and may need a line of its own.
        expected = repr(torch.tensor(values * scale, dtype=torch.bfloat16))
        expected = expected.replace(",\n       dtype=torch.", ", dtype=").replace("torch.", "")
        assert repr(bfloat16(values * scale)).replace(",\n       dtype=", ", dtype=") == expected


@pytest.mark.pytorch
@pytest.mark.parametrize("first", DTYPES)
def test_promotion(first):
    torch = pytest.importorskip("torch")
    second = "bfloat16"
    for shapes in itertools.product([(2,), ()], repeat=2):
        pair = [ge.ones(shape, dtype=d) for shape, d in zip(shapes, (first, second), strict=True)]
        theirs = [
            torch.ones(shape, dtype=getattr(torch, d))
            for shape, d in zip(shapes, (first, second), strict=True)
        ]
        expected = str(torch.result_type(*theirs)).removeprefix("torch.")
        for a, b in (pair, pair[::-1]):
            assert str(ge.result_type(a, b)) == expected
            assert str((a + b).dtype) == str((a * b).dtype) == expected


@pytest.mark.parametrize("number", [2, 2.5, True])
def test_a_number_leaves_the_dtype(number):
    x = bfloat16([1.0, 2.0, 3.0])
    for result in (x + number, number - x, x * number, x / number, number / x, x**number):
        assert result.dtype == BF16
    assert (x < number).dtype == np.bool_
    x += number
    assert x.dtype == BF16


def test_a_number_is_not_rounded_before_it_is_used():
    # 257 and 0.001 have more than 8 significant bits: rounded first they would give another result.
    x = bfloat16([1.0, 3.0])
    assert (x + 257).tolist() == [258.0, 260.0]
    assert (x * 1.00390625).tolist() == bfloat16([1.00390625, 3.01171875]).tolist()


def test_gradients_and_defaults_are_for_floating_point():
    x = bfloat16([1.0], requires_grad=True)
    assert x.requires_grad
    ge.set_default_dtype(BF16)
    try:
        assert ge.ones(2, device="cpu").dtype == BF16
    finally:
        ge.set_default_dtype(ge.float32)
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype"):
        ge.Tensor(np.zeros(2, [("field", "f4")])).requires_grad_()
    with pytest.raises(TypeError, match="tensors hold float, integer and bool types"):
        ge.zeros(2, dtype=np.dtype("V2"), device="cpu")


def test_convolution_needs_cuda():
    x, weight = (ge.ones(1, 1, 3, 3, dtype=BF16, device="cpu") for _ in range(2))
    with pytest.raises(TypeError, match=r"conv2d: .*float32 or float64 on cpu.*bfloat16"):
        ge.conv2d(x, weight)


# ---- accuracy ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sums_are_made_in_float32(dtype):
    # In bfloat16 itself 256 + 1 is 256, in float16 2048 + 1 is 2048.
    x = ge.ones(4096, 2, dtype=dtype, device="cpu")
    assert x.sum().item() == 8192
    assert x.sum(0).tolist() == [4096, 4096]
    assert x.mean().item() == 1
    np.testing.assert_allclose(x.norm().item(), 8192**0.5, rtol=EPSILON)
    assert x.cumsum(0)[-1].tolist() == [4096, 4096]
    assert x.var().item() == 0
    x = ge.ones(1, 2, dtype=dtype, device="cpu").requires_grad_()
    (x + ge.zeros(4096, 2, dtype=dtype, device="cpu")).sum().backward()
    assert x.grad.tolist() == [[4096, 4096]]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_losses_of_many_samples_have_the_right_mean(dtype):
    scores = ge.zeros(5000, 4, dtype=dtype, device="cpu").requires_grad_()
    target = ge.zeros(5000, dtype=ge.int64, device="cpu")
    loss = ge.cross_entropy(scores, target)
    assert abs(loss.item() - np.log(4)) < 0.01
    loss.backward()
    assert scores.grad.dtype == scores.dtype
    expected = np.array([-0.75, 0.25, 0.25, 0.25]) / 5000
    np.testing.assert_allclose(wide(scores.grad)[7], expected, rtol=0.01)
    probabilities = ge.softmax(scores.detach() + 1, 0)
    np.testing.assert_allclose(wide(probabilities), 1 / 5000, rtol=0.01)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_layer_norm_of_many_elements(dtype):
    values = np.random.default_rng(0).uniform(1, 2, (2, 5000))
    low = ge.tensor(values, dtype=dtype, device="cpu", requires_grad=True)
    high = low.detach().double().requires_grad_()
    results = []
    for x in (low, high):
        weight, bias = (ge.full((5000,), 0.5, dtype=x.dtype).requires_grad_() for _ in range(2))
        out = ge.layer_norm(x, 5000, weight, bias)
        out.backward(ge.ones_like(out) * (out.detach() > 0.5).to(x.dtype))
        results.append((out, x.grad, weight.grad, bias.grad))
    for found, expected in zip(*results, strict=True):
        assert found.dtype == low.dtype
        assert_near(found, expected, 2 * EPSILON, 0)


def test_indices_named_often_add_up():
    x = ge.zeros(2, dtype=BF16, device="cpu").requires_grad_()
    index = ge.zeros(1024, dtype=ge.int64, device="cpu")
    x[index].sum().backward()
    assert x.grad.tolist() == [1024, 0]
    ones = ge.ones(1024, dtype=BF16, device="cpu")
    assert ge.index_add(x.detach(), 0, index, ones).tolist() == [1024, 0]


def test_an_activation_of_several_steps_rounds_once():
    x = bfloat16(np.linspace(-4, 4, 101))
    for function in (ge.sigmoid, ge.rsqrt, ge.functional.silu, ge.functional.gelu):
        operand = ge.abs(x) + 0.5
        expected = function(ge.tensor(wide(operand), device="cpu")).numpy()
        np.testing.assert_allclose(wide(function(operand)), expected, rtol=EPSILON)


# ---- every operation -----------------------------------------------------------------------------


def leaves(case: Case, dtype: object) -> list[ge.Tensor]:
    """Return the row's inputs, rounded to bfloat16, in a dtype; floats require grad."""
    made = []
    for array in case.inputs:
        is_float = array.dtype.kind == "f"
        values = array.astype(BF16).astype(np.float64) if is_float else array
        leaf = ge.tensor(values, dtype=dtype if is_float else None, device="cpu")
        made.append(leaf.requires_grad_(is_float and case.differentiable))
    return made


def assert_near(found: ge.Tensor, expected: ge.Tensor, share: float, least: float) -> None:
    values = wide(expected)
    atol = share * np.abs(values[np.isfinite(values)]).max(initial=0) + least
    np.testing.assert_allclose(wide(found), values, rtol=0, atol=atol)


@pytest.mark.parametrize("case", CASES, ids=_identifier)
def test_operation(case):
    check(case, leaves(case, BF16), *exact(case))


@pytest.mark.parametrize("case", ON_STAND_IN, ids=_identifier)
def test_operation_by_emulated_kernels(case, request, monkeypatch):
    high, expected = exact(case)
    request.getfixturevalue("emulated_cuda")
    numpy_gpu.stand_in(monkeypatch)
    check_on_cuda(case, high, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("case", FLOATING, ids=_identifier)
def test_operation_on_a_gpu(case):
    check_on_cuda(case, *exact(case))


def check_on_cuda(case: Case, high: list[ge.Tensor], expected: ge.Tensor) -> None:
    ge.set_default_device("cuda")  # also of tensors that the row makes itself
    low = [leaf.detach().cuda().requires_grad_(leaf.requires_grad) for leaf in leaves(case, BF16)]
    check(case, low, high, expected)


def exact(case: Case) -> tuple[list[ge.Tensor], ge.Tensor]:
    """Return the row's inputs and result in float64, with the inputs' gradients."""
    high = leaves(case, ge.float64)
    expected = case.run(ge, *high)
    if expected.requires_grad:
        expected.backward(ge.tensor(weights_of(expected), device="cpu"))
    return high, expected


def weights_of(output: ge.Tensor) -> np.ndarray:
    return np.cos(np.arange(output.numel())).reshape(output.shape)


def check(case: Case, low: list[ge.Tensor], high: list[ge.Tensor], expected: ge.Tensor) -> None:
    """Compare the row's result and gradients of inputs in bfloat16 with the exact ones."""
    found = case.run(ge, *low)
    assert found.dtype == (BF16 if expected.dtype == ge.float64 else expected.dtype)
    assert_near(found, expected, 4 * EPSILON, 1e-3)
    if not found.requires_grad:
        return
    found.backward(bfloat16(weights_of(found)).to(found.device))
    # logsumexp's gradient is exp(x - out): of large results the rounding is large as well.
    share = 0.2 if case.note == "large" else 10 * EPSILON
    for one, other in zip(low, high, strict=True):
        if one.requires_grad:
            assert one.grad.dtype == BF16
            assert_near(one.grad, other.grad, share, 2e-2)


def test_second_derivatives():
    x = bfloat16([0.5, -1.5], requires_grad=True)
    (first,) = ge.autograd.grad((ge.tanh(x) * 1.5 + x**3).sum(), [x], create_graph=True)
    (second,) = ge.autograd.grad(first.sum(), [x])
    values = np.array([0.5, -1.5])
    slope = 1 - np.tanh(values) ** 2
    assert first.dtype == second.dtype == BF16
    np.testing.assert_allclose(wide(first), 1.5 * slope + 3 * values**2, rtol=0.02)
    np.testing.assert_allclose(wide(second), -3 * np.tanh(values) * slope + 6 * values, rtol=0.03)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("optimizer", [SGD, Adam])
def test_optimizers_step(optimizer, dtype):
    x = ge.tensor([1.0, -2.0], dtype=dtype, device="cpu", requires_grad=True)
    steps = optimizer([x], lr=0.25)
    (x * x).sum().backward()
    steps.step()
    expected = [0.5, -1.0] if optimizer is SGD else [0.75, -1.75]
    assert (x.dtype, x.tolist()) == (dtype, expected)

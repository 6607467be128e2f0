"""Kernels of users: values and derivatives on the CPU, on emulated CUDA, and on a GPU."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import GradcheckError, kernel


@kernel(
    cuda="x / (1 + fabs(x))",
    pullbacks={"x": lambda grad, x: grad / (1 + abs(x)) ** 2},
)
def softsign(x):
    return x / (1 + abs(x))


@kernel(
    cuda="if (x > y) return x * y; return x + y;",
    pullbacks={
        "x": lambda grad, x, y: grad * ge.where(x > y, y, 1.0),
        "y": lambda grad, x, y: grad * ge.where(x > y, x, 1.0),
    },
)
def joined(x, y):
    if x > y:
        return x * y
    return x + y


@kernel(
    cuda="""
    template <typename T>
    __global__ void running_sum(T* out, const T* x, long long rows, long long columns) {
        const long long row = (long long)blockIdx.x * blockDim.x + threadIdx.x;
        if (row >= rows) return;
        T sum = 0;
        for (long long column = 0; column < columns; ++column) {
            sum += x[row * columns + column];
            out[row * columns + column] = sum;
        }
    }
    """,
    shape=lambda x: x.shape,
    launch=lambda x: (-(-x.shape[0] // 64), 64, x.shape),
)
def running_sum(out, x):
    for row in range(x.shape[0]):
        total = x[row, 0] * 0
        for column in range(x.shape[1]):
            total += x[row, column]
            out[row, column] = total


running_sum.pullbacks(x=lambda grad: running_sum(grad[:, ::-1])[:, ::-1])


@kernel(cuda="x * 2", pullbacks={"x": lambda grad: grad * 2})
def inconsistent(x):
    return x * 2 + 1


@kernel(cuda="x * x", pullbacks={"x": lambda grad, x: grad * x})
def wrongly_derived(x):
    return x * x


def random(*shape: int) -> ge.Tensor:
    return ge.tensor(np.random.default_rng(0).standard_normal(shape))


def test_values_gradients_and_name():
    x = ge.tensor([[-1.0, 0.0], [1.0, 3.0]], requires_grad=True)
    y = softsign(x)
    assert y.tolist() == [[-0.5, 0.0], [0.5, 0.75]]
    assert repr(y.grad_fn) == "<SoftsignBackward0>"
    assert softsign.__name__ == "softsign"
    y.sum().backward()
    assert x.grad.tolist() == [[0.25, 1.0], [0.25, 0.0625]]


def test_broadcasting_numbers_and_dtypes():
    x, y = ge.ones(3, 1, requires_grad=True), ge.zeros(2, dtype=ge.float64, requires_grad=True)
    z = joined(x, y)
    assert (z.shape, z.dtype) == ((3, 2), ge.float64)
    z.sum().backward()
    assert (x.grad.shape, x.grad.dtype, y.grad.tolist()) == ((3, 1), ge.float32, [3.0, 3.0])
    assert joined(ge.ones(2), 5).tolist() == [6.0, 6.0]
    assert joined(ge.tensor([3]), 2).dtype == ge.float32
    assert joined(np.full(2, 3.0), 2.0).tolist() == [6.0, 6.0]
    half = joined(ge.ones(2, dtype=ge.float16), ge.zeros(2, dtype=ge.float16))
    assert (half.dtype, half.tolist()) == (ge.float16, [0.0, 0.0])


def test_checks_pass():
    for operation, inputs in (
        (softsign, (random(3, 2),)),
        (joined, (random(3, 1), random(2) + 0.1)),
        (running_sum, (random(3, 4),)),
    ):
        assert "first and second derivatives agree" in operation.check(*inputs)


@pytest.mark.parametrize("operation", [softsign, joined, running_sum])
def test_checks_pass_on_emulated_cuda(emulated_cuda, operation):
    inputs = {softsign: (random(3, 2),), joined: (random(3, 1), random(2) + 0.1)}
    said = operation.check(*inputs.get(operation, (random(3, 4),)))
    assert said.endswith("derivatives agree with differences; CUDA agrees with the CPU")


@pytest.mark.gpu
@pytest.mark.parametrize("operation", [softsign, running_sum])
def test_checks_and_gradients_on_a_gpu(operation):
    assert operation.check(random(300, 70)).endswith("CUDA agrees with the CPU")
    here = random(300, 70).requires_grad_()
    there = here.detach().cuda().requires_grad_()
    operation(here).sum().backward()
    operation(there).sum().backward()
    np.testing.assert_allclose(there.grad.cpu().numpy(), here.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", [ge.float16, ge.float32, ge.float64])
def test_dtypes_and_layouts_on_emulated_cuda(emulated_cuda, dtype):
    x = np.random.default_rng(0).standard_normal((2, 3, 4)).astype(dtype).transpose(2, 0, 1)
    y = softsign(x)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    np.testing.assert_allclose(y, x / (1 + abs(x)), rtol=2e-3)
    assert softsign(np.ones((0, 2), dtype)).shape == (0, 2)
    assert softsign(np.ones((), dtype)).item() == 0.5


def test_checks_find_what_is_wrong(emulated_cuda):
    with pytest.raises(GradcheckError, match="Jacobian mismatch"):
        wrongly_derived.check(random(3))
    with pytest.raises(GradcheckError, match="inconsistent: CUDA and the CPU must give the same"):
        inconsistent.check(random(3))


def test_a_source_that_does_not_compile_is_quoted(emulated_cuda):
    @kernel(cuda="x + nothing_known")
    def broken(x):
        return x

    with pytest.raises(RuntimeError, match="nothing_known"):
        broken(ge.ones(2))


@pytest.mark.nvrtc
@pytest.mark.parametrize("architecture", ["sm_75", "sm_90a"])
def test_the_shipped_compiler_takes_the_sources(architecture):
    from gradengine.kernels.cuda import compiler, custom

    text = custom._elementwise_source("x / (1 + fabs(x)) * y", ("x", "y"))
    names = [f"elementwise<{t}, {t}, {t}>" for t in ("float16", "bfloat16", "float", "double")]
    program = compiler.compile_program(custom.source_file("product", text), names, architecture)
    assert set(program.symbols) == set(names)


def test_mistakes_are_said():
    with pytest.raises(TypeError, match="shape and launch come together"):
        kernel(cuda="", shape=lambda x: x.shape)(lambda out, x: None)
    with pytest.raises(TypeError, match="no attributes if it is elementwise"):
        kernel(cuda="x")(lambda x, *, y: x)
    with pytest.raises(TypeError, match=r"softsign: takes 1 inputs \(x\); got 2"):
        softsign(ge.ones(1), 2)
    with pytest.raises(TypeError, match="softsign: inputs must be Tensors, arrays or numbers"):
        softsign(3.0)
    with pytest.raises(TypeError, match="a pullback must be for one of"):
        kernel(cuda="x", pullbacks={"z": lambda grad: grad})(lambda x: x)

"""Function: results, gradients and errors, beside PyTorch's where it is installed."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import gradcheck, gradgradcheck
from gradengine.autograd.function import Function, once_differentiable


def engines() -> list[Any]:
    return [pytest.param(make, id=name) for name, make in (("ge", ours), ("torch", theirs))]


class Engine:
    """The words in which a test speaks to either library."""

    def __init__(self, module: Any, once: Any) -> None:
        self.module, self.once_differentiable = module, once
        self.Function, self.grad = module.autograd.Function, module.autograd.grad

    def tensor(self, values: Any, requires_grad: bool = True) -> Any:
        return self.module.tensor(values, dtype=self.module.float64, requires_grad=requires_grad)


def ours() -> Engine:
    return Engine(ge, once_differentiable)


def theirs() -> Engine:
    torch = pytest.importorskip("torch")
    return Engine(torch, torch.autograd.function.once_differentiable)


@pytest.fixture(params=engines())
def engine(request: pytest.FixtureRequest) -> Engine:
    """The test runs with this library, and with PyTorch: what it asserts holds for both."""
    return request.param()


def cube(engine: Engine) -> Any:
    class Cube(engine.Function):
        @staticmethod
        def forward(ctx, x, power=3):
            ctx.save_for_backward(x)
            ctx.power = power
            return x**power

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return grad * ctx.power * x ** (ctx.power - 1), None

    return Cube


def test_gradients_and_name(engine):
    x = engine.tensor([1.0, 2.0])
    y = cube(engine).apply(x, 3)
    assert "grad_fn=<CubeBackward>" in repr(y)
    assert y.grad_fn.name() == "CubeBackward"
    assert y.grad_fn.power == 3
    assert y.grad_fn.saved_tensors[0].tolist() == [1.0, 2.0]
    y.sum().backward()
    assert x.grad.tolist() == [3.0, 12.0]


def test_derivatives_of_higher_order_go_through_backward(engine):
    x = engine.tensor([1.0, 2.0])
    y = cube(engine).apply(x, 3)
    (first,) = engine.grad(y.sum(), x, create_graph=True)
    (second,) = engine.grad(first.sum(), x, create_graph=True)
    (third,) = engine.grad(second.sum(), x)
    assert (second.tolist(), third.tolist()) == ([6.0, 12.0], [6.0, 6.0])


def test_forward_beside_setup_context(engine):
    class Scale(engine.Function):
        @staticmethod
        def forward(x, factor):
            return x * factor

        @staticmethod
        def setup_context(ctx, inputs, output):
            ctx.factor = inputs[1]
            ctx.save_for_backward(output)

        @staticmethod
        def backward(ctx, grad):
            assert ctx.saved_tensors[0].tolist() == [3.0]
            return grad * ctx.factor, None

    x = engine.tensor([1.5])
    Scale.apply(x, 2.0).backward()
    assert x.grad.tolist() == [2.0]


def test_needs_input_grad_and_arguments_that_are_no_tensors(engine):
    seen = []

    class Product(engine.Function):
        @staticmethod
        def forward(ctx, x, y, name, number):
            ctx.save_for_backward(x, y, None)
            return x * y

        @staticmethod
        def backward(ctx, grad):
            x, y, nothing = ctx.saved_tensors
            seen.append((ctx.needs_input_grad, nothing))
            return grad * y, grad * x, None, None

    x, y = engine.tensor([2.0]), engine.tensor([5.0], requires_grad=False)
    Product.apply(x, y, "name", 7).backward()
    assert seen == [((True, False, False, False), None)]
    assert x.grad.tolist() == [5.0]
    assert y.grad is None


def sine_and_cosine(engine: Engine, grads: list[Any], materialize: bool = True) -> Any:
    class SineCosine(engine.Function):
        @staticmethod
        def forward(ctx, x):
            sine, cosine = x.sin(), x.cos()
            ctx.save_for_backward(sine, cosine)
            ctx.set_materialize_grads(materialize)
            return sine, cosine

        @staticmethod
        def backward(ctx, by_sine, by_cosine):
            grads.append((by_sine, by_cosine))
            sine, cosine = ctx.saved_tensors
            total = None
            if by_sine is not None:
                total = by_sine * cosine
            if by_cosine is not None:
                total = -by_cosine * sine if total is None else total - by_cosine * sine
            return total

    return SineCosine


def test_several_results_share_one_backward(engine):
    grads: list[Any] = []
    x = engine.tensor([0.5, 1.0])
    sine, cosine = sine_and_cosine(engine, grads).apply(x)
    (2 * sine + 3 * cosine).sum().backward()
    expected = 2 * np.cos([0.5, 1.0]) - 3 * np.sin([0.5, 1.0])
    np.testing.assert_allclose(x.grad.tolist(), expected, rtol=1e-12)
    assert len(grads) == 1
    assert sine.grad_fn.name() == cosine.grad_fn.name() == "SineCosineBackward"


@pytest.mark.parametrize("materialize", [True, False])
def test_a_result_that_nothing_depends_on_gives_zeros_or_none(engine, materialize):
    grads: list[Any] = []
    x = engine.tensor([0.5])
    _, cosine = sine_and_cosine(engine, grads, materialize).apply(x)
    cosine.backward()
    by_sine = grads[0][0]
    assert by_sine.tolist() == [0.0] if materialize else by_sine is None
    np.testing.assert_allclose(x.grad.tolist(), -np.sin([0.5]))


def test_saved_results_are_differentiated(engine):
    x = engine.tensor([0.3, 0.7])
    sine, cosine = sine_and_cosine(engine, []).apply(x)
    (first,) = engine.grad((sine * cosine).sum(), x, create_graph=True)
    (second,) = engine.grad(first.sum(), x)
    np.testing.assert_allclose(second.tolist(), -2 * np.sin(2 * np.array([0.3, 0.7])), rtol=1e-12)


def test_none_means_no_gradient(engine):
    class Nothing(engine.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * y

        @staticmethod
        def backward(ctx, grad):
            return None, grad * 3, None, None  # more than there are arguments, but None

    x, y = engine.tensor([2.0]), engine.tensor([5.0])
    Nothing.apply(x * 1, y).backward()
    assert x.grad is None
    assert y.grad.tolist() == [3.0]
    assert engine.grad(Nothing.apply(x, y), (x, y), allow_unused=True)[0] is None


def returning(engine: Engine, value: Any) -> Any:
    class Bad(engine.Function):
        @staticmethod
        def forward(ctx, x, y):
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return value(grad) if callable(value) else value

    return Bad


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (
            lambda grad: grad,
            RuntimeError,
            r"BadBackward returned an incorrect number of gradients \(expected 2, got 1\)",
        ),
        (
            lambda grad: (grad.reshape(1, 2)[:, [0, 0, 0]], None),
            RuntimeError,
            r"invalid gradient at index 0 - got \[1, 3\] but expected shape compatible with \[2\]",
        ),
    ],
)
def test_wrong_gradients_are_errors(engine, value, error, match):
    y = returning(engine, value).apply(engine.tensor([1.0, 2.0]), "text")
    with pytest.raises(error, match=match):
        y.sum().backward()


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ((3, None), TypeError, r"expected Variable or None \(got int\)"),
        (
            lambda grad: (grad, grad),
            RuntimeError,
            "gradient different from None at position 1, but the corresponding forward input was not",
        ),
    ],
)
def test_gradients_of_a_wrong_type_are_errors(value, error, match):
    engine = ours()  # PyTorch's are RuntimeError for both, and count positions from 1 in the second
    y = returning(engine, value).apply(engine.tensor([1.0, 2.0]), "text")
    with pytest.raises(error, match=match):
        y.sum().backward()


def test_a_gradient_is_summed_and_converted_to_its_input(engine):
    class Wide(engine.Function):
        @staticmethod
        def forward(ctx, x):
            return x + engine.module.zeros((3, 2), dtype=engine.module.float64)

        @staticmethod
        def backward(ctx, grad):
            return grad.double()

    x = engine.module.ones(2, requires_grad=True)
    Wide.apply(x).sum().backward()
    assert x.grad.tolist() == [3.0, 3.0]
    assert x.grad.dtype == engine.module.float32


def test_results_marked_and_of_integers_need_no_gradient(engine):
    class Ordered(engine.Function):
        @staticmethod
        def forward(ctx, x):
            order = x.argsort()
            doubled, halved = x * 2, x / 2
            ctx.mark_non_differentiable(order, halved)
            return order, doubled, halved, "text"

        @staticmethod
        def backward(ctx, *grads):
            assert [None if g is None else g.tolist() for g in grads[1:]] == [
                [1.0, 1.0],
                [0.0, 0.0],
                None,
            ]
            return grads[1] * 2

    x = engine.tensor([2.0, 1.0])
    order, doubled, halved, text = Ordered.apply(x)
    assert [order.requires_grad, doubled.requires_grad, halved.requires_grad] == [
        False,
        True,
        False,
    ]
    assert text == "text"
    doubled.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


def test_once_differentiable(engine):
    class Once(engine.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @engine.once_differentiable
        def backward(ctx, grad):
            assert not engine.module.is_grad_enabled()
            return grad * 2 * ctx.saved_tensors[0]

    x, weight = engine.tensor([3.0]), engine.tensor([1.0])
    (first,) = engine.grad(Once.apply(x) * weight, x, create_graph=True)
    assert first.tolist() == [6.0]
    with pytest.raises(RuntimeError, match="differentiate twice a function that was marked"):
        first.backward()
    Once.apply(x).backward()
    assert x.grad.tolist() == [6.0]


def test_saved_tensors_are_checked_and_freed(engine):
    x = engine.tensor([1.0])
    y = x * 2
    z = cube(engine).apply(y, 2)
    with engine.module.no_grad():
        y += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()
    z = cube(engine).apply(x, 2)
    z.backward()
    with pytest.raises(RuntimeError, match="[bB]ackward through the graph a second time"):
        z.backward()
    with pytest.raises(RuntimeError, match="already been freed"):
        _ = z.grad_fn.saved_tensors
    with pytest.raises(TypeError, match="can only save variables"):
        saving_a_number(engine).apply(x)


def saving_a_number(engine: Engine) -> Any:
    class Number(engine.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(3)
            return x * 1

    return Number


def test_an_input_changed_in_place_and_marked_dirty(engine):
    class Double(engine.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x *= 2
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    x = engine.tensor([1.0, 2.0])
    y = x * 3
    z = Double.apply(y)
    assert z is y
    assert z.grad_fn.name() == "DoubleBackward"
    z.sum().backward()
    assert x.grad.tolist() == [6.0, 6.0]
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        Double.apply(x)


def test_marked_dirty_but_not_returned(engine):
    class Dropped(engine.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mark_dirty(x)
            x *= 2
            return x * 1

        @staticmethod
        def backward(ctx, grad):
            return grad * 2

    with pytest.raises(RuntimeError, match="must all be outputs of the Function"):
        Dropped.apply(engine.tensor([1.0]) * 1)


def test_an_input_changed_in_secret_is_an_error():
    class Secret(Function):
        @staticmethod
        def forward(ctx, x):
            x *= 2
            return x * 1

    with pytest.raises(RuntimeError, match=r"changed its argument 0 in place.*mark_dirty"):
        Secret.apply(ge.ones(2, requires_grad=True) * 1)


def test_an_input_that_is_returned_as_it_is_gets_another_place(engine):
    class Same(engine.Function):
        @staticmethod
        def forward(ctx, x):
            return x

        @staticmethod
        def backward(ctx, grad):
            return grad * 5

    x = engine.tensor([1.0])
    y = Same.apply(x)
    assert y is not x
    assert x.is_leaf
    y.backward()
    assert x.grad.tolist() == [5.0]


def test_nothing_is_recorded_without_need(engine):
    x = engine.tensor([1.0], requires_grad=False)
    assert cube(engine).apply(x, 2).grad_fn is None
    with engine.module.no_grad():
        assert not cube(engine).apply(engine.tensor([1.0]), 2).requires_grad


def test_what_is_missing_is_said(engine):
    class Empty(engine.Function):
        pass

    class Forward(engine.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 1

    class Both(Forward):
        @staticmethod
        def backward(ctx, grad):
            return grad

        @staticmethod
        def vjp(ctx, grad):
            return grad

    x = engine.tensor([1.0])
    with pytest.raises(NotImplementedError, match="implement the forward"):
        Empty.apply(x)
    with pytest.raises(NotImplementedError, match="either the backward or vjp"):
        Forward.apply(x).backward()
    with pytest.raises(RuntimeError, match="both 'backward' and 'vjp'"):
        Both.apply(x).backward()


def test_vjp_is_another_name_of_backward(engine):
    class Named(engine.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 4

        @staticmethod
        def vjp(ctx, grad):
            return grad * 4

    x = engine.tensor([1.0])
    Named.apply(x).backward()
    assert x.grad.tolist() == [4.0]


def test_a_function_is_not_an_object():
    with pytest.raises(RuntimeError, match=r"Cube\.apply"):
        cube(ours())()


def test_gradients_by_differences():
    def both(x):
        sine, cosine = sine_and_cosine(ours(), []).apply(x)
        return sine * 2, cube(ours()).apply(cosine, 3)[0]

    x = ge.tensor([0.4, 1.2], dtype=ge.float64, requires_grad=True)
    assert gradcheck(both, x)
    assert gradgradcheck(both, x)


def test_nothing_is_kept_alive_in_a_cycle():
    gc.disable()
    try:
        x = ge.tensor([0.5], requires_grad=True)
        sine, cosine = sine_and_cosine(ours(), []).apply(x)
        watched = [weakref.ref(sine), weakref.ref(sine.grad_fn), weakref.ref(cosine)]
        del sine, cosine
        assert [ref() for ref in watched] == [None, None, None]
        y = cube(ours()).apply(x, 2)
        node = weakref.ref(y.grad_fn)
        y.backward()
        del y
        assert node() is None
    finally:
        gc.enable()


def test_hooks_see_the_gradients_of_results():
    x = ge.tensor([0.5], requires_grad=True)
    sine, cosine = sine_and_cosine(ours(), []).apply(x)
    seen = []
    sine.register_hook(lambda grad: seen.append(grad.item()))
    cosine.retain_grad()
    (sine + 2 * cosine).backward()
    assert seen == [1.0]
    assert cosine.grad.item() == 2.0

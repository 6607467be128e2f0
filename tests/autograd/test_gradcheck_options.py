"""gradcheck and gradgradcheck: what each option asks for, beside PyTorch's where it is installed."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import GradcheckError, gradcheck, gradgradcheck


class Engine:
    """The words in which a test speaks to either library."""

    def __init__(self, module: Any) -> None:
        self.module, self.autograd = module, module.autograd
        self.GradcheckError = module.autograd.gradcheck.__globals__["GradcheckError"]

    def tensor(self, values: Any) -> Any:
        return self.module.tensor(values, dtype=self.module.float64, requires_grad=True)

    def function(self, backward: Any) -> Any:
        """Return x -> (2 x, 3 x) with this backward, given the gradients of both."""

        class Doubled(self.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.set_materialize_grads(False)
                return x * 2, x * 3

        Doubled.backward = staticmethod(lambda ctx, *grads: backward(*grads))
        return Doubled.apply


@pytest.fixture(params=["ge", "torch"])
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(ge if request.param == "ge" else pytest.importorskip("torch"))


@pytest.mark.parametrize("fast_mode", [False, True])
def test_right_derivatives_pass(engine, fast_mode):
    x, y = engine.tensor([[0.5, -1.5]]), engine.tensor([[2.0], [0.3]])
    check, check_twice = engine.autograd.gradcheck, engine.autograd.gradgradcheck
    assert check(lambda x, y: (x * y, (x + y).sin()), (x, y), fast_mode=fast_mode)
    assert check_twice(lambda x, y: (x * y, (x + y).sin()), (x, y), fast_mode=fast_mode)
    assert check_twice(lambda x: x**3, (x,), gen_non_contig_grad_outputs=True)


@pytest.mark.parametrize("fast_mode", [False, True])
def test_wrong_derivatives_are_found(engine, fast_mode):
    function = engine.function(lambda a, b: a * 2.1)
    options = {"check_undefined_grad": False, "fast_mode": fast_mode}
    x = engine.tensor([0.5, -1.5])
    with pytest.raises(
        engine.GradcheckError, match="mismatch for output 0 with respect to input 0"
    ):
        engine.autograd.gradcheck(lambda x: function(x)[0], (x,), **options)
    assert not engine.autograd.gradcheck(
        lambda x: function(x)[0], (x,), raise_exception=False, **options
    )


def test_inputs_are_looked_at(engine):
    x = engine.tensor([0.5])
    with pytest.raises(ValueError, match="at least one input tensor to require gradient"):
        engine.autograd.gradcheck(lambda x: x, (x.detach(),))
    single = engine.module.ones(2, requires_grad=True)
    with pytest.warns(UserWarning, match="requires gradient and is not a double precision"):
        engine.autograd.gradcheck(lambda x: x * 2, (single,), eps=1e-2, atol=1e-2)
    with pytest.raises(RuntimeError, match="dimension with stride 0"):
        engine.autograd.gradcheck(lambda x: x * 2, (x.expand(3),))


def test_backward_that_gives_another_result_each_time(engine):
    counter = itertools.count()
    function = engine.function(lambda a, b: a * (2 + 1e-9 * next(counter)))

    def first(x):
        return function(x)[0]

    x = engine.tensor([0.5])
    with pytest.raises(engine.GradcheckError, match="Backward is not reentrant"):
        engine.autograd.gradcheck(first, (x,), check_undefined_grad=False)
    assert engine.autograd.gradcheck(first, (x,), nondet_tol=1e-6, check_undefined_grad=False)


def test_backward_that_ignores_its_gradient(engine):
    function = engine.function(
        lambda a, b: engine.module.full((1,), 2.0, dtype=engine.module.float64)
    )
    with pytest.raises(engine.GradcheckError, match="backward not multiplied by grad_output"):
        engine.autograd.gradcheck(lambda x: function(x)[0], (engine.tensor([0.5]),))


def test_backward_must_take_undefined_gradients_for_zeros():
    x = ge.tensor([0.5], dtype=ge.float64, requires_grad=True)
    right = {(True, False): 2, (False, True): 3}
    function = Engine(ge).function(
        lambda a, b: (a if b is None else b) * right.get((b is None, a is None), 7)
    )
    with pytest.raises(GradcheckError, match="handle undefined output grads as zeros"):
        gradcheck(function, x)
    assert gradcheck(function, x, check_undefined_grad=False)


def test_outputs_that_need_no_gradient_must_not_change(engine):
    x = engine.tensor([0.5])
    assert engine.autograd.gradcheck(lambda x: x.detach() * 0, (x,))
    with pytest.raises(engine.GradcheckError, match="expected to be zero"):
        engine.autograd.gradcheck(lambda x: x.detach() * 2, (x,))


def test_inputs_are_left_as_they_were():
    x = ge.tensor([[0.1, 0.2], [0.3, 0.4]], dtype=ge.float64, requires_grad=True)
    before = x.array.copy()
    with pytest.raises(ZeroDivisionError):
        gradcheck(lambda x: 1 / 0, x)
    assert gradcheck(lambda x: x.T @ x, x)
    np.testing.assert_array_equal(x.array, before)


@pytest.mark.parametrize("option", ["check_forward_ad", "check_batched_grad", "masked"])
def test_what_is_not_there_is_refused(option):
    x = ge.tensor([0.5], dtype=ge.float64, requires_grad=True)
    with pytest.raises(NotImplementedError, match=f"{option} must be"):
        gradcheck(ge.exp, x, **{option: True})
    assert gradcheck(ge.exp, x, check_forward_ad=False, masked=False, check_backward_ad=True)
    with pytest.raises(TypeError, match="unexpected keyword argument 'epsilon'"):
        gradgradcheck(ge.exp, x, epsilon=1)


def test_empty_and_zero_dimensional_inputs(engine):
    empty, number = engine.tensor(np.zeros((0, 2)).tolist()), engine.tensor(0.5)
    assert engine.autograd.gradcheck(lambda x, y: (x * 2, y.sin()), (empty, number))

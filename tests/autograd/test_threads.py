"""Threads: each has its own modes, and backward may run in several at once, also over shared parts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autocast_mode import autocast_mode
from gradengine.autograd import graph
from gradengine.autograd.checkpoint import checkpoint
from gradengine.autograd.saved_hooks import current_hooks
from gradengine.nn import functional as F

THREADS = 4


@pytest.fixture(autouse=True)
def _switch_often():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(work: Callable[[int], Any], count: int = THREADS) -> list[Any]:
    """Call work(0), work(1), ... at once, and return what they return; raises what one of them raises."""
    results: dict[int, Any] = {}
    failures: list[BaseException] = []
    together = threading.Barrier(count)

    def run(index: int) -> None:
        try:
            together.wait(30)
            results[index] = work(index)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for failure in failures:
        raise failure
    return [results[index] for index in range(count)]


# ---- modes ---------------------------------------------------------------------------------------


def test_modes_begin_anew_in_each_thread():
    def work(index):
        return (
            ge.is_grad_enabled(),
            current_hooks(),
            autocast_mode.dtype,
            ge.ones(1, requires_grad=True),
        )

    with (
        ge.no_grad(),
        graph.saved_tensors_hooks(lambda t: t, lambda t: t),
        ge.autocast("cuda", dtype=ge.float16),
    ):
        results = in_threads(work)
        assert not ge.is_grad_enabled()
        assert current_hooks() is not None
        assert autocast_mode.dtype == ge.float16
    for enabled, hooks, dtype, x in results:
        assert (enabled, hooks, dtype) == (True, None, None)
        assert (x * 2).requires_grad


def test_modes_of_one_thread_are_not_seen_in_others():
    x = ge.ones(3, requires_grad=True)

    def work(index):
        packed = []
        blocks = [
            ge.no_grad,
            ge.enable_grad,
            lambda: ge.set_grad_enabled(False),
            lambda: graph.saved_tensors_hooks(
                lambda t: packed.append(t) or t.detach(), lambda t: t
            ),
        ]
        for step in range(300):
            kind = (step + index) % len(blocks)
            with blocks[kind]():
                y = x.exp()
            assert y.requires_grad == (kind in (1, 3))
            assert len(packed) == (kind == 3)
            packed.clear()
            assert ge.is_grad_enabled()

    in_threads(work)


def test_backward_leaves_the_modes_of_other_threads_alone():
    x = ge.ones(3, requires_grad=True)

    def work(index):
        for _ in range(200):
            if index % 2:
                ge.autograd.grad((x * x).sum(), x)
            else:
                (grad,) = ge.autograd.grad((x * x).sum(), x, create_graph=True)
                assert grad.requires_grad

    in_threads(work)


# ---- graphs of their own over shared leaves ------------------------------------------------------


@pytest.mark.parametrize("size", [1, 100_000])
def test_no_share_of_a_shared_leafs_gradient_is_lost(size):
    """Threads accumulate into the same `grad`; NumPy adds up large arrays without holding the lock."""
    x = ge.zeros(size, requires_grad=True)

    def work(index):
        for _ in range(100):
            (x * 1).backward(ge.ones(size))

    in_threads(work)
    assert x.grad is not None
    np.testing.assert_array_equal(x.grad.numpy(), THREADS * 100.0)


def test_a_model_is_shared_by_threads():
    ge.manual_seed(0)
    model = ge.nn.Sequential(
        ge.nn.Linear(6, 8), ge.nn.LayerNorm(8), ge.nn.Tanh(), ge.nn.Linear(8, 3)
    )
    inputs = [ge.randn(5, 6) for _ in range(THREADS)]
    parameters = list(model.parameters())

    def gradients(x):
        loss = F.cross_entropy(model(x), ge.tensor([0, 1, 2, 0, 1]))
        return [grad.numpy() for grad in ge.autograd.grad(loss, parameters)]

    expected = [gradients(x) for x in inputs]

    def work(index):
        for _ in range(40):
            for grad, other in zip(gradients(inputs[index]), expected[index], strict=True):
                np.testing.assert_array_equal(grad, other)

    in_threads(work)


# ---- one graph -----------------------------------------------------------------------------------


class Product(ge.autograd.Function):
    """Two inputs, two results."""

    @staticmethod
    def forward(ctx: Any, x: Any, y: Any) -> Any:
        ctx.save_for_backward(x, y)
        return x * y, x + y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (x, y), (product, total) = ctx.saved_tensors, grads
        return product * y + total, product * x + total


def product(x, w, b):
    first, second = Product.apply(x, w + b)
    return first * second


GRAPHS = {
    "joint": lambda x, w, b: F.batch_norm(
        *(x.reshape(2, 4), None, None, w[:4], b[4:]), training=True
    ).reshape(8),
    "function": product,
    "checkpoint": lambda x, w, b: checkpoint(lambda x: (x * w).exp() + b, x, use_reentrant=False),
    "packed": lambda x, w, b: F.layer_norm((x * x).exp() * w, (8,), w, b),
    "hooked": lambda x, w, b: (x * w).exp() + b,
}


@pytest.mark.parametrize("case", GRAPHS)
def test_threads_walk_the_same_graph(case):
    ge.manual_seed(0)
    x, w, b = (ge.randn(8).requires_grad_() for _ in range(3))
    with (
        graph.saved_tensors_hooks(*[(lambda t: t.detach().clone()), (lambda t: t)])
        if (case == "packed")
        else ge.enable_grad()
    ):
        y = GRAPHS[case](x, w, b)
    if case == "hooked":
        y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2, inputs[1]))
        y.grad_fn.register_prehook(lambda outputs: (outputs[0] * 3,))
    seeds = [ge.randn(8) for _ in range(THREADS)]

    def gradients(seed):
        return [g.numpy() for g in ge.autograd.grad(y, (x, w, b), seed, retain_graph=True)]

    expected = [gradients(seed) for seed in seeds]

    def work(index):
        for _ in range(150):
            for grad, other in zip(gradients(seeds[index]), expected[index], strict=True):
                np.testing.assert_array_equal(grad, other)

    in_threads(work)


def test_hooks_see_the_walk_of_their_own_thread():
    a, b = ge.ones(1, requires_grad=True), ge.ones(1, requires_grad=True)
    y = a * b
    seen = []
    graph.register_multi_grad_hook((a, b), lambda grads: seen.append([g.item() for g in grads]))

    def work(index):
        for _ in range(100):
            y.backward(ge.full((1,), float(index)), retain_graph=True)

    in_threads(work)
    assert sorted(seen) == [[float(index)] * 2 for index in range(THREADS) for _ in range(100)]

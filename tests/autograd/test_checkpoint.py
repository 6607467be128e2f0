"""Checkpoints give the gradients of an ordinary graph, keep less, and notice what would be wrong."""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import checkpoint
from gradengine.models.resnet import BasicBlock


def gradients(function: Callable[..., Any], *inputs: Any) -> list[np.ndarray]:
    """Give the gradients of the sum of squares of what a function returns."""
    out = function(*inputs)
    return [g.numpy() for g in ge.autograd.grad((out * out).sum(), inputs)]


def leaves(*shapes: tuple[int, ...], dtype: Any = ge.float64) -> list[ge.Tensor]:
    ge.manual_seed(0)
    return [ge.randn(*shape, dtype=dtype, requires_grad=True) for shape in shapes]


def block(x: Any, y: Any) -> Any:
    z = (x * y).sigmoid()
    return (z @ y.T).exp() + x.sum()


def test_gradients_are_those_of_an_ordinary_graph() -> None:
    inputs = leaves((3, 4), (3, 4))
    plain = gradients(lambda x, y: block(x, y) * 2, *inputs)
    again = gradients(lambda x, y: checkpoint(block, x, y) * 2, *inputs)
    for a, b in zip(plain, again, strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_function_is_called_once_more_and_only_by_backward() -> None:
    calls = []

    def counted(x: Any) -> Any:
        calls.append(ge.is_grad_enabled())
        return x.exp().sin()

    (x,) = leaves((3,))
    out = checkpoint(counted, x)
    assert len(calls) == 1
    out.sum().backward()
    assert calls == [True, True]
    with ge.no_grad():
        assert not checkpoint(counted, x).requires_grad


def test_keyword_arguments_structures_and_several_outputs() -> None:
    def several(pair: Any, *, scale: Any, names: Any) -> Any:
        a, b = pair
        return {"sum": (a * b).exp(), "rest": [a.sin() * scale, names]}

    a, b, scale = leaves((3,), (3,), (3,))
    found = []
    for call in (several, lambda *x, **y: checkpoint(several, *x, use_reentrant=False, **y)):
        out = call((a, b), scale=scale, names="text")
        assert out["rest"][1] == "text"
        loss = (out["sum"] * out["rest"][0]).sum()
        found.append([g.numpy() for g in ge.autograd.grad(loss, (a, b, scale))])
    np.testing.assert_array_equal(found[0], found[1])


def test_checkpoints_nest() -> None:
    calls = {"inner": 0, "outer": 0}

    def inner(x: Any) -> Any:
        calls["inner"] += 1
        return x.exp().sin()

    def outer(x: Any) -> Any:
        calls["outer"] += 1
        return checkpoint(inner, checkpoint(inner, x).tanh()).cos()

    (x,) = leaves((5,))
    plain = gradients(lambda x: inner(inner(x).tanh()).cos(), x)
    calls["inner"] = 0
    np.testing.assert_array_equal(plain, gradients(lambda x: checkpoint(outer, x), x))
    assert calls == {"inner": 6, "outer": 2}


def test_derivatives_of_second_order() -> None:
    inputs = leaves((2, 3), (2, 3))
    assert ge.autograd.gradgradcheck(lambda x, y: checkpoint(block, x, y), inputs)


def test_random_numbers_are_drawn_again_and_the_stream_goes_on() -> None:
    def noisy(x: Any) -> Any:
        return ge.dropout(x * x, 0.5).exp()

    (x,) = leaves((100,))
    found, after = [], []
    for call in (noisy, lambda x: checkpoint(noisy, x)):
        ge.manual_seed(7)
        found.append(gradients(call, x))
        after.append(ge.rand(3).numpy())
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(after[0], after[1])


def test_without_preserve_rng_state_the_stream_moves() -> None:
    (x,) = leaves((3,))
    before = ge.get_rng_state()
    out = checkpoint(
        lambda x: (x * ge.rand(3, dtype=ge.float64)).exp(), x, preserve_rng_state=False
    )
    between = ge.get_rng_state()
    out.sum().backward()
    assert not ge.equal(before, between)
    assert not ge.equal(between, ge.get_rng_state())


def test_running_statistics_move_once() -> None:
    states, grads = [], []
    for wrapped in (False, True):
        ge.manual_seed(0)
        model = BasicBlock(4, 4)
        x = ge.randn(2, 4, 6, 6, requires_grad=True)
        out = checkpoint(model, x) if wrapped else model(x)
        (out * out).sum().backward()
        states.append({name: value.numpy() for name, value in model.state_dict().items()})
        grads.append([x.grad.numpy(), *(p.grad.numpy() for p in model.parameters())])
    assert states[0]["bn1.num_batches_tracked"] == 1
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)
    for a, b in zip(*grads, strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_frozen_input_stays_frozen() -> None:
    x, y = leaves((3, 4), (3, 4))
    y.requires_grad = False
    plain = ge.autograd.grad(block(x, y).sum(), x)[0]
    again = ge.autograd.grad(checkpoint(block, x, y).sum(), x)[0]
    assert ge.equal(plain, again)
    assert not checkpoint(block, x.detach(), y).requires_grad


def chain(x: Any) -> Any:
    for _ in range(8):
        x = x.sin().exp()
    return x


def test_memory_holds_the_ends_alone_and_is_freed_behind_the_walk() -> None:
    x = ge.zeros(1 << 17, dtype=ge.float64, requires_grad=True)  # 1 MiB
    kept = {}
    for name, call in (("plain", chain), ("checkpoint", lambda x: checkpoint(chain, x))):
        gc.collect()
        tracemalloc.start()
        out = call(x)
        kept[name] = tracemalloc.get_traced_memory()[0] / (1 << 20)
        loss = out.sum()
        del out
        loss.backward()
        x.grad = None
        kept[f"{name}, after"] = tracemalloc.get_traced_memory()[0] / (1 << 20)
        tracemalloc.stop()
    assert kept["plain"] > 7
    assert kept["checkpoint"] < 1.5
    assert kept["checkpoint, after"] < 0.5  # although `loss` still holds the graph


def test_a_second_backward_needs_retain_graph() -> None:
    (x,) = leaves((3,))
    loss = checkpoint(lambda x: x.exp(), x).sum()
    loss.backward(retain_graph=True)
    first = x.grad.clone()
    loss.backward()
    assert ge.equal(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()


def test_a_graph_that_saved_nothing_can_be_walked_again() -> None:
    (x,) = leaves((3,))
    loss = checkpoint(lambda x: x + x, x).sum()
    loss.backward()
    loss.backward()
    assert ge.equal(x.grad, ge.full(3, 4.0, dtype=ge.float64))


@pytest.mark.parametrize(
    ("second", "match"),
    [
        (lambda x: x.exp().exp(), r"checkpoint: fickle must compute .* got 1 operations the first"),
        (lambda x: x.sin(), "ExpBackward0 .*the first time, SinBackward0"),
        (lambda x: ge.cat([x, x]).exp()[:3], "must compute the same"),
        (lambda x: x.float().exp(), "must compute the same"),
    ],
)
def test_a_function_that_changes_is_refused(second: Any, match: str) -> None:
    calls = []

    def fickle(x: Any) -> Any:
        calls.append(x)
        return x.exp() if len(calls) == 1 else second(x)

    (x,) = leaves((3,))
    out = checkpoint(fickle, x)
    with pytest.raises(RuntimeError, match=match):
        out.sum().backward()


def test_the_check_of_saved_values_can_be_left_out() -> None:
    sizes = iter([3, 5, 3, 5])

    def grows(x: Any) -> Any:
        return (x * ge.ones(next(sizes), 1, dtype=ge.float64)).sum(0)

    (x,) = leaves((4,))
    out = checkpoint(grows, x)
    with pytest.raises(RuntimeError, match=r"\(3, 4\).*\(5, 4\)"):
        out.sum().backward()

    def selects(x: Any) -> Any:
        return ge.index_select(x, 0, ge.tensor(range(next(sizes)))).prod()

    out = checkpoint(lambda x: x * 2, x, determinism_check="none")
    out.sum().backward()
    with pytest.raises(ValueError, match="determinism_check must be one of"):
        checkpoint(selects, x, determinism_check="all")
    with pytest.raises(ValueError, match="use_reentrant=False"):
        checkpoint(selects, x, use_reentrant=True)


@pytest.mark.parametrize("what", ["argument", "parameter", "parameter of an inner checkpoint"])
def test_what_was_written_since_is_noticed(what: str) -> None:
    x, weight = leaves((3,), (3,))
    function: Any = lambda x: (x * weight).exp()  # noqa: E731
    wrapped = (lambda x: checkpoint(function, x)) if "inner" in what else function
    loss = checkpoint(wrapped, x).sum()
    with ge.no_grad():
        (x if what == "argument" else weight).mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation since its first call"):
        loss.backward()


def test_a_function_that_writes_to_its_argument_is_refused() -> None:
    (leaf,) = leaves((3,))
    x = leaf * 1
    out = checkpoint(lambda x: x.mul_(2).exp(), x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation since its first call"):
        out.sum().backward()


def test_hooks_inside_run_once() -> None:
    seen = []

    def hooked(x: Any) -> Any:
        y = x.exp()
        y.register_hook(lambda grad: seen.append(grad.numpy().copy()))
        return y.sin()

    (x,) = leaves((3,))
    checkpoint(hooked, x).sum().backward()
    np.testing.assert_array_equal(seen, [np.cos(np.exp(x.detach().numpy()))])


def test_beside_pytorch() -> None:
    torch = pytest.importorskip("torch")
    torch_checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint

    x, y = leaves((3, 4), (3, 4))
    found = gradients(lambda x, y: checkpoint(block, x, y), x, y)
    inputs = [torch.tensor(v.detach().numpy(), requires_grad=True) for v in (x, y)]
    out = torch_checkpoint(block, *inputs, use_reentrant=False)
    expected = torch.autograd.grad((out * out).sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-12)

"""Views on the tape: a base and its views stay consistent when any of them is written in place."""

from __future__ import annotations

import gc
import weakref

import pytest

import gradengine as ge

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def library_called(name):
    return ge if name == "gradengine" else pytest.importorskip("torch")


@both
def test_a_tensor_knows_its_base(library):
    lib = library_called(library)
    x = lib.ones(3, 3)
    view = x[1:]
    assert view._is_view()
    assert view._base is x
    assert view.T[0]._base is x
    assert x.diagonal()._base is x
    for other in (x, x * 1, x.detach(), x[[0, 1]], x.clone()):
        assert not other._is_view()
        assert other._base is None


@both
def test_a_write_to_a_view_moves_the_base_and_the_view(library):
    lib = library_called(library)
    x = lib.ones(3, requires_grad=True)
    y = x * 2
    view = y[:2]
    view.mul_(5)
    assert type(y.grad_fn).__name__ == "CopySlices" or y.grad_fn.name() == "CopySlices"
    (y * lib.tensor([1.0, 2.0, 3.0])).sum().backward(retain_graph=True)
    assert x.grad.tolist() == [10.0, 20.0, 6.0]
    x.grad = None
    view.sum().backward()
    assert x.grad.tolist() == [10.0, 10.0, 0.0]


@both
def test_a_write_to_the_base_moves_its_views(library):
    lib = library_called(library)
    x, w = lib.ones(3, requires_grad=True), lib.full((3,), 4.0, requires_grad=True)
    y = x * 2
    first, second = y[:2], y.view(3, 1)[1:]
    y.mul_(w)
    (first.sum() + second.sum()).backward()
    assert x.grad.tolist() == [8.0, 16.0, 8.0]
    assert w.grad.tolist() == [2.0, 4.0, 2.0]


@both
def test_a_view_of_plain_memory_joins_the_tape_with_its_base(library):
    lib = library_called(library)
    w = lib.full((2,), 4.0, requires_grad=True)
    base = lib.ones(3)
    one, other = base[:2], base[1:]
    one.mul_(w)
    assert base.requires_grad
    assert other.requires_grad
    assert not other.is_leaf
    (other * 2).sum().backward()
    assert w.grad.tolist() == [0.0, 2.0]


@both
def test_rows_filled_one_by_one(library):
    lib = library_called(library)
    x = lib.ones(3, requires_grad=True)
    out = lib.zeros(3, 2)
    for place in range(3):
        out[place] = x[place] * (place + 1)
        out[place][1] = out[place][0] * 10
    out.sum().backward()
    assert x.grad.tolist() == [11.0, 22.0, 33.0]


@both
def test_retained_gradients_follow(library):
    lib = library_called(library)
    x = lib.ones(3, requires_grad=True)
    y = x * 1
    y.retain_grad()
    y[:2].mul_(3)
    (y * 5).sum().backward()
    assert y.grad.tolist() == [5.0, 5.0, 5.0]
    assert x.grad.tolist() == [15.0, 15.0, 5.0]


@both
def test_second_derivatives_through_written_views(library):
    lib = library_called(library)
    x = lib.tensor([2.0, 3.0], requires_grad=True)
    y = x * x
    y[:1].mul_(x[0])  # x0^3, x1^2
    (first,) = lib.autograd.grad(y.sum(), x, create_graph=True)
    assert first.tolist() == [12.0, 6.0]
    (second,) = lib.autograd.grad(first.sum(), x)
    assert second.tolist() == [12.0, 2.0]


@both
@pytest.mark.parametrize("requires_grad", [False, True])
def test_views_made_outside_the_tape_are_not_written_on_it(library, requires_grad):
    lib = library_called(library)
    base = lib.ones(3, requires_grad=True) * 1 if requires_grad else lib.ones(3)
    with lib.no_grad():
        view = base[:2]
    with pytest.raises(RuntimeError, match="created in no_grad mode and is being modified inplace"):
        view.mul_(lib.ones(2, requires_grad=True))


@both
def test_several_views_do_not_follow_their_base(library):
    lib = library_called(library)
    base = lib.ones(3, requires_grad=True) * 1
    first = base.unbind()[0]
    base.mul_(lib.ones(3, requires_grad=True))
    with pytest.raises(RuntimeError, match="multiple views"):
        _ = first * 2


def test_a_value_that_a_view_shares_is_stale_after_a_write():
    x = ge.ones(3, requires_grad=True)
    y = x * 1
    product = y * ge.ones(3, requires_grad=True)
    y[:1].zero_()
    with pytest.raises(RuntimeError, match=r"MulBackward0.*y\[:1\] was changed in place by zero_"):
        product.sum().backward()


def test_a_view_made_stale_twice_is_renewed_once_and_before_its_user():
    x = ge.ones(3, requires_grad=True)
    y = x * 1
    view = y[:2]
    y.mul_(2)
    y.mul_(3)
    z = view * 5  # no look at view.grad_fn before
    assert view.grad_fn.index < z.grad_fn.index
    assert view.grad_fn is z.grad_fn.next_functions[0][0]
    z.sum().backward()
    assert x.grad.tolist() == [30.0, 30.0, 0.0]


def test_a_base_given_other_memory_leaves_its_views():
    x = ge.ones(3)
    view = x[:2]
    x.data = ge.zeros(5)
    assert view._base is None
    view.mul_(ge.ones(2, requires_grad=True))
    assert not x.requires_grad


def test_memory_of_any_order():
    x = ge.ones(2, 3, 4, requires_grad=True)
    for y in ((x * 1).permute((2, 0, 1)).clone(), (x * 1).transpose(0, 2), (x * 1)[:, ::-1]):
        view = y.transpose(0, 1)[0]
        view.mul_(3)
        x.grad = None
        y.sum().backward()
        assert x.grad.sum().item() == 24 + 2 * view.numel()


def test_views_keep_their_base_but_are_not_kept():
    gc.disable()
    try:
        base = ge.ones(3)
        views = [weakref.ref(base[:2]) for _ in range(100)]
        assert not any(view() is not None for view in views)
        assert len(base.version().log.views) < 20
        kept, view = weakref.ref(base), base[:1]
        del base
        assert kept() is not None
        del view
        assert kept() is None
    finally:
        gc.enable()

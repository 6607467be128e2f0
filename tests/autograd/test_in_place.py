"""In-place writes: who is told of them, what they refuse, and which lines their errors name."""

from __future__ import annotations

import inspect
import os

import numpy as np
import pytest

import gradengine as ge

HERE = os.path.relpath(__file__)


def leaf(*values: float) -> ge.Tensor:
    return ge.tensor(list(values), requires_grad=True)


def here() -> int:
    return inspect.currentframe().f_back.f_lineno


def torch_or_ours(library):
    return ge if library == "gradengine" else pytest.importorskip("torch")


both = pytest.mark.parametrize("library", ["gradengine", "torch"])

# ---- versions ------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    "write",
    [
        lambda x, lib: x.add_(1),
        lambda x, lib: x.__iadd__(1),
        lambda x, lib: x.mul_(2),
        lambda x, lib: x.zero_(),
        lambda x, lib: x.fill_(3),
        lambda x, lib: x.copy_(lib.ones(3)),
        lambda x, lib: x.normal_(),
        lambda x, lib: x.uniform_(),
        lambda x, lib: x.clamp_(0, 1),
        lambda x, lib: x.__setitem__(0, 1),
        lambda x, lib: x.__setitem__([0, 1], 1),
        lambda x, lib: x[:1].exp_(),
        lambda x, lib: x.detach().add_(1),
        lambda x, lib: lib.autograd.graph.increment_version(x),
        lambda x, lib: lib.autograd.graph.increment_version([x]),
    ],
)
def test_every_write_counts_once_in_all_that_share_the_memory(library, write):
    lib = torch_or_ours(library)
    x = lib.ones(3)
    view, apart = x[1:], x.detach()
    assert x._version == view._version == apart._version == 0
    write(x, lib)
    assert x._version == view._version == apart._version == 1


def test_optimizers_count_and_so_do_running_statistics():
    layer = ge.nn.BatchNorm2d(2)
    optimizer = ge.optim.SGD(layer.parameters(), lr=0.1)
    layer(ge.ones(2, 2, 3, 3)).sum().backward()
    before = layer.weight._version
    optimizer.step()
    assert layer.weight._version == before + 1
    assert layer.running_mean._version == 1


def test_data_shares_the_counter():
    x = ge.ones(3)
    x.data.add_(1)
    assert x._version == 1


def test_increment_version_takes_tensors():
    with pytest.raises(TypeError, match="increment_version: expected Tensors; got int"):
        ge.autograd.graph.increment_version([1])  # pyright: ignore[reportArgumentType]


def test_a_change_of_the_array_that_was_announced_is_caught():
    x, y = leaf(1.0, 2.0), ge.ones(2)
    z = (x * y).sum()
    y.array[0] = 5
    ge.autograd.graph.increment_version(y)
    with pytest.raises(RuntimeError, match="modified by an inplace.*increment_version"):
        z.backward()


# ---- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda b: b.mul_(2), "b was changed in place by mul_"),
        (lambda b: b[:1].fill_(0), r"b\[:1\] was changed in place by fill_"),
        (lambda b: b.detach().add_(1), r"b.detach\(\) was changed in place by add_"),
        (lambda b: b.data.sub_(1), "b.data was changed in place by sub_"),
        (lambda b: ge.autograd.graph.increment_version([b]), "in place by .*increment_version"),
    ],
)
def test_an_error_names_the_line_of_the_change(change, words):
    a = leaf(1.0, 2.0)
    b = a.exp()
    loss = b.sum()
    change(b)
    line = change.__code__.co_firstlineno
    with pytest.raises(
        RuntimeError, match=f"inplace operation: .*{words} at {HERE}:{line} after exp"
    ):
        loss.backward()


def test_an_error_names_statements_that_write():
    a = leaf(1.0, 2.0)
    b = a.exp()
    loss = b.sum()
    b += 1
    words = rf": b was changed in place by \+= at {HERE}:{here() - 1} after"
    with pytest.raises(RuntimeError, match=words):
        loss.backward(retain_graph=True)
    b[0] = 1
    words = f": b was changed in place by item assignment at {HERE}:{here() - 1} after"
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


def test_an_error_names_an_optimizer_that_was_too_early():
    weight = ge.nn.Parameter(ge.ones(2))
    loss = (weight * weight).sum()
    loss.backward(retain_graph=True)
    ge.optim.SGD([weight], lr=0.1).step()
    words = rf"SGD.*step at {HERE}:{here() - 1} after mul saved it"
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


def test_an_error_names_both_lines_where_they_are_traced():
    a = leaf(1.0, 2.0)
    with ge.autograd.trace_lines():
        b = a.exp()
        saved = here() - 1
    loss = b.sum()
    b.mul_(2)
    changed = here() - 1
    words = (
        f"b was changed in place by mul_ at {HERE}:{changed} after exp saved it at {HERE}:{saved};"
    )
    with pytest.raises(RuntimeError, match=words):
        loss.backward()


def test_an_error_without_traced_lines_says_how_to_trace_them():
    b = leaf(1.0).exp()
    b.mul_(2)
    loss = b.sum()
    b = leaf(1.0).exp()
    loss = b.sum()
    b.mul_(2)
    with pytest.raises(RuntimeError, match=r"ge\.autograd\.trace_lines\(\) tells where"):
        loss.backward()


def test_lines_are_traced_inside_the_block_alone():
    plain = ge.autograd.Node.__init__
    with ge.autograd.trace_lines(), ge.autograd.trace_lines():
        assert ge.autograd.Node.__init__ is not plain
    assert ge.autograd.Node.__init__ is plain


# ---- what is refused -----------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("run", "match"),
    [
        (lambda x: x.add_(1), "a leaf Variable that requires grad"),
        (lambda x: x.__setitem__(0, 1), "a leaf Variable that requires grad"),
        (lambda x: x[:1].add_(1), "a view of a leaf Variable that requires grad"),
        (
            lambda x: x.view(-1)[1:].__setitem__(0, 1),
            "a view of a leaf Variable that requires grad",
        ),
        (lambda x: (x * 1).unbind()[0].add_(1), "multiple views.*do not allow the output views"),
        (lambda x: (x * 1).split(1)[0].add_(1), "multiple views.*do not allow the output views"),
        (lambda x: (x * 1).chunk(2)[0][0].add_(1), "multiple views.*do not allow the output views"),
        (lambda x: (x * 1).expand(3, 2).add_(1), "more than one element of the written-to tensor"),
        (lambda x: (x * 1)[:1].detach_(), "(?i)can't detach views in-place"),
    ],
)
def test_refused_writes(library, run, match):
    x = torch_or_ours(library).ones(2, requires_grad=True)
    with pytest.raises(RuntimeError, match=match):
        run(x)


def test_a_refused_write_changes_nothing():
    x = leaf(1.0, 2.0)
    for write in (lambda: x.add_(1), lambda: x[:1].fill_(0), lambda: x.__setitem__(0, 5)):
        with pytest.raises(RuntimeError, match="leaf Variable"):
            write()
    assert x.tolist() == [1.0, 2.0]
    assert x._version == 0


def test_writes_to_expanded_memory_are_refused_off_the_tape_too():
    x = ge.tensor(np.ones((1, 2), np.float32)).expand(3, 2)
    for write in (lambda: x.add_(1), lambda: x.__setitem__(0, 1)):
        with pytest.raises(RuntimeError, match="single memory location"):
            write()

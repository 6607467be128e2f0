"""Indexing beside the table: messages, labels, views, repeated places, PyTorch's rules."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gradengine as ge
from gradengine.ops import indexing as ops


def tensor(values: Any, dtype: Any = np.float64, requires_grad: bool = False) -> Any:
    return ge.tensor(np.asarray(values, dtype), device="cpu", requires_grad=requires_grad)


def numbers(*shape: int, requires_grad: bool = False) -> Any:
    count = np.prod(shape, dtype=int)
    return tensor(np.arange(count).reshape(shape), requires_grad=requires_grad)


def integers(*values: Any) -> Any:
    return tensor(values, np.int64)


X = numbers(3, 4)
LINE = numbers(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: X[3], IndexError, "index 3 is out of bounds"),
        (lambda: X[0, 0, 0], IndexError, "too many indices"),
        (lambda: X[0, [0], 0], IndexError, "too many indices for tensor"),
        (lambda: X[..., [0], ...], IndexError, "more than one Ellipsis"),
        (lambda: X[integers(4)], IndexError, "index 4 is out of bounds"),
        (lambda: X[tensor([1.0])], IndexError, "must be of integers or bools; got dtype=float64"),
        (lambda: X["a"], IndexError, "must be of integers or bools"),
        (lambda: X[tensor([True, False], bool)], IndexError, "shape of the mask does not match"),
        (lambda: ops.setitem(X, 0, LINE), ValueError, "value.shape=(3,), part.shape=(4,)"),
        (lambda: ops.setitem(X, [0, 1], LINE), ValueError, "setitem: value must broadcast"),
        (lambda: ops.gather(LINE, 0, integers(-1)), IndexError, "index -1 is out of bounds"),
        (lambda: ops.gather(LINE, 0, integers(3)), IndexError, "(0 <= index < size); got size=3"),
        (lambda: ops.gather(LINE, 0, LINE), TypeError, "gather: index must be of an integer dtype"),
        (lambda: ops.gather(X, 0, integers(0)), ValueError, "x's number of dims"),
        (lambda: ops.gather(X, 0, integers([0] * 5)), ValueError, "no larger apart from dim"),
        (lambda: ops.gather(X, 2, integers([0])), IndexError, "gather: dim must be in"),
        (lambda: ops.take_along_dim(X, integers(0), 0), ValueError, "indices.ndim == x.ndim"),
        (lambda: ops.take_along_dim(LINE, integers(-4), 0), IndexError, "(-3 <= index < size)"),
        (lambda: ops.take(X, integers(12)), IndexError, "take: index 12 is out of bounds"),
        (lambda: ops.index_select(X, 1, integers(-1)), IndexError, "index_select: index -1"),
        (lambda: ops.index_select(X, 1, integers([0])), ValueError, "index must be 1-D"),
        (lambda: ops.scatter(LINE, 0, integers(3), 1.0), IndexError, "scatter: index 3"),
        (
            lambda: ops.scatter(LINE, 0, integers(0, 1), numbers(1)),
            ValueError,
            "scatter: index must have src's number of dims and be no larger",
        ),
        (
            lambda: ops.scatter(LINE, 0, integers(0), LINE.float()),
            TypeError,
            "got x.dtype=float64, source.dtype=float32",
        ),
        (lambda: ops.scatter_add(LINE, 0, integers(-1), LINE), IndexError, "scatter_add: index -1"),
        (lambda: ops.scatter_add(LINE, 0, integers(0), LINE.float()), TypeError, "one dtype"),
        (lambda: ops.index_add(X, 0, integers(0, 3), X[:2]), IndexError, "index_add: index 3"),
        (lambda: ops.index_add(X, 0, integers(0), X), ValueError, "index_add: source must have"),
        (lambda: ops.index_add(X, 0, integers(0), X[:1].float()), TypeError, "index_add: x and"),
        (lambda: ops.masked_fill(X, X, 0), TypeError, "masked_fill: mask must be a bool tensor"),
        (lambda: ops.masked_fill(LINE, LINE > 0, LINE), ValueError, "value.ndim == 0"),
        (lambda: ops.masked_select(X, LINE), TypeError, "masked_select: mask must be a bool"),
        (lambda: ops.one_hot(integers(3), 2), IndexError, "one_hot: index 3 is out of bounds"),
        (lambda: ops.one_hot(integers(-1)), IndexError, "one_hot: index -1"),
        (lambda: ops.one_hot(integers()), ValueError, "cannot be inferred from no labels"),
        (lambda: ops.one_hot(LINE), TypeError, "one_hot: index must be of an integer dtype"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "label"),
    [
        (lambda x: x[0], "SelectBackward0"),
        (lambda x: x[:, 0], "SelectBackward0"),
        (lambda x: x[1:, 0], "SelectBackward0"),
        (lambda x: x[0, 1:], "SliceBackward0"),
        (lambda x: x[:], "SliceBackward0"),
        (lambda x: x[...], "AliasBackward0"),
        (lambda x: x[None], "UnsqueezeBackward0"),
        (lambda x: x[[0, 1]], "IndexBackward0"),
        (lambda x: x[x > 0], "IndexBackward0"),
        (lambda x: x[True], "IndexBackward0"),
        (lambda x: ops.setitem(x, 0, 1.0), "CopySlices"),
        (lambda x: x.gather(0, integers([0])), "GatherBackward0"),
        (lambda x: x.take_along_dim(integers([0]), 0), "GatherBackward0"),
        (lambda x: x.index_select(0, integers(0)), "IndexSelectBackward0"),
        (lambda x: ops.take(x, integers(0)), "TakeBackward0"),
        (lambda x: x.scatter(0, integers([0]), 1.0), "ScatterBackward0"),
        (lambda x: x.scatter_add(0, integers([0]), x), "ScatterAddBackward0"),
        (lambda x: x.index_add(0, integers(0), x[:1]), "IndexAddBackward0"),
        (lambda x: x.masked_fill(x > 0, 1.0), "MaskedFillBackward0"),
        (lambda x: x.masked_select(x > 0), "MaskedSelectBackward0"),
    ],
)
def test_labels(call: Any, label: str) -> None:
    assert call(numbers(3, 4, requires_grad=True)).grad_fn.name() == label


@pytest.mark.parametrize("index", [0, (0, 1), slice(1, None), (..., 2), None, np.int64(1)])
def test_basic_indices_give_views(index: Any) -> None:
    x = numbers(3, 4)
    seen = x[index]
    x.fill_(7)
    assert (seen.numpy() == 7).all()
    seen.zero_()
    assert (x[index].numpy() == 0).all()


@pytest.mark.parametrize("index", [[0, 1], X.numpy() > 3, True])
def test_arrays_and_masks_give_copies(index: Any) -> None:
    x = numbers(3, 4)
    seen = x[index]
    x.fill_(-1)
    assert (seen.numpy() >= 0).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.int64])
def test_the_dtype_of_an_index_does_not_bound_the_places(dtype: Any) -> None:
    x = numbers(300, 2, requires_grad=True)
    x[tensor([200 if dtype == np.uint8 else 299, 1, 1], dtype)].sum().backward()
    assert x.grad.numpy().sum() == 6
    assert x.grad[1].tolist() == [2, 2]


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_repeated_places_add_up(axis: int) -> None:
    x = numbers(3, 3, 3, requires_grad=True)
    x[(slice(None),) * axis + (integers([0, -1], [2, 2]),)].sum().backward()
    counts = np.array([1.0, 0, 3]).reshape(-1, *[1] * (2 - axis))
    np.testing.assert_array_equal(x.grad.numpy(), np.broadcast_to(counts, (3, 3, 3)))


INDICES = st.one_of(
    st.integers(-2, 1),
    st.slices(2),
    st.none(),
    st.booleans(),
    st.lists(st.integers(-2, 1), min_size=2, max_size=2),
    arrays.arrays(np.bool_, (2,)),
)


@given(index=st.lists(INDICES, max_size=4).map(tuple), data=st.data())
def test_brackets_follow_pytorch(index: tuple[Any, ...], data: st.DataObject) -> None:
    """All mixtures of items on a 4-D tensor of size 2: values and gradients, or IndexError."""
    torch = pytest.importorskip("torch")
    index = tuple(
        item if not isinstance(item, slice) or (item.step or 1) > 0 else slice(item.start, None)
        for item in index
    )
    if data.draw(st.booleans()):
        index = (*index[:1], ..., *index[1:])
    theirs = torch.arange(16.0, dtype=torch.float64).reshape(2, 2, 2, 2).requires_grad_()
    ours = numbers(2, 2, 2, 2, requires_grad=True)
    as_theirs = tuple(torch.tensor(i) if isinstance(i, np.ndarray) else i for i in index)
    try:
        expected = theirs[as_theirs]
    except IndexError:
        with pytest.raises(IndexError):
            _ = ours[index]
        return
    found = ours[index]
    np.testing.assert_array_equal(found.detach().numpy(), expected.detach().numpy())
    weights = np.arange(found.numel(), dtype=float).reshape(found.shape)
    (found * tensor(weights)).sum().backward()
    (expected * torch.tensor(weights)).sum().backward()
    np.testing.assert_array_equal(ours.grad.numpy(), theirs.grad.numpy())


def test_slices_run_backwards_as_in_numpy() -> None:
    np.testing.assert_array_equal(X[::-1, 3:0:-2].numpy(), X.numpy()[::-1, 3:0:-2])


def test_an_index_tensor_may_stand_in_a_slice() -> None:
    assert X[integers(1)[0] :].shape == (2, 4)


def test_written_values_are_converted() -> None:
    x = tensor([1, 2, 3], np.float32)
    x[0] = tensor([9.5])[0]
    x[1:] = np.array([7, 8])
    assert x.tolist() == [9.5, 7, 8]
    whole = tensor([1, 2, 3], np.int64)
    whole[1] = 2.7
    assert whole.tolist() == [1, 2, 3]
    assert ops.setitem(x, 0, np.float64(4)).dtype == np.float32


def test_writing_leaves_the_source_of_setitem_alone() -> None:
    x = numbers(3, 4)
    out = ops.setitem(x, (slice(None), [0, 1]), 5.0)
    assert x.tolist() == X.tolist()
    assert out[:, :2].tolist() == [[5, 5]] * 3


def test_writing_in_place_records_both_gradients() -> None:
    x, value = numbers(3, requires_grad=True), tensor(5.0, requires_grad=True)
    y = x * 2
    y[integers(0, 2)] = value
    assert y.grad_fn.name() == "CopySlices"
    (y * tensor([1, 10, 100])).sum().backward()
    assert x.grad.tolist() == [0, 20, 0]
    assert value.grad.item() == 101


def test_a_read_only_part_is_not_blamed_on_the_value() -> None:
    with pytest.raises(RuntimeError, match="more than one element .* single memory location"):
        numbers(1).expand(3)[0] = 1.0


@pytest.mark.parametrize(
    "read",
    [
        lambda x, places, mask: x[places],
        lambda x, places, mask: x[mask],
        lambda x, places, mask: x.gather(0, places),
        lambda x, places, mask: x.take_along_dim(places, 0),
        lambda x, places, mask: ge.take(x, places),
        lambda x, places, mask: x.index_select(0, places),
        lambda x, places, mask: x.masked_fill(mask, 0.0),
        lambda x, places, mask: x.masked_select(mask),
        lambda x, places, mask: ge.where(mask, x, 0.0),
        lambda x, places, mask: ge.zeros(3).scatter(0, places, x[:2])[:1],
        lambda x, places, mask: ge.zeros(3).scatter_add(0, places, x[:2])[:1],
        lambda x, places, mask: ge.zeros(3).index_add(0, places, x[:2])[:1],
        lambda x, places, mask: ge.functional.index_add(x * 1, 0, places, x[:2])[:1],
    ],
)
def test_backward_goes_where_forward_went_though_the_index_was_written_since(read: Any) -> None:
    gradients = []
    for written in (False, True):
        x = ge.tensor([1.0, 2.0, 3.0], device="cpu", requires_grad=True)
        places, mask = ge.tensor([0, 1], device="cpu"), ge.tensor([True, False, True], device="cpu")
        y = read(x, places, mask)
        if written:
            places += 1
            mask.zero_()
        y.sum().backward()
        gradients.append(x.grad.tolist())
    assert gradients[0] == gradients[1]


def test_an_index_that_was_written_with_is_kept_too() -> None:
    x = ge.ones(3, device="cpu", requires_grad=True)
    y = x * 1
    places = ge.tensor([0, 1], device="cpu")
    y[places] = 0.0
    places += 1
    y.sum().backward()
    assert x.grad.tolist() == [0, 0, 1]


def test_writing_to_the_indices_of_a_maximum_leaves_its_gradient() -> None:
    x = ge.tensor([1.0, 3.0, 2.0], device="cpu", requires_grad=True)
    values, indices = x.max(0)
    indices.zero_()
    values.backward()
    assert x.grad.tolist() == [0, 1, 0]


def test_masks_that_hold_nowhere() -> None:
    x = numbers(3, 4, requires_grad=True)
    assert x[x < 0].shape == (0,)
    assert x.masked_select(x < 0).shape == (0,)
    (x[x < 0].sum() + x[[]].sum()).backward()
    assert not x.grad.numpy().any()


def test_scalars() -> None:
    scalar = tensor(3.0, requires_grad=True)
    assert scalar[...].shape == scalar[()].shape == ()
    assert scalar[None].shape == scalar[True].shape == (1,)
    assert scalar[False].shape == (0,)
    assert scalar.masked_select(tensor(True, bool)).shape == (1,)
    assert scalar.nonzero().shape == (1, 0)
    assert [places.tolist() for places in ops.nonzero(scalar, as_tuple=True)] == [[0]]
    assert ops.take(scalar, integers(0, 0)).shape == (2,)
    assert LINE.index_select(0, tensor(1, np.int64)).tolist() == [1]
    (scalar[None] * 2).sum().backward()
    assert scalar.grad.item() == 2


def test_masked_fill_keeps_the_dtype_and_broadcasts() -> None:
    filled = ops.masked_fill(integers(1, 2), tensor([[True, False], [False, True]], bool), 7.9)
    assert filled.tolist() == [[7, 2], [1, 7]]
    assert filled.dtype == np.int64
    low = tensor([1, 2], np.float32)
    assert ops.masked_fill(low, low > 1, tensor(3.0)).dtype == np.float32
    assert ops.masked_fill(low, low > 1, float("-inf")).tolist() == [1, float("-inf")]


def test_masked_fill_in_place() -> None:
    x = numbers(2, 2)
    x.masked_fill_(x > 1, 0.0)
    assert x.tolist() == [[0, 1], [0, 0]]


def test_integers_are_added_too() -> None:
    counts = integers(0, 0, 0).scatter_add(0, integers(2, 0, 2), integers(1, 1, 1))
    assert counts.tolist() == [1, 0, 2]
    assert counts.dtype == np.int64


def test_index_add_on_strided_memory() -> None:
    x = numbers(3, 4).T
    expected = x.numpy().copy()
    np.add.at(expected, [1, 1], x.numpy()[:2])
    np.testing.assert_array_equal(x.index_add(0, integers(1, 1), x[:2]).numpy(), expected)


def test_one_hot_is_int64() -> None:
    assert ops.one_hot(tensor([1, 0], np.uint8)).dtype == np.int64
    assert ops.one_hot(tensor(1, np.int64), 3).tolist() == [0, 1, 0]
    assert ops.one_hot(integers(), 3).shape == (0, 3)


def test_arrays_in_arrays_out() -> None:
    x = np.arange(6.0).reshape(2, 3)
    assert type(ops.getitem(x, [0, 1])) is np.ndarray
    assert type(ops.getitem(x, (0, 0))) is np.ndarray
    assert type(ops.gather(x, 0, np.zeros((1, 3), int))) is np.ndarray
    assert type(ops.masked_fill(x, x > 0, 1)) is np.ndarray


def test_an_index_that_does_not_fit_is_named():
    x = ge.ones(3, 4, device="cpu")
    for index, words in [
        (5, "out of bounds"),
        ((0, 0, 0), "too many indices"),
        ((..., ..., 0), "single ellipsis"),
        (ge.tensor([3], device="cpu"), "out of bounds"),
    ]:
        with pytest.raises(IndexError, match=f"getitem: .*{words}.*got x.shape="):
            x[index]
        with pytest.raises(IndexError, match=f"setitem: .*{words}.*got x.shape="):
            x[index] = 1.0


def test_a_value_that_does_not_fit_is_named():
    x, mask = ge.ones(2, dtype=ge.int64, device="cpu"), ge.tensor([True, False], device="cpu")
    with pytest.raises(
        ValueError, match="masked_fill: value must fit into x's dtype; got value=nan"
    ):
        ge.masked_fill(x, mask, float("nan"))
    with pytest.raises(TypeError, match="index_add: alpha must be an integer beside integers"):
        ge.index_add(x, 0, ge.tensor([0], device="cpu"), x[:1], alpha=0.5)


def test_the_gradient_of_taking_one_element():
    x = ge.tensor([1.0, 2.0, 3.0], device="cpu", requires_grad=True)
    ge.take(x, ge.tensor(1, device="cpu")).backward()
    assert x.grad.tolist() == [0, 1, 0]

"""Shape operations beside the table: messages, labels, views, splitting at linear cost."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional as ops
from gradengine.autograd import gradgradcheck
from gradengine.ops import joining


def tensor(*shape: int, requires_grad: bool = False) -> Any:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float64).reshape(shape)
    return ge.tensor(array, device="cpu", requires_grad=requires_grad)


X = tensor(2, 3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.reshape(X, (4, -1)), ValueError, "shape=(4, -1), x.shape=(2, 3)"),
        (lambda: ops.reshape(X, (-1, -1)), ValueError, "at most one -1"),
        (lambda: ops.reshape(X, 5), ValueError, "prod(shape) == prod(x.shape)"),
        (lambda: ops.view(X, (7,)), ValueError, "view: shape is invalid"),
        (lambda: ops.view(X.T, (6,)), RuntimeError, "(use reshape); got shape=(6,)"),
        (lambda: ops.flatten(X, 1, 0), ValueError, "start_dim <= end_dim"),
        (lambda: ops.flatten(X, 2), IndexError, "flatten: dim must be in [-2, 1]"),
        (lambda: ops.unflatten(X, 1, (2, 2)), ValueError, "sizes=(2, 2), x.shape[1]=3"),
        (lambda: ops.unflatten(X, 1, (-1, -1)), ValueError, "prod(sizes) == x.shape[dim]"),
        (lambda: ops.unsqueeze(X, 3), IndexError, "[-3, 2]"),
        (lambda: ops.squeeze(X, (0, -2)), ValueError, "a dim must not appear twice"),
        (lambda: ops.permute(X, (0,)), ValueError, "len(dims) == ndim"),
        (lambda: ops.permute(X, (0, 0)), ValueError, "permute: a dim must not appear twice"),
        (lambda: ops.transpose(X, 0, 2), IndexError, "got dim=2, ndim=2"),
        (lambda: ops.t(tensor(1, 2, 3)), ValueError, "x.ndim <= 2"),
        (lambda: ops.movedim(X, (0, 1), 0), ValueError, "equally many dims"),
        (lambda: ops.expand(X, (3, 3)), ValueError, "shape=(3, 3), x.shape=(2, 3)"),
        (lambda: ops.expand(X, (-1, 2, 3)), ValueError, "expand"),
        (lambda: ops.expand(X, (3,)), ValueError, "aligned at the last dim"),
        (lambda: ops.broadcast_tensors(X, tensor(2)), ValueError, "got (2, 3), (2,)"),
        (lambda: ops.meshgrid(X, indexing="ji"), ValueError, "indexing='ji'"),
        (lambda: ops.repeat(X, 2), ValueError, "len(repeats) >= ndim"),
        (lambda: ops.narrow(X, 1, 2, 2), IndexError, "start=2, length=2, x.shape[1]=3"),
        (lambda: ops.narrow(X, 1, -4, 1), IndexError, "0 <= start"),
        (lambda: ops.split(X, [1, 1], 1), ValueError, "sizes=[1, 1], x.shape[1]=3"),
        (lambda: ops.split(X, 0), ValueError, "split_size=0"),
        (lambda: ops.chunk(X, 0), ValueError, "chunks must be positive"),
        (lambda: ops.unbind(X, 2), IndexError, "unbind: dim"),
        (lambda: ops.cat([X, tensor(3, 2)]), ValueError, "got dim=0, shapes (2, 3), (3, 2)"),
        (lambda: ops.cat([X, tensor(2)]), ValueError, "cat: shapes must agree"),
        (lambda: ops.cat([]), ValueError, "at least one tensor"),
        (lambda: ops.stack([X, X.T]), ValueError, "got shapes (2, 3), (3, 2)"),
        (lambda: ops.roll(X, (1, 2), 0), ValueError, "shifts=(1, 2), dims=0"),
        (lambda: ops.tril(tensor(2)), ValueError, "tril: x must have at least two dims"),
        (lambda: ops.triu(tensor(2)), ValueError, "triu: x must have at least two dims"),
        (lambda: ops.diagonal(X, 0, 1, -1), ValueError, "dim1 and dim2 must differ"),
        (lambda: ops.diag(tensor(1, 1, 1)), ValueError, "one or two dims"),
        (lambda: ops.pad(X, (1,)), ValueError, "got pad=(1,), ndim=2"),
        (lambda: ops.pad(X, (-2, -2)), ValueError, "no size may become negative"),
        (lambda: ops.pad(X, (1, 1), mode="mirror"), ValueError, "mode='mirror'"),
        (lambda: ops.pad(X, (3, 0), mode="reflect"), ValueError, "at most 2 places to dim 1"),
        (lambda: ops.pad(X, (0, 4), mode="circular"), ValueError, "at most 3 places to dim 1"),
        (lambda: ops.pad(tensor(2, 0), (1, 0), "replicate"), ValueError, "x.shape=(2, 0)"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "label"),
    [
        (lambda x: x.reshape(6), "View"),
        (lambda x: x.view(6), "View"),
        (lambda x: x.flatten(), "View"),
        (lambda x: x.unflatten(1, (3, 1)), "View"),
        (lambda x: x.unsqueeze(0), "Unsqueeze"),
        (lambda x: x.expand(2, 2, 3), "Expand"),
        (lambda x: x.permute(1, 0), "Permute"),
        (lambda x: x.T, "Permute"),
        (lambda x: x.transpose(0, 1), "Transpose"),
        (lambda x: x.t(), "T"),
        (lambda x: x.movedim(0, 1), "Permute"),
        (lambda x: x.repeat(2, 1), "Repeat"),
        (lambda x: x.narrow(0, 0, 1), "Slice"),
        (lambda x: x.split(2, 1)[0], "Split"),
        (lambda x: x.split([1, 2], 1)[0], "SplitWithSizes"),
        (lambda x: x.chunk(2)[0], "Split"),
        (lambda x: x.unbind()[0], "Unbind"),
        (lambda x: ge.cat([x, x]), "Cat"),
        (lambda x: ge.stack([x, x]), "Stack"),
        (lambda x: ge.pad(x, (1, 1)), "ConstantPadNd"),
        (lambda x: x.flip(0), "Flip"),
        (lambda x: x.roll(1, 0), "Roll"),
        (lambda x: x.tril(), "Tril"),
        (lambda x: x.diagonal(), "Diagonal"),
        (lambda x: x.clone(), "Clone"),
        (lambda x: x.T.contiguous(), "Clone"),
    ],
)
def test_labels(call: Any, label: str) -> None:
    assert call(tensor(2, 3, requires_grad=True)).grad_fn.name() == f"{label}Backward0"


@pytest.mark.parametrize("dim", [None, 0, (0,)])
def test_the_label_of_squeeze_tells_how_it_was_called(dim: Any) -> None:
    number = {None: 0, 0: 1, (0,): 2}[dim]
    label = ge.squeeze(tensor(1, 3, requires_grad=True), dim).grad_fn.name()
    assert label == f"SqueezeBackward{number}"


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.reshape(3, 2),
        lambda x: x.view(6),
        lambda x: x.T,
        lambda x: x.unsqueeze(0),
        lambda x: x.narrow(1, 1, 2),
        lambda x: x.split(2, 1)[1],
        lambda x: x.unbind(1)[2],
        lambda x: x.expand(4, 2, 3),
        lambda x: x.diagonal(),
        lambda x: x[1:].T[0],
    ],
)
def test_views_share_memory(call: Any) -> None:
    x = tensor(2, 3)
    seen = call(x)
    x.fill_(7)
    assert (seen.numpy() == 7).all()


def test_a_write_to_the_source_of_a_saved_view_is_noticed() -> None:
    x = tensor(4)
    weight = tensor(2, requires_grad=True)
    out = (weight * x.split(2)[1]).sum()
    x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("call", [lambda x: x.flip(0), lambda x: x.clone(), lambda x: x.roll(1, 0)])
def test_copies_do_not_share_memory(call: Any) -> None:
    x = tensor(2, 3)
    out = call(x)
    before = out.numpy().copy()
    x.fill_(7)
    np.testing.assert_array_equal(out.numpy(), before)


def test_view_takes_memory_that_numpy_does_not_own() -> None:
    x = ge.Tensor(np.frombuffer(bytes(24)))
    assert ops.view(x, (3, 1)).shape == (3, 1)


def test_contiguous_returns_a_contiguous_tensor_itself() -> None:
    assert X.contiguous() is X
    assert X.T.contiguous().is_contiguous()


@pytest.mark.parametrize(
    "call",
    [ge.clone, lambda x: ge.pad(x, (1, 1)), lambda x: ge.flip(x, 3), lambda x: ge.cat([x, x])],
)
def test_channels_last_memory_stays_channels_last(call: Any) -> None:
    x = tensor(2, 4, 5, 3).permute(0, 3, 1, 2)
    assert call(x).permute(0, 2, 3, 1).is_contiguous()


def test_the_gradient_of_a_slice_keeps_channels_last_memory() -> None:
    x = tensor(2, 4, 5, 3).permute(0, 3, 1, 2).requires_grad_()
    (gradient,) = ge.autograd.grad((x[:, :, 1:] * x.detach()[:, :, 1:]).sum(), x)
    assert gradient.permute(0, 2, 3, 1).is_contiguous()


def test_all_pieces_hang_on_one_node() -> None:
    x = tensor(50, 2, requires_grad=True)
    parents = {piece.grad_fn.next_functions[0][0] for piece in x.unbind()}
    assert len(parents) == 1
    assert [node for node, _ in parents.pop().next_functions] == [x.node]


def test_pieces_write_one_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many pieces are used, the whole gradient is assembled once."""
    wholes = []
    assemble = joining.assemble

    def counted(*pieces: Any, **places: Any) -> Any:
        wholes.append(len(pieces))
        return assemble(*pieces, **places)

    monkeypatch.setattr(joining, "assemble", counted)
    x = tensor(100, 2, requires_grad=True)
    sum(2 * row.sum() for row in x.unbind()[::2]).backward()
    assert wholes == [50]
    np.testing.assert_array_equal(x.grad.numpy(), np.repeat([[2.0], [0.0]] * 50, 2, axis=1))


def test_pieces_have_second_derivatives_and_are_used_twice() -> None:
    def curved(x: Any) -> Any:
        first, second, _ = ops.split(x, 1)
        return first * first * second + second**3

    assert gradgradcheck(curved, [tensor(3, 2, requires_grad=True)])


def test_two_splits_of_one_tensor_add_up() -> None:
    x = tensor(4, requires_grad=True)
    (x.split(2)[0].sum() + 3 * x.chunk(4)[1].sum()).backward()
    np.testing.assert_array_equal(x.grad.numpy(), [1, 4, 0, 0])


def test_empty_dims() -> None:
    empty = tensor(0, 3)
    assert [piece.shape for piece in empty.split(2)] == [(0, 3)]
    assert [piece.shape for piece in empty.split(0)] == [(0, 3)]
    assert [piece.shape for piece in empty.chunk(2)] == [(0, 3)] * 2
    assert empty.unbind() == ()
    assert empty.repeat(2, 0).shape == (0, 0)
    assert X[:, :0].flatten().shape == (0,)
    assert X.repeat(0, 1).shape == (0, 3)
    assert tensor(1, 2).expand(0, 2).shape == (0, 2)


def test_the_gradient_of_no_repeats_is_zero() -> None:
    x = tensor(2, 3, requires_grad=True)
    x.repeat(0, 1).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), np.zeros((2, 3)))


def test_cat_promotes_and_passes_over_empty_lines() -> None:
    whole = ge.cat([tensor(2), ge.zeros(0, device="cpu"), ge.ones(1, device="cpu")])
    assert whole.shape == (3,)
    assert whole.dtype == np.float64
    assert ge.cat([ge.zeros(0, device="cpu")]).shape == (0,)
    assert ge.cat([ge.zeros(0, device="cpu"), X]).shape == (2, 3)


def test_cat_gives_each_input_a_gradient_of_its_own_dtype() -> None:
    low = ge.ones(2, device="cpu", requires_grad=True)
    ge.cat([low, tensor(1)]).sum().backward()
    assert low.grad.dtype == np.float32


def test_a_scalar_has_dims_0_and_minus_1() -> None:
    scalar = tensor()
    assert scalar.squeeze(-1).shape == ()
    assert scalar.transpose(0, -1) is scalar
    assert scalar.flatten().shape == (1,)
    assert scalar.unsqueeze(0).shape == (1,)
    assert ops.flip(scalar, 0).shape == ()


def test_arrays_in_arrays_out() -> None:
    pieces = ops.split(np.arange(6.0), 4)
    assert [type(piece) for piece in pieces] == [np.ndarray, np.ndarray]
    assert type(ops.cat(pieces)) is np.ndarray
    assert type(ops.reshape(np.arange(6.0), (2, 3))) is np.ndarray


def test_other_spellings() -> None:
    assert ops.concat is ops.cat
    assert ops.swapaxes is ops.transpose
    assert ops.broadcast_to is ops.expand
    line = tensor(2)
    np.testing.assert_array_equal(
        [grid.numpy() for grid in ops.meshgrid([line, line])],
        np.meshgrid([0, 1], [0, 1], indexing="ij"),
    )


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda x: x.reshape(-2), ValueError, "reshape: shape is invalid"),
        (lambda x: x.view(-2), ValueError, "view: shape is invalid"),
        (lambda x: x.repeat(2, -1), ValueError, "repeat: .*min.repeats. >= 0"),
        (lambda x: ge.meshgrid(x, x), ValueError, "meshgrid: inputs must be 1-D or 0-d"),
        (lambda x: x[:0].unflatten(0, (0, -1)), ValueError, "unflatten: sizes must multiply"),
        (lambda x: ge.permute(x.sum(), (0,)), ValueError, "permute: dims must name each"),
        (lambda x: x.sum().sum((0, -1)), ValueError, "sum: a dim must not appear twice"),
        (lambda x: x.sum().flatten(1), IndexError, "flatten: dim must be in"),
        (lambda x: x.sum().argmax(1), IndexError, "argmax: dim must be in"),
    ],
)
def test_more_refusals(call: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        call(tensor(2, 3))


def test_shifts_of_one_dim_add_up() -> None:
    x = tensor(4)
    assert x.roll((1, 2), (0, 0)).tolist() == x.roll(3, 0).tolist()


def test_a_number_is_a_row_of_one() -> None:
    x, place = ge.tensor(2.0, device="cpu", requires_grad=True), ge.tensor(0, device="cpu")
    results = [
        x.cumsum(0),
        x.topk(1).values,
        ge.gather(x, 0, place),
        ge.index_select(x, 0, place),
        ge.scatter_add(x, 0, place, x),
    ]
    assert [y.shape for y in results] == [()] * 5
    sum(results[1:], results[0]).backward()
    assert x.grad.item() == 6
    assert ge.scatter(x, 0, place, 3.0).item() == 3

"""The tensor itself: attributes, protocols, conversions, operators with foreign arrays."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine.tensor import Tensor


def test_an_array_goes_in_and_comes_out_without_a_copy():
    array = np.arange(6.0).reshape(2, 3)
    for tensor in (Tensor(array), ge.from_numpy(array), ge.asarray(array)):
        assert tensor.array is array
        assert tensor.numpy() is array
    assert ge.tensor(array).array is not array
    assert np.asarray(Tensor(array)) is array or np.shares_memory(np.asarray(Tensor(array)), array)


def test_attributes():
    x = ge.zeros(2, 3, dtype=ge.float64)
    assert x.shape == (2, 3)
    assert x.size() == (2, 3)
    assert x.size(1) == 3
    assert x.stride() == (3, 1)
    assert (x.ndim, x.dim(), x.numel(), x.element_size(), x.nbytes) == (2, 2, 6, 8, 48)
    assert x.T.shape == x.mT.shape == (3, 2)
    assert x.is_contiguous()
    assert not x.T.is_contiguous()
    assert x.is_floating_point()
    assert not x.is_cuda
    assert x.device == ge.device("cpu")
    assert len(x) == 2


def test_gradients_are_never_dropped_silently():
    x = ge.ones(2, requires_grad=True)
    for convert in (Tensor.numpy, np.asarray, np.array):
        with pytest.raises(RuntimeError, match=r"requires grad.*detach\(\)\.numpy"):
            convert(x)
    with pytest.raises(BufferError, match="detach"):
        np.from_dlpack(x)
    assert np.from_dlpack(x.detach()).tolist() == [1.0, 1.0]


def test_dlpack_shares_memory_both_ways():
    x = ge.tensor([1.0, 2.0])
    assert np.shares_memory(np.from_dlpack(x), x.array)
    array = np.array([1.0, 2.0])
    assert np.shares_memory(ge.from_dlpack(array).array, array)


def test_the_cuda_array_interface_is_for_gpus():
    assert not hasattr(ge.ones(2), "__cuda_array_interface__")


def test_python_numbers():
    x = ge.tensor([[2.5]], requires_grad=True)
    assert x.item() == 2.5
    assert (float(x), int(x), bool(x)) == (2.5, 2, True)
    assert f"{ge.tensor(2.5):.2f}" == "2.50"
    assert [10, 20, 30][ge.tensor(1)] == 20
    with pytest.raises(TypeError, match="only integer tensors can be an index"):
        [10][ge.tensor(1.0)]
    with pytest.raises(RuntimeError, match="2 elements cannot be converted to Scalar"):
        ge.ones(2).item()
    with pytest.raises(RuntimeError, match="ambiguous"):
        bool(ge.ones(2))
    with pytest.raises(TypeError, match="0-d"):
        len(ge.tensor(1.0))
    with pytest.raises(TypeError, match="0-d"):
        iter(ge.tensor(1.0))


def test_operators_with_arrays_give_tensors_on_either_side():
    array, x = np.array([1.0, 2.0]), ge.tensor([3.0, 4.0], dtype=ge.float64, requires_grad=True)
    for result in (array + x, x + array, array - x, array * x, array / x, array**x, array @ x):
        assert isinstance(result, Tensor)
        assert result.requires_grad
    assert isinstance(np.float64(2) * x, Tensor)
    assert (array < x).tolist() == [True, True]


def test_equality_with_what_is_no_array_is_plain_python():
    x = ge.ones(1)
    assert (x == None) is False  # noqa: E711
    assert (x != "text") is True
    assert len({x, x}) == 1
    assert 1.0 in x


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        (ge.ones(2), 2, ge.float32),
        (ge.ones(2), 2.5, ge.float32),
        (ge.ones(2), np.float64(2.5), ge.float32),
        (ge.tensor([1, 2]), 2.5, ge.float32),
        (ge.tensor([1, 2]), True, ge.int64),
        (ge.tensor([True]), 2, ge.int64),
        (ge.tensor([True]), 2.5, ge.float32),
        (ge.ones(2), ge.tensor(2.0, dtype=ge.float64), ge.float32),
        (ge.ones(2), ge.ones(2, dtype=ge.float64), ge.float64),
        (ge.ones(2), ge.tensor([1, 2]), ge.float32),
        (ge.tensor([1, 2], dtype=ge.int8), ge.tensor([1, 2], dtype=ge.uint8), ge.int16),
        (ge.tensor([1, 2], dtype=ge.int32), ge.tensor(1), ge.int32),
        (ge.tensor([1, 2], dtype=ge.int32), ge.tensor(1.0), ge.float32),
    ],
)
def test_promotion(left, right, expected):
    assert (left * right).dtype == expected
    assert (right * left).dtype == expected
    assert ge.result_type(left, right) == expected


def test_shapes_that_do_not_broadcast_are_named():
    with pytest.raises(
        ValueError, match=r"add: shapes must broadcast together; got x.shape=\(2,\)"
    ):
        ge.add(ge.ones(2), ge.ones(3))
    with pytest.raises(ValueError, match=r"mul: .* got x.shape=\(2,\), y.shape=\(3, 1, 4\)"):
        ge.mul(ge.ones(2), ge.tensor(np.ones((3, 1, 4))))


def test_what_is_no_number_is_refused():
    with pytest.raises(TypeError, match="add: inputs must be Tensors, arrays or numbers; got list"):
        ge.add(ge.ones(2), [1, 2])
    with pytest.raises(TypeError, match="exp: input must be a Tensor or an array; got list"):
        ge.exp([1.0])


def test_to_returns_self_where_nothing_changes():
    x = ge.ones(2, requires_grad=True)
    assert x.to("cpu") is x
    assert x.to(ge.float32) is x
    assert x.cpu() is x
    assert x.float() is x
    y = x.to("cpu", ge.float64)
    assert y.dtype == ge.float64
    assert y.grad_fn.name() == "ToCopyBackward0"
    y.sum().backward()
    assert x.grad.dtype == ge.float32
    assert x.to(ge.ones(1, dtype=ge.float64)).dtype == ge.float64
    assert x.to(copy=True) is not x
    assert not x.long().requires_grad


def test_cuda_says_why_not():
    if ge.cuda_is_available():
        pytest.skip("CUDA is usable here")
    for ask in (
        lambda: ge.ones(2).cuda(),
        lambda: ge.ones(2).to("cuda:1"),
        lambda: ge.ones(2, device="cuda"),
    ):
        with pytest.raises(RuntimeError, match="device: CUDA is not usable: "):
            ask()


def test_detach_shares_memory():
    x = ge.ones(2, requires_grad=True)
    y = x.detach()
    y.add_(1)
    assert x.tolist() == [2.0, 2.0]
    assert not y.requires_grad


def test_data_replaces_a_leaf():
    x = ge.Parameter(ge.ones(2))
    x.data = ge.zeros(3, dtype=ge.float64)
    (x * 2).sum().backward()
    assert x.grad.shape == (3,)
    assert x.grad.dtype == ge.float64


def test_in_place_methods():
    x = ge.tensor([1.0, -2.0])
    same = x
    x += 1
    x -= ge.ones(2)
    x *= 2
    x /= 4
    x.abs_().mul_(2).clamp_(max=1.5)
    assert same is x
    assert x.tolist() == [1.0, 1.5]
    assert x.copy_(ge.tensor(7)).tolist() == [7.0, 7.0]
    assert x.zero_().tolist() == [0.0, 0.0]
    assert x.fill_(3).tolist() == [3.0, 3.0]
    with pytest.raises(RuntimeError, match="copy_: the source must broadcast"):
        x.copy_(ge.ones(3))


def test_overwriting_cuts_the_gradient():
    x = ge.ones(2, requires_grad=True)
    y = x * 2
    y.zero_()
    y.sum().backward()
    assert x.grad.tolist() == [0.0, 0.0]
    source = ge.ones(1, requires_grad=True)
    y = ge.zeros(3)
    y.copy_(source)
    y.sum().backward()
    assert source.grad.tolist() == [3.0]


def test_writing_through_an_index():
    x = ge.zeros(3, 2)
    x[1] = 5
    x[ge.tensor([0, 2]), 1] = ge.tensor([7.0, 8.0])
    x[x == 5] = -1
    assert x.tolist() == [[0.0, 7.0], [-1.0, -1.0], [0.0, 8.0]]
    value = ge.ones(2, requires_grad=True)
    x[0] = value * 3
    x.sum().backward()
    assert value.grad.tolist() == [3.0, 3.0]


def test_printing_names_what_is_not_the_default():
    assert repr(ge.tensor([1.0, 2.0])) == "tensor([1., 2.])"
    assert repr(ge.tensor([1], dtype=ge.int32)) == "tensor([1], dtype=int32)"
    assert repr(ge.tensor(1.5, dtype=ge.float64)) == "tensor(1.5000, dtype=float64)"
    x = ge.tensor([1.0], requires_grad=True)
    assert repr(x) == "tensor([1.], requires_grad=True)"
    assert repr((x * 2).sum()) == "tensor(2., grad_fn=<SumBackward0>)"
    assert (
        repr(ge.Parameter(ge.zeros(1))) == "Parameter containing:\ntensor([0.], requires_grad=True)"
    )


@pytest.mark.parametrize(
    ("write", "gradient"),
    [
        (lambda y: y.mul_(y), [8, 16]),  # y = 2x, so that it is of 4x^2
        (lambda y: y.mul_(y=y), [8, 16]),
        (lambda y: y.mul_(y.detach()), [4, 8]),
        (lambda y: y.mul_(y[:1]), [16, 4]),
        (lambda y: y.div_(y[1]), [0.5, -0.25]),
        (lambda y: y.add_(y), [4, 4]),
    ],
)
def test_a_write_that_reads_its_own_memory_has_the_right_gradient(write, gradient):
    x = ge.tensor([1.0, 2.0], device="cpu", requires_grad=True)
    y = x * 2
    write(y)
    y.sum().backward()
    assert x.grad.tolist() == gradient


def test_keyword_arguments_of_a_write_are_recorded():
    x = ge.tensor([2.0], device="cpu", requires_grad=True)
    w = ge.tensor([3.0], device="cpu")
    w.mul_(y=x)
    w.backward()
    assert x.grad.tolist() == [3]


def test_memory_that_cannot_be_written_is_refused():
    array = np.zeros(2)
    array.flags.writeable = False
    with pytest.raises(RuntimeError, match="read-only"):
        ge.from_numpy(array).add_(1)
    with pytest.raises(RuntimeError, match="more than one element"):
        ge.ones(1, device="cpu").expand(3).zero_()


def test_pytorchs_options_of_arithmetic():
    x, y = ge.tensor([1.0, 2.0], device="cpu"), ge.tensor([3.0, 4.0], device="cpu")
    assert ge.add(x, y, alpha=2).tolist() == [7, 10]
    assert x.sub(y, alpha=2).tolist() == [-5, -6]
    assert x.add_(y, alpha=-1).tolist() == [-2, -2]
    assert ge.sub(x, 1, alpha=3).tolist() == [-5, -5]
    sevens = ge.tensor([7, -7], device="cpu")
    assert ge.div(sevens, 2, rounding_mode="floor").tolist() == [3, -4]
    truncated = sevens.div(2, rounding_mode="trunc")
    assert (truncated.tolist(), truncated.dtype) == ([3, -3], np.int64)
    assert (sevens / 1.0).div(2, rounding_mode="trunc").tolist() == [3, -3]
    large = ge.tensor([2**62 + 1], device="cpu")
    assert large.div(1, rounding_mode="trunc").item() == 2**62 + 1
    with pytest.raises(ValueError, match="rounding_mode must be"):
        ge.div(x, y, rounding_mode="up")


def test_rounding():
    assert ge.tensor([1, 2], device="cpu").round().dtype == np.int64
    assert ge.tensor([1.26, 2.5], device="cpu").round(decimals=1).numpy() == pytest.approx(
        [1.3, 2.5]
    )
    assert ge.round(ge.tensor([126.0], device="cpu"), decimals=-1).tolist() == [130]


def test_numpys_names_of_dims():
    x = ge.tensor([[1.0, 2.0], [3.0, 4.0]], device="cpu")
    assert x.sum(axis=1, keepdims=True).tolist() == [[3], [7]]
    assert ge.argmax(x, axis=0).tolist() == [1, 1]
    assert x.max(axis=1).values.tolist() == [2, 4]
    assert ge.cat([x, x], axis=1).shape == (2, 4)
    assert ge.stack([x, x], axis=2).shape == (2, 2, 2)
    with pytest.raises(TypeError, match="axes"):
        x.sum(axes=1)


def test_where_alone_says_where():
    rows, columns = ge.where(ge.tensor([[True, False], [False, True]], device="cpu"))
    assert (rows.tolist(), columns.tolist()) == ([0, 1], [0, 1])
    assert ge.where(ge.tensor(True, device="cpu"))[0].tolist() == [0]
    x = ge.tensor([1.0, 2.0], device="cpu")
    assert x.where(x > 1, 0.0).tolist() == [0, 2]


def test_tensors_like_another():
    x = ge.ones(2, 3, dtype=ge.float64, device="cpu")
    assert x.new_zeros(2).tolist() == [0, 0]
    assert (x.new_ones((2, 1)).shape, x.new_ones(1).dtype) == ((2, 1), np.float64)
    assert x.new_full((2,), 3, dtype=ge.int64).tolist() == [3, 3]
    row = ge.ones(3, device="cpu")
    assert row.expand_as(x).shape == (2, 3)
    assert (x.view_as(ge.ones(6)).shape, x.T.reshape_as(x).shape) == ((6,), (2, 3))
    assert (x.type(ge.float32).dtype, x.nelement(), ge.is_tensor(x)) == (np.float32, 6, True)
    assert not ge.is_tensor(x.numpy())


def test_filling_with_random_numbers():
    ge.manual_seed(0)
    x = ge.empty(2000, device="cpu")
    assert x.uniform_(2, 3) is x
    assert 2 <= x.min().item() < 2.1
    assert 2.9 < x.max().item() <= 3
    x.normal_(5, 0.1)
    assert (x.mean().item(), x.std().item()) == pytest.approx((5, 0.1), abs=0.02)
    with pytest.raises(TypeError, match="uniform_: dtype must be floating point"):
        ge.zeros(2, dtype=ge.int64, device="cpu").uniform_()
    with pytest.raises(TypeError, match="normal_: dtype must be floating point"):
        ge.zeros(2, dtype=ge.int64, device="cpu").normal_()


def test_pytorchs_names_of_dtypes():
    assert (ge.long, ge.int, ge.short) == (ge.int64, ge.int32, ge.int16)
    assert (ge.double, ge.float, ge.half) == (ge.float64, ge.float32, ge.float16)
    assert ge.zeros(2, dtype=float).dtype == np.float64


def test_moving_takes_pytorchs_options():
    x = ge.ones(2, device="cpu")
    assert x.to("cpu", non_blocking=True) is x
    assert ge.nn.Linear(2, 2, device="cpu").to("cpu", non_blocking=True).in_features == 2
    if not ge.cuda_is_available():
        with pytest.raises(RuntimeError, match="CUDA is not usable"):
            x.to(0)

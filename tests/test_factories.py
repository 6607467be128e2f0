"""Factories: shapes, dtypes, devices, sharing, randomness."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge


@pytest.mark.parametrize(
    ("data", "dtype", "shape"),
    [
        (1, ge.int64, ()),
        (1.5, ge.float32, ()),
        (True, ge.bool, ()),
        ([1, 2], ge.int64, (2,)),
        ([[1, 2.5]], ge.float32, (1, 2)),
        ([], ge.float32, (0,)),
        ([True, False], ge.bool, (2,)),
        (np.ones(2), ge.float64, (2,)),
        (np.float64(1), ge.float64, ()),
        (np.ones(2, np.uint8), ge.uint8, (2,)),
        ([ge.tensor(1.0), ge.tensor(2.0)], ge.float32, (2,)),
        (range(3), ge.int64, (3,)),
    ],
)
def test_tensor_takes_pytorchs_dtypes(data, dtype, shape):
    made = ge.tensor(data)
    assert made.dtype == dtype
    assert made.shape == shape
    assert ge.asarray(data).dtype == dtype


@pytest.mark.parametrize("data", ["text", [[1], [1, 2]], [None], np.array([1j]), object()])
def test_tensor_refuses_what_holds_no_numbers(data):
    with pytest.raises((TypeError, ValueError)):
        ge.tensor(data)


def test_asarray_refuses_arrays_that_tensors_cannot_hold():
    with pytest.raises(TypeError, match="complex128"):
        ge.asarray(np.array([1j]))


def test_tensor_of_a_tensor_is_a_leaf_of_its_own():
    x = ge.ones(2, requires_grad=True)
    y = ge.tensor(x * 2, requires_grad=True)
    assert y.is_leaf
    assert not np.shares_memory(x.array, y.array)


def test_asarray_keeps_the_graph_and_says_when_it_must_copy():
    x = ge.ones(2, requires_grad=True)
    assert ge.asarray(x) is x
    assert ge.asarray(x, copy=True).grad_fn is not None
    assert ge.asarray(x, dtype=ge.float64).grad_fn is not None
    with pytest.raises(ValueError, match="copy=False"):
        ge.asarray(x, dtype=ge.float64, copy=False)
    with pytest.raises(ValueError, match="copy=False"):
        ge.asarray([1.0], copy=False)
    array = np.ones(2)
    assert ge.asarray(array, copy=False).array is array
    assert ge.asarray(array, copy=True).array is not array


def test_from_numpy_takes_arrays_of_known_types():
    with pytest.raises(TypeError, match="must be a numpy.ndarray; got list"):
        ge.from_numpy([1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="complex128"):
        ge.from_numpy(np.array([1j]))


def test_filled():
    assert ge.zeros(2, 3).tolist() == ge.zeros((2, 3)).tolist() == [[0.0] * 3] * 2
    assert ge.ones(2, dtype=ge.int64).tolist() == [1, 1]
    assert ge.full((2,), 7).dtype == ge.int64
    assert ge.full((2,), 7.0).dtype == ge.float32
    assert ge.full((), True).dtype == ge.bool
    assert ge.empty(2, 3).shape == (2, 3)
    assert ge.eye(2, 3).tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]
    x = ge.ones(2, dtype=ge.float64)
    assert ge.zeros_like(x).dtype == ge.float64
    assert ge.ones_like(x, dtype=ge.int64).dtype == ge.int64
    assert ge.full_like(x, 3).tolist() == [3.0, 3.0]
    assert ge.empty_like(x).shape == ge.rand_like(x).shape == ge.randn_like(x).shape == (2,)
    with pytest.raises(ValueError, match="sizes must not be negative"):
        ge.zeros(-1)


def test_sequences():
    assert ge.arange(3).tolist() == [0, 1, 2]
    assert ge.arange(3).dtype == ge.int64
    assert ge.arange(1, 2, 0.5).tolist() == [1.0, 1.5]
    assert ge.arange(1, 2, 0.5).dtype == ge.float32
    assert ge.arange(3, 0, -1).tolist() == [3, 2, 1]
    assert ge.linspace(0, 1, 3).tolist() == [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match="step must be nonzero"):
        ge.arange(0, 3, 0)
    with pytest.raises(ValueError, match="inconsistent with step sign"):
        ge.arange(3, 0)
    with pytest.raises(ValueError, match="must be non-negative"):
        ge.linspace(0, 1, -1)


def test_the_default_dtype():
    ge.set_default_dtype(ge.float64)
    try:
        assert ge.zeros(1).dtype == ge.tensor(1.5).dtype == ge.rand(1).dtype == ge.float64
        assert repr(ge.zeros(1)) == "tensor([0.])"
    finally:
        ge.set_default_dtype(ge.float32)
    with pytest.raises(TypeError, match="must be floating point"):
        ge.set_default_dtype(ge.int64)


def test_random_numbers_follow_the_seed():
    def draw():
        ge.manual_seed(3)
        return [
            ge.rand(5),
            ge.randn(2, 3, dtype=ge.float64),
            ge.randint(0, 10, (4,)),
            ge.randperm(6),
            ge.dropout(ge.ones(8), 0.5),
        ]

    for first, second in zip(draw(), draw(), strict=True):
        assert ge.equal(first, second)
    state = ge.get_rng_state()
    again = ge.rand(3)
    ge.set_rng_state(state)
    assert ge.equal(ge.rand(3), again)
    with pytest.raises(ValueError, match="set_rng_state"):
        ge.set_rng_state(ge.zeros(3))


def test_random_distributions():
    ge.manual_seed(0)
    uniform, normal = ge.rand(20_000), ge.randn(20_000)
    assert 0 <= uniform.min().item() < uniform.max().item() < 1
    assert abs(uniform.mean().item() - 0.5) < 0.01
    assert abs(normal.mean().item()) < 0.03
    assert abs(normal.std().item() - 1) < 0.03
    drawn = ge.randint(3, 6, (1000,))
    assert sorted(set(drawn.tolist())) == [3, 4, 5]
    assert sorted(ge.randperm(50).tolist()) == list(range(50))
    with pytest.raises(ValueError, match="non-empty range"):
        ge.randint(3, 3, (1,))
    with pytest.raises(TypeError, match="must be floating point"):
        ge.rand(2, dtype=ge.int64)


def test_the_shape_may_be_named_size():
    for make in (ge.zeros, ge.ones, ge.empty, ge.rand, ge.randn):
        assert make(size=(2, 3)).shape == (2, 3)
    assert ge.full(size=(2,), fill_value=1).tolist() == [1, 1]
    assert ge.randint(high=10, size=(3,)).shape == (3,)
    assert ge.arange(end=3).tolist() == [0, 1, 2]


def test_integers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="must fit into int64"):
        ge.tensor([2**63])

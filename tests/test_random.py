"""Random numbers under their public names: generators, states, threads, devices, captured steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn
from gradengine.random import fork_rng

DRAWS: dict[str, Callable[..., Any]] = {
    "rand": lambda **options: ge.rand(3, 5, **options),
    "rand of float16": lambda **options: ge.rand(7, dtype=ge.float16, **options),
    "rand of float64": lambda **options: ge.rand(7, dtype=ge.float64, **options),
    "randn": lambda **options: ge.randn(3, 5, **options),
    "randn of float64": lambda **options: ge.randn(7, dtype=ge.float64, **options),
    "randint": lambda **options: ge.randint(-4, 9, (3, 5), **options),
    "randint of uint8": lambda **options: ge.randint(256, size=(9,), dtype=ge.uint8, **options),
    "randperm": lambda **options: ge.randperm(50, **options),
    "uniform_": lambda **options: ge.empty(9).uniform_(-2, 3, **options),
    "normal_": lambda **options: ge.empty(9).normal_(1, 2, **options),
}
every_draw = pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)

# These draw from the process's generator alone.
IMPLICIT: dict[str, Callable[[], Any]] = {
    "rand_like": lambda: ge.rand_like(ge.zeros(3, 4)),
    "randn_like": lambda: ge.randn_like(ge.zeros(3, 4)),
    "dropout": lambda: ge.dropout(ge.ones(5, 7), 0.3),
    "trunc_normal_": lambda: nn.init.trunc_normal_(ge.empty(200), 0, 1, -1, 1),
    "kaiming_normal_": lambda: nn.init.kaiming_normal_(ge.empty(5, 7)),
    "a layer": lambda: nn.Conv2d(2, 3, 3).state_dict()["weight"],
}
every_call = pytest.mark.parametrize(
    "call", (DRAWS | IMPLICIT).values(), ids=(DRAWS | IMPLICIT).keys()
)


# ---- seeds and states ------------------------------------------------------------------------------


@every_call
def test_a_seed_gives_the_same_numbers_again(call: Any) -> None:
    ge.manual_seed(3)
    first, second = call(), call()
    ge.manual_seed(3)
    assert ge.equal(call(), first)
    assert not ge.equal(first, second)
    ge.manual_seed(4)
    assert not ge.equal(call(), first)


@every_call
def test_a_state_continues_where_it_was_taken(call: Any) -> None:
    ge.manual_seed(5)
    call()
    state = ge.get_rng_state()
    expected = call(), call()
    ge.manual_seed(6)
    ge.set_rng_state(state)
    assert ge.equal(call(), expected[0])
    assert ge.equal(call(), expected[1])


def test_seed_and_state() -> None:
    assert ge.manual_seed(7) is ge.default_generator
    assert ge.initial_seed() == 7
    state = ge.get_rng_state()
    assert (state.dtype, state.shape, state.device) == (ge.uint8, (16,), ge.device("cpu"))
    assert state.tolist() == [7] + [0] * 15
    ge.rand(5)  # two blocks of four
    ge.rand(1, dtype=ge.float64)
    assert ge.get_rng_state().tolist() == [7] + [0] * 7 + [3] + [0] * 7
    assert state.tolist() == [7] + [0] * 15  # a copy
    drawn = ge.seed()
    assert ge.initial_seed() == drawn != ge.seed()


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, -1, -(2**63), np.int64(5)])
def test_seeds_of_64_bits(seed: Any) -> None:
    ge.manual_seed(seed)
    assert ge.initial_seed() == int(seed) % 2**64
    first = ge.rand(4)
    state = ge.get_rng_state()
    ge.set_rng_state(state)
    assert ge.initial_seed() == int(seed) % 2**64
    ge.manual_seed(int(seed) % 2**64)
    assert ge.equal(ge.rand(4), first)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1])
def test_other_seeds_are_refused(seed: int) -> None:
    with pytest.raises(ValueError, match=rf"-2\^63 <= seed < 2\^64\); got seed={seed}"):
        ge.manual_seed(seed)


@pytest.mark.parametrize("state", [ge.zeros(16), ge.zeros(15, dtype=ge.uint8), np.zeros((2, 8))])
def test_other_states_are_refused(state: Any) -> None:
    with pytest.raises(ValueError, match=r"set_rng_state: .* \(uint8 of 16 elements\); got dtype"):
        ge.set_rng_state(state)


# ---- generators --------------------------------------------------------------------------------------


@every_draw
def test_a_generator_has_a_stream_of_its_own(draw: Any) -> None:
    generator = ge.Generator().manual_seed(8)
    before = ge.get_rng_state()
    found = draw(generator=generator)
    assert ge.equal(ge.get_rng_state(), before)
    ge.manual_seed(8)
    assert ge.equal(draw(), found)
    assert ge.equal(generator.get_state(), ge.get_rng_state())
    assert not ge.equal(draw(generator=generator), found)


def test_generators_are_as_pytorchs() -> None:
    generator = ge.Generator("cuda:1")  # it serves every device, and asks for none
    assert generator.device == ge.device("cuda", 1)
    assert generator.initial_seed() == 67280421310721
    assert generator.manual_seed(9) is generator
    assert generator.initial_seed() == 9
    state = generator.get_state()
    expected = ge.rand(3, generator=generator)
    other = ge.Generator()
    other.set_state(state)
    assert other.initial_seed() == 9
    assert ge.equal(ge.rand(3, generator=other), expected)
    assert generator.seed() == generator.initial_seed() != 9
    with pytest.raises(TypeError, match="generator must be a gradengine.Generator; got .* int"):
        ge.rand(3, generator=5)


def test_generators_against_pytorch() -> None:
    torch = pytest.importorskip("torch")
    for library in (ge, torch):
        generator = library.Generator()
        assert generator.initial_seed() == 67280421310721
        assert generator.manual_seed(-1).initial_seed() == 2**64 - 1
        drawn = library.randint(0, 10, (4,), generator=generator)
        assert drawn.dtype == library.int64
        assert library.rand(2, generator=generator).shape == (2,)
        assert isinstance(library.manual_seed(1), library.Generator)
        assert library.initial_seed() == 1
        assert isinstance(library.default_generator, library.Generator)


def test_a_fork_of_the_generator() -> None:
    ge.manual_seed(10)
    expected = ge.rand(3)
    ge.manual_seed(10)
    with fork_rng():
        ge.manual_seed(11)
        ge.rand(50)
    assert ge.initial_seed() == 10
    assert ge.equal(ge.rand(3), expected)


def test_threads_never_draw_the_same_numbers() -> None:
    ge.manual_seed(12)
    kinds = [lambda: ge.randint(2**62, size=(6,)), lambda: ge.randint(2**62, size=(2,))]
    drawn: list[list[int]] = [[] for _ in range(4)]
    begin = threading.Barrier(len(drawn))

    def draw(place: int) -> None:
        begin.wait()
        for _ in range(200):
            drawn[place] += kinds[place % 2]().tolist()

    threads = [threading.Thread(target=draw, args=(place,)) for place in range(len(drawn))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = [number for numbers in drawn for number in numbers]
    assert len(set(found)) == len(found)
    # All of them are the seed's first ones, whoever was given them
    ge.manual_seed(12)
    assert sorted(ge.randint(2**62, size=(len(found),)).tolist()) == sorted(found)


# ---- values --------------------------------------------------------------------------------------------


def test_the_ranges_of_integers() -> None:
    assert ge.randint(2**63 - 1, 2**63, (3,)).tolist() == [2**63 - 1] * 3
    assert ge.randint(-(2**63), 1 - 2**63, (3,)).tolist() == [-(2**63)] * 3
    drawn = ge.randint(-(2**63), 2**63, (1000,)).numpy()
    assert (drawn < 0).sum() == pytest.approx(500, abs=60)
    assert set(ge.randint(0, 256, (5000,), dtype=ge.uint8).tolist()) == set(range(256))
    assert set(ge.randint(-128, 128, (5000,), dtype=ge.int8).tolist()) == set(range(-128, 128))
    assert set(ge.randint(2, size=(50,), dtype=ge.bool).tolist()) == {False, True}
    assert ge.randint(3, size=(2,), dtype=ge.float32).dtype == ge.float32


@pytest.mark.parametrize(
    ("low", "high", "dtype"),
    [(0, 257, ge.uint8), (-1, 5, ge.uint8), (-129, 0, ge.int8), (0, 3, ge.bool), (0, 2**63 + 1, ge.int64)],
)  # fmt: skip
def test_integers_that_the_dtype_does_not_hold_are_refused(low: Any, high: Any, dtype: Any) -> None:
    with pytest.raises(ValueError, match=rf"dtype must hold all integers .* got low={low}"):
        ge.randint(low, high, (2,), dtype=dtype)


def test_permutations() -> None:
    ge.manual_seed(13)
    for count in (0, 1, 2, 500):
        assert sorted(ge.randperm(count).tolist()) == list(range(count))
    assert ge.randperm(3).dtype == ge.int64
    orders = [tuple(ge.randperm(3).tolist()) for _ in range(3000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(count - 500) for count in counts) < 80


def test_dropout_keeps_its_share_and_the_mean() -> None:
    ge.manual_seed(14)
    x = ge.ones(40_000)
    for p in (0.1, 0.5, 0.9):
        out = ge.dropout(x, p).numpy()
        assert (out == 0).mean() == pytest.approx(p, abs=0.01)
        assert set(np.unique(out)) == {0, np.float32(1 / (1 - p))}
    assert (ge.dropout(x, 1.0).numpy() == 0).all()


# ---- devices -------------------------------------------------------------------------------------------


@every_call
def test_cuda_draws_what_the_cpu_draws(call: Any, request: pytest.FixtureRequest) -> None:
    ge.manual_seed(15)
    expected = call(), call()
    after = ge.get_rng_state().tolist()
    request.getfixturevalue("emulated_cuda")
    ge.manual_seed(15)
    for first in expected:
        assert call().numpy().tobytes() == first.numpy().tobytes()
    assert ge.get_rng_state().tolist() == after


@pytest.mark.gpu
@every_call
def test_a_gpu_draws_what_the_cpu_draws(call: Any) -> None:
    ge.manual_seed(16)
    expected = call(), call()
    ge.set_default_device("cuda")
    ge.manual_seed(16)
    for first in expected:
        found = call()
        assert found.device.type == "cuda"
        assert found.cpu().numpy().tobytes() == first.numpy().tobytes()

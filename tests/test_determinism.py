"""The same bits again: on any number of threads, and where a GPU would otherwise add in any order."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn, optim
from gradengine.kernels import settings
from gradengine.kernels.cuda import conv2d, indexing, matmul, tuning

ROOT = Path(__file__).parents[1]


@pytest.fixture
def deterministic() -> Iterator[None]:
    ge.use_deterministic_algorithms()
    yield
    ge.use_deterministic_algorithms(False)


# ---- any number of threads -----------------------------------------------------------------------------


def train() -> str:
    """Train a network of each kind of layer from a seed; return a digest of all that came of it."""
    ge.manual_seed(1)
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        *(nn.MaxPool2d(3, 2, 1), nn.Conv2d(8, 24, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.GELU()),
        *(nn.Conv2d(24, 16, 3, stride=2, groups=4), nn.Conv2d(16, 40, 1), nn.AvgPool2d(2)),
        *(nn.Flatten(), nn.Dropout(0.3), nn.Linear(40 * 9, 10)),
    )
    weights = list(model.parameters())
    optimizers = [optim.SGD(weights[:6], lr=0.1, momentum=0.9), optim.Adam(weights[6:])]
    digest = hashlib.sha256()
    for _ in range(3):
        loss = ge.cross_entropy(model(ge.randn(5, 3, 64, 64)), ge.randint(10, size=(5,)))
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        nn.clip_grad_norm_(weights, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        digest.update(loss.detach().numpy().tobytes())
    for tensor in model.state_dict().values():
        digest.update(tensor.numpy().tobytes())
    digest.update(ge.get_rng_state().numpy().tobytes())
    return digest.hexdigest()


def train_on_threads() -> None:
    for count in (1, 2, 4):
        ge.set_num_threads(count)
        print(count, train())


def test_training_gives_equal_bits_on_any_number_of_threads() -> None:
    code = f"from {__name__} import train_on_threads as run; run()"
    settings = {**os.environ, "NUMBA_NUM_THREADS": "4", "GRADENGINE_DEVICE": "cpu"}
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    rows = [line.split() for line in result.stdout.splitlines()]
    assert [row[0] for row in rows] == ["1", "2", "4"]
    assert len({row[1] for row in rows}) == 1


# ---- elements that are named twice ---------------------------------------------------------------------


INDEX = np.array([3, 1, 3, 3, 0, 1, 3, 3])


def gradient_of(call: Any) -> Any:
    generator = np.random.default_rng(0)
    x = ge.tensor(generator.standard_normal((8, 5)).astype(np.float32), requires_grad=True)
    out = call(x)
    weights = generator.standard_normal(out.shape).astype(np.float32) * 10
    out.backward(ge.tensor(weights))
    return x.grad


def source(*shape: int) -> Any:
    return ge.tensor(np.random.default_rng(1).standard_normal(shape).astype(np.float32) * 10)


CALLS: dict[str, Any] = {
    "the gradient of indexing": lambda: gradient_of(lambda x: x[ge.tensor(INDEX)]),
    "the gradient of indexing: gather": lambda: gradient_of(
        lambda x: ge.gather(x, 0, ge.tensor(INDEX[:, None].repeat(5, 1)))
    ),
    "the gradient of indexing: take": lambda: gradient_of(lambda x: ge.take(x, ge.tensor(INDEX))),
    "the gradient of indexing: index_select": lambda: gradient_of(
        lambda x: ge.index_select(x, 1, ge.tensor(INDEX))
    ),
    "scatter_add": lambda: ge.scatter_add(
        source(4, 5), 0, ge.tensor(INDEX[:, None].repeat(5, 1)), source(8, 5)
    ),
    "index_add": lambda: ge.index_add(source(4, 5), 0, ge.tensor(INDEX), source(8, 5)),
    "setitem": lambda: written(source(4, 5), ge.tensor(INDEX), source(8, 5)),
    "setitem: of every second column": lambda: written(
        source(4, 5), (ge.tensor(INDEX), slice(None, None, 2)), source(8, 1)
    ),
    "setitem: scatter": lambda: ge.scatter(
        source(4, 5), 0, ge.tensor(INDEX[:, None].repeat(5, 1)), source(8, 5)
    ),
}
every_call = pytest.mark.parametrize("name", CALLS)


def written(x: Any, index: Any, value: Any) -> Any:
    x[index] = value
    return x


@every_call
def test_repeated_elements_are_added_and_written_in_order(
    name: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = CALLS[name]().numpy()  # NumPy's order is that of the elements
    request.getfixturevalue("emulated_cuda")
    request.getfixturevalue("deterministic")
    sorted_ones = []
    run = indexing._run
    monkeypatch.setattr(
        indexing, "_run", lambda name, *given: (sorted_ones.append(name), run(name, *given))
    )
    assert CALLS[name]().numpy().tobytes() == expected.tobytes()
    assert sorted_ones == [name.partition(":")[0]]


@every_call
def test_the_mode_changes_nothing_on_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    expected = CALLS[name]().numpy()
    request.getfixturevalue("deterministic")
    assert CALLS[name]().numpy().tobytes() == expected.tobytes()


@every_call
def test_a_captured_step_refuses_them(
    name: str, emulated_cuda: Any, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexing, "in_step", lambda: True)
    with pytest.raises(
        RuntimeError, match=rf"{name.partition(':')[0]}: .* named twice need a fixed"
    ):
        CALLS[name]()


@pytest.mark.gpu
@every_call
def test_a_gpu_adds_and_writes_in_order(name: str, deterministic: None) -> None:
    expected = CALLS[name]().numpy()
    ge.set_default_device("cuda")
    for _ in range(3):
        assert CALLS[name]().cpu().numpy().tobytes() == expected.tobytes()


@pytest.mark.parametrize("value", [[[1.0, 2.0]], source(3, 5), source(8, 4)])
def test_values_that_do_not_fit_are_refused_as_ever(value: Any, deterministic: None) -> None:
    with pytest.raises(ValueError, match="setitem: value must broadcast"):
        written(source(4, 5), ge.tensor(INDEX), value)


# ---- products, and choices by time -------------------------------------------------------------------


class CupyLike:
    """What only cuBLAS or a kernel of this house can multiply."""

    dtype, ndim, shape = np.dtype(np.float64), 2, (3, 3)


def test_products_are_not_cublas_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "multiply", lambda *given: "own")
    monkeypatch.setattr(matmul, "_may_use_tensor_cores", lambda dtype: False)
    x: Any = CupyLike()
    with pytest.raises(TypeError, match="must be a NumPy or CuPy array"):  # CuPy is asked
        matmul._choose(x, x)
    monkeypatch.setattr(settings.general, "deterministic", True)
    assert matmul._choose(x, x) == "own"


@pytest.mark.parametrize("shapes", [((5,), (5,)), ((3, 5), (5,)), ((2, 3, 5), (5,)), ((0,), (0,))])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_products_of_vectors(shapes: Any, dtype: Any, deterministic: None) -> None:
    generator = np.random.default_rng(2)
    x, y = (generator.integers(-4, 5, shape).astype(dtype) for shape in shapes)
    found = ge.matmul(ge.tensor(x), ge.tensor(y))
    assert found.dtype == dtype
    np.testing.assert_array_equal(found.numpy(), x @ y)


def test_long_products_do_not_ask_blas(
    deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(3).standard_normal((9, 1 << 19)).astype(np.float32)
    expected = x.astype(np.float64) @ x[0]
    monkeypatch.setattr(np, "matmul", None)
    np.testing.assert_allclose(
        ge.mv(ge.tensor(x), ge.tensor(x[0])).numpy(), expected, rtol=1e-4, atol=0.1
    )
    assert ge.dot(ge.tensor(x[0]), ge.tensor(x[0])).item() == pytest.approx(expected[0], rel=1e-4)


@pytest.mark.parametrize("dtype", [ge.float16, ge.float32, ge.float64, ge.bfloat16])
def test_norms_of_gradients_do_not_ask_blas(
    dtype: Any, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = nn.Parameter(ge.zeros(3, 4, dtype=dtype))
    p.grad = ge.full((3, 4), 100.0, dtype=dtype)
    norm, asked = np.linalg.norm, []
    monkeypatch.setattr(np.linalg, "norm", lambda x, n: (asked.append(x.shape), norm(x, n))[1])
    assert nn.clip_grad_norm_(p, 1.0).item() == pytest.approx(100 * 12**0.5, rel=0.01)
    assert asked == [(1,)]  # of the norms of all parameters, which are few
    assert p.grad.float().numpy() == pytest.approx(12**-0.5, rel=0.01)


def test_tiles_are_not_timed(
    emulated_cuda: Any, deterministic: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(settings.cuda, "benchmark", True)
    monkeypatch.setattr(tuning, "fastest", lambda *given: asked.append(given))
    x, weight = ge.ones(1, 8, 4, 4), ge.ones(8, 8, 3, 3)
    ge.conv2d(x, weight)
    assert asked == []
    ge.use_deterministic_algorithms(False)
    ge.conv2d(x, weight)
    assert asked
    assert conv2d.settings is settings


# ---- the mode ------------------------------------------------------------------------------------------


def test_the_mode_has_pytorchs_names() -> None:
    torch = pytest.importorskip("torch")
    for library in (ge, torch):
        assert not library.are_deterministic_algorithms_enabled()
        library.use_deterministic_algorithms(True)
        assert library.are_deterministic_algorithms_enabled()
        library.use_deterministic_algorithms(False)
        assert not library.are_deterministic_algorithms_enabled()
    ge.use_deterministic()
    assert ge.are_deterministic_algorithms_enabled()
    ge.use_deterministic(False)
    assert not ge.are_deterministic_algorithms_enabled()

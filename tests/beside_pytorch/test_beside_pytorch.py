"""Every public operation beside PyTorch's of the same name: values, dtypes, shapes, derivatives, refusals.

The run's summary says how many things agree. What does not is listed in `differences`, with the reason: a
difference that is not there fails, and so does a reason that explains nothing any more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest

import gradengine as ge
from gradengine import functional
from gradengine.kernels import settings

torch = pytest.importorskip("torch")

from tests.beside_pytorch.calls import all_calls  # noqa: E402 - they need PyTorch
from tests.beside_pytorch.comparison import Call, compare  # noqa: E402
from tests.beside_pytorch.differences import DIFFERENCES  # noqa: E402

OPERATIONS = sorted(
    {name for name, value in vars(functional).items() if callable(value)}
    | {"contiguous", "getitem", "setitem"}  # what only a tensor has
)


calls = cache(all_calls)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Run small calls in one thread: several would only wait for each other."""
    before = ge.get_num_threads(), torch.get_num_threads()
    ge.set_num_threads(1)
    torch.set_num_threads(1)
    yield
    ge.set_num_threads(before[0])
    torch.set_num_threads(before[1])


def test_every_operation_has_calls_and_every_difference_an_operation():
    assert sorted(calls()) == OPERATIONS
    named = {name for difference in DIFFERENCES for name in difference.operations.split()}
    assert sorted(named - set(calls())) == []


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """Give the name of gradengine's default device, where convolutions round nothing to TF32."""
    before, settings.cuda.conv_tf32 = settings.cuda.conv_tf32, False
    ge.set_default_device(request.param)
    yield request.param
    settings.cuda.conv_tf32 = before


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation(operation: str, device: str, record_property: Callable[[str, object], None]):
    agreements, explained, unexplained = 0, set(), []
    for call in calls()[operation]:
        count, words = compare(call, device)
        agreements += count
        for difference in words:
            row = next(
                (d for d in DIFFERENCES if d.explains(operation, call.note, difference)), None
            )
            explained.add(row)
            if row is None:
                unexplained.append(f"{call.note}: {difference}")
            else:
                record_property("listed difference", DIFFERENCES.index(row))
    record_property("calls beside PyTorch", len(calls()[operation]))
    record_property("agreements", agreements)
    assert unexplained == []
    rows = [row for row in DIFFERENCES if operation in row.operations.split()]
    assert [row for row in rows if row not in explained] == []


# ---- the comparison itself -----------------------------------------------------------------------

X = np.array([1.0, -2.0, 0.0])


def _broken(ours: Callable[[Any], Any], theirs: Callable[[Any], Any]) -> list[str]:
    run = lambda library, x: ours(x) if library is ge else theirs(x)  # noqa: E731
    return compare(Call("broken", "float64", run, (X,)))[1]


def _refuse(words: str) -> Any:
    raise ValueError(words)


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        (lambda x: x * 2, lambda x: x * 3, "value: some for some"),
        (lambda x: x.detach() * 0.0, lambda x: x.detach() * -0.0, "value: -0.0 for 0.0"),
        (lambda x: x.float(), lambda x: x, "value of dtype float32, in PyTorch float64"),
        (lambda x: x[:2], lambda x: x, "value of shape (2,), in PyTorch (3,)"),
        (lambda x: (x, x), lambda x: x, "2 results, in PyTorch 1"),
        (lambda x: x.detach(), lambda x: x, "requires_grad (False,), in PyTorch (True,)"),
        (lambda x: (x == x).any().item(), lambda x: 1, "value True, in PyTorch 1"),
        (lambda x: x + (x - x.detach()), lambda x: x * 1, "first derivative by input 0: some for 1.0"),
        (lambda x: _refuse("broken: no"), lambda x: x, "refused by gradengine alone: ValueError"),
        (lambda x: x, lambda x: _refuse("no"), "refused by PyTorch alone: ValueError: no"),
        (lambda x: _refuse("no"), lambda x: _refuse("no"), "refused without the operation's name"),
        (lambda x: _refuse("broken: no"), lambda x: x[3], "refused as ValueError, by PyTorch as IndexError"),
    ],
)  # fmt: skip
def test_a_fault_is_put_into_words(ours, theirs, words):
    found = _broken(ours, theirs)
    assert any(line.startswith(words) for line in found), found


def test_a_wrong_second_derivative_is_found():
    # x * x, with a derivative that is recorded as a number
    found = _broken(lambda x: x * x.detach() * 2 - (x * x).detach(), lambda x: x * x)
    assert [line.partition(":")[0] for line in found] == ["second derivative by input 0"]


def test_agreement_is_counted():
    assert _broken(lambda x: x.exp(), lambda x: x.exp()) == []
    run = lambda library, x: library.exp(x)  # noqa: E731
    # The value, whether it requires grad, and its derivatives: plain, recorded, and the second
    assert compare(Call("exp", "float64", run, (X,))) == (5, [])
    refused = lambda library, x: library.reshape(x, (5,))  # noqa: E731
    assert compare(Call("reshape", "float64", refused, (X,))) == (1, [])

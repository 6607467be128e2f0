"""What all tests share: one body for both devices, and who is skipped where."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import hypothesis
import numpy
import pytest

from gradengine.devices import cuda_unavailable_reason, import_cupy, set_default_device
from tests.emulator.fixtures import emulated_cuda  # noqa: F401 - a fixture of all tests

# How long an example takes depends on what else the machine does: no test is about time.
hypothesis.settings.register_profile("gradengine", hypothesis.settings(), deadline=None)
# Some thousands of random programs: pytest --hypothesis-profile=thorough
hypothesis.settings.register_profile(
    "thorough", hypothesis.settings(), deadline=None, max_examples=1500
)
hypothesis.settings.load_profile("gradengine")


@pytest.fixture(params=["numpy", pytest.param("cupy", marks=pytest.mark.gpu)])
def xp(request: pytest.FixtureRequest) -> Any:
    """Give the array module: the test runs with NumPy, and with CuPy where a GPU is usable."""
    return numpy if request.param == "numpy" else import_cupy()


@pytest.fixture(autouse=True)
def _tensors_on_the_cpu() -> Iterator[None]:
    """Make new tensors on the CPU, whatever the machine has, unless a test says otherwise."""
    set_default_device("cpu")
    yield
    set_default_device(None)


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what compares with PyTorch, so that ``-m pytorch`` finds every such test."""
    if _uses_torch(item):
        item.add_marker("pytorch")


def _uses_torch(item: pytest.Item) -> bool:
    """Whether the test's module holds `torch`, or the test asks for it with importorskip."""
    if not isinstance(item, pytest.Function):
        return False
    code = item.function.__code__
    return hasattr(item.module, "torch") or (
        "importorskip" in code.co_names and "torch" in code.co_consts
    )


@cache
def _nvrtc_unavailable_reason() -> str | None:
    """Return why CUDA sources cannot be compiled here, or None."""
    if find_spec("cupy") is None:
        return "CuPy is not installed"
    try:
        from cupy_backends.cuda.libs import nvrtc  # pyright: ignore[reportMissingImports]

        nvrtc.getVersion()
    except Exception as error:  # the libraries that CuPy loads may lack anything
        return f"NVRTC is not usable: {error}"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, saying why, what this machine cannot run."""
    if item.get_closest_marker("gpu"):
        reason = cuda_unavailable_reason()
        if reason is not None:
            pytest.skip(f"CUDA is not usable: {reason}")
    if item.get_closest_marker("nvrtc"):
        reason = _nvrtc_unavailable_reason()
        if reason is not None:
            pytest.skip(reason)
    if item.get_closest_marker("pytorch") and find_spec("torch") is None:
        pytest.skip("PyTorch is not installed")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Say how many things agree with PyTorch, where they were compared (tests/beside_pytorch)."""
    noted = [
        pair
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for pair in report.user_properties
    ]
    totals = {
        name: sum(value for key, value in noted if key == name)
        for name in ("calls beside PyTorch", "agreements")
    }
    if totals["agreements"]:
        listed = sum(name == "listed difference" for name, _ in noted)
        terminalreporter.write_line(
            f"beside PyTorch: {totals['agreements']} values, derivatives and refusals of "
            f"{totals['calls beside PyTorch']} calls agree; {listed} differ, as listed with the reasons"
        )

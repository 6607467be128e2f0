"""How every row is measured: beside its peers, in turns, in one run; medians; tables at the end.

python -m pytest benchmarks                 # all rows; a peer's where it is installed
python -m pytest benchmarks -k convolution  # some rows
python -m pytest benchmarks --report        # all rows, kept with a plot, and the table in README.md
"""

from __future__ import annotations

import os

# OpenBLAS's threads spin for a while after each product, in the way of Numba's and of the peers'.
# Must stand before NumPy is imported; the other peers' libraries do not read it.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import gradengine as ge
from benchmarks import report, timing

RESULTS = pytest.StashKey[list[report.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--report", action="store_true", help="keep the rows in benchmarks/results, draw, tabulate"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch on all cores, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(os.cpu_count() or 1)
    return torch


@pytest.fixture(autouse=True)
def default_device() -> Iterator[None]:
    """Keep these benchmarks on the CPU, also where there is a GPU."""
    ge.set_default_device("cpu")
    yield
    ge.set_default_device(None)


@pytest.fixture
def record(request: pytest.FixtureRequest) -> Callable[[report.Row], None]:
    """Return what adds a row to the results."""
    return request.config.stash[RESULTS].append


@pytest.fixture
def race(record: Callable[[report.Row], None]) -> Callable[..., None]:
    """Return race(group, name, runs), which times runs by name in turns and records the medians.

    `runs` holds "gradengine" and any peers. `calls` is how many units (operations, say) one run
    holds; `flop` and `moved` are its floating point operations and the bytes it has to move at
    least: they only scale what is reported. `seconds` and `pause` are those of `timing.race`.
    """

    def run(
        group: str,
        name: str,
        runs: dict[str, Callable[[], Any]],
        *,
        calls: int = 1,
        flop: float = 0.0,
        moved: float = 0.0,
        seconds: float = 2.0,
        pause: float = timing.PAUSE,
    ) -> None:
        found = timing.race(runs, seconds, pause)
        medians = {key: median / calls for key, median in found.items()}
        record(report.Row(group, name, medians, "s", flop / calls, moved / calls))

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the tables; with --report also keep them."""
    rows = config.stash[RESULTS]
    if not rows:
        return
    terminalreporter.section("gradengine beside its peers (medians of alternating rounds)")
    terminalreporter.write_line(report.text_tables(rows))
    if config.getoption("--report"):
        terminalreporter.write_line(f"kept in {report.keep(rows)}")

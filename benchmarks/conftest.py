"""How every row is measured: beside its peer, in turns, in one run; medians; one table at the end.

python -m pytest benchmarks                 # all rows; PyTorch's where it is installed
python -m pytest benchmarks -k convolution  # some rows
"""

from __future__ import annotations

import os

# OpenBLAS's threads spin for a while after each product, in the way of Numba's and of the peer's.
# Must stand before NumPy is imported; PyTorch's own libraries do not read it.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import importlib.util
import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest

import gradengine as ge

ROWS: list[dict[str, Any]] = []


@pytest.fixture(scope="session")
def torch() -> Any:
    """PyTorch on all cores, or None where it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_num_threads(os.cpu_count() or 1)
    return torch


@pytest.fixture(autouse=True)
def default_device() -> None:
    """Keep these benchmarks on the CPU, also where there is a GPU."""
    ge.set_default_device("cpu")


@pytest.fixture
def race(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return race(ours, peer, ...), which times `ours` with a run of `peer` before every round.

    `peer` may be None. `calls` is how many units (operations, say) one run holds, `flop` how many
    floating point operations; both only scale what is reported.
    """

    def run(
        ours: Callable[[], Any],
        peer: Callable[[], Any] | None,
        *,
        peer_name: str = "PyTorch",
        rounds: int = 15,
        calls: int = 1,
        flop: float = 0.0,
    ) -> None:
        ours()  # compiles what is not compiled yet
        peer_times: list[float] = []

        def run_peer() -> None:
            if peer is not None:
                start = time.perf_counter()
                peer()
                peer_times.append(time.perf_counter() - start)

        run_peer()
        peer_times.clear()
        benchmark.pedantic(ours, setup=run_peer, rounds=rounds, iterations=1)
        seconds = statistics.median(benchmark.stats.stats.data) / calls
        row: dict[str, Any] = {"name": request.node.name.removeprefix("test_"), "seconds": seconds}
        if flop:
            row["gflops"] = flop / calls / seconds / 1e9
        if peer_times:
            row.update(peer=peer_name, peer_seconds=statistics.median(peer_times) / calls)
            row["ratio"] = row["peer_seconds"] / seconds
        benchmark.extra_info.update(row)
        ROWS.append(row)

    return run


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:.4g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the ratio table: above 1, gradengine is the faster."""
    if not ROWS:
        return
    terminalreporter.section("gradengine beside its peers (medians of alternating rounds)")
    width = max(len(row["name"]) for row in ROWS)
    for row in ROWS:
        text = f"{row['name']:<{width}}  {_time(row['seconds']):>10}"
        if "gflops" in row:
            text += f"  {row['gflops']:6.1f} GFLOP/s"
        if "ratio" in row:
            text += f"  {row['peer']} {_time(row['peer_seconds']):>10}  ratio {row['ratio']:.2f}"
        terminalreporter.line(text)

"""One row: contestants are made, then timed in alternating turns, and what fails is only left out."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from benchmarks.gpu_device import Device, Run

# A step is timed as a program runs it, a kernel without Python; a count is left to the row's check.
STEP, KERNEL, COUNT = "step", "kernel", "count"
SAMPLES = (3, 20)  # timed samples of one turn
TURN = 0.12  # seconds that a turn of steps takes, about
KERNEL_TURN = 0.01
KERNEL_SAMPLE = 1e-4  # seconds: shorter runs are timed several at a time
QUEUED = 100  # runs that may be queued ahead of the device


@dataclass
class Contestant:
    """A name, and what makes its run."""

    name: str
    make: Callable[[], Run]


@dataclass
class Row:
    """What one row measures. `flop` and `moved` (bytes) are one run's, and only scale what is said.

    `labels` say which row of its group it is; `check` looks at the runs by name before they are
    timed, and returns numbers to keep by contestant.
    """

    group: str
    name: str
    contestants: Sequence[Contestant]
    kind: str = KERNEL
    seconds: float = 0.4
    flop: float = 0.0
    moved: float = 0.0
    labels: dict[str, Any] = field(default_factory=dict)
    check: Callable[[dict[str, Run]], dict[str, dict[str, float]]] | None = None
    importance: float = 0.0  # rows of low numbers come first


Failed = Callable[[str], None]  # is given a traceback


class BudgetSpentError(BaseException):
    """The time for the whole run is over: no row may catch it as one of its own failures."""


def measure(device: Device, row: Row, failed: Failed) -> dict[str, Any]:
    """Make and time a row's contestants; return what is kept of it, as JSON can hold it.

    Where the budget ends meanwhile, that is what was measured until then, and "cut" is true.
    """
    found: dict[str, dict[str, Any]] = {contestant.name: {} for contestant in row.contestants}
    kept = {
        "group": row.group,
        "name": row.name,
        "kind": row.kind,
        "labels": row.labels,
        "flop": row.flop,
        "moved": row.moved,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "contestants": found,
    }
    samples: dict[str, list[list[float]]] = {}
    try:
        runs = _make(device, row, found, failed)
        if row.check is not None:
            with _Noting(kept, row, "check", failed):
                for name, values in row.check(runs).items():
                    found.setdefault(name, {}).update(values)
        if row.kind != COUNT:
            _race(device, row, runs, (found, samples), failed)
    except BudgetSpentError:
        kept["cut"] = True
    for name, rounds in samples.items():
        if rounds and "error" not in found[name]:
            found[name] |= _summary(rounds)
    return kept


def _make(
    device: Device, row: Row, found: dict[str, dict[str, Any]], failed: Failed
) -> dict[str, Run]:
    """Return the run of each contestant that can be made and that ran twice."""
    runs: dict[str, Run] = {}
    for contestant in row.contestants:
        notes = found[contestant.name]
        with _Noting(notes, row, contestant.name, failed):
            run, first, memory = device.watch_memory(contestant.make)
            runs[contestant.name] = run
            notes |= {"first": first, "arrays_bytes": memory.arrays, "device_bytes": memory.device}
    return runs


def _summary(rounds: list[list[float]]) -> dict[str, Any]:
    everything = [seconds for turn in rounds for seconds in turn]
    return {
        "median": statistics.median(everything),
        "min": min(everything),
        "samples": len(everything),
        "rounds": [statistics.median(turn) for turn in rounds],
    }


class _Noting:
    """A context that keeps an exception's first line under "error", and goes on."""

    def __init__(self, found: dict[str, Any], row: Row, name: str, failed: Failed) -> None:
        self.found, self.failed = found, failed
        self.title = f"{row.group}, {row.name}: {name}"

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, Exception):  # nothing, Ctrl-C, or the end of the budget
            return False
        lines = str(error).strip().splitlines() or [""]
        self.found["error"] = f"{type(error).__name__}: {lines[0]}"[:300]
        self.failed(f"{self.title}\n{''.join(traceback.format_exception(error))}")
        return True


def _race(
    device: Device,
    row: Row,
    runs: dict[str, Run],
    kept: tuple[dict[str, dict[str, Any]], dict[str, list[list[float]]]],
    failed: Failed,
) -> None:
    """Time the runs in turns; each turn's seconds go to the lists of `kept` at once."""
    found, samples = kept
    plans: dict[str, tuple[int, int, float]] = {}
    end = time.perf_counter() + row.seconds
    for number in range(device.rounds[1]):
        if number >= device.rounds[0] and time.perf_counter() > end:
            break
        for name, run in list(runs.items()):
            with _Noting(found[name], row, name, failed):
                if name not in plans:
                    plans[name] = _plan(device, run, row.kind)
                run()  # untimed: it finds the caches as the others left them
                samples.setdefault(name, []).append(device.time(run, *plans[name]).seconds)
            if "error" in found[name]:
                del runs[name]


def _plan(device: Device, run: Run, kind: str) -> tuple[int, int, float]:
    """Return a turn's samples, the runs of each, and how long queueing one ahead takes (or 0)."""
    pilot = device.time(run, SAMPLES[0])
    length = statistics.median(pilot.seconds)
    if kind == STEP:
        return _clamp(TURN / length), 1, 0.0
    ahead = max(pilot.queueing, 1e-6)
    length = statistics.median(device.time(run, SAMPLES[0], 1, ahead).seconds)
    inner = min(10, 1 + int(KERNEL_SAMPLE / length))
    count = min(_clamp(KERNEL_TURN / (inner * length)), max(SAMPLES[0], QUEUED // inner))
    return count, inner, ahead


def _clamp(count: float) -> int:
    return min(max(int(count), SAMPLES[0]), SAMPLES[1])

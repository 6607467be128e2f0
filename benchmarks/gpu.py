"""Measure the GPU kernels and whole ResNet-18 steps beside PyTorch, on one device in one process.

    python benchmarks/gpu.py                                               # everything, in minutes
    python benchmarks/gpu.py --only training --batches 256 --peers eager   # in well under a minute
    python benchmarks/gpu.py --only convolutions,passes --seconds 120
    python benchmarks/gpu.py --only tiles                                  # of convolutions, each one
    python benchmarks/gpu.py --rehearse                                    # without a GPU, on tiny sizes

Contestants of a row take turns; a time is the median of what events on the device say. Steps are timed
as a program runs them, Python included; of kernels only the device's part counts. Both libraries
choose among their convolutions by timing them (cudnn.benchmark, ge.backends.cuda.benchmark) and have
TF32 allowed; both start from the same weights and find their inputs on the device.

Rows come in the order of their importance, and each is in the file of results as soon as it is
measured: when --seconds are over, the others are listed as not measured. What fails is left out of
its row, with its traceback in the log beside the file. `python -m benchmarks.gpu_report` makes the
table in README.md of the results.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file: its folder is on the path, the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks import gpu_kernels, gpu_passes, gpu_report, gpu_steps
from benchmarks.gpu_device import Cuda, Device, Rehearsal, import_torch
from benchmarks.gpu_kernels import Sizes
from benchmarks.gpu_process import launch_rows, process_rows
from benchmarks.gpu_race import BudgetSpentError, Row, measure
from gradengine.devices import cuda_unavailable_reason

FOLDER = Path(__file__).resolve().parent / "results"
BATCHES = (256, 32, 1, 64, 8)
SECONDS = 560.0
Rows = Callable[[Device, argparse.Namespace], Iterable[Row]]


def _steps(kind: str) -> Rows:
    def rows(device: Device, options: argparse.Namespace) -> Iterator[Row]:
        pixels = 32 if options.rehearse else 224
        batches = options.batches if kind == "training" else options.batches[:3]
        return gpu_steps.step_rows(device, kind, batches, options.peers, pixels)

    return rows


def _kernels(make: Callable[[Device, Sizes], Iterable[Row]]) -> Rows:
    return lambda device, options: make(device, Sizes(options.rehearse))


GROUPS: dict[str, Rows] = {
    "limits": _kernels(gpu_kernels.limit_rows),
    "training": _steps("training"),
    "convolutions": _kernels(gpu_kernels.convolution_rows),
    "passes": _kernels(gpu_passes.pass_rows),
    "matmul": _kernels(gpu_kernels.matmul_rows),
    "frozen": _steps("frozen"),
    "forward": _steps("forward"),
    "process": lambda device, options: process_rows(device, 2 if options.rehearse else 32),
    "tiles": _kernels(gpu_kernels.tile_rows),
    "launches": lambda device, options: launch_rows(device, options.batches, options.rehearse),
}
UNASKED = [name for name in GROUPS if name != "tiles"]  # what a run measures unless told


# ---- the command line ----------------------------------------------------------------------------


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    groups, peers = ",".join(GROUPS), ",".join(gpu_steps.PEERS)
    add("--only", type=_choices("group", GROUPS), default=UNASKED, metavar="GROUP,...",
        help=f"groups of rows, of {groups}")  # fmt: skip
    add("--rows", type=re.compile, default=re.compile(""), metavar="REGEX",
        help="of these groups only the rows in whose name it is found")  # fmt: skip
    add("--batches", type=_numbers, default=None, metavar="N,...",
        help="batch sizes of training steps, by importance; the first three of other steps "
        f"({','.join(map(str, BATCHES))})")  # fmt: skip
    add("--peers", type=_choices("peer", gpu_steps.PEERS), default=list(gpu_steps.PEERS),
        metavar="PEER,...", help=f"PyTorch's ways to run a step, of {peers}")  # fmt: skip
    add("--seconds", type=float, default=SECONDS, help=f"for the whole run ({SECONDS:g})")
    add("--out", type=Path, default=FOLDER, metavar="FOLDER", help=f"of the results ({FOLDER})")
    add("--commit", default=None, help="what is measured, where this is no git checkout")
    add("--rehearse", action="store_true", help="run all code once, without a GPU, times made up")
    options = parser.parse_args(arguments)
    if options.batches is None:
        options.batches = [2] if options.rehearse else list(BATCHES)
    return options


def _choices(what: str, known: Iterable[str]) -> Callable[[str], list[str]]:
    """Return what reads some of the known names, separated by commas."""

    def read(text: str) -> list[str]:
        names = [name for name in text.split(",") if name]
        unknown = [name for name in names if name not in known]
        if unknown or not names:
            expected = ", ".join(known)
            raise argparse.ArgumentTypeError(f"no {what} is called {unknown}; there are {expected}")
        return names

    return read


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


# ---- the file of results -------------------------------------------------------------------------


class Results:
    """The file of one run's rows, written anew after each of them, and the log beside it."""

    def __init__(self, folder: Path, about: dict[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = _new_file(folder, f"gpu {about.get('device')} {about['date']}")
        self.log = self.path.with_suffix(".log")
        self.content: dict[str, Any] = {"about": about, "rows": [], "not_measured": []}

    def add(self, row: dict[str, Any]) -> None:
        self.content["rows"].append(row)
        self.write()

    def write(self) -> None:
        """Replace the file by a complete one: whoever stops the run finds one or the other."""
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.content, indent=1, ensure_ascii=False) + "\n")
        partial.replace(self.path)

    def failed(self, text: str) -> None:
        with self.log.open("a") as log:
            log.write(text + "\n")


def _new_file(folder: Path, name: str) -> Path:
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    candidates = [f"{stem}.json", *(f"{stem}-{number}.json" for number in range(2, 1000))]
    return next(folder / name for name in candidates if not (folder / name).exists())


# ---- the run -------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 where there is no GPU."""
    options = parse(arguments)
    started = time.perf_counter()
    reason = None if options.rehearse else cuda_unavailable_reason()
    if reason is not None:
        print(f"gpu: CUDA is not usable: {reason}; --rehearse runs without it", file=sys.stderr)
        return 2
    device = (Rehearsal if options.rehearse else Cuda)(import_torch())
    about = {"date": date.today().isoformat(), **device.about()}
    if options.commit:
        about["commit"] = options.commit
    results = Results(options.out, about)
    print(gpu_report.headline(about), flush=True)
    rows = [
        row
        for name in options.only
        for row in GROUPS[name](device, options)
        if options.rows.search(row.name)
    ]
    rows.sort(key=lambda row: row.importance)
    _measure_all(device, rows, results, started + options.seconds, options.rehearse)
    about["seconds"] = round(time.perf_counter() - started, 1)
    about["clocks_after"] = device.clocks()
    results.write()
    print(gpu_report.text_tables(results.content))
    print(f"kept in {results.path} after {about['seconds']:.0f} s")
    return 0


def _measure_all(
    device: Device, rows: list[Row], results: Results, end: float, rehearse: bool
) -> None:
    started = time.perf_counter()
    for row in rows:
        left = end - time.perf_counter()
        if left <= 0:
            results.content["not_measured"].append(f"{row.group}, {row.name}")
            continue
        with _budget(None if rehearse else left):
            kept = measure(device, row, results.failed)
            results.add(kept)
        device.free()
        elapsed = time.perf_counter() - started
        print(f"[{elapsed:4.0f} s] {gpu_report.line(kept)}", flush=True)


@contextmanager
def _budget(seconds: float | None) -> Iterator[None]:
    """End what takes longer than the rest of the budget, a compilation say: `measure` catches it."""

    def spent(number: int, frame: Any) -> None:
        raise BudgetSpentError

    if seconds is None:
        yield
        return
    before = signal.signal(signal.SIGALRM, spent)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except BudgetSpentError:
        pass  # between two rows
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


if __name__ == "__main__":
    sys.exit(main())

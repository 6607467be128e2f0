"""The CUDA kernels under compute-sanitizer: ``python -m tests.sanitize --out FOLDER``.

Runs the GPU tests of the kernels, all of small arrays, once under each of its tools: memcheck
(accesses outside of arrays), racecheck (shared memory), synccheck (barriers) and initcheck (global
memory read before it is written). Prints a table and keeps the tools' logs; the exit status is 1
where a tool finds something, 2 where one cannot run.

Each test runs 10 to 100 times slower than usual: ``--seconds`` limits each tool, and tests come in an
order that takes all files in turn, so that a short run sees a part of everything.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
OPTIONS = {
    "memcheck": ("--destroy-on-device-error", "kernel"),  # the tests after it go on
    "racecheck": ("--racecheck-report", "analysis"),
}
GRACE = 60  # seconds in which a tool must end after its limit
_FOUND = re.compile(r"ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: (\d+) hazards?")


class Outcome(NamedTuple):
    """What a tool found; errors is None where it did not come to its end."""

    tool: str
    errors: int | None
    passed: int
    failed: int
    seconds: float
    note: str


def find_sanitizer() -> str | None:
    """Return the path of compute-sanitizer: of PATH, of a toolkit, or of a wheel."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    toolkit = Path(os.environ.get("CUDA_PATH", "/usr/local/cuda"))
    wheels = Path(sysconfig.get_path("purelib")) / "nvidia"
    candidates = [toolkit / "bin" / "compute-sanitizer"]
    candidates += [toolkit / "compute-sanitizer" / "compute-sanitizer"]
    candidates += sorted(wheels.glob("**/compute-sanitizer"))
    return next((str(path) for path in candidates if os.access(path, os.X_OK)), None)


def run_tool(sanitizer: str, tool: str, out: Path, seconds: float, tests: Sequence[str]) -> Outcome:
    """Run the tests under one tool, which gets `seconds`, and read what it and pytest say."""
    log, output = out / f"{tool}.log", out / f"{tool}.tests.txt"
    log.unlink(missing_ok=True)
    inside = (sys.executable, "-m", "tests.sanitize", "--inside", str(seconds), *tests)
    command = (sanitizer, "--tool", tool, *OPTIONS.get(tool, ()), "--log-file", str(log), *inside)
    started = time.monotonic()
    with output.open("w") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds + GRACE)
            note = "" if status in (0, 1) else f"exit status {status}, see {output}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            note = f"killed after {seconds + GRACE:.0f} s"
    text = output.read_text(errors="replace")
    passed, failed = (
        len(re.findall(r" PASSED", text)),
        len(re.findall(r" (?:FAILED|ERROR)\b", text)),
    )
    errors = count_errors(log.read_text(errors="replace") if log.exists() else "")
    if errors is None and not note:
        note = f"no summary in {log}"
    return Outcome(tool, errors, passed, failed, time.monotonic() - started, note)


def count_errors(log: str) -> int | None:
    """Return the errors or hazards of a tool's log, of all its processes; None without a summary."""
    counts = [int(one or other) for one, other in _FOUND.findall(log)]
    return sum(counts) if counts else None


def table(outcomes: Sequence[Outcome]) -> str:
    """Return a row for each tool."""
    lines = [f"{'tool':<10}{'errors':>8}{'passed':>8}{'failed':>8}{'seconds':>9}  note"]
    for outcome in outcomes:
        errors = "-" if outcome.errors is None else outcome.errors
        lines.append(
            f"{outcome.tool:<10}{errors:>8}{outcome.passed:>8}{outcome.failed:>8}"
            f"{outcome.seconds:>9.1f}  {outcome.note}".rstrip()
        )
    return "\n".join(lines)


# ---- inside of the tool -------------------------------------------------------------------------


class Turns:
    """A plugin: tests of all files in turn, and none begun after the time is over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @pytest.hookimpl(trylast=True)  # after -m has left tests out
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [items[at] for at in in_turn([item.path for item in items])]

    def pytest_runtest_setup(self) -> None:
        if time.monotonic() > self.end:
            pytest.exit("the time is over", returncode=0)


def in_turn(paths: Sequence[Path]) -> list[int]:
    """Return an order of tests, given the files they are in, that takes all files in turn."""
    counts: dict[Path, int] = {}
    turns = []
    for path in paths:
        counts[path] = counts.get(path, -1) + 1
        # a file's tests that stand together are alike: take them in steps of about a third
        turns.append(counts[path] * 0.381966 % 1)
    return sorted(range(len(paths)), key=lambda at: (turns[at], paths[at]))


def run_tests(seconds: float, tests: Sequence[str]) -> int:
    """Run the tests with memory that the tools see and machine code that knows its lines."""
    import cupy  # pyright: ignore[reportMissingImports]

    from gradengine.kernels.cuda import compiler

    cupy.cuda.set_allocator(
        None
    )  # each array an allocation of its own: CuPy's pool would hide its ends
    compiler.OPTIONS = (*compiler.OPTIONS, "-lineinfo")
    # The tools run one launch after the other: the host's time counts then
    options = ("-m", "gpu", "-k", "not time_of_the_host", "-v", "-p", "no:cacheprovider")
    arguments = (*options, "--timeout", "0", *tests)
    return int(pytest.main(list(arguments), plugins=[Turns(seconds)]))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.sanitize", description=__doc__)
    parser.add_argument("--out", type=Path, help="folder of the logs")
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS)
    parser.add_argument("--seconds", type=float, default=120.0, help="for each tool")
    parser.add_argument("--inside", type=float, help=argparse.SUPPRESS)
    parser.add_argument("tests", nargs="*", help="paths and options of pytest after --")
    chosen, more = parser.parse_known_args(arguments)
    tests = [*chosen.tests, *more] or ["tests/kernels"]
    if chosen.inside is not None:
        return run_tests(chosen.inside, tests)
    if chosen.out is None:
        parser.error("--out is needed")
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer: not in PATH, CUDA_PATH, /usr/local/cuda or a wheel of NVIDIA's")
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for tool in chosen.tools:
        outcomes.append(run_tool(sanitizer, tool, chosen.out.resolve(), chosen.seconds, tests))
        print(table(outcomes[-1:]), flush=True)
    (chosen.out / "summary.txt").write_text(table(outcomes) + "\n")
    print(table(outcomes))
    if any(outcome.errors is None or not outcome.passed for outcome in outcomes):
        return 2
    return 1 if any(outcome.errors or outcome.failed for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())

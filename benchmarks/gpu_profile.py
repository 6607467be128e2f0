"""Where the time of one ResNet-18 step goes: its kernels, the longest first.

    python benchmarks/gpu_profile.py --precision bf16 --batch 256          # kernels of this package
    python benchmarks/gpu_profile.py --precision bf16 --batch 256 --all    # also CuPy's and cuBLAS's
    python benchmarks/gpu_profile.py --precision bf16 --library torch      # PyTorch's, to compare
    python benchmarks/gpu_profile.py --host                                # Python's part, of 32 images
    python benchmarks/gpu_profile.py --convolutions "tf32 gradient by weight"  # beside cuDNN's, one by one
    python benchmarks/gpu_profile.py --once                                # the run alone, for ncu

Without --all, events around every launch of this package's kernels time them, with their grids and the
bytes of the arrays that they were given: a kernel that reads and writes each of them once runs at
that bandwidth. What CuPy and cuBLAS launch is in the rest. --all, and PyTorch's step, ask PyTorch's
profiler, which sees all kernels, also those of a captured step (--captured). --host asks Python's
profiler instead, in both precisions, and times the calls of CuPy that steps are made of.
--convolutions lists the kernels of single passes, in both libraries. Under Nsight Compute with
--profile-from-start off, --once shows it those of ours alone, tiles chosen.
"""

from __future__ import annotations

import argparse
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from benchmarks.gpu_device import Cuda, Device, Rehearsal, Run, import_torch
from benchmarks.gpu_host import host_report
from benchmarks.gpu_kernels import Sizes, convolution_rows
from benchmarks.gpu_process import kernel_times
from benchmarks.gpu_steps import CAPTURED, EAGER, KINDS, Contestant, Workload
from benchmarks.report import quantity
from gradengine.devices import cuda_unavailable_reason
from gradengine.kernels.cuda import launch


class Launch(NamedTuple):
    """One launch: the kernel's name, its grid and block, and the bytes of the arrays it was given."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    moved: int
    begin: Any
    end: Any


class TimedRuntime:
    """The launcher's runtime, with an event before and after every launch."""

    def __init__(self, runtime: launch.Runtime, event: Callable[[], Any]) -> None:
        self.runtime = runtime
        self.event = event  # makes an event and records it
        self.launches: list[Launch] = []

    def device(self) -> int:
        return self.runtime.device()

    def limits(self, device: int) -> launch.Limits:
        return self.runtime.limits(device)

    def load(self, source: str, name: str) -> Callable[..., None]:
        function = self.runtime.load(source, name)

        def timed(
            grid: tuple[int, ...],
            block: tuple[int, ...],
            arguments: Sequence[Any],
            shared_bytes: int = 0,
        ) -> None:
            begin = self.event()
            function(grid, block, arguments, shared_bytes)
            moved = sum(getattr(argument, "nbytes", 0) for argument in arguments)
            self.launches.append(Launch(name, grid, block, moved, begin, self.event()))

        return timed


@contextmanager
def timed_launches(event: Callable[[], Any]) -> Iterator[list[Launch]]:
    """Give the list to which every launch inside is added."""
    usual = launch.runtime
    timed = TimedRuntime(usual, event)
    launch.runtime = timed
    launch.forget_kernels()
    try:
        yield timed.launches
    finally:
        launch.runtime = usual
        launch.forget_kernels()


def launches_of(device: Device, run: Run) -> list[tuple[Launch, float]]:
    """Return every launch of a run with its seconds; the run before it loads the kernels."""
    cuda = device.xp.cuda

    def event() -> Any:
        made = cuda.Event()
        made.record(cuda.get_current_stream())
        return made

    with timed_launches(event) as launches:
        run()
        launches.clear()
        run()
        device.synchronize()
        found = list(launches)
    return [(one, 1e-3 * cuda.get_elapsed_time(one.begin, one.end)) for one in found]


class Line(NamedTuple):
    """All launches of one kernel, of one grid if that is known."""

    name: str
    calls: int
    seconds: float
    moved: float = 0.0


def lines_of(launches: list[tuple[Launch, float]]) -> list[Line]:
    """Return the launches summed by kernel and grid."""
    found: dict[str, Line] = {}
    for one, seconds in launches:
        name = f"{one.name} {one.grid} x {one.block}"
        before = found.get(name, Line(name, 0, 0.0))
        found[name] = Line(
            name, before.calls + 1, before.seconds + seconds, before.moved + one.moved
        )
    return list(found.values())


def table(lines: list[Line], step: float, longest: int) -> str:
    """Return the kernels by their time, and what of the step none of them accounts for."""
    lines = sorted(lines, key=lambda line: -line.seconds)
    total = sum(line.seconds for line in lines)
    parts = [f"{'calls':>5} {'seconds':>9} {'share':>6} {'bytes given':>12}  kernel"]
    for line in lines[:longest]:
        bandwidth = f"{line.moved / line.seconds / 1e9:.0f} GB/s" if line.moved else ""
        parts.append(
            f"{line.calls:>5} {quantity(line.seconds, 's'):>9} {line.seconds / step:>6.1%} "
            f"{bandwidth:>12}  {line.name[:150]}"
        )
    if len(lines) > longest:
        rest = sum(line.seconds for line in lines[longest:])
        parts.append(f"{len(lines) - longest} more: {quantity(rest, 's')}")
    calls = sum(line.calls for line in lines)
    parts.append(f"{calls} launches: {quantity(total, 's')}; the step: {quantity(step, 's')}")
    parts.append(f"not accounted for: {(step - total) * 1e3:.3f} ms ({1 - total / step:.0%})")
    return "\n".join(parts)


def profile_convolutions(device: Device, options: argparse.Namespace) -> None:
    """Print the kernels of every pass of a convolution in whose name the pattern is found."""
    for row in convolution_rows(device, Sizes(options.rehearse)):
        if not options.convolutions.search(row.name):
            continue
        print(row.name, flush=True)
        for one in row.contestants:
            if options.once and one.name != "gradengine":
                continue
            run, _, _ = device.watch_memory(one.make)
            if options.once:
                with device.shown_to_profilers():
                    run()
                    device.synchronize()
                continue
            for name, (calls, seconds) in kernel_times(device, run).items():
                print(f"{calls:>5} {quantity(seconds, 's'):>9}  {one.name}: {name[:150]}")
        device.free()


def suggestion(options: argparse.Namespace) -> str:
    """Return the command that asks Nsight Compute about the kernels of one run."""
    if options.convolutions:
        pattern = options.convolutions.pattern
        return (
            "ncu --clock-control none --set full --profile-from-start off python "
            f"benchmarks/gpu_profile.py --once --convolutions {shlex.quote(pattern)}"
        )
    step = f"--once --kind {options.kind} --batch {options.batch} --precision {options.precision}"
    return (
        "ncu --clock-control none --set full --kernel-name regex:NAME --launch-skip 60 "
        f"--launch-count 5 python benchmarks/gpu_profile.py {step}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu_profile", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--kind", choices=list(KINDS), default="training")
    add("--batch", type=int, help="images: 256, with --host 32 unless given")
    add("--precision", choices=("tf32", "bf16"), default="bf16")
    add("--library", choices=("gradengine", "torch"), default="gradengine")
    add("--layout", choices=("nhwc", "nchw"), default="nhwc", help="of PyTorch's tensors")
    add("--captured", action="store_true", help="the step as a CUDA graph; wants --all")
    add("--all", action="store_true", help="all kernels, by PyTorch's profiler")
    add("--longest", type=int, default=40, help="how many kernels to list")
    add("--host", action="store_true", help="the functions of Python, and what CuPy's calls take")
    add("--convolutions", type=re.compile, metavar="REGEX", help="single passes, by their names")
    add("--once", action="store_true", help="only run it three times, for ncu")
    add("--rehearse", action="store_true", help="run the code without a GPU")
    options = parser.parse_args(arguments)
    options.batch = options.batch or (32 if options.host else 256)
    options.pixels = 32 if options.rehearse else 224
    return options


def contestant(device: Device, options: argparse.Namespace) -> Contestant:
    work = Workload(device, options.kind, options.batch, options.pixels)
    if options.library == "torch":
        peer = CAPTURED if options.captured else EAGER
        return work.theirs(options.layout, options.precision, peer)
    return work.ours(options.precision, options.captured)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return the exit status: 2 where there is no GPU."""
    options = parse(arguments)
    reason = None if options.rehearse else cuda_unavailable_reason()
    if reason is not None:
        print(f"gpu_profile: CUDA is not usable: {reason}", file=sys.stderr)
        return 2
    device = (Rehearsal if options.rehearse else Cuda)(import_torch())
    if options.host:
        for line in host_report(device, options.batch, options.pixels, options.longest):
            print(line, flush=True)
        return 0
    if options.convolutions:
        profile_convolutions(device, options)
        print(suggestion(options))
        return 0
    chosen = contestant(device, options)
    run, first, memory = device.watch_memory(chosen.make)
    if options.once:
        run()
        device.synchronize()
        return 0
    step = statistics.median(device.time(run, 10).seconds)
    print(f"{chosen.name}, {options.kind}, batch {options.batch}: {quantity(step, 's')} a step")
    print(f"first run {quantity(first, 's')}, arrays {(memory.arrays or 0) / 1e9:.2f} GB at most")
    if options.all or options.captured or options.library == "torch" or options.rehearse:
        times = kernel_times(device, run)
        lines = [Line(name, calls, seconds) for name, (calls, seconds) in times.items()]
    else:
        lines = lines_of(launches_of(device, run))
    print(table(lines, step, options.longest))
    print(suggestion(options))
    return 0


if __name__ == "__main__":
    sys.exit(main())

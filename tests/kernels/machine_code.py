"""What the compiler says of the CUDA kernels on every architecture; needs NVRTC and no GPU.

``python -m tests.kernels.machine_code`` compiles all of them for all of the architectures, prints the
registers each one takes and fails where one spills; ``--sources conv2d.cu`` and ``--architectures
sm_90a`` narrow it down. It takes minutes for each architecture.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gradengine.kernels.cuda.compiler import (
    compile_program,
    compiling_processes,
    shipped_kernels,
)

ARCHITECTURES = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100")
TOGETHER = 8  # kernels of a program: each program reads its source anew


class Kernel(NamedTuple):
    """A kernel's machine code on one architecture, as ptxas describes it."""

    name: str
    architecture: str
    registers: int
    stack_bytes: int
    spill_bytes: int  # stored and loaded


class Report(NamedTuple):
    """Some kernels of one source on one architecture."""

    kernels: list[Kernel]
    warnings: list[str]

    def faults(self) -> list[str]:
        """Return a line for each kernel that keeps values in local memory, and each warning."""
        return [
            f"{kernel.name} on {kernel.architecture}: {kernel.stack_bytes} bytes of stack, "
            f"{kernel.spill_bytes} bytes of spills"
            for kernel in self.kernels
            if kernel.stack_bytes or kernel.spill_bytes
        ] + self.warnings


def known_architectures() -> list[str]:
    """Return those of ARCHITECTURES that the installed NVRTC compiles for."""
    from cupy_backends.cuda.libs import nvrtc  # pyright: ignore[reportMissingImports]

    known = set(nvrtc.getSupportedArchs())
    return [name for name in ARCHITECTURES if int(name.strip("sm_a")) in known]


def compile_kernels(source: str, names: Sequence[str], architecture: str) -> Report:
    """Compile kernels in one program and read the compiler's log."""
    program = compile_program(source, names, architecture)
    by_symbol = {symbol: name for name, symbol in program.symbols.items()}
    kernels = []
    for symbol, text in _sections(program.log):
        if symbol not in by_symbol:
            continue  # no template: NVRTC compiles it with whatever is asked for
        frame, stores, loads = _numbers(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text
        )
        (registers,) = _numbers(r"Used (\d+) registers", text)
        name = f"{source}: {by_symbol[symbol]}"
        kernels.append(Kernel(name, architecture, registers, frame, stores + loads))
    if len(kernels) != len(names):
        raise RuntimeError(f"{source} on {architecture}: kernels are missing in\n{program.log}")
    return Report(kernels, _warnings(program.log))


def table(kernels: Sequence[Kernel]) -> str:
    """Return the registers as text: a row for each kernel, a column for each architecture."""
    columns = [name for name in ARCHITECTURES if any(k.architecture == name for k in kernels)]
    rows: dict[str, dict[str, int]] = {}
    for kernel in kernels:
        rows.setdefault(kernel.name, {})[kernel.architecture] = kernel.registers
    width = max(map(len, rows), default=0)
    lines = ["registers".ljust(width) + "".join(column.rjust(8) for column in columns)]
    for name, registers in rows.items():
        cells = (str(registers.get(column, "")).rjust(8) for column in columns)
        lines.append((name.ljust(width) + "".join(cells)).rstrip())
    return "\n".join(lines)


def _sections(log: str) -> Iterator[tuple[str, str]]:
    """Give each kernel's symbol and what ptxas says of it."""
    parts = re.split(r"Compiling entry function '(\S+)' for '\S+'", log)
    yield from zip(parts[1::2], parts[2::2], strict=True)


def _numbers(pattern: str, text: str) -> tuple[int, ...]:
    """Return the numbers of the pattern: of a kernel and of the functions that it calls, the largest."""
    found = [tuple(map(int, match.groups())) for match in re.finditer(pattern, text)]
    if not found:
        raise RuntimeError(f"the compiler's log has no {pattern!r}: {text}")
    return max(found)


def _warnings(log: str) -> list[str]:
    """Return what front end and ptxas warn of, with the line of the source that follows."""
    lines = log.splitlines()
    return [
        " ".join(line.strip() for line in lines[at : at + 2])
        for at, line in enumerate(lines)
        if re.search(r": warning|ptxas warning|C7508|C7510|C7511", line)
        and "never referenced" not in line  # a constant that only kernels not compiled here use
    ]


def _report(job: tuple[str, tuple[str, ...], str]) -> Report:
    try:
        return compile_kernels(*job)
    except RuntimeError as error:  # the others are wanted all the same
        return Report([], [str(error)])


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile what the command line asks for; return 1 where a kernel has a fault."""
    parser = argparse.ArgumentParser(prog="tests.kernels.machine_code", description=__doc__)
    parser.add_argument("--sources", nargs="+", default=sorted(shipped_kernels()))
    parser.add_argument("--architectures", nargs="+", default=known_architectures())
    parser.add_argument("--names", default="", help="only kernels whose name matches this pattern")
    chosen = parser.parse_args(arguments)
    work = []
    for source in chosen.sources:
        names = [name for name in shipped_kernels()[source] if re.search(chosen.names, name)]
        for first in range(0, len(names), TOGETHER):
            part = names[first : first + TOGETHER]
            work += [(source, part, architecture) for architecture in chosen.architectures]

    with compiling_processes() as pool:
        reports = list(pool.map(_report, work))
    print(table([kernel for report in reports for kernel in report.kernels]))
    faults = [fault for report in reports for fault in report.faults()]
    print("\n".join(faults) or "no spills, no local memory, no warnings")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())

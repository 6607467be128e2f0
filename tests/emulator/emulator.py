"""A GPU in software: kernels of CUDA C++ compiled by g++, launched on NumPy arrays.

The device source is used as it is. `builtins.h` gives g++ the words of CUDA C++, the include path
puts `instructions.cuh` of this folder before the shipped one, and `runtime.cpp` plays the threads,
the barriers, the shared memory and the tensor cores. `Emulator` is a runtime of
`gradengine.kernels.cuda.launch`.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gradengine.kernels.cuda.launch import Limits
from tests.emulator.guarded import WIDEST, GuardedCopies

FOLDER = Path(__file__).parent
SHIPPED = Path(__file__).parents[2] / "kernels" / "cuda"
_FOLDERS = (FOLDER, SHIPPED)  # of headers: the emulator's go first
_HEADERS = (FOLDER / "builtins.h", FOLDER / "launch.h")  # which every kernel is compiled with

RUNTIME_OPTIONS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-shared")
KERNEL_OPTIONS = (
    # -O3 unrolls loops of known length: the checks of array indices are then done by the compiler
    *("-std=c++17", "-O3", "-g1", "-gdwarf-4", "-march=native", "-fPIC", "-w"),
    *("-fvisibility=hidden", "-fno-gnu-unique"),  # a kernel's __shared__ variables are its own
    "-fsanitize=alignment,bounds,shift-exponent,signed-integer-overflow,integer-divide-by-zero",
    "-fno-sanitize-recover",
    "-DEMULATOR_WATCHED=0",
)
# Every access calls accesses.cpp first. Without scalar replacement a float4 stays one access.
WATCHED_OPTIONS = (
    *(option for option in KERNEL_OPTIONS if option not in ("-O3", "-DEMULATOR_WATCHED=0")),
    *("-O1", "-fno-tree-sra", "-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0"),
    "-DEMULATOR_WATCHED=1",
)

ORDERS = ("forward", "reverse", "random")
_STATISTICS = (
    *("blocks", "switches", "shuffles", "copies"),
    *("matrix_loads", "bank_conflicts", "products"),
)


class EmulatorError(RuntimeError):
    """A kernel did what no GPU allows, or its launch did not fit it."""


def unavailable_reason() -> str | None:
    """Return why kernels cannot be emulated here, or None."""
    if os.name != "posix":
        return "the emulator needs POSIX"
    if shutil.which("g++") is None:
        return "the emulator needs g++"
    return None


class Access(NamedTuple):
    """A load or store of a kernel's source, as the memory system saw it.

    A request is one execution by a warp. Of global memory it is cut into sectors of 32 bytes, of
    shared memory into passes that take one word from each bank; `least` is into how many it would
    have been cut had its lanes' bytes lain side by side.
    """

    kernel: str
    line: str
    memory: str
    kind: str
    bytes: int  # of each lane
    requests: int
    pieces: int
    least: int


class Parameter(ctypes.Structure):
    """A parameter of a kernel: `emulator::Parameter` of runtime.h."""

    _fields_ = (
        ("kind", ctypes.c_char),
        ("bytes", ctypes.c_int),
        ("target_kind", ctypes.c_char),
        ("target_bytes", ctypes.c_int),
        ("target_is_const", ctypes.c_bool),
    )


class Schedule(NamedTuple):
    """In which order threads and blocks run, and when asynchronous copies land.

    Lazy copies land when they are waited for, eager ones when they are issued. Hardware may do it at
    any time between, and run threads in any order: a kernel must give the same with every schedule.
    """

    order: str = "forward"
    lazy_copies: bool = True
    seed: int = 1

    def __str__(self) -> str:
        return f"{self.order}-{'lazy' if self.lazy_copies else 'eager'}"


SCHEDULES = (
    Schedule("forward", lazy_copies=True),
    Schedule("reverse", lazy_copies=False),
    Schedule("random", lazy_copies=True),
    Schedule("random", lazy_copies=False, seed=2),
)


class Emulator:
    """The runtime that emulates; one device with the limits given.

    Kernels that are watched run slower. Threads that access the same bytes, one of them to write,
    with no barrier between them are an error then, whatever their order did to the result;
    `accesses` tells what memory had to do.
    """

    watched = False

    def __init__(
        self,
        limits: Limits | None = None,
        folders: Sequence[Path] = (SHIPPED, FOLDER),
    ) -> None:
        self.device_limits = limits or Limits(
            architecture=90, multiprocessors=4, shared_bytes=227 << 10
        )
        self.folders = tuple(folders)
        self.schedule = Schedule()

    def device(self) -> int:
        return 0

    def limits(self, device: int) -> Limits:
        return self.device_limits

    def load(self, source: str, name: str) -> Callable[..., None]:
        """Build the kernel that `name` instantiates in a source of the folders, if need be."""
        path = next(
            (folder / source for folder in self.folders if (folder / source).exists()), None
        )
        if path is None:
            raise FileNotFoundError(f"{source} is in none of {', '.join(map(str, self.folders))}")
        library = _build_kernel(path, name, self.device_limits.architecture, self.watched)
        return EmulatedKernel(self, f"{path.name}: {name}", library)

    def seconds(self, run: Callable[[], None]) -> float:
        started = time.perf_counter()
        run()
        return time.perf_counter() - started

    def statistics(self) -> dict[str, int]:
        """Return what was counted since the last call."""
        counts = (ctypes.c_ulonglong * len(_STATISTICS))()
        _runtime().emulator_statistics(counts, 1)
        return dict(zip(_STATISTICS, counts, strict=True))

    def accesses(self) -> list[Access]:
        """Return what watched kernels did since the last call, in the order of their sources."""
        runtime = _runtime()
        count = runtime.emulator_accesses(None, 0)
        rows = (_AccessRow * count)()
        runtime.emulator_accesses(rows, count)
        found = [
            Access(
                Path(row.library.decode()).stem.rpartition("-")[0],
                _source_line(row.library.decode(), row.address) or "",
                ("shared", "global")[row.space],
                ("read", "write", "atomic", "copy")[row.kind],
                *(row.bytes, row.requests, row.pieces, row.least),
            )
            for row in rows
        ]
        return sorted(
            found, key=lambda access: re.sub(r"\d+", lambda m: m[0].zfill(6), str(access[:4]))
        )

    @contextmanager
    def scheduled(self, schedule: Schedule) -> Iterator[None]:
        """Run kernels by this schedule for a while."""
        before, self.schedule = self.schedule, schedule
        try:
            yield
        finally:
            self.schedule = before


class _AccessRow(ctypes.Structure):
    """`AccessRow` of accesses.cpp."""

    _fields_ = (
        ("library", ctypes.c_char_p),
        ("address", ctypes.c_size_t),
        ("kind", ctypes.c_int),
        ("space", ctypes.c_int),
        ("bytes", ctypes.c_int),
        ("requests", ctypes.c_ulonglong),
        ("pieces", ctypes.c_ulonglong),
        ("least", ctypes.c_ulonglong),
    )


class EmulatedKernel:
    """One kernel, ready to launch."""

    def __init__(self, emulator: Emulator, name: str, library: ctypes.CDLL) -> None:
        self.emulator = emulator
        self.name = name
        self.library = library
        count = library.emulator_parameter_count()
        self.parameters = library.emulator_parameters()[:count]
        self.static_bytes = library.emulator_static_bytes()

    def __call__(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        shared_bytes: int = 0,
    ) -> None:
        self._check_launch(grid, block, arguments, shared_bytes)
        for place, (argument, parameter) in enumerate(
            zip(arguments, self.parameters, strict=True), start=1
        ):
            mismatch = _mismatch(argument, parameter)
            if mismatch:
                raise EmulatorError(f"{self.name}: argument {place} is {mismatch}")
        # Watched: as on a device, since it counts the sectors that a request touches
        with GuardedCopies(256 if self.emulator.watched else WIDEST) as copies:
            for argument, parameter in zip(arguments, self.parameters, strict=True):
                if isinstance(argument, np.ndarray) and argument.ndim:
                    copies.add(argument, writable=not parameter.target_is_const)
            copies.fill()
            _watch_arrays(copies)
            values = [_value(argument, copies) for argument in arguments]
            message = self._run(grid, block, values, shared_bytes) or copies.damage()
            if message:
                raise EmulatorError(f"{self.name}: {message}")
            copies.copy_back()

    def _run(
        self, grid: tuple[int, ...], block: tuple[int, ...], values: list[Any], shared_bytes: int
    ) -> str | None:
        """Run the grid; return what went wrong."""
        schedule = self.emulator.schedule
        runtime = _runtime()
        runtime.emulator_configure(
            ORDERS.index(schedule.order),
            schedule.seed,
            schedule.lazy_copies,
        )
        pointers = (ctypes.c_void_p * (len(values) + 1))(*map(ctypes.addressof, values))
        if self.library.emulator_run(_three(grid), _three(block), shared_bytes, pointers):
            return None
        library = runtime.emulator_error_library().decode()
        return re.sub(
            "@(0x[0-9a-f]+)",
            lambda place: _source_line(library, int(place[1], 16)) or "a line that is not known",
            runtime.emulator_error().decode(),
        )

    def _check_launch(
        self,
        grid: tuple[int, ...],
        block: tuple[int, ...],
        arguments: Sequence[Any],
        shared_bytes: int,
    ) -> None:
        limits = self.emulator.device_limits
        threads = int(np.prod(block))
        problem = None
        if len(arguments) != len(self.parameters):
            problem = f"takes {len(self.parameters)} arguments, got {len(arguments)}"
        elif not (1 <= len(grid) <= 3 and all(size > 0 for size in grid)):
            problem = f"a grid has one to three sizes from 1 on, got {grid}"
        elif grid[0] > 2**31 - 1 or any(size > 65535 for size in grid[1:]):
            problem = f"a grid has at most (2 ** 31 - 1, 65535, 65535) blocks, got {grid}"
        elif threads % 32 or not 0 < threads <= 1024 or (len(block) == 3 and block[2] > 64):
            problem = f"a block has 32, 64, ... or 1024 threads, got {block}"
        elif self.static_bytes > 48 << 10:
            problem = f"__shared__ variables fill at most 48 KB, got {self.static_bytes} bytes"
        elif self.static_bytes + shared_bytes > limits.shared_bytes:
            problem = (
                f"a block has {limits.shared_bytes} bytes of shared memory, "
                f"got {self.static_bytes} of variables and {shared_bytes} at launch"
            )
        if problem:
            raise EmulatorError(f"{self.name}: {problem}")


def _mismatch(argument: Any, parameter: Parameter) -> str | None:
    """Return how an argument and a parameter differ, or None where they fit."""
    kind = parameter.kind.decode()
    expected = f"the parameter is {_KINDS[kind]} of {parameter.bytes} bytes"
    if isinstance(argument, np.ndarray) and argument.ndim:
        return _array_mismatch(argument, parameter)
    if argument is None:
        return None if kind == "p" else f"None, {expected}"
    if isinstance(argument, (bool, np.bool_)):
        return "a bool; pass an int"
    if isinstance(argument, int):
        return None if kind == "i" and parameter.bytes == 8 else f"int (long long), {expected}"
    if isinstance(argument, float) and not isinstance(argument, np.generic):
        return None if kind == "f" and parameter.bytes == 8 else f"float (double), {expected}"
    if not isinstance(argument, (np.generic, np.ndarray)):
        return f"{type(argument).__name__}, which no kernel takes"
    if (_dtype_kind(argument.dtype), argument.dtype.itemsize) != (kind, parameter.bytes):
        return f"{argument.dtype}, {expected}"
    return None


def _array_mismatch(array: np.ndarray, parameter: Parameter) -> str | None:
    if parameter.kind != b"p":
        kind = _KINDS[parameter.kind.decode()]
        return f"an array of {array.dtype}, the parameter {kind}, not a pointer"
    if not (array.flags.writeable or parameter.target_is_const):
        return "an array that is not to be written, the parameter no pointer to const"
    target, size = parameter.target_kind.decode(), parameter.target_bytes
    numbers = target in "if" and size > 1  # bytes may stand for anything
    sixteen_bits = target == "s" and size == 2
    if numbers and (_dtype_kind(array.dtype), array.dtype.itemsize) != (target, size):
        return (
            f"an array of {array.dtype}, the parameter points to {_KINDS[target]} of {size} bytes"
        )
    if sixteen_bits and array.dtype.itemsize != 2:
        return f"an array of {array.dtype}, the parameter points to elements of 2 bytes"
    return None


_KINDS = {"p": "a pointer", "f": "floating point", "i": "an integer", "s": "a struct", "v": "void"}


def _dtype_kind(dtype: np.dtype) -> str:
    if dtype.kind in "iub":
        return "i"
    return "f" if dtype.kind == "f" and dtype.itemsize > 2 else "s"  # float16 is a struct


def _value(argument: Any, copies: GuardedCopies) -> Any:
    """Return a ctypes object that holds what the kernel receives."""
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, np.ndarray) and argument.ndim:
        return ctypes.c_void_p(copies.address(argument))
    if isinstance(argument, (np.generic, np.ndarray)):
        content = np.asarray(argument).tobytes()
        return (ctypes.c_char * len(content)).from_buffer_copy(content)
    return ctypes.c_longlong(argument) if isinstance(argument, int) else ctypes.c_double(argument)


def _watch_arrays(copies: GuardedCopies) -> None:
    regions = copies.regions
    addresses = (ctypes.c_size_t * len(regions))(*(region.copy for region in regions))
    sizes = (ctypes.c_size_t * len(regions))(*(region.end - region.begin for region in regions))
    _runtime().emulator_watch_arrays(ctypes.c_size_t(len(regions)), addresses, sizes)


def _three(sizes: tuple[int, ...]) -> Any:
    return (ctypes.c_uint * 3)(*sizes, *(1,) * (3 - len(sizes)))


# ---- building -----------------------------------------------------------------------------------


@cache
def _runtime() -> ctypes.CDLL:
    library = ctypes.CDLL(str(_build_runtime()))
    library.emulator_error.restype = ctypes.c_char_p
    library.emulator_error_library.restype = ctypes.c_char_p
    library.emulator_accesses.restype = ctypes.c_size_t
    library.emulator_accesses.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return library


@cache
def _build_runtime() -> Path:
    _forget_old_libraries()
    sources = [FOLDER / "runtime.cpp", FOLDER / "accesses.cpp"]
    parts = [*sources, FOLDER / "runtime.h", FOLDER / "accesses.h"]
    path = _library_path("runtime", *(part.read_text() for part in parts), *RUNTIME_OPTIONS)

    def build(made: str) -> None:
        _call_compiler("runtime.cpp", *RUNTIME_OPTIONS, *map(str, sources), "-o", made)

    _build_once(path, build)
    return path


@cache
def _build_kernel(source: Path, name: str, architecture: int, watched: bool) -> ctypes.CDLL:
    options = (
        *(WATCHED_OPTIONS if watched else KERNEL_OPTIONS),
        f"-D__CUDA_ARCH__={architecture}0",
    )
    runtime = _build_runtime()
    included = _included(source, _FOLDERS)
    included |= {path for header in _HEADERS for path in _included(header, _FOLDERS)}
    contents = [path.read_text() for path in sorted(included)]
    # Where the sources lie is not part of the name: copies of the repository share their libraries
    path = _library_path(source.stem, source.name, name, *contents, *options, str(runtime))

    def build(made: str) -> None:
        what = f"{source.name}: {name}"
        Path(f"{made}.cpp").write_text(f'#include "{source}"\nEMULATOR_EXPORT({name})\n')
        headers = ("-include", str(_build_headers(options)))
        folders = (f"-I{folder}" for folder in _FOLDERS)
        _call_compiler(what, *options, *headers, *folders, "-c", f"{made}.cpp", "-o", f"{made}.o")
        # Linked by itself: with -fsanitize g++ would bring its own handlers. -nostartfiles: these
        # have zero-initialized variables too.
        link = ("-shared", "-nostartfiles", f"{made}.o", str(runtime))
        _call_compiler(what, *link, "-o", made)

    _build_once(path, build)
    _runtime()
    library = ctypes.CDLL(str(path))
    library.emulator_parameters.restype = ctypes.POINTER(Parameter)
    library.emulator_static_bytes.restype = ctypes.c_size_t
    library.emulator_run.argtypes = [
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_void_p,
    ]
    return library


@cache
def _build_headers(options: tuple[str, ...]) -> Path:
    """Return a header with what every kernel is given, which g++ finds compiled beside it.

    Reading it anew would take half of the time of a small kernel.
    """
    text = "".join(f'#include "{header}"\n' for header in _HEADERS)
    included = sorted({path for header in _HEADERS for path in _included(header, _FOLDERS)})
    contents = [path.read_text() for path in included]
    parts = ("headers", text, *contents, *options)
    path, compiled = (_library_path(*parts, suffix=suffix) for suffix in (".h", ".h.gch"))

    def build(made: str) -> None:
        path.write_text(text)
        folders = (f"-I{folder}" for folder in _FOLDERS)
        _call_compiler("headers", *options, *folders, "-x", "c++-header", str(path), "-o", made)

    _build_once(compiled, build)
    return path


def _included(source: Path, folders: Sequence[Path]) -> set[Path]:
    """Return a source and all that it includes of the folders."""
    found: set[Path] = set()
    left = [source]
    while left:
        path = left.pop()
        if path in found:
            continue
        found.add(path)
        for name in re.findall(
            r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE
        ):
            left += [folder / name for folder in folders if (folder / name).exists()][:1]
    return found


def _library_path(stem: str, *parts: str, suffix: str = ".so") -> Path:
    """Return where a library of these parts is kept, and note that it is in use."""
    key = "\0".join((*parts, _compiler(), _processor()))
    path = _folder() / f"{stem}-{hashlib.sha256(key.encode()).hexdigest()[:20]}{suffix}"
    with suppress(FileNotFoundError):
        os.utime(path)
    return path


def _folder() -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = root / "gradengine" / "emulator"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _forget_old_libraries() -> None:
    """Delete what was not used for a week: each change of a source leaves libraries behind."""
    for path in filter(Path.is_file, _folder().iterdir()):
        with suppress(FileNotFoundError):  # another process is faster
            if path.stat().st_mtime < time.time() - 7 * 86400:
                path.unlink()


def _build_once(path: Path, build: Callable[[str], None]) -> None:
    """Build a library under the name that `build` is given, unless it is there already.

    It is renamed at the end, so that nobody ever loads a part. A process that wants what another one
    is building waits for it.
    """
    from fcntl import LOCK_EX, flock  # POSIX has it

    if path.exists():
        return
    lock = path.with_name(f"{path.name}.lock")
    try:
        with lock.open("w") as file:
            flock(file, LOCK_EX)
            if not path.exists():
                with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                    made = Path(folder) / path.name
                    build(str(made))
                    os.replace(made, path)
    finally:
        lock.unlink(missing_ok=True)  # who has it open still gets its turn


def _call_compiler(what: str, *arguments: str) -> None:
    done = subprocess.run(("g++", *arguments), capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error:" in line]
        text = "\n".join(errors[:8]) or done.stderr
        raise EmulatorError(f"g++ refuses {what}:\n{text}")


@cache
def _compiler() -> str:
    return subprocess.run(
        ("g++", "--version"), capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]


@cache
def _processor() -> str:
    """Return what -march=native looks at: a cache may be shared by machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    wanted = ("flags", "Features", "model name")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _source_line(library: str, address: int) -> str | None:
    """Return the line of device code at an address of a library, as far as it is known."""
    if not library or shutil.which("addr2line") is None:
        return None
    done = subprocess.run(
        ("addr2line", "-i", "-e", library, hex(address)),
        capture_output=True,
        text=True,
        check=False,
    )
    frames = [frame.split(" ")[0].rpartition(":") for frame in done.stdout.splitlines()]
    lines = [
        (Path(path).name, line)
        for path, _, line in frames  # innermost first
        if path.endswith((".cu", ".cuh")) and line.isdigit()
    ]
    lines.sort(key=lambda place: place[0].endswith(".cuh"))  # stable: a header says less
    return f"{lines[0][0]} line {lines[0][1]}" if lines else None

"""CUDA C++ to machine code: compiled by NVRTC for one architecture, kept on disk."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import cache
from importlib import import_module
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

from gradengine.kernels.cache_folder import private_cache_folder

FOLDER = Path(__file__).parent
OPTIONS = ("-std=c++17", "-default-device", "--ptxas-options=-v")


class Program(NamedTuple):
    """Machine code of some kernels of one source, the symbol of each, and the compiler's log."""

    cubin: bytes
    symbols: dict[str, str]
    log: str


def compile_program(source: str, names: Sequence[str], architecture: str) -> Program:
    """Compile the kernels that `names` instantiate, such as "sgd<float>", of a file of this folder.

    `architecture` is NVRTC's name of it, such as "sm_90a". Needs no GPU and no driver.

    Raises:
        RuntimeError: NVRTC refuses the source; its log is in the message.
    """
    from cupy_backends.cuda.libs import nvrtc  # pyright: ignore[reportMissingImports]

    headers = _headers()
    program = nvrtc.createProgram(
        (FOLDER / source).read_text(), source, tuple(headers.values()), tuple(headers)
    )
    try:
        for name in names:
            nvrtc.addNameExpression(program, name)
        try:
            nvrtc.compileProgram(program, (f"-arch={architecture}", *OPTIONS))
        except nvrtc.NVRTCError as error:
            log = nvrtc.getProgramLog(program)
            raise RuntimeError(f"{source} does not compile for {architecture}: {log}") from error
        symbols = {name: nvrtc.getLoweredName(program, name) for name in names}
        # CuPy takes the last byte, a zero of the ELF file's table, for the end of a string
        cubin = nvrtc.getCUBIN(program) + b"\0"
        return Program(cubin, symbols, nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def machine_code(source: str, name: str, architecture: str) -> tuple[str, bytes]:
    """Return symbol and cubin of one kernel: from disk, or compiled and kept there if possible."""
    key = "\0".join((_text(source), name, architecture, *OPTIONS, str(_compiler_version())))
    path = _kept_at(hashlib.sha256(key.encode()).hexdigest())
    kept = path and _read(path)
    if kept:
        return kept
    program = compile_program(source, (name,), architecture)
    symbol = program.symbols[name]
    if path is not None:
        _write(path, symbol, program.cubin)
    return symbol, program.cubin


def architecture_name(capability: int) -> str:
    """Return the best architecture that NVRTC can compile for a device of this capability (90: 9.0).

    Its own with the instructions of this chip alone ("sm_90a"), else its own, else the nearest older.
    """
    from cupy_backends.cuda.libs import nvrtc  # pyright: ignore[reportMissingImports]

    known = [arch for arch in nvrtc.getSupportedArchs() if arch <= capability]
    if not known:
        raise RuntimeError(
            f"CUDA: the installed NVRTC compiles for architectures from {min(nvrtc.getSupportedArchs())} "
            f"on; got a device of {capability} (install an older CuPy)"
        )
    return f"sm_{capability}a" if capability in known and capability >= 90 else f"sm_{max(known)}"


def check_architecture(architecture: str) -> None:
    """Raise ValueError unless NVRTC compiles for an architecture, RuntimeError if it is not there."""
    from cupy_backends.cuda.libs import nvrtc  # pyright: ignore[reportMissingImports]

    try:
        known = nvrtc.getSupportedArchs()
    except Exception as error:  # of which class depends on the CuPy
        raise RuntimeError(
            "compile: NVRTC could not be loaded (pip install 'gradengine[cuda12]' brings it); "
            f"got {str(error).splitlines()[0]}"
        ) from error
    number = re.fullmatch(r"sm_(\d+)[af]?", architecture)
    if number is None or int(number[1]) not in known:
        names = ", ".join(f"sm_{arch}" for arch in known)
        raise ValueError(
            f"compile: architecture must be one that the installed NVRTC compiles for ({names}; of some "
            f"also the variant that ends in a); got architecture={architecture!r}"
        )


def shipped_kernels() -> dict[str, tuple[str, ...]]:
    """Return the names of all kernels by source, as the modules beside the sources list them."""
    kernels: dict[str, tuple[str, ...]] = {}
    for path in sorted(FOLDER.glob("*.cu")):
        module = import_module(f"gradengine.kernels.cuda.{path.stem}")
        kernels |= module.KERNELS
    return kernels


def compile_ahead(architecture: str) -> Iterator[tuple[str, float]]:
    """Compile all shipped kernels of an architecture that disk lacks; give name and seconds of each.

    Needs no GPU, so that an image for machines with one can be made on a machine without.
    """
    kernels = [(source, name) for source, names in shipped_kernels().items() for name in names]
    with compiling_processes() as pool:
        yield from pool.map(_compile_one, kernels, repeat(architecture), chunksize=4)


def compiling_processes() -> ProcessPoolExecutor:
    """Make as many processes as there are cores, for NVRTC to compile in.

    Two were 1.86 times as fast as one on two cores, two threads 1.65 times.
    """
    return ProcessPoolExecutor(mp_context=get_context("spawn"))  # a fork may inherit a held lock


def _compile_one(kernel: tuple[str, str], architecture: str) -> tuple[str, float]:
    started = time.perf_counter()
    machine_code(*kernel, architecture)
    return ": ".join(kernel), time.perf_counter() - started


@cache
def _headers() -> dict[bytes, bytes]:
    return {path.name.encode(): path.read_bytes() for path in sorted(FOLDER.glob("*.cuh"))}


@cache
def _text(source: str) -> str:
    """Return all that the machine code of a source depends on: itself and every header."""
    parts = [(FOLDER / source).read_bytes(), *_headers().values()]
    return b"\0".join(parts).decode()


@cache
def _compiler_version() -> tuple[int, int]:
    from cupy_backends.cuda.libs import nvrtc  # pyright: ignore[reportMissingImports]

    return nvrtc.getVersion()


def _kept_at(key: str) -> Path | None:
    try:
        return private_cache_folder("CUPY") / f"{key[:40]}.cubin"
    except OSError:
        return None  # compiled anew by every process


def _read(path: Path) -> tuple[str, bytes] | None:
    """Return what `_write` kept, or None where nothing is whole."""
    with suppress(OSError, ValueError):
        digest, symbol, cubin = path.read_bytes().split(b"\n", 2)
        if digest == _digest(symbol, cubin):
            return symbol.decode(), cubin
    return None


def _write(path: Path, symbol: str, cubin: bytes) -> None:
    """Keep a kernel: written aside and renamed, so that another process never reads a part."""
    content = b"\n".join((_digest(symbol.encode(), cubin), symbol.encode(), cubin))
    with suppress(OSError):  # a full or read-only disk costs the next process a compilation
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise


def _digest(symbol: bytes, cubin: bytes) -> bytes:
    return hashlib.sha256(symbol + b"\n" + cubin).hexdigest().encode()

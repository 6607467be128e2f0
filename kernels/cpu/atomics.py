"""What compiled code needs to work with other threads: words that they share, and Python's locks.

Words are int64 at an address. Reads and writes are sequentially consistent: all threads see all of
them in one order.
"""

from __future__ import annotations

import ctypes
import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

intrinsic: Any = numba_intrinsic  # callers give its arguments without the typing context
INDEX = ir.IntType(64)
POINTER = ir.IntType(8).as_pointer()
ORDER = "seq_cst"
# What tells a processor that a loop waits for another one, with arguments.
_PAUSES = {"x86_64": ("llvm.x86.sse2.pause", []), "aarch64": ("llvm.aarch64.hint", [1])}
_MACHINE = {"AMD64": "x86_64", "arm64": "aarch64"}.get(platform.machine(), platform.machine())


def _place(builder: Any, address: Any) -> Any:
    return builder.inttoptr(address, INDEX.as_pointer())


@intrinsic
def read(typing_context, place):
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load_atomic(_place(builder, arguments[0]), ORDER, 8)

    return types.intp(types.intp), generate


@intrinsic
def write(typing_context, place, value):
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store_atomic(arguments[1], _place(builder, arguments[0]), ORDER, 8)
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def add(typing_context, place, value):
    """Add to a word; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("add", _place(builder, arguments[0]), arguments[1], ORDER)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def exchange(typing_context, place, value):
    """Write a word; return what it was."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.atomic_rmw("xchg", _place(builder, arguments[0]), arguments[1], ORDER)

    return types.intp(types.intp, types.intp), generate


@intrinsic
def pause(typing_context):
    """Let a moment pass in a loop that waits for another thread."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        if _MACHINE in _PAUSES:
            name, numbers = _PAUSES[_MACHINE]
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(numbers))
            function = cgutils.get_or_insert_function(builder.module, kind, name)
            builder.call(function, [ir.Constant(ir.IntType(32), number) for number in numbers])
        return context.get_dummy_value()

    return types.void(), generate


# ---- locks ---------------------------------------------------------------------------------------

_API = ctypes.pythonapi
_API.PyThread_allocate_lock.restype = ctypes.c_void_p
_ACQUIRE = ir.FunctionType(ir.IntType(32), [POINTER, ir.IntType(32)])
_RELEASE = ir.FunctionType(ir.VoidType(), [POINTER])


def lock_functions() -> tuple[int, int]:
    """Return the addresses of Python's own `acquire` and `release`: they need no interpreter lock."""
    return _address(_API.PyThread_acquire_lock), _address(_API.PyThread_release_lock)


def _address(function: Any) -> int:
    address = ctypes.cast(function, ctypes.c_void_p).value
    assert address
    return address


def taken_lock() -> int:
    """Return the address of a lock at which the next to acquire it sleeps; it is never freed."""
    lock = _API.PyThread_allocate_lock()
    if not lock or not _API.PyThread_acquire_lock(ctypes.c_void_p(lock), 0):
        raise MemoryError("kernels: the system has no lock left for a thread")
    return lock


@intrinsic
def acquire(typing_context, function, lock):
    """Sleep until the lock is released."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.inttoptr(arguments[0], _ACQUIRE.as_pointer())
        wait = ir.Constant(ir.IntType(32), 1)
        builder.call(function, [builder.inttoptr(arguments[1], POINTER), wait])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate


@intrinsic
def release(typing_context, function, lock):
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function = builder.inttoptr(arguments[0], _RELEASE.as_pointer())
        builder.call(function, [builder.inttoptr(arguments[1], POINTER)])
        return context.get_dummy_value()

    return types.void(types.intp, types.intp), generate

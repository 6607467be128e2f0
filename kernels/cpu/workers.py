"""Running a compiled function on all cores, in such a way that it is compiled once.

Numba compiles the body of a parallel function three times: for the threads, for what hands the work
to them, and for the function around it. Here one parallel function, which knows only addresses,
serves all kernels: it calls the kernel's code with a worker's number, and a kernel is plain code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from gradengine.kernels.cpu.code_cache import keep_code

intrinsic: Any = numba_intrinsic  # callers give its arguments without the typing context
INDEX = ir.IntType(64)
POINTER = ir.IntType(8).as_pointer()
_WORKER = ir.FunctionType(ir.VoidType(), [INDEX, INDEX, POINTER])  # its number, of how many, data


@cache
def launcher(parallel: bool) -> int:
    """Return the address of what runs workers: on Numba's threads, or one after the other."""
    compiled: Any = njit(parallel=parallel, nogil=True, error_model="numpy")(_launch)
    keep_code(compiled, _launch, variant="" if parallel else "serial")
    kinds = (types.intp,) * 3
    compiled.compile(kinds)
    return address(compiled.overloads[kinds])


def address(result: Any) -> int:
    """Return where the code of a function is that Numba compiled."""
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


def _launch(function, workers, data):
    for worker in prange(workers):
        _work(function, np.intp(worker), workers, data)


@intrinsic
def _work(typing_context, function, worker, workers, data):
    """Call the worker at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, worker, workers, data = arguments
        work = builder.inttoptr(function, _WORKER.as_pointer())
        builder.call(work, [worker, workers, builder.inttoptr(data, POINTER)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@intrinsic
def run_workers(typing_context, function, launch, workers, arguments):
    """Call function(worker, workers, *arguments) for each worker, by the launcher at an address.

    Returns whether a worker raised an exception; which one is not told.
    """
    kinds = (types.intp, types.intp, *arguments)
    function.get_call_type(typing_context, kinds, {})
    result = function.dispatcher.overloads[kinds]

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        context.active_code_library.add_linking_library(result.library)
        given = [
            _without_owner(context, builder, *item)
            for item in zip(arguments, cgutils.unpack_tuple(builder, values[3]), strict=True)
        ]
        packed = ir.LiteralStructType([ir.IntType(8), *(value.type for value in given)])
        data = cgutils.alloca_once(builder, packed)
        for i, value in enumerate([ir.Constant(ir.IntType(8), 0), *given]):
            builder.store(value, cgutils.gep_inbounds(builder, data, 0, i))
        work = _worker(context, builder.module, result.fndesc, packed)
        _call_launcher(context, builder, values[1], (work, values[2], data))
        failed = builder.load(cgutils.gep_inbounds(builder, data, 0, 0))
        return builder.icmp_signed("!=", failed, failed.type(0))

    return types.boolean(function, types.intp, types.intp, arguments), generate


def _without_owner(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    """Give an array that does not count who uses it: workers would do so in one place, in turns."""
    if not isinstance(kind, types.Array):
        return value
    array = context.make_array(kind)(context, builder, value)
    array.meminfo = cgutils.get_null_value(array.meminfo.type)
    array.parent = cgutils.get_null_value(array.parent.type)
    return array._getvalue()


def _worker(context: Any, module: Any, function: Any, packed: Any) -> Any:
    """Emit the function that a launcher calls: it unpacks the arguments."""
    work = ir.Function(module, _WORKER, module.get_unique_name("work"))
    work.linkage = "internal"
    builder = ir.IRBuilder(work.append_basic_block())
    data = builder.bitcast(work.args[2], packed.as_pointer())
    places = [cgutils.gep_inbounds(builder, data, 0, i) for i in range(len(packed.elements))]
    arguments = [*work.args[:2], *(builder.load(place) for place in places[1:])]
    status, _ = context.call_conv.call_function(
        builder,
        context.declare_function(module, function),
        types.none,
        function.argtypes,
        arguments,
    )
    with builder.if_then(status.is_error, likely=False):
        builder.store(ir.Constant(ir.IntType(8), 1), places[0])
    builder.ret_void()
    return work


def _call_launcher(context: Any, builder: Any, launch: Any, arguments: Any) -> None:
    function, workers, data = arguments
    kinds = (types.intp,) * 3
    kind = context.call_conv.get_function_type(types.none, kinds)
    context.call_conv.call_function(
        builder, builder.inttoptr(launch, kind.as_pointer()), types.none, kinds,
        [builder.ptrtoint(function, INDEX), workers, builder.ptrtoint(data, INDEX)],
    )  # fmt: skip

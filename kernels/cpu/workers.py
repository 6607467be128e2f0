"""Calling a compiled function for each worker, in such a way that it is compiled once.

Numba compiles the body of a parallel function three times: for the threads, for what hands the work
to them, and for the function around it. Here a kernel is plain code, and the team's launch, which
knows only addresses, calls it with a worker's number.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from gradengine.kernels.cpu.atomics import INDEX, intrinsic
from gradengine.kernels.cpu.team import LAUNCH, WORKER


@intrinsic
def run_workers(typing_context, function, team, workers, arguments):
    """Call function(worker, workers, *arguments) for each worker, by the team at an address.

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
        _call_launch(context, builder, values[1], (work, values[2], data))
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
    """Emit the function that a launch calls: it unpacks the arguments."""
    work = ir.Function(module, WORKER, module.get_unique_name("work"))
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


def _call_launch(context: Any, builder: Any, team: Any, arguments: Any) -> None:
    function, workers, data = arguments
    kinds = (types.intp,) * 4
    kind = context.call_conv.get_function_type(types.none, kinds)
    place = builder.add(team, ir.Constant(INDEX, LAUNCH))
    launch = builder.load(builder.inttoptr(place, kind.as_pointer().as_pointer()))
    context.call_conv.call_function(
        builder, launch, types.none, kinds,
        [team, builder.ptrtoint(function, INDEX), workers, builder.ptrtoint(data, INDEX)],
    )  # fmt: skip

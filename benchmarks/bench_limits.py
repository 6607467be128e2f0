"""What this machine can do at most: float32 multiply-adds and bytes copied, on all cores."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils
from numba.extending import intrinsic

from benchmarks import report
from benchmarks.timing import seconds_of

CHAINS = 12  # independent sums: enough to hide an FMA's latency, few enough to stay in registers
FEATURES = binding.get_host_cpu_features()
LANES = 16 if FEATURES.get("avx512f") else 8 if FEATURES.get("avx") else 4
STEPS = 4_000_000


@intrinsic
def _multiply_add(context: Any, steps: Any, factor: Any) -> Any:
    """Run CHAINS vectors of LANES floats through `steps` rounds of v <- v * factor + v."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        steps, factor = arguments
        vector, index = ir.VectorType(ir.FloatType(), LANES), steps.type
        factors = ir.Constant(vector, ir.Undefined)
        for lane in range(LANES):
            factors = builder.insert_element(factors, factor, ir.IntType(32)(lane))
        before, loop = builder.block, builder.append_basic_block("loop")
        after = builder.append_basic_block("after")
        builder.branch(loop)
        builder.position_at_end(loop)
        count, values = builder.phi(index), [builder.phi(vector) for _ in range(CHAINS)]
        kind = ir.FunctionType(vector, [vector] * 3)
        fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{LANES}f32")
        results = [builder.call(fma, [value, factors, value]) for value in values]
        one = ir.Constant(vector, [1.0] * LANES)
        for value, result in zip(values, results, strict=True):
            value.add_incoming(one, before)
            value.add_incoming(result, loop)
        following = builder.add(count, index(1))
        count.add_incoming(index(0), before)
        count.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, steps), loop, after)
        builder.position_at_end(after)
        total = results[0]
        for result in results[1:]:
            total = builder.fadd(total, result)  # used, so that no chain is optimized away
        return builder.extract_element(total, ir.IntType(32)(0))

    return numba.float32(numba.intp, numba.float32), generate


@numba.njit(nogil=True)
def _chains(steps: int, factor: np.float32) -> float:
    return _multiply_add(steps, factor)  # pyright: ignore[reportCallIssue]


def _best(work: Callable[[int], Any], tries: int = 15) -> float:
    """Return the seconds of the fastest try, one thread a core each doing its `work(thread)`."""
    cores = os.cpu_count() or 1
    with ThreadPoolExecutor(cores) as pool:
        return min(seconds_of(lambda: list(pool.map(work, range(cores)))) for _ in range(tries))


def test_float32_peak(record: Any) -> None:
    factor = np.float32(1e-9)
    assert _chains(2, factor) > 0  # compiles
    seconds = _best(lambda thread: _chains(STEPS, factor))
    flop = 2.0 * CHAINS * LANES * STEPS * (os.cpu_count() or 1)
    record(report.Row(report.LIMITS, report.PEAK, {"gradengine": seconds}, "s", flop=flop))


def test_copy_bandwidth(record: Any) -> None:
    source = np.ones((os.cpu_count() or 1, 1 << 25), np.float32)  # 128 MiB a core: beyond any cache
    target = np.zeros_like(source)
    seconds = _best(lambda thread: np.copyto(target[thread], source[thread]))
    moved = 2.0 * source.nbytes
    record(report.Row(report.LIMITS, report.COPY, {"gradengine": seconds}, "s", moved=moved))

"""The microkernel: a small product whose result stays in vector registers while it is summed.

All heavy work of the CPU kernels is done here: matmul and the three passes of a convolution differ
in the places and distances that they hand over. See van Zee and van de Geijn, "BLIS: a framework
for rapidly instantiating BLAS functionality", ACM TOMS 41 (2015).
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from gradengine.kernels.cpu.launch import kernel_part
from gradengine.kernels.cpu.linked import linked
from gradengine.kernels.cpu.simd import (
    INDEX,
    REGISTERS,
    VECTOR_BYTES,
    Loop,
    Vector,
    Vectors,
    intrinsic,
    offset,
    shifted,
)

# Rows of the tiles, largest first: ROWS * VECTORS sums, VECTORS of b and one of a fill the registers.
VECTORS = 2
TILES = (14, 7, 4, 2, 1) if REGISTERS == 32 else (6, 4, 3, 2, 1)
ROWS = TILES[0]
NEAR = 3  # rows whose places an instruction computes from one start
WIDTH_BYTES = VECTORS * VECTOR_BYTES


def width(dtype: Any) -> int:
    """Return how many columns the tile has for a NumPy dtype."""
    return WIDTH_BYTES // dtype.itemsize


@kernel_part
def columns_of(array):
    """Return how many columns the tile has for an array's dtype, in compiled code."""
    return WIDTH_BYTES // array.itemsize


@intrinsic
def copy_columns(typing_context, source, target):
    """Copy as many neighbouring elements as the tile has columns."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vectors = Vectors(builder, arguments[0].type.pointee)
        for column in range(VECTORS):
            start = [ir.Constant(INDEX, column * vectors.lanes)]
            source, target = (builder.gep(place, start) for place in arguments)
            vectors.store(vectors.load(source), target)
        return context.get_dummy_value()

    return types.void(source, target), generate


def _cascade(rows: int, rest: Any) -> Any:
    """Compile the product for tiles of `rows` rows; `rest` multiplies the rows that are left."""

    @intrinsic
    def tile(
        typing_context, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns,
        depth, segments, adds,
    ):  # fmt: skip
        n = types.intp
        kinds = (a, n, n, n, b, n, n, c, n, n, n, n, types.boolean)
        return types.void(*kinds), lambda *generator: _generate(rows, *generator)

    @kernel_part
    def multiply(
        count, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth,
        segments, adds,
    ):  # fmt: skip
        while count >= rows:
            tile(
                a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth,
                segments, adds,
            )  # fmt: skip
            a, c = shifted(a, rows * a_row), shifted(c, rows * c_row)
            count -= rows
        if count > 0:
            rest(
                count, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns,
                depth, segments, adds,
            )  # fmt: skip

    return multiply


def _generate(rows: int, context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
    a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth, segments, adds = (
        arguments
    )
    vectors = Vectors(builder, c.type.pointee)
    strides = (a_row, a_step, a_segment, b_step, b_segment)
    sums = _sum(vectors, rows, (a, b), strides, (depth, segments))
    places = [
        offset(builder, builder.gep(c, [ir.Constant(INDEX, column * vectors.lanes)]), (c_row, row))
        for row in range(rows)
        for column in range(VECTORS)
    ]
    full = builder.icmp_signed(">=", columns, ir.Constant(INDEX, VECTORS * vectors.lanes))
    with builder.if_else(full) as (whole, edge):
        with whole, builder.if_else(adds) as (add, write):
            with add:
                for total, place in zip(sums, places, strict=True):
                    vectors.store(vectors.load(place) + total, place)
            with write:
                for total, place in zip(sums, places, strict=True):
                    vectors.store(total, place)
        with edge:
            _store_edge(vectors, sums, places, columns, adds)
    return context.get_dummy_value()


def _store_edge(vectors: Vectors, sums: Any, places: Any, columns: Any, adds: Any) -> None:
    """Store or add only `columns` of the columns."""
    builder = vectors.builder
    for column in range(VECTORS):
        rest = builder.sub(columns, ir.Constant(INDEX, column * vectors.lanes))
        mask = vectors.mask(rest)
        old = vectors.mask(builder.select(adds, rest, ir.Constant(INDEX, 0)))
        for total, place in zip(sums[column::VECTORS], places[column::VECTORS], strict=True):
            vectors.store(vectors.load(place, old) + total, place, mask)


def _sum(vectors: Vectors, rows: int, places: Any, strides: Any, counts: Any) -> list[Vector]:
    """Emit the loops over segments and steps; return the sums, which never leave the registers."""
    builder = vectors.builder
    a_row, a_step, a_segment, b_step, b_segment = strides
    # An instruction reaches the rows after a start by adding the distance once or twice.
    starts = [offset(builder, places[0], (a_row, row)) for row in range(0, rows, NEAR)]
    places = [*starts, places[1]]
    segment = Loop(vectors, counts[1], places, [vectors.zero] * (rows * VECTORS))
    step = Loop(vectors, counts[0], segment.places, segment.sums, apart=True)
    *a, b = step.places
    columns = [
        vectors.load(builder.gep(b, [ir.Constant(INDEX, column * vectors.lanes)]))
        for column in range(VECTORS)
    ]
    sums = []
    for row in range(rows):
        place = offset(builder, a[row // NEAR], (a_row, row % NEAR))
        scalar = vectors.splat(builder.load(place))
        for column, values in enumerate(columns):
            total = step.sums[row * VECTORS + column]
            sums.append(vectors.multiply_add(scalar, values, total))
    step.repeat((*[a_step] * len(a), b_step), sums)
    segment.repeat((*[a_segment] * len(a), b_segment), sums)
    return sums


@kernel_part
def _nothing(
    count, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth, segments,
    adds,
):  # fmt: skip
    pass


def _compose() -> Any:
    function = _nothing
    for rows in reversed(TILES):
        function = _cascade(rows, function)
    return function


_multiply_rows = _compose()
_KINDS = [
    (n, place, n, n, n, place, n, n, place, n, n, n, n, types.boolean)
    for n in (types.intp,)
    for place in (types.CPointer(types.float32), types.CPointer(types.float64))
]


@linked(_KINDS)
def multiply(
    count, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth, segments,
    adds,
):  # fmt: skip
    """Write or add the sum over k of a[i, k] * b[k, j] to c[i, j], for `count` rows i.

    k runs over `segments` runs of `depth`, both at least 1. Distances are in elements; b and c have
    neighbouring columns, of which `columns` are stored and all of b's are read.
    """
    _multiply_rows(
        count, a, a_row, a_step, a_segment, b, b_step, b_segment, c, c_row, columns, depth,
        segments, adds,
    )  # fmt: skip

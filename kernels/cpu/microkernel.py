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
    Vector,
    Vectors,
    intrinsic,
    offset,
    shifted,
)

# Rows of the tiles, largest first: ROWS * VECTORS sums, VECTORS of b and one of a fill the registers.
VECTORS = 2
TILES = (14, 7, 4, 2, 1) if REGISTERS == 32 else (6, 4, 2, 1)
ROWS = TILES[0]
WIDTH_BYTES = VECTORS * VECTOR_BYTES


def width(dtype: Any) -> int:
    """Return how many columns the tile has for a NumPy dtype."""
    return WIDTH_BYTES // dtype.itemsize


@kernel_part
def columns_of(array):
    """Return how many columns the tile has for an array's dtype, in compiled code."""
    return WIDTH_BYTES // array.itemsize


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
    segment = _Loop(vectors, counts[1], places, [vectors.zero] * (rows * VECTORS))
    step = _Loop(vectors, counts[0], segment.places, segment.sums)
    a, b = step.places
    columns = [
        vectors.load(builder.gep(b, [ir.Constant(INDEX, column * vectors.lanes)]))
        for column in range(VECTORS)
    ]
    sums = []
    for row in range(rows):
        scalar = vectors.splat(builder.load(offset(builder, a, (a_row, row))))
        for column, values in enumerate(columns):
            total = step.sums[row * VECTORS + column]
            sums.append(vectors.multiply_add(scalar, values, total))
    step.repeat((a_step, b_step), sums)
    segment.repeat((a_segment, b_segment), sums)
    return sums


class _Loop:
    """A loop of at least one turn that moves along a and b and carries the sums in registers."""

    def __init__(self, vectors: Vectors, count: Any, places: Any, sums: list[Vector]) -> None:
        self.vectors = vectors
        self.builder = builder = vectors.builder
        self.count = count
        before, self.block = builder.block, builder.append_basic_block("product")
        builder.branch(self.block)
        builder.position_at_end(self.block)
        self.number = builder.phi(INDEX)
        self.places = [builder.phi(place.type) for place in places]
        self.sums = [Vector(vectors, builder.phi(vectors.type)) for _ in sums]
        self._enter(before, ir.Constant(INDEX, 0), places, sums)

    def repeat(self, steps: Any, sums: list[Vector]) -> None:
        """Go round with the places moved by `steps`, or leave the loop after its last turn."""
        builder = self.builder
        number = builder.add(self.number, ir.Constant(INDEX, 1))
        places = [
            builder.gep(place, [step]) for place, step in zip(self.places, steps, strict=True)
        ]
        self._enter(builder.block, number, places, sums)
        after = builder.append_basic_block("product.end")
        builder.cbranch(builder.icmp_signed("<", number, self.count), self.block, after)
        builder.position_at_end(after)

    def _enter(self, block: Any, number: Any, places: Any, sums: list[Vector]) -> None:
        """Say what the loop's variables are on the way in from `block`."""
        values = (number, *places, *(total.value for total in sums))
        phis = (self.number, *self.places, *(total.value for total in self.sums))
        for phi, value in zip(phis, values, strict=True):
            phi.add_incoming(value, block)


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

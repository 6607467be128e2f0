"""Vector code for the machine at hand, written as LLVM IR: what Numba's own loops cannot say.

The one place that knows the host: how wide its vectors are, how many registers hold them and
whether multiply and add are one instruction. NUMBA_CPU_NAME and NUMBA_CPU_FEATURES override it,
as they override what Numba compiles for.
"""

from __future__ import annotations

import platform
from collections.abc import Callable
from typing import Any

from llvmlite import binding, ir
from numba import config, types
from numba.core import cgutils
from numba.extending import intrinsic as numba_intrinsic

from gradengine.kernels.cpu.launch import kernel_part

INDEX = ir.IntType(64)
CONTRACT = ("contract",)  # a product and a sum may become one multiply-add


def intrinsic(function: Callable[..., Any]) -> Any:
    """Make a function that generates code; callers give its arguments without the typing context."""
    return numba_intrinsic(function)


def _features() -> set[str]:
    """Return the vector extensions that Numba compiles for."""
    settings: Any = config
    if settings.CPU_FEATURES is not None:
        return {name[1:] for name in settings.CPU_FEATURES.split(",") if name.startswith("+")}
    if settings.CPU_NAME == "generic":
        return set()
    if platform.machine() in ("aarch64", "arm64"):
        return {"neon", "fma"}
    return {name for name, present in binding.get_host_cpu_features().items() if present}


def _registers(features: set[str]) -> tuple[int, int]:
    """Return the size of a vector register in bytes, and how many there are."""
    if "avx512f" in features:
        return 64, 32
    if "avx2" in features:
        return 32, 16
    return 16, 32 if "neon" in features else 16


HAS_FMA = "fma" in _features()
VECTOR_BYTES, REGISTERS = _registers(_features())


class Vectors:
    """Emits operations on vectors of one element type at a builder's position."""

    def __init__(self, builder: Any, element: Any) -> None:
        self.builder = builder
        self.size = 4 if element == ir.FloatType() else 8
        self.lanes = VECTOR_BYTES // self.size
        self.type = ir.VectorType(element, self.lanes)
        self.zero = Vector(self, ir.Constant(self.type, None))

    def load(self, place: Any, mask: Any = None) -> Vector:
        """Load a vector; with a mask, lanes outside it are 0 and their memory is not touched."""
        place = self.builder.bitcast(place, self.type.as_pointer())
        if mask is None:
            return Vector(self, self.builder.load(place, align=self.size))
        kinds = [self.type.as_pointer(), ir.IntType(32), mask.type, self.type]
        name = f"llvm.masked.load.{self._suffix()}.p0{self._suffix()}"
        arguments = [place, ir.Constant(ir.IntType(32), self.size), mask, self.zero.value]
        return Vector(self, self._call(name, self.type, kinds, arguments))

    def store(self, vector: Vector, place: Any, mask: Any = None) -> None:
        """Store a vector, or the lanes of it that a mask selects."""
        place = self.builder.bitcast(place, self.type.as_pointer())
        if mask is None:
            self.builder.store(vector.value, place, align=self.size)
            return
        kinds = [self.type, self.type.as_pointer(), ir.IntType(32), mask.type]
        name = f"llvm.masked.store.{self._suffix()}.p0{self._suffix()}"
        arguments = [vector.value, place, ir.Constant(ir.IntType(32), self.size), mask]
        self._call(name, ir.VoidType(), kinds, arguments)

    def mask(self, count: Any) -> Any:
        """Select the first `count` lanes."""
        kind = ir.VectorType(INDEX, self.lanes)
        numbers = ir.Constant(kind, list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, self._spread(count, kind))

    def splat(self, scalar: Any) -> Vector:
        return Vector(self, self._spread(scalar, self.type))

    def constant(self, value: float) -> Vector:
        return Vector(self, ir.Constant(self.type, [float(value)] * self.lanes))

    def multiply_add(self, x: Vector, y: Vector, total: Vector) -> Vector:
        if not HAS_FMA:  # llvm.fma would become a call of the C library
            return x * y + total
        arguments = [x.value, y.value, total.value]
        name = f"llvm.fma.{self._suffix()}"
        return Vector(self, self._call(name, self.type, [self.type] * 3, arguments))

    def _spread(self, scalar: Any, kind: Any) -> Any:
        empty = ir.Constant(kind, ir.Undefined)
        first = self.builder.insert_element(empty, scalar, ir.Constant(ir.IntType(32), 0))
        lanes = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None)
        return self.builder.shuffle_vector(first, empty, lanes)

    def _suffix(self) -> str:
        return f"v{self.lanes}f{8 * self.size}"

    def _call(self, name: str, result: Any, kinds: list[Any], arguments: list[Any]) -> Any:
        kind = ir.FunctionType(result, kinds)
        function = cgutils.get_or_insert_function(self.builder.module, kind, name)
        return self.builder.call(function, arguments)


class Vector:
    """A vector value; `+`, `-` and `*` emit instructions, so that formulas read as formulas."""

    def __init__(self, vectors: Vectors, value: Any) -> None:
        self.vectors = vectors
        self.value = value

    def __add__(self, other: Vector) -> Vector:
        return Vector(
            self.vectors, self.vectors.builder.fadd(self.value, other.value, flags=CONTRACT)
        )

    def __sub__(self, other: Vector) -> Vector:
        return Vector(
            self.vectors, self.vectors.builder.fsub(self.value, other.value, flags=CONTRACT)
        )

    def __mul__(self, other: Vector | float) -> Vector:
        if not isinstance(other, Vector):
            other = self.vectors.constant(other)
        return Vector(
            self.vectors, self.vectors.builder.fmul(self.value, other.value, flags=CONTRACT)
        )

    __rmul__ = __mul__


def offset(builder: Any, place: Any, *terms: tuple[Any, int]) -> Any:
    """Return place + the sum of stride * number, in elements."""
    for stride, number in terms:
        place = builder.gep(place, [builder.mul(stride, ir.Constant(INDEX, number))])
    return place


class Loop:
    """A loop of at least one turn that moves along arrays and carries sums in registers.

    With `apart` the compiler does not see that places move together: it would compute each from the
    last, a chain as long as a turn's products, and unroll the loop until its registers run out.
    """

    def __init__(
        self, vectors: Vectors, count: Any, places: Any, sums: list[Vector], *, apart: bool = False
    ) -> None:
        self.builder = builder = vectors.builder
        self.count = count
        before, self.block = builder.block, builder.append_basic_block("turn")
        builder.branch(self.block)
        builder.position_at_end(self.block)
        starts = (ir.Constant(INDEX, 0), *places, *(total.value for total in sums))
        self.variables = [builder.phi(start.type) for start in starts]
        self._enter(before, starts)
        self.number, found = self.variables[0], self.variables[1 : 1 + len(places)]
        self.places = [_same(builder, place) for place in found] if apart else found
        self.sums = [Vector(vectors, value) for value in self.variables[1 + len(places) :]]

    def repeat(self, steps: Any, sums: list[Vector]) -> None:
        """Go round with the places moved by `steps`, or leave the loop after its last turn."""
        builder = self.builder
        number = builder.add(self.number, ir.Constant(INDEX, 1))
        places = [
            builder.gep(place, [step]) for place, step in zip(self.places, steps, strict=True)
        ]
        self._enter(builder.block, (number, *places, *(total.value for total in sums)))
        after = builder.append_basic_block("turn.end")
        builder.cbranch(builder.icmp_signed("<", number, self.count), self.block, after)
        builder.position_at_end(after)

    def _enter(self, block: Any, values: Any) -> None:
        """Say what the loop's variables are on the way in from `block`."""
        for variable, value in zip(self.variables, values, strict=True):
            variable.add_incoming(value, block)


def _same(builder: Any, place: Any) -> Any:
    """Give a place of which the compiler does not know where it comes from."""
    kind = ir.FunctionType(place.type, [place.type])
    return builder.call(ir.InlineAsm(kind, "", "=r,0"), [place])


@intrinsic
def pointer(typing_context, array, position):
    """Point at the element of an array's memory that lies `position` elements from its start.

    A pointer does not keep its array alive: point only into arrays that the caller holds.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def shifted(typing_context, place, distance):
    """Point `distance` elements further."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.gep(arguments[0], [arguments[1]])

    return place(place, types.intp), generate


@kernel_part
def lanes(array):
    """Return how many of an array's elements a vector holds."""
    return VECTOR_BYTES // array.itemsize


@intrinsic
def copy_run(typing_context, source, target, count):
    """Copy `count` elements to memory that does not overlap."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target, count = arguments
        cgutils.raw_memcpy(builder, target, source, count, _size(context, signature.args[0]))
        return context.get_dummy_value()

    return types.void(source, target, types.intp), generate


@intrinsic
def clear_run(typing_context, target, count):
    """Set `count` elements to zero."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        target, count = arguments
        size = ir.Constant(INDEX, _size(context, signature.args[0]))
        cgutils.memset(builder, target, builder.mul(count, size), 0)
        return context.get_dummy_value()

    return types.void(target, types.intp), generate


def _size(context: Any, pointer: Any) -> int:
    return context.get_abi_sizeof(context.get_data_type(pointer.dtype))


@intrinsic
def transpose(typing_context, source, row, target, target_row):
    """Transpose a square of as many rows and columns as a vector has lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, row, target, target_row = arguments
        vectors = Vectors(builder, source.type.pointee)
        count = vectors.lanes
        rows = [vectors.load(offset(builder, source, (row, i))) for i in range(count)]
        for i, vector in enumerate(_transposed(builder, rows, count)):
            vectors.store(vector, offset(builder, target, (target_row, i)))
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp), generate


def _transposed(builder: Any, rows: list[Vector], count: int) -> list[Vector]:
    """Swap the off-diagonal quarters of squares of 2, 4, 8, ... lanes."""
    numbers = ir.VectorType(ir.IntType(32), count)
    half = 1
    while half < count:
        near = [j + count - half if j & half else j for j in range(count)]
        far = [j + count if j & half else j + half for j in range(count)]
        for i in range(count):
            if not i & half:
                pair = rows[i].value, rows[i + half].value
                rows[i], rows[i + half] = (
                    Vector(rows[i].vectors, builder.shuffle_vector(*pair, ir.Constant(numbers, m)))
                    for m in (near, far)
                )
        half *= 2
    return rows


def square_transform(formula: Callable[[list[Any]], list[Any]], size: int) -> Any:
    """Compile the 2-D form of a 1-D transform of `size` values: along the columns, then the rows.

    Returns f(source, row, column, target, target_row, target_column, vectors), for `vectors` runs
    of consecutive lanes of both; places are pointers, distances count elements.
    """

    @intrinsic
    def transform(typing_context, source, row, column, target, target_row, target_column, vectors):
        numbers = types.intp
        kinds = (source, numbers, numbers, target, numbers, numbers, numbers)
        return types.void(*kinds), generate

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, row, column, target, target_row, target_column, count = arguments
        vectors = Vectors(builder, source.type.pointee)
        with cgutils.for_range(builder, count) as loop:
            start = builder.mul(loop.index, ir.Constant(INDEX, vectors.lanes))
            source, target = (builder.gep(place, [start]) for place in (source, target))
            columns = [
                formula(
                    [
                        vectors.load(offset(builder, source, (row, i), (column, j)))
                        for i in range(size)
                    ]
                )
                for j in range(size)
            ]
            for i, values in enumerate(zip(*columns, strict=True)):
                for j, value in enumerate(formula(list(values))):
                    place = offset(builder, target, (target_row, i), (target_column, j))
                    vectors.store(value, place)
        return context.get_dummy_value()

    @kernel_part
    def call(source, row, column, target, target_row, target_column, vectors):
        transform(source, row, column, target, target_row, target_column, vectors)

    return call

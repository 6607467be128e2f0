"""Matrix products, blocked so that each level of cache holds what fits it.

Goto and van de Geijn, "Anatomy of high-performance matrix multiplication", ACM TOMS 34 (2008): the
columns of y are copied once, in panels as wide as the microkernel; a block of x, copied unless its
rows are short and neighbours, stays in the L2 cache, where the panels pass it. Any strides are taken
as they are: a transposed array is never copied as a whole.
"""

from __future__ import annotations

import numpy as np

from gradengine.kernels import settings
from gradengine.kernels.cpu import microkernel
from gradengine.kernels.cpu.launch import kernel_part, own_range, parallel_kernel
from gradengine.kernels.cpu.microkernel import ROWS, columns_of
from gradengine.kernels.cpu.simd import (
    REGISTERS,
    copy_run,
    lanes,
    pointer,
    shifted,
    transpose,
)
from gradengine.kernels.cpu.threads import get_num_threads
from gradengine.kernels.cpu.workspace import workspace
from gradengine.kernels.layout import Array

# Of a block of x, in L2: its depth and rows. With AVX-512 a panel of y is 64 KB, else at most 24.
DEPTH, BLOCK = (512, 8 * ROWS) if REGISTERS == 32 else (384, 24 * ROWS)
ROW = DEPTH + 16  # elements from row to row of a block, which must not lie 4096 bytes apart
FEW_ROWS = 64  # of x: copying y would cost more than it saves
RUNS = 64  # rows of y that they pass at a time
TASKS = 4  # for each thread, so that they balance
GROUP = 4  # panels of a task, where there are threads enough: it may have to copy a block of x

DTYPES = tuple(map(np.dtype, ("float32", "float64")))  # names would be made dtypes each time

# NumPy's BLAS is the faster where a launch costs more than the product. It runs these on one thread;
# larger ones on threads of its own, which then spin on the cores that the next kernel needs.
SMALL_PRODUCT = 1 << 20
SMALL_MATRIX = 1 << 13  # the same for a product with a vector
MEDIUM_MATRIX = 1 << 22  # up to here one thread reads a matrix as fast as two and their start


def matmul(x: Array, y: Array) -> Array:
    """Give x (..., M, K) @ y (..., K, N); leading axes broadcast.

    The order of every sum is fixed by the shapes: any number of threads gives the same bits.
    """
    rows, depth, columns = x.shape[-2], x.shape[-1], y.shape[-1]
    batch = () if x.ndim == y.ndim == 2 else np.broadcast_shapes(x.shape[:-2], y.shape[:-2])
    size = rows * depth * columns
    if x.dtype not in DTYPES or 0 in batch or size <= SMALL_MATRIX:
        out = np.matmul(x, y)
        return out if out.dtype is x.dtype else out.astype(x.dtype)  # of bfloat16 it is float32
    if depth == 1:
        return x * y
    if (rows == 1 or columns == 1) and not batch:
        # BLAS's threads share a sum, in parts that depend on how many there are
        by_blas = size > MEDIUM_MATRIX and not settings.general.deterministic
        return np.matmul(x, y) if by_blas else np.einsum("ij,jk->ik", x, y)
    if size <= SMALL_PRODUCT:
        return np.matmul(x, y)
    out = np.empty((*batch, rows, columns), x.dtype)
    few = rows <= FEW_ROWS and y.strides[-1] == y.itemsize
    multiply = _multiply_few if few else _multiply
    multiply(_stack(x, batch), _stack(y, batch), out.reshape(-1, rows, columns))
    return out


def _stack(x: Array, batch: tuple[int, ...]) -> Array:
    """Give x as (B, M, K), or as (1, M, K) where one matrix serves the whole batch."""
    matrix = x.shape[-2:]
    if x.size == matrix[0] * matrix[1]:
        return x.reshape(1, *matrix)
    if x.shape[:-2] != batch:
        x = np.broadcast_to(x, (*batch, *matrix))  # cannot be written, and so is copied
    return x.reshape(-1, *matrix)


def _multiply(x: Array, y: Array, out: Array) -> None:
    threads = get_num_threads()
    _, rows, columns = out.shape
    depth = x.shape[2]
    width = microkernel.width(x.dtype)
    panels = -(-columns // width)
    down = -(-rows // BLOCK)
    if down > TASKS * threads:
        down += -down % threads  # as many for each
    blocks = len(out) * down
    most = max(panels // GROUP, min(-(-threads // blocks), panels))
    groups = min(-(-TASKS * threads // blocks), most)
    workers = min(threads, blocks * groups)
    with (
        workspace(len(y), panels, depth * width, dtype=x.dtype) as packed,
        workspace(workers, BLOCK * ROW, dtype=x.dtype) as scratch,
    ):
        _pack_panels(min(threads, len(y) * panels), *_start(y), depth, columns, packed)
        _multiply_tasks(workers, *_start(x), packed, out, depth, down, groups, scratch)


def _multiply_few(x: Array, y: Array, out: Array) -> None:
    """Multiply by y where it lies: few rows of x are sooner multiplied than y is copied."""
    columns, depth, width = out.shape[2], x.shape[2], microkernel.width(x.dtype)
    whole, threads = columns // width * width, get_num_threads()
    with workspace(len(y), int(columns > whole), depth * width, dtype=x.dtype) as packed:
        if len(packed[0]):  # the microkernel reads all columns of a panel
            _pack_panels(
                min(threads, len(y)), *_start(y[..., whole:]), depth, columns - whole, packed
            )
        _multiply_runs(threads, *_start(x), *_start(y), packed, out, depth)


@parallel_kernel
def _multiply_runs(worker, workers, x, strides, y, y_strides, packed, out, depth):
    """Each worker makes some panels of all products, RUNS rows of y at a time: they are runs of memory.

    x and y begin at one element; packed (B, 1, K * width) has the columns that fill no panel.
    """
    matrices, rows, columns = out.shape
    width = columns_of(out)
    panels = (columns + width - 1) // width
    for matrix in range(matrices):
        own = packed[matrix if len(packed) > 1 else 0]
        for start in range(0, depth, RUNS):
            a = pointer(x, matrix * strides[0] + start * strides[2])
            for panel in own_range(worker, workers, panels):
                column = panel * width
                place, row = matrix * y_strides[0] + start * y_strides[1] + column, y_strides[1]
                weights = pointer(y, place)
                if column + width > columns:
                    weights, row = pointer(own[0], start * width), width
                microkernel.multiply(
                    rows, a, strides[1], strides[2], 0, weights, row, 0,
                    pointer(out, matrix * rows * columns + column), columns,
                    min(width, columns - column), min(RUNS, depth - start), 1, start > 0,
                )  # fmt: skip


def _start(x: Array) -> tuple[Array, tuple[int, ...]]:
    """Give the first element of x (B, M, K), and the distances along its axes in elements.

    Compiled code takes these for any memory, where arrays of each layout are types of their own.
    """
    # A field of packed records may lie between elements: its memory is not aligned.
    x = x if x.flags.writeable and x.flags.aligned else x.copy()
    batch, row, column = (stride // x.itemsize for stride in x.strides)
    return x[0, 0, :1], (batch if len(x) > 1 else 0, row, column)


@parallel_kernel
def _pack_panels(worker, workers, y, strides, depth, columns, packed):
    """Lay out y, which begins at one element, as panels: packed (B, panels, K * width)."""
    tasks = packed.shape[0] * packed.shape[1]
    for task in range(tasks * worker // workers, tasks * (worker + 1) // workers):
        matrix, panel = task // packed.shape[1], task % packed.shape[1]
        _pack_panel(y, strides, matrix, panel, depth, columns, packed)


@kernel_part
def _pack_panel(y, strides, matrix, panel, depth, columns, packed):
    """Write a panel of y's columns, row after row; missing columns are zero."""
    width, count = columns_of(packed), lanes(packed)
    first = panel * width
    valid = min(width, columns - first)
    batch, row, column = strides
    source = pointer(y, matrix * batch + first * column)
    target = pointer(packed[matrix, panel], 0)
    square = 0  # rows that are copied, a square at a time, from where they are columns
    if row == 1 and valid == width:
        square = depth // count * count
        for k in range(0, square, count):
            for j in range(0, width, count):
                place = shifted(source, k + j * column)
                transpose(place, column, shifted(target, k * width + j), width)
    for k in range(square, depth):
        line, place = shifted(source, k * row), shifted(target, k * width)
        if column == 1 and valid == width:
            microkernel.copy_columns(line, place)
        else:
            for j in range(valid):
                place[j] = line[j * column]
        for j in range(valid, width):
            place[j] = 0


@parallel_kernel
def _multiply_tasks(worker, workers, x, strides, packed, out, depth, down, groups, scratch):
    """Each task multiplies one of `down` blocks of x's rows by one of `groups` groups of panels.

    x begins at one element; packed (B, panels, K * width), scratch (workers, BLOCK * ROW).
    """
    rows, columns = out.shape[1], out.shape[2]
    panels, width = packed.shape[1], columns_of(out)
    tiles, part = (rows + ROWS - 1) // ROWS, (panels + groups - 1) // groups
    copied = -1  # the block that lies in scratch as a whole
    for task in range(worker, len(out) * down * groups, workers):
        matrix, block = task // groups // down, task // groups % down
        first = tiles * block // down * ROWS
        count = min(tiles * (block + 1) // down * ROWS, rows) - first
        weights = packed[matrix if len(packed) > 1 else 0]
        for start in range(0, depth, DEPTH):
            steps = min(DEPTH, depth - start)
            place = matrix * strides[0] + first * strides[1] + start * strides[2]
            rows_of_x, row = pointer(x, place), strides[1]
            if strides[2] != 1 or row > ROW:
                if copied != task // groups:
                    _copy_block(rows_of_x, row, strides[2], count, steps, scratch[worker])
                copied = task // groups if depth <= DEPTH else -1
                rows_of_x, row = pointer(scratch[worker], 0), ROW
            for panel in range(task % groups * part, min((task % groups + 1) * part, panels)):
                target = (matrix * rows + first) * columns + panel * width
                microkernel.multiply(
                    count, rows_of_x, row, 1, 0,
                    pointer(weights[panel], start * width), width, 0,
                    pointer(out, target), columns, min(width, columns - panel * width), steps, 1,
                    start > 0,
                )  # fmt: skip


@kernel_part
def _copy_block(source, row, step, count, steps, block):
    """Copy rows of x, ROW from one to the next; where they lie across memory a square at a time."""
    target, side = pointer(block, 0), lanes(block)
    high, wide = (count // side * side, steps // side * side) if row == 1 and step != 1 else (0, 0)
    for k in range(0, wide, side):
        for i in range(0, high, side):
            place = shifted(source, i + k * step)
            transpose(place, step, shifted(target, i * ROW + k), ROW)
    for i in range(count):
        line, place = shifted(source, i * row), shifted(target, i * ROW)
        if step == 1:
            copy_run(line, place, steps)
            continue
        for k in range(wide if i < high else 0, steps):
            place[k] = line[k * step]

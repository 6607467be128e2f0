"""Conformance: each wrapper of instructions.cuh does what its comment says, emulated and on a GPU.

What the emulator says of a kernel rests on this: its wrappers and the real instructions are held to
the same references, which follow the comments of `instructions.cuh` and nothing else.
"""

import re

import numpy as np
import pytest

from gradengine.devices import import_cupy
from gradengine.kernels.cuda import compiler
from gradengine.kernels.cuda.launch import device_limits, kernel
from tests.emulator.emulator import FOLDER

SOURCE = str(FOLDER / "conformance.cu")
LANES = np.arange(32)
G, T = LANES // 4, LANES % 4


class Machine:
    """Runs kernels of conformance.cu; arrays are NumPy's, and changed in place."""

    def __init__(self, is_gpu):
        self.is_gpu = is_gpu

    def __call__(self, name, *arguments, grid=1, block=32, shared_bytes=0):
        if not self.is_gpu:
            kernel(SOURCE, name)((grid,), (block,), arguments, shared_bytes)
            return
        cupy = import_cupy()
        moved = [cupy.asarray(a) if isinstance(a, np.ndarray) else a for a in arguments]
        kernel(SOURCE, name)((grid,), (block,), moved, shared_bytes)
        for argument, copy in zip(arguments, moved, strict=True):
            if isinstance(argument, np.ndarray):
                argument[...] = cupy.asnumpy(copy)


@pytest.fixture(params=["emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def machine(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
    return Machine(request.param == "cupy")


def assert_same_numbers(found, expected):
    """Bit for bit, but that any NaN is as good as another."""
    nan = np.isnan(expected)
    assert (np.isnan(found) == nan).all()
    assert found[~nan].tobytes() == expected[~nan].tobytes()


def test_every_wrapper_is_emulated_and_runs_here():
    def wrappers(path):
        return set(re.findall(r"^DEVICE [^()]*?(\w+)\(", path.read_text(), re.MULTILINE))

    shipped = wrappers(compiler.FOLDER / "instructions.cuh")
    assert {"copy_async", "load_matrices", "multiply_tf32"} <= shipped
    assert wrappers(FOLDER / "instructions.cuh") == shipped
    text = (FOLDER / "conformance.cu").read_text() + (compiler.FOLDER / "elements.cuh").read_text()
    assert {name for name in shipped if not re.search(rf"\b{name}\b", text)} == set()


# ---- 16-bit floating point ----------------------------------------------------------------------


def test_every_float16_as_float(machine):
    bits = np.arange(1 << 16, dtype=np.uint16)
    found = np.empty(bits.shape, np.float32)
    machine("floats_of_float16", bits, found, grid=256, block=256)
    assert_same_numbers(found, bits.view(np.float16).astype(np.float32))


def floats_of_all_kinds(rng):
    """Random bits, numbers around those that 16 bits can hold, halfway cases and their neighbours."""
    anything = rng.integers(0, 1 << 32, 1 << 15, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        near = np.exp2(rng.uniform(-30, 18, 1 << 14)).astype(np.float32)
    halfway = np.arange(1 << 14, dtype=np.uint32) << 18 | np.uint32(0x1000)
    around = (halfway + rng.integers(-1, 2, len(halfway))).astype(np.uint32).view(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 65504, 65519.996, 65520, 2.0**-24], "f4")
    values = np.concatenate([anything, near, around, special])
    return np.concatenate([values, np.zeros(-len(values) % 256, np.float32)])


def test_floats_round_to_the_nearest_float16(machine, rng):
    values = floats_of_all_kinds(rng)
    found = np.empty(values.shape, np.float16)
    machine("round_floats<float16>", values, found, grid=len(values) // 256, block=256)
    with np.errstate(over="ignore", invalid="ignore"):
        assert_same_numbers(found, values.astype(np.float16))


def test_floats_round_to_the_nearest_bfloat16(machine, rng):
    values = floats_of_all_kinds(rng)
    found = np.empty(values.shape, np.uint16)
    machine("round_floats<bfloat16>", values, found, grid=len(values) // 256, block=256)
    bits = values.view(np.uint32).astype(np.uint64)
    low, upper = bits & 0xFFFF, bits >> 16
    up = (low > 0x8000) | ((low == 0x8000) & (upper & 1 == 1))
    expected = ((upper + up) << 16).astype(np.uint32).view(np.float32)
    expected[np.isnan(values)] = np.nan
    assert_same_numbers((found.astype(np.uint32) << 16).view(np.float32), expected)


def rounded_to_tf32(machine, values):
    """Return what a tensor core takes of values that go through round_to_tf32."""
    found = np.empty(values.shape, np.uint32)
    machine(
        "round_floats_to_tf32", values.view(np.uint32), found, grid=len(values) // 256, block=256
    )
    return (found & np.uint32(0xFFFFE000)).view(np.float32)


def test_rounding_to_tf32_is_nearly_to_the_nearest_and_without_bias(machine, rng):
    bits = rng.integers(0x00800000, 0x7F000000, 1 << 14, dtype=np.uint32)  # normal numbers
    values = bits.view(np.float32) * rng.choice(np.array([-1, 1], np.float32), len(bits))
    errors = rounded_to_tf32(machine, values).astype(np.float64) - values
    unit = np.exp2(np.frexp(values)[1].astype(np.float64) - 11)  # in the last place
    assert (np.abs(errors) <= 0.75 * unit).all()
    assert abs(np.mean(errors / values)) < 2.0**-15  # dropping bits alone: -(2 ** -11.5)


def test_rounding_to_tf32_leaves_what_fits_and_what_is_not_finite(machine, rng):
    bits = rng.integers(0x00800000, 0x7F000000, 1 << 12, dtype=np.uint32) & np.uint32(0xFFFFE000)
    bits[:6] = (
        0,
        0x80000000,
        0x7F800000,
        0xFF800000,
        0x7FFFFFFF,
        0xFFFFFFFF,
    )  # zeros, infinities, NaN
    values = bits.view(np.float32)
    assert_same_numbers(rounded_to_tf32(machine, values), values)


# ---- copies and shared memory -------------------------------------------------------------------


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_arrive_and_what_is_not_valid_becomes_zero(size, machine, rng):
    x = rng.integers(0, 256, (64, size), dtype=np.uint8)
    valid = rng.integers(0, 2, 64, dtype=np.int32)
    y = np.empty_like(x)
    machine(f"copy_once<{size}>", x, valid, y, block=64, shared_bytes=x.nbytes)
    assert (y == np.where(valid[:, None], x, 0)).all()


@pytest.mark.parametrize("pending", [0, 1, 2, 3])
def test_waiting_lands_all_groups_but_the_last(pending, machine):
    x = np.arange(4 * 64, dtype=np.float32).reshape(4, 64)
    y = np.full_like(x, -1)
    machine(f"copy_by_groups<{pending}>", x, y, block=64, shared_bytes=x.nbytes)
    assert (y[: 4 - pending] == x[: 4 - pending]).all()
    assert (y[4 - pending :] == -1).all()


def test_dynamic_shared_memory_is_aligned_and_one(machine):
    y = np.full(4, -1, np.int32)
    machine("dynamic_address", y, shared_bytes=2048)
    assert y.tolist() == [0, 1, 20, 1]


# ---- matrices -----------------------------------------------------------------------------------


def random_rows(rng):
    """Return a tile of 1024 words and the word at which each lane's row begins: any, some twice."""
    return rng.integers(0, 1 << 32, 1024, dtype=np.uint32), 4 * rng.integers(0, 256, 32, np.int32)


def test_matrices_by_rows(machine, rng):
    tile, rows = random_rows(rng)
    found = np.empty((32, 4), np.uint32)
    machine("load_fragments<false>", tile, rows, found, shared_bytes=4096)
    for matrix in range(4):
        # lane l holds bytes 4 * (l % 4) to 4 * (l % 4) + 3 of row l / 4
        assert (found[:, matrix] == tile[rows[8 * matrix + G] + T]).all()


def test_matrices_transposed(machine, rng):
    tile, rows = random_rows(rng)
    found = np.empty((32, 4), np.uint32)
    machine("load_fragments<true>", tile, rows, found, shared_bytes=4096)
    halves = tile.view(np.uint16)
    for matrix in range(4):
        # (row 2 * (l % 4), column l / 4), then (row 2 * (l % 4) + 1, column l / 4)
        low = halves[2 * rows[8 * matrix + 2 * T] + G]
        high = halves[2 * rows[8 * matrix + 2 * T + 1] + G]
        assert (found[:, matrix] == low.astype(np.uint32) | high.astype(np.uint32) << 16).all()


# ---- tensor cores -------------------------------------------------------------------------------
# Operands are (products, 16, K), (products, K, 8) and (products, 16, 8).


def d_fragments(d):
    return np.stack(
        [d[:, G, 2 * T], d[:, G, 2 * T + 1], d[:, G + 8, 2 * T], d[:, G + 8, 2 * T + 1]], 2
    )


def from_d_fragments(fragments):
    d = np.empty((len(fragments), 16, 8), np.float32)
    for i in range(4):
        d[:, G + i // 2 * 8, 2 * T + i % 2] = fragments[:, :, i]
    return d


def tf32_fragments(a, b):
    a, b = a.view(np.uint32), b.view(np.uint32)
    return (
        np.stack([a[:, G, T], a[:, G + 8, T], a[:, G, T + 4], a[:, G + 8, T + 4]], 2),
        np.stack([b[:, T, G], b[:, T + 4, G]], 2),
    )


def fragments_16_bit(a, b):
    """Take operands as uint16; two a register, the lower k in the low half."""
    a, b = a.astype(np.uint32), b.astype(np.uint32)

    def pair(low, high):
        return low | high << np.uint32(16)

    a_parts = [
        pair(a[:, G + row, 2 * T + k], a[:, G + row, 2 * T + k + 1])
        for row, k in ((0, 0), (8, 0), (0, 8), (8, 8))
    ]
    b_parts = [pair(b[:, 2 * T + k, G], b[:, 2 * T + k + 1, G]) for k in (0, 8)]
    return np.stack(a_parts, 2), np.stack(b_parts, 2)


def to_bits(kind, values):
    """Return what the operand registers hold of float32 values, and the numbers that they mean."""
    if kind == "FLOAT16":
        halves = values.astype(np.float16)
        return halves.view(np.uint16), halves.astype(np.float64)
    bits = values.view(np.uint32)
    if kind == "BFLOAT16":
        return (bits >> 16).astype(np.uint16), (bits & 0xFFFF0000).view(np.float32).astype("f8")
    return values, (bits & 0xFFFFE000).view(np.float32).astype(np.float64)  # 13 bits are dropped


def multiply(machine, kind, a, b, d):
    """Return the tensor core's d + a @ b, and the same in float64 with the sum of absolute values."""
    a_bits, a_means = to_bits(kind, a)
    b_bits, b_means = to_bits(kind, b)
    fragments = (tf32_fragments if kind == "TF32" else fragments_16_bit)(a_bits, b_bits)
    a_parts, b_parts = (np.ascontiguousarray(part) for part in fragments)
    found = np.ascontiguousarray(d_fragments(d))
    machine(f"multiply<{kind}>", a_parts, b_parts, found, grid=len(a))
    exact = d + a_means @ b_means
    return from_d_fragments(found), exact, np.abs(d) + np.abs(a_means) @ np.abs(b_means)


def operands(rng, kind, products=12):
    depth = 8 if kind == "TF32" else 16
    shapes = (products, 16, depth), (products, depth, 8), (products, 16, 8)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@pytest.fixture(params=["TF32", "FLOAT16", "BFLOAT16"])
def kind(request, machine):
    if machine.is_gpu and device_limits().architecture < 80 and request.param != "FLOAT16":
        pytest.skip("only from sm_80 on")
    return request.param


def test_products_of_small_integers_are_exact(kind, machine, rng):
    a, b, d = (np.round(4 * operand) for operand in operands(rng, kind))
    found, exact, _ = multiply(machine, kind, a, b, d)
    assert (found == exact).all()


def test_each_element_has_its_place(kind, machine):
    """A single one in a and in b: it must arrive at (m, n) whatever k is, and nowhere else."""
    depth = 8 if kind == "TF32" else 16
    places = [(m, k, n) for m in range(16) for k in range(depth) for n in range(0, 8, 3)]
    a, b = np.zeros((len(places), 16, depth), "f4"), np.zeros((len(places), depth, 8), "f4")
    for product, (m, k, n) in enumerate(places):
        a[product, m, k] = b[product, k, n] = 1
    found, exact, _ = multiply(machine, kind, a, b, np.zeros((len(places), 16, 8), "f4"))
    assert (found == exact).all()


def test_products_are_rounded_in_float32_only(kind, machine, rng):
    """Tensor cores may drop bits of a sum where a float32 would round: two units in the last place."""
    a, b, d = operands(rng, kind)
    found, exact, sizes = multiply(machine, kind, a, b, d)
    assert (np.abs(found - exact) <= sizes * 2.0**-22).all()


def test_small_and_infinite_operands(kind, machine):
    depth = 8 if kind == "TF32" else 16
    a, b = np.zeros((3, 16, depth), "f4"), np.zeros((3, depth, 8), "f4")
    a[0, 0, 0], b[0, 0, 0] = 2.0**-24, 1024  # the smallest float16 is kept
    a[1, 3, 2], b[1, 2, 5] = np.inf, 2
    a[2, 3, 2], b[2, 2, 5] = np.inf, 0  # NaN in row 3, where b is 0 in all columns
    with np.errstate(invalid="ignore"):
        found, exact, _ = multiply(machine, kind, a, b, np.zeros((3, 16, 8), "f4"))
    assert found[0, 0, 0] == 2.0**-14
    np.testing.assert_array_equal(found, exact)


# ---- products of warpgroups: sm_90a -------------------------------------------------------------
# a is (64, depth), b (depth, columns), d (64, columns); a row in shared memory holds 128 bytes.

THREADS = np.arange(128)
D_ROWS = THREADS // 32 * 16 + THREADS % 32 // 4
D_COLUMNS = THREADS % 4 * 2


def group_d_places(columns):
    """Return the row and column of d's registers: (128, columns / 8, 4) each."""
    block, i = np.arange(columns // 8)[:, None], np.arange(4)
    rows = D_ROWS[:, None, None] + i // 2 * 8 + 0 * block
    return rows, D_COLUMNS[:, None, None] + 8 * block + i % 2


# Rows of a: every how manieth group of eight, and from which row on; 1024 bytes are 8 rows.
A_ROWS = {
    "all": (1, 0),
    "even groups": (2, 0),
    "odd groups": (2, 8),
    "from the 3rd": (1, 2),
    "from the 6th, every second group": (2, 5),
}


@pytest.mark.parametrize("a_rows", A_ROWS)
@pytest.mark.parametrize("steps", [(0, 1), (2, 3), (3, 4), (0, 4)], ids=str)
@pytest.mark.parametrize("b_in", ["rows", "panels"])
@pytest.mark.parametrize("columns", [64, 128])
def test_products_of_warpgroups(columns, b_in, steps, a_rows, kind, machine, rng):
    if machine.is_gpu and device_limits().architecture != 90:
        pytest.skip("only on sm_90a")
    if kind == "TF32" and (b_in == "panels" or a_rows != "all"):
        pytest.skip("TF32 operands lie in rows, and a in registers")
    depth = 32 if kind == "TF32" else 64
    every, first_row = A_ROWS[a_rows]
    shapes = ((64 * every + 8, depth), (depth, columns), (64, columns))
    a, b, d = (rng.standard_normal(shape).astype("f4") for shape in shapes)
    (a_bits, a_means), (b_bits, b_means) = to_bits(kind, a), to_bits(kind, b)
    if b_in == "rows":
        b_rows = np.ascontiguousarray(b_bits.T)
    else:  # (depth, panels of 64 lines) -> each panel of a row of 64 lines for each depth
        b_rows = np.ascontiguousarray(b_bits.reshape(depth, -1, 64).swapaxes(0, 1))
    registers = np.zeros((4, 128, 4), np.uint32)
    if kind == "TF32":
        for i in range(4):
            k = 8 * np.arange(4)[:, None] + THREADS % 4 + i // 2 * 4
            registers[:, :, i] = a_bits.view(np.uint32)[D_ROWS + i % 2 * 8, k]
    places = group_d_places(columns)
    found = np.ascontiguousarray(d[places])
    machine(
        f"multiply_by_warpgroup<{kind}, {columns}, {str(b_in == 'panels').lower()}, {every}>",
        *(a_bits.view(np.uint32), registers, b_rows.view(np.uint32), found),
        *(np.int32(steps[0]), np.int32(steps[1]), np.int32(first_row)),
        block=128,
        shared_bytes=(64 * every + 8 + columns) * 128,
    )
    rows = first_row + np.arange(8)[:, None] * 8 * every + np.arange(8)
    multiplied = a_means[rows.reshape(64)]
    part = slice(steps[0] * depth // 4, steps[1] * depth // 4)
    exact = d + multiplied[:, part] @ b_means[part]
    sizes = np.abs(d) + np.abs(multiplied[:, part]) @ np.abs(b_means[part])
    assert (np.abs(found - exact[places]) <= sizes[places] * 2.0**-21).all()


@pytest.mark.parametrize("pitch", [40, 33, 1, 2])  # banks are shared, or not; columns overlap
@pytest.mark.parametrize("first", [0, 8, 1, 7, 17])
@pytest.mark.parametrize("blocks", [4, 8])
def test_products_of_columns(blocks, first, pitch, kind, machine, rng):
    """Any depth can be the first: columns need not begin at a multiple of more than 16 bytes."""
    if machine.is_gpu and device_limits().architecture != 90:
        pytest.skip("only on sm_90a")
    if kind == "TF32":
        pytest.skip("columns are of 16-bit elements")
    depths = first + (blocks - 1) * pitch + 16  # from the first column's to the last one's
    shapes = (64, 16), (depths, 8), (64, 8 * blocks)
    a, b, d = (rng.standard_normal(shape).astype("f4") for shape in shapes)
    (a_bits, a_means), (b_bits, b_means) = to_bits(kind, a), to_bits(kind, b)
    fragments, _ = fragments_16_bit(a_bits.reshape(4, 16, 16), np.zeros((4, 16, 8), np.uint16))
    places = group_d_places(8 * blocks)
    found = np.ascontiguousarray(d[places])
    shared_bytes = b_bits.nbytes
    if machine.is_gpu:
        # memcheck takes columns for side by side, and stops a read that would then end outside
        shared_bytes = max(shared_bytes, 16 * (first + 16 * blocks))
    machine(
        f"multiply_columns_by_warpgroup<{kind}, {blocks}>",
        *(np.ascontiguousarray(fragments), b_bits.view(np.uint32), found),
        *(np.int32(depths), np.int32(pitch), np.int32(first)),
        block=128,
        shared_bytes=shared_bytes,
    )
    starts = first + pitch * np.arange(blocks)
    part = np.concatenate([b_means[start : start + 16] for start in starts], axis=1)
    sizes = np.abs(d) + np.abs(a_means) @ np.abs(part)
    assert (np.abs(found - (d + a_means @ part)[places]) <= sizes[places] * 2.0**-21).all()


# The blocks of a column follow one another, with a gap or without; or those of a depth do.
BLOCK_STEPS = {"columns": (128, 256), "columns with gaps": (128, 272), "depths": (2048, 128)}


@pytest.mark.parametrize("steps", BLOCK_STEPS)
@pytest.mark.parametrize("first", [0, 16, 128, 1040])
@pytest.mark.parametrize("blocks", [8, 16])
def test_products_of_blocks(blocks, first, steps, machine, rng):
    """A block is 8 lines of 16 bytes; two along the depth are multiplied."""
    if machine.is_gpu and device_limits().architecture != 90:
        pytest.skip("only on sm_90a")
    depth_bytes, line_bytes = BLOCK_STEPS[steps]
    shapes = (64, 8), (8, 8 * blocks), (64, 8 * blocks)
    a, b, d = (rng.standard_normal(shape).astype("f4") for shape in shapes)
    (a_bits, a_means), (b_bits, b_means) = to_bits("TF32", a), to_bits("TF32", b)
    k, line = np.indices(b.shape)
    at = first + k // 4 * depth_bytes + line // 8 * line_bytes + line % 8 * 16 + k % 4 * 4
    memory = np.full(at.max() // 4 + 1, np.nan, np.float32)
    memory[at // 4] = b_bits
    fragments, _ = tf32_fragments(a_bits.reshape(4, 16, 8), np.zeros((4, 8, 8), "f4"))
    places = group_d_places(8 * blocks)
    found = np.ascontiguousarray(d[places])
    machine(
        f"multiply_blocks_by_warpgroup<{blocks}>",
        *(np.ascontiguousarray(fragments), memory.view(np.uint32), found),
        *(np.int32(number) for number in (memory.size, first, depth_bytes, line_bytes)),
        block=128,
        shared_bytes=memory.nbytes,
    )
    exact, sizes = d + a_means @ b_means, np.abs(d) + np.abs(a_means) @ np.abs(b_means)
    assert (np.abs(found - exact[places]) <= sizes[places] * 2.0**-21).all()


# ---- words of CUDA C++ --------------------------------------------------------------------------


@pytest.mark.parametrize("width", [32, 8])
@pytest.mark.parametrize("by", [1, 3, 5])
def test_shuffles_and_votes(width, by, machine, rng):
    x = rng.standard_normal(32).astype(np.float32)
    mask = 0x0F0F1234
    y = np.full((8, 32), -1, np.float32)
    machine(f"warp_words<{width}>", x, y, np.int32(by), np.uint32(mask))
    first = LANES // width * width
    assert (y[0] == x[first + by % width]).all()
    assert (y[1] == x[np.where(LANES - by >= first, LANES - by, LANES)]).all()
    assert (y[2] == x[np.where(LANES + by < first + width, LANES + by, LANES)]).all()
    assert (y[3] == x[LANES ^ by]).all()
    np.testing.assert_allclose(y[4], 1, rtol=1e-5)  # doubles keep their bits
    asked = mask >> LANES & 1 == 1
    positive = (x > 0) & asked
    assert (y[5:, ~asked] == -1).all()
    assert (y[5, asked] == positive.sum()).all()
    assert (y[6, asked] == 1).all()
    assert (y[7, asked] == positive[asked]).all()


def test_block_votes_atomics_and_bits(machine, rng):
    x = rng.standard_normal(64).astype(np.float32)
    y, counters = np.full((6, 64), -1, np.float32), np.zeros(6, np.int32)
    machine("block_words", x, y, counters, block=64)
    i = np.arange(64)
    assert (y[0] == (x > 0).sum()).all()
    assert (y[1] == 0).all()
    assert (y[2] == 1).all()
    assert counters.tolist() == [128, 63, -63, 0xFFFF, 7, 64 - 61]
    assert (y[3] == 2 * x).all()  # of a number and NaN the number
    lowest = np.array([(v & -v).bit_length() for v in i.tolist()])
    ones = np.array([v.bit_count() for v in i.tolist()])
    lengths = np.array([v.bit_length() for v in i.tolist()])
    assert (y[4] == 32 - lengths + 100 * lowest + 10000 * ones).all()
    assert (y[5] == 0x8000).all()

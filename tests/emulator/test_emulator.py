"""What the emulator finds: each fault is planted in a small kernel, which passes without it."""

import threading
from pathlib import Path

import numpy as np
import pytest

from gradengine.kernels.cuda.launch import Limits, kernel
from tests.emulator.emulator import SCHEDULES, EmulatorError, _build_once
from tests.emulator.fixtures import assert_schedule_free, every_schedule

THREADS = 64


@pytest.fixture(autouse=True)
def _on_the_emulator(emulated_cuda):
    pass


def launch(name, *arguments, grid=(1,), block=(32,), shared_bytes=0):
    kernel("faults.cu", name)(grid, block, arguments, shared_bytes)


def numbers(count):
    return np.arange(count, dtype=np.float32)


def through_shared_memory(name, x):
    y = np.zeros_like(x)
    launch(name, x, y, block=(len(x),), shared_bytes=x.nbytes)
    return y


class TestThreadsThatDoNotWait:
    @every_schedule
    def test_waiting_makes_a_result_certain(self, emulated_cuda):
        x = numbers(THREADS)
        assert (through_shared_memory("rotate<NONE>", x) == np.roll(x, -1)).all()
        assert (
            through_shared_memory("swap_neighbours<NONE>", x) == x.reshape(-1, 2)[:, ::-1].ravel()
        ).all()

    @pytest.mark.parametrize("name", ["rotate", "swap_neighbours"])
    def test_a_missing_barrier_shows_as_nan_of_what_was_not_yet_written(self, name, emulated_cuda):
        found = []
        for schedule in SCHEDULES:
            with emulated_cuda.scheduled(schedule):
                found.append(np.isnan(through_shared_memory(f"{name}<PLANTED>", numbers(THREADS))))
        assert all(nan.any() for nan in found)
        assert (found[0] != found[1]).any()

    def test_a_race_within_an_interval_gives_other_bits_by_another_order(self, emulated_cuda):
        def compute(fault):
            x = numbers(THREADS)
            launch(f"rotate_in_place<{fault}>", x, block=(THREADS,), shared_bytes=x.nbytes)
            return x

        sound = assert_schedule_free(emulated_cuda, lambda: compute("NONE"))
        assert (sound == np.roll(numbers(THREADS), -1)).all()
        with pytest.raises(AssertionError, match="forward-lazy and reverse-eager .*: threads race"):
            assert_schedule_free(emulated_cuda, lambda: compute("PLANTED"))

    def test_blocks_that_read_each_other(self, emulated_cuda):
        def compute(fault):
            x = np.full(5, 100, np.float32)
            launch(f"chain<{fault}>", x, grid=(5,))
            return x

        assert (assert_schedule_free(emulated_cuda, lambda: compute("NONE")) == numbers(5)).all()
        with pytest.raises(AssertionError, match="threads race"):
            assert_schedule_free(emulated_cuda, lambda: compute("PLANTED"))


@every_schedule
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "divergent_barrier",
            r"\(0, 0, 0\): deadlock, 16 threads wait at faults.cu line \d+, 16 have exited",
        ),
        (
            "two_barriers",
            r"line \d+: __syncthreads meets another one, of \d+ threads at faults.cu line",
        ),
        ("divergent_shuffle", r"deadlock, 16 threads wait at faults.cu line \d+, 16 have exited"),
        ("shuffle_outside_mask", r"faults.cu line \d+: shuffle reads lane 20, .* mask 0000ffff"),
    ],
)
def test_threads_that_wait_for_those_who_never_come(name, message, emulated_cuda):
    y = np.zeros(32, np.float32)
    launch(f"{name}<NONE>", y)
    with pytest.raises(EmulatorError, match=f"^faults.cu: {name}<PLANTED>: block .*{message}"):
        launch(f"{name}<PLANTED>", y)


class TestAsynchronousCopies:
    def ring(self, fault):
        x = numbers(6 * 4 * THREADS)
        y = np.zeros_like(x)
        launch(f"copy_by_ring<{fault}>", x, y, block=(THREADS,), shared_bytes=3 * 16 * THREADS)
        return (x == y).all()

    @every_schedule
    def test_a_sound_ring_of_buffers(self, emulated_cuda):
        assert self.ring("SOUND")

    # Each mode alone misses one of the two faults.
    @pytest.mark.parametrize(("fault", "lazy"), [("LATE", True), ("OVERWRITTEN", False)])
    def test_a_faulty_ring_of_buffers(self, fault, lazy, emulated_cuda):
        for schedule in SCHEDULES:
            with emulated_cuda.scheduled(schedule):
                assert self.ring(fault) == (schedule.lazy_copies != lazy)

    def test_misaligned(self):
        x, y = numbers(4 * 32), np.zeros(32, np.float32)
        launch("misaligned_copy<NONE>", x, y, shared_bytes=520)
        with pytest.raises(EmulatorError, match=r"line \d+: copy_async of 16 bytes is misaligned"):
            launch("misaligned_copy<PLANTED>", x, y, shared_bytes=520)

    def test_misaligned_source(self):
        x, y = numbers(4 * 32 + 1), np.zeros(32, np.float32)
        with pytest.raises(EmulatorError, match=r"line \d+: copy_async of 16 bytes is misaligned"):
            launch("misaligned_copy<NONE>", x[1:], y, shared_bytes=520)

    def test_to_other_memory(self):
        x, y = numbers(32), np.zeros(32, np.float32)
        launch("copy_to_global<NONE>", x, y, shared_bytes=128)
        with pytest.raises(EmulatorError, match=r"copy_async writes outside of shared memory"):
            launch("copy_to_global<PLANTED>", x, y, shared_bytes=128)


class TestProductsOfWarpgroups:
    def product(self, fault):
        x = np.ones((192, 64), np.float16)
        y = np.zeros((128, 64), np.float32)
        launch(
            *(f"group_product<{fault}>", x.view(np.uint32), y),
            block=(128,),
            shared_bytes=x.nbytes,
        )
        return (y == 16).all()

    @every_schedule
    def test_a_sound_product(self, emulated_cuda):
        assert self.product("SOUND_GROUP")

    @every_schedule
    def test_copies_that_a_product_may_not_see(self, emulated_cuda):
        with pytest.raises(EmulatorError, match=r"thread \d+ has not shown its copies to products"):
            self.product("HIDDEN")

    # Where copies land at once products run late, and the other way round.
    @pytest.mark.parametrize("fault", ["OVERWRITTEN_OPERAND", "UNWAITED"])
    def test_what_a_running_product_needs(self, fault, emulated_cuda):
        for schedule in SCHEDULES:
            with emulated_cuda.scheduled(schedule):
                assert self.product(fault) == schedule.lazy_copies

    @pytest.mark.parametrize("fault", ["SOUND_GROUP", "OVERWRITTEN_OPERAND"])
    def test_registers_that_a_running_product_needs(self, fault, emulated_cuda):
        for schedule in SCHEDULES:
            with emulated_cuda.scheduled(schedule):
                x = np.ones((8, 16, 8), np.float16)
                y = np.zeros((128, 32), np.float32)
                launch(
                    *(f"group_product_of_columns<{fault}>", x.view(np.uint32), y),
                    block=(128,),
                    shared_bytes=x.nbytes,
                )
                assert (y == 16).all() == (fault == "SOUND_GROUP" or schedule.lazy_copies)


class TestMemory:
    @pytest.mark.parametrize("kind", ["dynamic", "static"])
    def test_uninitialized_shared_memory_is_nan_in_every_block(self, kind):
        y = np.zeros(32, np.float32)
        launch(f"uninitialized_{kind}<NONE>", y, shared_bytes=128)
        assert (y == 1).all()
        for _ in range(2):
            launch(f"uninitialized_{kind}<PLANTED>", y, grid=(2,), shared_bytes=128)
            assert np.flatnonzero(np.isnan(y)).tolist() == [5]

    @pytest.mark.parametrize("offset", [0, 8])
    def test_inside(self, offset):
        x, y = numbers(40), np.zeros(40, np.float32)
        launch("read_at", x, y, np.int32(offset))
        assert (y[:32] == x[offset : offset + 32]).all()
        launch("write_at", x, y, np.int32(offset))
        assert (y[offset : offset + 32] == x[:32]).all()

    @pytest.mark.parametrize("offset", [-5000, 9, 5000])
    def test_reading_past_an_end(self, offset):
        x, y = numbers(40), np.zeros(40, np.float32)
        place = r"block \(0, 0, 0\), thread \(\d+, 0, 0\)"
        message = rf"read_at: {place}, faults.cu line \d+: access outside of every array"
        with pytest.raises(EmulatorError, match=message):
            launch("read_at", x, y, np.int32(offset))

    @pytest.mark.parametrize(("offset", "length"), [(-1, 32), (1, 33)])
    def test_reading_a_byte_past_an_end_where_no_page_ends_gives_nan(self, offset, length):
        x, y = np.ones(length, np.float32), np.zeros(40, np.float32)
        launch("read_at", x, y, np.int32(offset if offset < 0 else offset + 1))
        assert np.isnan(y).sum() == 1

    @pytest.mark.parametrize(
        ("offset", "message"),
        [
            (-5000, "access"),
            (-1, "wrote before the start of an array"),
            (9, "access"),
            (5000, "access"),
        ],
    )
    def test_writing_past_an_end(self, offset, message):
        with pytest.raises(EmulatorError, match=message):
            launch("write_at", numbers(40), np.zeros(40, np.float32), np.int32(offset))

    def test_writing_past_an_end_where_no_page_ends(self):
        with pytest.raises(EmulatorError, match="wrote past the end of an array"):
            launch("write_at", numbers(40), np.zeros(33, np.float32), np.int32(2))

    def test_an_array_with_no_element_allows_no_access(self):
        y = np.zeros(32, np.float32)
        with pytest.raises(EmulatorError, match="access outside of every array"):
            launch("read_at", np.zeros((0,), np.float32), y, np.int32(0))

    @pytest.mark.parametrize(
        ("offset", "message"), [(1, "wrote past"), (300, "access past the end of shared")]
    )
    def test_past_dynamic_shared_memory(self, offset, message):
        y = np.zeros(32, np.float32)
        launch("dynamic_at", y, np.int32(0), shared_bytes=128)
        with pytest.raises(EmulatorError, match=message):
            launch("dynamic_at", y, np.int32(offset), shared_bytes=128)

    def test_past_a_row_of_a_shared_array(self):
        y = np.zeros(32, np.float32)
        launch("static_at", y, np.int32(0))
        with pytest.raises(
            EmulatorError,
            match=r"thread \(31, 0, 0\), faults.cu line \d+: index 32 is out of bounds of 'float \[32\]'",
        ):
            launch("static_at", y, np.int32(1))

    def test_misaligned_vector(self):
        x, y = numbers(40), np.zeros(32, np.float32)
        launch("vector_at", x, y, np.int32(4))
        assert (y == 4 + 5 + 6 + 7).all()
        with pytest.raises(
            EmulatorError, match=r"line \d+: misaligned access of 'const struct float4'"
        ):
            launch("vector_at", x, y, np.int32(1))

    def test_alignment_is_the_view_s_in_its_own_memory(self):
        memory, y = numbers(80), np.zeros(32, np.float32)
        for start in range(4):
            launch("vector_at", memory[start : start + 40], y, np.int32(4 - start))
            assert (y == 4 + 5 + 6 + 7).all()

    def test_null_pointer(self):
        with pytest.raises(EmulatorError, match=r"line \d+: access through a null pointer|outside"):
            launch("null_pointer", None, np.zeros(32, np.float32))

    def test_full_stack(self):
        y = np.zeros(32, np.float32)
        launch("recursion", y, np.int32(10))
        with pytest.raises(EmulatorError, match="the thread's stack is full"):
            launch("recursion", y, np.int32(1000))


def test_arithmetic_that_is_undefined():
    y = np.zeros(32, np.float32)
    launch("overflow", y, np.int32(2000))
    with pytest.raises(EmulatorError, match=r"line \d+: a signed product overflows"):
        launch("overflow", y, np.int32(3000))
    with pytest.raises(EmulatorError, match=r"line \d+: division by zero"):
        launch("divide", np.zeros(32, np.int32), np.int32(0))


def test_bank_conflicts_are_counted(emulated_cuda):
    x = np.arange(256, dtype=np.uint32)
    found = {}
    for swizzle in ("true", "false"):
        y = np.zeros(128, np.uint32)
        emulated_cuda.statistics()
        launch(f"load_tile<{swizzle}>", x, y, shared_bytes=1024)
        found[swizzle] = emulated_cuda.statistics()["bank_conflicts"]
        assert (y.reshape(4, 8, 4) == x.reshape(8, 8, 4)[:, :4].transpose(1, 0, 2)).all()
    assert found == {"true": 0, "false": 4 * 7}


class TestLaunches:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ((numbers(32), numbers(32)), "takes 3 arguments, got 2"),
            (
                (numbers(32), numbers(32), 0),
                r"argument 3 is int \(long long\), the parameter is an integer of 4 bytes",
            ),
            (
                (numbers(32), numbers(32), 0.0),
                r"argument 3 is float \(double\), the parameter is an integer",
            ),
            (
                (numbers(32), numbers(32), np.int64(0)),
                "argument 3 is int64, the parameter is an integer of 4 bytes",
            ),
            ((numbers(32), numbers(32), True), "argument 3 is a bool"),
            ((numbers(32), numbers(32), None), "argument 3 is None, the parameter is an integer"),
            ((numbers(32), numbers(32), "0"), "argument 3 is str, which no kernel takes"),
            (
                (np.int32(1), numbers(32), np.int32(0)),
                "argument 1 is int32, the parameter is a pointer",
            ),
            (
                (numbers(32).astype("f8"), numbers(32), np.int32(0)),
                "argument 1 is an array of float64",
            ),
            (
                (numbers(32), np.zeros(32, "i4"), np.int32(0)),
                "argument 2 is an array of int32, .* floating point of 4",
            ),
            (
                (numbers(32), numbers(32), numbers(1)),
                "argument 3 is an array of float32, .* not a pointer",
            ),
            (
                (numbers(32), np.broadcast_to(np.float32(0), 32), np.int32(0)),
                "argument 2 is an array that is not to be written",
            ),
        ],
    )
    def test_arguments_must_fit(self, arguments, message):
        with pytest.raises(EmulatorError, match=f"^faults.cu: read_at: {message}"):
            launch("read_at", *arguments)

    @pytest.mark.parametrize(
        ("grid", "block", "shared_bytes", "message"),
        [
            ((0,), (32,), 0, "sizes from 1 on"),
            ((1, 65536), (32,), 0, "at most"),
            ((1,), (33,), 0, "a block has 32, 64"),
            ((1,), (2048,), 0, "a block has 32, 64"),
            ((1,), (32, 33), 0, "a block has 32, 64"),
            ((1,), (32,), 99 << 10, "a block has 65536 bytes of shared memory"),
        ],
    )
    def test_sizes_must_fit_the_device(self, grid, block, shared_bytes, message, emulated_cuda):
        emulated_cuda.device_limits = Limits(75, 2, 64 << 10)
        arguments = (numbers(64), numbers(64), np.int32(0))
        with pytest.raises(EmulatorError, match=message):
            launch("read_at", *arguments, grid=grid, block=block, shared_bytes=shared_bytes)

    def test_a_source_that_does_not_compile(self):
        with pytest.raises(
            EmulatorError, match="g\\+\\+ refuses faults.cu: no_such_kernel:\n.*not declared"
        ):
            launch("no_such_kernel")
        with pytest.raises(FileNotFoundError, match=r"no\.cu is in none of"):
            kernel("no.cu", "f")

    def test_arrays_that_overlap_stay_one_memory(self):
        memory = numbers(64)
        launch("write_at", memory[:32], memory[16:48], np.int32(0))
        # threads run in order: each reads what the one 16 before it wrote
        assert (memory[16:48] == np.concatenate([numbers(16), numbers(16)])).all()

    def test_a_fault_leaves_the_arguments_as_they_were(self):
        y = np.zeros(40, np.float32)
        with pytest.raises(EmulatorError, match="access"):
            launch("write_at", numbers(40), y, np.int32(9))
        assert (y == 0).all()


def test_numpy_empty_holds_nan():
    assert np.isnan(np.empty((3, 4), np.float32)).all()
    assert np.isnan(np.empty_like(np.ones(3, np.float16))).all()


def test_a_library_that_several_want_at_once_is_built_once(tmp_path):
    path, built, all_there = tmp_path / "kernel.so", [], threading.Barrier(3)

    def build(made):
        built.append(made)
        assert not path.exists()
        Path(made).write_text("whole")

    def want():
        all_there.wait()
        _build_once(path, build)
        assert path.read_text() == "whole"

    threads = [threading.Thread(target=want) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1
    assert [left.name for left in tmp_path.iterdir()] == [path.name]


def test_a_library_that_cannot_be_built_may_be_tried_again(tmp_path):
    def fail(made):
        raise EmulatorError("g++ refuses it")

    path = tmp_path / "kernel.so"
    with pytest.raises(EmulatorError, match="refuses"):
        _build_once(path, fail)
    assert not list(tmp_path.iterdir())
    _build_once(path, lambda made: Path(made).touch())
    assert path.exists()

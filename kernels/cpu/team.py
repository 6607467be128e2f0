"""The threads that run kernels: a launch offers numbers of workers, and who is free takes them.

The launching thread runs worker 0, then whatever no other thread has taken yet. So it waits for
numbers that others have taken, never for a thread that sleeps or comes late: that one finds nothing
left. A number says what is computed, so results do not depend on who took it.

Threads that find nothing look again for a moment, then sleep. They do both in compiled code, without
the interpreter's lock: on their way through it they would hold up the thread that they help.

What threads share is one block of 64-bit words. Words that one thread writes while another reads lie
two cache lines apart: as many as processors fetch at a time.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types

from gradengine.kernels.cpu.atomics import (
    INDEX,
    POINTER,
    acquire,
    add,
    exchange,
    intrinsic,
    lock_functions,
    pause,
    read,
    release,
    taken_lock,
    write,
)
from gradengine.kernels.cpu.code_cache import keep_code
from gradengine.kernels.cpu.parts import part
from gradengine.kernels.cpu.threads import LAUNCH_LOCK, most_threads

WORKER = ir.FunctionType(ir.VoidType(), [INDEX, INDEX, POINTER])  # its number, of how many, data

# How long a thread looks for work before it sleeps. Waking one takes 60 to 600 us on a virtual
# machine, and operations are 30 to 200 us of Python apart. The price is paid by other threads that
# want the core meanwhile, such as those of NumPy's BLAS.
LOOK_SECONDS = 200e-6

# Places in the block, in bytes. What a launch writes before it offers numbers, or what stays:
LAUNCH, FUNCTION, WORKERS, DATA, THREADS, LOOKS, ACQUIRE, RELEASE = range(0, 64, 8)
# Numbers that are still to be taken, numbers that are not finished, and whether all are:
OFFERED, UNFINISHED, FINISHED = range(128, 512, 128)
# Of each thread, the launching one first: whether it sleeps, and the lock that it sleeps at.
SLEEPS, LOCK, EACH = 512, 520, 128


# ---- compiled code -------------------------------------------------------------------------------


def _launch(team, function, workers, data):
    """Run the workers of a kernel; of no function, 0, tell that many helpers to leave."""
    others = workers - 1 if function != 0 else workers
    if others > 0:
        write(team + FUNCTION, function)
        write(team + WORKERS, workers)
        write(team + DATA, data)
        write(team + UNFINISHED, others)
        write(team + FINISHED, 0)
        write(team + OFFERED, others)
        for thread in range(1, min(others + 1, read(team + THREADS))):
            _wake(team, thread)
    if function == 0:
        return
    _call_worker(function, 0, workers, data)
    if others > 0:
        number = _take(team)
        while number > 0:
            _run(team, number)
            number = _take(team)
        while read(team + FINISHED) == 0:
            _wait(team, 0, FINISHED)


def _help(team, thread):
    """Run what is offered, until a launch has no function."""
    while True:
        number = _take(team)
        if number == 0:
            _wait(team, thread, OFFERED)
        elif read(team + FUNCTION) == 0:
            return
        else:
            _run(team, number)


@part
def _take(team):
    """Return a number that is this thread's to run from now on, 0 if there is none."""
    if read(team + OFFERED) <= 0:
        return 0
    # Others may have taken the last one meanwhile: what is left is below 0 then, until a launch.
    return max(add(team + OFFERED, -1), 0)


@part
def _run(team, number):
    _call_worker(read(team + FUNCTION), number, read(team + WORKERS), read(team + DATA))
    if add(team + UNFINISHED, -1) == 1:
        write(team + FINISHED, 1)
        _wake(team, 0)


@part
def _wait(team, thread, place):
    """Return once a word is positive, or after a sleep."""
    if look(team + place, read(team + LOOKS)):
        return
    sleeps = team + SLEEPS + EACH * thread
    write(sleeps, 1)
    if read(team + place) > 0 and exchange(sleeps, 0) == 1:
        return
    acquire(read(team + ACQUIRE), read(team + LOCK + EACH * thread))


@part
def _wake(team, thread):
    """Wake a thread that sleeps or is about to; of all who try, one releases its lock."""
    sleeps = team + SLEEPS + EACH * thread
    if read(sleeps) == 1 and exchange(sleeps, 0) == 1:
        release(read(team + RELEASE), read(team + LOCK + EACH * thread))


@part
def look(place, times):
    """Return whether a word becomes positive while it is looked at."""
    for _ in range(times):
        if read(place) > 0:
            return True
        pause()
    return False


def _look_in_vain(place, times):
    look(place, times)


@intrinsic
def _call_worker(typing_context, function, worker, workers, data):
    """Call the worker at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        function, worker, workers, data = arguments
        work = builder.inttoptr(function, WORKER.as_pointer())
        builder.call(work, [worker, workers, builder.inttoptr(data, POINTER)])
        return context.get_dummy_value()

    return types.void(*[types.intp] * 4), generate


@cache
def _compiled(function: Any, arguments: int) -> Any:
    options: Any = {"no_cfunc_wrapper": True}
    compiled: Any = njit(nogil=True, error_model="numpy", **options)(function)
    keep_code(compiled, function)
    compiled.compile((types.intp,) * arguments)
    return compiled


def address(result: Any) -> int:
    """Return where the code of a function is that Numba compiled."""
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


# ---- threads -------------------------------------------------------------------------------------


class Team:
    """The helpers of this process, each started when a launch first has work for it."""

    def __init__(self) -> None:
        count = most_threads()
        self._memory = np.zeros((SLEEPS + EACH * (count + 1)) // 8, np.int64)
        skipped = -self._memory.ctypes.data % EACH // 8
        self._words = self._memory[skipped:]
        self._address = self._words.ctypes.data
        self._helpers: list[threading.Thread] = []
        self._most = count - 1
        self._put(LAUNCH, address(_compiled(_launch, 4).overloads[(types.intp,) * 4]))
        self._put(LOOKS, max(round(LOOK_SECONDS / _seconds_of_a_look()), 1))
        for place, function in zip((ACQUIRE, RELEASE), lock_functions(), strict=True):
            self._put(place, function)
        for thread in range(count):
            self._put(LOCK + EACH * thread, taken_lock())
        self._put(THREADS, 1)
        atexit.register(self._dismiss)
        if hasattr(os, "register_at_fork"):
            # No fork in the middle of a launch, which the child could never finish.
            os.register_at_fork(
                before=LAUNCH_LOCK.acquire,
                after_in_parent=LAUNCH_LOCK.release,
                after_in_child=self._go_on_in_a_child,
            )

    def _put(self, place: int, value: int) -> None:
        self._words[place // 8] = value

    def for_workers(self, workers: int) -> int:
        """Return the block's address, with a helper for each worker but 0 where they can be had."""
        if len(self._helpers) < min(workers - 1, self._most):
            self._start_helpers(min(workers - 1, self._most))
        return self._address

    def _start_helpers(self, count: int) -> None:
        run = _compiled(_help, 2)
        while len(self._helpers) < count:
            number = len(self._helpers) + 1
            name, arguments = f"gradengine helper {number}", (self._address, number)
            helper = threading.Thread(target=run, args=arguments, name=name, daemon=True)
            try:
                helper.start()
            except RuntimeError:  # the system has no more threads, or Python is about to end
                self._most = len(self._helpers)
                return
            self._helpers.append(helper)
            self._put(THREADS, number + 1)

    def _stay_alone(self) -> None:
        """Forget the helpers, and start none any more."""
        self._helpers, self._most = [], 0
        self._put(THREADS, 1)

    def _go_on_in_a_child(self) -> None:
        self._stay_alone()  # a forked process has none of its parent's threads
        LAUNCH_LOCK.release()

    def _dismiss(self) -> None:
        """End the helpers before Python takes down what they run."""
        with LAUNCH_LOCK:
            helpers = self._helpers
            _compiled(_launch, 4)(self._address, 0, len(helpers), 0)
            self._stay_alone()
        for helper in helpers:
            helper.join()


@cache
def team() -> Team:
    """Return the threads of this process."""
    return Team()


def _seconds_of_a_look() -> float:
    words, times = np.zeros(1, np.int64), 2000
    run = _compiled(_look_in_vain, 2)
    start = time.perf_counter()
    run(words.ctypes.data, times)
    return (time.perf_counter() - start) / times

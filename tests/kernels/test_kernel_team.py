"""The threads that run kernels: who runs what, who waits for whom, and how they end."""

import ctypes
import random
import threading
import time

import pytest

from gradengine.kernels.cpu import team as module
from gradengine.kernels.cpu.team import Team, _compiled, _launch
from gradengine.kernels.cpu.threads import LAUNCH_LOCK
from tests.kernels.test_kernel_threads import run_alone

WORKER = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
ASLEEP = 50 * module.LOOK_SECONDS  # after so long without work


@pytest.fixture
def team(monkeypatch):
    """Return a team of four threads, whatever the machine has."""
    monkeypatch.setattr(module, "most_threads", lambda: 4)
    own = Team()
    yield own
    own._dismiss()


def launch(team, workers, work):
    """Run work(number, workers) for each worker of one launch."""
    with LAUNCH_LOCK:
        function = WORKER(lambda number, workers, _: work(number, workers))
        address = ctypes.cast(function, ctypes.c_void_p).value
        _compiled(_launch, 4)(team.for_workers(workers), address, workers, 0)


def test_each_worker_runs_once_before_the_launch_ends(team):
    choose = random.Random(3)
    for _ in range(1500):
        workers, ran = choose.randint(1, 7), []

        def work(number, count, ran=ran, workers=workers):
            assert count == workers
            if choose.random() < 0.1:
                time.sleep(choose.random() * 1e-3)
            ran.append(number)

        launch(team, workers, work)
        assert sorted(ran) == list(range(workers))
        if choose.random() < 0.05:  # helpers about to sleep, and asleep
            time.sleep(choose.random() * 10 * module.LOOK_SECONDS)


@pytest.mark.parametrize("pause", [0, ASLEEP])
def test_helpers_run_what_the_launching_thread_has_no_time_for(team, pause):
    together = threading.Barrier(4, timeout=20)
    threads = set()

    def work(number, workers):
        together.wait()  # passes only if all four run at once
        threads.add(threading.get_ident())

    for _ in range(5):
        launch(team, 4, work)
        time.sleep(pause)
    assert len(threads) == 4


def test_a_launch_waits_for_a_slow_helper(team):
    taken, ended = threading.Event(), []

    def work(number, workers):
        if number == 0:
            assert taken.wait(20)
        else:
            taken.set()
            time.sleep(ASLEEP)  # longer than the launching thread looks
        ended.append(number)

    for _ in range(5):
        taken.clear()
        launch(team, 2, work)
        assert sorted(ended) == [0, 1]
        ended.clear()


def launch_without_looking():
    """Launch what is soon done: each thread goes to sleep while another is about to wake it."""
    team = module.team()
    team._put(module.LOOKS, 0)
    nothing = ctypes.cast(ctypes.pythonapi.PyThread_get_thread_ident, ctypes.c_void_p).value
    run = _compiled(_launch, 4)
    for count in range(20000):
        with LAUNCH_LOCK:
            run(team.for_workers(2 + count % 3), nothing, 2 + count % 3, 0)
    print("awake")


def test_no_thread_sleeps_through_its_waking():
    code = f"from {__name__} import launch_without_looking as run; run()"
    assert run_alone(code, threads=4).stdout.split() == ["awake"]


def test_a_launch_does_not_wait_for_helpers_that_are_not_there(team, monkeypatch):
    def refuse(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    ran = []
    launch(team, 4, lambda number, workers: ran.append((number, threading.get_ident())))
    assert sorted(ran) == [(number, threading.get_ident()) for number in range(4)]


def test_one_worker_needs_no_helper(team):
    launch(team, 1, lambda number, workers: None)
    assert not team._helpers


@pytest.mark.parametrize("pause", [0, ASLEEP])
def test_helpers_end_before_the_interpreter(pause):
    code = (
        "import atexit, threading, time, numpy, gradengine.kernels as kernels\n"
        "def last():\n"
        "    kernels.erf(numpy.zeros(1 << 18))\n"
        "    print(threading.active_count())\n"
        "atexit.register(last)\n"
        "kernels.erf(numpy.zeros(1 << 18))\n"
        "print(threading.active_count())\n"
        f"time.sleep({pause})"
    )
    assert run_alone(code, threads=3).stdout.split() == ["3", "1"]

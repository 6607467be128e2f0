"""What a process with threads may do: launch at once, use any number, fork, import late."""

import hashlib
import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import gradengine
from gradengine import kernels
from gradengine.kernels.cpu.threads import LAUNCH_LOCK
from gradengine.kernels.cpu.workspace import workspace
from gradengine.kernels.geometry import conv2d_geometry, pool2d_geometry

ROOT = Path(__file__).parents[2]


def every_result():
    """Run each parallel kernel on more rows than there are threads; give all results."""
    rng = np.random.default_rng(5)
    x = rng.standard_normal((5, 6, 17, 13)).astype(np.float32)
    weight = rng.standard_normal((4, 6, 3, 3)).astype(np.float32)
    vector = rng.standard_normal(6).astype(np.float32)
    convolution = conv2d_geometry(x.shape, weight.shape, 2, 1)
    pool = pool2d_geometry("pool", x.shape, 3, 2, 1)
    out = kernels.conv2d(x, weight, None, convolution)
    pooled, indices = kernels.max_pool2d(x, pool)
    normal, mean, inv_std, passed = kernels.batch_norm_act(x, vector, vector, x, True, 1e-5)
    return [
        out,
        kernels.conv2d_grad_input(out, weight, convolution),
        kernels.conv2d_grad_weight(out, x, convolution),
        pooled,
        kernels.max_pool2d_scatter(pooled, indices, pool),
        kernels.avg_pool2d(x, pool),
        kernels.avg_pool2d_grad(pooled, pool),
        *(normal, mean, inv_std),
        *kernels.batch_norm_act_grad(
            *(x, x, normal, passed), *(vector, mean, inv_std), relu=True, wants_residual=True
        ),
        kernels.erf(x),
        *large_results(rng.standard_normal((520, 1001)).astype(np.float32)),
        *row_results(rng.standard_normal((150, 70)).astype(np.float32)),
    ]


def large_results(x):
    return [
        kernels.elementwise("add", x, x[:, :1].copy()),
        kernels.elementwise("gelu", x),
        kernels.elementwise("silu_grad", x, x),
        *(kernels.sum_over(x.reshape(-1, 40), axes) for axes in [(0,), (1,), (0, 1)]),
    ]


def row_results(x):
    out, logs = kernels.softmax(x), kernels.log_softmax(x)
    normal, mean, inv_std = kernels.layer_norm(x, x[0], x[1], 1e-5)
    return [
        *(out, kernels.softmax_grad(x, out)),
        *(logs, kernels.log_softmax_grad(x, logs)),
        *(normal, *kernels.layer_norm_grad(x, x, x[0], mean, inv_std)),
    ]


def digest():
    return hashlib.sha256(b"".join(result.tobytes() for result in every_result())).hexdigest()


def compare_thread_counts():
    digests = set()
    for count in (1, 2, 3):
        gradengine.set_num_threads(count)
        assert gradengine.get_num_threads() == count
        other = threading.Thread(target=lambda: digests.add(digest()))
        other.start()
        other.join()
        digests.add(digest())
        print(threading.active_count())
    print(len(digests))


def launch_after_fork():
    expected = digest()
    stop = threading.Event()

    def repeat():
        while not stop.is_set():
            digest()

    beside = threading.Thread(target=repeat)
    beside.start()  # the lock is usually taken when the process forks
    for _ in range(3):
        child = os.fork()
        if child == 0:
            os._exit(0 if digest() == expected else 1)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status))
    stop.set()
    beside.join()
    print(digest() == expected)


def launch_in_a_worker():
    expected = digest()
    with multiprocessing.get_context("fork").Pool(1) as pool:
        print(pool.apply(digest) == expected)


def launch_from_two_threads():
    expected = digest()
    wrong = []

    def repeat():
        for _ in range(60):
            if digest() != expected:
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=repeat) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(len(wrong))


def run_alone(code, threads=2):
    """Run code in a process of its own, on so many threads; give what it left."""
    settings = {**os.environ, "NUMBA_NUM_THREADS": str(threads)}
    command = [sys.executable, "-W", "error", "-c", code]
    result = subprocess.run(
        command, cwd=ROOT, env=settings, capture_output=True, text=True, check=False, timeout=200
    )
    assert result.returncode == 0, result.stderr
    return result


def run_here(function, threads=2):
    """Run a function of this file in a process of its own; give the words that it printed."""
    code = f"from {__name__} import {function.__name__} as run; run()"
    return run_alone(code, threads).stdout.split()


def test_any_number_of_threads_gives_equal_bits():
    assert run_here(compare_thread_counts, 3) == ["1", "2", "3", "1"]


@pytest.mark.parametrize("n", [0, -1, 3])
def test_the_number_of_threads_is_checked(n):
    code = f"import gradengine; gradengine.set_num_threads({n})"
    with pytest.raises(AssertionError, match=rf"set_num_threads: .*1 <= n <= 2.*; got n={n}"):
        run_alone(code)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_forked_process_runs_kernels():
    assert run_here(launch_after_fork) == ["0", "0", "0", "True"]
    assert run_here(launch_in_a_worker) == ["True"]


def test_two_python_threads_may_launch_at_once():
    assert run_here(launch_from_two_threads) == ["0"]


def test_numba_and_cupy_are_imported_when_a_kernel_needs_them():
    code = (
        "import sys, numpy, gradengine.kernels as kernels\n"
        "import gradengine.kernels.geometry\n"
        "print('numba' in sys.modules)\n"
        "kernels.erf(numpy.zeros(1))\n"
        "print('numba' in sys.modules, 'cupy' in sys.modules)"
    )
    assert run_alone(code).stdout.split() == ["False", "True", "False"]


def test_a_workspace_is_lent_again_and_grows():
    with workspace(3, 5, dtype=np.float32) as first:
        assert first.shape == (3, 5)
        assert first.dtype == np.float32
        assert first.flags.c_contiguous
        assert first.ctypes.data % 64 == 0
        with workspace(2, dtype=np.float64) as inner:
            assert not np.shares_memory(first, inner)
    size = 1 << 20
    with workspace(size, dtype=np.float64) as large:
        large[:] = 7
        place = large.ctypes.data
    with workspace(4, dtype=np.int32) as again:
        assert again.ctypes.data == place


def test_a_workspace_keeps_other_threads_from_launching():
    taken = []

    def launch():
        taken.append(LAUNCH_LOCK.acquire(blocking=False))
        if taken[-1]:
            LAUNCH_LOCK.release()

    def launch_elsewhere():
        thread = threading.Thread(target=launch)
        thread.start()
        thread.join()

    with workspace(8, dtype=np.int64):
        launch_elsewhere()
    launch_elsewhere()
    assert taken == [False, True]

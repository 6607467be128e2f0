"""Copies in C order, above all of what lies transposed, against NumPy's."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.kernels.cpu import layout

# Shapes of memory, and the axes in which it is looked at
TRANSPOSED = {
    "matrix": ((300, 500), (1, 0)),
    "odd_sizes": ((257, 301), (1, 0)),
    "batch": ((3, 130, 210), (0, 2, 1)),
    "planes": ((2, 24, 50, 60), (0, 2, 3, 1)),
    "pixels": ((2, 50, 60, 24), (0, 3, 1, 2)),
    "few_planes": ((2, 3, 150, 160), (0, 2, 3, 1)),
    "axes_of_one": ((1, 300, 1, 260), (3, 2, 1, 0)),
}
OTHERS = {
    "all_reversed": ((40, 50, 60), (2, 1, 0)),
    "neighbours_stay": ((50, 40, 64), (1, 0, 2)),
}


def view(shape, axes, dtype):
    memory = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    return memory.transpose(axes)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_memory(case, dtype, threads, monkeypatch):
    monkeypatch.setattr(layout, "get_num_threads", lambda: threads)
    shape, axes = TRANSPOSED[case]
    x = view(shape, axes, dtype)
    assert layout._transposed(x) is not None
    out = kernels.copy_in_order(x)
    assert out.flags.c_contiguous
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("case", OTHERS)
def test_other_orders_are_numpys(case):
    shape, axes = OTHERS[case]
    x = view(shape, axes, np.float32)
    assert layout._transposed(x) is None
    np.testing.assert_array_equal(kernels.copy_in_order(x), x)


@pytest.mark.parametrize("kind", ["gaps", "repeated", "reversed", "integers", "read_only"])
def test_what_is_no_transposed_matrix_of_floats(kind):
    x = view((300, 500), (1, 0), np.float32)
    if kind == "gaps":
        x = x[::2]
    elif kind == "repeated":
        x = np.broadcast_to(x[:, :1], (500, 300)).T
    elif kind == "reversed":
        x = x[:, ::-1]
    elif kind == "integers":
        x = x.astype(np.int64, order="K")
    else:
        x.flags.writeable = False
    out = kernels.copy_in_order(x)
    assert out.flags.c_contiguous
    assert out.flags.writeable
    np.testing.assert_array_equal(out, x)

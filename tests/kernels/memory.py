"""Arrays of equal values in different memory, and tolerances."""

import ctypes
import mmap

import numpy as np

MEMORIES = ("nchw", "nhwc", "strided", "read_only")
TOLERANCES = {np.dtype(np.float32): 3e-5, np.dtype(np.float64): 1e-12}


def laid_out(array, memory):
    """Give equal values in the memory named: one of MEMORIES."""
    if memory == "nchw":
        return np.ascontiguousarray(array)
    if memory == "nhwc":
        return np.ascontiguousarray(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    if memory == "read_only":
        copied = laid_out(array, "nhwc")
        copied.flags.writeable = False
        return copied
    room = np.full([2 * size for size in array.shape], np.nan, array.dtype)
    strided = room[::2, ::-2, 1::2, ::2]
    strided[...] = array
    return strided


def guarded(array):
    """Give equal values, (N, H, W, C) in memory, `at_the_end` of what may be read."""
    return at_the_end(array.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)


def at_the_end(array):
    """Give equal values, contiguous as they were, that end where the process may not read on.

    A kernel that does so ends the process.
    """
    if not array.flags.c_contiguous and array.flags.f_contiguous:
        return at_the_end(array.T).T
    values = np.ascontiguousarray(array)
    size = -(-values.nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    room = mmap.mmap(-1, size + mmap.PAGESIZE)
    start = ctypes.addressof(ctypes.c_char.from_buffer(room))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + size), mmap.PAGESIZE, 0) == 0
    begin = size - values.nbytes
    copied = np.frombuffer(room, values.dtype, values.size, begin).reshape(values.shape)
    copied[...] = values
    return copied


def assert_close(got, expected, dtype):
    """Compare relative to the largest expected value, as sums of many products err."""
    expected = np.asarray(expected)
    assert got.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCES[np.dtype(dtype)] * scale)

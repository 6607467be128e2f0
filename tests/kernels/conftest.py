"""The three ways to run a kernel: on the CPU, by CUDA emulated on the CPU, and on a GPU."""

import numpy as np
import pytest

from gradengine import kernels
from gradengine.devices import import_cupy, to_device

ELEMENTWISE = ("erf", "relu_grad")  # these keep the layout they are given
WITH_TABLES = ("weigh",)  # of which only the first array is the device's
# of 16-bit arrays these also give float32
WITH_SUMS = (
    *("softmax_cross_entropy", "batch_norm_act", "batch_norm_act_grad", "layer_norm"),
    *("batch_norm_relu_max_pool", "batch_norm_relu_max_pool_grad"),
)


class Place:
    """Runs kernels on NumPy arrays; checks dtype and channels-last memory of every result."""

    def __init__(self, name):
        self.name = name

    def __call__(self, kernel, *arguments):
        dtype = arguments[0].dtype
        moved = 1 if kernel in WITH_TABLES else len(arguments)
        given = (*map(self.give, arguments[:moved]), *arguments[moved:])
        results = getattr(kernels, kernel)(*given)
        several = isinstance(results, tuple)
        for result in results if several else (results,):
            if result is None or result.dtype == np.uint8:  # what one kernel tells another
                continue
            sums = kernel in WITH_SUMS and dtype.itemsize == 2 and result.dtype == np.float32
            assert sums or result.dtype == (np.int32 if result.dtype.kind == "i" else dtype)
            if result.ndim == 4 and kernel not in ELEMENTWISE:
                assert result.transpose(0, 2, 3, 1).flags.c_contiguous
        return tuple(map(self.take, results)) if several else self.take(results)

    def formula(self, name, *operands):
        """Compute an elementwise formula that this place has a kernel for."""
        return self.take(kernels.elementwise(name, *map(self.give, operands)))

    def give(self, argument):
        if type(argument) is tuple:  # a geometry is one, too, but stays whole
            return tuple(map(self.give, argument))
        if self.name != "cupy" or not isinstance(argument, np.ndarray):
            return argument
        cupy = import_cupy()
        moved = cupy.empty(argument.shape, argument.dtype)
        if argument.ndim == 4 and not argument.flags.c_contiguous:
            n, c, h, w = argument.shape
            moved = cupy.empty((n, h, w, c), argument.dtype).transpose(0, 3, 1, 2)
        moved[...] = cupy.asarray(np.ascontiguousarray(argument))
        return moved

    def take(self, result):
        return None if result is None else to_device(result, "cpu")  # in the same memory order


@pytest.fixture(params=["cpu", "emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def place(request):
    return _prepared(request)


@pytest.fixture(params=["emulated", pytest.param("cupy", marks=pytest.mark.gpu)])
def cuda_place(request):
    """Run what the CPU's kernels have no code for, such as 16-bit arrays."""
    return _prepared(request)


def _prepared(request):
    if request.param == "emulated":
        request.getfixturevalue("emulated_cuda")
    return Place(request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20240521)

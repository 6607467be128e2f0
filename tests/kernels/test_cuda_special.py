"""The error function on CUDA, for all formulas: every element type, any memory, what is left over."""

import numpy as np
import pytest

from tests.kernels import references as reference

BFLOAT16 = np.dtype(pytest.importorskip("ml_dtypes").bfloat16)
DTYPES = [np.dtype(np.float16), BFLOAT16, np.dtype(np.float32), np.dtype(np.float64)]
ROUNDING = dict(zip(DTYPES, (2**-11, 2**-8, 3e-7, 1e-15), strict=True))


def erf(x):
    return reference.erf(x.astype(np.float64))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 9, 2051, 8200])  # packs, blocks and what is left over
def test_every_element(size, dtype, cuda_place, rng):
    x = (rng.standard_normal(size) * 2).astype(dtype)
    room = np.zeros(size + 1, dtype)
    room[1:] = x
    for given in (x, room[1:]):  # whose vectors are not aligned
        found = cuda_place("erf", given).astype(np.float64)
        exact = erf(x)
        np.testing.assert_allclose(found, exact, rtol=2 * ROUNDING[dtype], atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(dtype, cuda_place):
    x = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], dtype)
    found = cuda_place("erf", x).astype(np.float64)
    np.testing.assert_array_equal(found, [0.0, -0.0, 1.0, -1.0, np.nan])
    np.testing.assert_array_equal(np.signbit(found[:2]), [False, True])


def test_results_lie_in_memory_as_they_were_given(cuda_place, rng):
    images = rng.standard_normal((2, 4, 5, 3)).transpose(0, 3, 1, 2)
    for x in (
        images,
        images[:, :, ::-2],
        images[:, :, :, :3],
        np.broadcast_to(images[:, :, :1, :1], images.shape),
        images.transpose(3, 1, 0, 2)[1:],
    ):
        found = cuda_place("erf", x)
        np.testing.assert_allclose(found, erf(x), rtol=1e-14, atol=1e-16)
    assert cuda_place("erf", images).strides == images.strides
    assert cuda_place("erf", images[0, 0, 0, 0:1].reshape(())).shape == ()

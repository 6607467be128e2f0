"""Sigmoid of arrays so long that a kernel computes it: values and derivatives as of short ones."""

import numpy as np
import pytest

import gradengine as ge
from gradengine import kernels


@pytest.mark.parametrize("dtype", [ge.float16, ge.bfloat16, ge.float32, ge.float64])
def test_long_arrays_give_what_short_ones_give(dtype):
    values = np.random.default_rng(0).standard_normal(kernels.PARALLEL_SIZE) * 4
    results = []
    for count in (len(values), 1000):
        x = ge.from_numpy(values[:count]).to(dtype=dtype).requires_grad_()
        out = ge.sigmoid(x)
        out.backward(ge.ones_like(out))
        assert out.dtype == x.grad.dtype == dtype
        results.append([y.detach().numpy()[:1000].astype(np.float64) for y in (out, x.grad)])
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6, atol=1e-7)

"""Products in slices on the emulated device: how they are planned, and how they are added up."""

import numpy as np
import pytest

from gradengine.kernels.cuda import launch, slices


@pytest.mark.parametrize(
    ("sums", "dtype"),
    [("f4", "f4"), ("f4", "f2"), ("f4", "bfloat16"), ("f8", "f8")],
)
@pytest.mark.parametrize("count", [1, slices.FEW_SLICES, slices.FEW_SLICES + 1, 37])
def test_sums(count, sums, dtype, emulated_cuda, rng):
    dtype = pytest.importorskip("ml_dtypes").bfloat16 if dtype == "bfloat16" else dtype
    partials = rng.standard_normal((count, 7, 9, 5)).astype(sums)
    out = np.empty((7, 9, 5), dtype)
    slices.add_slices(partials, out)
    expected = partials.sum(axis=0, dtype="f8")
    tolerance = {4: 1e-6, 2: 8e-3, 8: 1e-15}[out.dtype.itemsize] * abs(partials).sum(axis=0)
    assert (abs(out.astype("f8") - expected) <= tolerance).all()


@pytest.mark.parametrize("count", [2, 20])
def test_a_part_of_the_sums(count, emulated_cuda, rng):
    partials = rng.integers(-9, 9, (count, 6, 8, 4)).astype("f4")
    out = np.empty((6, 7, 3), "f4")
    slices.add_slices(partials, out, first_tap=1)
    np.testing.assert_array_equal(out, partials.sum(axis=0)[:, 1:, :3])


def test_plans(emulated_cuda):
    def planned(depth, blocks, size):
        plan = slices.plan(depth, 8, 128, blocks, 2, size)
        assert (plan.slices - 1) * plan.depth < depth <= plan.slices * plan.depth
        assert plan.depth % 8 == 0
        return plan.slices

    wanted = 2 * launch.device_limits().multiprocessors
    assert planned(1 << 20, 1, 1 << 10) == wanted
    assert planned(1 << 20, wanted // 2, 1 << 10) == 2
    assert planned(1 << 20, 10 * wanted, 1 << 10) == 1
    assert planned(1 << 20, 1, slices.PARTIAL_BYTES // 8) == 2
    assert planned(1 << 20, 1, 1 << 30) == 1
    assert planned(3 * 128, 1, 1 << 10) == 3
    assert planned(1, 1, 1 << 10) == 1

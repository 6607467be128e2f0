"""Printed tensors beside PyTorch's, character for character."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

import gradengine as ge

SHAPES = [
    (),
    (1,),
    (3,),
    (2, 3),
    (30,),
    (4, 5, 6),
    (2, 2, 2, 2),
    (1001,),
    (50, 60),
    (3, 4, 300),
    (0, 3),
    (2, 0),
]


def _same_text(torch, array):
    # "dtype=torch.float64" is longer, and may need a line of its own.
    ours, theirs = (
        re.sub(r",\s+(dtype|size)=", r", \1=", repr(x)).replace("torch.", "")
        for x in (ge.from_numpy(array), torch.from_numpy(array))
    )
    assert ours == theirs


@pytest.mark.pytorch
@pytest.mark.parametrize("scale", [1.0, 1e6, 1e-6])
@pytest.mark.parametrize("shape", SHAPES)
def test_normal_numbers(shape, scale):
    torch = pytest.importorskip("torch")
    values = np.random.default_rng(0).standard_normal(shape) * scale
    for dtype in (np.float32, np.float64, np.int64, np.int32):
        _same_text(torch, np.asarray(values.astype(dtype)))
    _same_text(torch, np.asarray(values > 0))


@pytest.mark.pytorch
@given(
    arrays.arrays(
        np.float32,
        arrays.array_shapes(max_dims=3, max_side=12),
        elements=st.one_of(
            st.floats(width=32),
            st.integers(-(10**6), 10**6).map(float).map(np.float32),
            st.sampled_from([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-9]),
        ),
    )
)
def test_any_numbers(array):
    _same_text(pytest.importorskip("torch"), array)

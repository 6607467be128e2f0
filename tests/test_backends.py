"""Choices about the kernels of a device."""

from __future__ import annotations

import pytest

import gradengine as ge
from gradengine.kernels import settings


def test_they_are_the_kernels_settings():
    assert ge.backends.cpu is settings.cpu
    assert ge.backends.cuda is settings.cuda
    assert ge.backends.cuda.conv_tf32 is True


def test_float32_matmul_precision(monkeypatch):
    monkeypatch.setattr(settings.cuda, "float32_matmul_precision", "highest")
    assert ge.get_float32_matmul_precision() == "highest"
    for precision in ("high", "medium", "highest"):
        ge.set_float32_matmul_precision(precision)
        assert ge.get_float32_matmul_precision() == precision
        assert ge.backends.cuda.float32_matmul_precision == precision
    with pytest.raises(ValueError, match=r"must be 'highest', 'high' or 'medium'; got .*'exact'"):
        ge.set_float32_matmul_precision("exact")
    assert ge.get_float32_matmul_precision() == "highest"

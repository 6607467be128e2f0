"""Choices about the kernels of a device: `gradengine.backends.cpu.winograd = False`."""

from __future__ import annotations

from gradengine.kernels.settings import cpu

__all__ = ["cpu"]

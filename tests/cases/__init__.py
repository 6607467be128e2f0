"""The table of operations: one row a call, from which `test_operations.py` makes all its checks.

A row's `run` takes the library (gradengine, or torch where it is installed: names are the same) and the
inputs; `reference` takes the inputs as NumPy arrays. Inputs are float64 arrays; rows that need integers
hold them inside `run` or pass integer arrays, which are never differentiated.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np


class Case(NamedTuple):
    """One call of one public operation."""

    name: str  # the public name that the row is for, as in gradengine.functional.__all__
    run: Callable[..., Any]  # (library, *tensors) -> tensor
    inputs: tuple[Any, ...]  # NumPy arrays
    reference: Callable[..., Any] | None = (
        None  # (*arrays) -> array; None: PyTorch is the only reference
    )
    differentiable: bool = True
    torch: Callable[..., Any] | None = (
        None  # where PyTorch spells the call differently: (torch, *tensors)
    )
    in_torch: bool = True  # False: PyTorch has no such call
    note: str = ""  # tells rows of one name apart


def _generator(shape: tuple[int, ...]) -> np.random.Generator:
    return np.random.default_rng([7, *shape])


def normal(*shape: int) -> np.ndarray:
    """Return normally distributed numbers, the same at each run, no two alike."""
    return _generator(shape).standard_normal(shape)


def positive(*shape: int) -> np.ndarray:
    """Return numbers between 0.5 and 2.5."""
    return _generator(shape).uniform(0.5, 2.5, shape)


def nonzero(*shape: int) -> np.ndarray:
    """Return numbers of both signs, none nearer to 0 than 0.3: safe beside kinks and poles at 0."""
    values = _generator(shape).uniform(0.3, 2.0, shape)
    return values * _generator((*shape, 1)).choice([-1.0, 1.0], shape)


def distinct(*shape: int) -> np.ndarray:
    """Return numbers at least 0.1 apart, in random order: safe for maxima, sorting and pooling."""
    count = int(np.prod(shape))
    return (_generator(shape).permutation(count) - count / 2).reshape(shape) * 0.1 + 0.013


def all_cases() -> list[Case]:
    """Return the rows of every family's module in this folder."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return [
        case for name in modules for case in importlib.import_module(f"{__name__}.{name}").CASES
    ]

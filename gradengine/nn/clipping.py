"""Clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from gradengine.devices import array_module, device_of, on_device_of, to_device
from gradengine.dtypes import narrowed, sum_dtype
from gradengine.factories import tensor
from gradengine.kernels import settings
from gradengine.tensor import Tensor


def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Scale all gradients, in place and alike, so that their joint norm is at most `max_norm`.

    Returns the norm before, a 0-d tensor: that of all gradients as one vector, with `norm_type` its
    exponent or math.inf. Parameters without a gradient are passed over. Raises RuntimeError for a
    norm that is not finite, if asked to.
    """
    given = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    gradients = [parameter.grad for parameter in given if parameter.grad is not None]
    if not gradients:
        return tensor(0.0)
    place = device_of(gradients[0].array)
    xp = array_module(gradients[0].array)
    with on_device_of(gradients[0].array):
        # Not stacked: CuPy would copy a list of many addresses to the GPU
        dtype = np.result_type(*{gradient.dtype for gradient in gradients})
        norms = xp.empty(len(gradients), sum_dtype(dtype))
        for number, gradient in enumerate(gradients):
            norms[number] = to_device(_norm(gradient.array, norm_type), place)
        norm = narrowed(xp.linalg.norm(norms, norm_type), dtype)
    if error_if_nonfinite and not math.isfinite(float(norm)):  # waits for the GPU
        raise RuntimeError(
            "clip_grad_norm_: the norm of the gradients is non-finite, so it cannot be clipped; "
            f"got norm={float(norm)}, norm_type={norm_type}"
        )
    with on_device_of(gradients[0].array):
        scale = xp.minimum(max_norm / (norm + 1e-6), 1)
    for gradient in gradients:
        # An infinite norm makes inf * 0
        with on_device_of(gradient.array), np.errstate(invalid="ignore"):
            gradient.array *= to_device(scale, gradient.device)
        gradient.written()
    return Tensor(norm)


def _norm(array: Any, norm_type: float) -> Any:
    with on_device_of(array):
        xp = array_module(array)
        vector = array.ravel(order="K").astype(sum_dtype(array.dtype), copy=False)
        if norm_type == 2 and settings.general.deterministic:
            # The norm of NumPy is a product of BLAS, whose threads share the sum
            return xp.sqrt((vector * vector).sum())
        return xp.linalg.norm(vector, norm_type)

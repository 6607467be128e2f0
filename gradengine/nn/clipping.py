"""Clipping of gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np

from gradengine.devices import array_module
from gradengine.factories import tensor
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
    xp = array_module(gradients[0].array)
    norms = [xp.linalg.norm(gradient.array.ravel(order="K"), norm_type) for gradient in gradients]
    norm = xp.linalg.norm(xp.stack(norms), norm_type)
    if error_if_nonfinite and not math.isfinite(float(norm)):  # waits for the GPU
        raise RuntimeError(
            "clip_grad_norm_: the norm of the gradients is non-finite, so it cannot be clipped; "
            f"got norm={float(norm)}, norm_type={norm_type}"
        )
    scale = xp.minimum(max_norm / (norm + 1e-6), 1)
    for gradient in gradients:
        with np.errstate(invalid="ignore"):  # an infinite norm makes inf * 0
            gradient.array *= scale
        gradient.written()
    return Tensor(norm)

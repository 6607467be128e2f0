"""Gradient checks: derivatives by the tape against central differences."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gradengine import devices
from gradengine.dtypes import float64
from gradengine.tape import gradients_of
from gradengine.tensor import Tensor


class GradcheckError(RuntimeError):
    """A derivative by the tape that central differences do not confirm."""


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
) -> bool:
    """Return whether func's derivatives by the tape agree with central differences.

    `inputs` is a tensor or a tuple of arguments of `func`; those that require grad (float64, or a warning
    says that differences will be noise) are checked, element by element. Raises ValueError if none does and
    GradcheckError at a mismatch, unless `raise_exception` is False.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    checked = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    if not checked:
        raise ValueError(
            "gradcheck: expects at least one input tensor to require gradient; got none"
        )
    if any(x.dtype != float64 for x in checked):
        warnings.warn(
            "gradcheck: an input is not float64, so differences are imprecise", stacklevel=2
        )
    for position, output in enumerate(_outputs(func, arguments)):
        if not output.requires_grad:
            continue
        for place, x in enumerate(checked):
            numerical = _numerical_jacobian(func, arguments, position, x, eps)
            analytical = _analytical_jacobian(func, arguments, position, x)
            if np.allclose(analytical, numerical, rtol=rtol, atol=atol):
                continue
            if not raise_exception:
                return False
            raise GradcheckError(
                f"Jacobian mismatch for output {position} with respect to input {place},\n"
                f"numerical:{numerical}\nanalytical:{analytical}"
            )
    return True


def gradgradcheck(
    func: Callable[..., Any],
    inputs: Any,
    grad_outputs: Any = None,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
) -> bool:
    """Return whether func's second derivatives by the tape agree with central differences of its first.

    `grad_outputs` weighs the outputs; by default it is random and differentiated too. The rest is as in
    `gradcheck`.
    """
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    checked = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    outputs = [output for output in _outputs(func, arguments) if output.requires_grad]
    if grad_outputs is None:
        random = np.random.default_rng(0)
        grad_outputs = [_like(y, random.standard_normal(y.shape)).requires_grad_() for y in outputs]
    seeds = (grad_outputs,) if isinstance(grad_outputs, Tensor) else tuple(grad_outputs)

    def first_derivatives(*values: Any) -> Sequence[Any]:
        results = [y for y in _outputs(func, values[: len(arguments)]) if y.requires_grad]
        wanted = [x for x in values[: len(arguments)] if isinstance(x, Tensor) and x.requires_grad]
        found = gradients_of(results, wanted, values[len(arguments) :], None, True)
        return [g for g in found if g is not None]

    if not checked:
        raise ValueError(
            "gradgradcheck: expects at least one input tensor to require gradient; got none"
        )
    return gradcheck(
        first_derivatives,
        (*arguments, *seeds),
        eps=eps,
        atol=atol,
        rtol=rtol,
        raise_exception=raise_exception,
    )


def _outputs(func: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    result = func(*arguments)
    return [result] if isinstance(result, Tensor) else [y for y in result if isinstance(y, Tensor)]


def _like(tensor: Any, values: np.ndarray) -> Tensor:
    array = values.astype(tensor.dtype).reshape(tensor.shape)
    return Tensor(devices.to_device(np.asarray(array), tensor.device))


def _numerical_jacobian(
    func: Callable[..., Any], arguments: Sequence[Any], position: int, x: Tensor, eps: float
) -> np.ndarray:
    """Return d output / d x as (x.size, output.size), moving one element of x at a time."""

    def output_at(place: Any, value: float) -> np.ndarray:
        x.array[place] = value
        return devices.to_device(_outputs(func, arguments)[position].array, "cpu").ravel().copy()

    output_size = _outputs(func, arguments)[position].numel()
    rows = []
    for place in np.ndindex(x.shape):
        original = x.array[place].item()
        above, below = output_at(place, original + eps), output_at(place, original - eps)
        x.array[place] = original
        rows.append((above - below) / (2 * eps))
    return np.stack(rows) if rows else np.zeros((0, output_size))


def _analytical_jacobian(
    func: Callable[..., Any], arguments: Sequence[Any], position: int, x: Tensor
) -> np.ndarray:
    """Return d output / d x as (x.size, output.size), from one backward for each element of the output."""
    output = _outputs(func, arguments)[position]
    columns = []
    for place in range(output.numel()):
        seed = np.zeros(output.numel())
        seed[place] = 1
        (found,) = gradients_of([output], [x], [_like(output, seed)], True, False)
        column = np.zeros(x.shape) if found is None else devices.to_device(found.array, "cpu")
        columns.append(column.ravel())
    return np.stack(columns, axis=1) if columns else np.zeros((x.numel(), 0))

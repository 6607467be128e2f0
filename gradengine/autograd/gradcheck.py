"""Gradient checks: derivatives by the tape against central differences."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gradengine import devices
from gradengine.backward_walk import gradients_of
from gradengine.dtypes import float64
from gradengine.tensor import Tensor


class GradcheckError(RuntimeError):
    """A derivative by the tape that central differences do not confirm."""


class _Settings(NamedTuple):
    eps: float
    atol: float
    rtol: float
    nondet_tol: float
    check_undefined_grad: bool
    check_grad_dtypes: bool
    fast_mode: bool


def gradcheck(
    func: Callable[..., Any],
    inputs: Any,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    fast_mode: bool = False,
    **refused: Any,
) -> bool:
    """Return whether func's derivatives by the tape agree with central differences.

    `inputs` is a tensor or a tuple of arguments of `func`; those that require grad (float64, or a warning
    says that differences will be noise) are checked, element by element, or with `fast_mode` along random
    directions. Backward is run twice (its results may differ by `nondet_tol`), with zeros, and with
    gradients of some outputs only. Raises ValueError if no input requires grad, NotImplementedError for
    PyTorch's options of forward mode, batches and masks, and GradcheckError at a mismatch, unless
    `raise_exception` is False.
    """
    _refuse("gradcheck", refused)
    settings = _Settings(
        eps, atol, rtol, nondet_tol, check_undefined_grad, check_grad_dtypes, fast_mode
    )
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    _check_inputs("gradcheck", arguments)
    try:
        _check(func, arguments, settings)
    except GradcheckError:
        if raise_exception:
            raise
        return False
    return True


def gradgradcheck(
    func: Callable[..., Any],
    inputs: Any,
    grad_outputs: Any = None,
    *,
    eps: float = 1e-6,
    atol: float = 1e-5,
    rtol: float = 1e-3,
    gen_non_contig_grad_outputs: bool = False,
    raise_exception: bool = True,
    nondet_tol: float = 0.0,
    check_undefined_grad: bool = True,
    check_grad_dtypes: bool = False,
    fast_mode: bool = False,
    **refused: Any,
) -> bool:
    """Return whether func's second derivatives by the tape agree with central differences of its first.

    `grad_outputs` weighs the outputs; by default it is random and differentiated too, and with
    `gen_non_contig_grad_outputs` not contiguous in memory. The rest is as in `gradcheck`.
    """
    _refuse("gradgradcheck", refused)
    arguments = (inputs,) if isinstance(inputs, Tensor) else tuple(inputs)
    _check_inputs("gradgradcheck", arguments)
    if grad_outputs is None:
        outputs = [output for output in _outputs(func, arguments) if output.requires_grad]
        random = np.random.default_rng(0)
        grad_outputs = [
            _random_like(y, random, gen_non_contig_grad_outputs).requires_grad_() for y in outputs
        ]
    seeds = (grad_outputs,) if isinstance(grad_outputs, Tensor) else tuple(grad_outputs)
    return gradcheck(
        functools.partial(_first_derivatives, func, len(arguments)),
        (*arguments, *seeds),
        eps=eps,
        atol=atol,
        rtol=rtol,
        raise_exception=raise_exception,
        nondet_tol=nondet_tol,
        check_undefined_grad=check_undefined_grad,
        check_grad_dtypes=check_grad_dtypes,
        fast_mode=fast_mode,
    )


def _first_derivatives(func: Callable[..., Any], count: int, *values: Any) -> Sequence[Any]:
    """Return the gradients of func's outputs, weighed by the values after the first `count`."""
    results = [y for y in _outputs(func, values[:count]) if y.requires_grad]
    wanted = [x for x in values[:count] if isinstance(x, Tensor) and x.requires_grad]
    found = gradients_of(results, wanted, values[count:], None, True)
    return [g for g in found if g is not None]


# ---- what is asked for, and of what ----------------------------------------------------------------

# PyTorch's options without a meaning here, at the values that ask for nothing.
_REFUSED = {
    "check_batched_grad": False,
    "check_batched_forward_grad": False,
    "check_forward_ad": False,
    "check_backward_ad": True,
    "check_fwd_over_rev": False,
    "check_rev_over_rev": True,
    "masked": None,
}


def _refuse(name: str, options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option not in _REFUSED:
            raise TypeError(f"{name}: got an unexpected keyword argument {option!r}")
        if value != _REFUSED[option] and (option, value) != ("masked", False):
            raise NotImplementedError(
                f"{name}: there is no forward mode, vmap or sparse tensor here, so {option} must be "
                f"{_REFUSED[option]}; got {option}={value}"
            )


def _check_inputs(name: str, arguments: Sequence[Any]) -> None:
    checked = [(i, x) for i, x in enumerate(arguments) if isinstance(x, Tensor) and x.requires_grad]
    if not checked:
        raise ValueError(
            f"{name} expects at least one input tensor to require gradient, "
            "but none of them have requires_grad=True"
        )
    for index, x in checked:
        if x.dtype != float64:
            warnings.warn(
                f"{name}: Input #{index} requires gradient and is not a double precision floating point, "
                "so differences are imprecise and the check will likely fail; use float64, or wider atol, "
                f"rtol and eps; got dtype={x.dtype}",
                stacklevel=3,
            )
        # The strides of an empty array mean nothing, and may be 0.
        steps = zip(x.array.strides, x.shape, strict=True) if x.array.size else ()
        if any(step == 0 and n > 1 for step, n in steps):
            raise RuntimeError(
                f"{name}: input {index} has a dimension with stride 0, whose elements cannot be changed one "
                "by one; pass a clone() of it"
            )


def _outputs(func: Callable[..., Any], arguments: Sequence[Any]) -> list[Any]:
    result = func(*arguments)
    return [result] if isinstance(result, Tensor) else [y for y in result if isinstance(y, Tensor)]


def _like(tensor: Any, values: np.ndarray) -> Tensor:
    array = values.astype(tensor.dtype).reshape(tensor.shape)
    return Tensor(devices.to_device(np.asarray(array), tensor.device))


def _random_like(tensor: Any, random: np.random.Generator, spaced: bool) -> Tensor:
    if not spaced or tensor.ndim == 0:
        return _like(tensor, random.standard_normal(tensor.shape))
    twice = random.standard_normal((*tensor.shape, 2)).astype(tensor.dtype)
    return Tensor(devices.to_device(twice, tensor.device)[..., 0])


def _on_cpu(tensor: Any) -> np.ndarray:
    return devices.to_device(tensor.array, "cpu").astype(np.float64)


# ---- the checks ----------------------------------------------------------------------------------


def _check(func: Callable[..., Any], arguments: Sequence[Any], settings: _Settings) -> None:
    checked = [x for x in arguments if isinstance(x, Tensor) and x.requires_grad]
    outputs = _outputs(func, arguments)
    if not any(output.requires_grad for output in outputs):
        _check_is_constant(func, arguments, checked, settings.eps)
        return
    if settings.fast_mode:
        _check_directions(func, arguments, checked, settings)
    else:
        _check_jacobians(func, arguments, checked, settings)
    outputs = [output for output in _outputs(func, arguments) if output.requires_grad]
    _check_zeros(outputs, checked)
    if settings.check_undefined_grad and len(outputs) > 1:
        _check_some(outputs, checked)


def _check_is_constant(
    func: Callable[..., Any], arguments: Sequence[Any], checked: Sequence[Tensor], eps: float
) -> None:
    for x in checked:
        if any(jacobian.any() for jacobian in _numerical_jacobians(func, arguments, x, eps)):
            raise GradcheckError(
                "Numerical gradient for function expected to be zero, since no output requires grad; got "
                "outputs that change with an input"
            )


def _check_jacobians(
    func: Callable[..., Any],
    arguments: Sequence[Any],
    checked: Sequence[Tensor],
    settings: _Settings,
) -> None:
    numerical = [_numerical_jacobians(func, arguments, x, settings.eps) for x in checked]
    outputs = _outputs(func, arguments)
    for position in [i for i, output in enumerate(outputs) if output.requires_grad]:
        analytical = _analytical_jacobians(outputs[position], checked, settings)
        again = _analytical_jacobians(outputs[position], checked, settings)
        _check_repeats(analytical, again, settings.nondet_tol)
        for place in range(len(checked)):
            expected, got = numerical[place][position], analytical[place]
            if not np.allclose(got, expected, rtol=settings.rtol, atol=settings.atol):
                _refuse_mismatch(position, place, expected, got)


def _check_directions(
    func: Callable[..., Any],
    arguments: Sequence[Any],
    checked: Sequence[Tensor],
    settings: _Settings,
) -> None:
    """Compare v J u for random v and u >= 0 of length 1: one difference for each input."""
    random = np.random.default_rng(0)
    outputs = _outputs(func, arguments)
    directions = [_direction(x, random) for x in checked]
    weights = [_direction(output, random) for output in outputs]
    moved = [
        _differences(func, arguments, x, u, settings.eps)
        for x, u in zip(checked, directions, strict=True)
    ]
    for position in [i for i, output in enumerate(outputs) if output.requires_grad]:
        v = weights[position]
        seed = _like(outputs[position], v)
        rows = _gradients(outputs[position], checked, seed, settings)
        _check_repeats(
            rows, _gradients(outputs[position], checked, seed, settings), settings.nondet_tol
        )
        for place, u in enumerate(directions):
            expected = float(v.ravel() @ moved[place][position])
            got = float(rows[place] @ u.ravel())
            atol = settings.atol * float(u.sum()) * float(v.sum())
            if not np.allclose(got, expected, rtol=settings.rtol, atol=atol):
                _explain_slowly(func, arguments, checked, settings, (position, place))
                _refuse_mismatch(position, place, expected, got)


def _explain_slowly(
    func: Callable[..., Any],
    arguments: Sequence[Any],
    checked: Sequence[Tensor],
    settings: _Settings,
    where: tuple[int, int],
) -> None:
    """Raise what the check by elements finds; where it finds nothing, say so in a warning."""
    _check_jacobians(func, arguments, checked, settings)
    warnings.warn(
        f"gradcheck: output {where[0]} and input {where[1]} fail in fast mode though all elements of the "
        "Jacobian agree: the tolerances are close to the error",
        stacklevel=5,
    )


def _direction(tensor: Any, random: np.random.Generator) -> np.ndarray:
    values = random.random(tensor.shape)
    return values / max(float(np.linalg.norm(values)), 1e-300)


def _check_repeats(first: Sequence[Any], second: Sequence[Any], nondet_tol: float) -> None:
    for x, y in zip(first, second, strict=True):
        if not np.allclose(x, y, rtol=0, atol=nondet_tol, equal_nan=True):
            raise GradcheckError(
                "Backward is not reentrant, i.e., running backward with same input and grad_output multiple "
                f"times gives different values; the tolerance for nondeterminism was {nondet_tol}, and "
                "nondet_tol= sets it"
            )


def _check_zeros(outputs: Sequence[Any], checked: Sequence[Tensor]) -> None:
    seeds = [_like(y, np.zeros(y.shape)) for y in outputs]
    for found in gradients_of(outputs, checked, seeds, True, False):
        if found is not None and _on_cpu(found).any():
            raise GradcheckError(
                "backward not multiplied by grad_output: gradients of zero do not give zeros"
            )


def _check_some(outputs: Sequence[Any], checked: Sequence[Tensor]) -> None:
    """Compare a gradient of one output alone with zeros beside it: backward gets None, or the zeros."""
    ones, zeros = ([_like(y, fill(y.shape)) for y in outputs] for fill in (np.ones, np.zeros))
    for position, output in enumerate(outputs):
        seeds = [ones[i] if i == position else zeros[i] for i in range(len(outputs))]
        alone = gradients_of([output], checked, [ones[position]], True, False)
        beside = gradients_of(outputs, checked, seeds, True, False)
        for x, y in zip(alone, beside, strict=True):
            total, expected = (0.0 if g is None else _on_cpu(g) for g in (x, y))
            if not np.allclose(total, expected, equal_nan=True):
                raise GradcheckError(
                    "Expected backward function to handle undefined output grads as zeros: where only output "
                    f"{position} has one, the gradients differ; check_undefined_grad=False leaves this out"
                )


def _refuse_mismatch(position: int, place: int, numerical: Any, analytical: Any) -> None:
    raise GradcheckError(
        f"Jacobian mismatch for output {position} with respect to input {place},\n"
        f"numerical:{numerical}\nanalytical:{analytical}"
    )


# ---- Jacobians -----------------------------------------------------------------------------------


def _values(func: Callable[..., Any], arguments: Sequence[Any]) -> list[np.ndarray]:
    """Return every output as a vector of float64, whatever it requires."""
    return [_on_cpu(output).ravel() for output in _outputs(func, arguments)]


def _differences(
    func: Callable[..., Any], arguments: Sequence[Any], x: Tensor, step: np.ndarray, eps: float
) -> list[np.ndarray]:
    """Return the derivative of each output along `step`, by moving x itself there and back."""
    original = x.array.copy()
    moved = devices.to_device((eps * step).astype(x.dtype), x.device)
    try:
        with devices.on_device_of(x.array):
            x.array[...] = original + moved
            above = _values(func, arguments)
            x.array[...] = original - moved
            below = _values(func, arguments)
    finally:
        x.array[...] = original
    return [(a - b) / (2 * eps) for a, b in zip(above, below, strict=True)]


def _numerical_jacobians(
    func: Callable[..., Any], arguments: Sequence[Any], x: Tensor, eps: float
) -> list[np.ndarray]:
    """Return d output / d x of each output as (x.size, output.size), moving one element at a time."""
    rows = []
    for place in np.ndindex(x.shape):
        step = np.zeros(x.shape)
        step[place] = 1
        rows.append(_differences(func, arguments, x, step, eps))
    if not rows:
        return [np.zeros((0, values.size)) for values in _values(func, arguments)]
    return [np.stack(column) for column in zip(*rows, strict=True)]


def _gradients(
    output: Any, checked: Sequence[Tensor], seed: Tensor, settings: _Settings
) -> list[np.ndarray]:
    """Return the gradient of one output by each input as a vector; zeros where there is none."""
    vectors = []
    for x, found in zip(checked, gradients_of([output], checked, [seed], True, False), strict=True):
        if found is None:
            vectors.append(np.zeros(x.numel()))
            continue
        if settings.check_grad_dtypes and found.dtype != x.dtype:
            raise GradcheckError(f"Gradient has dtype mismatch: {found.dtype} of {x.dtype}")
        vectors.append(_on_cpu(found).ravel())
    return vectors


def _analytical_jacobians(
    output: Any, checked: Sequence[Tensor], settings: _Settings
) -> list[np.ndarray]:
    """Return d output / d x of each x as (x.size, output.size), from one backward for each element."""
    columns = []
    for place in range(output.numel()):
        seed = np.zeros(output.numel())
        seed[place] = 1
        columns.append(_gradients(output, checked, _like(output, seed), settings))
    if not columns:
        return [np.zeros((x.numel(), 0)) for x in checked]
    return [np.stack(rows, axis=1) for rows in zip(*columns, strict=True)]

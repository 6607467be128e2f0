"""One call of one operation by gradengine and by PyTorch, and the words for where they part."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

import gradengine as ge

try:
    import torch  # pyright: ignore[reportMissingImports]
except ImportError:
    torch: Any = None


class Call(NamedTuple):
    """A public operation on inputs that are given as NumPy arrays."""

    operation: str
    note: str  # shapes, options and the kind of inputs: what tells the calls of an operation apart
    run: Callable[..., Any]  # (library, *tensors) -> tensor, number, or a sequence of these
    inputs: tuple[np.ndarray, ...]


class Outcome(NamedTuple):
    """What became of a call in one library, as NumPy arrays."""

    refusal: Exception | None = None
    values: tuple[Any, ...] = ()
    recorded: tuple[bool, ...] = ()  # of each value, whether it requires grad
    plain: tuple[Any, ...] | None = (
        None  # gradengine's first derivatives in a backward not recorded
    )
    first: tuple[Any, ...] | None = None  # derivatives by the floating inputs
    second: tuple[Any, ...] | None = None
    failure: Exception | None = None  # of the backward pass


def function(library: Any, name: str) -> Callable[..., Any]:
    """Return an operation by its public name; what only a tensor has is called as a method."""
    if library is ge:
        return getattr(ge.functional, name)
    for home in (torch.nn.functional, torch, torch.Tensor):
        if hasattr(home, name):
            return getattr(home, name)
    raise AttributeError(f"PyTorch has no {name}")


# ---- running -------------------------------------------------------------------------------------

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, OverflowError, ArithmeticError)


def _leaf(library: Any, array: np.ndarray, device: str) -> Any:
    # PyTorch takes no read-only arrays, though it makes such tensors itself, by expand.
    if not array.flags.writeable and library is torch:
        tensor = torch.from_numpy(array[..., :1].copy()).expand(array.shape)
    else:
        tensor = library.from_numpy(array).to(device)
    return tensor.detach().requires_grad_(array.dtype.kind == "f")


def _flat(result: Any) -> Iterator[Any]:
    if isinstance(result, tuple | list):
        for part in result:
            yield from _flat(part)
    else:
        yield result


def _weights(shape: Any, phase: float) -> np.ndarray:
    return np.cos(np.arange(np.prod(shape, dtype=int)) + phase).reshape(tuple(shape))


def _weighted(library: Any, tensors: Any, phase: float) -> Any:
    """Return the sum of all elements of the tensors that require grad, unevenly weighed, or None."""
    parts = []
    for place, tensor in enumerate(tensors):
        if getattr(tensor, "requires_grad", False):
            weights = _weights(tensor.shape, phase + place).astype(np.float64)
            weights = library.from_numpy(weights).to(tensor.device, tensor.dtype)
            parts.append((tensor * weights).sum())
    return sum(parts[1:], parts[0]) if parts else None


def _gradients(library: Any, tensors: Any, leaves: Any, phase: float, recorded: bool) -> Any:
    total = _weighted(library, tensors, phase)
    if total is None:
        return None
    return library.autograd.grad(
        total, leaves, None, True, recorded, allow_unused=True, materialize_grads=True
    )


def run(library: Any, call: Call, device: str = "cpu") -> Outcome:
    """Run a call on a device forward, and backward twice."""
    leaves = [_leaf(library, array, device) for array in call.inputs]
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")  # both warn of some calls, each in its own words
        try:
            results = tuple(_flat(call.run(library, *leaves)))
        except REFUSALS as error:
            return Outcome(refusal=error)
        values = tuple(_array(result) for result in results)
        recorded = tuple(bool(getattr(result, "requires_grad", False)) for result in results)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        plain = first = second = None
        try:
            if library is ge:
                plain = _gradients(library, results, wanted, 0.0, recorded=False)
            first = _gradients(library, results, wanted, 0.0, recorded=True)
            second = first and _gradients(library, first, wanted, 0.5, recorded=False)
        except REFUSALS as error:
            return Outcome(None, values, recorded, _arrays(plain), _arrays(first), failure=error)
    return Outcome(None, values, recorded, _arrays(plain), _arrays(first), second=_arrays(second))


def _array(result: Any) -> Any:
    if not hasattr(result, "detach"):
        return result
    result = result.detach().cpu()
    return result.numpy() if isinstance(result, ge.Tensor) else result.numpy(force=True)


def _arrays(tensors: Any) -> Any:
    return None if tensors is None else tuple(_array(tensor) for tensor in tensors)


# ---- comparing -----------------------------------------------------------------------------------

# Both libraries' words for one thing: PyTorch raises RuntimeError for what gradengine tells apart.
SAME_REFUSAL = {
    "RuntimeError": ("RuntimeError", "ValueError", "TypeError", "IndexError"),
    "NotImplementedError": ("TypeError", "ValueError"),
    "ZeroDivisionError": ("ValueError",),
}
TOLERANCES = {"float64": (1e-9, 1e-12), "float32": (2e-4, 2e-5), "exact": (0, 0)}


def compare(call: Call, device: str = "cpu") -> tuple[int, list[str]]:
    """Return how many things agree, and a line of words for each that does not.

    PyTorch computes on the CPU, gradengine on the device, which must be the default one.
    """
    ours, theirs = run(ge, call, device), run(torch, call)
    if ours.refusal is not None or theirs.refusal is not None:
        difference = _between_refusals(call.operation, ours.refusal, theirs.refusal)
        return (0, [difference]) if difference else (1, [])
    rounded = "float32" if "float32" in call.note else "float64"
    found = [*_between_values(ours, theirs, rounded), *_between_derivatives(ours, theirs, rounded)]
    return sum(not words for words in found), [words for words in found if words]


def _between_refusals(operation: str, ours: Exception | None, theirs: Exception | None) -> str:
    if theirs is None:
        return f"refused by gradengine alone: {ours!r}"
    if ours is None:
        return f"refused by PyTorch alone: {_first_line(theirs)}"
    mine, other = type(ours).__name__, type(theirs).__name__
    if mine not in SAME_REFUSAL.get(other, (other,)):
        return f"refused as {mine}, by PyTorch as {other}: {_first_line(theirs)}"
    if not re.match(r"[a-z]\w*: ", str(ours)):
        return f"refused without the operation's name: {ours!r}"
    return ""


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _between_values(ours: Outcome, theirs: Outcome, rounded: str) -> Iterator[str]:
    if len(ours.values) != len(theirs.values):
        yield f"{len(ours.values)} results, in PyTorch {len(theirs.values)}"
        return
    for mine, other in zip(ours.values, theirs.values, strict=True):
        yield _between_arrays("value", mine, other, rounded)
    yield (
        ""
        if ours.recorded == theirs.recorded
        else f"requires_grad {ours.recorded}, in PyTorch {theirs.recorded}"
    )


def _between_derivatives(ours: Outcome, theirs: Outcome, rounded: str) -> Iterator[str]:
    if ours.recorded != theirs.recorded:
        return
    if ours.failure is not None and theirs.failure is None:
        yield f"backward refused by gradengine alone: {ours.failure!r}"
        return
    for name, mine, other in (
        ("first derivative", ours.plain, theirs.first),
        ("recorded derivative", ours.first, theirs.first),
        ("second derivative", ours.second, theirs.second),
    ):
        if other is None and theirs.failure is not None:
            return  # PyTorch has no such derivative
        if other is None and mine is not None and name == "second derivative":
            other = tuple(np.zeros_like(gradient) for gradient in mine)  # theirs is constant
        if mine is None and other is not None and name == "second derivative":
            mine = tuple(np.zeros_like(gradient) for gradient in other)
        for place, pair in enumerate(zip(mine or (), other or (), strict=True)):
            yield _between_arrays(f"{name} by input {place}", *pair, rounded)


def _between_arrays(name: str, ours: Any, theirs: Any, rounded: str) -> str:
    if not hasattr(ours, "dtype"):
        same = type(ours) is type(theirs) and ours == theirs
        return "" if same else f"{name} {ours!r}, in PyTorch {theirs!r}"
    if ours.dtype != theirs.dtype:
        return f"{name} of dtype {ours.dtype}, in PyTorch {theirs.dtype}"
    if ours.shape != theirs.shape:
        return f"{name} of shape {ours.shape}, in PyTorch {theirs.shape}"
    coarse = "float32" in (rounded, str(ours.dtype))  # converted on the way, or at the end
    rtol, atol = TOLERANCES[
        "exact" if ours.dtype.kind != "f" else "float32" if coarse else "float64"
    ]
    near = np.isclose(ours, theirs, rtol=rtol, atol=atol, equal_nan=True)
    if name == "value" and ours.dtype.kind == "f":
        near &= (np.signbit(ours) == np.signbit(theirs)) | (theirs != 0) | (ours != 0)
    if near.all():
        return ""
    pairs = zip(ours[~near].tolist(), theirs[~near].tolist(), strict=True)
    return f"{name}: " + ", ".join(sorted({f"{_number(x)} for {_number(y)}" for x, y in pairs})[:6])


def _number(value: Any) -> str:
    """Return a number that says something by itself as it is, any other as "some"."""
    if value in (0, 1, True, False, math.inf, -math.inf) or value != value:
        return str(value)
    return "some"

"""How tensors print: PyTorch's layout, digit for digit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from gradengine import devices
from gradengine.dtypes import get_default_dtype, is_floating_point

_PRECISION = 4
_THRESHOLD = 1000  # elements; larger tensors are summarised
_EDGE_ITEMS = 3
_LINE_WIDTH = 80


def tensor_repr(array: Any, *, requires_grad: bool, grad_fn: Any, prefix: str = "tensor(") -> str:
    """Return the text of a tensor: its elements, then what is not the default about it."""
    values = devices.to_device(array, "cpu")  # waits for the GPU
    suffixes = []
    location = devices.device_of(array)
    if location != devices.default_device() or location.type == "cuda":
        suffixes.append(f"device='{location}'")
    if array.size == 0:
        text = "[]"
        if array.ndim != 1:
            suffixes.append(f"size={array.shape}")
        if array.dtype != get_default_dtype():
            suffixes.append(f"dtype={array.dtype}")
    else:
        if array.dtype not in (get_default_dtype(), np.int64, np.bool_):
            suffixes.append(f"dtype={array.dtype}")
        text = _elements(values, len(prefix))
    if grad_fn is not None:
        suffixes.append(f"grad_fn={grad_fn!r}")
    elif requires_grad:
        suffixes.append("requires_grad=True")
    return _with_suffixes(prefix + text, suffixes, len(prefix))


def _with_suffixes(text: str, suffixes: list[str], indent: int) -> str:
    """Append the suffixes, each on the last line if it fits there."""
    last_line = len(text) - text.rfind("\n") + 1
    for suffix in suffixes:
        if last_line + len(suffix) + 2 > _LINE_WIDTH:
            text += ",\n" + " " * indent + suffix
            last_line = indent + len(suffix)
        else:
            text += ", " + suffix
            last_line += len(suffix) + 2
    return text + ")"


def _elements(values: np.ndarray, indent: int) -> str:
    summarise = values.size > _THRESHOLD
    shown = _edges(values) if summarise else values
    write, width = _formatter(shown.ravel())
    if values.ndim == 0:
        return write(values[()])
    return _nested(values, indent, summarise, write, width)


def _edges(values: np.ndarray) -> np.ndarray:
    """Return the elements that a summary shows."""
    for axis, size in enumerate(values.shape):
        if size > 2 * _EDGE_ITEMS:
            places = [*range(_EDGE_ITEMS), *range(size - _EDGE_ITEMS, size)]
            values = values.take(places, axis=axis)
    return values


def _formatter(values: np.ndarray) -> tuple[Callable[[Any], str], int]:
    """Return a function that writes one element, padded to the width that is returned beside it."""
    if not is_floating_point(values.dtype):
        width = max(len(str(value)) for value in values)
        return lambda value: str(value).rjust(width), width
    significant = values[np.isfinite(values) & (values != 0)].astype(np.float64)
    write = _float_style(significant)
    width = max((len(write(value)) for value in significant.tolist()), default=0)
    return lambda value: write(float(value)).rjust(width), width


def _float_style(significant: np.ndarray) -> Callable[[float], str]:
    """Choose between integers with a dot, fixed point and scientific notation for these values."""
    magnitudes = np.abs(significant)
    largest, smallest = (magnitudes.max(), magnitudes.min()) if magnitudes.size else (0.0, 0.0)
    if np.all(magnitudes == np.ceil(magnitudes)):
        scientific = magnitudes.size and (largest / smallest > 1000 or largest > 1e8)
        style = f".{_PRECISION}e" if scientific else ".0f"
        dot = "" if scientific else "."
        return lambda value: f"{value:{style}}" + (dot if math.isfinite(value) else "")
    scientific = largest / smallest > 1000 or largest > 1e8 or smallest < 1e-4
    style = f".{_PRECISION}e" if scientific else f".{_PRECISION}f"
    return lambda value: f"{value:{style}}"


def _nested(
    values: np.ndarray, indent: int, summarise: bool, write: Callable[[Any], str], width: int
) -> str:
    hidden = summarise and values.shape[0] > 2 * _EDGE_ITEMS
    parts = [*values[:_EDGE_ITEMS], *values[-_EDGE_ITEMS:]] if hidden else list(values)
    if values.ndim > 1:
        rows = [_nested(part, indent + 1, summarise, write, width) for part in parts]
        if hidden:
            rows.insert(_EDGE_ITEMS, "...")
        return "[" + ("," + "\n" * (values.ndim - 1) + " " * (indent + 1)).join(rows) + "]"
    words = [write(part) for part in parts]
    if hidden:
        words.insert(_EDGE_ITEMS, " ...")
    per_line = max(1, (_LINE_WIDTH - indent) // (width + 2))
    lines = [", ".join(words[i : i + per_line]) for i in range(0, len(words), per_line)]
    return "[" + (",\n" + " " * (indent + 1)).join(lines) + "]"

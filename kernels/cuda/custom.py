"""Kernels whose CUDA C++ a user brings: written to a file of its own, compiled and launched as ours are."""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from gradengine.devices import array_module
from gradengine.kernels.cache_folder import private_cache_folder
from gradengine.kernels.cuda.launch import c_name, kernel
from gradengine.kernels.layout import Array

THREADS = 256


def elementwise(name: str, text: str, parameters: Sequence[str], arrays: Sequence[Array]) -> Array:
    """Apply a function of one element to arrays of one shape and float dtype.

    `text` is an expression of C++ in the parameters, which are float or double, or the body of a function
    with its `return`.
    """
    source = source_file(name, _elementwise_source(text, tuple(parameters)))
    xp = array_module(arrays[0])
    vectors = [xp.ascontiguousarray(array).reshape(-1) for array in arrays]
    out = xp.empty(vectors[0].shape, arrays[0].dtype)
    if out.size:
        types = ", ".join([c_name(out.dtype)] * (1 + len(vectors)))
        grid = (-(-out.size // THREADS),)
        run = kernel(source, f"elementwise<{types}>")
        run(grid, (THREADS,), (out, out.size, *vectors))
    return out.reshape(arrays[0].shape)


def launched(
    name: str,
    text: str,
    shape: tuple[int, ...],
    arrays: Sequence[Array],
    launch: tuple[int, int, Sequence[Any]],
) -> Array:
    """Run the kernel `name<T>` of a text: (out, inputs..., numbers...), with (blocks, threads, numbers)."""
    xp = array_module(arrays[0])
    out = xp.zeros(shape, arrays[0].dtype)
    blocks, threads, numbers = launch
    if out.size and blocks:
        inputs = [xp.ascontiguousarray(array) for array in arrays]
        arguments = [x.reshape(-1) if x.ndim == 0 else x for x in (out, *inputs)]
        run = kernel(
            source_file(name, f"#include <elements.cuh>\n{text}"), f"{name}<{c_name(out.dtype)}>"
        )
        run((int(blocks),), (int(threads),), (*arguments, *numbers))
    return out


@cache
def _elementwise_source(text: str, parameters: tuple[str, ...]) -> str:
    body = text if re.search(r"\breturn\b", text) else f"return {text};"
    declared = ", ".join(f"T {parameter}" for parameter in parameters)
    return (
        f"#include <custom.cuh>\n\ntemplate <typename T>\nDEVICE T element({declared}) {{\n{body}\n}}\n\n"
        "ELEMENTWISE(element)\n"
    )


@cache
def source_file(name: str, text: str) -> str:
    """Return the path of a file with this text, named after what it holds: compilers' messages name it."""
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    try:
        folder = private_cache_folder("CUPY")
    except OSError:
        folder = Path(tempfile.mkdtemp(prefix="gradengine-"))
    path = folder / f"{name}-{digest}.cu"
    if not path.exists() or path.read_text() != text:
        partial = folder / f"{path.name}.{os.getpid()}"
        partial.write_text(text)
        os.replace(partial, path)
    return str(path)

"""Batch normalization over the pixels of all images: one to three launches, each at memory's speed.

Arrays (N, H, W, C) are rows, the pixels, of packs: 16 bytes of channels, or one channel where these
do not fit. Blocks stand side by side over the packs and share the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np

from gradengine.devices import array_module
from gradengine.kernels.cuda.launch import Kernel, c_name, device_limits, kernel
from gradengine.kernels.cuda.layout import PACK_BYTES, channels_last, is_aligned
from gradengine.kernels.geometry import CACHED_GEOMETRIES
from gradengine.kernels.layout import Array, from_nhwc

# As in normalization.cu: threads of a block, and rows whose loads a thread has under way at once, of
# one array and of two.
THREADS = 256
ROWS_AT_ONCE = 4
PAIRS_AT_ONCE = 2
# Packs that a block has side by side: 256 bytes of a row. More would leave more parts to merge.
MOST_LANES = 16
# So few rows are one launch, of blocks that have all rows of a few packs.
WHOLE_ROWS = 1024
WHOLE_LANES = 4
# Parts of a channel are merged by 32 threads, each with a dozen loads to wait for rather than fifty.
MERGE_BLOCK = (8, 32)
SOURCE = "normalization.cu"

_TYPES = (("bfloat16", "float", 8), ("float", "float", 4))  # of arrays and vectors, and a pack
_MORE_TYPES = (
    *(("float16", "float", 8), ("double", "double", 2), ("bfloat16", "bfloat16", 8)),
    *(("float16", "float16", 1), ("float", "float", 1)),
)
_ELEMENTS = ("float16, 8", "bfloat16, 8", "float, 4", "double, 2", "float16, 1", "float, 1")


def _instances() -> Iterator[str]:
    for array, vector, width in _TYPES + _MORE_TYPES:
        for flag in ("true", "false") if (array, vector, width) in _TYPES else ("true",):
            for name in ("whole", "grad_apply", "grad_whole"):
                yield f"batch_norm_{name}<{array}, {vector}, {width}, {flag}>"
            moment = "double" if array == "double" else "float"
            yield f"batch_norm_apply<{array}, {vector}, {moment}, {width}, {flag}>"
            yield f"batch_norm_apply<{array}, {vector}, double, {width}, {flag}>"
    for element in _ELEMENTS:
        yield f"batch_norm_moments<{element}>"
        for flag in ("true", "false"):
            yield f"batch_norm_grad_sums<{element}, {flag}>"
    for array in ("float16", "bfloat16", "float", "double"):
        yield f"batch_norm_merge_moments<{array}>"
        total = "double" if array == "double" else "float"
        yield f"batch_norm_grad_merge<{total}, {array}>"


KERNELS = {SOURCE: tuple(dict.fromkeys(_instances()))}

Shape = tuple[int, int]


def batch_norm_act(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    relu: bool,
    eps: float,
    moments: tuple[Array, Array] | None,
    running_mean: Array | None,
    running_var: Array | None,
    momentum: float,
    batches: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    xp, dtype = array_module(x), sum_dtype(x.dtype)
    pixels, added = aligned_pixels(x), None if residual is None else aligned_pixels(residual)
    rows, channels, width = sizes_of(pixels)
    if not pixels.size:
        return _of_an_empty_batch(pixels, eps, batches)
    out, inv_std = xp.empty(pixels.shape, x.dtype), xp.empty(channels, dtype)
    passed = xp.empty((rows, channels // width), np.uint8) if relu else None
    vectors: list[Any] = [dense(one) for one in (weight, bias, running_mean, running_var)]
    mean = xp.empty(channels, dtype)
    found: list[Any] = []
    if moments is None and rows <= WHOLE_ROWS:
        run = normalization_kernel("whole", x.dtype, vectors, width, added is not None)
        sizes = _whole_launch(pixels)
    else:
        found = [dense(moment) for moment in moments or moments_of(pixels)]
        run = normalization_kernel(
            "apply", x.dtype, vectors, c_name(found[0].dtype), width, added is not None
        )
        sizes = row_launch(pixels, ROWS_AT_ONCE if added is None else PAIRS_AT_ONCE)
    arguments = (
        *(pixels, added, out, passed, *found, mean, *vectors[:2], inv_std, *vectors[2:], batches),
        *(rows, channels, float(eps), float(momentum), int(relu)),
    )
    run(*sizes, arguments)
    write_back((running_mean, running_var), vectors[2:])
    return from_nhwc(out), mean, inv_std, passed


def _of_an_empty_batch(
    pixels: Array, eps: float, batches: Array | None
) -> tuple[Array, Array, Array, None]:
    """Give batch_norm_act's results of no pixels, and count the batch."""
    xp, dtype, channels = array_module(pixels), sum_dtype(pixels.dtype), pixels.shape[-1]
    if batches is not None:
        batches += 1
    out, mean = xp.empty(pixels.shape, pixels.dtype), xp.zeros(channels, dtype)
    return from_nhwc(out), mean, xp.full(channels, eps**-0.5, dtype), None


def write_back(vectors: Sequence[Array | None], moved: Sequence[Array | None]) -> None:
    """Copy what a kernel wrote to vectors that `dense` had to copy."""
    for vector, values in zip(vectors, moved, strict=True):
        if vector is not None and values is not vector:
            vector[...] = values


def moments_of(pixels: Array) -> tuple[Array, Array]:
    """Give each channel's mean and biased variance: blocks leave parts, which are merged."""
    xp, dtype = array_module(pixels), sum_dtype(pixels.dtype)
    rows, channels, width = sizes_of(pixels)
    sizes = row_launch(pixels, ROWS_AT_ONCE)
    blocks = sizes[0][1]
    parts = xp.empty((blocks, channels, 3), dtype)  # count, mean, sum of squared deviations
    element = c_name(pixels.dtype)
    run = kernel(SOURCE, f"batch_norm_moments<{element}, {width}>")
    run(*sizes, (pixels, parts, rows, channels))
    mean, var = xp.empty(channels, dtype), xp.empty(channels, dtype)
    run = kernel(SOURCE, f"batch_norm_merge_moments<{element}>")
    run(*merge_launch(channels), (parts, pixels, mean, var, blocks, channels))
    return mean, var


def batch_norm_act_grad(
    grad: Array,
    x: Array,
    out: Array | None,
    passed: Array | None,
    weight: Array | None,
    mean: Array,
    inv_std: Array,
    relu: bool,
    wants_residual: bool,
) -> tuple[Array, Array, Array, Array | None]:
    xp, dtype = array_module(x), sum_dtype(x.dtype)
    grads, pixels = aligned_pixels(grad), aligned_pixels(x)
    rows, channels, width = sizes_of(pixels)
    vector_dtype = mean.dtype if weight is None else weight.dtype
    by_weight, by_bias = xp.empty(channels, vector_dtype), xp.empty(channels, vector_dtype)
    grad_x, behind_relu = xp.empty(pixels.shape, x.dtype), grads
    if not grad_x.size:
        by_weight[...], by_bias[...] = 0, 0
        return from_nhwc(grad_x), by_weight, by_bias, from_nhwc(grads) if wants_residual else None
    if relu:
        _check_passed(passed, rows, channels // width)
    if relu and wants_residual:
        behind_relu = xp.empty(pixels.shape, x.dtype)
    gated = None if behind_relu is grads else behind_relu
    weight, mean, inv_std = dense(weight), dense(mean, dtype), dense(inv_std, dtype)
    if rows <= WHOLE_ROWS:
        run = normalization_kernel("grad_whole", x.dtype, [by_weight], width, relu)
        arguments = (grads, pixels, passed, gated, weight, mean, inv_std)
        run(*_whole_launch(pixels), (*arguments, by_weight, by_bias, grad_x, rows, channels))
    else:
        arguments = (grads, pixels, passed if relu else None, gated, mean, inv_std)
        sums = _grad_sums(*arguments, by_weight, by_bias)
        relu = relu and gated is None  # what relu let through is known now
        run = normalization_kernel("grad_apply", x.dtype, [by_weight], width, relu)
        arguments = (behind_relu, pixels, passed, weight, mean, inv_std, sums)
        run(*row_launch(pixels, PAIRS_AT_ONCE), (*arguments, grad_x, rows, channels))
    grad_residual = from_nhwc(behind_relu) if wants_residual else None
    return from_nhwc(grad_x), by_weight, by_bias, grad_residual


def _grad_sums(
    grads: Array,
    pixels: Array,
    passed: Array | None,
    gated: Array | None,
    mean: Array,
    inv_std: Array,
    by_weight: Array,
    by_bias: Array,
) -> Array:
    """Fill gated and the gradients by weight and bias; give bias's and weight's in one array."""
    xp, dtype = array_module(pixels), mean.dtype
    rows, channels, width = sizes_of(pixels)
    sizes = row_launch(pixels, PAIRS_AT_ONCE)
    blocks = sizes[0][1]
    parts = xp.empty((blocks, channels, 2), dtype)
    relu = "false" if passed is None else "true"
    run = kernel(SOURCE, f"batch_norm_grad_sums<{c_name(pixels.dtype)}, {width}, {relu}>")
    run(*sizes, (grads, pixels, passed, gated, mean, parts, rows, channels))
    return merged_grad_sums(parts, inv_std, by_weight, by_bias)


def merged_grad_sums(parts: Array, inv_std: Array, by_weight: Array, by_bias: Array) -> Array:
    """Fill the gradients by weight and bias; give bias's and weight's in parts' dtype (2, C)."""
    blocks, channels, _ = parts.shape
    sums = array_module(parts).empty((2, channels), parts.dtype)
    types = f"{c_name(parts.dtype)}, {c_name(by_weight.dtype)}"
    run = kernel(SOURCE, f"batch_norm_grad_merge<{types}>")
    run(*merge_launch(channels), (parts, inv_std, sums, by_weight, by_bias, blocks, channels))
    return sums


def _check_passed(passed: Array | None, rows: int, packs: int) -> None:
    if passed is None or passed.shape != (rows, packs):
        got = None if passed is None else passed.shape
        raise ValueError(
            "batch_norm_act_grad: passed must be what batch_norm_act gave for x "
            f"(passed.shape == {(rows, packs)}); got passed={got}"
        )


def scale_shift(x: Array, scale: Array, shift: Array, residual: Array | None, relu: bool) -> Array:
    pixels, added = aligned_pixels(x), None if residual is None else aligned_pixels(residual)
    rows, channels, width = sizes_of(pixels)
    out = array_module(x).empty(pixels.shape, x.dtype)
    if out.size:
        vectors = [dense(scale), dense(shift)]
        run = normalization_kernel(
            "apply", x.dtype, vectors, c_name(sum_dtype(x.dtype)), width, added is not None
        )
        moments, running = (None, None, None), (None, None, None)  # the affine map is given
        arguments = (pixels, added, out, None, *moments, *vectors, None, *running)
        sizes = row_launch(pixels, ROWS_AT_ONCE if added is None else PAIRS_AT_ONCE)
        run(*sizes, (*arguments, rows, channels, 0.0, 0.0, int(relu)))
    return from_nhwc(out)


def sum_dtype(dtype: np.dtype) -> np.dtype:
    return dtype if dtype.itemsize == 8 else np.dtype(np.float32)


def aligned_pixels(x: Array) -> Array:
    """Give x (N, C, H, W) as a contiguous (N, H, W, C) array, where packs can be read."""
    pixels = channels_last(x)
    aligned = sizes_of(pixels)[2] == 1 or is_aligned(pixels)
    return pixels if aligned else pixels.copy()


def sizes_of(pixels: Array) -> tuple[int, int, int]:
    """Give rows, channels, and the channels of a pack."""
    channels = pixels.shape[3]
    width = PACK_BYTES // pixels.dtype.itemsize
    return pixels.size // max(channels, 1), channels, width if channels % width == 0 else 1


def dense(vector: Array | None, dtype: np.dtype | None = None) -> Array | None:
    """Give a vector, in a dtype, where packs can be read; itself where it is so already."""
    if vector is None:
        return None
    known = dtype is None or vector.dtype == dtype
    if known and vector.flags.c_contiguous and is_aligned(vector):
        return vector
    return vector.astype(vector.dtype if dtype is None else dtype, order="C")


def normalization_kernel(
    name: str,
    dtype: np.dtype,
    vectors: Sequence[Array | None],
    *parameters: Any,
    source: str = SOURCE,
) -> Kernel:
    """Give an instantiation for elements of dtype, vectors of theirs, which may be None, and more."""
    vector_dtype = sum_dtype(dtype)
    for vector in vectors:
        if vector is not None:
            vector_dtype = vector.dtype
            break
    return kernel(source, _instance(name, dtype, vector_dtype, *parameters))


@cache
def _instance(name: str, dtype: np.dtype, vector_dtype: np.dtype, *parameters: Any) -> str:
    types = (c_name(dtype), c_name(vector_dtype), *parameters)
    return f"batch_norm_{name}<{', '.join(str(one).lower() for one in types)}>"


def row_launch(pixels: Array, at_once: int) -> tuple[Shape, Shape]:
    """Give grid and block: no more blocks than the device can hold, and equal shares of the rows."""
    return _row_launch(*sizes_of(pixels), at_once, device_limits().multiprocessors)


@lru_cache(CACHED_GEOMETRIES)
def _row_launch(
    rows: int, channels: int, width: int, at_once: int, multiprocessors: int
) -> tuple[Shape, Shape]:
    packs = channels // width
    lanes = min(MOST_LANES, power_of_two(packs))
    columns = -(-packs // lanes)
    tiles = -(-rows // (THREADS // lanes * at_once))
    most = max(multiprocessors * _resident(width) // columns, 1)
    shares = -(-tiles // most)
    return (columns, -(-tiles // shares)), (lanes, THREADS // lanes)


def _whole_launch(pixels: Array) -> tuple[Shape, Shape]:
    """Give grid and block where one block has all rows of its packs."""
    _, channels, width = sizes_of(pixels)
    packs = channels // width
    lanes = min(WHOLE_LANES, power_of_two(packs))
    return (-(-packs // lanes), 1), (lanes, THREADS // lanes)


def merge_launch(channels: int) -> tuple[Shape, Shape]:
    return (-(-channels // MERGE_BLOCK[0]), 1), MERGE_BLOCK


def _resident(width: int) -> int:
    """Give how many blocks a multiprocessor holds, as in normalization.cu."""
    return 3 if width > 4 else 4


def power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length()

"""The seam between operations and the code of a device: one function for each kernel.

A kernel takes arrays and returns arrays: NumPy's run in `gradengine.kernels.cpu`, CuPy's in
`gradengine.kernels.cuda`, each imported when its first kernel runs. Shapes are NCHW and OIHW. Any
strides are accepted; 4-D results are channels-last in memory (`out.transpose(0, 2, 3, 1)` is
C-contiguous) and so are converted nowhere on their way through a network. Results have the dtype of
the inputs: float32 or float64, on CUDA also float16 and bfloat16 with sums in float32. An empty batch works.

Geometries come from `gradengine.kernels.geometry`, which checks the shapes they are made from; here
an array that does not fit its geometry is refused, since compiled code would read past its end.
"""

from __future__ import annotations

from functools import cache, partial
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import ModuleType

    from gradengine.kernels.geometry import Conv2dGeometry, Pool2dGeometry
    from gradengine.kernels.layout import Array

    Take = Callable[
        [int], tuple[int, int]
    ]  # reserves blocks: gives the seed and the first one's number


class PackedConv2d(NamedTuple):
    """A convolution's weight in the layout that one device's kernels read for one geometry."""

    data: Any
    geometry: Conv2dGeometry
    dtype: np.dtype


# Elements from which on an elementwise pass is worth the launch of a kernel.
PARALLEL_SIZE = 1 << 16
ROW_SIZE = 1 << 12  # and those from which on a kernel is worth several passes along rows

_FLOAT32 = np.dtype(np.float32)

# By name: bfloat16 is a dtype of ml_dtypes, which is not imported before somebody uses it.
_DTYPES = {
    "cpu": ("float32", "float64"),
    "cuda": ("float16", "bfloat16", "float32", "float64"),
}


def conv2d(
    x: Array,
    weight: Array | PackedConv2d,
    bias: Array | None,
    geometry: Conv2dGeometry,
    *,
    residual: Array | None = None,
    relu: bool = False,
) -> Array:
    """Cross-correlate x (N, C, H, W) with weight (K, C / groups, R, S), add bias (K,) and residual.

    weight may also be what `pack_conv2d` made for this geometry. With `relu`, negative results
    become 0. bias and residual may be None. Returns (N, K, out_height, out_width).
    """
    arrays = _check_conv2d("conv2d", x, weight, bias, geometry)
    if residual is not None:
        _check_shape("conv2d", "residual", residual, geometry.output_shape)
        arrays["residual"] = residual
    module = _module("conv2d", "conv2d", **arrays)
    return module.conv2d(x, weight, bias, geometry, residual=residual, relu=relu)


def conv2d_moments(
    x: Array, weight: Array | PackedConv2d, bias: Array | None, geometry: Conv2dGeometry
) -> tuple[Array, Array, Array]:
    """Give conv2d's result and its mean and biased variance by channel, both float64 (K,).

    They are gathered while the result is in cache. Of an empty batch they are 0.
    """
    arrays = _check_conv2d("conv2d", x, weight, bias, geometry)
    return _module("conv2d", "conv2d", **arrays).conv2d_moments(x, weight, bias, geometry)


def pack_conv2d(weight: Array, geometry: Conv2dGeometry) -> PackedConv2d:
    """Lay weight (K, C / groups, R, S) out once for many convolutions of this geometry."""
    _check_shape("conv2d", "weight", weight, geometry.weight_shape)
    module = _module("conv2d", "conv2d", weight=weight)
    return PackedConv2d(module.pack_conv2d(weight, geometry), geometry, weight.dtype)


def conv2d_grad_input(
    grad: Array, weight: Array, geometry: Conv2dGeometry, onto: Array | None = None
) -> Array:
    """Give conv2d's gradient by x, (N, C, H, W), for grad (N, K, out_height, out_width).

    It is added to `onto`, shaped like x, where that is given.
    """
    name = "conv2d_grad_input"
    _check_shape(name, "grad", grad, geometry.output_shape)
    _check_shape(name, "weight", weight, geometry.weight_shape)
    arrays = {"grad": grad, "weight": weight}
    if onto is not None:
        _check_shape(name, "onto", onto, geometry.input_shape)
        arrays["onto"] = onto
    return _module(name, "conv2d", **arrays).conv2d_grad_input(grad, weight, geometry, onto)


def conv2d_grad_weight(
    grad: Array, x: Array, geometry: Conv2dGeometry, dtype: np.dtype | None = None
) -> Array:
    """Give conv2d's gradient by weight, (K, C / groups, R, S), for grad shaped like its output.

    Its dtype is theirs, or `dtype`: float32 of 16-bit arrays, on CUDA.
    """
    name = "conv2d_grad_weight"
    _check_shape(name, "grad", grad, geometry.output_shape)
    _check_shape(name, "x", x, geometry.input_shape)
    module = _module(name, "conv2d", grad=grad, x=x)
    if dtype is None or dtype == x.dtype:
        return module.conv2d_grad_weight(grad, x, geometry)
    return module.conv2d_grad_weight(grad, x, geometry, dtype)


def max_pool2d(x: Array, geometry: Pool2dGeometry) -> tuple[Array, Array]:
    """Give the largest pixel of each window of x (N, C, H, W), and where it stands.

    The positions are int32, h * W + w in the input plane. The first of equal pixels wins; NaN
    beats all, the last NaN of a window other NaNs; padding never wins. Both results are
    (N, C, out_height, out_width).
    """
    _check_shape("max_pool2d", "x", x, geometry.input_shape)
    return _module("max_pool2d", "pooling", x=x).max_pool2d(x, geometry)


def max_pool2d_scatter(grad: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    """Sum grad at the positions that max_pool2d gave: its gradient by x, (N, C, H, W).

    grad and indices are (N, C, out_height, out_width). A position outside its window adds nothing.
    """
    name = "max_pool2d_scatter"
    _check_shape(name, "grad", grad, geometry.output_shape)
    _check_shape(name, "indices", indices, geometry.output_shape)
    return _module(name, "pooling", grad=grad).max_pool2d_scatter(grad, indices, geometry)


def max_pool2d_gather(x: Array, indices: Array, geometry: Pool2dGeometry) -> Array:
    """Take the pixels of x (N, C, H, W) at the positions that max_pool2d gave: scatter's adjoint.

    indices and the result are (N, C, out_height, out_width).
    """
    name = "max_pool2d_gather"
    _check_shape(name, "x", x, geometry.input_shape)
    _check_shape(name, "indices", indices, geometry.output_shape)
    return _module(name, "pooling", x=x).max_pool2d_gather(x, indices, geometry)


def avg_pool2d(x: Array, geometry: Pool2dGeometry) -> Array:
    """Average the windows of x (N, C, H, W); the geometry says what padding counts for.

    Returns (N, C, out_height, out_width).
    """
    _check_shape("avg_pool2d", "x", x, geometry.input_shape)
    return _module("avg_pool2d", "pooling", x=x).avg_pool2d(x, geometry)


def avg_pool2d_grad(grad: Array, geometry: Pool2dGeometry) -> Array:
    """Give avg_pool2d's gradient, (N, C, H, W), for grad (N, C, out_height, out_width)."""
    _check_shape("avg_pool2d_grad", "grad", grad, geometry.output_shape)
    return _module("avg_pool2d_grad", "pooling", grad=grad).avg_pool2d_grad(grad, geometry)


def batch_norm_act(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    residual: Array | None,
    relu: bool,
    eps: float,
    moments: tuple[Array, Array] | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.0,
    batches: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Normalize each channel of x (N, C, H, W) by its own mean and biased variance.

    Vectors are (C,), and with 16-bit x may be float32; weight, bias, residual, shaped like x, and
    the running statistics may be None. moments are mean and variance as `conv2d_moments` gives
    them, where they are known already. Returns out = (x - mean) * inv_std * weight + bias +
    residual, with relu at least 0; mean and inv_std = 1 / sqrt(var + eps), float32 for 16-bit x;
    and what the gradient kernel of this device has to know of relu beside out, or None. Running
    statistics move in place by the share `momentum`, the variance towards the unbiased one; an
    empty batch, of mean and variance 0, leaves them as they are. batches, int64 (1,), grows by one.
    """
    name = "batch_norm_act"
    vectors = {"weight": weight, "bias": bias}
    vectors |= {"running_mean": running_mean, "running_var": running_var}
    module = _normalization(name, x, residual, vectors)
    _check_batches(name, batches)
    if moments is not None:
        _check_channels(name, x, mean=moments[0], var=moments[1])
    return module.batch_norm_act(
        *(x, weight, bias, residual, relu, eps, moments),
        *(running_mean, running_var, momentum, batches),
    )


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
    """Give batch_norm_act's gradients by x, weight, bias and, if wanted, residual (else None).

    grad is shaped like x (N, C, H, W). out, mean, inv_std and passed, in this order, are the
    results of batch_norm_act; mean and inv_std depend on x, which the gradient counts, out and
    passed are read with relu only. Gradients by weight and bias have weight's dtype, without one
    that of mean. The residual's may be grad itself.
    """
    name = "batch_norm_act_grad"
    _check_channels(name, x, mean=mean, inv_std=inv_std)
    _check_shape(name, "grad", grad, x.shape)
    arrays = {"grad": grad}
    if relu:
        _check_shape(name, "out", out, x.shape)
        arrays["out"] = out
    module = _normalization(name, x, None, {"weight": weight}, **arrays)
    return module.batch_norm_act_grad(
        grad, x, out, passed, weight, mean, inv_std, relu, wants_residual
    )


def batch_norm_relu_max_pool(
    x: Array,
    weight: Array | None,
    bias: Array | None,
    eps: float,
    geometry: Pool2dGeometry,
    moments: tuple[Array, Array] | None = None,
    running_mean: Array | None = None,
    running_var: Array | None = None,
    momentum: float = 0.0,
    batches: Array | None = None,
) -> tuple[Array, Array, Array, Array, Array | None]:
    """Give max_pool2d of batch_norm_act with relu, in fewer passes where the device has a kernel.

    Arguments are theirs, the geometry is the pool's. Returns out, mean, inv_std, and two arrays
    that the gradient kernel reads: which pixels won, and what they were, or None. Of pixels that
    are equal but for rounding any may win.
    """
    name = "batch_norm_relu_max_pool"
    _check_shape(name, "x", x, geometry.input_shape)
    vectors = {"weight": weight, "bias": bias}
    vectors |= {"running_mean": running_mean, "running_var": running_var}
    module = _normalization(name, x, None, vectors, family="normalized_pool")
    _check_batches(name, batches)
    if moments is not None:
        _check_channels(name, x, mean=moments[0], var=moments[1])
    return module.batch_norm_relu_max_pool(
        *(x, weight, bias, eps, geometry, moments),
        *(running_mean, running_var, momentum, batches),
    )


def batch_norm_relu_max_pool_grad(
    grad: Array,
    x: Array,
    out: Array,
    winners: Array,
    peaks: Array | None,
    weight: Array | None,
    bias: Array | None,
    mean: Array,
    inv_std: Array,
    geometry: Pool2dGeometry,
) -> tuple[Array, Array, Array]:
    """Give batch_norm_relu_max_pool's gradients by x, weight and bias.

    grad is shaped like out; out, mean, inv_std, winners and peaks, in this order, are its results.
    """
    name = "batch_norm_relu_max_pool_grad"
    _check_shape(name, "x", x, geometry.input_shape)
    for key, array in (("grad", grad), ("out", out), ("winners", winners)):
        _check_shape(name, key, array, geometry.output_shape)
    _check_channels(name, x, mean=mean, inv_std=inv_std)
    vectors = {"weight": weight, "bias": bias}
    arrays = {"grad": grad, "out": out}
    module = _normalization(name, x, None, vectors, family="normalized_pool", **arrays)
    return module.batch_norm_relu_max_pool_grad(
        grad, x, out, winners, peaks, weight, bias, mean, inv_std, geometry
    )


def winning_positions(winners: Array, geometry: Pool2dGeometry) -> Array:
    """Give, as `max_pool2d` does, the positions of batch_norm_relu_max_pool's winners.

    Where relu let nothing through a position may be -1.
    """
    module = _import_family(place(winners), "normalized_pool")
    return module.winning_positions(winners, geometry)


def scale_shift(
    x: Array, scale: Array, shift: Array, residual: Array | None = None, relu: bool = False
) -> Array:
    """Give x * scale + shift by channel, plus residual, with relu at least 0.

    x and residual are (N, C, H, W), scale and shift (C,), with 16-bit x of its dtype or float32.
    """
    module = _normalization("scale_shift", x, residual, {"scale": scale, "shift": shift})
    return module.scale_shift(x, scale, shift, residual, relu)


def weigh(x: Array, positions: np.ndarray, weights: np.ndarray, axis: int) -> Array:
    """Sum pixels of x along an axis: out[p] is the sum of weights[p, t] * x[positions[p, t]].

    positions and weights are (out, taps), both NumPy's whatever x is; a position of -1 stands for
    no pixel. x that is not floating point takes one pixel for each output, its weight 1. Raises
    ValueError for positions outside of x.
    """
    if positions.size and not -1 <= positions.min() <= positions.max() < x.shape[axis]:
        raise ValueError(
            f"weigh: positions must lie in x (-1 <= positions < x.shape[{axis}]); got "
            f"x.shape={tuple(x.shape)}, positions from {positions.min()} to {positions.max()}"
        )
    _check_shape("weigh", "weights", weights, positions.shape)
    return _import_family(place(x), "resize").weigh(x, positions, weights, axis)


def softmax_cross_entropy(x: Array, target: Array) -> tuple[Array, Array]:
    """Give -log(softmax(x)) of the class target for each row of x (rows, classes), and what it took.

    target (rows,) holds integers in [0, classes), unchecked. Returns losses (rows,) and shifts
    (rows, 2), x's maximum and the logarithm of the sum of exp(x - maximum) by row, float32 where x
    has 16 bits.
    """
    _check_shape("softmax_cross_entropy", "target", target, x.shape[:1])
    return _module("softmax_cross_entropy", "loss", x=x).softmax_cross_entropy(x, target)


def softmax_cross_entropy_grad(grad: Array, x: Array, target: Array, shifts: Array) -> Array:
    """Give softmax_cross_entropy's gradient by x (rows, classes), for grad (rows,)."""
    name = "softmax_cross_entropy_grad"
    for key, array in (("grad", grad), ("target", target)):
        _check_shape(name, key, array, x.shape[:1])
    _check_shape(name, "shifts", shifts, (x.shape[0], 2))
    module = _module(name, "loss", grad=grad, x=x)
    return module.softmax_cross_entropy_grad(grad, x, target, shifts)


def softmax(x: Array) -> Array:
    """Give exp(x) / sum of exp(x) along the last axis of x (..., n), which `has_row_kernels`."""
    return _module("softmax", "softmax", x=x).softmax(x)


def softmax_grad(grad: Array, out: Array) -> Array:
    """Give the gradient by x, shaped like grad and out, the result of softmax."""
    _check_shape("softmax_grad", "grad", grad, out.shape)
    return _module("softmax_grad", "softmax", grad=grad, out=out).softmax_grad(grad, out)


def log_softmax(x: Array) -> Array:
    """Give the logarithm of softmax along the last axis of x (..., n), which `has_row_kernels`."""
    return _module("log_softmax", "softmax", x=x).log_softmax(x)


def log_softmax_grad(grad: Array, out: Array) -> Array:
    """Give the gradient by x, shaped like grad and out, the result of log_softmax."""
    _check_shape("log_softmax_grad", "grad", grad, out.shape)
    return _module("log_softmax_grad", "softmax", grad=grad, out=out).log_softmax_grad(grad, out)


def sum_over(x: Array, axes: Sequence[int]) -> Array | None:
    """Give the sum over axes, counted from the front, or None if no kernel is worth it.

    Sums are made in float64, or in x's dtype of few elements and then in float64. The result has x's
    dtype and its other axes.
    """
    if place(x) != "cpu" or x.size < PARALLEL_SIZE or not has_kernels(x):
        return None
    return _import_family("cpu", "sums").sum_over(x, axes)


def layer_norm(
    x: Array, weight: Array | None, bias: Array | None, eps: float
) -> tuple[Array, Array, Array]:
    """Normalize the rows of x (rows, n), which `has_row_kernels`, by their mean and biased variance.

    weight and bias (n,) may be None. Returns out = (x - mean) * inv_std * weight + bias, mean and
    inv_std = 1 / sqrt(var + eps), both (rows,), float32 where x has 16 bits.
    """
    module = _layer_norm_module("layer_norm", x, weight=weight, bias=bias)
    return module.layer_norm(x, weight, bias, eps)


def layer_norm_grad(
    grad: Array,
    x: Array,
    weight: Array | None,
    mean: Array,
    inv_std: Array,
    wants_vectors: bool = True,
) -> tuple[Array, Array | None, Array | None]:
    """Give layer_norm's gradients by x and, if wanted, weight and bias, for grad shaped like x (rows, n).

    mean and inv_std (rows,) are its results; they depend on x, which the gradient counts.
    """
    name = "layer_norm_grad"
    _check_shape(name, "grad", grad, x.shape)
    for key, array in (("mean", mean), ("inv_std", inv_std)):
        _check_shape(name, key, array, x.shape[:1])
    module = _layer_norm_module(name, x, grad=grad, weight=weight)
    return module.layer_norm_grad(grad, x, weight, mean, inv_std, wants_vectors)


def class_scale(
    target: Array, weight: Array | None, ignore_index: int, classes: int, dtype: np.dtype
) -> tuple[Array, Array]:
    """Give targets that are classes for sure, and in dtype what each of them counts for.

    target holds integers, in any shape, weight (classes,), or None, what a class counts for, else 1.
    ignore_index counts for 0, what is not in [0, classes) for nan; both become class 0.
    """
    if weight is not None:
        _check_shape("class_scale", "weight", weight, (classes,))
    module = _import_family(place(target), "loss")
    return module.class_scale(target, weight, ignore_index, classes, dtype)


def sgd(
    values: Sequence[Array],
    grads: Sequence[Array],
    velocities: Sequence[Array],
    fresh: Sequence[bool],
    options: Mapping[str, Any],
) -> None:
    """Step all values, in place, along their velocities, which move by their gradients before.

    Arrays of one place in the sequences have one shape, all of them one device and dtype. options
    hold lr, momentum, dampening, weight_decay, nesterov and maximize; where the step is captured,
    they are looked up before each replay. g = +-grad + weight_decay * value; velocity = g where
    fresh, else momentum * velocity + (1 - dampening) * g; value -= lr * (g + momentum * velocity if
    nesterov else velocity). Without momentum velocities and fresh are not read, and may be empty.
    """
    _check_rows("sgd", values, grads=grads, velocities=velocities)
    module = _import_family(place(values[0]), "optimizer")
    module.sgd(values, grads, velocities, fresh, options)


def adam(
    values: Sequence[Array],
    grads: Sequence[Array],
    averages: Sequence[Array],
    squares: Sequence[Array],
    states: Sequence[Mapping[str, Any]],
    options: Mapping[str, Any],
    *,
    decoupled: bool,
) -> None:
    """Step all values, in place, along their averages, over the roots of their squares.

    Arrays of one place in the sequences have one shape, all of them one device and dtype; each of
    the states holds under "step" which step it is for its place, counted from 1. options hold lr,
    betas, eps, weight_decay and maximize; where the step is captured, both are looked up before
    each replay. g = +-grad + weight_decay * value; each average keeps its share beta and takes the
    rest of g or of its square; decoupled, weight_decay shrinks the value by lr * weight_decay.
    """
    _check_rows("adam", values, grads=grads, averages=averages, squares=squares)
    module = _import_family(place(values[0]), "optimizer")
    module.adam(values, grads, averages, squares, states, options, decoupled=decoupled)


def unscale(grads: Sequence[Array], factor: float) -> Array:
    """Multiply all arrays, of one device and dtype, in place; tell whether some are not finite.

    Gives a float32 array (1,): 1 if an element of any was infinite or nan, else 0.
    """
    return _import_family(place(grads[0]), "optimizer").unscale(grads, factor)


def cast_all(arrays: Sequence[Array], dtype: np.dtype) -> Sequence[Array]:
    """Convert floating point arrays of one dtype to another, in the memory order that they have."""
    return _import_family(place(arrays[0]), "layout").cast_all(arrays, dtype)


def copy_in_order(x: Array) -> Array:
    """Give a copy of x, of any dtype and strides, whose elements lie in C order."""
    return _import_family(place(x), "layout").copy_in_order(x)


def matmul(x: Array, y: Array) -> Array:
    """Give the matrix product of x (..., M, K) and y (..., K, N), of one dtype, which may be any.

    Leading axes broadcast; any strides are read as they are.
    """
    return _import_family(place(x), "matmul").matmul(x, y)


def erf(x: Array) -> Array:
    """Give the error function, 2 / sqrt(pi) * integral of exp(-t^2) from 0 to x, for any shape."""
    return _module("erf", "special", x=x).erf(x)


def add_at(name: str, out: Array, positions: Array, values: Array) -> None:
    """Add values (n,) to out, a contiguous vector, at positions (n,), which lie in it.

    Positions may repeat. On CUDA sums of one position are then made in any order, unless
    `settings.general.deterministic`: then in that of the values, as on the CPU. In a captured step
    that raises RuntimeError in the name of an operation.
    """
    _import_family(place(out), "indexing").add_at(name, out, positions, values)


def put_at(name: str, out: Array, positions: Array, values: Array) -> None:
    """Write values (n,), of out's dtype, as `add_at` adds them: the last one named stays."""
    _import_family(place(out), "indexing").put_at(name, out, positions, values)


def elementwise(name: str, *operands: Any) -> Array | None:
    """Give what a formula makes of each element in one pass, or None where no kernel is worth it.

    Operands are one or two arrays of one dtype, or an array and a number. The formulas are named as in
    the devices' modules: "exp", or "gelu_grad" of grad and x, whose results NumPy and CuPy would make
    in more passes or on one core. On the CPU they broadcast, and serve large arrays.
    """
    arrays = [operand for operand in operands if hasattr(operand, "dtype")]
    device = place(arrays[0])
    if device == "cpu" and all(array.size < PARALLEL_SIZE for array in arrays):
        return None
    return _import_family(device, "elementwise").elementwise(name, *operands)


def relu_grad(grad: Array, out: Array) -> Array:
    """Give grad where `out`, the result of relu, is not 0, and 0 elsewhere, for any shape."""
    by_x = elementwise("relu_grad", grad, out)
    return _import_family(place(grad), "activation").relu_grad(grad, out) if by_x is None else by_x


def random_uniform(out: Array, take: Take) -> None:
    """Fill out, C-contiguous and floating, with numbers drawn evenly from [0, 1).

    Numbers come from a stream of blocks, which Philox 4x32-10 makes of a seed and the block's number:
    the same ones on every device and on any number of threads. take(count) reserves so many blocks
    and returns (seed, number of the first); in a captured step it is called before each replay.
    """
    _fill("uniform", out, take, 2 if out.dtype.itemsize == 8 else 4)


def random_normal(out: Array, take: Take) -> None:
    """Fill out as `random_uniform`, with normally distributed numbers of mean 0 and variance 1."""
    _fill("normal", out, take, 2 if out.dtype.itemsize == 8 else 4)


def random_integers(out: Array, low: int, high: int, take: Take) -> None:
    """Fill out, C-contiguous int64, with integers drawn evenly from low to high - 1.

    The chance of each is off by less than 2^-64.
    """
    _fill("integers", out, take, 2, low, (high - low) % 2**64)


def random_bernoulli(out: Array, probability: float, take: Take) -> None:
    """Fill out, C-contiguous bool, with True at this probability, which is rounded to 32 bits."""
    _fill("bernoulli", out, take, 4, round(probability * 2**32))


def _fill(name: str, out: Array, take: Take, per_block: int, *numbers: int) -> None:
    size = out.size
    if size:
        fill = getattr(_import_family(place(out), "random"), name)
        fill(out, *numbers, partial(take, -(-size // per_block)))


def _check_conv2d(
    name: str,
    x: Array,
    weight: Array | PackedConv2d,
    bias: Array | None,
    geometry: Conv2dGeometry,
) -> dict[str, Array]:
    """Check the arguments of a forward convolution; give the arrays that must be of one kind."""
    _check_shape(name, "x", x, geometry.input_shape)
    arrays = {"x": x}
    if isinstance(weight, PackedConv2d):
        if weight.geometry[1:] != geometry[1:]:  # the batch may differ
            raise ValueError(
                f"{name}: a packed weight serves the geometry it was packed for; "
                f"got {weight.geometry}, expected {geometry}"
            )
    else:
        _check_shape(name, "weight", weight, geometry.weight_shape)
        arrays["weight"] = weight
    if bias is not None:
        _check_shape(name, "bias", bias, (geometry.out_channels,))
        arrays["bias"] = bias
    return arrays


def _module(name: str, family: str, **arrays: Array) -> ModuleType:
    """Give the module of a family of kernels for arrays of one kind and one dtype."""
    first, *others = arrays.values()
    device, dtype = place(first), first.dtype
    fits = _serves(device, dtype)
    for array in others:
        fits = fits and array.dtype == dtype
    if not fits:
        allowed = " or ".join(_DTYPES[device])
        got = ", ".join(f"{key}.dtype={array.dtype}" for key, array in arrays.items())
        raise TypeError(f"{name}: arrays must be of one dtype ({allowed} on {device}); got {got}")
    return _import_family(device, family)


def has_kernels(array: Array) -> bool:
    """Whether kernels of the array's device take its dtype."""
    return _serves(place(array), array.dtype)


def has_row_kernels(array: Array) -> bool:
    """Whether kernels that go along rows take an array and are worth it: on the CPU if it is large."""
    large = array.size >= (ROW_SIZE if place(array) == "cpu" else 1)
    return large and has_kernels(array)


@cache  # NumPy makes up a dtype's name anew whenever it is asked
def _serves(device: str, dtype: np.dtype) -> bool:
    return dtype.name in _DTYPES[device] and dtype.isnative


def _normalization(
    name: str,
    x: Array,
    residual: Array | None,
    vectors: dict[str, Array | None],
    family: str = "normalization",
    **arrays: Array,
) -> ModuleType:
    """Check x, what is shaped like it and vectors by channel; give the module of their kernels."""
    given = _check_channels(name, x, **vectors)
    if residual is not None:
        _check_shape(name, "residual", residual, x.shape)
        arrays["residual"] = residual
    if x.dtype.itemsize == 2 and {vector.dtype for vector in given.values()} == {_FLOAT32}:
        given = {}  # parameters of full precision beside 16-bit activations
    return _module(name, family, x=x, **arrays, **given)


def _layer_norm_module(name: str, x: Array, **others: Array | None) -> ModuleType:
    """Check vectors (n,) beside x (rows, n); give the module of their kernels."""
    given = {key: array for key, array in others.items() if array is not None}
    for key in given.keys() & {"weight", "bias"}:
        _check_shape(name, key, given[key], x.shape[1:])
    return _module(name, "layer_norm", x=x, **given)


def place(array: Array) -> str:
    """Return whose kernels compute with this array: "cpu" or "cuda"."""
    return "cpu" if isinstance(array, (np.ndarray, np.generic)) else "cuda"


@cache
def _import_family(device: str, family: str) -> ModuleType:
    return import_module(f"gradengine.kernels.{device}.{family}")


def _check_channels(name: str, x: Array, **vectors: Array | None) -> dict[str, Array]:
    """Check x (N, C, H, W) and vectors (C,); give the vectors that are not None."""
    if x.ndim != 4:
        raise ValueError(
            f"{name}: x must have four dimensions (x.ndim == 4); got x.shape={x.shape}"
        )
    shape = (x.shape[1],)
    given = {}
    for key, vector in vectors.items():
        if vector is not None:
            _check_shape(name, key, vector, shape)
            given[key] = vector
    return given


def _check_batches(name: str, batches: Array | None) -> None:
    if batches is not None:
        _check_shape(name, "batches", batches, (1,))
        if batches.dtype != np.int64:
            raise TypeError(f"{name}: batches must be int64; got batches.dtype={batches.dtype}")


def _check_rows(name: str, values: Sequence[Array], **rows: Sequence[Array]) -> None:
    """Check that each array of the rows has the shape of the value in its place."""
    shapes = [value.shape for value in values]
    for key, row in rows.items():
        if row and [array.shape for array in row] != shapes:
            for array, shape in zip(row, shapes, strict=True):
                _check_shape(name, key, array, shape)


def _check_shape(name: str, argument: str, array: Any, expected: tuple[int, ...]) -> None:
    if array.shape != expected:
        rule = f"{argument} must have the shape that fits ({argument}.shape == {expected})"
        raise ValueError(f"{name}: {rule}; got {argument}.shape={array.shape}")

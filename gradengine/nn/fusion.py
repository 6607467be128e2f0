"""Convolution, batch normalization, residual and activation as one step.

Where nothing needs a gradient, a convolution's weight is laid out for the kernel once and kept until
one of the tensors that it is made of is written. Where running statistics are taken too, normalization
is a scale and a shift by channel, and they are folded into that weight and the bias.
"""

from __future__ import annotations

from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from gradengine import kernels
from gradengine.autocast_mode import autocast_mode
from gradengine.devices import array_module, device_of
from gradengine.grad_mode import grad_mode
from gradengine.kernels import settings
from gradengine.kernels.cuda.capture import postpone, valid_while
from gradengine.kernels.geometry import Conv2dGeometry, conv2d_geometry, pool2d_geometry
from gradengine.nn.activation import ReLU
from gradengine.nn.convolution import Conv2d
from gradengine.nn.module import Module
from gradengine.nn.normalization import BatchNorm2d
from gradengine.nn.pooling import MaxPool2d
from gradengine.operation import operation
from gradengine.ops.convolution import conv2d_moments
from gradengine.precision import lowered
from gradengine.tensor import Tensor

# Of each convolution: what is laid out for a kernel may be four times as large as the weight.
KEPT_GEOMETRIES = 2


def conv_norm(
    x: Tensor,
    conv: Module,
    norm: Module,
    *,
    activation: Module | None = None,
    residual: Tensor | None = None,
    pool: Module | None = None,
) -> Tensor:
    """Return pool(activation(norm(conv(x)) + residual)), in fewer passes over memory where possible.

    It is possible for Conv2d, BatchNorm2d and ReLU on x (N, C, H, W), with a residual of the
    result's shape; anything else, or with a hook, is called as usual, one after the other. Results,
    gradients, running statistics and errors are the same but for rounding. In the graph,
    normalization, residual and ReLU are one node, NativeBatchNormBackward0 or, with a ReLU,
    BatchNormReluBackward0; with a MaxPool2d behind a batch's statistics and ReLU
    BatchNormReluMaxPoolBackward0. Without gradients, conv's weight is laid out for the kernel, with
    norm by running statistics folded in, and kept that way until a tensor of either is written: who
    writes to `array` without operations calls `written()`.
    """
    if pool is not None and not _pools_at_once(conv, norm, activation, residual, pool):
        return pool(conv_norm(x, conv, norm, activation=activation, residual=residual))
    tensors = _tensors(conv, norm)
    if tensors is None or not (isinstance(x, Tensor) and x.array.ndim == 4):
        out = _activate(norm(conv(x)), activation, residual)
        return out if pool is None else pool(out)
    if autocast_mode.dtype is not None:
        x = lowered(x)
    geometry = conv2d_geometry(
        *(x.array.shape, tensors[0].array.shape),
        *(conv.stride, conv.padding, conv.dilation, conv.groups),
    )
    if residual is not None and not _is_like(residual, x, geometry.output_shape):
        return _activate(conv_norm(x, conv, norm), activation, residual)
    fused = activation is not None and _is_plain(activation, ReLU)
    folded, running = None, norm._takes_running_statistics()
    if _want_gradient(*tensors):
        if conv in _KEPT:  # they train, and so what is kept would soon be stale
            del _KEPT[conv]
    elif not _want_gradient(x, residual):
        parts = tensors if running else (*tensors[:2], *_NO_NORM)
        folded = _folded(x, conv, parts, norm.eps, geometry)
    if folded is None or not running:
        out = _normalized(x, conv, norm, geometry, residual, fused, pool, folded)
    else:
        out = _folded_conv2d(
            x, folded.bias, residual, weight=folded.weight, geometry=geometry, relu=fused
        )
    return out if fused or activation is None else activation(out)


def _is_plain(module: Module, kind: type[Module]) -> bool:
    """Whether calling the module does what `kind` says, and nothing else."""
    own = module.__dict__
    return type(module) is kind and not (
        own["_forward_pre_hooks"]
        or own["_forward_hooks"]
        or own["_backward_hooks"]
        or "forward" in own
    )


def _tensors(conv: Module, norm: Module) -> tuple[Any, ...] | None:
    """Return what plain modules compute with, or None: in the order of `_fold`'s parameters."""
    if not (_is_plain(conv, Conv2d) and _is_plain(norm, BatchNorm2d)):
        return None
    weights, scales, statistics = conv._parameters, norm._parameters, norm._buffers
    try:
        tensors = (
            *(weights["weight"], weights["bias"], scales["weight"], scales["bias"]),
            *(statistics["running_mean"], statistics["running_var"]),
        )
    except KeyError:  # replaced by something that is no parameter or no buffer
        return None
    return None if tensors[0] is None else tensors


def _is_like(residual: Any, x: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether residual is a tensor of this shape and of x's dtype, on its kind of device."""
    return (
        isinstance(residual, Tensor)
        and residual.array.shape == shape
        and residual.array.dtype == x.array.dtype
        and type(residual.array) is type(x.array)
    )


def _activate(out: Tensor, activation: Module | None, residual: Tensor | None) -> Tensor:
    if residual is not None:
        out = out + residual
    return out if activation is None else activation(out)


def _pools_at_once(
    conv: Module,
    norm: Any,
    activation: Module | None,
    residual: Tensor | None,
    pool: Any,
) -> bool:
    """Whether the pool has a part in the normalization's step."""
    return (
        residual is None
        and _tensors(conv, norm) is not None
        and not norm._takes_running_statistics()
        and activation is not None
        and _is_plain(activation, ReLU)
        and _is_plain(pool, MaxPool2d)
        and not pool.return_indices
    )


def _normalized(
    x: Tensor,
    conv: Any,
    norm: Any,
    geometry: Conv2dGeometry,
    residual: Tensor | None,
    relu: bool,
    pool: Any,
    packed: _Folded | None,
) -> Tensor:
    """Convolve and record it; gather a batch's statistics, where they are wanted, on the way."""
    if norm._takes_running_statistics():
        return norm._normalize(conv.forward(x), residual=residual, relu=relu)
    if packed is None:
        out, moments = conv2d_moments(x, conv.weight, conv.bias, geometry)
    else:
        moments = []
        out = _packed_conv2d_moments(
            x, packed.bias, weight=packed.weight, geometry=geometry, moments=moments
        )
    epilogue = {"residual": residual, "relu": relu, "moments": moments}
    if pool is not None:
        epilogue["pool"] = pool2d_geometry(
            *("max_pool2d", out.array.shape, pool.kernel_size, pool.stride),
            *(pool.padding, pool.dilation, pool.ceil_mode),
        )
    return norm._normalize(out, **epilogue)


# ---- without gradients: folded weights -----------------------------------------------------------


_NO_NORM = (None,) * 4  # in place of a norm's tensors: nothing is folded in


class _Folded:
    """A convolution's weight, packed, and bias, a norm folded in or not, and what they came from."""

    __slots__ = (
        *("arrays", "bias", "dtype", "eps", "geometry"),
        *("settings", "stamps", "tensors", "weight"),
    )

    def __init__(
        self, tensors: tuple[Any, ...], eps: float, geometry: Conv2dGeometry, dtype: Any
    ) -> None:
        self.tensors = tensors
        # Stamps before values: what another thread writes meanwhile shows at the next call.
        self.stamps = [None if tensor is None else tensor.version().stamp for tensor in tensors]
        self.arrays = [None if tensor is None else tensor.array for tensor in tensors]
        self.eps = eps
        self.geometry = geometry
        self.dtype = dtype
        self.settings = _settings()
        self.weight, self.bias = _fold(*self.arrays, eps=eps, geometry=geometry, dtype=dtype)

    def serves(
        self, tensors: tuple[Any, ...], eps: float, geometry: Conv2dGeometry, dtype: Any
    ) -> bool:
        """Whether this is what these tensors, as they are now, fold to; the batch may differ."""
        return (
            self.eps == eps
            and self.dtype == dtype
            and self.settings == _settings()
            and (self.geometry is geometry or self.geometry[1:] == geometry[1:])
            and all(map(is_, self.tensors, tensors))
            and self.is_current()
        )

    def is_current(self) -> bool:
        """Whether nothing was written or replaced since."""
        for tensor, array, stamp in zip(self.tensors, self.arrays, self.stamps, strict=True):
            if tensor is not None and (
                tensor.array is not array or tensor.version().stamp != stamp
            ):
                return False
        return True


def _settings() -> dict[str, Any]:
    """Return what chooses the kernel that a weight is laid out for."""
    return vars(settings.cpu) | vars(settings.cuda)


# Beside the modules, not in them: it is no part of a copy, a pickle or a state dict.
_KEPT: WeakKeyDictionary[Module, tuple[_Folded, ...]] = WeakKeyDictionary()


def _folded(
    x: Tensor, conv: Module, tensors: tuple[Any, ...], eps: float, geometry: Conv2dGeometry
) -> _Folded | None:
    """Return what is kept for these tensors, or make it; None where the modules would refuse x."""
    kept = _KEPT.get(conv, ())
    dtype, lower = tensors[0].array.dtype, autocast_mode.dtype
    if lower is not None and x.array.dtype == lower and dtype.itemsize < 8:
        dtype = lower  # what the weight would be converted to
    for folded in kept:
        if folded.serves(tensors, eps, geometry, dtype):
            break
    else:
        if not _can_fold(tensors, geometry):
            return None
        postpone()  # replays would fold each time
        folded = _Folded(tensors, eps, geometry, dtype)
        others = [other for other in kept if other.is_current()]
        _KEPT[conv] = (folded, *others[: KEPT_GEOMETRIES - 1])
    valid_while(folded.is_current)
    is_like = folded.dtype == x.array.dtype and type(folded.arrays[0]) is type(x.array)
    return folded if is_like else None


def _can_fold(tensors: tuple[Any, ...], geometry: Conv2dGeometry) -> bool:
    """Whether running statistics are there, vectors have the shape, and all dtype and device."""
    arrays = [tensor.array for tensor in tensors if tensor is not None]
    return (
        (tensors[-1] is None) == (tensors[-2] is None)
        and all(array.shape == (geometry.out_channels,) for array in arrays[1:])
        and len({(array.dtype, device_of(array)) for array in arrays}) == 1
    )


@operation
def _fold(weight, bias, scale, shift, mean, var, *, eps, geometry, dtype):
    """Return norm(conv(x)) as one convolution: its weight, packed, and its bias (K,), in dtype.

    Without mean and var it is conv(x), whose bias may be None.
    """
    if var is None:
        packed = kernels.pack_conv2d(weight.astype(dtype, copy=False), geometry)
        return packed, None if bias is None else bias.astype(dtype)
    xp = array_module(weight)
    factor = 1 / xp.sqrt(var.astype(np.float64) + eps)
    if scale is not None:
        factor *= scale
    offset = -mean if bias is None else bias - mean
    offset = offset * factor if shift is None else offset * factor + shift
    weight = (weight * factor[:, None, None, None]).astype(dtype)
    return kernels.pack_conv2d(weight, geometry), offset.astype(dtype)


@operation
def _folded_conv2d(x, bias, residual, *, weight, geometry, relu):
    return kernels.conv2d(x, weight, bias, geometry, residual=residual, relu=relu)


@operation
def _packed_conv2d_moments(x, bias, *, weight, geometry, moments):
    """Convolve, and put mean and variance of the result by channel into the list `moments`."""
    out, *moments[:] = kernels.conv2d_moments(x, weight, bias, geometry)
    return out


def _want_gradient(*tensors: Tensor | None) -> bool:
    if grad_mode.enabled:
        for tensor in tensors:
            if tensor is not None and tensor.node is not None:
                return True
    return False

"""Tensor: an array with operators, methods and a place on the tape; Parameter: a module's tensor.

Every method that computes is an operation's public function, put under its name: `Tensor.exp` is
`gradengine.exp`. What stands written out here is about the tensor itself.
"""

from __future__ import annotations

import builtins
import copy
import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from gradengine import devices, dtypes, in_place
from gradengine.backward_walk import accumulate_gradients
from gradengine.ops import (
    activation,
    comparison,
    conversion,
    elementwise,
    indexing,
    joining,
    random,
    reduction,
    sorting,
)

# A class body that defines `matmul` and `shape` cannot also call the modules that.
from gradengine.ops import matmul as products
from gradengine.ops import shape as shaping
from gradengine.printing import tensor_repr
from gradengine.tape import Variable


def _reflected(operation: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, other: operation(other, self)


def _spread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method whose sizes or dims may be spelled out as well as given in one tuple."""

    @functools.wraps(function)
    def method(self: Tensor, *sizes: Any) -> Any:
        return function(self, _one_tuple(sizes))

    return method


def _one_tuple(sizes: tuple[Any, ...]) -> Any:
    return sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def _in_place(function: Callable[..., Any], name: str = "") -> Callable[..., Any]:
    """Return the method that writes `function`'s result into the tensor's memory."""
    name = name or f"{function.__name__}_"

    def method(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        source = self
        if in_place.is_recorded(self, *args, *kwargs.values()):
            in_place.check_recorded_write(name, self)
            # Backward may need what is overwritten: of this tensor, and of arguments that share it.
            source = _copied_if_shared(self, self)
            args = tuple(_copied_if_shared(arg, self) for arg in args)
            kwargs = {key: _copied_if_shared(arg, self) for key, arg in kwargs.items()}
        return self._write(function(source, *args, **kwargs), name)

    method.__name__ = name
    method.__doc__ = f"Do `{function.__name__}` in place: the result must have this tensor's shape."
    return method


def _copied_if_shared(value: Any, written: Tensor) -> Any:
    """Return `value`, on a copy of its memory if `written` has the same."""
    shared = isinstance(value, Variable) and value.version() is written.version()
    return Tensor(value.array.copy(), value.node) if shared else value


class Tensor(Variable):
    """A NumPy or CuPy array that can be differentiated.

    `Tensor(array)` wraps without a copy; `gradengine.tensor(data)` copies and chooses dtype and device.
    """

    __slots__ = ()
    __array_ufunc__ = None  # so that ndarray + Tensor asks Tensor.__radd__
    __array_priority__ = 1000  # likewise for CuPy

    # -- what it is

    @property
    def shape(self) -> tuple[builtins.int, ...]:
        """The size of each axis."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the elements, as a NumPy dtype."""
        return self.array.dtype

    @property
    def device(self) -> devices.Device:
        """Where the array lives."""
        return devices.device_of(self.array)

    @property
    def ndim(self) -> builtins.int:
        """The number of axes."""
        return self.array.ndim

    @property
    def is_cuda(self) -> builtins.bool:
        """Whether the array lives on a GPU."""
        return self.device.type == "cuda"

    @property
    def itemsize(self) -> builtins.int:
        """The size of one element, in bytes."""
        return self.array.itemsize

    @property
    def nbytes(self) -> builtins.int:
        """The size of all elements, in bytes."""
        return self.array.nbytes

    @property
    def data(self) -> Tensor:
        """This memory without the tape. A write through it is noticed, unlike through PyTorch's `.data`."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if value.shape != self.shape and not self.is_leaf:
            raise RuntimeError(
                "data: only a leaf may change its shape; "
                f"got data.shape={value.shape}, tensor.shape={self.shape}"
            )
        self.array = value.array
        self._counter, self._view = value.version(), None
        if self.node is not None and self.node.leaf is not None:
            self.node.shape, self.node.dtype = self.shape, self.dtype
        self.written("data")

    @property
    def T(self) -> Any:
        """All axes reversed, as a view."""
        return shaping.permute(self, tuple(range(self.ndim))[::-1])

    @property
    def mT(self) -> Any:
        """The last two axes swapped, as a view."""
        return shaping.transpose(self, -2, -1)

    def size(self, dim: builtins.int | None = None) -> Any:
        """Return the shape, or the size of axis `dim`."""
        return self.shape if dim is None else self.shape[dim]

    def stride(self, dim: builtins.int | None = None) -> Any:
        """Return the steps in memory along each axis, or along `dim`, in elements."""
        strides = tuple(step // self.itemsize for step in self.array.strides)
        return strides if dim is None else strides[dim]

    def dim(self) -> builtins.int:
        """Return the number of axes."""
        return self.array.ndim

    def numel(self) -> builtins.int:
        """Return the number of elements."""
        return self.array.size

    nelement = numel

    def element_size(self) -> builtins.int:
        """Return the size of one element, in bytes."""
        return self.array.itemsize

    def is_contiguous(self) -> builtins.bool:
        """Return whether the elements lie in memory in C order."""
        return builtins.bool(self.array.flags.c_contiguous)

    def is_floating_point(self) -> builtins.bool:
        """Return whether the dtype is a float."""
        return dtypes.is_floating_point(self.array.dtype)

    def backward(
        self,
        gradient: Any = None,
        retain_graph: bool | None = None,
        create_graph: bool = False,
        inputs: Any = None,
    ) -> None:
        """Add the gradient of this tensor to `grad` of every leaf that it depends on.

        `gradient` has this tensor's shape and weighs its elements; a tensor of one element can do without.
        `retain_graph` keeps the saved values for another pass (default: as `create_graph`), `create_graph`
        records the pass itself for higher derivatives, and `inputs` (a tensor or several) confines
        accumulation to these. Raises RuntimeError where nothing requires a gradient or the graph was freed.
        """
        accumulate_gradients((self,), (gradient,), retain_graph, create_graph, inputs)

    # -- out of the engine

    def numpy(self) -> np.ndarray:
        """Return the NumPy array underneath, sharing memory.

        Raises RuntimeError if this tensor requires grad, TypeError if it lives on a GPU.
        """
        if self.requires_grad:
            raise RuntimeError(
                "numpy: can't call numpy() on Tensor that requires grad, since its gradient would be lost; "
                "use tensor.detach().numpy()"
            )
        if self.is_cuda:
            raise TypeError(
                f"numpy: can't convert a tensor on {self.device} to numpy; use tensor.cpu() first"
            )
        return self.array

    def __array__(self, dtype: Any = None, copy: builtins.bool | None = None) -> np.ndarray:
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if not self.is_cuda:
            raise AttributeError(f"__cuda_array_interface__: this tensor lives on {self.device}")
        if self.requires_grad:
            raise RuntimeError(
                "__cuda_array_interface__: can't export a Tensor that requires grad; use tensor.detach()"
            )
        return self.array.__cuda_array_interface__

    def __dlpack__(self, **options: Any) -> Any:
        if self.requires_grad:
            raise BufferError(
                "__dlpack__: can't export tensors that require gradient, use tensor.detach()"
            )
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[builtins.int, int]:
        return self.array.__dlpack_device__()

    def item(self) -> Any:
        """Return the only element as a Python number. Waits for the GPU.

        Raises RuntimeError if there are more, or none.
        """
        if self.array.size != 1:
            raise RuntimeError(
                f"item: a Tensor with {self.array.size} elements cannot be converted to Scalar"
            )
        return self.array.item()

    def tolist(self) -> Any:
        """Return the elements as nested lists of Python numbers. Waits for the GPU."""
        return self.array.tolist()

    def __bool__(self) -> builtins.bool:
        if self.array.size != 1:
            raise RuntimeError(
                f"bool: Boolean value of Tensor with {self.array.size} elements is ambiguous; "
                "use any() or all()"
            )
        return builtins.bool(self.array.item())

    def __float__(self) -> builtins.float:
        return builtins.float(self.item())

    def __int__(self) -> builtins.int:
        return builtins.int(self.item())

    def __index__(self) -> builtins.int:
        if self.array.dtype.kind not in "iu":
            raise TypeError(f"index: only integer tensors can be an index; got dtype={self.dtype}")
        return self.item()

    def __format__(self, specification: str) -> str:
        return format(self.item() if self.ndim == 0 else str(self), specification)

    def __len__(self) -> builtins.int:
        if self.ndim == 0:
            raise TypeError("len: len() of a 0-d tensor")
        return self.shape[0]

    def __iter__(self) -> Iterator[Any]:
        if self.ndim == 0:
            raise TypeError("iter: iteration over a 0-d tensor")
        return iter(joining.unbind(self))

    def __contains__(self, value: Any) -> builtins.bool:
        return builtins.bool((self.array == conversion.array_of(value)).any())

    __hash__ = object.__hash__

    def __eq__(self, other: object) -> Any:
        comparable = isinstance(other, (Variable, builtins.int, builtins.float)) or hasattr(
            other, "dtype"
        )
        return comparison.eq(self, other) if comparable else NotImplemented

    def __ne__(self, other: object) -> Any:
        comparable = isinstance(other, (Variable, builtins.int, builtins.float)) or hasattr(
            other, "dtype"
        )
        return comparison.ne(self, other) if comparable else NotImplemented

    def __repr__(self) -> str:
        return tensor_repr(self.array, requires_grad=self.requires_grad, grad_fn=self.grad_fn)

    def __deepcopy__(self, memo: dict[builtins.int, Any]) -> Any:
        if not self.is_leaf:
            raise RuntimeError(
                "deepcopy: only Tensors created explicitly by the user (graph leaves) can be copied; "
                "use tensor.detach() or tensor.clone()"
            )
        duplicate = _rebuild(type(self), self.array.copy(order="K"), self.requires_grad)
        memo[id(self)] = duplicate
        duplicate._grad = copy.deepcopy(self._grad, memo)
        return duplicate

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not self.is_leaf:
            raise RuntimeError("pickle: only graph leaves can be pickled; use tensor.detach()")
        return _rebuild, (type(self), self.array, self.requires_grad)

    # -- others like it

    def new_full(
        self, size: Any, fill_value: Any, *, dtype: Any = None, device: Any = None
    ) -> Tensor:
        """Return a tensor of shape `size` filled with `fill_value`, by default of this dtype and device."""
        array = np.full(size, fill_value, dtypes.as_dtype(self.dtype if dtype is None else dtype))
        return Tensor(devices.to_device(array, self.device if device is None else device))

    def new_zeros(self, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        """Return a tensor of zeros, by default of this dtype and device."""
        return self.new_full(_one_tuple(size), 0, dtype=dtype, device=device)

    def new_ones(self, *size: Any, dtype: Any = None, device: Any = None) -> Tensor:
        """Return a tensor of ones, by default of this dtype and device."""
        return self.new_full(_one_tuple(size), 1, dtype=dtype, device=device)

    # -- dtype and device

    def to(
        self,
        *args: Any,
        dtype: Any = None,
        device: Any = None,
        non_blocking: builtins.bool = False,
        copy: builtins.bool = False,
    ) -> Tensor:
        """Return this tensor with another dtype, on another device, or as another tensor has them.

        Takes `to(device)`, `to(dtype)`, `to(device, dtype)` or `to(other)`. Returns self if nothing changes,
        unless `copy`; otherwise a differentiable copy. `non_blocking` is accepted for PyTorch's sake.
        """
        for argument in args:
            if isinstance(argument, Variable):
                device, dtype = devices.device_of(argument.array), argument.array.dtype
            elif _names_device(argument):
                device = argument
            else:
                dtype = argument
        result = self
        if device is not None:
            result = conversion.to_device(result, device)
        if dtype is not None:
            result = conversion.to_dtype(result, dtype)
        return shaping.clone(self) if result is self and copy else result

    def cpu(self) -> Tensor:
        """Return this tensor on the CPU."""
        return conversion.to_device(self, "cpu")

    def cuda(self, device: Any = "cuda", non_blocking: builtins.bool = False) -> Tensor:
        """Return this tensor on a GPU, as `to` does. Raises RuntimeError that says why if there is none."""
        return conversion.to_device(self, device)

    def type(self, dtype: Any) -> Tensor:
        """Return this tensor as `dtype`."""
        return conversion.to_dtype(self, dtype)

    def type_as(self, other: Tensor) -> Tensor:
        """Return this tensor with `other`'s dtype."""
        return conversion.to_dtype(self, other.dtype)

    def float(self) -> Tensor:
        """Return this tensor as float32."""
        return conversion.to_dtype(self, dtypes.float32)

    def double(self) -> Tensor:
        """Return this tensor as float64."""
        return conversion.to_dtype(self, dtypes.float64)

    def half(self) -> Tensor:
        """Return this tensor as float16."""
        return conversion.to_dtype(self, dtypes.float16)

    def bfloat16(self) -> Tensor:
        """Return this tensor as bfloat16."""
        return conversion.to_dtype(self, dtypes.bfloat16)

    def long(self) -> Tensor:
        """Return this tensor as int64."""
        return conversion.to_dtype(self, dtypes.int64)

    def int(self) -> Tensor:
        """Return this tensor as int32."""
        return conversion.to_dtype(self, dtypes.int32)

    def bool(self) -> Tensor:
        """Return this tensor as bool."""
        return conversion.to_dtype(self, dtypes.bool_)

    # -- in place

    def _write(self, result: Any, name: str) -> Any:
        """Put a result computed from this tensor into its memory, and take over its place on the tape."""
        recorded = in_place.is_recorded(self, result)
        if recorded:
            in_place.check_recorded_write(name, self)
        if result.shape != self.shape:
            raise RuntimeError(
                f"{name}: output with shape of the tensor doesn't match the broadcast shape; "
                f"got tensor.shape={self.shape}, result.shape={result.shape}"
            )
        if not dtypes.can_hold(self.dtype, result.dtype):
            raise RuntimeError(
                f"{name}: result dtype can't be cast to the tensor's; "
                f"got result.dtype={result.dtype}, tensor.dtype={self.dtype}"
            )
        self._check_writable(name)
        result = conversion.to_dtype(result, self.dtype)
        with devices.on_device_of(self.array):
            self.array[...] = result.array
        if recorded:
            in_place.take_over(self, result.node, name)
        else:
            self.written(name)
        return self

    def _check_writable(self, name: str) -> None:
        flags, steps = self.array.flags, zip(self.shape, self.array.strides, strict=True)
        # An expanded array is read-only in NumPy, but not in CuPy.
        if not getattr(flags, "writeable", True) or any(n > 1 and step == 0 for n, step in steps):
            raise RuntimeError(
                f"{name}: this memory cannot be written to: it is NumPy's and read-only, or expanded, so "
                "that more than one element of the written-to tensor refers to a single memory location; "
                f"write to a clone(); got tensor.shape={self.shape}"
            )

    def __setitem__(self, index: Any, value: Any) -> None:
        name = "__setitem__"
        recorded = in_place.is_recorded(self, value)
        if recorded:
            in_place.check_recorded_write(name, self)
        self._check_writable(name)
        if isinstance(value, Variable):
            value = _copied_if_shared(value, self)
        with devices.on_device_of(self.array):
            node = indexing.setitem_in_place(self, index, value, recorded)
        if recorded:
            in_place.take_over(self, node, name)
        else:
            self.written(name)

    def copy_(self, source: Any) -> Tensor:
        """Overwrite with `source`, broadcast and converted to this shape, dtype and device."""
        return self._overwrite(source, "copy_")

    def _overwrite(self, source: Any, name: str) -> Tensor:
        return self._write(conversion.overwrite(self, source), name)

    def fill_(self, value: Any) -> Tensor:
        """Overwrite every element with `value`."""
        return self._overwrite(value, "fill_")

    def zero_(self) -> Tensor:
        """Overwrite every element with 0."""
        return self._overwrite(0, "zero_")

    def uniform_(
        self, low: builtins.float = 0, high: builtins.float = 1, *, generator: Any = None
    ) -> Tensor:
        """Overwrite with numbers drawn evenly from [low, high)."""
        drawn = random.uniform(self.shape, self._float_dtype("uniform_"), self.device, generator)
        with devices.on_device_of(drawn):
            drawn *= high - low
            drawn += low
        return self._overwrite(drawn, "uniform_")

    def normal_(
        self, mean: builtins.float = 0, std: builtins.float = 1, *, generator: Any = None
    ) -> Tensor:
        """Overwrite with numbers drawn from the normal distribution."""
        drawn = random.normal(self.shape, self._float_dtype("normal_"), self.device, generator)
        with devices.on_device_of(drawn):
            drawn *= std
            drawn += mean
        return self._overwrite(drawn, "normal_")

    def _float_dtype(self, name: str) -> np.dtype[Any]:
        if not dtypes.is_floating_point(self.dtype):
            raise TypeError(f"{name}: dtype must be floating point; got dtype={self.dtype}")
        return self.dtype

    def detach_(self) -> Tensor:
        """Take this tensor off the tape. Raises RuntimeError for a view: its base would stay there."""
        if self._base is not None and self.requires_grad:
            raise RuntimeError("detach_: can't detach views in-place; use detach() instead")
        for view in self.views():
            _ = view.node  # one that is out of date goes on from where this tensor is now
        self.node = None
        return self

    # -- operations as methods

    __add__ = __radd__ = elementwise.add
    __sub__ = elementwise.sub
    add, sub = elementwise.scaled_add, elementwise.scaled_sub
    __rsub__ = elementwise.rsub
    __mul__ = __rmul__ = mul = elementwise.mul
    __truediv__ = elementwise.div
    div = elementwise.rounded_div
    __rtruediv__ = elementwise.quotient_of
    __floordiv__ = floor_divide = elementwise.floor_divide
    __rfloordiv__ = _reflected(elementwise.floor_divide)
    __mod__ = remainder = elementwise.remainder
    __rmod__ = _reflected(elementwise.remainder)
    __pow__ = pow = elementwise.pow
    __rpow__ = _reflected(elementwise.pow)
    __matmul__ = matmul = products.matmul
    __rmatmul__ = _reflected(products.matmul)
    __neg__ = neg = elementwise.neg
    __abs__ = abs = absolute = elementwise.abs
    __invert__ = bitwise_not = comparison.bitwise_not
    __and__ = __rand__ = bitwise_and = comparison.bitwise_and
    __or__ = __ror__ = bitwise_or = comparison.bitwise_or
    __xor__ = __rxor__ = bitwise_xor = comparison.bitwise_xor
    __lt__ = lt = comparison.lt
    __le__ = le = comparison.le
    __gt__ = gt = comparison.gt
    __ge__ = ge = comparison.ge
    __getitem__ = indexing.getitem

    eq, ne, equal = comparison.eq, comparison.ne, comparison.equal
    isclose, allclose = comparison.isclose, comparison.allclose
    isnan, isinf, isfinite = comparison.isnan, comparison.isinf, comparison.isfinite
    logical_and, logical_or = comparison.logical_and, comparison.logical_or
    logical_xor, logical_not = comparison.logical_xor, comparison.logical_not
    exp, expm1, log, log1p = elementwise.exp, elementwise.expm1, elementwise.log, elementwise.log1p
    log2, log10, erf, sigmoid = (
        elementwise.log2,
        elementwise.log10,
        elementwise.erf,
        elementwise.sigmoid,
    )
    sqrt, rsqrt, square = elementwise.sqrt, elementwise.rsqrt, elementwise.square
    reciprocal, sign = elementwise.reciprocal, elementwise.sign
    sin, cos, tan, tanh = elementwise.sin, elementwise.cos, elementwise.tan, elementwise.tanh
    floor, ceil, round, trunc = (
        elementwise.floor,
        elementwise.ceil,
        elementwise.round,
        elementwise.trunc,
    )
    maximum, minimum = elementwise.maximum, elementwise.minimum
    clamp, clip = elementwise.clamp, elementwise.clamp

    sum, mean, var, std = reduction.sum, reduction.mean, reduction.var, reduction.std
    max, min, amax, amin = reduction.max, reduction.min, reduction.amax, reduction.amin
    prod, cumsum, norm = reduction.prod, reduction.cumsum, reduction.norm
    argmax, argmin, logsumexp = reduction.argmax, reduction.argmin, reduction.logsumexp
    any, all, count_nonzero = reduction.any, reduction.all, reduction.count_nonzero

    dot, outer, mm, bmm, mv = products.dot, products.outer, products.mm, products.bmm, products.mv
    relu, softmax, log_softmax = activation.relu, activation.softmax, activation.log_softmax

    reshape, view, permute = (_spread(f) for f in (shaping.reshape, shaping.view, shaping.permute))
    expand, repeat, tile = (_spread(f) for f in (shaping.expand, shaping.repeat, shaping.tile))
    flip = _spread(shaping.flip)
    flatten, unflatten, ravel = shaping.flatten, shaping.unflatten, shaping.ravel
    squeeze, unsqueeze, broadcast_to = shaping.squeeze, shaping.unsqueeze, shaping.broadcast_to
    transpose, swapaxes, movedim, t = (
        shaping.transpose,
        shaping.transpose,
        shaping.movedim,
        shaping.t,
    )
    split, chunk, unbind, narrow = joining.split, joining.chunk, joining.unbind, joining.narrow
    roll, tril, triu, diagonal = shaping.roll, shaping.tril, shaping.triu, shaping.diagonal
    clone, contiguous = shaping.clone, shaping.contiguous

    def where(self, condition: Any, other: Any) -> Any:
        """Return this tensor where `condition` (bool) holds and `other` elsewhere."""
        return elementwise.where(condition, self, other)

    def expand_as(self, other: Tensor) -> Any:
        """Return a read-only view of this tensor repeated up to `other`'s shape."""
        return shaping.expand(self, other.shape)

    def view_as(self, other: Tensor) -> Any:
        """Return this tensor in `other`'s shape, sharing its memory."""
        return shaping.view(self, other.shape)

    def reshape_as(self, other: Tensor) -> Any:
        """Return this tensor in `other`'s shape."""
        return shaping.reshape(self, other.shape)

    gather, scatter, scatter_add = indexing.gather, indexing.scatter, indexing.scatter_add
    index_select, index_add = indexing.index_select, indexing.index_add
    take_along_dim, masked_fill = indexing.take_along_dim, indexing.masked_fill
    masked_select, nonzero = indexing.masked_select, indexing.nonzero
    sort, argsort, topk = sorting.sort, sorting.argsort, sorting.topk

    __iadd__ = add_ = _in_place(elementwise.scaled_add, "add_")
    __isub__ = sub_ = _in_place(elementwise.scaled_sub, "sub_")
    __imul__ = mul_ = _in_place(elementwise.mul)
    __itruediv__ = div_ = _in_place(elementwise.rounded_div, "div_")
    __ifloordiv__ = floor_divide_ = _in_place(elementwise.floor_divide)
    __ipow__ = pow_ = _in_place(elementwise.pow)
    __iand__ = bitwise_and_ = _in_place(comparison.bitwise_and)
    __ior__ = bitwise_or_ = _in_place(comparison.bitwise_or)
    __ixor__ = bitwise_xor_ = _in_place(comparison.bitwise_xor)
    neg_, abs_ = _in_place(elementwise.neg), _in_place(elementwise.abs)
    clamp_ = clip_ = _in_place(elementwise.clamp)
    exp_, log_, sqrt_ = (_in_place(f) for f in (elementwise.exp, elementwise.log, elementwise.sqrt))
    tanh_, sigmoid_ = _in_place(elementwise.tanh), _in_place(elementwise.sigmoid)
    relu_, masked_fill_ = _in_place(activation.relu), _in_place(indexing.masked_fill)
    scatter_, scatter_add_ = _in_place(indexing.scatter), _in_place(indexing.scatter_add)
    index_add_ = _in_place(indexing.index_add)


def is_tensor(value: Any) -> builtins.bool:
    """Return whether `value` is a Tensor."""
    return isinstance(value, Tensor)


def _names_device(argument: Any) -> bool:
    if isinstance(argument, devices.Device) or type(argument) is int:  # of a GPU, its index
        return True
    return isinstance(argument, str) and argument.partition(":")[0] in ("cpu", "cuda")


def _rebuild(cls: Any, array: Any, requires_grad: bool) -> Any:
    tensor = object.__new__(cls)
    Variable.__init__(tensor, array)
    tensor.requires_grad = requires_grad
    return tensor


Variable.Result = Tensor


class Parameter(Tensor):
    """A tensor that a Module counts among its parameters; it requires grad unless told otherwise."""

    __slots__ = ()

    def __init__(self, data: Any, requires_grad: bool = True) -> None:
        super().__init__(conversion.array_of(data))
        self.requires_grad = requires_grad

    def __repr__(self) -> str:
        return "Parameter containing:\n" + super().__repr__()

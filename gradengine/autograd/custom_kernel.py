"""`kernel`: a Numba function, CUDA C++ and a derivative become one differentiable operation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from gradengine import devices, kernels
from gradengine.autograd.gradcheck import GradcheckError, gradcheck, gradgradcheck
from gradengine.dtypes import get_default_dtype, is_floating_point, result_type
from gradengine.operation import Operation, Rule, _general, array_of, cast, sum_to_shape
from gradengine.tensor import Tensor


def kernel(
    function: Callable[..., Any] | None = None,
    *,
    cuda: str,
    pullbacks: dict[str, Callable[..., Any]] | None = None,
    shape: Callable[..., tuple[int, ...]] | None = None,
    launch: Callable[..., tuple[int, int, Sequence[Any]]] | None = None,
) -> Any:
    """Make an operation of a function of numbers, compiled by Numba, and the same in CUDA C++.

    Inputs broadcast and take their common float dtype. `cuda` is an expression in the parameters (float or
    double), or a body with its return. `pullbacks` has for each input that needs gradients a function of
    the incoming gradient and what it names: inputs, `out`, attributes; it is written in operations.

    With `shape(*inputs)`, of the result, the function is one of (out, *arrays) that fills zeros; `cuda` is
    a template of its name, `__global__ void name<T>(T* out, const T* x, ..., long long n, ...)`, started
    as `launch(*inputs)` says: (blocks, threads, numbers). Keyword-only parameters are attributes.
    """
    if function is None:
        return functools.partial(kernel, cuda=cuda, pullbacks=pullbacks, shape=shape, launch=launch)
    if (shape is None) != (launch is None):
        raise TypeError(
            "kernel: shape and launch come together: without them the kernel is elementwise"
        )
    return CustomKernel(function, cuda, pullbacks or {}, shape, launch)


class CustomKernel:
    """A user's operation, called on Tensors or arrays of either device; `check` compares its parts."""

    __name__: str

    def __init__(
        self,
        function: Callable[..., Any],
        cuda: str,
        pullbacks: dict[str, Callable[..., Any]],
        shape: Callable[..., tuple[int, ...]] | None,
        launch: Callable[..., tuple[int, int, Sequence[Any]]] | None,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function, self._cuda, self._shape, self._launch = function, cuda, shape, launch
        parameters = inspect.signature(getattr(function, "py_func", function)).parameters.values()
        attributes = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        inputs = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if len(inputs) + len(attributes) < len(parameters) or (shape is None and attributes):
            raise TypeError(
                f"{self.__name__}: a kernel has named inputs, and no attributes if it is elementwise; "
                f"got {inspect.signature(function)}"
            )
        self.inputs = inputs if shape is None else inputs[1:]  # after out
        code = SimpleNamespace(
            co_flags=0,
            co_varnames=(*self.inputs, *attributes),
            co_argcount=len(self.inputs),
            co_kwonlyargcount=len(attributes),
        )
        stand_in: Any = SimpleNamespace(__code__=code, __name__=self.__name__)
        self.operation = Operation(stand_in, None)
        self.operation.forward = self._forward
        self._apply = _general(self.operation)
        self.pullbacks(**pullbacks)

    def pullbacks(self, **functions: Callable[..., Any]) -> None:
        """Give the pullback of each named input; an input without one never gets a gradient."""
        self.operation.pullbacks(**functions)
        if self._shape is None:
            for name in functions:
                _undo_broadcasting(self.operation.rules[name], self.inputs.index(name))

    def __call__(self, *inputs: Any, **attributes: Any) -> Any:
        if len(inputs) != len(self.inputs):
            raise TypeError(
                f"{self.__name__}: takes {len(self.inputs)} inputs ({', '.join(self.inputs)}); "
                f"got {len(inputs)}"
            )
        return self._apply(*_conformed(self.__name__, inputs), **attributes)

    def _forward(self, *arrays: Any, **attributes: Any) -> Any:
        return self._run(kernels.place(arrays[0]), arrays, attributes)

    def _run(self, place: str, arrays: Sequence[Any], attributes: dict[str, Any]) -> Any:
        """Compute on arrays of one float dtype by the code for a place, "cpu" or "cuda"."""
        if place == "cpu" and arrays[0].dtype.itemsize == 2:  # 16-bit floats, which Numba lacks
            wide = [array.astype(np.float32) for array in arrays]
            return self._run(place, wide, attributes).astype(arrays[0].dtype)
        if self._shape is None:
            return self._elementwise(place, arrays)
        shape = tuple(self._shape(*arrays, **attributes))
        if place == "cpu":
            from gradengine.kernels.cpu import custom

            out = np.zeros(shape, arrays[0].dtype)
            contiguous = [np.ascontiguousarray(array).reshape(array.shape) for array in arrays]
            custom.compiled(self._function)(out, *contiguous, **attributes)
            return out
        from gradengine.kernels.cuda.custom import launched

        assert self._launch is not None
        plan = self._launch(*arrays, **attributes)
        return launched(self.__name__, self._cuda, shape, arrays, plan)

    def _elementwise(self, place: str, arrays: Sequence[Any]) -> Any:
        if place == "cpu":
            from gradengine.kernels.cpu import custom

            # Numba computes float32 beside an integer in float64
            return np.asarray(custom.elementwise(self._function)(*arrays), arrays[0].dtype)
        from gradengine.kernels.cuda.custom import elementwise

        run = functools.partial(elementwise, self.__name__, self._cuda, self.inputs)
        full = devices.array_module(arrays[0]).broadcast_arrays(*arrays)
        return devices.in_memory_order(lambda *values: run(values), *full)

    def check(
        self, *inputs: Any, second_order: bool = True, atol: float = 1e-5, rtol: float = 1e-3
    ) -> str:
        """Compare derivatives with differences, in float64, and CUDA with the CPU, in float32 and float64.

        Returns a sentence that says what was compared, or why CUDA was not. Raises GradcheckError.
        """
        names = [name for name in self.inputs if name in self.operation.rules]
        arguments = [_copied(x, name in names) for x, name in zip(inputs, self.inputs, strict=True)]
        said = "no input has a pullback"
        if any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            gradcheck(self, arguments, atol=atol, rtol=rtol)
            said = "first derivatives agree with differences"
            if second_order:
                gradgradcheck(self, arguments, atol=atol, rtol=rtol)
                said = "first and second derivatives agree with differences"
        reason = devices.cuda_unavailable_reason()
        arrays = [array_of(x) for x in _conformed(self.__name__, arguments)]
        if reason is not None and kernels.place(arrays[0]) == "cpu":
            return f"{self.__name__}: {said}; CUDA was not compared: {reason}"
        for dtype in (np.float32, np.float64):
            self._compare([array.astype(dtype) for array in arrays])
        return f"{self.__name__}: {said}; CUDA agrees with the CPU"

    def _compare(self, arrays: Sequence[Any]) -> None:
        there = [x if kernels.place(x) == "cuda" else devices.to_device(x, "cuda") for x in arrays]
        with devices.on_device_of(there[0]):
            on_cuda = devices.to_device(self._run("cuda", there, {}), "cpu")
        on_cpu = self._run("cpu", arrays, {})
        tolerance = 1e-5 if arrays[0].dtype == np.float32 else 1e-12
        scale = tolerance * max(1.0, float(np.nanmax(np.abs(on_cpu), initial=0)))
        if on_cuda.shape != on_cpu.shape or not np.allclose(
            on_cuda, on_cpu, rtol=tolerance, atol=scale, equal_nan=True
        ):
            raise GradcheckError(
                f"{self.__name__}: CUDA and the CPU must give the same; got for dtype={arrays[0].dtype}\n"
                f"CUDA:{on_cuda}\nCPU:{on_cpu}"
            )


def _copied(value: Any, differentiated: bool) -> Any:
    if not hasattr(value, "dtype"):
        return value
    array = devices.to_device(array_of(value), "cpu").astype(np.float64)
    return Tensor(array).requires_grad_(differentiated)


def _conformed(name: str, values: Sequence[Any]) -> list[Any]:
    """Return inputs in their common float dtype; numbers become arrays."""
    arrays = [value for value in values if hasattr(value, "dtype")]
    if not arrays or any(
        not hasattr(value, "dtype") and not isinstance(value, (bool, int, float))
        for value in values
    ):
        raise TypeError(
            f"{name}: inputs must be Tensors, arrays or numbers, one of them no number; "
            f"got {', '.join(type(value).__name__ for value in values)}"
        )
    dtype = result_type(*values)
    if not is_floating_point(dtype):
        dtype = get_default_dtype()
    xp = devices.array_module(array_of(arrays[0]))
    return [
        (value if value.dtype == dtype else cast(value, dtype=dtype))
        if hasattr(value, "dtype")
        else xp.asarray(value, dtype)
        for value in values
    ]


def _undo_broadcasting(rule: Rule, place: int) -> None:
    """Let a pullback's share be summed to its input's shape."""
    pullback, keep = rule.pullback, rule.keep

    def keep_with_shape(inputs: Any, out: Any, kept: Any, attributes: Any) -> tuple[Any, ...]:
        rest = () if keep is None else keep(inputs, out, kept, attributes)
        return (inputs[place].shape, *rest)

    def summed(grad: Any, shape: tuple[int, ...], *saved: Any) -> Any:
        share = pullback(grad, *saved)
        return share if share.shape == shape else sum_to_shape(share, shape=shape)

    rule.keep, rule.pullback = keep_with_shape, summed

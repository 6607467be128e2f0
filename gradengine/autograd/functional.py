"""Derivatives of functions as values: Jacobians, Hessians and their products with vectors.

Each function takes `func`, of Tensors, and `inputs`, one Tensor or a tuple; what it returns is nested as
inputs and outputs are. `create_graph` makes the results differentiable. With `strict`, an input on which
the result does not depend is an error instead of zeros. Forward mode is the double backward trick: backward
is linear in its gradient u, so the derivative of backward by u is the product with the Jacobian itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gradengine.backward_walk import gradients_of
from gradengine.devices import array_module, on_device_of
from gradengine.factories import ones_like, zeros_like
from gradengine.grad_mode import enable_grad
from gradengine.ops.joining import stack
from gradengine.ops.shape import reshape, view
from gradengine.tensor import Tensor

Tensors = tuple[Tensor, ...]


def jacobian(
    func: Callable[..., Any],
    inputs: Any,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    strategy: str = "reverse-mode",
) -> Any:
    """Return the Jacobian of func at `inputs`: for each output and input of shape output.shape + input.shape.

    `vectorize` is accepted and changes nothing: rows are computed one by one. `strategy` "forward-mode"
    computes columns instead, which is faster where there are fewer inputs than outputs.
    """
    if strategy not in ("forward-mode", "reverse-mode"):
        raise AssertionError(
            'jacobian: expected strategy to be either "forward-mode" or "reverse-mode"; '
            f"got strategy={strategy!r}"
        )
    if strategy == "forward-mode" and (strict or create_graph):
        raise NotImplementedError(
            'jacobian: strict and create_graph need strategy="reverse-mode"; '
            f"got strict={strict}, create_graph={create_graph}"
        )
    with enable_grad():
        primals, one_input = _started(inputs, "jacobian", create_graph)
        outputs, one_output = _called(func, primals, "jacobian")
        _check_outputs(outputs, strict)
        if strategy == "forward-mode":
            blocks = _columns(outputs, primals)
        else:
            blocks = tuple(
                _rows(y, i, primals, create_graph, strict) for i, y in enumerate(outputs)
            )
    blocks = tuple(_finished(row, create_graph) for row in blocks)
    rows = tuple(row[0] if one_input else row for row in blocks)
    return rows[0] if one_output else rows


def hessian(
    func: Callable[..., Any],
    inputs: Any,
    create_graph: bool = False,
    strict: bool = False,
    vectorize: bool = False,
    outer_jacobian_strategy: str = "reverse-mode",
) -> Any:
    """Return the Hessian of a func of one element, of shape input.shape + input.shape, by pairs of inputs.

    `vectorize` is accepted and changes nothing.
    """
    one = isinstance(inputs, Tensor)

    def gradient(*values: Any) -> Any:
        output = _one_element(func(*values), "hessian")
        if strict:
            _check_outputs((output,), True)
        found = _gradients((output,), values, (None,), True, strict, "output")
        return found[0] if one else found

    return jacobian(gradient, inputs, create_graph, strict, vectorize, outer_jacobian_strategy)


def vjp(
    func: Callable[..., Any],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Return func's outputs and the product of v, shaped like them, with the Jacobian.

    v may be left out for one output of one element.
    """
    with enable_grad():
        primals, one_input = _started(inputs, "vjp", create_graph)
        outputs, one_output = _called(func, primals, "vjp")
        _check_outputs(outputs, strict)
        weights = _vector(v, outputs, "vjp", "user-provided function returns a single Tensor")
        found = _gradients(outputs, primals, weights, create_graph, strict, "output")
    return _plain(outputs, one_output, create_graph), _plain(found, one_input, create_graph)


def jvp(
    func: Callable[..., Any],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Return func's outputs and the product of the Jacobian with v, shaped like the inputs.

    v may be left out for one input of one element.
    """
    with enable_grad():
        primals, _ = _started(inputs, "jvp", create_graph)
        directions = _vector(v, primals, "jvp", _SINGLE_INPUT)
        outputs, one_output = _called(func, primals, "jvp")
        _check_outputs(outputs, strict)
        found = _directional(outputs, primals, directions, create_graph, strict)
    return _plain(outputs, one_output, create_graph), _plain(found, one_output, create_graph)


def vhp(
    func: Callable[..., Any],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Return the value of a func of one element and the product of v, like the inputs, with the Hessian."""
    with enable_grad():
        primals, one_input = _started(inputs, "vhp", create_graph)
        weights = _vector(v, primals, "vhp", _SINGLE_INPUT)
        output = _one_element(func(*primals), "vhp")
        _check_outputs((output,), strict)
        first = _gradients((output,), primals, (None,), True, strict, "output")
        found = _gradients(first, primals, weights, create_graph, strict, "gradient")
    return _plain((output,), True, create_graph), _plain(found, one_input, create_graph)


def hvp(
    func: Callable[..., Any],
    inputs: Any,
    v: Any = None,
    create_graph: bool = False,
    strict: bool = False,
) -> tuple[Any, Any]:
    """Return the value of a func of one element and the product of the Hessian with v.

    The Hessian is symmetric where it is continuous, so `vhp`, which costs less, gives the same.
    """
    with enable_grad():
        primals, one_input = _started(inputs, "hvp", create_graph)
        directions = _vector(v, primals, "hvp", _SINGLE_INPUT)
        output = _one_element(func(*primals), "hvp")
        _check_outputs((output,), strict)
        first = _gradients((output,), primals, (None,), True, strict, "output")
        found = _directional(first, primals, directions, create_graph, strict)
    return _plain((output,), True, create_graph), _plain(found, one_input, create_graph)


# ---- inputs and outputs --------------------------------------------------------------------------


def _as_tuple(value: Any, what: str, name: str) -> tuple[Tensors, bool]:
    """Return one tensor or several as a tuple, and whether it was one."""
    if isinstance(value, Tensor):
        return (value,), True
    if not isinstance(value, (tuple, list)):
        raise TypeError(
            f"{name}: the {what} must be either a Tensor or a tuple of Tensors; "
            f"got {type(value).__name__}"
        )
    for position, element in enumerate(value):
        if not isinstance(element, Tensor):
            raise TypeError(
                f"{name}: the {what} must be either a Tensor or a tuple of Tensors; "
                f"got {type(element).__name__} at index {position}"
            )
    return tuple(value), False


def _started(inputs: Any, name: str, create_graph: bool) -> tuple[Tensors, bool]:
    """Return the inputs as tensors to differentiate by, and whether there was one.

    With `create_graph` results depend on the user's inputs themselves, through views of them.
    """
    tensors, one = _as_tuple(inputs, "inputs", name)
    return tuple(started(x, create_graph) for x in tensors), one


def started(x: Tensor, connected: bool) -> Tensor:
    """Return x as a tensor to differentiate by: a view of it in the graph, or a leaf beside it."""
    return view(x, x.shape) if connected and x.requires_grad else x.detach().requires_grad_()


def _called(func: Callable[..., Any], primals: Tensors, name: str) -> tuple[Tensors, bool]:
    return _as_tuple(func(*primals), "outputs of the user-provided function", name)


def _one_element(output: Any, name: str) -> Tensor:
    if not isinstance(output, Tensor):
        if isinstance(output, (tuple, list)) and len(output) == 1:
            return _one_element(output[0], name)
        raise RuntimeError(
            f"The function given to {name} should return a single Tensor; got {type(output).__name__}"
        )
    if output.numel() != 1:
        raise RuntimeError(
            f"The Tensor returned by the function given to {name} should contain a single element; "
            f"got shape={output.shape}"
        )
    return output


_SINGLE_INPUT = "input to the user-provided function is a single Tensor"


def _vector(v: Any, likes: Tensors, name: str, single: str) -> Tensors:
    """Return v, one tensor for each of `likes` and of its shape; ones of a single element by default."""
    if v is None:
        if len(likes) != 1 or likes[0].numel() != 1:
            raise RuntimeError(
                f"{name}: the vector v can only be None if the {single} with a single element"
            )
        return (ones_like(likes[0]),)
    vectors, _ = _as_tuple(v, "vector v", name)
    if len(vectors) != len(likes):
        raise RuntimeError(
            f"{name}: v is a tuple of invalid length: should be {len(likes)} but got {len(vectors)}"
        )
    for position, (vector, like) in enumerate(zip(vectors, likes, strict=True)):
        if vector.shape != like.shape:
            raise RuntimeError(
                f"{name}: entry {position} of v has invalid size: should be {like.shape} but got "
                f"{vector.shape}"
            )
    return vectors


def _check_outputs(outputs: Sequence[Tensor], strict: bool) -> None:
    for position, output in enumerate(outputs):
        if strict and not output.requires_grad:
            raise RuntimeError(
                f"Output {position} of the user-provided function does not require gradients. The outputs "
                "must be computed in a differentiable manner from the input when running in strict mode."
            )


def _finished(tensors: Sequence[Tensor], create_graph: bool) -> Tensors:
    return tuple(x if create_graph else x.detach() for x in tensors)


def _plain(tensors: Sequence[Tensor], one: bool, create_graph: bool) -> Any:
    results = _finished(tensors, create_graph)
    return results[0] if one else results


# ---- gradients -----------------------------------------------------------------------------------


def _refuse_independent(what: str, position: int) -> NoReturn:
    subject = {
        "output": "The output of the user-provided function is independent of input",
        "jacobian": "The jacobian of the user-provided function is independent of input",
        "gradient": "The hessian of the user-provided function is independent of input",
    }[what]
    raise RuntimeError(f"{subject} {position}. This is not allowed in strict mode.")


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    create_graph: bool,
    strict: bool,
    what: str,
) -> Tensors:
    """Return the weighed gradient of the outputs by each input, zeros where there is none."""
    known = [(y, v) for y, v in zip(outputs, weights, strict=True) if y.requires_grad]
    found: list[Any] = [None] * len(inputs)
    if known:
        roots, seeds = zip(*known, strict=True)
        found = gradients_of(roots, inputs, seeds, True, create_graph)
    for position, (gradient, x) in enumerate(zip(found, inputs, strict=True)):
        if gradient is None:
            if strict:
                _refuse_independent(what, position)
            found[position] = zeros_like(x)
        elif strict and create_graph and not gradient.requires_grad:
            _refuse_independent("jacobian" if what == "output" else what, position)
    return tuple(found)


def _directional(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    directions: Sequence[Tensor],
    create_graph: bool,
    strict: bool,
) -> Tensors:
    """Return the derivative of each output along the directions, by backward through backward."""
    dummies = tuple(zeros_like(y).requires_grad_() for y in outputs)
    by_input = _gradients(outputs, inputs, dummies, True, False, "output")
    if strict and any(not gradient.requires_grad for gradient in by_input):
        position = next(i for i, gradient in enumerate(by_input) if not gradient.requires_grad)
        _refuse_independent("output", position)
    return _gradients(by_input, dummies, directions, create_graph, False, "output")


def _rows(
    output: Tensor, place: int, inputs: Tensors, create_graph: bool, strict: bool
) -> list[Tensor]:
    """Return the Jacobian of one output by each input, from one backward for each element."""
    rows: list[Tensors] = []
    for seed in unit_vectors(output):
        weights = (seed,)
        rows.append(_gradients((output,), inputs, weights, create_graph, strict, "output"))
    return [_stacked([row[i] for row in rows], output, x) for i, x in enumerate(inputs)]


def _stacked(rows: Sequence[Tensor], output: Tensor, x: Tensor) -> Tensor:
    shape = (*output.shape, *x.shape)
    return reshape(stack(rows), shape) if rows else x.new_zeros(shape)


def _columns(outputs: Tensors, inputs: Tensors) -> tuple[list[Tensor], ...]:
    """Return the Jacobian of each output by each input, from one product for each element of an input."""
    blocks: list[list[Tensor]] = [[] for _ in outputs]
    for position, x in enumerate(inputs):
        columns = []
        for unit in unit_vectors(x):
            directions = [unit if i == position else zeros_like(z) for i, z in enumerate(inputs)]
            columns.append(_directional(outputs, inputs, directions, False, False))
        for place, y in enumerate(outputs):
            shape = (*y.shape, *x.shape)
            if not columns:
                blocks[place].append(y.new_zeros(shape))
                continue
            block = stack([column[place] for column in columns], dim=-1)  # (*y.shape, x.numel())
            blocks[place].append(reshape(block, shape))
    return tuple(blocks)


def unit_vectors(like: Tensor) -> Any:
    """Yield tensors like this one with a single 1, for each element in turn."""
    array = like.array
    for place in range(array.size):
        with on_device_of(array):
            unit = array_module(array).zeros(array.shape, array.dtype)
            unit.reshape(-1)[place] = 1
        yield Tensor(unit)

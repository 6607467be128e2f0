"""Functions of functions: derivatives of what takes and returns Tensors, or lists, tuples and dicts of them.

    loss = lambda params: ge.cross_entropy(ge.func.functional_call(model, params, images), labels)
    gradients = ge.func.grad(loss)(dict(model.named_parameters()))

Nothing adds to `grad`, and arguments need not require grad. Functions nest: `grad(grad(f))` is the second
derivative. What they return is itself part of the graph where it depends on a tensor that requires grad.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gradengine.autograd.functional import started, unit_vectors
from gradengine.backward_walk import gradients_of
from gradengine.factories import zeros_like
from gradengine.grad_mode import enable_grad, grad_mode
from gradengine.ops.joining import stack
from gradengine.ops.shape import reshape
from gradengine.tape import Node
from gradengine.tensor import Tensor

__all__ = [
    "functional_call",
    "grad",
    "grad_and_value",
    "hessian",
    "jacfwd",
    "jacrev",
    "jvp",
    "value_and_grad",
    "vjp",
]

Argnums = int | tuple[int, ...]


def grad(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Any:
    """Return the function that gives the gradient of `func`, which returns one element.

    It is taken by the argument at `argnums`, or those of a tuple; keyword arguments are passed on. With
    `has_aux` func returns (value, aux), and the new function (gradient, aux).
    """
    both = value_and_grad(func, argnums, has_aux)

    @functools.wraps(func)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, found = both(*args, **kwargs)
        return (found, value[1]) if has_aux else found

    return gradient


def value_and_grad(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Any:
    """Return the function that gives (value, gradient) of `func`, or ((value, aux), gradient)."""

    @functools.wraps(func)
    def both(*args: Any, **kwargs: Any) -> Any:
        call = _Call(func, args, kwargs, argnums, has_aux)
        if not isinstance(call.output, Tensor) or call.output.numel() != 1:
            shape = getattr(call.output, "shape", None)
            raise RuntimeError(
                "grad: expected the function to return a single element, as a Tensor; use vjp or jacrev for "
                f"others; got {type(call.output).__name__}"
                + (f" of shape={shape}" if shape else "")
            )
        found = call.nested(call.gradients([None], create_graph=call.goes_on))
        value = call.finished(call.output)
        return ((value, call.finished(call.aux)) if has_aux else value), found

    return both


def grad_and_value(func: Callable[..., Any], argnums: Argnums = 0, has_aux: bool = False) -> Any:
    """Return the function that gives (gradient, value) of `func`: PyTorch's order."""
    both = value_and_grad(func, argnums, has_aux)

    @functools.wraps(func)
    def turned(*args: Any, **kwargs: Any) -> Any:
        value, found = both(*args, **kwargs)
        return found, value

    return turned


def vjp(func: Callable[..., Any], *primals: Any, has_aux: bool = False) -> tuple[Any, ...]:
    """Return func(*primals) and the function that maps gradients of it to those of the primals.

    That function may be called often; it gives a tuple, of one gradient for each primal. With `has_aux` func
    returns (output, aux), and aux comes third.
    """
    call = _Call(func, primals, {}, tuple(range(len(primals))), has_aux)

    def pullback(cotangents: Any) -> Any:
        seeds = _matching(cotangents, call.output, "vjp: the gradients")
        return call.nested(call.gradients(seeds, create_graph=grad_mode.enabled and call.goes_on))

    output = call.finished(call.output)
    return (output, pullback, call.finished(call.aux)) if has_aux else (output, pullback)


def jvp(
    func: Callable[..., Any], primals: Any, tangents: Any, *, has_aux: bool = False
) -> tuple[Any, ...]:
    """Return func(*primals) and its derivative along `tangents`, nested like the primals.

    Forward mode by the double backward trick: it costs a backward of backward. With `has_aux` func
    returns (output, aux), and aux comes third.
    """
    if not isinstance(primals, tuple) or not isinstance(tangents, tuple):
        raise RuntimeError(
            "jvp: expected primals and tangents to be tuples; "
            f"got {type(primals).__name__} and {type(tangents).__name__}"
        )
    call = _Call(func, primals, {}, tuple(range(len(primals))), has_aux)
    directions = _matching(tangents, primals, "jvp: the tangents")
    output = call.finished(call.output)
    derivative = _rebuilt(call.output, iter(call.along(directions)))
    return (output, derivative, call.finished(call.aux)) if has_aux else (output, derivative)


def jacrev(func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False) -> Any:
    """Return the function that gives the Jacobian of `func`, by one backward for each element of output.

    For each tensor of the output, and in it for each of the argument: of shape output.shape + input.shape.
    """

    @functools.wraps(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        call = _Call(func, args, kwargs, argnums, has_aux)
        outputs = _leaves(call.output)
        blocks = []
        for place, output in enumerate(outputs):
            rows = []
            for unit in unit_vectors(output):
                seeds = [unit if i == place else zeros_like(y) for i, y in enumerate(outputs)]
                rows.append(call.gradients(seeds, create_graph=call.goes_on))
            columns = [
                _joined([row[i] for row in rows], output.shape, x.shape, x, 0)
                for i, x in enumerate(call.inputs)
            ]
            blocks.append(call.nested(columns))
        found = _rebuilt(call.output, iter(blocks))
        return (found, call.finished(call.aux)) if has_aux else found

    return jacobian


def jacfwd(func: Callable[..., Any], argnums: Argnums = 0, *, has_aux: bool = False) -> Any:
    """Return the function that gives the Jacobian of `func`, by one `jvp` for each element of input."""

    @functools.wraps(func)
    def jacobian(*args: Any, **kwargs: Any) -> Any:
        call = _Call(func, args, kwargs, argnums, has_aux)
        outputs = _leaves(call.output)
        blocks: list[list[Any]] = [[] for _ in outputs]
        for position, x in enumerate(call.inputs):
            columns = []
            for unit in unit_vectors(x):
                directions = [
                    unit if i == position else zeros_like(z) for i, z in enumerate(call.inputs)
                ]
                columns.append(call.along(directions))
            for place, y in enumerate(outputs):
                column = [each[place] for each in columns]
                blocks[place].append(_joined(column, y.shape, x.shape, y, -1))
        found = _rebuilt(call.output, iter([call.nested(row) for row in blocks]))
        return (found, call.finished(call.aux)) if has_aux else found

    return jacobian


def hessian(func: Callable[..., Any], argnums: Argnums = 0) -> Any:
    """Return the function that gives the second derivatives of `func`, of shape input.shape twice."""
    return jacrev(jacrev(func, argnums), argnums)


def _joined(parts: Sequence[Any], outer: Any, inner: Any, like: Tensor, dim: int) -> Tensor:
    shape = (*outer, *inner)
    return reshape(stack(parts, dim=dim), shape) if parts else like.new_zeros(shape)


# ---- one call ------------------------------------------------------------------------------------


class _Call:
    """One recorded call of a function, and what it is differentiated by."""

    def __init__(
        self,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        argnums: Argnums,
        has_aux: bool,
    ) -> None:
        self.one = isinstance(argnums, int)
        places = _places(argnums, len(args))
        for place in places:
            _check_leaves(args[place], place)
        given = list(args)
        with enable_grad():
            for place in places:
                fresh = [started(x, True) for x in _leaves(args[place])]
                given[place] = _rebuilt(args[place], iter(fresh))
            self.by = tuple(given[place] for place in places)
            self.inputs = [x for argument in self.by for x in _leaves(argument)]
            output = func(*given, **kwargs)
        self.output, self.aux = _with_aux(output) if has_aux else (output, None)
        self.roots = _leaves(self.output)
        self.goes_on = grad_mode.enabled and self._depends_on_others()

    def _depends_on_others(self) -> bool:
        """Whether a tensor that requires grad went in: then the results are part of its graph."""
        own = {x.node for x in self.inputs if x.is_leaf}
        stack: list[Node] = [y.node for y in self.roots if y.requires_grad]  # type: ignore[misc]
        stack += [x.node for x in self.inputs if x.node not in own]  # type: ignore[misc]
        seen = set(stack)
        while stack:
            node = stack.pop()
            if node.leaf is not None and node not in own:
                return True
            for parent in [edge[0] for edge in node.edges if edge is not None]:
                if parent not in seen:
                    seen.add(parent)
                    stack.append(parent)
        return False

    def gradients(self, seeds: Sequence[Any], create_graph: bool) -> list[Any]:
        """Return the gradient of the outputs, weighed by seeds, by each input; zeros where there is none."""
        known = [(y, v) for y, v in zip(self.roots, seeds, strict=True) if y.requires_grad]
        found: list[Any] = [None] * len(self.inputs)
        if known:
            roots, weights = zip(*known, strict=True)
            found = gradients_of(roots, self.inputs, weights, True, create_graph)
        return [zeros_like(x) if g is None else g for g, x in zip(found, self.inputs, strict=True)]

    def along(self, directions: Sequence[Tensor]) -> list[Any]:
        """Return the derivative of each output along a direction of the inputs."""
        with enable_grad():
            dummies = [zeros_like(y).requires_grad_() for y in self.roots]
            by_input = self.gradients(dummies, create_graph=True)
            known = [(g, v) for g, v in zip(by_input, directions, strict=True) if g.requires_grad]
        if not known:
            return [zeros_like(y) for y in self.roots]
        gradients, weights = zip(*known, strict=True)
        found = gradients_of(gradients, dummies, weights, True, self.goes_on)
        return [zeros_like(y) if g is None else g for g, y in zip(found, self.roots, strict=True)]

    def nested(self, values: Sequence[Any]) -> Any:
        """Return one value for each input in the nesting of the arguments, a tuple unless there is one."""
        remaining = iter(values)
        parts = tuple(_rebuilt(argument, remaining) for argument in self.by)
        return parts[0] if self.one else parts

    def finished(self, value: Any) -> Any:
        """Return a result without this call's graph, unless that goes on."""
        if self.goes_on:
            return value
        return _rebuilt(value, iter([x.detach() for x in _leaves(value)]))


def _places(argnums: Argnums, count: int) -> list[int]:
    numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    for number in numbers:
        if not -count <= number < count:
            raise RuntimeError(
                f"func: argnums must name positional arguments (of which there are {count}); got {argnums}"
            )
    places = [number % count for number in numbers]
    if not places or len(set(places)) < len(places):
        raise RuntimeError(f"func: argnums must be distinct, and at least one; got {argnums}")
    return places


def _with_aux(output: Any) -> tuple[Any, Any]:
    if not isinstance(output, tuple) or len(output) != 2:
        raise RuntimeError(
            "func: with has_aux the function must return a tuple of two, (output, aux); "
            f"got {type(output).__name__}"
        )
    return output


# ---- nested tuples, lists and dicts --------------------------------------------------------------


def _leaves(tree: Any) -> list[Any]:
    """Return the tensors of a nest in order."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, Mapping):
        return [leaf for key in tree for leaf in _leaves(tree[key])]
    if isinstance(tree, (tuple, list)):
        return [leaf for part in tree for leaf in _leaves(part)]
    return []


def _rebuilt(tree: Any, leaves: Iterator[Any]) -> Any:
    """Return a nest like this one with other leaves; what is no tensor stays."""
    if isinstance(tree, Tensor):
        return next(leaves)
    if isinstance(tree, Mapping):
        return {key: _rebuilt(tree[key], leaves) for key in tree}
    if isinstance(tree, (tuple, list)):
        parts = [_rebuilt(part, leaves) for part in tree]
        if isinstance(tree, list):
            return parts
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return tree


def _check_leaves(argument: Any, place: int) -> None:
    if not _leaves(argument):
        raise RuntimeError(
            f"func: argument {place} must be a Tensor, or hold some, to be differentiated by; "
            f"got {type(argument).__name__}"
        )


def _matching(values: Any, likes: Any, name: str) -> list[Tensor]:
    found, expected = _leaves(values), _leaves(likes)
    shapes = [[tuple(x.shape) for x in xs] for xs in (found, expected)]
    if shapes[0] != shapes[1]:
        raise RuntimeError(
            f"{name} must be nested and shaped like what they belong to; "
            f"got shapes={shapes[0]}, expected {shapes[1]}"
        )
    return found


# ---- modules -------------------------------------------------------------------------------------


def functional_call(
    module: Any,
    parameters_and_buffers: Any,
    args: Any = (),
    kwargs: dict[str, Any] | None = None,
    *,
    tie_weights: bool = True,
    strict: bool = False,
) -> Any:
    """Call a module with other tensors in the place of its parameters and buffers, given by name.

    They are one dict or several; what is left out stays the module's own, unless `strict`. With
    `tie_weights` a tensor takes the place of its name's parameter under all its names. The module is as it
    was afterwards; buffers that it set anew are put into the dict. Raises ValueError for two tensors in one
    place, RuntimeError for names that are missing or unexpected.
    """
    given = _one_dict(parameters_and_buffers)
    places = _module_places(module)
    unexpected = sorted(set(given) - set(places))
    missing = sorted(set(places) - set(given)) if strict else []
    if unexpected or missing:
        raise RuntimeError(
            "functional_call: names must be those of the module's parameters and buffers; "
            f"unexpected key(s): {unexpected}, missing key(s): {missing}"
        )
    replaced = _tied(places, given) if tie_weights else given
    args = args if isinstance(args, tuple) else (args,)
    with _replaced(places, replaced, parameters_and_buffers):
        return module(*args, **(kwargs or {}))


def _one_dict(dicts: Any) -> dict[str, Any]:
    if isinstance(dicts, Mapping):
        return dict(dicts)
    if not isinstance(dicts, (tuple, list)) or not all(isinstance(d, Mapping) for d in dicts):
        raise ValueError(
            "functional_call: expected parameters_and_buffers to be a dict, or a list or tuple of dicts; "
            f"got {type(dicts).__name__}"
        )
    names = [name for each in dicts for name in each]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"functional_call: a key appears in multiple dictionaries: {twice}")
    return {name: each[name] for each in dicts for name in each}


def _module_places(module: Any) -> dict[str, tuple[dict[str, Any], str]]:
    """Return, by dotted name, the registry and the key of each parameter and buffer, ties included."""
    places = {}
    for prefix, owner in module.named_modules(remove_duplicate=False):
        for registry in (owner._parameters, owner._buffers):
            for key, value in registry.items():
                if value is not None:
                    places[f"{prefix}.{key}" if prefix else key] = (registry, key)
    return places


def _tied(
    places: Mapping[str, tuple[dict[str, Any], str]], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the tensors for all names of what they take the place of."""
    by_original: dict[int, Any] = {}
    for name, value in given.items():
        registry, key = places[name]
        known = by_original.setdefault(id(registry[key]), value)
        if known is not value:
            raise ValueError(
                f"functional_call: functional_call got multiple values for keys that are tied, one of them "
                f"{name}; pass one tensor for all, or tie_weights=False"
            )
    return {
        name: by_original[id(registry[key])]
        for name, (registry, key) in places.items()
        if id(registry[key]) in by_original
    }


@contextmanager
def _replaced(
    places: Mapping[str, tuple[dict[str, Any], str]], tensors: Mapping[str, Any], dicts: Any
) -> Iterator[None]:
    originals = {name: places[name][0][places[name][1]] for name in tensors}
    for name, tensor in tensors.items():
        registry, key = places[name]
        registry[key] = tensor
    try:
        yield
    finally:
        for name, original in originals.items():
            registry, key = places[name]
            for each in [dicts] if isinstance(dicts, dict) else dicts:
                if name in each and registry[key] is not tensors[name]:
                    each[name] = registry[key]
            registry[key] = original

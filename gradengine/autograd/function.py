"""Function: an operation whose forward and backward are written by hand, on Tensors.

Each call leaves one node on the tape. Where a call has several differentiable results, each has a small
node of its own that hands its gradient to that one; there they wait for each other, and backward runs once.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gradengine.autograd.saved_hooks import Packed, packed_values
from gradengine.backward_walk import unpack
from gradengine.devices import array_module
from gradengine.dtypes import is_floating_point
from gradengine.grad_mode import grad_mode, no_grad
from gradengine.in_place import check_recorded_write, is_recorded, take_over
from gradengine.operation import cast, sum_to_shape
from gradengine.tape import Node, RemovableHandle, Variable, View


class FunctionCtx:
    """What one call's forward leaves for its backward; any attribute may be put on it.

    `needs_input_grad` has one bool for each argument of `apply`.
    """

    needs_input_grad: tuple[bool, ...] = ()

    def __init__(self) -> None:
        self._to_save: tuple[Any, ...] = ()
        self._saved: tuple[Any, ...] | None = None  # while backward runs
        self._node: Callable[[], FunctionNode | None] = lambda: None
        self._without_gradient: tuple[Any, ...] = ()
        self._dirty: tuple[Any, ...] = ()
        self._materializes = True

    def save_for_backward(self, *tensors: Any) -> None:
        """Keep tensors, or None, for backward: inputs and results of forward, and what lies between.

        What is kept here is checked: writing to it in place before backward is an error.
        """
        for value in tensors:
            if value is not None and not isinstance(value, Variable):
                raise TypeError(
                    "save_for_backward can only save variables (Tensors or None), put anything else on ctx; "
                    f"got {type(value).__name__}"
                )
        self._to_save = tensors

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What `save_for_backward` kept, in its order. Raises RuntimeError once it is freed or stale."""
        if self._saved is not None:
            return self._saved
        node = self._node()
        return () if node is None else node.saved_tensors

    def mark_non_differentiable(self, *tensors: Any) -> None:
        """Say that these results need no gradient. Those that are not floating point never do."""
        self._without_gradient = tensors

    def mark_dirty(self, *tensors: Any) -> None:
        """Say that forward changed these inputs in place; each must be returned."""
        self._dirty = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Choose what backward gets for a result that nothing depends on: zeros (True), or None."""
        self._materializes = value


class FunctionNode(Node):
    """The node of one call; attributes of its ctx can be read here."""

    __slots__ = ("call",)

    def __init__(self, call: Call, label: str, shape: Any, dtype: Any) -> None:
        super().__init__(label, shape, dtype)
        self.call = call

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "call":
            raise AttributeError(name)
        return getattr(self.call.ctx, name)

    @property
    def saved_tensors(self) -> tuple[Any, ...]:
        """What the call kept; RuntimeError once it is freed, or was written in place."""
        edge = next(edge for edge in self.edges if edge is not None)
        if edge[1] is None:
            raise RuntimeError(
                f"{self.label}: Trying to backward through the graph a second time, or to directly access "
                "saved tensors after they have already been freed; pass retain_graph=True to the first "
                "backward() or grad()"
            )
        values = unpack(self, edge[2], True)
        return self.call.restored(
            [x.unpacked(True) if isinstance(x, Packed) else x for x in values]
        )

    def split(self, grad: Any) -> tuple[Any, ...]:
        """Return an incoming gradient as one for each result of forward, None where there is none."""
        gradients = grad.gradients if isinstance(grad, _Bundle) else {self.call.only: grad}
        return tuple([gradients.get(position) for position in range(len(self.call.results))])

    def join(self, grads: tuple[Any, ...]) -> Any:
        """Undo `split`."""
        gradients = {i: grad for i, grad in enumerate(grads) if grad is not None}
        if not gradients:
            return None
        return _Bundle(gradients) if self.call.only < 0 else gradients[self.call.only]

    def release(self) -> None:
        """Free the saved tensors, and the gradients of the last walk."""
        super().release()
        self.call.forget()


class ResultNode(Node):
    """The node of one of a call's several results: what is asked of it is asked of the call's."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.edges[0][0], name)

    @property
    def next_functions(self) -> tuple[tuple[Node | None, int], ...]:
        """One pair (node or None, 0) for each argument of the call."""
        return self.edges[0][0].next_functions

    @property
    def metadata(self) -> dict[Any, Any]:
        """A dict for whatever the user wants to note at the call."""
        return self.edges[0][0].metadata

    def register_hook(self, fn: Callable[..., Any]) -> RemovableHandle:
        """Call `fn(grad_inputs, grad_outputs)` after backward of the call, with all its results."""
        return self.edges[0][0].register_hook(fn)

    def register_prehook(self, fn: Callable[..., Any]) -> RemovableHandle:
        """Call `fn(grad_outputs)` before backward of the call, with all its results."""
        return self.edges[0][0].register_prehook(fn)


class _Result:
    """Of one result of forward, what backward has to know: its form, and whether it is on the tape."""

    __slots__ = ("array_module", "dtype", "is_differentiable", "shape")

    def __init__(self, value: Any, is_differentiable: bool) -> None:
        self.is_differentiable = is_differentiable
        self.array_module = array_module(value.array)
        self.shape, self.dtype = value.array.shape, value.array.dtype


class _Bundle:
    """Gradients by result, on their way from the results' nodes to the call's: they add up to one."""

    shape = ()
    dtype = None

    def __init__(self, gradients: dict[int, Any]) -> None:
        self.gradients = gradients

    def __add__(self, other: _Bundle) -> _Bundle:
        total = dict(self.gradients)
        for position, grad in other.gradients.items():
            total[position] = total[position] + grad if position in total else grad
        return _Bundle(total)


_MISSING: Any = object()


class Call:
    """One call on the tape: runs backward once for each incoming gradient, and hands out the shares."""

    def __init__(self, backward: Callable[..., Any], ctx: FunctionCtx, label: str) -> None:
        self.backward = backward
        self.ctx = ctx
        self.label = label
        self.inputs: list[Any] = []  # of each argument (shape, dtype), or None if it is no tensor
        self.results: list[_Result | None] = []
        self.only = 0  # the result that shares the call's node; -1 where several have their own
        self.from_forward: dict[int, int] = {}  # place among the saved tensors: which result it is
        self.forget()

    def forget(self) -> None:
        """Let go of the last walk's gradients."""
        # The incoming gradient, and the shares that are still to be handed out, by position; another
        # thread may put its own here at any time.
        self._last: tuple[Any, dict[int, Any]] | None = None

    def share(self, position: int, grad: Any, *saved: Any) -> Any:
        """Return the gradient of the argument at `position`, or None."""
        last = self._last
        share = (
            last[1].pop(position, _MISSING) if last is not None and last[0] is grad else _MISSING
        )
        if last is None or share is _MISSING:
            wanted = zip(self.ctx.needs_input_grad, self._run(grad, saved), strict=True)
            self._last = last = grad, {i: x for i, (needed, x) in enumerate(wanted) if needed}
            share = last[1].pop(position)
        if not last[1] and self._last is last:
            self.forget()
        return share

    def _run(self, grad: Any, saved: tuple[Any, ...]) -> list[Any]:
        gradients = grad.gradients if isinstance(grad, _Bundle) else {self.only: grad}
        recorded = isinstance(next(iter(gradients.values())), Variable)
        grads = [self._incoming(result, gradients.get(i)) for i, result in enumerate(self.results)]
        values = [x.unpacked(recorded) if isinstance(x, Packed) else x for x in saved]
        values = [x if x is None or isinstance(x, Variable) else Variable.Result(x) for x in values]
        self.ctx._saved = self.restored(values)
        try:
            returned = self.backward(self.ctx, *grads)
        finally:
            self.ctx._saved = None
        returned = list(returned) if isinstance(returned, (tuple, list)) else [returned]
        shares = self._checked(returned)
        return shares if recorded else [x if x is None else x.array for x in shares]

    def _incoming(self, result: _Result | None, grad: Any) -> Any:
        if grad is not None:
            return grad if isinstance(grad, Variable) else Variable.Result(grad)
        if result is None or not self.ctx._materializes:
            return None
        return Variable.Result(result.array_module.zeros(result.shape, result.dtype))

    def restored(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return the saved tensors, the results of forward among them as part of the graph."""
        values = list(values)
        node = self.ctx._node()
        for place, position in self.from_forward.items():
            if node is not None:
                values[place] = Variable.Result(
                    values[place].array, self._node_of_result(node, position)
                )
        return tuple(values)

    def _node_of_result(self, node: FunctionNode, position: int) -> Node:
        """Return the node of a result: the call's, or a small one that hands its gradient to that."""
        if position == self.only:
            return node
        result = self.results[position]
        own = ResultNode(self.label, result.shape, result.dtype)  # type: ignore[union-attr]
        own.edges = ((node, lambda grad: _Bundle({position: grad}), ()),)
        return own

    def _checked(self, returned: list[Any]) -> list[Any]:
        """Return what backward returned, one for each argument, as its argument's gradient."""
        expected = len(self.inputs)
        while len(returned) > expected and returned[-1] is None:
            returned.pop()
        if len(returned) != expected:
            raise RuntimeError(
                f"function {self.label} returned an incorrect number of gradients "
                f"(expected {expected}, got {len(returned)})"
            )
        return [self._checked_one(i, value) for i, value in enumerate(returned)]

    def _checked_one(self, position: int, value: Any) -> Any:
        if value is None:
            return None
        if not isinstance(value, Variable):
            raise TypeError(
                f"function {self.label}: backward must return Tensors, one for each argument of forward: "
                f"expected Variable or None (got {type(value).__name__}) at index {position}"
            )
        form = self.inputs[position]
        if form is None:
            raise RuntimeError(
                f"function {self.label} returned a gradient different from None at position {position}, "
                "but the corresponding forward input was not a Variable"
            )
        if not self.ctx.needs_input_grad[position]:
            return None
        shape, dtype = form
        if value.array.shape != shape:
            value = self._summed(position, value, shape)
        return value if value.array.dtype == dtype else cast(value, dtype=dtype)

    def _summed(self, position: int, value: Any, shape: tuple[int, ...]) -> Any:
        """Undo broadcasting of forward, as PyTorch does for a gradient that is larger than its input."""
        got = value.array.shape
        fits = len(got) >= len(shape) and all(
            size in (1, full) for size, full in zip(shape[::-1], got[::-1], strict=False)
        )
        if not fits:
            raise RuntimeError(
                f"Function {self.label} returned an invalid gradient at index {position} - got "
                f"{list(got)} but expected shape compatible with {list(shape)}"
            )
        return sum_to_shape(value, shape=shape)


class Function:
    """A differentiable operation by hand: subclass it, write `forward` and `backward`, call `apply`.

    Both are static. `forward(ctx, *args)` computes on Tensors, and nothing in it is recorded; or it is
    `forward(*args)` beside `setup_context(ctx, inputs, output)`. `backward(ctx, *grads)` gets the gradient
    of each result and returns one for each argument of `forward`, None where there is none.
    """

    def __init__(self) -> None:
        raise RuntimeError(
            f"{type(self).__name__}: a Function is not made; call {type(self).__name__}.apply(...)"
        )

    @staticmethod
    def forward(*args: Any, **kwargs: Any) -> Any:
        """Compute the result, a Tensor or a tuple."""
        raise NotImplementedError(
            "You must implement the forward function for custom autograd.Function."
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> Any:
        """Save on ctx what backward needs, for a `forward` that takes no ctx."""
        raise NotImplementedError("setup_context is not implemented.")

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        """Return the gradient of each argument of forward."""
        raise NotImplementedError(
            "You must implement either the backward or vjp method for your custom autograd.Function "
            "to use it with backward mode AD."
        )

    vjp = backward  # another name that a subclass may use

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Run forward and record it; returns what forward returns."""
        ctx = FunctionCtx()
        ctx.needs_input_grad = tuple(isinstance(x, Variable) and x.requires_grad for x in args)
        versions = [
            x._version if needed else 0
            for x, needed in zip(args, ctx.needs_input_grad, strict=True)
        ]
        with no_grad():
            if cls.setup_context is Function.setup_context:
                output = cls.forward(ctx, *args)
            else:
                output = cls.forward(*args)
                cls.setup_context(ctx, args, output)
        _check_writes(cls.__name__, ctx, args, output, versions)
        if not (grad_mode.enabled and any(ctx.needs_input_grad)):
            return output
        return _record(cls, ctx, args, output)


def _is_any(value: Any, others: Sequence[Any]) -> bool:
    return any(value is other for other in others)


def _check_writes(
    name: str, ctx: FunctionCtx, args: Sequence[Any], output: Any, versions: Sequence[int]
) -> None:
    """Raise where forward changed an input in place in a way that backward could not know of."""
    outputs = output if isinstance(output, tuple) else (output,)
    for x in ctx._dirty:
        if not _is_any(x, outputs):
            raise RuntimeError(
                f"{name}: some elements marked as dirty during the forward method were not returned as "
                "output; the inputs that are modified inplace must all be outputs of the Function"
            )
        if is_recorded(x, *args):
            check_recorded_write(name, x)
    for position, (x, needed) in enumerate(zip(args, ctx.needs_input_grad, strict=True)):
        if needed and x._version != versions[position] and not _is_any(x, ctx._dirty):
            raise RuntimeError(
                f"{name}: forward changed its argument {position} in place, which requires grad; call "
                "ctx.mark_dirty on it and return it, or change a clone()"
            )


def _record(cls: type[Function], ctx: FunctionCtx, args: tuple[Any, ...], output: Any) -> Any:
    """Put the call on the tape and return its results as part of the graph."""
    several = isinstance(output, tuple)
    outputs = list(output) if several else [output]
    call = Call(_backward_of(cls), ctx, f"{cls.__name__}Backward")
    call.inputs = [
        (x.array.shape, x.array.dtype) if isinstance(x, Variable) else None for x in args
    ]
    call.results = [
        _Result(x, is_floating_point(x.array.dtype) and not _is_any(x, ctx._without_gradient))
        if isinstance(x, Variable)
        else None
        for x in outputs
    ]
    differentiable = [i for i, x in enumerate(call.results) if x and x.is_differentiable]
    if not differentiable:
        return output
    alone = len(differentiable) == 1
    call.only = differentiable[0] if alone else -1
    form = call.results[call.only] if alone else _Bundle
    node = FunctionNode(call, call.label, form.shape, form.dtype)  # type: ignore[union-attr]
    ctx._node = weakref.ref(node)
    saved = packed_values(node, _saved(call, outputs))
    parents = [x.node if isinstance(x, Variable) else None for x in args]
    node.edges = [
        parent and (parent, functools.partial(call.share, i), saved)
        for i, parent in enumerate(parents)
    ]
    for i in differentiable:
        own = call._node_of_result(node, i)
        if _is_any(outputs[i], ctx._dirty):
            take_over(outputs[i], own, cls.__name__)
            outputs[i].version().stamp = node.index  # what was saved of it is what it holds now
        else:
            outputs[i] = _on_tape(outputs[i], args, own)
    return tuple(outputs) if several else outputs[0]


def _saved(call: Call, outputs: Sequence[Any]) -> tuple[Any, ...]:
    """Return what was saved, results without their place on the tape: they would keep it alive."""
    saved = []
    for place, value in enumerate(call.ctx._to_save):
        position = next((i for i, x in enumerate(outputs) if x is value and x is not None), None)
        result = None if position is None else call.results[position]
        if position is not None and result is not None and result.is_differentiable:
            call.from_forward[place] = position
            value = value.detach()
        saved.append(value)
    call.ctx._to_save = ()
    return tuple(saved)


_VIEW_OF_FUNCTION = (
    "this view was created inside a custom Function (or because an input was returned as-is), and a write "
    "would override the Function's backward: write to a clone() of the Function's result"
)


def _on_tape(result: Any, args: Sequence[Any], node: Node) -> Any:
    """Return a result of forward with its node: the same object, unless it has another place already."""
    if result.node is not None or _is_any(result, args):
        alias = Variable.Result(result.array)
        alias._counter = version = result.version()
        base = result if result._base is None else result._base
        alias._view = View(base, None, _VIEW_OF_FUNCTION)
        version.log.add_view(alias)
        result = alias
    elif result._view is not None:
        result._view.restriction = _VIEW_OF_FUNCTION
    result.node = node
    return result


def _backward_of(cls: type[Function]) -> Callable[..., Any]:
    by_vjp = cls.vjp is not Function.vjp
    if by_vjp and cls.backward is not Function.backward:
        raise RuntimeError(
            "Implementing both 'backward' and 'vjp' for a custom Function is not allowed. You should only "
            "implement one of them."
        )
    return cls.vjp if by_vjp else cls.backward


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a Function's backward as not differentiable itself: it may compute outside the tape.

    Differentiating twice is then an error instead of a wrong number.
    """

    @functools.wraps(backward)
    def call(ctx: Any, *grads: Any) -> Any:
        with no_grad():
            returned = backward(ctx, *grads)
        node = ctx._node()
        if not grad_mode.enabled or node is None:
            return returned
        parents = [edge[0] for edge in node.edges if edge is not None]
        parents += [g.node for g in grads if isinstance(g, Variable) and g.node is not None]
        several = isinstance(returned, (tuple, list))
        marked = [_undifferentiable(x, parents) for x in (returned if several else (returned,))]
        return tuple(marked) if several else marked[0]

    return call


def _undifferentiable(value: Any, parents: Sequence[Node]) -> Any:
    if not isinstance(value, Variable):
        return value
    node = Node("ErrorBackward", value.array.shape, value.array.dtype)
    node.edges = [(parent, _refuse_twice, ()) for parent in parents]
    return Variable.Result(value.array, node)


def _refuse_twice(grad: Any) -> NoReturn:
    raise RuntimeError(
        "trying to differentiate twice a function that was marked with @once_differentiable"
    )

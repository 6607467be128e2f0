"""In-place writes that are recorded: how a tensor, its base and their views move on along the tape.

A tensor that was written takes the node of the operation that computed what it holds now. If it is a view,
that is a part of what its base holds now: the base takes a node `CopySlices`, through which the gradient of
the part goes to the operation, and that of the rest to the base's former node.
"""

from __future__ import annotations

import functools
from typing import Any

from gradengine.devices import array_module
from gradengine.grad_mode import grad_mode
from gradengine.operation import operation
from gradengine.tape import Node, Steps, Variable, replayed


def is_recorded(tensor: Any, *values: Any) -> bool:
    """Return whether writing a function of `values` to `tensor` in place belongs on the tape."""
    if not grad_mode.enabled:
        return False
    for value in values:
        if isinstance(value, Variable) and value.node is not None:
            return True
    if tensor._view is None:
        return tensor._node is not None
    base = tensor._base
    # A view made outside the tape may require no gradient, and yet change what its base's depends on.
    return (base is not None and base.requires_grad) or tensor.requires_grad


def check_recorded_write(name: str, tensor: Any) -> None:
    """Raise RuntimeError for a write that the tape cannot follow: to a leaf, or one of several views."""
    base = tensor._base
    if base is not None:
        tensor._view.check(f"it is being modified by {name}")
        if base.is_leaf and base.requires_grad:
            raise RuntimeError(
                f"{name}: a view of a leaf Variable that requires grad is being used in an in-place "
                "operation; do it under no_grad(), or on a clone()"
            )
    if tensor.is_leaf and tensor.requires_grad:
        raise RuntimeError(
            f"{name}: a leaf Variable that requires grad is being used in an in-place operation; "
            "do it under no_grad(), or on a clone()"
        )


def take_over(tensor: Any, node: Node | None, name: str) -> None:
    """Note that the operation of `node` has written a tensor's memory in place, as its result.

    `node` has the tensor's shape and dtype; None stands for an operation without gradients.
    """
    base, former = tensor._base, tensor.node
    if base is None:
        base = tensor
        tensor.replace_node(former, node)
    else:
        base.replace_node(base.node, _copy_slices(base, tensor._view.steps, node))
    for view in base.views():
        view.set_outdated()
    tensor.written(name, None if node is None else node.index)


def _copy_slices(base: Any, steps: Steps, node: Node | None) -> Node | None:
    """Return the base's node after the operation of `node` has written the view that the steps give."""
    if node is None and base.node is None:
        return None
    written = Node("CopySlices", base.array.shape, base.array.dtype)
    layout = tuple(sorted(range(base.array.ndim), key=lambda dim: -abs(base.array.strides[dim])))
    rest = functools.partial(_rest, steps=steps, layout=layout)
    written.edges = (
        base.node and (base.node, rest, ()),
        node and (node, functools.partial(replayed, steps), ()),
    )
    return written


@operation
def _rest(x, *, steps, layout):
    """Return a copy of x with zeros in the view that the steps give of it.

    `layout` names the dims of the base from the largest stride to the smallest: in memory of that
    order, without gaps, every step that is a view of the base is one of the copy too.
    """
    shape = tuple([x.shape[dim] for dim in layout])
    order = sorted(range(len(layout)), key=layout.__getitem__)
    out = array_module(x).empty(shape, x.dtype).transpose(order)
    out[...] = x
    replayed(steps, out)[...] = 0
    return out


_rest.pullbacks(x=lambda grad, steps, layout: _rest(grad, steps=steps, layout=layout))

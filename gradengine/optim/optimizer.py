"""Optimizer: groups of parameters with options, a state for each parameter, the step over them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

from gradengine.devices import device_of, on_device_of
from gradengine.factories import empty_like
from gradengine.grad_mode import enable_grad
from gradengine.kernels.cuda.capture import current, repeated, valid_while
from gradengine.tape import note_writes
from gradengine.tensor import Tensor


class Optimizer:
    """What all optimizers share: subclasses check options and say how one parameter is updated.

    `param_groups` is a list of dicts: "params", and the options, which may be changed at any time.
    `state` holds a dict for each parameter that was updated.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any]) -> None:
        if isinstance(params, Tensor):
            raise TypeError(
                "params argument given to the optimizer should be an iterable of Tensors or dicts; "
                f"got {type(params).__name__}"
            )
        self.defaults = defaults
        self.state: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        self.param_groups: list[dict[str, Any]] = []
        self.step_count = 0
        given = list(params)
        if not given:
            raise ValueError("optimizer got an empty parameter list")
        for group in given if isinstance(given[0], dict) else [{"params": given}]:
            self.add_param_group(group)

    def check_options(self, options: dict[str, Any]) -> None:
        """Raise ValueError if the options of a group do not make sense."""
        raise NotImplementedError

    def update_all(
        self, updates: list[tuple[Any, Any, dict[str, Any]]], options: dict[str, Any]
    ) -> None:
        """Update the arrays of parameters of one group, in place: (values, gradient, state) of each.

        All values are on one device and of one dtype. `state` holds what is kept for a parameter
        between steps: tensors of its shape, and "step", a number.
        """
        numbers = _numbers(options)
        valid_while(lambda: _numbers(options) == numbers)  # they are part of what is launched
        for values, grad, state in updates:
            self.update(values, grad, state, options)

    def update(
        self, values: Any, grad: Any, state: dict[str, Any], options: dict[str, Any]
    ) -> None:
        """Update one parameter's array: what to write where nothing is gained by `update_all`."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters with their own options; what is not given is as it was for the first.

        Raises TypeError for what is no tensor, ValueError for tensors that are no leaves or are
        here already and for options out of range.
        """
        params = param_group["params"]
        params = [params] if isinstance(params, Tensor) else list(params)
        known = {id(known) for group in self.param_groups for known in group["params"]}
        for parameter in params:
            if not isinstance(parameter, Tensor):
                raise TypeError(
                    f"optimizer can only optimize Tensors; got {type(parameter).__name__}"
                )
            if not parameter.is_leaf:
                raise ValueError(
                    "can't optimize a non-leaf Tensor; optimize the leaf it is made of"
                )
            if id(parameter) in known:
                raise ValueError(
                    "some parameters appear in more than one parameter group, or twice in one; "
                    f"got a second time shape={parameter.shape}"
                )
            known.add(id(parameter))
        options = self.defaults | {k: v for k, v in param_group.items() if k != "params"}
        self.check_options(options)
        self.param_groups.append({"params": params} | options)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or with `set_to_none=False` fill them with zeros.

        The difference is seen: a parameter without a gradient is not updated at all.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    parameter.grad = None
                elif parameter.grad is not None:
                    parameter.grad.detach_().zero_()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have a gradient. Returns what `closure` did, before that."""
        loss = None
        if closure is not None:
            with enable_grad():
                loss = closure()
        for group in self.param_groups:
            updated = [p for p in group["params"] if p.grad is not None]
            updates: defaultdict[Any, list[Any]] = defaultdict(list)
            for parameter in updated:
                array = parameter.array
                update = array, parameter.grad.array, self.state[parameter]
                updates[device_of(array).index, array.dtype].append(update)
            for alike in updates.values():
                with on_device_of(alike[0][0]):
                    self.update_all(alike, group)
            note_writes(updated)
        self._rely_on_what_is_updated()
        repeated(self._count)
        return loss

    def _count(self) -> None:
        self.step_count += 1

    def _rely_on_what_is_updated(self) -> None:
        """Let a captured step hold only while parameters, groups and states are the same objects."""
        if current() is None:
            return
        state, parameters = self.state, self._parameters()
        arrays = [parameter.array for parameter in parameters]

        def is_same() -> bool:
            now = self._parameters()
            return (
                self.state is state
                and len(now) == len(parameters)
                and all(map(is_, now, parameters))
                and all(p.array is array for p, array in zip(now, arrays, strict=True))
            )

        valid_while(is_same)

    def state_dict(self) -> dict[str, Any]:
        """Return {"state": {index: ...}, "param_groups": [...]}, as PyTorch does.

        Parameters are numbered in the order of the groups; tensors are the ones in use, not copies.
        """
        index = {id(p): i for i, p in enumerate(self._parameters())}
        groups = [
            {k: v for k, v in group.items() if k != "params"}
            | {"params": [index[id(parameter)] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        state = {index[id(parameter)]: dict(kept) for parameter, kept in self.state.items()}
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over options and a copy of the state, also of PyTorch's optimizer of this name.

        Raises ValueError, before anything has changed, if groups or shapes are not this one's.
        """
        groups, state = state_dict["param_groups"], state_dict["state"]
        lengths = [len(group["params"]) for group in self.param_groups]
        if len(groups) != len(lengths):
            raise ValueError(
                "loaded state dict has a different number of parameter groups; "
                f"got {len(groups)}, expected {len(lengths)}"
            )
        if [len(group["params"]) for group in groups] != lengths:
            raise ValueError(
                "loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group; got {[len(g['params']) for g in groups]}, expected {lengths}"
            )
        numbers = [number for group in groups for number in group["params"]]
        loaded: defaultdict[Tensor, dict[str, Any]] = defaultdict(dict)
        for number, parameter in zip(numbers, self._parameters(), strict=True):
            if number in state:
                loaded[parameter] = _copied(number, state[number], parameter)
        self.state = loaded
        for group, saved in zip(self.param_groups, groups, strict=True):
            group.update({k: v for k, v in saved.items() if k != "params"})

    def _parameters(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def __repr__(self) -> str:
        lines = [f"{type(self).__name__} ("]
        for number, group in enumerate(self.param_groups):
            lines.append(f"Parameter Group {number}")
            lines += [f"    {key}: {group[key]}" for key in sorted(group) if key != "params"]
        return "\n".join([*lines, ")"])


def _numbers(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name != "params"}


def _copied(number: int, kept: dict[str, Any], parameter: Tensor) -> dict[str, Any]:
    """Return a parameter's loaded state: numbers of steps, and tensors like the parameter."""
    result: dict[str, Any] = {}
    for name, value in kept.items():
        if name == "step":
            result[name] = int(value)
        elif value is not None:
            shape = getattr(value, "shape", None)
            if shape != parameter.shape:
                raise ValueError(
                    "loaded state dict contains a tensor that doesn't fit its parameter; "
                    f"got state[{number}][{name!r}].shape={shape}, "
                    f"parameter.shape={parameter.shape}"
                )
            result[name] = empty_like(parameter).copy_(value)
    return result

"""What modules can be told to call: before and after `forward`, in backward, and around their state."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

from gradengine.nn import backward_hook
from gradengine.tape import RemovableHandle


class ForwardHook(NamedTuple):
    """A hook after `forward`, and how to call it."""

    function: Callable[..., Any]
    with_kwargs: bool
    always_call: bool

    def __call__(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        """Return the output, or what the hook puts in its place."""
        given = (module, args, kwargs, output) if self.with_kwargs else (module, args, output)
        changed = self.function(*given)
        return output if changed is None else changed


class BackwardHook(NamedTuple):
    """A hook of backward: `first` before the module's own backward, else after it."""

    function: Callable[..., Any]
    first: bool


class HookedModule:
    """The part of `Module` that is about hooks; every hook can be removed by the handle that is returned."""

    forward: Callable[..., Any]
    _forward_pre_hooks: OrderedDict[int, Any]
    _forward_hooks: OrderedDict[int, ForwardHook]
    _backward_hooks: OrderedDict[int, BackwardHook]

    def register_forward_pre_hook(
        self, hook: Callable[..., Any], *, prepend: bool = False, with_kwargs: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, args)` before every `forward`; what it returns replaces args.

        With `with_kwargs` it is `hook(module, args, kwargs)`, and returns None or (args, kwargs). With
        `prepend` it runs before those that are there.
        """
        return _register(self._forward_pre_hooks, (hook, with_kwargs), prepend)

    def register_forward_hook(
        self,
        hook: Callable[..., Any],
        *,
        prepend: bool = False,
        with_kwargs: bool = False,
        always_call: bool = False,
    ) -> RemovableHandle:
        """Call `hook(module, args, output)` after every `forward`; what it returns replaces output.

        With `with_kwargs` it is `hook(module, args, kwargs, output)`. With `always_call` it also runs where
        the call has raised: its output is None if there is none yet, and what it raises itself is a warning.
        """
        entry = ForwardHook(hook, with_kwargs, always_call)
        return _register(self._forward_hooks, entry, prepend)

    def register_full_backward_pre_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, grad_output)` once the gradients of the outputs are known.

        grad_output is a tuple with a place for each output, None where no gradient came. A tuple (or one
        tensor) that the hook returns replaces it.
        """
        return _register(self._backward_hooks, BackwardHook(hook, True), prepend)

    def register_full_backward_hook(
        self, hook: Callable[..., Any], prepend: bool = False
    ) -> RemovableHandle:
        """Call `hook(module, grad_input, grad_output)` once the gradients by the inputs are known.

        Both are tuples: one place for each positional argument and for each output, None where there is no
        gradient. A tuple (or one tensor) that the hook returns replaces grad_input. Neither the
        arguments nor the results of a module with backward hooks can be written in place.
        """
        return _register(self._backward_hooks, BackwardHook(hook, False), prepend)

    def register_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, prefix, keep_vars)` before this module's part of a state dict is collected."""
        return _register(self._state_hooks("state_dict_pre"), hook, False)

    def register_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, state_dict, prefix, local_metadata)` after this module's part was collected.

        It may change state_dict, which is the whole as far as it is collected, and returns None.
        """
        return _register(self._state_hooks("state_dict_post"), hook, False)

    def register_load_state_dict_pre_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call a hook before `load_state_dict` looks at the part of the state dict that is this module's.

        It is `hook(module, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys,
        error_msgs)`. It may change state_dict, a copy of that part, and add to the three lists.
        """
        return _register(self._state_hooks("load_pre"), hook, False)

    def register_load_state_dict_post_hook(self, hook: Callable[..., Any]) -> RemovableHandle:
        """Call `hook(module, incompatible_keys)` after `load_state_dict` has copied everything.

        It may change the two lists in place, and returns None; what is left in them then counts.
        """
        return _register(self._state_hooks("load_post"), hook, False)

    def _state_hooks(self, kind: str) -> OrderedDict[int, Any]:
        """Return the hooks of one kind around the state: the dicts are made when they are asked for."""
        return self.__dict__.setdefault(f"_{kind}_hooks", OrderedDict())

    def _call_with_hooks(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = _Call(self, args, kwargs)
        try:
            return call.run()
        except Exception:
            call.run_hooks_left()
            raise


class _Call:
    """One call of a module with hooks, as far as it has come."""

    def __init__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.module = module
        self.args, self.kwargs, self.output = args, kwargs, None
        hooks: Any = module._forward_hooks
        self.left = {key: hook for key, hook in hooks.items() if hook.always_call}

    def run(self) -> Any:
        """Run hooks and `forward`."""
        module = self.module
        for hook, with_kwargs in list(module._forward_pre_hooks.values()):
            given = (self.args, self.kwargs) if with_kwargs else (self.args,)
            changed = hook(module, *given)
            if changed is None:
                continue
            if with_kwargs:
                self.args, self.kwargs = _checked_pair(changed)
            else:
                self.args = changed if isinstance(changed, tuple) else (changed,)
        boundary = None
        if module._backward_hooks:
            hooks: list[BackwardHook] = list(module._backward_hooks.values())
            before = [hook.function for hook in hooks if hook.first]
            after = [hook.function for hook in hooks if not hook.first]
            boundary = backward_hook.Boundary(module, before, after, len(self.args))
            self.args = boundary.enter(self.args)
        self.output = module.forward(*self.args, **self.kwargs)
        for key, hook in list(module._forward_hooks.items()):
            self.left.pop(key, None)
            self.output = hook(module, self.args, self.kwargs, self.output)
        return self.output if boundary is None else boundary.leave(self.output)

    def run_hooks_left(self) -> None:
        """After an exception, run the hooks that are always called and were not yet."""
        for hook in self.left.values():
            try:
                self.output = hook(self.module, self.args, self.kwargs, self.output)
            except Exception as error:
                warnings.warn(
                    "module forward hook with always_call=True raised an exception that was silenced as "
                    f"another error was raised in forward: {error}",
                    stacklevel=4,
                )


def _register(hooks: OrderedDict[int, Any], entry: Any, prepend: bool) -> RemovableHandle:
    handle = RemovableHandle(hooks, entry)
    if prepend:
        hooks.move_to_end(next(reversed(hooks)), last=False)
    return handle


def _checked_pair(changed: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    pair = isinstance(changed, tuple) and len(changed) == 2
    if not pair or not isinstance(changed[1], dict):
        raise RuntimeError(
            "forward pre-hook: with_kwargs hooks must return None or a tuple (args, kwargs); "
            f"got {changed!r}"
        )
    args, kwargs = changed
    return (args if isinstance(args, tuple) else (args,)), kwargs

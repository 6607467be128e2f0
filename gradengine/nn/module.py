"""Module: named parameters, buffers and child modules, and what can be done to a tree of them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

from gradengine.grad_mode import no_grad
from gradengine.nn import state
from gradengine.nn.hooks import HookedModule
from gradengine.tensor import Parameter, Tensor

_REGISTRIES = ("_parameters", "_buffers", "_modules")


class Module(HookedModule):
    """A function with parameters: subclass it, assign parameters and modules, define `forward`.

    Attributes that are a `Parameter` or a `Module` are registered by their name, as in PyTorch;
    other tensors become part of the state through `register_buffer`.
    """

    training: bool
    _version = 1  # of the layer's form in a state dict, kept in its `_metadata`

    def __init__(self) -> None:
        self.__dict__.update(
            training=True,
            _parameters={},
            _buffers={},
            _modules={},
            _transient_buffers=set(),  # names of buffers that are not part of the state dict
            _forward_pre_hooks=OrderedDict(),
            _forward_hooks=OrderedDict(),
            _backward_hooks=OrderedDict(),
        )

    # -- the call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the module's result. Raises NotImplementedError until a subclass defines it."""
        raise NotImplementedError(
            f'Module [{type(self).__name__}] is missing the required "forward" function'
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._forward_pre_hooks or self._forward_hooks or self._backward_hooks:
            return self._call_with_hooks(args, kwargs)
        return self.forward(*args, **kwargs)

    # -- attributes

    def __getattr__(self, name: str) -> Any:
        own = self.__dict__
        for registry in _REGISTRIES:
            registered = own.get(registry)
            if registered is not None and name in registered:
                return registered[name]
        kind = type(self).__name__
        if "_parameters" not in own and not name.startswith("__"):
            raise AttributeError(f"'{kind}' has no {name!r} before Module.__init__() call")
        raise AttributeError(f"'{kind}' object has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        own = self.__dict__
        if isinstance(value, Parameter):
            self._forget(name, "_parameters")
            self.register_parameter(name, value)
        elif isinstance(value, Module):
            self._forget(name, "_modules")
            self.register_module(name, value)
        elif name in own.get("_parameters", ()):
            self.register_parameter(name, value)
        elif name in own.get("_modules", ()):
            self.register_module(name, value)
        elif name in own.get("_buffers", ()):
            self.register_buffer(name, value, name not in self._transient_buffers)
        else:
            object.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        if not self._forget(name):
            object.__delattr__(self, name)

    def __dir__(self) -> list[str]:
        registered = [name for registry in _REGISTRIES for name in self.__dict__.get(registry, ())]
        return sorted({*super().__dir__(), *registered})

    def _forget(self, name: str, kept: str = "") -> bool:
        """Take `name` out of all registries but `kept`; return whether it was in one.

        With `kept`, which is about to get it, also take it out of the instance's own attributes.
        """
        own = self.__dict__
        found = False
        for registry in _REGISTRIES:
            if registry != kept and name in own.get(registry, ()):
                del own[registry][name]
                found = True
        if kept:
            own.pop(name, None)
        if "_transient_buffers" in own:
            self._transient_buffers.discard(name)
        return found

    def register_parameter(self, name: str, param: Parameter | None) -> None:
        """Add a parameter by name; None keeps the name for one that is not there.

        Raises KeyError for a name that is taken or holds a dot, TypeError for what is no Parameter.
        """
        self._check_name("parameter", "_parameters", name)
        if param is not None and not isinstance(param, Parameter):
            _refuse_kind(param, "parameter", name, "gradengine.nn.Parameter")
        self._parameters[name] = param

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Add a tensor that is part of the module's state, but no parameter.

        It moves with `to`, and is in the state dict if `persistent`. Raises as
        `register_parameter` does.
        """
        self._check_name("buffer", "_buffers", name)
        if tensor is not None and not isinstance(tensor, Tensor):
            _refuse_kind(tensor, "buffer", name, "gradengine.Tensor")
        self._buffers[name] = tensor
        if persistent:
            self._transient_buffers.discard(name)
        else:
            self._transient_buffers.add(name)

    def register_module(self, name: str, module: Module | None) -> None:
        """Add a child module by name. Raises as `register_parameter`."""
        self._check_name("module", "_modules", name)
        if module is not None and not isinstance(module, Module):
            _refuse_kind(module, "child module", name, "gradengine.nn.Module")
        self._modules[name] = module

    add_module = register_module

    def _check_name(self, kind: str, registry: str, name: str) -> None:
        if registry not in self.__dict__:
            raise AttributeError(
                f"cannot assign {kind}s before Module.__init__() call; got {name=}"
            )
        if not isinstance(name, str):
            raise TypeError(f"{kind} name should be a string; got {type(name).__name__}")
        if not name or "." in name:
            raise KeyError(f"{kind} name cannot be empty or contain a dot; got name={name}")
        if name not in self.__dict__[registry] and hasattr(self, name):
            raise KeyError(f"attribute already exists; got name={name}")

    # -- iteration

    def named_modules(
        self, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Module]]:
        """Yield this module and all below it with their dotted names, parents first, each once."""
        return self._walk(prefix, set() if remove_duplicate else None)

    def _walk(self, prefix: str, seen: set[Module] | None) -> Iterator[tuple[str, Module]]:
        if seen is not None:
            if self in seen:
                return
            seen.add(self)
        yield prefix, self
        for name, module in self._modules.items():
            if module is not None:
                yield from module._walk(f"{prefix}.{name}" if prefix else name, seen)

    def modules(self) -> Iterator[Module]:
        """Yield this module and all below it, each once."""
        return (module for _, module in self.named_modules())

    def named_children(self) -> Iterator[tuple[str, Module]]:
        """Yield the modules directly below this one with their names, each once."""
        seen = {None}
        for name, module in self._modules.items():
            if module not in seen:
                seen.add(module)
                yield name, module

    def children(self) -> Iterator[Module]:
        """Yield the modules directly below this one, each once."""
        return (module for _, module in self.named_children())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Parameter]]:
        """Yield parameters with their dotted names; a shared one once, under its first name."""
        return self._named_tensors("_parameters", prefix, recurse, remove_duplicate)

    def parameters(self, recurse: bool = True) -> Iterator[Parameter]:
        """Yield the parameters of this module and, with `recurse`, of all below it, each once."""
        return (parameter for _, parameter in self.named_parameters(recurse=recurse))

    def trainable_parameters(self) -> Iterator[Parameter]:
        """Yield the parameters that require a gradient."""
        return (parameter for parameter in self.parameters() if parameter.requires_grad)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield buffers with their dotted names; a shared one once, under its first name."""
        return self._named_tensors("_buffers", prefix, recurse, remove_duplicate)

    def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
        """Yield the buffers of this module and, with `recurse`, of all below it, each once."""
        return (buffer for _, buffer in self.named_buffers(recurse=recurse))

    def _named_tensors(
        self, registry: str, prefix: str, recurse: bool, remove_duplicate: bool
    ) -> Iterator[tuple[str, Any]]:
        seen: set[int] = set()
        modules = self.named_modules(prefix, remove_duplicate) if recurse else [(prefix, self)]
        for path, module in modules:
            for name, tensor in module.__dict__[registry].items():
                if tensor is None or (remove_duplicate and id(tensor) in seen):
                    continue
                seen.add(id(tensor))
                yield (f"{path}.{name}" if path else name), tensor

    def get_submodule(self, target: str) -> Module:
        """Return the module at a dotted path; "" is this one. Raises AttributeError if none is."""
        module = self
        for name in target.split(".") if target else ():
            found = getattr(module, name, None)
            if not isinstance(found, Module):
                raise AttributeError(
                    f"{type(module).__name__} has no module `{name}`; got target={target!r}"
                )
            module = found
        return module

    def get_parameter(self, target: str) -> Parameter:
        """Return the parameter at a dotted path. Raises AttributeError if there is none."""
        return self._get_tensor("_parameters", target)

    def get_buffer(self, target: str) -> Tensor:
        """Return the buffer at a dotted path. Raises AttributeError if there is none."""
        return self._get_tensor("_buffers", target)

    def _get_tensor(self, registry: str, target: str) -> Any:
        path, _, name = target.rpartition(".")
        module = self.get_submodule(path)
        found = module.__dict__[registry].get(name)
        if found is None:
            kind = registry.strip("_s")
            raise AttributeError(
                f"{type(module).__name__} has no {kind} `{name}`; got target={target!r}"
            )
        return found

    # -- state

    def state_dict(self, *, prefix: str = "", keep_vars: bool = False) -> OrderedDict[str, Tensor]:
        """Return all parameters and persistent buffers by dotted name, in order of registration.

        The tensors are detached and share the module's memory: copy them to keep present values.
        With `keep_vars` they are the parameters and buffers themselves. The dict's `_metadata` is
        about the layers' versions.
        """
        return state.collect(self, prefix, keep_vars)

    def load_state_dict(
        self, state_dict: Any, strict: bool = True, assign: bool = False
    ) -> state.IncompatibleKeys:
        """Copy tensors or arrays by name into parameters and buffers, whose dtype and device stay.

        All is checked first: after a RuntimeError, which lists every missing or unexpected key (if
        `strict`) and every mismatched shape (always), nothing has changed; but where hooks run after
        loading, keys are only judged then. With `assign` the given memory is taken over, not copied.
        """
        return state.load(self, state_dict, strict, assign)

    def _upgrade_state(self, given: dict[str, Any], prefix: str, version: int | None) -> None:
        """Bring what an older version of this layer wrote to the present form, in place."""

    # -- modes

    def train(self, mode: bool = True) -> Self:
        """Put this module and all below it into training mode, or by False into evaluation mode."""
        if not isinstance(mode, bool):
            raise ValueError(f"train: training mode is expected to be boolean; got mode={mode!r}")
        for module in self.modules():
            module.training = mode
        return self

    def eval(self) -> Self:
        """Put this module and all below it into evaluation mode."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Set `requires_grad` of all parameters. To stop BatchNorm's statistics too, `freeze`."""
        for parameter in self.parameters():
            parameter.requires_grad = requires_grad
        return self

    def freeze(self) -> Self:
        """Keep everything here as it is: parameters, and the running statistics of every BatchNorm.

        Parameters stop requiring gradients and lose the one they have; BatchNorm normalizes by its
        running statistics, and does not move them, even in training mode. `unfreeze` undoes it.
        """
        for module in self.modules():
            module._freeze_own(True)
        return self

    def unfreeze(self) -> Self:
        """Let everything here train again: undo `freeze`."""
        for module in self.modules():
            module._freeze_own(False)
        return self

    def _freeze_own(self, frozen: bool) -> None:
        """Freeze or unfreeze what belongs to this module alone."""
        for parameter in self.parameters(recurse=False):
            parameter.requires_grad = not frozen and parameter.is_floating_point()
            if frozen:
                parameter.grad = None  # an optimizer would go on stepping along it

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients of all parameters, or fill them with zeros."""
        for parameter in self.parameters():
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.detach_().zero_()

    # -- conversion

    def apply(self, function: Callable[[Module], Any]) -> Self:
        """Call `function` on every module below this one, then on this one, and return this one."""
        for module in self.children():
            module.apply(function)
        function(self)
        return self

    def to(
        self, *args: Any, dtype: Any = None, device: Any = None, non_blocking: bool = False
    ) -> Self:
        """Convert all parameters, their gradients and buffers in place, and return this module.

        Takes `to(device)`, `to(dtype)`, `to(device, dtype)` or `to(tensor)`. Parameters stay the
        same objects. A dtype applies to floating point tensors only, and is one (else TypeError).
        `non_blocking` is accepted for PyTorch's sake.
        """

        def convert(tensor: Tensor) -> Tensor:
            converted = tensor.to(*args, dtype=dtype, device=device)
            if not tensor.is_floating_point():
                return tensor.to(converted.device)
            if not converted.is_floating_point():
                raise TypeError(
                    f"to: a module only accepts floating point dtypes; got dtype={converted.dtype}"
                )
            return converted

        return self._convert(convert)

    def _convert(self, convert: Callable[[Tensor], Tensor]) -> Self:
        with no_grad():
            for tensor in (*self.parameters(), *self.buffers()):
                gradient = tensor.grad if tensor.is_leaf else None
                for target in (tensor, gradient):
                    if target is not None:
                        converted = convert(target.detach())
                        if converted.array is not target.array:
                            target.data = converted
        return self

    def cpu(self) -> Self:
        """Move everything to the CPU."""
        return self.to("cpu")

    def cuda(self, device: Any = "cuda") -> Self:
        """Move everything to a GPU. Raises RuntimeError that says why if there is none."""
        return self.to(device=device)

    def float(self) -> Self:
        """Convert floating point tensors to float32."""
        return self.to(dtype="float32")

    def double(self) -> Self:
        """Convert floating point tensors to float64."""
        return self.to(dtype="float64")

    def half(self) -> Self:
        """Convert floating point tensors to float16."""
        return self.to(dtype="float16")

    def bfloat16(self) -> Self:
        """Convert floating point tensors to bfloat16."""
        return self.to(dtype="bfloat16")

    # -- representation

    def extra_repr(self) -> str:
        """Return what stands between the parentheses of this module's own line."""
        return ""

    def __repr__(self) -> str:
        children = [
            f"({name}): {module!r}".replace("\n", "\n  ") for name, module in self._modules.items()
        ]
        extra = self.extra_repr()
        if not children:
            return f"{type(self).__name__}({extra})"
        lines = [extra, *children] if extra else children
        return "\n  ".join([f"{type(self).__name__}(", *lines]) + "\n)"


def _refuse_kind(value: Any, kind: str, name: str, expected: str) -> NoReturn:
    raise TypeError(
        f"cannot assign '{type(value).__name__}' as {kind} '{name}' ({expected} or None expected)"
    )

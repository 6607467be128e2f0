"""Modules that hold modules: in a chain, in a list, in a dict."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Self

from gradengine.nn.activation import ReLU
from gradengine.nn.convolution import Conv2d
from gradengine.nn.fusion import conv_norm
from gradengine.nn.module import Module
from gradengine.nn.normalization import BatchNorm2d


class _Indexed(Module):
    """Modules by position; their names are the positions unless others were given."""

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())

    def __getitem__(self, index: int | slice) -> Any:
        """Return the module at `index`, or a container of the same kind with those of a slice."""
        if isinstance(index, slice):
            return self._of(dict(list(self._modules.items())[index]))
        return self._modules[self._name(index)]

    def __setitem__(self, index: int, module: Module) -> None:
        self.register_module(self._name(index), module)

    def __delitem__(self, index: int | slice) -> None:
        names = list(self._modules)
        for name in names[index] if isinstance(index, slice) else [self._name(index)]:
            del self._modules[name]
        self._renumber(list(self))

    def _of(self, modules: dict[str, Module]) -> Self:
        raise NotImplementedError

    def _name(self, index: int) -> str:
        names = list(self._modules)
        if not -len(names) <= index < len(names):
            raise IndexError(
                f"{type(self).__name__}: index must be in [-{len(names)}, {len(names) - 1}]; "
                f"got {index=}"
            )
        return names[index]

    def _renumber(self, modules: Iterable[Module]) -> None:
        self._modules.clear()
        for module in modules:
            self.append(module)

    def append(self, module: Module) -> Self:
        """Add a module at the end."""
        self.register_module(str(len(self)), module)
        return self

    def extend(self, modules: Iterable[Module]) -> Self:
        """Add modules at the end."""
        for module in list(modules):
            self.append(module)
        return self

    def insert(self, index: int, module: Module) -> Self:
        """Add a module before the one at `index`."""
        modules = list(self)
        modules.insert(index, module)
        self._renumber(modules)
        return self


class Sequential(_Indexed):
    """Apply modules one after the other: `Sequential(a, b)`, or named: `Sequential({"x": a})`.

    A Conv2d, the BatchNorm2d after it and a ReLU after that run as one step: see `conv_norm`.
    """

    def __init__(self, *modules: Any) -> None:
        super().__init__()
        named = len(modules) == 1 and isinstance(modules[0], dict)
        for name, module in modules[0].items() if named else enumerate(modules):
            self.register_module(str(name), module)

    def _of(self, modules: dict[str, Module]) -> Self:
        return type(self)(OrderedDict(modules))

    def forward(self, x: Any) -> Any:
        modules = list(self)
        place = 0
        while place < len(modules):
            kinds = [type(module) for module in modules[place : place + 3]]
            if kinds[:2] != [Conv2d, BatchNorm2d]:
                x = modules[place](x)
                place += 1
                continue
            activation = modules[place + 2] if kinds[2:] == [ReLU] else None
            x = conv_norm(x, modules[place], modules[place + 1], activation=activation)
            place += 2 if activation is None else 3
        return x


class ModuleList(_Indexed):
    """A list whose modules are registered. It has no `forward`."""

    def __init__(self, modules: Iterable[Module] = ()) -> None:
        super().__init__()
        self.extend(modules)

    def _of(self, modules: dict[str, Module]) -> Self:
        return type(self)(modules.values())


class ModuleDict(Module):
    """A dict of modules that are registered under their keys. It has no `forward`."""

    def __init__(self, modules: Mapping[str, Module] | None = None) -> None:
        super().__init__()
        self.update(modules or {})

    def __getitem__(self, key: str) -> Any:
        return self._modules[key]

    def __setitem__(self, key: str, module: Module) -> None:
        self.register_module(key, module)

    def __delitem__(self, key: str) -> None:
        del self._modules[key]

    def __len__(self) -> int:
        return len(self._modules)

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __contains__(self, key: str) -> bool:
        return key in self._modules

    def keys(self) -> Any:
        """Return the keys."""
        return self._modules.keys()

    def values(self) -> Any:
        """Return the modules."""
        return self._modules.values()

    def items(self) -> Any:
        """Return the pairs of key and module."""
        return self._modules.items()

    def update(self, modules: Mapping[str, Module]) -> None:
        """Add modules by key, in place of those that have the same."""
        for key, module in modules.items():
            self[key] = module

    def pop(self, key: str) -> Any:
        """Take a module out and return it."""
        return self._modules.pop(key)

    def clear(self) -> None:
        """Take all modules out."""
        self._modules.clear()

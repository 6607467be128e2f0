"""A module's state by name: how it is collected, and how one is checked and then copied in."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from gradengine.devices import array_module
from gradengine.dtypes import as_dtype, is_floating_point
from gradengine.grad_mode import no_grad
from gradengine.operation import array_of
from gradengine.tensor import Tensor

if TYPE_CHECKING:
    from gradengine.nn.module import Module


class IncompatibleKeys(NamedTuple):
    """The keys that a state dict lacked, and those that the module lacks."""

    missing_keys: list[str]
    unexpected_keys: list[str]

    def __repr__(self) -> str:
        if not self.missing_keys and not self.unexpected_keys:
            return "<All keys matched successfully>"
        return (
            f"_IncompatibleKeys(missing_keys={self.missing_keys}, "
            f"unexpected_keys={self.unexpected_keys})"
        )

    __str__ = __repr__


def _tensors(module: Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of the state under each of its names."""
    for path, part in module.named_modules(remove_duplicate=False):
        start = f"{prefix}{path}." if path else prefix
        for name, tensor in _own_tensors(part):
            yield start + name, tensor


def _own_tensors(module: Module) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in (*module._parameters.items(), *module._buffers.items()):
        if tensor is not None and name not in module._transient_buffers:
            yield name, tensor


def collect(module: Module, prefix: str, keep_vars: bool) -> OrderedDict[str, Tensor]:
    """Return the state dict; see `Module.state_dict`."""
    result: Any = OrderedDict()
    result._metadata = OrderedDict()
    _collect(module, prefix, keep_vars, result)
    return result


def _collect(module: Module, prefix: str, keep_vars: bool, result: Any) -> None:
    """Add a module's part and its children's, between the hooks before and after."""
    metadata = result._metadata[prefix.removesuffix(".")] = {"version": module._version}
    for hook in _hooks(module, "state_dict_pre"):
        hook(module, prefix, keep_vars)
    for name, tensor in _own_tensors(module):
        result[prefix + name] = tensor if keep_vars else tensor.detach()
    for name, child in module._modules.items():
        if child is not None:
            _collect(child, f"{prefix}{name}.", keep_vars, result)
    for hook in _hooks(module, "state_dict_post"):
        if hook(module, result, prefix, metadata) is not None:
            raise RuntimeError("state_dict: a state_dict post-hook must return None")


def _hooks(module: Module, kind: str) -> list[Any]:
    return list(module.__dict__.get(f"_{kind}_hooks", {}).values())


def load(module: Module, state_dict: Any, strict: bool, assign: bool) -> IncompatibleKeys:
    """Check a state dict, then copy it into the module; see `Module.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict: expected state_dict to be dict-like; got {type(state_dict).__name__}"
        )
    given = dict(state_dict)
    keys = IncompatibleKeys([], [])
    problems: list[str] = []
    metadata = getattr(state_dict, "_metadata", {})
    parts = list(module.named_modules(remove_duplicate=False))
    for path, part in parts:
        _prepare(part, given, path, metadata.get(path, {}), (strict, *keys, problems))
    targets = dict(_tensors(module, ""))
    keys.missing_keys.extend(key for key in targets if key not in given)
    keys.unexpected_keys.extend(key for key in given if key not in targets)
    pairs = [(key, target, given[key]) for key, target in targets.items() if key in given]
    problems.extend(filter(None, (_problem(*pair, assign) for pair in pairs)))
    last_words = [(part, hook) for _, part in reversed(parts) for hook in _hooks(part, "load_post")]
    _refuse(type(module).__name__, keys, problems, strict and not last_words)
    with no_grad():
        for _, target, value in pairs:
            if assign:
                target.grad = None
                target.data = Tensor(array_of(value))
            else:
                target.copy_(value)
    for part, hook in last_words:
        if hook(part, keys) is not None:
            raise TypeError(
                "load_state_dict: a post-hook is not expected to return new values; it may change "
                "incompatible_keys in place"
            )
    _refuse(type(module).__name__, keys, [], strict)
    return keys


def _prepare(
    part: Module, given: dict[str, Any], path: str, metadata: Any, rest: tuple[Any, ...]
) -> None:
    """Let the hooks before loading change a module's part of a state dict, then bring it up to date."""
    prefix = f"{path}." if path else ""
    hooks = _hooks(part, "load_pre")
    if hooks:
        local = {key: value for key, value in given.items() if key.startswith(prefix)}
        before = set(local)
        for hook in hooks:
            hook(part, local, prefix, metadata, *rest)
        for key in before - set(local):
            del given[key]
        given.update(local)
    part._upgrade_state(given, prefix, metadata.get("version"))


def _problem(key: str, target: Tensor, value: Any, assign: bool) -> str | None:
    """Say why `value` cannot become `target`, or return None."""
    array = array_of(value)
    try:
        array_module(array)
        floating = is_floating_point(as_dtype(array.dtype))
    except TypeError:
        return (
            f'while copying "{key}": expected a Tensor or an array of numbers from the checkpoint; '
            f"got {type(array).__name__}"
        )
    if array.shape != target.shape:
        return (
            f"size mismatch for {key}: copying a param with shape {array.shape} from checkpoint, "
            f"the shape in current model is {target.shape}."
        )
    if assign and floating != target.is_floating_point():
        return f"dtype mismatch for {key}: cannot assign {array.dtype} in place of {target.dtype}."
    return None


def _refuse(name: str, keys: IncompatibleKeys, problems: list[str], strict: bool) -> None:
    if strict and keys.unexpected_keys:
        problems.insert(0, f"Unexpected key(s) in state_dict: {_quoted(keys.unexpected_keys)}.")
    if strict and keys.missing_keys:
        problems.insert(0, f"Missing key(s) in state_dict: {_quoted(keys.missing_keys)}.")
    if problems:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {name}:", *problems]))


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)

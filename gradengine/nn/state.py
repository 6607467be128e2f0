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
        for name, tensor in (*part._parameters.items(), *part._buffers.items()):
            if tensor is not None and name not in part._transient_buffers:
                yield start + name, tensor


def collect(module: Module, prefix: str, keep_vars: bool) -> OrderedDict[str, Tensor]:
    """Return the state dict; see `Module.state_dict`."""
    result: OrderedDict[str, Tensor] = OrderedDict()
    for key, tensor in _tensors(module, prefix):
        result[key] = tensor if keep_vars else tensor.detach()
    versions = {
        (prefix + path).rstrip("."): {"version": part._version}
        for path, part in module.named_modules(remove_duplicate=False)
    }
    result._metadata = OrderedDict(versions)  # type: ignore[attr-defined]
    return result


def load(module: Module, state_dict: Any, strict: bool, assign: bool) -> IncompatibleKeys:
    """Check a state dict, then copy it into the module; see `Module.load_state_dict`."""
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"load_state_dict: expected state_dict to be dict-like; got {type(state_dict).__name__}"
        )
    given = dict(state_dict)
    metadata = getattr(state_dict, "_metadata", {})
    for path, part in module.named_modules(remove_duplicate=False):
        version = metadata.get(path, {}).get("version")
        part._upgrade_state(given, f"{path}." if path else "", version)
    targets = dict(_tensors(module, ""))
    missing = [key for key in targets if key not in given]
    unexpected = [key for key in given if key not in targets]
    pairs = [(key, target, given[key]) for key, target in targets.items() if key in given]
    problems = [_problem(*pair, assign) for pair in pairs]
    _refuse(type(module).__name__, missing, unexpected, list(filter(None, problems)), strict)
    with no_grad():
        for _, target, value in pairs:
            if assign:
                target.grad = None
                target.data = Tensor(array_of(value))
            else:
                target.copy_(value)
    return IncompatibleKeys(missing, unexpected)


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


def _refuse(
    name: str, missing: list[str], unexpected: list[str], problems: list[str], strict: bool
) -> None:
    if strict and unexpected:
        problems.insert(0, f"Unexpected key(s) in state_dict: {_quoted(unexpected)}.")
    if strict and missing:
        problems.insert(0, f"Missing key(s) in state_dict: {_quoted(missing)}.")
    if problems:
        raise RuntimeError("\n\t".join([f"Error(s) in loading state_dict for {name}:", *problems]))


def _quoted(keys: list[str]) -> str:
    return ", ".join(f'"{key}"' for key in keys)

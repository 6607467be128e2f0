"""Proof that what is frozen stays as it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gradengine.devices import to_device
from gradengine.nn.module import Module


class FrozenAudit:
    """What was frozen in a model when this was made, by name and digest; see `audit_frozen`."""

    def __init__(self, model: Module) -> None:
        self._model = model
        self._digests = {name: _digest(tensor.array) for name, tensor in _frozen(model)}

    @property
    def names(self) -> list[str]:
        """The names of the tensors under audit."""
        return list(self._digests)

    def moved(self) -> list[str]:
        """Return the names whose tensors have other bits now, or are gone. Waits for the GPU."""
        model = self._model
        tensors: dict[str, Any] = dict(model.named_parameters(remove_duplicate=False))
        tensors |= dict(model.named_buffers(remove_duplicate=False))
        return [
            name
            for name, digest in self._digests.items()
            if name not in tensors or _digest(tensors[name].array) != digest
        ]

    def __enter__(self) -> FrozenAudit:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        moved = self.moved() if error is None else []
        if moved:
            raise RuntimeError(f"audit_frozen: frozen tensors have moved; got {', '.join(moved)}")


def audit_frozen(model: Module) -> FrozenAudit:
    """Remember the bits of everything that is frozen in `model`, to tell later what moved.

    That is every parameter with requires_grad=False, and the buffers of modules all of whose own
    parameters are. Ask `moved()`, or use it in `with`: its end raises RuntimeError if any moved.
    """
    return FrozenAudit(model)


def _frozen(model: Module) -> Iterator[tuple[str, Any]]:
    for path, module in model.named_modules():
        parameters = list(module.named_parameters(path, recurse=False))
        frozen = [(name, tensor) for name, tensor in parameters if not tensor.requires_grad]
        yield from frozen
        # A layer without parameters is frozen only if freeze() was called on it.
        if len(frozen) == len(parameters) and (parameters or getattr(module, "fixed", False)):
            yield from module.named_buffers(path, recurse=False)


def _digest(array: Any) -> bytes:
    import hashlib  # starts OpenSSL, which is slow

    content = to_device(array, "cpu").tobytes()
    return hashlib.blake2b(content, digest_size=16, usedforsecurity=False).digest()

"""Training in mixed precision: `autocast` for forward, `GradScaler` for gradients in float16."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from gradengine import devices, kernels
from gradengine.autocast_mode import autocast
from gradengine.factories import tensor
from gradengine.grad_mode import no_grad
from gradengine.tensor import Tensor

__all__ = ["GradScaler", "autocast"]


class GradScaler:
    """Scale losses, so that small gradients do not vanish in float16, and choose the scale.

        scaler.scale(loss).backward()
        scaler.step(optimizer)  # divides the gradients by the scale; skips a step with inf or nan
        scaler.update()

    The scale starts at init_scale. `update` multiplies it by backoff_factor after a skipped step,
    and by growth_factor after growth_interval others in a row. bfloat16 has float32's range and
    needs no scaler: not `enabled`, it does nothing but call the optimizer. `device` is taken for
    PyTorch's sake; the scale lies where the losses do. Micikevicius et al., arXiv:1710.03740.
    Raises ValueError unless growth_factor > 1 > backoff_factor.
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
    ) -> None:
        devices.device(device)
        if enabled and not growth_factor > 1:
            raise ValueError(
                "GradScaler: The growth factor must be > 1.0 (growth_factor > 1); "
                f"got growth_factor={growth_factor}"
            )
        if enabled and not backoff_factor < 1:
            raise ValueError(
                "GradScaler: The backoff factor must be < 1.0 (backoff_factor < 1); "
                f"got backoff_factor={backoff_factor}"
            )
        self._enabled = enabled
        self._scale = float(init_scale)
        self._growth_factor = growth_factor
        self._backoff_factor = backoff_factor
        self._growth_interval = growth_interval
        self._growth_tracker = 0  # steps since the scale last changed
        # The scale on each device that a loss was on: a captured step reads it there.
        self._scales: dict[devices.Device, Tensor] = {}
        self._states: defaultdict[int, _State] = defaultdict(_State)  # by id of the optimizer

    # -- an iteration

    def scale(self, outputs: Any) -> Any:
        """Return a tensor, or those in a list, tuple or other iterable, times the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, Tensor):
            return outputs * self._scale_on(outputs.device)
        if not isinstance(outputs, Iterable):
            raise ValueError(
                "scale: outputs must be a Tensor or an iterable of Tensors; "
                f"got {type(outputs).__name__}"
            )
        scaled = map(self.scale, outputs)
        return type(outputs)(scaled) if isinstance(outputs, list | tuple) else scaled

    def unscale_(self, optimizer: Any) -> None:
        """Divide the gradients of an optimizer's parameters by the scale, to clip them, say.

        `step` does it where it has not been done. Raises RuntimeError if called a second time
        before `update`, or after `step`; ValueError for gradients in float16 themselves.
        """
        if not self._enabled:
            return
        self._check_scaled("unscale_")
        state = self._states[id(optimizer)]
        if state.unscaled:
            raise RuntimeError(
                "unscale_() has already been called on this optimizer since the last update()."
            )
        if state.stepped:
            raise RuntimeError("unscale_() is being called after step().")
        for grads in _gradients(optimizer):
            with devices.on_device_of(grads[0]):
                state.found.append(kernels.unscale(grads, 1 / self._scale))
        state.unscaled = True

    def step(self, optimizer: Any, *args: Any, **kwargs: Any) -> Any:
        """Call optimizer.step, unless a gradient is infinite or nan, and return what it does.

        Waits for the GPU, and so is no part of a captured step, which `scale` may be. Raises
        RuntimeError if called a second time before `update`, without a gradient, or with a closure.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if args or "closure" in kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        self._check_scaled("step")
        state = self._states[id(optimizer)]
        if state.stepped:
            raise RuntimeError("step() has already been called since the last update().")
        if not state.unscaled:
            self.unscale_(optimizer)
        if not state.found:
            raise RuntimeError("No inf checks were recorded for this optimizer.")
        result = None if state.found_inf() else optimizer.step(**kwargs)
        state.unscaled, state.stepped = False, True
        return result

    def update(self, new_scale: Any = None) -> None:
        """Choose the scale of the next iteration by whether steps were skipped, or set it.

        Call it after `step` was called for all optimizers. Raises RuntimeError without a step.
        """
        if not self._enabled:
            return
        self._check_scaled("update")
        if new_scale is not None:
            self._set_scale(float(new_scale))
        else:
            states = [state for state in self._states.values() if state.found]
            if not states:
                raise RuntimeError("No inf checks were recorded prior to update.")
            if any(state.found_inf() for state in states):
                self._set_scale(self._scale * self._backoff_factor)
                self._growth_tracker = 0
            else:
                self._count_step()
        self._states.clear()

    def _count_step(self) -> None:
        self._growth_tracker += 1
        if self._growth_tracker == self._growth_interval:
            self._growth_tracker = 0
            grown = self._scale * self._growth_factor
            if grown <= float(np.finfo(np.float32).max):
                self._set_scale(grown)

    # -- the scale

    def _scale_on(self, device: devices.Device) -> Tensor:
        if device not in self._scales:
            self._scales[device] = tensor(self._scale, dtype=np.float32, device=device)
        return self._scales[device]

    def _set_scale(self, scale: float) -> None:
        self._scale = float(np.float32(scale))
        with no_grad():
            for kept in self._scales.values():
                kept.fill_(self._scale)

    def _check_scaled(self, name: str) -> None:
        if not self._scales:
            raise RuntimeError(
                f"Attempted {name} but _scale is None.  This may indicate your script did not use "
                "scaler.scale(loss or outputs) earlier in the iteration."
            )

    def is_enabled(self) -> bool:
        """Return whether the scaler does anything."""
        return self._enabled

    def get_scale(self) -> float:
        """Return the scale, 1.0 if not enabled."""
        return self._scale if self._enabled else 1.0

    def get_growth_factor(self) -> float:
        """Return what the scale is multiplied by after growth_interval steps."""
        return self._growth_factor

    def set_growth_factor(self, new_factor: float) -> None:
        """Set what the scale is multiplied by after growth_interval steps."""
        self._growth_factor = new_factor

    def get_backoff_factor(self) -> float:
        """Return what the scale is multiplied by after a skipped step."""
        return self._backoff_factor

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set what the scale is multiplied by after a skipped step."""
        self._backoff_factor = new_factor

    def get_growth_interval(self) -> int:
        """Return how many steps in a row make the scale grow."""
        return self._growth_interval

    def set_growth_interval(self, new_interval: int) -> None:
        """Set how many steps in a row make the scale grow."""
        self._growth_interval = new_interval

    # -- saved

    def state_dict(self) -> dict[str, Any]:
        """Return the scale, the options and how far it is to the next growth; {} if not enabled."""
        if not self._enabled:
            return {}
        return {
            "scale": self._scale,
            "growth_factor": self._growth_factor,
            "backoff_factor": self._backoff_factor,
            "growth_interval": self._growth_interval,
            "_growth_tracker": self._growth_tracker,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` returned, also PyTorch's; nothing if not enabled."""
        if not self._enabled:
            return
        if not state_dict:
            raise RuntimeError(
                "The source state dict is empty, possibly because it was saved from a disabled "
                "instance of GradScaler."
            )
        self._set_scale(state_dict["scale"])
        self._growth_factor = state_dict["growth_factor"]
        self._backoff_factor = state_dict["backoff_factor"]
        self._growth_interval = state_dict["growth_interval"]
        self._growth_tracker = state_dict["_growth_tracker"]


class _State:
    """What was done with an optimizer's gradients since the last update."""

    def __init__(self) -> None:
        self.unscaled = False
        self.stepped = False
        self.found: list[Any] = []  # arrays that are not 0 if a gradient was infinite or nan

    def found_inf(self) -> bool:
        return any(found.item() != 0 for found in self.found)  # waits for the GPU


def _gradients(optimizer: Any) -> Iterator[list[Any]]:
    """Yield the arrays of an optimizer's gradients, those of one device and dtype together."""
    alike: defaultdict[Any, list[Any]] = defaultdict(list)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            grad = parameter.grad
            if grad.dtype == np.float16:
                raise ValueError("Attempting to unscale FP16 gradients.")
            alike[grad.device, grad.dtype].append(grad.array)
            grad.written()
    yield from alike.values()

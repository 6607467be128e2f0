"""Learning rate schedules: each gives an epoch's rate, as a formula of the rate at the start."""

from __future__ import annotations

import bisect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

from gradengine.kernels.cuda.capture import repeated
from gradengine.optim.optimizer import Optimizer


class Schedule:
    """Sets the learning rate of every group when it is made and at every `step`, once an epoch.

    The rate at the start is kept in each group as "initial_lr". To go on after `last_epoch`, load
    the optimizer's state first. Subclasses define `rate`.
    """

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        for group in optimizer.param_groups:
            if last_epoch == -1:
                group.setdefault("initial_lr", group["lr"])
            elif "initial_lr" not in group:
                raise KeyError(
                    "param 'initial_lr' is not specified in a param group when resuming: "
                    f"load the optimizer's state first; got last_epoch={last_epoch}"
                )
        self.optimizer = optimizer
        self.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        self.last_epoch = last_epoch + 1
        self._set_rates()

    def rate(self, initial: float, epoch: int, group: int) -> float:
        """Return the rate of an epoch for the group of that number, from its rate at the start."""
        raise NotImplementedError

    def step(self) -> None:
        """Go to the next epoch. Warns if the optimizer made no step before the first call.

        Within a captured step, each replay goes on as well.
        """
        if self.last_epoch == 0 and self.optimizer.step_count == 0:
            warnings.warn(
                "Detected call of `lr_scheduler.step()` before `optimizer.step()`: the first rate "
                "is skipped; call optimizer.step() first",
                UserWarning,
                stacklevel=2,
            )
        repeated(self._go_on)

    def _go_on(self) -> None:
        self.last_epoch += 1
        self._set_rates()

    def get_last_lr(self) -> list[float]:
        """Return the learning rates that were set last, one for each group."""
        return [group["lr"] for group in self.optimizer.param_groups]

    def _set_rates(self) -> None:
        pairs = zip(self.optimizer.param_groups, self.base_lrs, strict=True)
        for number, (group, initial) in enumerate(pairs):
            group["lr"] = self.rate(initial, self.last_epoch, number)

    def state_dict(self) -> dict[str, Any]:
        """Return what `load_state_dict` needs to go on from here."""
        return {"last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where another schedule of the same options stood."""
        self.last_epoch = state_dict["last_epoch"]
        self.base_lrs = list(state_dict["base_lrs"])
        self._set_rates()


class LambdaLR(Schedule):
    """Multiply the initial rate by a function of the epoch: one, or one for each group."""

    def __init__(
        self,
        optimizer: Optimizer,
        lr_lambda: Callable[[int], float] | Iterable[Callable[[int], float]],
        last_epoch: int = -1,
    ) -> None:
        count = len(optimizer.param_groups)
        self.lr_lambdas = [lr_lambda] * count if callable(lr_lambda) else list(lr_lambda)
        if len(self.lr_lambdas) != count:
            raise ValueError(
                "LambdaLR: expected one function for each param group; "
                f"got {len(self.lr_lambdas)} functions, {count} groups"
            )
        super().__init__(optimizer, last_epoch)

    def rate(self, initial: float, epoch: int, group: int) -> float:
        return initial * self.lr_lambdas[group](epoch)


class StepLR(Schedule):
    """Multiply the rate by `gamma` every `step_size` epochs."""

    def __init__(
        self, optimizer: Optimizer, step_size: int, gamma: float = 0.1, last_epoch: int = -1
    ) -> None:
        self.step_size = step_size
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def rate(self, initial: float, epoch: int, group: int) -> float:
        return initial * self.gamma ** (epoch // self.step_size)


class MultiStepLR(Schedule):
    """Multiply the rate by `gamma` at each of the epochs `milestones`."""

    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Iterable[int],
        gamma: float = 0.1,
        last_epoch: int = -1,
    ) -> None:
        self.milestones = sorted(milestones)
        self.gamma = gamma
        super().__init__(optimizer, last_epoch)

    def rate(self, initial: float, epoch: int, group: int) -> float:
        return initial * self.gamma ** bisect.bisect_right(self.milestones, epoch)


class CosineAnnealingLR(Schedule):
    """Go from the initial rate to `eta_min` in `T_max` epochs along half a cosine.

    Loshchilov and Hutter, arXiv:1608.03983, without restarts.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        T_max: int,  # noqa: N803 - PyTorch's name
        eta_min: float = 0.0,
        last_epoch: int = -1,
    ) -> None:
        self.T_max = T_max
        self.eta_min = eta_min
        super().__init__(optimizer, last_epoch)

    def rate(self, initial: float, epoch: int, group: int) -> float:
        share = (1 + math.cos(math.pi * epoch / self.T_max)) / 2
        return self.eta_min + (initial - self.eta_min) * share

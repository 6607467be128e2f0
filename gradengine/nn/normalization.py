"""Normalization layers, and the warning about frozen layers whose statistics move."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence
from typing import Any

from gradengine import functional as F
from gradengine.factories import ones, tensor, zeros
from gradengine.grad_mode import grad_mode
from gradengine.nn import init
from gradengine.nn.module import Module
from gradengine.ops.normalization import batch_norm_act
from gradengine.tensor import Parameter, Tensor


class _BatchNorm(Module):
    """What batch normalizations of any number of axes share."""

    _version = 2  # since when num_batches_tracked is part of the state
    ranks: tuple[int, ...]
    weight: Parameter | None
    bias: Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.momentum = momentum
        self.affine = affine
        self.track_running_stats = track_running_stats
        self.fixed = False  # by freeze(): normalize by the running statistics and leave them alone
        self._warned = False
        place = {"device": device, "dtype": dtype}
        for name, make in (("weight", ones), ("bias", zeros)):
            made = Parameter(make(num_features, **place)) if affine else None
            self.register_parameter(name, made)
        for name, make in (("running_mean", zeros), ("running_var", ones)):
            self.register_buffer(name, make(num_features, **place) if track_running_stats else None)
        count = tensor(0, device=device) if track_running_stats else None
        self.register_buffer("num_batches_tracked", count)

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1."""
        if self.track_running_stats:
            init.zeros_(self.running_mean)  # type: ignore[arg-type]
            init.ones_(self.running_var)  # type: ignore[arg-type]
            init.zeros_(self.num_batches_tracked)  # type: ignore[arg-type]

    def reset_parameters(self) -> None:
        """Set weight to 1, bias to 0, and forget all batches."""
        self.reset_running_stats()
        if self.weight is not None and self.bias is not None:
            init.ones_(self.weight)
            init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in self.ranks:
            ranks = " or ".join(f"{rank}D" for rank in self.ranks)
            raise ValueError(
                f"{type(self).__name__}: expected {ranks} input; got {x.ndim}D input, "
                f"x.shape={x.shape}"
            )
        return self._normalize(x)

    def _takes_running_statistics(self) -> bool:
        return self.track_running_stats and (self.fixed or not self.training)

    def _normalize(self, x: Tensor, **epilogue: Any) -> Tensor:
        """Normalize x and do what the mode asks for; `batch_norm_act` documents `epilogue`."""
        if self._takes_running_statistics():
            return self._batch_norm(x, False, 0.0, None, epilogue)
        if not self.track_running_stats or grad_mode.recomputing:
            return self._batch_norm(x, True, 0.0, None, epilogue)
        if not self._warned and self._drifts():
            _warn_of_drift(self)
        count = self.num_batches_tracked
        assert count is not None
        # Without momentum, the running statistics are the plain average over all batches so far.
        momentum = 1 / (count.item() + 1) if self.momentum is None else self.momentum
        return self._batch_norm(x, True, momentum, count, epilogue)

    def _batch_norm(
        self,
        x: Tensor,
        training: bool,
        momentum: float,
        count: Tensor | None,
        epilogue: dict[str, Any],
    ) -> Tensor:
        return batch_norm_act(
            *(x, self.running_mean, self.running_var, self.weight, self.bias),
            training=training,
            momentum=momentum,
            eps=self.eps,
            num_batches_tracked=count,
            **epilogue,
        )

    def _freeze_own(self, frozen: bool) -> None:
        super()._freeze_own(frozen)
        self.fixed = frozen

    def _drifts(self) -> bool:
        """Whether the statistics move although somebody froze all parameters, by hand."""
        if not self.training or not self.track_running_stats or self.fixed:
            return False
        parameters = [one for one in self._parameters.values() if one is not None]
        return bool(parameters) and not any(one.requires_grad for one in parameters)

    def _upgrade_state(self, given: dict[str, Any], prefix: str, version: int | None) -> None:
        key = prefix + "num_batches_tracked"
        if (version is None or version < 2) and self.track_running_stats and key not in given:
            given[key] = tensor(0, device="cpu")

    def extra_repr(self) -> str:
        text = (
            f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, affine={self.affine}, "
            f"track_running_stats={self.track_running_stats}"
        )
        return f"{text}, fixed=True" if self.fixed else text


class BatchNorm1d(_BatchNorm):
    """Normalize x (N, C) or (N, C, L) by channel: see `batch_norm`.

    Training takes the batch's statistics and moves the running ones by `momentum` (None: the plain
    average), even where weight and bias are frozen: `freeze()` stops that. Evaluation takes the
    running ones.
    """

    ranks = (2, 3)


class BatchNorm2d(_BatchNorm):
    """Normalize x (N, C, H, W) by channel: see `batch_norm`.

    Training takes the batch's statistics and moves the running ones by `momentum` (None: the plain
    average), even where weight and bias are frozen: `freeze()` stops that. Evaluation takes the
    running ones.
    """

    ranks = (4,)


def _warn_of_drift(layer: _BatchNorm) -> None:
    """Warn once for all such layers of the model being called, at the line that calls it."""
    model, level = _model_around(layer)
    names = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and not module._warned and module._drifts():
            module._warned = True
            names.append(name or type(module).__name__)
    warnings.warn(
        "BatchNorm: the parameters of these layers are frozen (requires_grad=False), but in "
        f"training mode each batch still moves their running statistics: {', '.join(names)}; "
        "call freeze() on the module, or eval(), to keep them as they are",
        UserWarning,
        stacklevel=level,
    )


def _model_around(layer: _BatchNorm) -> tuple[Module, int]:
    """Return the outermost module being called that holds `layer`, and its caller's stack level.

    They are read off the stack, so that ordinary calls need not note who calls whom. Where no
    module is being called, that is `layer` and the first caller outside the layers' own code.
    """
    model: Module = layer
    level = model_level = 0
    outside = 0
    frame = sys._getframe(1)
    while frame is not None:
        level += 1
        if frame.f_code is Module.__call__.__code__:
            caller = frame.f_locals["self"]
            if any(module is layer for module in caller.modules()):
                model, model_level = caller, level
        if not outside and not frame.f_globals["__name__"].startswith("gradengine.nn."):
            outside = level
        frame = frame.f_back
    return model, model_level + 1 if model_level else outside


class LayerNorm(Module):
    """Normalize x over its last axes, of shape `normalized_shape`: see `layer_norm`."""

    weight: Parameter | None
    bias: Parameter | None

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        single = isinstance(normalized_shape, int)
        self.normalized_shape = (normalized_shape,) if single else tuple(normalized_shape)
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        for name, make, wanted in (("weight", ones, True), ("bias", zeros, bias)):
            made = None
            if elementwise_affine and wanted:
                made = Parameter(make(self.normalized_shape, device=device, dtype=dtype))
            self.register_parameter(name, made)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return (
            f"{self.normalized_shape}, eps={self.eps}, "
            f"elementwise_affine={self.elementwise_affine}, bias={self.bias is not None}"
        )

"""Rows of what only moves memory: norms, pools, elementwise operations, losses, SGD's step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

import gradengine as ge
from benchmarks.gpu_device import Device, Run
from benchmarks.gpu_kernels import Sizes, torch_only
from benchmarks.gpu_race import Contestant, Row
from benchmarks.gpu_steps import OPTIONS
from gradengine.models import resnet18
from gradengine.nn import functional as F
from gradengine.ops.normalization import batch_norm_act

Shape = tuple[int, ...]


@dataclass
class Pass:
    """A function of tensors of these shapes, in both libraries, and the bytes that it has to move.

    Tensors have the dtype of the precision, but vectors are float32; those of four dims are channels
    last, or not, as PyTorch's layout says.
    """

    name: str
    precision: str
    shapes: list[Shape]
    moved: float
    ours: Callable[..., Any]
    theirs: Callable[..., Any]

    def row(self, device: Device, backward: bool) -> Row:
        """Return the row of the function, or of its gradient by all tensors."""

        def our_run() -> Run:
            tensors = [ge.asarray(array) for array in self._arrays(device)]
            return _run(ge, self.ours, tensors, backward)

        def their_run(layout: str) -> Callable[[], Run]:
            def make() -> Run:
                tensors = [device.to_torch(array) for array in self._arrays(device)]
                if layout == "nchw":
                    tensors = [tensor.contiguous() for tensor in tensors]
                return _run(device.torch, self.theirs, tensors, backward)

            return make

        kinds = ("nhwc", "nchw") if len(self.shapes[0]) == 4 else ("",)
        peers = [Contestant(f"PyTorch {kind}".strip(), their_run(kind)) for kind in kinds]
        direction = "backward" if backward else "forward"
        return Row(
            "passes",
            f"{self.precision} {self.name}, {direction}",
            [Contestant("gradengine", our_run), *torch_only(device, *peers)],
            moved=self.moved,
            labels={"precision": self.precision},
        )

    def _arrays(self, device: Device) -> list[Any]:
        dtype = device.dtype(self.precision)
        return [
            device.random_nhwc(shape, dtype, seed)
            if len(shape) == 4
            else device.random(shape, np.float32 if len(shape) == 1 else dtype, seed)
            for seed, shape in enumerate(self.shapes)
        ]


def _run(library: Any, function: Callable[..., Any], tensors: list[Any], backward: bool) -> Run:
    """Return a run of the function, or of its gradients from one result that is kept."""
    for tensor in tensors:
        tensor.requires_grad_(backward)
    if not backward:
        return lambda: function(*tensors)
    out = function(*tensors)
    grad = out.detach()
    return lambda: library.autograd.grad(out, tensors, grad, retain_graph=True)


def pass_rows(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Yield what only moves memory: its bytes a second stand beside the copy bandwidth."""
    shapes = [
        (sizes.batch, channels, sizes.pixels(size), sizes.pixels(size))
        for channels, size in ((64, 112), (64, 56), (256, 14), (512, 7))
    ]
    rows = [_sgd_row(device, sizes)]
    for backward in (False, True):
        for precision in ("bf16", "fp32"):
            for shape in shapes:
                for residual in (False, True) if shape != shapes[0] else (False,):
                    case = _batch_norm(device, precision, shape, residual, backward)
                    rows.append(case.row(device, backward))
            rows.append(_max_pool(device, precision, shapes[0]).row(device, backward))
            rows.append(_mean(device, precision, shapes[3]).row(device, backward))
            for name in OPERATIONS:
                rows.append(_operation(device, precision, name, sizes, backward))
        rows.append(_loss(device, (sizes.batch, 1000), backward).row(device, backward))
    rows += [_known_statistics_row(device, precision, shapes[0]) for precision in ("bf16", "fp32")]
    for row in rows:
        row.importance = 22
        yield row


def _bytes(shape: Shape, precision: str) -> float:
    return float(np.prod(shape)) * (2 if precision == "bf16" else 4)


def _spelled(shape: Shape) -> str:
    return " x ".join(map(str, shape))


def _batch_norm(
    device: Device, precision: str, shape: Shape, residual: bool, backward: bool
) -> Pass:
    """Forward, x is read for its statistics, then x and the residual to write the result.

    Backward, the incoming gradient, x and the result are read for two sums and again to write the
    gradients of x and the residual.
    """

    def ours(x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        shortcut = rest[0] if rest else None
        return batch_norm_act(x, None, None, weight, bias, shortcut, relu=True, training=True)

    def theirs(x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        functional = device.torch.nn.functional
        out = functional.batch_norm(x, None, None, weight, bias, training=True)
        return functional.relu(out + rest[0] if rest else out, inplace=True)

    passes = (7 if backward else 3) + residual
    name = f"batch norm{' + add' * residual} + relu, {_spelled(shape)}"
    shapes = [shape, shape[1:2], shape[1:2], *([shape] * residual)]
    return Pass(name, precision, shapes, passes * _bytes(shape, precision), ours, theirs)


def _known_statistics_row(device: Device, precision: str, shape: Shape) -> Row:
    """Where the convolution has gathered the statistics, x is read once and the result written."""

    def make() -> Run:
        x = ge.asarray(device.random_nhwc(shape, device.dtype(precision)))
        vectors = [device.random(shape[1:2], np.float32, seed) for seed in range(1, 5)]
        weight, bias, mean, root = vectors
        moments = (mean.astype(np.float64), (root * root).astype(np.float64))
        weight, bias = ge.asarray(weight), ge.asarray(bias)
        return lambda: batch_norm_act(
            x, None, None, weight, bias, relu=True, training=True, moments=moments
        )

    return Row(
        "passes",
        f"{precision} batch norm + relu of known statistics, {_spelled(shape)}, forward",
        [Contestant("gradengine", make)],
        moved=2 * _bytes(shape, precision),
        labels={"precision": precision},
    )


def _max_pool(device: Device, precision: str, shape: Shape) -> Pass:
    """The images move once, and once what is a quarter of them: values, and positions of 4 bytes."""
    moved = 1.25 * _bytes(shape, precision) + 0.25 * _bytes(shape, "fp32")
    return Pass(
        f"max pool 3x3 stride 2, {_spelled(shape)}",
        precision,
        [shape],
        moved,
        lambda x: F.max_pool2d(x, 3, 2, 1),
        lambda x: device.torch.nn.functional.max_pool2d(x, 3, 2, 1),
    )


def _mean(device: Device, precision: str, shape: Shape) -> Pass:
    return Pass(
        f"mean of all pixels, {_spelled(shape)}",
        precision,
        [shape],
        _bytes(shape, precision),
        lambda x: F.adaptive_avg_pool2d(x, 1),
        lambda x: device.torch.nn.functional.adaptive_avg_pool2d(x, 1),
    )


def _loss(device: Device, shape: Shape, backward: bool) -> Pass:
    labels = device.xp.asarray(np.random.default_rng(0).integers(0, shape[1], shape[0]))
    return Pass(
        f"cross entropy, {_spelled(shape)}",
        "fp32",
        [shape],
        (1 + backward) * _bytes(shape, "fp32"),
        lambda x: F.cross_entropy(x, ge.asarray(labels)),
        lambda x: device.torch.nn.functional.cross_entropy(x, device.to_torch(labels)),
    )


# By name: a function of torch.nn.functional or of ours
OPERATIONS: dict[str, Callable[..., Any]] = {
    "gelu": lambda functional, x: functional.gelu(x),
    "silu": lambda functional, x: functional.silu(x),
    "softmax": lambda functional, x: functional.softmax(x, dim=-1),
    "log_softmax": lambda functional, x: functional.log_softmax(x, dim=-1),
    "layer norm": lambda functional, x: functional.layer_norm(x, x.shape[-1:]),
}


def _operation(device: Device, precision: str, name: str, sizes: Sizes, backward: bool) -> Row:
    """An array is read and one written; backward, two are read."""
    shape = (sizes.length(1 << 15), sizes.length(1 << 10))
    operation = OPERATIONS[name]
    return Pass(
        f"{name}, {_spelled(shape)}",
        precision,
        [shape],
        (2 + backward) * _bytes(shape, precision),
        lambda x: operation(F, x),
        lambda x: operation(device.torch.nn.functional, x),
    ).row(device, backward)


def _sgd_row(device: Device, sizes: Sizes) -> Row:
    """Parameter and velocity are read and written, the gradient is read."""
    shapes = [tuple(map(sizes.length, p.shape)) for p in resnet18().parameters()]

    def stepper(library: Any, tensor: Callable[[Any], Any], **options: Any) -> Callable[[], Run]:
        def make() -> Run:
            parameters = []
            for seed, shape in enumerate(shapes):
                parameter = tensor(device.random(shape, np.float32, seed)).requires_grad_()
                parameter.grad = tensor(device.random(shape, np.float32, seed + 1))
                parameters.append(parameter)
            return library.optim.SGD(parameters, **OPTIONS, **options).step

        return make

    contestants = [Contestant("gradengine", stepper(ge, ge.asarray))]
    for option in ("fused", "foreach") if device.torch is not None else ():
        peer = stepper(device.torch, device.to_torch, **{option: True})
        contestants.append(Contestant(f"PyTorch {option}", peer))
    moved = 5 * 4.0 * sum(int(np.prod(shape)) for shape in shapes)
    return Row("passes", "fp32 SGD of all ResNet-18", contestants, moved=moved)

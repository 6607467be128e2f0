"""Rows of whole ResNet-18 steps: training, the forward pass, and a new head on a frozen backbone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

import gradengine as ge
from benchmarks.gpu_device import Device, Run
from benchmarks.gpu_race import STEP, Contestant, Row
from gradengine.models.resnet import BasicBlock, ResNet

# Of one image at 224 pixels: twice the multiply-adds of all convolutions and the last layer. Training
# does each three times, but no gradient by the images is computed.
FORWARD_FLOP = 3.63e9
TRAINING_FLOP = 3 * FORWARD_FLOP - 0.236e9
OPTIONS = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 1e-4}

# "nchw" is PyTorch's other memory layout, eager: its algorithms take seconds to be chosen anew.
EAGER, NCHW, CAPTURED = "eager", "nchw", "captured"
COMPILED = {
    "compile": "default",
    "reduce-overhead": "reduce-overhead",
    "max-autotune": "max-autotune",
}
PEERS = (EAGER, NCHW, CAPTURED, *COMPILED)
# What each adds to its rows' importance: the slow compilations come last.
LATER = {"compile": 3, "reduce-overhead": 2, "max-autotune": 8}

Make = Callable[[Any, Any, Any, Any, Callable[[], AbstractContextManager[Any]], Any], Run]


# ---- what one step is, for either library --------------------------------------------------------


def training_step(
    library: Any, model: Any, images: Any, labels: Any, autocast: Any, options: Any
) -> Run:
    """Return forward, cross entropy, backward and SGD; a run returns the loss before the step."""
    criterion = library.nn.CrossEntropyLoss()
    compute = options["compile"](lambda images, labels: criterion(model(images), labels))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = library.optim.SGD(trained, **OPTIONS, **options["sgd"])

    def step() -> Any:
        optimizer.zero_grad()
        with autocast():
            loss = compute(images, labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def frozen_step(
    library: Any, model: Any, images: Any, labels: Any, autocast: Any, options: Any
) -> Run:
    """Return a training step of a new last layer; the backbone is frozen, in eval mode."""
    model.requires_grad_(False)
    model.eval()
    model.fc = library.nn.Linear(512, 1000).to(images.device)
    return training_step(library, model, images, labels, autocast, options)


def forward_pass(
    library: Any, model: Any, images: Any, labels: Any, autocast: Any, options: Any
) -> Run:
    """Return the forward pass in eval mode, without a graph."""
    model.eval()
    compute = options["compile"](model)

    def forward() -> Any:
        with library.no_grad(), autocast():
            return compute(images)

    return forward


KINDS: dict[str, tuple[Make, float]] = {
    "training": (training_step, TRAINING_FLOP),
    "forward": (forward_pass, FORWARD_FLOP),
    "frozen": (frozen_step, FORWARD_FLOP),
}


# ---- contestants ---------------------------------------------------------------------------------


@dataclass
class Workload:
    """One kind of step at one batch size, from the same weights and images for everyone."""

    device: Device
    kind: str
    batch: int
    pixels: int

    @cached_property
    def state(self) -> dict[str, np.ndarray]:
        ge.manual_seed(0)
        state = _model(self.device).state_dict()
        return {name: np.array(value.numpy()) for name, value in state.items()}

    def images(self) -> Any:
        """Return images (N, 3, H, W), channels last in memory."""
        return self.device.random_nhwc((self.batch, 3, self.pixels, self.pixels), np.float32)

    def labels(self) -> Any:
        labels = np.random.default_rng(1).integers(0, 1000, self.batch)
        return self.device.xp.asarray(labels)

    def ours(self, precision: str, captured: bool = False) -> Contestant:
        """Return our step in "tf32" or "bf16", as it is written or captured into a CUDA graph."""

        def make() -> Run:
            device = self.device
            device.fast_matmul()
            model = _model(device).to(device.name)
            model.load_state_dict(
                {name: ge.from_numpy(array) for name, array in self.state.items()}
            )
            images, labels = ge.asarray(self.images()), ge.asarray(self.labels())
            autocast = device.autocast if precision == "bf16" else nullcontext
            options = {"compile": lambda function: function, "sgd": {}}
            step = KINDS[self.kind][0](ge, model, images, labels, autocast, options)
            return device.capture(step) if captured else step

        return Contestant(f"gradengine {precision}{' captured' * captured}", make)

    def theirs(self, layout: str, precision: str, peer: str = EAGER) -> Contestant:
        """Return PyTorch's step in "nchw" or "nhwc" memory, run in one of PEERS' ways."""

        def make() -> Run:
            device, torch = self.device, self.device.torch
            if peer in COMPILED:
                torch._dynamo.reset()
            model = self._their_model(layout)
            images = device.to_torch(self.images())
            if layout == "nchw":
                images = images.contiguous()
            autocast = device.torch_autocast if precision == "bf16" else nullcontext
            options = {"compile": self._compile(peer), "sgd": better_sgd(device)}
            labels = device.to_torch(self.labels())
            step = KINDS[self.kind][0](torch, model, images, labels, autocast, options)
            return device.torch_capture(step) if peer == CAPTURED else step

        way = "" if peer == EAGER else f" {peer}"
        return Contestant(f"PyTorch {layout} {precision}{way}", make)

    def _compile(self, peer: str) -> Callable[[Any], Any]:
        if peer not in COMPILED:
            return lambda function: function
        return lambda function: self.device.torch_compile(function, COMPILED[peer])

    def _their_model(self, layout: str) -> Any:
        from tests.models import torch_resnet

        torch = self.device.torch
        model = torch_resnet.ResNet(torch_resnet.BasicBlock, self.device.blocks)
        model.load_state_dict({name: torch.tensor(array) for name, array in self.state.items()})
        layouts = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}
        return model.to(self.device.name, memory_format=layouts[layout])

    def check(self, runs: dict[str, Run]) -> dict[str, dict[str, float]]:
        """Return the mean of what each run returns: all have made the same few steps by now."""
        values: dict[str, dict[str, float]] = {}
        for name, run in runs.items():
            result = run()
            mean = getattr(result, "mean", None)
            if mean is not None:
                values[name] = {"result": float(mean())}
        return values


def _model(device: Device) -> Any:
    """Return the network, on the CPU."""
    return ResNet(BasicBlock, device.blocks).to("cpu")


def better_sgd(device: Device) -> dict[str, bool]:
    """Return the options of PyTorch's SGD that take less time here, fused or foreach."""
    if device not in _CHOSEN:
        _CHOSEN[device] = _time_sgd(device)
    return _CHOSEN[device]


_CHOSEN: dict[Device, dict[str, bool]] = {}


def _time_sgd(device: Device) -> dict[str, bool]:
    torch = device.torch
    times = {}
    for option in ("fused", "foreach"):
        parameters = [
            torch.zeros(tuple(p.shape), device=device.name, requires_grad=True)
            for p in _model(device).parameters()
        ]
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)
        step = torch.optim.SGD(parameters, **OPTIONS, **{option: True}).step
        step()
        device.synchronize()
        start = time.perf_counter()
        for _ in range(5):
            step()
        device.synchronize()
        times[option] = time.perf_counter() - start
    return {min(times, key=times.__getitem__): True}


# ---- rows ----------------------------------------------------------------------------------------

IMPORTANCE = {"training": 10, "frozen": 24, "forward": 28}


def step_rows(
    device: Device, kind: str, batches: list[int], peers: list[str], pixels: int
) -> Iterator[Row]:
    """Yield a row for each batch size beside the peers that start at once, and one for each other.

    The others are compiled, which takes long and may fail: each has a row of its own, in which it
    takes turns with ours.
    """
    for place, batch in enumerate(batches):
        work = Workload(device, kind, batch, pixels)
        ours = [
            work.ours(precision, captured)
            for precision in ("bf16", "tf32")
            for captured in (True, False)
        ]
        importance = IMPORTANCE[kind] + place
        quick = _quick_peers(work, peers) if device.torch else []
        yield _row(work, EAGER, [*ours, *quick], importance, seconds=8 if batch > 64 else 4)
        for peer in COMPILED:
            if peer in peers and device.torch:
                bf16 = [
                    work.ours("bf16", True),
                    work.ours("bf16"),
                    work.theirs("nhwc", "bf16", peer),
                ]
                later = importance + 2 * LATER[peer]
                yield _row(work, peer, bf16, later, seconds=3)


def _quick_peers(work: Workload, peers: list[str]) -> list[Contestant]:
    """Return PyTorch's contestants that are not compiled."""
    found = []
    if EAGER in peers:
        found += [work.theirs("nhwc", "bf16"), work.theirs("nhwc", "tf32")]
    if NCHW in peers:
        found.append(work.theirs("nchw", "tf32"))
    if CAPTURED in peers:
        found += [work.theirs("nhwc", precision, CAPTURED) for precision in ("bf16", "tf32")]
    return found


def _row(
    work: Workload, peers: str, contestants: list[Contestant], importance: float, seconds: float
) -> Row:
    flop = KINDS[work.kind][1] * work.batch * (work.pixels / 224) ** 2
    beside = "" if peers == EAGER else f", beside {peers}"
    return Row(
        work.kind,
        f"batch {work.batch}{beside}",
        contestants,
        kind=STEP,
        seconds=seconds,
        flop=flop,
        labels={"batch": work.batch, "peers": peers},
        check=work.check,
        importance=importance,
    )

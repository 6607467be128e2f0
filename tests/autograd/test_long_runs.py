"""Long runs: thousands of small steps leave nothing behind, neither memory nor objects, nor garbage."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import gradengine as ge
from gradengine.autograd import graph
from gradengine.autograd.checkpoint import checkpoint
from gradengine.nn import functional as F

STEPS = 10_000
FEWER = 200  # of the kinds that are about one part of the engine


class Network:
    """A small network and its optimizer, on one batch."""

    def __init__(self) -> None:
        ge.manual_seed(0)
        self.model = ge.nn.Sequential(ge.nn.Linear(4, 8), ge.nn.Tanh(), ge.nn.Linear(8, 3))
        self.optimizer = ge.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)
        self.x, self.labels = ge.randn(5, 4), ge.tensor([0, 1, 2, 0, 1])

    def step(self) -> Any:
        """Train once."""
        loss = F.cross_entropy(self.model(self.x), self.labels)
        self.finish(loss)
        return loss

    def finish(self, loss: Any) -> None:
        """Go along the gradients of a loss."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def resident_bytes() -> int:
    """Give the memory of this process, where the system tells it."""
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * 4096 if statm.exists() else 0


def growth(step: Callable[[], Any], steps: int) -> tuple[int, int, int, int]:
    """Give by how much steps let grow: blocks of Python's allocator, objects, bytes; and the garbage found.

    The collector is off meanwhile, so that only counting references frees anything.
    """
    for _ in range(200):  # caches fill, and the first steps set their memory aside
        step()
    gc.collect()
    gc.disable()
    try:
        before = sys.getallocatedblocks(), len(gc.get_objects()), resident_bytes()
        for _ in range(steps):
            step()
        garbage = gc.collect()  # and with it the interpreter's own lists of free tuples
        after = sys.getallocatedblocks(), len(gc.get_objects()), resident_bytes()
    finally:
        gc.enable()
    blocks, objects, size = (b - a for a, b in zip(before, after, strict=True))
    return blocks, objects, size, garbage


def check_flat(step: Callable[[], Any], steps: int) -> None:
    blocks, objects, size, garbage = growth(step, steps)
    assert garbage <= 10, f"{garbage} objects were only freed by the collector"
    assert objects <= 50, f"{objects} objects more"
    assert blocks <= 150, f"{blocks} blocks more"
    assert size < 4 << 20, f"{size} bytes more"


def test_ten_thousand_training_steps():
    layer = ge.nn.Linear(4, 3)
    optimizer = ge.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    x = ge.ones(2, 4)

    def step() -> None:
        optimizer.zero_grad()
        layer(x).sum().backward()
        optimizer.step()

    check_flat(step, STEPS)


def hooked() -> Callable[[], Any]:
    """Hooks of every kind, on modules, leaves, results and nodes."""
    network = Network()
    network.model[0].register_full_backward_hook(lambda m, gi, go: None)
    network.model[2].register_full_backward_pre_hook(lambda m, go: (go[0] * 1,))
    network.model.register_forward_hook(lambda m, args, output: output * 1, always_call=True)
    for parameter in network.model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: None)
    graph.register_multi_grad_hook(list(network.model.parameters()), lambda grads: None)

    def step() -> None:
        hidden = network.model(network.x)
        hidden.retain_grad()
        with hidden.register_hook(lambda grad: grad * 2):
            hidden.register_hook(lambda grad: None)
            hidden.grad_fn.register_prehook(lambda outputs: (outputs[0] * 2,))
            hidden.grad_fn.register_hook(lambda inputs, outputs: inputs)
            hidden.grad_fn.metadata["step"] = hidden.shape
            network.finish(F.cross_entropy(hidden, network.labels))

    return step


def packed() -> Callable[[], Any]:
    network = Network()

    def step() -> None:
        with graph.save_on_cpu(), graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            loss = F.cross_entropy(network.model(network.x).exp(), network.labels)
        network.finish(loss)

    return step


def in_place() -> Callable[[], Any]:
    """Writes to views and bases, of which some are never walked."""
    network = Network()

    def step() -> None:
        hidden = network.model(network.x)
        hidden[1:3].mul_(2)
        hidden[:, 0] = hidden[:, 1] * 2
        hidden.T.add_(1)
        network.finish(F.cross_entropy(hidden, network.labels))
        network.model(network.x)[0].mul_(3)

    return step


def checkpointed() -> Callable[[], Any]:
    network = Network()

    def step() -> None:
        hidden = checkpoint(network.model, network.x, use_reentrant=False)
        network.finish(F.cross_entropy(hidden, network.labels))

    return step


def penalized() -> Callable[[], Any]:
    """A step along the gradient of a gradient."""
    network = Network()
    x = network.x.clone().requires_grad_()

    def step() -> None:
        loss = F.cross_entropy(network.model(x), network.labels)
        (grad,) = ge.autograd.grad(loss, x, create_graph=True)
        network.finish(loss + (grad * grad).sum())

    return step


class Square(ge.autograd.Function):
    """x * x, and x."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Any:
        y = x * x
        ctx.save_for_backward(x, y)
        return y, x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, _ = ctx.saved_tensors
        return grads[0] * x * 2 + grads[1]


def by_functions() -> Callable[[], Any]:
    network = Network()

    def step() -> None:
        square, same = Square.apply(network.model(network.x))
        network.finish(F.cross_entropy(square + same, network.labels))

    return step


def failing() -> Callable[[], Any]:
    """A hook, a pullback and a second backward that raise."""
    network = Network()

    def step() -> None:
        hidden = network.model(network.x)
        hidden.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            hidden.sum().backward()
        square = hidden * hidden
        hidden.detach().add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            square.sum().backward()
        loss = network.step()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()

    return step


@pytest.mark.parametrize(
    "kind", [hooked, packed, in_place, checkpointed, penalized, by_functions, failing]
)
def test_steps_of_one_kind(kind):
    check_flat(kind(), FEWER)


def test_a_leak_would_be_seen():
    kept: list[Any] = []

    def cycle() -> None:
        x = ge.ones(1, requires_grad=True)
        y = x.exp()
        y.register_hook(lambda grad: y)
        y.backward()

    assert growth(lambda: kept.append(ge.ones(4)), FEWER)[0] >= FEWER
    assert growth(cycle, 100)[3] >= 100

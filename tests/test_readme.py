"""What README.md shows runs, and does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import gradengine as ge
from gradengine.autograd import gradcheck, gradgradcheck

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
EXAMPLE = SNIPPETS[0]
(ON_A_GPU,) = (snippet for snippet in SNIPPETS if "ge.cuda.graph" in snippet)
(OWN_KERNEL,) = (snippet for snippet in SNIPPETS if "autograd.kernel" in snippet)
(OPERATION,) = (snippet for snippet in SNIPPETS if "hypot.pullbacks" in snippet)


def test_the_example_prints_what_its_comments_say(capsys):
    names: dict[str, Any] = {}
    exec(EXAMPLE, names)
    assert capsys.readouterr().out == "tensor([True, True])\n"
    assert repr(names["Q"]) in EXAMPLE
    moved = [name for name, p in names["model"].named_parameters() if p.grad is not None]
    assert moved == ["fc.weight", "fc.bias"]


def test_the_operation_is_differentiable_to_second_order():
    names: dict[str, Any] = {}
    exec("from gradengine.devices import array_module", names)
    exec("from gradengine.elementwise import elementwise", names)
    exec(OPERATION, names)
    x = ge.tensor([[0.5], [2.0]], dtype=ge.float64, requires_grad=True)
    y = ge.tensor([1.5, -1.0], dtype=ge.float64, requires_grad=True)
    assert gradcheck(names["hypot"], (x, y))
    assert gradgradcheck(names["hypot"], (x, y))


@pytest.mark.usefixtures("emulated_cuda")
def test_the_kernel_of_ones_own_is_checked(capsys):
    exec(OWN_KERNEL, {"ge": ge})
    assert "second derivatives agree with differences; CUDA agrees" in capsys.readouterr().out


@pytest.mark.usefixtures("emulated_cuda")
def test_what_is_shown_for_a_gpu_runs(monkeypatch):
    precision = ge.get_float32_matmul_precision()
    monkeypatch.setattr(ge.backends.cuda, "conv_tf32", True)
    model = ge.nn.Sequential(ge.nn.Conv2d(8, 8, 3), ge.nn.AdaptiveAvgPool2d(1), ge.nn.Flatten())
    images, labels = ge.randn(2, 8, 6, 6), ge.asarray([0, 1])
    names: dict[str, Any] = {"ge": ge, "model": model, "images": images, "labels": labels}
    names["step"] = lambda: None
    try:
        exec(ON_A_GPU, names)
    finally:
        ge.set_float32_matmul_precision(precision)
    assert names["loss"].dtype == ge.float32
    assert not ge.backends.cuda.conv_tf32
    assert callable(names["train"])


def test_the_folders_of_the_map_exist():
    (table,) = re.findall(r"\| place \|.*?\n\n", README, re.DOTALL)
    places = re.findall(r"`((?:gradengine|kernels|tests|benchmarks)/[a-z_./]*)`", table)
    assert len(places) > 10
    for place in places:
        assert (Path(__file__).parents[1] / place).exists(), place

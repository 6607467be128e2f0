"""A traced run tells what ran; two of them, where they part."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

import gradengine as ge
from gradengine.autograd import diff, load_trace, trace
from gradengine.autograd.trace import checksum_of


class Net(ge.nn.Module):
    """Two layers, one in a child of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.body = ge.nn.Sequential(ge.nn.Linear(4, 8), ge.nn.ReLU())
        self.head = ge.nn.Linear(8, 3)

    def forward(self, x: Any) -> Any:
        return self.head(self.body(x) * 2.0)


def run(scale: float = 1.0, model: Any = None) -> Any:
    ge.manual_seed(0)
    model = model or Net()
    x = ge.randn(5, 4)
    return trace(lambda: (model(x * scale) ** 2).sum().backward())


def test_operations_are_recorded_with_shapes_modules_and_lines() -> None:
    x = ge.ones(2, 3, requires_grad=True)
    with trace() as t:
        y = (x.exp() * 2.0).sum()
        line = sys._getframe().f_lineno - 1
        y.backward()
    assert [(o.phase, o.name) for o in t.operations] == [
        ("forward", "exp"),
        ("forward", "mul"),
        ("forward", "sum"),
        ("backward", "SumBackward0"),
        ("backward", "MulBackward0"),
        ("backward", "ExpBackward0"),
        ("backward", "AccumulateGrad"),
    ]
    exp, mul, total, *backward = t.operations
    assert (exp.inputs[0].shape, exp.outputs[0].dtype) == ((2, 3), "float32")
    assert [o.inputs[0].source for o in (exp, mul, total)] == [None, 0, 1]
    assert (mul.inputs[1].dtype, mul.inputs[1].checksum.sum) == ("float", 2.0)
    assert {o.line.rpartition("test_trace.py")[2] for o in t.operations[:6]} == {f":{line}"}
    assert [o.forward for o in backward] == [2, 1, 0, None]
    assert backward[2].outputs[0].checksum == checksum_of(x.grad.numpy())
    assert all(o.seconds >= 0 and o.gpu_seconds is None for o in t.operations)
    starts = [o.start for o in t.operations]
    assert starts == sorted(starts)


def test_nothing_is_recorded_of_what_operations_do_inside() -> None:
    x = ge.ones(3, 4)
    with trace(checksums=False) as t, ge.no_grad():
        ge.log_softmax(x, 1)
        x.add_(1).exp()
    assert [o.name for o in t.operations][-2:] == ["add", "exp"]
    assert t.operations[-1].inputs[0].source == len(t.operations) - 2  # through the write
    assert t.operations[0].inputs[0].checksum is None


def test_modules_have_paths_and_spans() -> None:
    t = run()
    modules = [o.module for o in t.operations if o.phase == "forward"]
    assert modules[0] == modules[-1] == ""
    assert {"Net", "Net.body.0", "Net.body.1", "Net.head"} <= set(modules)
    accumulated = {o.inputs[0].name for o in t.operations if o.name == "AccumulateGrad"}
    assert accumulated == {f"Net.{name}" for name, _ in Net().named_parameters()}
    assert [span.module for span in t.modules][-1] == "Net"
    assert {span.module for span in t.modules} == {
        *("Net", "Net.body", "Net.body.0", "Net.body.1", "Net.head"),
    }
    outer, inner = (next(s for s in t.modules if s.module == name) for name in ("Net", "Net.body"))
    assert outer.start <= inner.start
    assert outer.start + outer.seconds >= inner.start + inner.seconds
    assert sum(t.seconds("module").values()) == pytest.approx(sum(t.seconds().values()))
    with pytest.raises(ValueError, match=r"by must be one of name, .*; got by='operation'"):
        t.seconds("operation")


def test_equal_runs_have_no_difference() -> None:
    assert diff(run(), run()) is None


def test_a_difference_is_found_where_it_comes_in() -> None:
    found = diff(run(), run(1.001))
    assert found is not None
    assert (found.position, found.what) == (0, "input")
    assert re.search(
        r"operation 0, forward mul at .*test_trace.py:\d+: its input 1 has other", str(found)
    )
    assert diff(run(), run(1.001), tolerance=0.05) is None


def test_a_changed_parameter_is_named() -> None:
    ge.manual_seed(1)
    model = Net()
    before = run(model=model)
    model.zero_grad()
    with ge.no_grad():
        model.head.weight[0, 0] += 1
    found = diff(before, run(model=model))
    assert found is not None
    assert found.what == "input"
    assert "(Net.head.weight) has other values" in found.text
    assert " in Net.head: " in found.text


def steps(second: Any, first: Any = lambda x: x.exp()) -> tuple[Any, Any]:
    x = ge.ones(4, 3)
    return trace(lambda: first(x.sin())), trace(lambda: second(x.sin()))


@pytest.mark.parametrize(
    ("second", "what", "match"),
    [
        (
            lambda x: x.cos(),
            "operation",
            r"operation 1, forward exp .* the second run has cos \(for",
        ),
        (lambda x: x, "operation", "operation 1, .*the second run has ended"),
        (lambda x: x[:2].exp(), "operation", "the second run has slices"),
        (
            lambda x: ge.Tensor(x.array[:2]).exp(),
            "shape",
            r"input 0 has shape \(4, 3\) against \(2, 3\)",
        ),
        (lambda x: ge.Tensor(x.array.astype("f8")).exp(), "dtype", "float32 against float64"),
        (lambda x: ge.Tensor(x.array * np.nan).exp(), "input", "difference of about inf"),
    ],
)
def test_what_differs_is_told(second: Any, what: str, match: str) -> None:
    found = diff(*steps(second))
    assert found is not None
    assert found.what == what
    assert re.search(match, str(found)), str(found)


def test_a_result_that_differs_for_equal_inputs_blames_the_operation() -> None:
    x = ge.ones(100)
    first, second = (trace(lambda: ge.dropout(x, 0.5)) for _ in range(2))
    for t in (first, second):  # the random mask is an input: make that the same
        for operation in t.operations:
            operation.inputs = []
    found = diff(first, second)
    assert found is not None
    assert found.what == "result"
    assert "for equal inputs its result 0" in str(found)


def test_checksums_know_no_memory_order_and_notice_permutations() -> None:
    x = np.random.default_rng(0).standard_normal((20, 30))
    assert checksum_of(x) == checksum_of(np.asfortranarray(x))
    a, b = (trace(lambda v=v: ge.tensor(v).exp()) for v in (x, x[::-1].copy()))
    assert diff(a, b, tolerance=1e-3) is not None
    for noise in (
        np.full(x.shape, 1e-4),
        1e-4 * np.sign(np.random.default_rng(1).random(x.shape) - 0.5),
    ):
        c = trace(lambda noise=noise: ge.tensor(x + noise).exp())
        assert diff(a, c, tolerance=1e-2) is None
        assert diff(a, c, tolerance=1e-7) is not None


def test_traces_are_saved_and_loaded(tmp_path: Path) -> None:
    t = run()
    t.save(tmp_path / "step.json")
    again = load_trace(tmp_path / "step.json")
    assert again.operations == t.operations
    assert diff(t, again) is None
    with pytest.raises(ValueError, match=r"ends with .svg, .dot, .trace.json or .json"):
        t.save(tmp_path / "step.txt")


def test_chrome_trace(tmp_path: Path) -> None:
    t = run()
    t.operations[0].gpu_seconds = t.operations[1].gpu_seconds = 0.5
    t.save(tmp_path / "step.trace.json")
    events = json.loads((tmp_path / "step.trace.json").read_text())["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    assert rows == {1: "CPU", 2: "GPU"}
    timed = [e for e in events if e["ph"] == "X"]
    assert {e["cat"] for e in timed} == {"module", "forward", "backward"}
    assert len(timed) == len(t.operations) + len(t.modules) + 2
    first, second = (e for e in timed if e["tid"] == 2)
    assert first["dur"] == 5e5
    assert second["ts"] == first["ts"] + first["dur"]


def test_drawings_box_modules(tmp_path: Path) -> None:
    t = run()
    t.save(tmp_path / "step.svg")
    root = ElementTree.parse(tmp_path / "step.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    texts = [element.text or "" for element in root.iter(f"{name}text")]
    forward = [o for o in t.operations if o.phase == "forward"]
    boxes = ["Net", "body", "0", "1", "head"]
    assert [text for text in texts if " " not in text] == boxes
    assert len(texts) == len(forward) + len(boxes)
    assert len(list(root.iter(f"{name}rect"))) == len(boxes) + 1
    sources = sum(value.source is not None for o in forward for value in o.inputs)
    assert len(list(root.iter(f"{name}path"))) == sources

    t.save(tmp_path / "step.dot")
    dot = (tmp_path / "step.dot").read_text()
    assert dot.count("{") == dot.count("}") == len(boxes) + 1
    assert dot.count("->") == sources
    assert 'label="head";' in dot


@pytest.mark.gpu
def test_times_of_the_gpu_come_from_events() -> None:
    x = ge.ones(1000, 1000, device="cuda", requires_grad=True)
    with trace(checksums=False) as t:
        (x @ x).sum().backward()
    work = [o for o in t.operations if o.name != "AccumulateGrad"]
    assert all(o.gpu_seconds is not None and o.gpu_seconds >= 0 for o in work)


def test_functions_of_the_user_are_recorded_like_any_node() -> None:
    class Pair(ge.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any) -> Any:
            return x * 2.0, x + 1.0

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0] * 2.0 + grads[1]

    x = ge.ones(3, requires_grad=True)
    with trace() as t:
        a, b = Pair.apply(x)
        (a * b).sum().backward()
    assert ge.equal(x.grad, ge.full(3, 6.0))
    node = [o for o in t.operations if o.name == "PairBackward"][-1]
    assert "test_trace.py" in node.line
    assert [value.shape for value in node.outputs] == [(3,)]
    assert [o.name for o in t.operations if o.phase == "forward"] == ["mul", "add", "mul", "sum"]


def test_the_second_derivatives_operations_belong_to_backward() -> None:
    x = ge.ones(3, requires_grad=True)
    with trace() as t:
        (g,) = ge.autograd.grad(x.exp().sum(), x, create_graph=True)
        g.sum().backward()
    assert [o.name for o in t.operations if o.phase == "forward"] == ["exp", "sum", "sum"]
    names = [o.name for o in t.operations if o.phase == "backward"]
    assert {"mul", "ExpBackward0", "MulBackward0"} <= set(names)

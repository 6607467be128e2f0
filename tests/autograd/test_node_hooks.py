"""Hooks of nodes and tensors: when they run, what they see and what they may replace."""

from __future__ import annotations

import gc
import random
import threading
import weakref
from typing import Any

import pytest

import gradengine as ge

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def library_called(name):
    return ge if name == "gradengine" else pytest.importorskip("torch")


def listed(values):
    """Give the values of tensors in a hook's tuple."""
    return tuple(None if value is None else value.tolist() for value in values)


# ---- nodes ---------------------------------------------------------------------------------------


@both
def test_a_node_has_a_name_inputs_and_metadata(library):
    lib = library_called(library)
    x = lib.ones(2, requires_grad=True)
    y = x * 2
    node = y.grad_fn
    assert node.name() == "MulBackward0"
    (accumulate, place), (missing, _) = node.next_functions
    assert (accumulate.name().split("::")[-1], place, missing) == ("AccumulateGrad", 0, None)
    assert accumulate.variable is x
    assert accumulate.next_functions == ()
    assert (node.metadata, accumulate.metadata) == ({}, {})
    node.metadata["seen"] = 3
    assert y.grad_fn.metadata == {"seen": 3}
    y.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0]


@both
def test_the_order_of_hooks(library):
    lib = library_called(library)
    log = []
    x = lib.tensor([1.0, 2.0], requires_grad=True)
    y = x * 2
    node, (accumulate, _) = y.grad_fn, y.grad_fn.next_functions[0]
    # Not in the order in which they run
    node.register_hook(lambda inputs, outputs: log.append(("post", listed(inputs + outputs))))
    accumulate.register_hook(
        lambda inputs, outputs: log.append(("leaf post", inputs, x.grad is None))
    )
    accumulate.register_prehook(lambda outputs: log.append(("leaf pre", x.grad is None)))
    x.register_post_accumulate_grad_hook(lambda leaf: log.append(("set", leaf.grad.tolist())))
    x.register_hook(lambda grad: log.append(("leaf", grad.tolist())))
    node.register_prehook(lambda outputs: log.append(("pre", listed(outputs))))
    y.register_hook(lambda grad: log.append(("tensor", grad.tolist())))
    y.sum().backward()
    assert log == [
        ("tensor", [1.0, 1.0]),
        ("pre", ([1.0, 1.0],)),
        ("post", ([2.0, 2.0], None, [1.0, 1.0])),
        ("leaf", [2.0, 2.0]),
        ("leaf pre", True),
        ("set", [2.0, 2.0]),
        ("leaf post", (), False),
    ]


@both
def test_hooks_of_one_kind_run_in_order_and_each_sees_what_the_one_before_returned(library):
    lib = library_called(library)
    x, w = lib.ones(2, requires_grad=True), lib.ones(2, requires_grad=True)
    y = x * w
    seen = []
    y.grad_fn.register_prehook(lambda outputs: (outputs[0] * 2,))
    y.grad_fn.register_prehook(lambda outputs: seen.append(listed(outputs)))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 10, inputs[1]))
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(listed(inputs + outputs)))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0], inputs[1] * 100))
    y.sum().backward()
    assert seen == [([2.0, 2.0],), ([20.0, 20.0], [2.0, 2.0], [2.0, 2.0])]
    assert x.grad.tolist() == [20.0, 20.0]
    assert w.grad.tolist() == [200.0, 200.0]


@both
def test_a_gradient_for_each_use_of_one_input(library):
    lib = library_called(library)
    x = lib.tensor([3.0], requires_grad=True)
    y = x * x
    seen = []
    y.grad_fn.register_hook(lambda inputs, outputs: seen.append(listed(inputs)))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2, inputs[1]))
    y.backward()
    assert seen == [([3.0], [3.0])]
    assert x.grad.tolist() == [9.0]


@both
def test_a_hook_may_take_a_gradient_away(library):
    lib = library_called(library)
    x, w = lib.ones(1, requires_grad=True), lib.ones(1, requires_grad=True)
    y = x * w
    y.grad_fn.register_hook(lambda inputs, outputs: (None, inputs[1]))
    y.backward()
    assert x.grad is None
    assert w.grad.tolist() == [1.0]
    z = w * 1
    z.grad_fn.register_prehook(lambda outputs: (None,))
    z.backward()
    assert w.grad.tolist() == [1.0]


@both
def test_hooks_go_when_they_are_removed(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    y = x * 1
    node, (accumulate, _) = y.grad_fn, y.grad_fn.next_functions[0]
    seen = []
    handles = [
        node.register_hook(lambda *_: seen.append("post")),
        node.register_prehook(lambda *_: seen.append("pre")),
        accumulate.register_hook(lambda *_: seen.append("leaf post")),
        accumulate.register_prehook(lambda *_: seen.append("leaf pre")),
        x.register_post_accumulate_grad_hook(lambda *_: seen.append("set")),
    ]
    y.backward(retain_graph=True)
    assert len(seen) == 5
    for handle in handles:
        handle.remove()
        handle.remove()  # does nothing more
    y.backward(retain_graph=True)
    assert len(seen) == 5
    with node.register_hook(lambda *_: seen.append("post")):
        y.backward(retain_graph=True)
    y.backward()
    assert len(seen) == 6


@both
def test_a_hook_that_is_added_by_a_hook_runs_the_next_time(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    y = x * 1
    seen = []
    first = y.register_hook(
        lambda grad: (
            seen.append("first") or (y.register_hook(lambda grad: seen.append("second")) and None)
        )
    )
    y.backward(retain_graph=True)
    first.remove()
    y.backward()
    assert seen == ["first", "second"]


BAD_AFTER = {
    "number": (
        lambda i, o: (i[0],),
        RuntimeError,
        "incorrect number of values .got 1, but expected 2",
    ),
    "tensor": (lambda i, o: i[0], TypeError, "expected tuple, but hook returned"),
    "list": (lambda i, o: list(i), TypeError, "expected tuple, but hook returned"),
    "none": (
        lambda i, o: (i[0], i[0]),
        RuntimeError,
        "can't replace a None gradient with a non-None",
    ),
    "value": (lambda i, o: (3, None), TypeError, "must return a Tensor|expected Variable"),
    "shape": (lambda i, o: (i[0].sum(), None), RuntimeError, "has changed the size of value"),
    "dtype": (
        lambda i, o: (i[0].double(), None),
        RuntimeError,
        "has changed the (d?type) of value",
    ),
}


@both
@pytest.mark.parametrize("case", BAD_AFTER)
def test_what_a_hook_after_a_node_returns_is_checked(library, case):
    lib = library_called(library)
    hook, error, text = BAD_AFTER[case]
    y = lib.ones(2, requires_grad=True) * 2
    y.grad_fn.register_hook(hook)
    with pytest.raises(error, match=text):
        y.sum().backward()


@both
@pytest.mark.parametrize("case", [case for case in BAD_AFTER if case != "none"])
def test_what_a_hook_before_a_node_returns_is_checked(library, case):
    lib = library_called(library)
    hook, error, text = BAD_AFTER[case]
    y = lib.ones(2, requires_grad=True) * 2
    wrong = {
        "number": lambda o: (o[0], o[0]),
        "value": lambda o: (3,),
        "shape": lambda o: (o[0].sum(),),
    }
    wrong["dtype"] = lambda o: (o[0].double(),)
    y.grad_fn.register_prehook(wrong.get(case, lambda o: hook(o, ())))
    with pytest.raises(error, match=text.replace("got 1, but expected 2", "got 2, but expected 1")):
        y.sum().backward()


def test_messages_name_the_hook():
    def greedy(inputs, outputs):
        return inputs[0]

    y = ge.ones(2, requires_grad=True) * 2
    y.grad_fn.register_hook(greedy)
    with pytest.raises(TypeError, match="hook 'greedy' must return a tuple of Tensors or None"):
        y.sum().backward()


@both
def test_an_accumulate_grad_node_has_no_gradients_to_replace_after_it(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    accumulate = (x * 1).grad_fn.next_functions[0][0]
    accumulate.register_prehook(lambda outputs: (outputs[0] * 7,))
    x.sum().backward()
    assert x.grad.tolist() == [7.0]
    accumulate.register_hook(lambda inputs, outputs: (outputs[0],))
    with pytest.raises(RuntimeError, match="got 1, but expected 0"):
        x.sum().backward()


@both
def test_hooks_under_create_graph_are_part_of_the_graph(library):
    lib = library_called(library)
    x = lib.tensor([3.0], requires_grad=True)
    w = lib.tensor([2.0], requires_grad=True)
    y = x * x
    y.grad_fn.register_prehook(lambda outputs: (outputs[0] * w,))
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * w, inputs[1]))
    (grad,) = lib.autograd.grad(y, x, create_graph=True)
    assert grad.tolist() == [3 * 4 + 3 * 2.0]
    by_x, by_w = lib.autograd.grad(grad, (x, w))
    assert by_x.tolist() == [4 + 2.0]
    assert by_w.tolist() == [3 * 2 * 2.0 + 3]


@both
def test_hooks_run_in_the_grad_mode_of_the_walk(library):
    lib = library_called(library)
    x = lib.tensor([3.0], requires_grad=True)
    modes = []
    y = x * x
    y.grad_fn.register_hook(lambda *_: modes.append(lib.is_grad_enabled()))
    y.grad_fn.register_prehook(lambda *_: modes.append(lib.is_grad_enabled()))
    x.register_hook(lambda *_: modes.append(lib.is_grad_enabled()))
    y.backward(retain_graph=True)
    lib.autograd.grad(y, x, create_graph=True)
    assert modes == [False] * 3 + [True] * 3


@both
def test_a_walk_to_some_inputs_runs_the_hooks_on_its_way_alone(library):
    lib = library_called(library)
    x, w = lib.ones(1, requires_grad=True), lib.ones(1, requires_grad=True)
    log = []
    y = x * w
    z = y * 2
    for name, tensor in (("x", x), ("w", w), ("y", y)):
        tensor.register_hook(lambda grad, name=name: log.append(name))
    y.grad_fn.register_prehook(lambda outputs: log.append("pre"))
    y.grad_fn.register_hook(lambda inputs, outputs: log.append(listed(inputs)))
    x.register_post_accumulate_grad_hook(lambda leaf: log.append("set"))
    accumulate = y.grad_fn.next_functions[0][0]
    accumulate.register_prehook(lambda outputs: log.append("leaf pre"))
    accumulate.register_hook(lambda inputs, outputs: log.append("leaf post"))
    z.backward(inputs=[x], retain_graph=True)
    assert log == ["y", "pre", ([2.0], None), "x", "leaf pre", "set", "leaf post"]
    log.clear()
    lib.autograd.grad(z, x, retain_graph=True)
    assert log == ["y", "pre", ([2.0], None), "x"]
    log.clear()
    lib.autograd.grad(z, y, retain_graph=True)
    assert log == ["y"]  # it is asked for, not run


@both
def test_a_node_that_is_only_asked_for_keeps_what_it_saved(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    y = (x * 2).exp()
    z = y.exp()
    lib.autograd.grad(z, y)
    y.backward()
    assert x.grad is not None


@both
def test_a_nodes_hooks_do_not_keep_it_from_being_freed(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    y = x.exp()
    y.grad_fn.register_hook(lambda *_: None)
    y.backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


@both
def test_a_function_of_several_results_is_one_node(library):
    lib = library_called(library)

    function: Any = lib.autograd.Function

    class Split(function):
        @staticmethod
        def forward(ctx, x, y):
            ctx.set_materialize_grads(False)
            return x * 2, y * 3, lib.ones(1)

        @staticmethod
        def backward(ctx, first, second, third):
            return None if first is None else first * 2, None if second is None else second * 3

    x, y = lib.ones(1, requires_grad=True), lib.ones(1, requires_grad=True)
    first, second, _ = Split.apply(x, y)
    log = []
    first.grad_fn.register_hook(
        lambda inputs, outputs: log.append((listed(inputs), listed(outputs)))
    )
    second.grad_fn.register_prehook(lambda outputs: log.append(listed(outputs)))
    first.grad_fn.metadata["here"] = True
    assert second.grad_fn.metadata == {"here": True}
    assert first.grad_fn.next_functions[1][0].variable is y
    first.backward(retain_graph=True)
    assert log == [([1.0], None, None), (([2.0], None), ([1.0], None, None))]
    log.clear()
    first.grad_fn.register_prehook(lambda outputs: (outputs[0] * 5, outputs[1], None))
    (first + second).backward()
    assert log == [([1.0], [1.0], None), (([10.0], [3.0]), ([5.0], [1.0], None))]
    assert x.grad.tolist() == [2.0 + 10.0]
    assert y.grad.tolist() == [3.0]


# ---- tensors -------------------------------------------------------------------------------------


@both
def test_retain_grad_sees_the_gradient_after_all_hooks_of_the_tensor(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: grad * 2)
    y.retain_grad()
    y.register_hook(lambda grad: grad * 3)
    y.grad_fn.register_prehook(lambda outputs: (outputs[0] * 5,))
    y.backward()
    assert y.grad.tolist() == [6.0]
    assert x.grad.tolist() == [60.0]


@both
def test_a_retained_gradient_adds_up(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    y = x * 2
    y.retain_grad()
    y.backward(retain_graph=True)
    first = y.grad
    y.backward(retain_graph=True)
    assert y.grad.tolist() == [2.0]
    assert first.tolist() == [1.0]
    y.backward(inputs=[y])
    assert y.grad.tolist() == [3.0]


@both
def test_hooks_and_a_write_in_place(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    log = []
    y = x * 2
    y.register_hook(lambda grad: log.append(("before", grad.tolist())))
    y.retain_grad()
    y.mul_(3)
    y.register_hook(lambda grad: log.append(("after", grad.tolist())))
    y.backward()
    assert log == [("after", [1.0]), ("before", [3.0])]
    assert y.grad.tolist() == [1.0]
    assert x.grad.tolist() == [6.0]


@both
def test_hooks_of_a_leaf_outlive_a_time_without_gradient(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    log = []
    x.register_hook(lambda grad: log.append("hook"))
    x.register_post_accumulate_grad_hook(lambda leaf: log.append("set"))
    x.requires_grad_(False)
    assert not (x * 2).requires_grad
    x.requires_grad_()
    (x * 2).backward()
    assert log == ["hook", "set"]


# ---- after a leaf's grad is set ------------------------------------------------------------------


@both
def test_who_takes_a_post_accumulate_grad_hook(library):
    lib = library_called(library)
    x = lib.ones(1, requires_grad=True)
    with pytest.raises(RuntimeError, match="cannot be registered on non-leaf tensors"):
        (x * 2).register_post_accumulate_grad_hook(print)
    with pytest.raises(RuntimeError, match="doesn't require gradient"):
        lib.ones(1).register_post_accumulate_grad_hook(print)
    x.register_post_accumulate_grad_hook(lambda leaf: leaf.grad)
    with pytest.raises(RuntimeError, match="post accumulate grad hooks should return None"):
        (x * 2).backward()


@both
def test_an_optimizer_within_backward(library):
    """The parameters of a step in a hook are those of a step after backward, without any gradient left."""
    lib = library_called(library)
    start = [0.5, -1.0, 0.25]

    def trained(within):
        weights = [lib.tensor([value], requires_grad=True) for value in start]
        optimizers = {w: lib.optim.SGD([w], lr=0.1, momentum=0.9) for w in weights}

        def step(weight):
            optimizers[weight].step()
            optimizers[weight].zero_grad()

        held = []  # how many gradients there are at once
        if within:
            for w in weights:
                w.register_post_accumulate_grad_hook(
                    lambda w: held.append(sum(v.grad is not None for v in weights)) or step(w)
                )
        for _ in range(3):
            out = lib.ones(1)
            for w in weights:
                out = (out * w).tanh() + w
            out.backward()
            if within:
                assert all(w.grad is None for w in weights)
            else:
                for w in weights:
                    step(w)
        return [w.item() for w in weights], held

    within, held = trained(within=True)
    assert within == trained(within=False)[0]
    assert held == [1] * 9


@both
def test_a_leaf_is_done_with_as_soon_as_its_gradient_is_complete(library):
    lib = library_called(library)
    first, last = lib.ones(1, requires_grad=True), lib.ones(1, requires_grad=True)
    log = []
    y = first * 2
    z = y * last
    w = (z * last).exp()
    for name, tensor in (("y", y), ("z", z), ("w", w)):
        tensor.register_hook(lambda grad, name=name: log.append(name))
    last.register_post_accumulate_grad_hook(lambda leaf: log.append("last"))
    first.register_post_accumulate_grad_hook(lambda leaf: log.append("first"))
    w.backward()
    assert log == ["w", "z", "last", "y", "first"]


def test_the_hooks_of_a_leaf_that_nobody_holds_do_not_run():
    x = ge.ones(1, requires_grad=True)
    log = []
    x.register_post_accumulate_grad_hook(lambda leaf: log.append("set"))
    y = x * 2
    del x
    y.backward()
    assert not log


# ---- memory and threads --------------------------------------------------------------------------


def test_hooks_leave_no_garbage():
    gc.collect()
    gc.disable()
    try:
        x = ge.ones(1, requires_grad=True)
        y = x.exp()
        y.retain_grad()
        y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2,))
        y.grad_fn.register_prehook(lambda outputs: (outputs[0] * 2,))
        x.register_post_accumulate_grad_hook(lambda leaf: None)
        y.backward()
        references = [weakref.ref(x), weakref.ref(y), weakref.ref(y.grad_fn)]
        del x, y
        assert [reference() for reference in references] == [None] * 3
    finally:
        gc.enable()


def test_threads_share_a_node_with_hooks():
    x = ge.ones(64, requires_grad=True)
    y = x * x
    y.grad_fn.register_hook(lambda inputs, outputs: (inputs[0] * 2, inputs[1]))
    failures = []

    def walk():
        try:
            for _ in range(100):
                (grad,) = ge.autograd.grad(y, x, ge.ones(64), retain_graph=True)
                assert grad.tolist() == [3.0] * 64
        except BaseException as error:  # told below, in the test's own thread
            failures.append(error)

    threads = [threading.Thread(target=walk) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- programs ------------------------------------------------------------------------------------


class Program:
    """A random graph with random hooks, which note what they are given; the same for each library."""

    def __init__(self, lib, seed):
        self.lib, self.draw = lib, random.Random(seed)
        self.log = []
        self.leaves = [
            lib.tensor([v], dtype=lib.float64, requires_grad=True) for v in (0.5, -1.25, 2.0)
        ]
        self.tensors = list(self.leaves)
        for _ in range(self.draw.randrange(3, 9)):
            x, y = self.draw.choices(self.tensors, k=2)
            operation = self.draw.choice(["add", "mul", "tanh", "sub", "mul_"])
            if operation == "tanh":
                result = x.tanh()
            elif operation == "mul_" and not x.is_leaf:
                result = (x * 1.5).mul_(y)
            else:
                result = getattr(x, operation.rstrip("_"))(y)
            self.tensors.append(result)
        for index, tensor in enumerate(self.tensors):
            for _ in range(self.draw.randrange(3)):
                self.attach(index, tensor)

    def attach(self, index, tensor):
        node = tensor.grad_fn
        leaf = node is None
        if leaf:
            node = (tensor * 1).grad_fn.next_functions[0][0]
        kind = self.draw.choice(["hook", "pre", "post", "set" if leaf else "retain"])
        scale = self.draw.choice([None, 0.5, -2.0])

        def replaced(grads):
            return None if scale is None else tuple(g if g is None else g * scale for g in grads)

        def note(*grads):
            self.log.append((kind, index, *map(listed, grads)))

        if kind == "hook":
            tensor.register_hook(lambda g: note((g,)) or (None if scale is None else g * scale))
        elif kind == "pre":
            node.register_prehook(lambda go: note(go) or replaced(go))
        elif kind == "post":
            node.register_hook(lambda gi, go: note(gi, go) or replaced(gi))
        elif kind == "set":
            tensor.register_post_accumulate_grad_hook(lambda x: note((x.grad,)))
        else:
            tensor.retain_grad()

    def run(self):
        root = self.tensors[-1]
        names = {"all": None, "one": self.leaves[:1]}
        how = self.draw.choice(["all", "all", "one", "twice"])
        if root.is_leaf or (how == "one" and not self.depends(root, self.leaves[0])):
            how = "all"
        for _ in range(2 if how == "twice" else 1):
            root.backward(inputs=names.get(how), retain_graph=True)
        grads = [None if x.grad is None else x.grad.item() for x in self.leaves]
        grads += [
            x.grad.item() if x.retains_grad and x.grad is not None else None for x in self.tensors
        ]
        return self.log, grads

    def depends(self, root, leaf):
        stack = [root.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and getattr(node, "variable", None) is leaf:
                return True
            stack += [parent for parent, _ in node.next_functions if parent is not None]
        return False


def sorted_leaves(log):
    """Order neighbours in the log that belong to leaves: no rule says which of two comes first."""
    result, leaves = [], []
    for entry in [*log, None]:
        if entry is not None and entry[1] < 3:
            leaves.append(entry)
        else:
            result += sorted(leaves, key=lambda entry: entry[1])
            result.append(entry)
            leaves = []
    return result[:-1]


@pytest.mark.parametrize("seed", range(100))
def test_programs_with_hooks_do_as_in_pytorch(seed):
    torch = pytest.importorskip("torch")
    log, grads = Program(ge, seed).run()
    expected_log, expected_grads = Program(torch, seed).run()
    log, expected_log = sorted_leaves(log), sorted_leaves(expected_log)
    assert [entry[:2] for entry in log] == [entry[:2] for entry in expected_log]
    for entry, expected in zip(log, expected_log, strict=True):
        for values, others in zip(entry[2:], expected[2:], strict=True):
            assert [v if v is None else pytest.approx(v) for v in values] == list(others)
    assert [g if g is None else pytest.approx(g) for g in grads] == expected_grads

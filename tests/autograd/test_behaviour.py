"""What a user of PyTorch expects of the tape: one row a behaviour, each with the test that holds it.

A row names a test of this file or of another one. What gradengine leaves out on purpose, or does in another
way, is listed below the rows with the reason.
"""

from __future__ import annotations

import ast
import math
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import gradengine as ge

TESTS = Path(__file__).parents[1]
HERE = "autograd/test_behaviour.py"
FUNCTION, FUNC = "autograd/test_function.py", "autograd/test_func.py"
HOOKS, SAVED, VIEWS = (
    f"autograd/test_{name}.py" for name in ("node_hooks", "saved_hooks", "views")
)
IN_PLACE, ANOMALY = "autograd/test_in_place.py", "autograd/test_anomaly.py"
CHECKPOINT, GRADCHECK = "autograd/test_checkpoint.py", "autograd/test_gradcheck_options.py"
FUNCTIONAL, GRAPH = "autograd/test_functional.py", "autograd/test_graph.py"
TAPE, TENSOR, TUTORIAL = "test_tape.py", "test_tensor.py", "examples/test_tutorial.py"
OPTIMIZER, RESNET, PRINTING = "optim/test_optimizer.py", "models/test_resnet.py", "test_printing.py"
MODULES = "nn/test_hooks.py"


class Row(NamedTuple):
    """One behaviour, and the test that fails where it does not hold."""

    behaviour: str
    file: str
    test: str


TUTORIAL_ROWS = [
    Row(
        "the loss prints as tensor(..., grad_fn=<SumBackward0>)", TUTORIAL, "test_one_training_step"
    ),
    Row("its chain is Sum, Sub, Addmm; labels have no node", TUTORIAL, "test_the_tape"),
    Row("Q = 3a^3 - b^2: gradients equal to the last bit", TUTORIAL, "test_gradients_by_hand"),
    Row("Q.sum().backward() is the same", HERE, "test_a_seed_of_ones_is_the_gradient_of_the_sum"),
    Row("requires_grad spreads as the tutorial says", TUTORIAL, "test_what_is_left_out"),
    Row(
        "a frozen network: fc.weight and fc.bias alone move", RESNET, "test_only_the_new_head_moves"
    ),
    Row(
        "frozen by hand, statistics of BatchNorm still move, with a warning",
        RESNET,
        "test_freezing_by_hand_is_pytorchs_and_warns_of_all_twenty_layers",
    ),
    Row(
        "ResNet-18's graph has no more nodes than PyTorch's",
        RESNET,
        "test_the_training_graph_is_small",
    ),
    Row(
        "a frozen backbone records nothing",
        RESNET,
        "test_a_frozen_backbone_costs_no_graph_and_no_gradient_kernel",
    ),
    Row(
        "no more memory is saved than in PyTorch", HERE, "test_resnet18_saves_no_more_than_pytorch"
    ),
    Row("numbers print as in PyTorch", PRINTING, "test_any_numbers"),
    Row(
        "what is not the default is printed", TENSOR, "test_printing_names_what_is_not_the_default"
    ),
    Row("nodes have PyTorch's names", HERE, "test_names_of_nodes"),
]
LEAF_ROWS = [
    Row("is_leaf and grad_fn", TAPE, "test_leaves_are_what_no_recorded_operation_made"),
    Row(
        "to() returns self where nothing changes",
        TENSOR,
        "test_to_returns_self_where_nothing_changes",
    ),
    Row(
        "any input that requires grad passes it on",
        TAPE,
        "test_requires_grad_passes_on_if_any_input_has_it",
    ),
    Row("factories in no_grad", TAPE, "test_factories_honour_requires_grad_inside_no_grad"),
    Row(
        "a Parameter in no_grad requires grad",
        HERE,
        "test_a_parameter_made_in_no_grad_requires_grad",
    ),
    Row("integers and bools cannot require grad", TAPE, "test_only_floats_can_require_grad"),
    Row("a result cannot stop requiring grad", TAPE, "test_a_result_cannot_stop_requiring_grad"),
    Row(
        "grad of a result is None, and warns",
        TAPE,
        "test_grad_of_a_result_warns_and_names_retain_grad",
    ),
    Row("retain_grad, retains_grad", HERE, "test_retain_grad_and_retains_grad"),
    Row("retain_grad without a graph", TAPE, "test_retain_grad_needs_a_tensor_on_the_tape"),
    Row("what is assigned to grad is checked", TAPE, "test_assigning_grad_is_checked"),
    Row(
        "gradients add into the same object", TAPE, "test_later_gradients_add_into_the_same_object"
    ),
    Row("the seed is not aliased", TAPE, "test_leaves_never_share_the_memory_of_a_gradient"),
    Row(
        "create_graph adds out of place",
        TAPE,
        "test_create_graph_accumulates_without_writing_in_place",
    ),
    Row("zero_grad forgets by default", OPTIMIZER, "test_zero_grad_forgets_or_fills"),
    Row("no gradient is not a gradient of zero", OPTIMIZER, "test_none_is_not_zero"),
    Row("deepcopy and pickle of leaves alone", TAPE, "test_deepcopy_and_pickle_take_leaves_only"),
    Row(
        "numpy() and DLPack refuse what requires grad",
        TENSOR,
        "test_gradients_are_never_dropped_silently",
    ),
    Row("item, float, bool of one element", TENSOR, "test_python_numbers"),
]
BACKWARD_ROWS = [
    Row(
        "a scalar, or a seed of the right shape",
        TAPE,
        "test_backward_needs_a_scalar_or_a_seed_of_the_right_shape",
    ),
    Row("one element of any shape is a scalar", HERE, "test_one_element_of_any_shape_is_a_scalar"),
    Row("inputs= confines accumulation", TAPE, "test_inputs_confine_accumulation"),
    Row("edges and dicts in place of tensors", GRAPH, "test_an_edge_stands_for_its_tensor"),
    Row("a second pass over freed values", TAPE, "test_a_second_walk_over_freed_values_is_refused"),
    Row("nodes that saved nothing", TAPE, "test_nodes_that_saved_nothing_can_be_walked_again"),
    Row(
        "grad() returns a tuple, touches nothing",
        TAPE,
        "test_grad_returns_gradients_and_touches_nothing",
    ),
    Row("allow_unused, materialize_grads", TAPE, "test_grad_of_unused_inputs"),
    Row("by what does not require grad", HERE, "test_grad_by_what_does_not_require_it"),
    Row("newest node first", HERE, "test_nodes_run_newest_first"),
    Row("fan-in is summed before hooks", TAPE, "test_hooks_on_results_see_the_whole_gradient"),
    Row("a diamond", TAPE, "test_a_diamond_adds_both_ways"),
    Row("broadcasting is undone", HERE, "test_broadcasting_is_undone"),
    Row(
        "the leaf's dtype comes back",
        TAPE,
        "test_gradients_keep_their_leaf_dtype_through_promotion",
    ),
    Row(
        "in place, shapes are those of the tensor",
        TAPE,
        "test_in_place_shapes_and_dtypes_are_checked",
    ),
    Row("kinks, ties, bounds", HERE, "test_points_without_a_derivative"),
    Row("where with a branch that is nan", HERE, "test_the_branch_not_taken_may_still_make_nan"),
    Row("... is named in anomaly mode", ANOMALY, "test_the_trap_of_where_is_named"),
]
MODE_ROWS = [
    Row(
        "no_grad, enable_grad",
        TAPE,
        "test_no_grad_is_a_context_a_decorator_and_survives_exceptions",
    ),
    Row("set_grad_enabled", TAPE, "test_set_grad_enabled_acts_at_once_and_as_a_context"),
    Row("generators", TAPE, "test_a_generator_keeps_its_mode_between_its_own_yields_only"),
    Row("threads", TAPE, "test_each_thread_has_its_own_mode"),
    Row("views made in no_grad", VIEWS, "test_views_made_outside_the_tape_are_not_written_on_it"),
    Row("detach() and .data share the counter", IN_PLACE, "test_data_shares_the_counter"),
]
IN_PLACE_ROWS = [
    Row(
        "a write counts in all that share memory",
        IN_PLACE,
        "test_every_write_counts_once_in_all_that_share_the_memory",
    ),
    Row(
        "a saved value that was written",
        TAPE,
        "test_a_changed_value_that_backward_needs_is_refused",
    ),
    Row("what nobody saved may be written", TAPE, "test_a_change_that_nobody_needs_is_fine"),
    Row("leaves, views of leaves, several views, expanded memory", IN_PLACE, "test_refused_writes"),
    Row("leaves in no_grad", TAPE, "test_leaves_are_written_only_outside_the_tape"),
    Row(
        "views and bases follow each other",
        VIEWS,
        "test_a_write_to_a_view_moves_the_base_and_the_view",
    ),
    Row("_base, _is_view, _version", VIEWS, "test_a_tensor_knows_its_base"),
    Row(
        "graph.increment_version",
        IN_PLACE,
        "test_a_change_of_the_array_that_was_announced_is_caught",
    ),
    Row("the line that wrote is named", IN_PLACE, "test_an_error_names_the_line_of_the_change"),
    Row(
        "any program of views and writes",
        "autograd/test_view_programs.py",
        "test_programs_of_views_and_writes",
    ),
]
HOOK_ROWS = [
    Row("order of all hooks", HOOKS, "test_the_order_of_hooks"),
    Row(
        "a tensor's hooks run once, and may replace",
        TAPE,
        "test_hooks_run_once_in_order_and_may_replace",
    ),
    Row("what a hook returns is checked", TAPE, "test_bad_hooks_are_named"),
    Row(
        "hooks after accumulation are for leaves",
        HOOKS,
        "test_who_takes_a_post_accumulate_grad_hook",
    ),
    Row("hooks before and after a node", HOOKS, "test_hooks_go_when_they_are_removed"),
    Row(
        "hooks on several tensors: all",
        GRAPH,
        "test_a_hook_on_all_runs_when_the_last_gradient_is_there",
    ),
    Row("hooks on several tensors: any", GRAPH, "test_a_hook_on_any_runs_with_the_first_gradient"),
    Row(
        "saved_tensors_hooks: the innermost wins",
        SAVED,
        "test_the_innermost_of_nested_blocks_counts",
    ),
    Row("save_on_cpu", SAVED, "test_save_on_cpu_keeps_copies_with_their_layout"),
    Row("disable_saved_tensors_hooks", SAVED, "test_hooks_can_be_disabled"),
    Row("a pack hook must not write", SAVED, "test_a_pack_hook_must_not_write"),
]
FUNCTION_ROWS = [
    Row("forward, backward, and the node's name", FUNCTION, "test_gradients_and_name"),
    Row("setup_context", FUNCTION, "test_forward_beside_setup_context"),
    Row("needs_input_grad", FUNCTION, "test_needs_input_grad_and_arguments_that_are_no_tensors"),
    Row("saved_tensors", FUNCTION, "test_saved_tensors_are_checked_and_freed"),
    Row("mark_dirty", FUNCTION, "test_an_input_changed_in_place_and_marked_dirty"),
    Row("an input changed without mark_dirty", FUNCTION, "test_an_input_changed_in_secret_is_an_error"),
    Row("mark_non_differentiable", FUNCTION, "test_results_marked_and_of_integers_need_no_gradient"),
    Row("set_materialize_grads", FUNCTION, "test_a_result_that_nothing_depends_on_gives_zeros_or_none"),
    Row("once_differentiable", FUNCTION, "test_once_differentiable"),
    Row("wrong gradients", FUNCTION, "test_wrong_gradients_are_errors"),
    Row("gradients of a wrong type", FUNCTION, "test_gradients_of_a_wrong_type_are_errors"),
    Row("checkpoint", CHECKPOINT, "test_gradients_are_those_of_an_ordinary_graph"),
    Row("checkpoint draws again", CHECKPOINT, "test_random_numbers_are_drawn_again_and_the_stream_goes_on"),
    Row("checkpoint: determinism_check", CHECKPOINT, "test_a_function_that_changes_is_refused"),
    Row("anomaly mode warns, and names the line", ANOMALY, "test_the_line_of_forward_is_named"),
    Row("anomaly mode: check_nan=False", ANOMALY, "test_nothing_is_looked_for_without_check_nan"),
    Row("gradcheck finds what is wrong", GRADCHECK, "test_wrong_derivatives_are_found"),
    Row("gradcheck looks at its inputs", GRADCHECK, "test_inputs_are_looked_at"),
    Row("jacobian", FUNCTIONAL, "test_jacobian"),
    Row("hessian", FUNCTIONAL, "test_hessian"),
    Row("vjp, jvp, vhp, hvp", FUNCTIONAL, "test_products"),
    Row("strict, and a single element", FUNCTIONAL, "test_strict"),
    Row("func.grad with argnums and has_aux", FUNC, "test_values_and_auxiliary_results"),
    Row("func.jacfwd, jacrev", FUNC, "test_jacobians"),
    Row("func.functional_call", FUNC, "test_gradients_by_the_parameters_of_a_module"),
    Row("hooks of modules", MODULES, "test_the_order_of_all_hooks"),
]  # fmt: skip
ROWS = [
    *TUTORIAL_ROWS,
    *LEAF_ROWS,
    *BACKWARD_ROWS,
    *MODE_ROWS,
    *IN_PLACE_ROWS,
    *HOOK_ROWS,
    *FUNCTION_ROWS,
]

LEFT_OUT = {
    "complex numbers": "There is no complex dtype.",
    "inference_mode": "no_grad does it, without a second kind of tensor to explain.",
    "grad(is_grads_batched=), vmap": "There are no batched tensors: gradients are computed one by one.",
    "forward_ad, Function.jvp": "Forward mode is func.jvp and functional.jvp, by the double backward trick.",
    "grad_dtype": "A gradient has its tensor's dtype; another one is asked for by converting.",
    "grad_fn._saved_*": "What is saved is seen by saved_tensors_hooks and autograd.memory().",
    "allow_mutation_on_saved_tensors": "It copies without a word; the error names the line to change.",
    "checkpoint(use_reentrant=True)": "It loses gradients and keyword arguments: there is the other kind.",
    "a warning of create_graph's reference cycle": "There is no cycle: nodes do not hold their leaves.",
    ".data without the version counter": "A write through it would make gradients wrong in silence.",
    "linearize, stack_module_state, replace_all_batch_norm_modules_": "For vmap, or a line by hand.",
}


@cache
def _functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text())
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.behaviour)
def test_every_row_has_its_test(row: Row) -> None:
    assert row.test.startswith("test_")
    assert row.test in _functions(row.file)


def test_what_is_left_out_is_not_there() -> None:
    missing = ["inference_mode", "forward_ad", "allow_mutation_on_saved_tensors"]
    for home in (ge, ge.autograd, ge.autograd.graph):
        assert [name for name in missing if hasattr(home, name)] == []
    assert [
        name for name in ("vmap", "linearize", "stack_module_state") if hasattr(ge.func, name)
    ] == []
    with pytest.raises(TypeError, match="is_grads_batched"):
        ge.autograd.grad(leaf(1.0), leaf(1.0), is_grads_batched=True)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="complex"):
        ge.tensor([1j])
    x = leaf(1.0)
    assert not hasattr(x, "grad_dtype")
    assert not hasattr(x.exp().grad_fn, "_saved_result")


def leaf(*values: float) -> Any:
    return ge.tensor(list(values), device="cpu", requires_grad=True)


# ---- the tutorial --------------------------------------------------------------------------------


def test_a_seed_of_ones_is_the_gradient_of_the_sum() -> None:
    gradients = []
    for seed in (None, ge.ones(2, device="cpu")):
        a, b = leaf(2.0, 3.0), leaf(6.0, 4.0)
        q = 3 * a**3 - b**2
        (q.sum() if seed is None else q).backward(seed)
        gradients.append((a.grad.tolist(), b.grad.tolist()))
        assert bool((9 * a**2 == a.grad).all())
        assert bool((-2 * b == b.grad).all())
    assert gradients == [([36, 81], [-12, -8])] * 2


def test_resnet18_saves_no_more_than_pytorch() -> None:
    from gradengine.models import resnet18

    model = resnet18(weights=None)
    with ge.autograd.memory() as account:
        loss = model(ge.zeros(1, 3, 64, 64, device="cpu")).sum()
    assert loss.requires_grad
    # What PyTorch saves for one image of this size, without weights
    assert 0.5e6 < account.total <= 1.9e6


# A tensor of the library (4, 4) goes in; functions of networks are in nn.functional in both.
NAMES: dict[str, Any] = {
    "conv2d": lambda lib, x: lib.nn.functional.conv2d(x.reshape(1, 1, 4, 4), lib.ones(2, 1, 3, 3)),
    "batch_norm": lambda lib, x: lib.nn.functional.batch_norm(x, lib.zeros(4), lib.ones(4), training=True),
    "batch_norm in evaluation": lambda lib, x: lib.nn.functional.batch_norm(x, lib.zeros(4), lib.ones(4)),
    "relu": lambda lib, x: x.relu(),
    "relu_": lambda lib, x: (x * 1).relu_(),
    "max_pool2d": lambda lib, x: lib.nn.functional.max_pool2d(x.reshape(1, 1, 4, 4), 2),
    "avg_pool2d": lambda lib, x: lib.nn.functional.avg_pool2d(x.reshape(1, 1, 4, 4), 2),
    "adaptive_avg_pool2d to 1": lambda lib, x: lib.nn.functional.adaptive_avg_pool2d(x[None, None], 1),
    "adaptive_avg_pool2d to 3": lambda lib, x: lib.nn.functional.adaptive_avg_pool2d(x[None, None], 3),
    "flatten": lambda lib, x: x.flatten(),
    "linear": lambda lib, x: lib.nn.functional.linear(x, lib.ones(3, 4), lib.ones(3)),
    "linear of 3-D": lambda lib, x: lib.nn.functional.linear(x.reshape(2, 2, 4), lib.ones(3, 4), lib.ones(3)),
    "cross_entropy": lambda lib, x: lib.nn.functional.cross_entropy(x, lib.tensor([0, 1, 2, 3])),
    "log_softmax": lambda lib, x: x.log_softmax(0),
    "+": lambda lib, x: x + x,
    "+=": lambda lib, x: (x * 1).add_(x),
    "sum": lambda lib, x: x.sum(),
    "sum of a dim": lambda lib, x: x.sum(0),
    "mean": lambda lib, x: x.mean(),
    "mean of a dim": lambda lib, x: x.mean(1),
    "x**2": lambda lib, x: x**2,
    "x**x": lambda lib, x: x**x,
    "2**x": lambda lib, x: 2**x,
    "1-x": lambda lib, x: 1 - x,
    "x[0]": lambda lib, x: x[0],
    "x[1:]": lambda lib, x: x[1:],
    "x[list]": lambda lib, x: x[[0, 2]],
    "x[0]=1": lambda lib, x: _with_a_row_of_ones(x * 1),
    "T": lambda lib, x: x.T,
    "t": lambda lib, x: x.t(),
    "double": lambda lib, x: x.double(),
    "dropout": lambda lib, x: lib.nn.functional.dropout(x, 0.5),
    "max": lambda lib, x: x.max(),
    "max of a dim": lambda lib, x: x.max(0)[0],
    "amax": lambda lib, x: x.amax(0),
    "unbind": lambda lib, x: x.unbind()[0],
    "split": lambda lib, x: x.split(2)[0],
    "bmm": lambda lib, x: x.reshape(1, 4, 4) @ x.reshape(1, 4, 4),
    "mse_loss": lambda lib, x: lib.nn.functional.mse_loss(x, x * 2),
}  # fmt: skip
OTHER_NAMES = {
    "linear of 3-D": ("AddmmBackward0", "ViewBackward0"),  # one node: the rows are reshaped inside
    "bmm": ("BmmBackward0", "UnsafeViewBackward0"),  # one node
    "2**x": ("PowBackward1", "PowBackward2"),  # one operation for both
    "x[0]=1": ("CopySlices", "torch::autograd::CopySlices"),  # no namespace
    "mse_loss": ("MeanBackward0", "MseLossBackward0"),  # made of square and mean
}


def _with_a_row_of_ones(x: Any) -> Any:
    x[0] = 1
    return x


@pytest.mark.parametrize("name", NAMES)
def test_names_of_nodes(name: str) -> None:
    torch = pytest.importorskip("torch")
    found = []
    for library in (ge, torch):
        x = library.arange(16.0).reshape(4, 4).detach().requires_grad_()
        found.append(NAMES[name](library, x).grad_fn.name())
    ours, theirs = OTHER_NAMES.get(name, (found[0], found[0]))
    assert found == [ours, theirs]


# ---- leaves and backward -------------------------------------------------------------------------

both = pytest.mark.parametrize("library", ["gradengine", "torch"])


def torch_or_ours(library: str) -> Any:
    return ge if library == "gradengine" else pytest.importorskip("torch")


@both
def test_a_parameter_made_in_no_grad_requires_grad(library: str) -> None:
    lib = torch_or_ours(library)
    with lib.no_grad():
        assert lib.nn.Parameter(lib.ones(2)).requires_grad
        assert not lib.nn.Parameter(lib.ones(2), requires_grad=False).requires_grad


@both
def test_retain_grad_and_retains_grad(library: str) -> None:
    x = torch_or_ours(library).ones(2, requires_grad=True)
    y = x * 3
    x.retain_grad()
    assert (x.retains_grad, y.retains_grad) == (False, False)
    y.retain_grad()
    assert y.retains_grad
    (y * y).sum().backward()
    assert y.grad.tolist() == [6, 6]


@both
def test_one_element_of_any_shape_is_a_scalar(library: str) -> None:
    lib = torch_or_ours(library)
    for shape in ((), (1,), (1, 1, 1)):
        x = lib.ones(shape, requires_grad=True)
        (x * 2).backward()
        assert x.grad.shape == shape
        assert x.grad.sum().item() == 2


@both
def test_grad_by_what_does_not_require_it(library: str) -> None:
    lib = torch_or_ours(library)
    x, y = lib.ones(2, requires_grad=True), lib.ones(2)
    with pytest.raises(RuntimeError, match="of the differentiated Tensors does not require grad"):
        lib.autograd.grad((x * y).sum(), [x, y])


@both
def test_nodes_run_newest_first(library: str) -> None:
    lib = torch_or_ours(library)
    x = lib.ones(1, requires_grad=True)
    order: list[str] = []
    first, second = x * 2, x * 3
    third = first * 4
    for name, tensor in (("first", first), ("second", second), ("third", third)):
        tensor.register_hook(lambda grad, name=name: order.append(name))
    (third + second).sum().backward()
    assert order == ["third", "second", "first"]


@both
def test_broadcasting_is_undone(library: str) -> None:
    lib = torch_or_ours(library)
    x, y, z = (lib.ones(*shape, requires_grad=True) for shape in ((3, 1), (4,), (1, 1)))
    (x * y + z).sum().backward()
    assert [tuple(t.grad.shape) for t in (x, y, z)] == [(3, 1), (4,), (1, 1)]
    assert [t.grad.sum().item() for t in (x, y, z)] == [12, 12, 12]


KINKS: dict[str, tuple[Any, list[float], list[float]]] = {
    "abs": (lambda lib, x: x.abs(), [0.0, -2.0], [0, -1]),
    "relu": (lambda lib, x: x.relu(), [0.0, 1.0], [0, 1]),
    "norm": (lambda lib, x: x.norm(), [0.0, 0.0], [0, 0]),
    "max": (lambda lib, x: x.max(), [2.0, 2.0, 1.0], [0.5, 0.5, 0]),
    "amax": (lambda lib, x: x.amax(0), [2.0, 2.0, 1.0], [0.5, 0.5, 0]),
    "max of a dim": (lambda lib, x: x.max(0)[0], [1.0, 2.0, 2.0], [0, 1, 0]),
    "clamp": (lambda lib, x: x.clamp(0, 1), [0.0, 1.0, -1.0, 2.0], [1, 1, 0, 0]),
    "sort": (lambda lib, x: x.sort()[0][0], [3.0, 1.0, 2.0], [0, 1, 0]),
    "topk": (lambda lib, x: x.topk(1)[0], [3.0, 1.0, 2.0], [1, 0, 0]),
    "where": (lambda lib, x: lib.where(x > 1, x, x * 5), [2.0, 0.0], [1, 5]),
    "maximum": (lambda lib, x: lib.maximum(x, lib.ones(2)), [1.0, 2.0], [0.5, 1]),
}


@both
@pytest.mark.parametrize("name", KINKS)
def test_points_without_a_derivative(library: str, name: str) -> None:
    lib = torch_or_ours(library)
    call, values, expected = KINKS[name]
    x = lib.tensor(values, requires_grad=True)
    call(lib, x).sum().backward()
    assert x.grad.tolist() == expected


@both
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_the_branch_not_taken_may_still_make_nan(library: str) -> None:
    lib = torch_or_ours(library)
    x = lib.tensor([0.0, 2.0], requires_grad=True)
    lib.where(x == 0, 0.0, 1 / x).sum().backward()
    assert math.isnan(x.grad[0].item())
    np.testing.assert_allclose(x.grad[1].item(), -0.25)
    x.grad = None
    lib.where(x == 0, 0.0, 1 / lib.where(x == 0, 1.0, x)).sum().backward()
    assert x.grad.tolist() == [0, -0.25]

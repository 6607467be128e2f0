"""The tape: leaves and flags, accumulation, the walk, what is kept and when it goes, hooks."""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import threading
import warnings
import weakref

import numpy as np
import pytest

import gradengine as ge


def leaf(*values: float) -> ge.Tensor:
    return ge.tensor(list(values), requires_grad=True)


# ---- leaves and flags ----------------------------------------------------------------------------


def test_leaves_are_what_no_recorded_operation_made():
    x = leaf(1.0)
    y = x * 2
    assert x.is_leaf
    assert not y.is_leaf
    assert ge.tensor([1.0]).is_leaf
    assert (ge.tensor([1.0]) * 2).is_leaf
    assert y.detach().is_leaf
    with ge.no_grad():
        assert (x * 2).is_leaf


def test_requires_grad_passes_on_if_any_input_has_it():
    x, y = leaf(1.0), ge.tensor([2.0])
    assert (x + y).requires_grad
    assert not (y + y).requires_grad
    assert (x + y).grad_fn.next_functions[1] == (None, 0)


def test_factories_honour_requires_grad_inside_no_grad():
    with ge.no_grad():
        assert ge.zeros(2, requires_grad=True).requires_grad
        assert ge.Parameter(ge.zeros(2)).requires_grad


@pytest.mark.parametrize("dtype", [ge.int64, ge.bool])
def test_only_floats_can_require_grad(dtype):
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require"):
        ge.tensor([1], dtype=dtype, requires_grad=True)
    with pytest.raises(RuntimeError, match="only Tensors of floating point dtype can require"):
        ge.tensor([1], dtype=dtype).requires_grad_()


def test_a_result_cannot_stop_requiring_grad():
    y = leaf(1.0) * 2
    with pytest.raises(RuntimeError, match="change requires_grad flags of leaf variables.*detach"):
        y.requires_grad = False


def test_grad_of_a_result_warns_and_names_retain_grad():
    y = leaf(1.0) * 2
    with pytest.warns(UserWarning, match="not a leaf.*retain_grad"):
        assert y.grad is None
    y.retain_grad()
    (y * 3).sum().backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert y.grad.tolist() == [3.0]
    assert y.retains_grad


def test_retain_grad_needs_a_tensor_on_the_tape():
    with pytest.raises(RuntimeError, match="requires_grad=False"):
        ge.tensor([1.0]).retain_grad()


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        (3, TypeError, "expected to be a Tensor or None"),
        (ge.zeros(3), RuntimeError, "assign a gradient of size"),
        (ge.zeros(1, dtype=ge.float64), RuntimeError, "assign a gradient of dtype"),
    ],
)
def test_assigning_grad_is_checked(value, error, match):
    x = leaf(1.0)
    with pytest.raises(error, match=match):
        x.grad = value


# ---- accumulation --------------------------------------------------------------------------------


def test_later_gradients_add_into_the_same_object():
    x = leaf(1.0, 2.0)
    (x * x).sum().backward()
    first = x.grad
    (x * 3).sum().backward()
    assert x.grad is first
    assert first.tolist() == [5.0, 7.0]


def test_leaves_never_share_the_memory_of_a_gradient():
    x, y, seed = leaf(1.0, 2.0), leaf(3.0, 4.0), ge.ones(2)
    (x + y).backward(seed)
    assert not np.shares_memory(x.grad.numpy(), y.grad.numpy())
    assert not np.shares_memory(x.grad.numpy(), seed.numpy())
    x.grad.mul_(10)
    assert y.grad.tolist() == [1.0, 1.0]
    assert seed.tolist() == [1.0, 1.0]


def test_a_gradient_that_nobody_else_holds_is_not_copied():
    made = []

    @ge.operation.operation
    def double(x):
        return x * 2

    def pullback(grad):
        made.append(grad * 2)
        return made[-1]

    double.pullbacks(x=pullback)
    x = leaf(1.0)
    double(x).backward(ge.ones(1))
    assert x.grad.array is not made[0]  # `made` holds it too: a copy
    double.pullbacks(x=lambda grad: grad * 2)
    addresses = []
    x.register_hook(lambda grad: addresses.append(grad.array.ctypes.data))
    x.grad = None
    double(x).backward(ge.ones(1))
    assert x.grad.array.ctypes.data == addresses[0]


def test_an_expanded_gradient_becomes_ordinary_memory():
    x = leaf(1.0, 2.0, 3.0)
    x.sum().backward()
    assert x.grad.stride() == (1,)
    x.sum().backward()
    assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_create_graph_accumulates_without_writing_in_place():
    x = leaf(2.0)
    (x**3).sum().backward(create_graph=True)
    first = x.grad
    (x**3).sum().backward(create_graph=True)
    assert first.tolist() == [12.0]
    assert x.grad.tolist() == [24.0]


# ---- the walk ------------------------------------------------------------------------------------


def test_a_diamond_adds_both_ways():
    x = leaf(3.0)
    y = x * x
    (y + y * x).sum().backward()
    assert x.grad.tolist() == [2 * 3 + 3 * 9]


def test_a_chain_of_a_hundred_thousand_operations():
    x = leaf(1.0)
    y = x
    for _ in range(100_000):
        y = y + 0.001
    y.backward()
    assert x.grad.tolist() == [1.0]
    del y  # nor may freeing it recurse


def test_backward_needs_a_scalar_or_a_seed_of_the_right_shape():
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match="implicitly created only for scalar outputs"):
        (x * 2).backward()
    with pytest.raises(RuntimeError, match="Mismatch in shape"):
        (x * 2).backward(ge.ones(3))
    with pytest.raises(TypeError, match="gradient must be a Tensor, an array or None; got list"):
        (x * 2).backward([1.0, 1.0])
    with pytest.raises(RuntimeError, match="element 0 of tensors does not require grad"):
        ge.ones(1).backward()
    (x[:1] * 2).backward()  # one element of any shape counts as a scalar
    assert x.grad.tolist() == [2.0, 0.0]


def test_a_second_walk_over_freed_values_is_refused():
    x = leaf(1.0)
    y = (x * x).sum()
    y.backward()
    with pytest.raises(
        RuntimeError, match="MulBackward0: Trying to backward through the graph a second"
    ):
        y.backward()
    z = (x * x).sum()
    z.backward(retain_graph=True)
    z.backward()


def test_nodes_that_saved_nothing_can_be_walked_again():
    x = leaf(1.0)
    y = (x + 1).sum()
    y.backward()
    y.backward()
    assert x.grad.tolist() == [2.0]


def test_inputs_confine_accumulation():
    x, y = leaf(1.0), leaf(2.0)
    middle = x * y
    (middle * x).sum().backward(inputs=[x])
    assert y.grad is None
    assert x.grad.tolist() == [4.0]
    middle = x * y
    (middle * 3).sum().backward(inputs=middle)
    assert middle._grad.tolist() == [3.0]
    assert x.grad.tolist() == [4.0]
    with pytest.raises(RuntimeError, match="cannot be empty"):
        (x * y).backward(inputs=[])


def test_grad_returns_gradients_and_touches_nothing():
    x, y = leaf(2.0), leaf(5.0)
    (g,) = ge.autograd.grad((x * y).sum(), x)
    assert g.tolist() == [5.0]
    assert x.grad is None
    assert y.grad is None


def test_grad_runs_only_what_leads_to_its_inputs():
    x, y = leaf(2.0), leaf(5.0)
    ran = []
    branch = y * 3
    branch.register_hook(ran.append)
    ge.autograd.grad((x * branch).sum(), x)
    assert ran == []


def test_grad_of_unused_inputs():
    x, y = leaf(2.0), leaf(5.0)
    with pytest.raises(RuntimeError, match="index 1 appears to not have been used.*allow_unused"):
        ge.autograd.grad(x.sum(), [x, y])
    assert ge.autograd.grad(x.sum(), [x, y], allow_unused=True)[1] is None
    found = ge.autograd.grad(x.sum(), [x, y], materialize_grads=True)
    assert found[1].tolist() == [0.0]
    with pytest.raises(
        RuntimeError, match="one of the differentiated Tensors does not require grad"
    ):
        ge.autograd.grad(x.sum(), ge.ones(1))


def test_derivatives_of_any_order():
    x = leaf(2.0)
    y = x**5
    for expected in (80.0, 160.0, 240.0, 240.0, 120.0):
        (y,) = ge.autograd.grad(y.sum(), x, create_graph=True)
        assert y.tolist() == [expected]


def test_several_roots_and_seeds():
    x = leaf(1.0, 2.0)
    ge.autograd.backward([x * 2, x * 3], [ge.ones(2), ge.ones(2)])
    assert x.grad.tolist() == [5.0, 5.0]


def test_a_wrong_pullback_is_named():
    @ge.operation.operation
    def broken(x):
        return x * 2

    broken.pullbacks(x=lambda grad: grad[:1])
    with pytest.raises(
        RuntimeError, match="BrokenBackward0: a pullback must return its input's shape"
    ):
        broken(leaf(1.0, 2.0)).backward(ge.ones(2))


def test_gradients_keep_their_leaf_dtype_through_promotion():
    x = leaf(1.0)
    y = ge.tensor([2.0], dtype=ge.float64, requires_grad=True)
    z = x * y
    assert z.dtype == ge.float64
    z.sum().backward()
    assert (x.grad.dtype, y.grad.dtype) == (ge.float32, ge.float64)


# ---- what is kept --------------------------------------------------------------------------------


def test_saved_arrays_go_as_the_walk_passes():
    x = leaf(1.0, 2.0)
    middle = x * 2
    kept = weakref.ref(middle)
    out = (middle * middle).sum()
    del middle
    assert kept() is not None
    out.backward()
    assert kept() is None


def test_no_reference_cycle_holds_a_graph():
    gc.disable()
    try:
        x = leaf(1.0)
        y = x.exp().tanh()  # both keep their own result
        kept = weakref.ref(y)
        del x, y
        assert kept() is None
    finally:
        gc.enable()


def test_a_frozen_input_frees_what_only_it_needed():
    x, weight = leaf(1.0, 2.0), ge.tensor([3.0, 4.0])
    activation = x * 2
    kept = weakref.ref(activation)
    out = activation * weight
    del activation
    assert kept() is None  # only the gradient by weight would have needed it
    out.sum().backward()
    assert x.grad.tolist() == [6.0, 8.0]


def test_ten_thousand_steps_leak_nothing():
    x = leaf(1.0)

    def step() -> None:
        x.grad = None
        (x * x).exp().sum().backward()

    step()
    gc.collect()
    before = len(gc.get_objects())
    for _ in range(10_000):
        step()
    gc.collect()
    assert len(gc.get_objects()) <= before + 10


# ---- grad modes ----------------------------------------------------------------------------------


def test_no_grad_is_a_context_a_decorator_and_survives_exceptions():
    x = leaf(1.0)

    @ge.no_grad()
    def called():
        return x * 2

    @ge.no_grad
    def bare():
        return x * 2

    assert not called().requires_grad
    assert not bare().requires_grad
    with pytest.raises(ZeroDivisionError), ge.no_grad():
        raise ZeroDivisionError
    assert ge.is_grad_enabled()
    with ge.no_grad(), ge.enable_grad():
        assert (x * 2).requires_grad


def test_set_grad_enabled_acts_at_once_and_as_a_context():
    with ge.set_grad_enabled(False):
        assert not ge.is_grad_enabled()
    assert ge.is_grad_enabled()
    ge.set_grad_enabled(False)
    assert not ge.is_grad_enabled()
    ge.set_grad_enabled(True)

    @ge.set_grad_enabled(False)
    def decorated():
        return ge.is_grad_enabled()

    assert ge.is_grad_enabled()
    assert not decorated()


def test_a_generator_keeps_its_mode_between_its_own_yields_only():
    @ge.no_grad()
    def generator():
        received = yield ge.is_grad_enabled()
        assert received == "sent"
        try:
            yield ge.is_grad_enabled()
        except KeyError:
            yield "caught"
        return "done"

    running = generator()
    assert next(running) is False
    assert ge.is_grad_enabled()
    assert running.send("sent") is False
    assert running.throw(KeyError()) == "caught"
    assert ge.is_grad_enabled()
    with pytest.raises(StopIteration, match="done"):
        next(running)


def test_each_thread_has_its_own_mode():
    seen = []
    with ge.no_grad():
        thread = threading.Thread(target=lambda: seen.append(ge.is_grad_enabled()))
        thread.start()
        thread.join()
    assert seen == [True]


# ---- hooks ---------------------------------------------------------------------------------------


def test_hooks_run_once_in_order_and_may_replace():
    x = leaf(1.0)
    seen = []
    first = x.register_hook(lambda grad: seen.append(grad.tolist()))
    x.register_hook(lambda grad: grad * 2)
    x.register_hook(lambda grad: seen.append(grad.tolist()))
    (x * 3 + x).sum().backward()
    assert seen == [[4.0], [8.0]]
    assert x.grad.tolist() == [8.0]
    first.remove()
    first.remove()
    (x * 1).sum().backward()
    assert len(seen) == 3


def test_hooks_on_results_see_the_whole_gradient():
    x = leaf(1.0)
    y = x * 2
    seen = []
    y.register_hook(lambda grad: seen.append(grad.tolist()))
    (y * 3 + y * 4).sum().backward()
    assert seen == [[7.0]]


def test_bad_hooks_are_named():
    x = leaf(1.0, 2.0)

    def shrink(grad):
        return grad[:1]

    with (
        x.register_hook(shrink),
        pytest.raises(RuntimeError, match="hook 'shrink' has changed the size"),
    ):
        x.sum().backward()
    widen = x.register_hook(lambda grad: grad.double())
    with widen, pytest.raises(RuntimeError, match="has changed the dtype of value"):
        x.sum().backward()
    with pytest.raises(
        RuntimeError, match="cannot register a hook on a tensor that doesn't require"
    ):
        ge.ones(1).register_hook(shrink)


# ---- in place ------------------------------------------------------------------------------------


def test_a_changed_value_that_backward_needs_is_refused():
    x = leaf(1.0)
    y = x.exp()
    z = y * 1
    y.add_(1)
    with pytest.raises(RuntimeError, match="ExpBackward0.*modified by an inplace"):
        z.sum().backward()


def test_a_changed_input_that_backward_needs_is_refused_also_through_views_and_detach():
    for change in (
        lambda y: y.add_(1),
        lambda y: y[:1].fill_(0),
        lambda y: y.detach().add_(1),
        lambda y: y.data.add_(1),
        lambda y: y.__setitem__(0, 5.0),
    ):
        x, y = leaf(1.0, 2.0), ge.tensor([3.0, 4.0])
        z = (x * y).sum()
        change(y)
        with pytest.raises(RuntimeError, match="MulBackward0.*modified by an inplace"):
            z.backward()


def test_a_change_that_nobody_needs_is_fine():
    x = leaf(1.0)
    y = x + 1
    z = (y + 1).sum()
    y.add_(5)
    z.backward()
    assert x.grad.tolist() == [1.0]


def test_in_place_operations_are_recorded():
    x = leaf(2.0)
    y = x * 3
    y *= x
    y[0] = y[0] + 1
    y.sum().backward()
    assert x.grad.tolist() == [12.0]


def test_leaves_are_written_only_outside_the_tape():
    x = leaf(1.0)
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x += 1
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        x[0] = 1
    with ge.no_grad():
        x += 1
    assert x.tolist() == [2.0]
    assert x.requires_grad


def test_in_place_shapes_and_dtypes_are_checked():
    x = ge.zeros(3, 1)
    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
        x += ge.ones(3, 4)
    i = ge.tensor([1, 2])
    with pytest.raises(RuntimeError, match="can't be cast"):
        i += 0.5
    assert i.tolist() == [1, 2]


def test_a_view_taken_before_its_base_was_written_follows_it():
    x = leaf(1.0, 2.0)
    y = x * 1
    view = y[:1]
    y.mul_(3)
    (view * 2).backward()
    assert x.grad.tolist() == [6.0, 0.0]


# ---- copies --------------------------------------------------------------------------------------


def test_deepcopy_and_pickle_take_leaves_only():
    x = leaf(1.0)
    (x * 2).sum().backward()
    duplicate = copy.deepcopy(x)
    assert duplicate.requires_grad
    assert duplicate.grad.tolist() == [2.0]
    assert not np.shares_memory(duplicate.array, x.array)
    restored = pickle.loads(pickle.dumps(ge.Parameter(ge.ones(2))))
    assert isinstance(restored, ge.Parameter)
    assert restored.requires_grad
    with pytest.raises(RuntimeError, match="graph leaves"):
        copy.deepcopy(x * 2)
    with pytest.raises(RuntimeError, match="graph leaves"):
        pickle.dumps(x * 2)


def test_backward_from_several_threads():
    x = leaf(1.0)
    results = []

    def work() -> None:
        y = leaf(2.0)
        for _ in range(200):
            y.grad = None
            (y * y * x.detach()).sum().backward()
        results.append(y.grad.tolist())

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(interval)
    assert results == [[4.0]] * 4


@pytest.mark.parametrize(
    "run",
    [
        lambda a, b: ge.maximum(a, b) * 2,
        lambda a, b: ge.where(a > b, a, b) * 2,
        lambda a, b: (a * b).relu() * 2,
        lambda a, b: ge.clamp(a * b, min=-1) * 2,
        lambda a, b: a**b * 2,
        lambda a, b: (a / b).abs().sqrt() * 2,
    ],
)
def test_backward_through_0_d_tensors(run):
    a, b = (ge.tensor(v, requires_grad=True) for v in (2.0, 1.5))
    wide = [ge.tensor([v], requires_grad=True) for v in (2.0, 1.5)]
    run(a, b).backward()
    run(*wide).backward()
    for narrow, one in zip((a, b), wide, strict=True):
        assert narrow.grad.shape == ()
        assert narrow.grad.item() == one.grad.item()

"""Optimizers: groups, errors, what is passed over, closures, and state dicts."""

from __future__ import annotations

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn, optim

OPTIMIZERS = [optim.SGD, optim.Adam, optim.AdamW]
each_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS, ids=lambda kind: kind.__name__)


def parameter(*values, grad=None):
    made = nn.Parameter(ge.tensor(list(values)))
    if grad is not None:
        made.grad = ge.tensor(grad)
    return made


# ---- SGD by hand ---------------------------------------------------------------------------------


def test_sgd_steps_along_the_gradient():
    p = parameter(1.0, 2.0, grad=[10.0, 20.0])
    array = p.array
    optim.SGD([p], lr=0.5).step()
    assert p.tolist() == [-4, -8]
    assert p.array is array


def test_momentum_starts_as_the_first_gradient():
    p = parameter(0.0, grad=[1.0])
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5, dampening=0.75)
    optimizer.step()
    assert p.item() == -1  # not dampened
    optimizer.step()
    assert p.item() == -1 - (0.5 + 0.25)
    assert optimizer.state[p]["momentum_buffer"].tolist() == [0.75]
    assert p.grad.tolist() == [1]


def test_the_default_rate_is_pytorchs():
    assert optim.SGD([parameter(1.0)]).param_groups[0]["lr"] == 1e-3


# ---- what all share ------------------------------------------------------------------------------


@each_optimizer
def test_parameters_without_gradient_are_passed_over(kind):
    moved, still = parameter(1.0, grad=[1.0]), parameter(1.0)
    frozen = parameter(1.0).requires_grad_(False)
    optimizer = kind([moved, still, frozen], weight_decay=0.5)
    optimizer.step()
    assert moved.item() != 1
    assert still.item() == frozen.item() == 1
    assert list(optimizer.state_dict()["state"]) in ([0], [])


def test_none_is_not_zero():
    p = parameter(1.0, grad=[1.0])
    optimizer = optim.SGD([p], lr=1.0, momentum=0.5)
    optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert p.item() == 0
    p.grad = ge.tensor([0.0])
    optimizer.step()
    assert p.item() == -0.5


@each_optimizer
def test_a_step_is_noticed_by_the_tape(kind):
    p = parameter(3.0)
    loss = (p * p).sum()
    p.grad = ge.tensor([1.0])
    kind([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_zero_grad_forgets_or_fills():
    p = parameter(1.0, grad=[2.0])
    optimizer = optim.SGD([p])
    kept = p.grad
    optimizer.zero_grad(set_to_none=False)
    assert p.grad is kept
    assert kept.tolist() == [0]
    optimizer.zero_grad()
    assert p.grad is None


def test_the_closure_runs_first_and_with_gradients():
    p = parameter(3.0)
    optimizer = optim.SGD([p], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (p * p).sum()
        loss.backward()
        return loss

    with ge.no_grad():
        loss = optimizer.step(closure)
    assert loss.item() == 9
    assert p.item() == 0
    assert optimizer.step() is None


def test_groups_have_their_own_options():
    a, b = parameter(0.0, grad=[1.0]), parameter(0.0, grad=[1.0])
    optimizer = optim.SGD([{"params": [a]}, {"params": b, "lr": 0.5}], lr=0.1)
    optimizer.step()
    assert a.item() == pytest.approx(-0.1)
    assert b.item() == -0.5
    optimizer.param_groups[0]["lr"] = 2.0
    optimizer.step()
    assert a.item() == pytest.approx(-2.1)
    c = parameter(0.0, grad=[1.0])
    optimizer.add_param_group({"params": [c]})
    optimizer.step()
    assert c.item() == pytest.approx(-0.1)


def test_repr_lists_the_options():
    assert repr(optim.SGD([parameter(1.0)], lr=0.1)) == (
        "SGD (\n"
        "Parameter Group 0\n"
        "    dampening: 0\n"
        "    lr: 0.1\n"
        "    maximize: False\n"
        "    momentum: 0\n"
        "    nesterov: False\n"
        "    weight_decay: 0\n"
        ")"
    )


# ---- errors --------------------------------------------------------------------------------------


def non_leaf():
    return parameter(1.0) * 2


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda: [], ValueError, "optimizer got an empty parameter list"),
        (lambda: iter(()), ValueError, "optimizer got an empty parameter list"),
        (
            lambda: parameter(1.0),
            TypeError,
            "should be an iterable of Tensors or dicts; got Parameter",
        ),
        (lambda: [1.0], TypeError, "can only optimize Tensors; got float"),
        (lambda: [non_leaf()], ValueError, "can't optimize a non-leaf Tensor"),
        (
            lambda: [parameter(1.0)] * 2,
            ValueError,
            "appear in more than one parameter group, or twice",
        ),
        (
            lambda: [{"params": [p]} for p in [parameter(1.0)] * 2],
            ValueError,
            "appear in more than one parameter group",
        ),
    ],
)
@each_optimizer
def test_bad_parameters_are_refused(kind, params, error, message):
    with pytest.raises(error, match=message):
        kind(params())


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (optim.SGD, {"lr": -0.1}, r"SGD: Invalid learning rate.*\(lr >= 0\); got lr=-0.1"),
        (optim.SGD, {"lr": float("nan")}, "Invalid learning rate.*got lr=nan"),
        (optim.SGD, {"momentum": -1}, "Invalid momentum value.*got momentum=-1"),
        (optim.SGD, {"weight_decay": -1}, "Invalid weight_decay.*got weight_decay=-1"),
        (optim.SGD, {"nesterov": True}, "Nesterov momentum requires a momentum and zero dampening"),
        (
            optim.SGD,
            {"nesterov": True, "momentum": 0.9, "dampening": 0.1},
            "Nesterov momentum requires .*; got momentum=0.9, dampening=0.1",
        ),
        (optim.Adam, {"lr": -0.1}, "Adam: Invalid learning rate.*got lr=-0.1"),
        (optim.Adam, {"eps": -1}, "Invalid eps.*got eps=-1"),
        (optim.AdamW, {"weight_decay": -1}, "Invalid weight_decay.*got weight_decay=-1"),
        (optim.Adam, {"betas": (0.9, 1.0)}, r"Invalid betas.*got betas=\(0.9, 1.0\)"),
    ],
)
def test_bad_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        kind([parameter(1.0)], **options)
    with pytest.raises(ValueError, match=message):
        kind([{"params": [parameter(1.0)]} | options])


def test_a_refused_group_is_not_added():
    optimizer = optim.SGD([parameter(1.0)])
    with pytest.raises(ValueError, match="Invalid learning rate"):
        optimizer.add_param_group({"params": [parameter(1.0)], "lr": -1})
    assert len(optimizer.param_groups) == 1


# ---- state dicts ---------------------------------------------------------------------------------


def trained(kind, steps, **options):
    """Return parameters and an optimizer that made `steps` steps along gradients that never change."""
    made = [parameter(1.0, 2.0, grad=[0.5, -1.0]), parameter(1.0), parameter(3.0, grad=[2.0])]
    optimizer = kind([{"params": made[:2]}, {"params": made[2:], "lr": 0.3}], **options)
    for _ in range(steps):
        optimizer.step()
    return made, optimizer


@pytest.mark.parametrize(
    "kind", [lambda p, **o: optim.SGD(p, momentum=0.9, **o), optim.Adam, optim.AdamW]
)
def test_state_goes_on_where_it_stopped(kind):
    made, optimizer = trained(kind, 3)
    others, resumed = trained(kind, 0, lr=7.0)
    with ge.no_grad():
        for other, p in zip(others, made, strict=True):
            other.copy_(p.detach())
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [[0, 1], [2]]
    assert list(saved["state"]) == [0, 2]
    resumed.load_state_dict(saved)
    for _ in range(2):
        optimizer.step()
        resumed.step()
    for other, p in zip(others, made, strict=True):
        np.testing.assert_array_equal(other.detach().array, p.detach().array)


def test_loaded_state_is_a_copy_like_the_parameter():
    _, optimizer = trained(lambda p, **o: optim.SGD(p, momentum=0.9, **o), 1)
    saved = optimizer.state_dict()
    p = nn.Parameter(ge.zeros(2, dtype="float64"))
    q = nn.Parameter(ge.zeros(1, dtype="float64"))
    other = optim.SGD([{"params": [p, nn.Parameter(ge.zeros(1))]}, {"params": [q]}])
    other.load_state_dict(saved)
    buffer = other.state[p]["momentum_buffer"]
    assert buffer.dtype == ge.float64
    buffer += 1
    assert saved["state"][0]["momentum_buffer"].tolist() == [0.5, -1]


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    kind = lambda p, **o: optim.SGD(p, momentum=0.9, **o)  # noqa: E731
    made, optimizer = trained(kind, 1)
    before = optimizer.state[made[0]]["momentum_buffer"].tolist()
    saved = optimizer.state_dict()
    one = optim.SGD([parameter(1.0)]).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups; got 1, expected 2"):
        optimizer.load_state_dict(one)
    swapped = saved | {"param_groups": saved["param_groups"][::-1]}
    with pytest.raises(
        ValueError, match=r"doesn't match the size of .*; got \[1, 2\], expected \[2, 1\]"
    ):
        optimizer.load_state_dict(swapped)
    wrong = saved | {"state": {0: {"momentum_buffer": ge.ones(5)}}}
    wrong["param_groups"] = [dict(group, lr=99.0) for group in saved["param_groups"]]
    with pytest.raises(
        ValueError,
        match=r"got state\[0\]\['momentum_buffer'\].shape=\(5,\), parameter.shape=\(2,\)",
    ):
        optimizer.load_state_dict(wrong)
    assert optimizer.param_groups[0]["lr"] == 1e-3
    assert optimizer.state[made[0]]["momentum_buffer"].tolist() == before


def test_state_survives_a_file(tmp_path):
    made, optimizer = trained(optim.Adam, 2)
    ge.save(optimizer.state_dict(), tmp_path / "optimizer.pth")
    others, resumed = trained(optim.Adam, 2)
    resumed.load_state_dict(ge.load(tmp_path / "optimizer.pth"))
    optimizer.step()
    resumed.step()
    for other, p in zip(others, made, strict=True):
        np.testing.assert_array_equal(other.detach().array, p.detach().array)


def test_nesterov_stands_where_pytorch_has_it():
    optimizer = optim.SGD([nn.Parameter(ge.ones(2))], 0.1, 0.9, 0, 0, True)
    assert optimizer.param_groups[0]["nesterov"] is True


# ---- all at once ---------------------------------------------------------------------------------


@each_optimizer
def test_parameters_of_several_dtypes_share_a_group(kind):
    values = [np.ones(3, np.float32), np.ones((2, 2)), np.ones(1, np.float32)]
    parameters = [nn.Parameter(ge.tensor(value)) for value in values]
    together = kind(parameters, lr=0.5)
    alone = [nn.Parameter(ge.tensor(value)) for value in values]
    for one, other in zip(parameters, alone, strict=True):
        one.grad = ge.full_like(one, 0.25)
        other.grad = ge.full_like(other, 0.25)
        kind([other], lr=0.5).step()
    together.step()
    for one, other in zip(parameters, alone, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.detach().numpy(), other.detach().numpy())


def test_a_subclass_may_say_how_one_parameter_moves():
    class Sign(optim.Optimizer):
        def check_options(self, options):
            pass

        def update(self, values, grad, state, options):
            values -= options["lr"] * np.sign(grad)
            state["step"] = state.get("step", 0) + 1

    p = parameter(1.0, 2.0, grad=[5.0, -5.0])
    optimizer = Sign([p], {"lr": 0.5})
    optimizer.step()
    assert p.tolist() == [0.5, 2.5]
    assert optimizer.state[p] == {"step": 1}

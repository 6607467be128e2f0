"""Optimizers and schedules beside PyTorch's: five steps with every option, and state passed both ways."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import gradengine as ge
from gradengine import nn, optim

torch = pytest.importorskip("torch")

SGD_OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "weight_decay": decay,
        "nesterov": nesterov,
        "maximize": maximize,
    }
    for momentum, dampening, decay, nesterov, maximize in itertools.product(
        (0, 0.9), (0, 0.4), (0, 0.05), (False, True), (False, True)
    )
    if not nesterov or (momentum and not dampening)
]
ADAM_OPTIONS = [
    {"betas": betas, "eps": eps, "weight_decay": decay, "maximize": maximize}
    for betas, eps, decay, maximize in itertools.product(
        ((0.9, 0.999), (0.5, 0.6)), (1e-8, 0.1), (0, 0.05), (False, True)
    )
]
CASES = [
    *(("SGD", {"lr": 0.1} | options) for options in SGD_OPTIONS),
    *(("Adam", {"lr": 0.1} | options) for options in ADAM_OPTIONS),
    *(("AdamW", {"lr": 0.1} | options) for options in ADAM_OPTIONS),
    *((name, {}) for name in ("SGD", "Adam", "AdamW")),
]
SHAPES = [(3, 4), (5,), ()]


def pair(name, options):
    """Return our optimizer and PyTorch's over equal parameters, in two groups."""
    generator = np.random.default_rng(0)
    values = [np.asarray(generator.standard_normal(shape)) for shape in SHAPES]
    ours = [nn.Parameter(ge.tensor(value)) for value in values]
    theirs = [torch.nn.Parameter(torch.tensor(value)) for value in values]
    made = [
        getattr(module, name)([{"params": ps[:2]}, {"params": ps[2:], "lr": 0.01}], **options)
        for module, ps in ((optim, ours), (torch.optim, theirs))
    ]
    return ours, theirs, *made


def step_both(ours, theirs, optimizer, optimizer_theirs, seed):
    generator = np.random.default_rng(seed)
    for p, q in zip(ours, theirs, strict=True):
        grad = np.asarray(generator.standard_normal(p.shape))
        if seed == 2 and p.ndim == 1:  # one gradient is missing once
            p.grad = q.grad = None
        else:
            p.grad, q.grad = ge.tensor(grad), torch.tensor(grad)
    optimizer.step()
    optimizer_theirs.step()


def assert_equal(ours, theirs):
    for p, q in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(p.detach().array, q.detach().numpy(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_five_steps(name, options):
    ours, theirs, optimizer, optimizer_theirs = pair(name, options)
    for seed in range(5):
        step_both(ours, theirs, optimizer, optimizer_theirs, seed)
        assert_equal(ours, theirs)


STATEFUL = [
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("Adam", {"lr": 0.1}),
    ("AdamW", {"lr": 0.1}),
]


@pytest.mark.parametrize(("name", "options"), STATEFUL)
def test_state_from_pytorch_through_a_file(name, options, tmp_path):
    ours, theirs, optimizer, optimizer_theirs = pair(name, options)
    for seed in range(3):
        step_both(ours, theirs, optimizer, optimizer_theirs, seed)
    torch.save(optimizer_theirs.state_dict(), tmp_path / "state.pth")
    fresh = getattr(optim, name)([{"params": ours[:2]}, {"params": ours[2:]}])
    fresh.load_state_dict(ge.load(tmp_path / "state.pth"))
    step_both(ours, theirs, fresh, optimizer_theirs, 3)
    assert_equal(ours, theirs)


@pytest.mark.parametrize(("name", "options"), STATEFUL)
def test_state_to_pytorch_through_a_file(name, options, tmp_path):
    ours, theirs, optimizer, optimizer_theirs = pair(name, options)
    for seed in range(3):
        step_both(ours, theirs, optimizer, optimizer_theirs, seed)
    ge.save(optimizer.state_dict(), tmp_path / "state.pth")
    fresh = getattr(torch.optim, name)([{"params": theirs[:2]}, {"params": theirs[2:]}])
    fresh.load_state_dict(torch.load(tmp_path / "state.pth", weights_only=True))
    step_both(ours, theirs, optimizer, fresh, 3)
    assert_equal(ours, theirs)


SCHEDULES = [
    ("StepLR", "StepLR", {"step_size": 3, "gamma": 0.5}),
    ("MultiStepLR", "MultiStepLR", {"milestones": [2, 5, 5], "gamma": 0.5}),
    ("CosineAnnealingLR", "CosineAnnealingLR", {"T_max": 5, "eta_min": 0.01}),
    ("LambdaLR", "LambdaLR", {"lr_lambda": lambda epoch: 1 / (1 + epoch)}),
    ("LambdaLR", "LambdaLR", {"lr_lambda": [lambda epoch: 0.9**epoch, lambda epoch: epoch]}),
]


@pytest.mark.parametrize(("ours", "theirs", "options"), SCHEDULES)
def test_schedule(ours, theirs, options):
    _, _, optimizer, optimizer_theirs = pair("SGD", {"lr": 0.1})
    schedule = getattr(optim, ours)(optimizer, **options)
    schedule_theirs = getattr(torch.optim.lr_scheduler, theirs)(optimizer_theirs, **options)
    for _ in range(12):
        rates = [group["lr"] for group in optimizer_theirs.param_groups]
        assert schedule.get_last_lr() == pytest.approx(rates, rel=1e-12, abs=1e-15)
        optimizer.step()
        optimizer_theirs.step()
        schedule.step()
        schedule_theirs.step()


def test_clip_grad_norm():
    generator = np.random.default_rng(0)
    for max_norm, norm_type in itertools.product((0.5, 100.0), (1.0, 2.0, 3.0, np.inf)):
        grads = [generator.standard_normal(shape) for shape in ((3, 4), (5,))]
        ours = [nn.Parameter(ge.zeros(g.shape, dtype="float64")) for g in grads]
        theirs = [torch.nn.Parameter(torch.zeros(g.shape, dtype=torch.float64)) for g in grads]
        for p, q, grad in zip(ours, theirs, grads, strict=True):
            p.grad, q.grad = ge.tensor(grad), torch.tensor(grad)
        norm = nn.clip_grad_norm_(ours, max_norm, norm_type)
        norm_theirs = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
        assert norm.item() == pytest.approx(norm_theirs.item(), rel=1e-12)
        assert_equal([p.grad for p in ours], [q.grad for q in theirs])
